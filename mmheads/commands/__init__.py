"""What the commands of mmheads share: options, heads, notes, and what a command ends with."""

from __future__ import annotations

import argparse
import json
import math
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mmheads import paths

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from mmheads.heads import HeadSet
    from mmheads.models import VLM
    from mmheads.scores import HeadScores

NOTHING_FOUND = 3
"""Exit code of `detect` when there are no heads to be found."""


class Outcome(NamedTuple):
    """What a command ends with.

    Attributes:
        data: What `--json` prints.
        lines: What is printed otherwise.
        code: Exit code.
    """

    data: dict[str, Any]
    lines: list[str]
    code: int = 0


Runner = Callable[[argparse.Namespace], Outcome]
"""Runs a command with its options."""


def add(
    subparsers: Any, name: str, run: Runner, about: str, examples: str
) -> argparse.ArgumentParser:
    """Add a command with the options that all of them have.

    Args:
        subparsers: Those of the console script.
        name: Name of the command.
        run: Runs it.
        about: What it does: the first sentence is shown in the list of commands.
        examples: Lines of examples.
    """
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=about.split(". ")[0].rstrip(".").replace("%", "%%"),
        description=textwrap.fill(about, 78),
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="", help="cpu, cuda:0 or auto")
    parser.add_argument("--json", action="store_true", help="print the results as one JSON object")
    parser.set_defaults(run=run)
    return parser


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the model as the first position."""
    parser.add_argument("model", help="folder, GGUF file, shipped model, or name on the hub")


def add_examples(parser: argparse.ArgumentParser) -> None:
    """Add the file of examples as the next position."""
    parser.add_argument("examples", help="a .jsonl file, or a folder with examples.jsonl")


def add_null_images(parser: argparse.ArgumentParser) -> None:
    """Add the option what the null question shows."""
    parser.add_argument(
        "--null-images",
        default="placeholders",
        choices=("placeholders", "pixels"),
        help="what the null question shows of the question's images",
    )


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], Any]:
    """A reader of numbers from `low` to `high` for argparse."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            limits = f"from {low:g} to {high:g}" if high < math.inf else f"of at least {low:g}"
            name = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {name} {limits}")
        return value

    return read


SHARE = number(float, 1e-6, 1.0)


def note(text: str) -> None:
    """Say something that is not a result: on standard error, so that pipes get only results."""
    print(f"mmheads: {text}", file=sys.stderr)


def duration(seconds: float) -> str:
    """A time as a reader wants it: "40 s", "3 min", "2.5 h"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def read_heads(given: str, fraction: float) -> HeadSet:
    """Heads from a score file (`.parquet`), a head list, or the name of a shipped list."""
    from mmheads.heads import HeadSet
    from mmheads.scores import HeadScores, union_of_top

    if given.endswith(".parquet"):
        return union_of_top(HeadScores.load(given), fraction)
    return HeadSet.load(given)


def known_heads(vlm: VLM) -> HeadSet:
    """The heads of a model that are shipped, or that the authors of paper A released.

    Raises:
        ValueError: There are none.
    """
    from mmheads.heads import HeadSet

    try:
        return HeadSet.load(vlm.model_id)
    except FileNotFoundError:
        pass
    try:
        return HeadSet.released(vlm.geometry)
    except ValueError:
        raise ValueError(
            f"no heads of {vlm} are shipped or released; find them with `mmheads detect {vlm}`, "
            "and give the list that it writes as --heads"
        ) from None


def listed(heads: HeadSet) -> list[dict[str, Any]]:
    """The heads with their scores, for `--json`."""
    return [
        {"name": str(head), "layer": head.layer, "head": head.head, "score": heads.scores.get(head)}
        for head in heads
    ]


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table as plain values; null where there is none."""
    rows: list[dict[str, Any]] = json.loads(table.to_json(orient="records", double_precision=15))
    return rows


def heat_maps(title: str, maps: dict[str, HeadScores], heads: HeadSet | None = None) -> Figure:
    """Maps of mean scores by name, side by side; some heads marked, layers without heads grey."""
    import numpy as np
    from matplotlib.figure import Figure

    from mmheads import figures, plots

    width = figures.COLUMN * len(maps)
    figure = Figure(figsize=(width, figures.COLUMN), dpi=200, layout="constrained")
    plots.set_title(figure, title, width=40 * len(maps), fontsize=9)
    axes = figure.subplots(1, len(maps), squeeze=False)[0]
    for axis, (name, scores) in zip(axes, maps.items(), strict=True):
        mean = np.where(scores.geometry.every, scores.mean, np.nan)
        image = plots.heat_map(axis, mean, marked=heads or ())
        axis.set_title(name, fontsize=8)
        figure.colorbar(image, label="calibrated retrieval score")
    return figure


def write_picture(figure: Figure, path: Path) -> None:
    """Write a figure to a file, whole or not at all."""
    with paths.write_whole(path) as temporary:
        figure.savefig(temporary)
