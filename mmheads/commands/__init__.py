"""What the commands of mmheads share: options, heads, notes, and what a command ends with."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
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


MODEL = "a folder, a GGUF file, a shipped model, or a name on the Hugging Face hub"
"""What the help says of a model."""


HEADS = (
    "a head list (as `detect` writes), a score file (as `score` writes), or the name of a model "
    "whose list is shipped"
)
"""What the help says of heads."""


FORMAT = """each line of examples.jsonl is one example:
    {"context": ["One page.", {"image": "page1.png"}], "question": "What was the total?",
     "answer": "1,204", "evidence": [{"part": 1, "box": [120, 300, 410, 340]}]}
Images are files beside examples.jsonl. Evidence is a part of the context, counted from 0, with a
"box" (left, top, right and bottom in pixels) or a "text" that occurs in it once. It is needed for
scores, and answers for `ablate` and gradients."""
"""What the help says of examples."""


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


def help_of(about: str | None) -> dict[str, Any]:
    """What a parser shows: a text above the options, and from its line "Examples:" on below."""
    text, _, examples = (about or "").partition("\n\nExamples:\n")
    raw = argparse.RawDescriptionHelpFormatter
    return {"description": text, "epilog": f"examples:\n{examples}", "formatter_class": raw}


def add(subparsers: Any, name: str, run: Runner, about: str | None) -> argparse.ArgumentParser:
    """Add a command with the options that all of them have.

    Args:
        subparsers: Those of the console script.
        name: Name of the command.
        run: Runs it.
        about: What it does, and after a line "Examples:" how it is called. The first line is shown
            in the list of commands.
    """
    shown = help_of(about)
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name, help=shown["description"].split("\n")[0].rstrip("."), **shown
    )
    parser.add_argument(
        "--device",
        default="",
        help="where the model runs: cpu, cuda:0, or auto for all GPUs together; by default the "
        "best that is there",
    )
    add_flag(parser, "--json", "print the results as one JSON object")
    parser.set_defaults(run=run)
    return parser


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the model as the first position."""
    parser.add_argument("model", help=MODEL)


def add_examples(parser: argparse.ArgumentParser) -> None:
    """Add the file of examples as the next position, and show what is in it."""
    parser.add_argument("examples", help="a .jsonl file, or a folder that holds examples.jsonl")
    parser.epilog = f"{parser.epilog}\n{FORMAT}"


def add_flag(parser: argparse.ArgumentParser, name: str, text: str) -> None:
    """Add an option that is given or not."""
    parser.add_argument(name, action="store_true", help=text)


def add_out(parser: argparse.ArgumentParser, text: str) -> None:
    """Add the option where results are written."""
    parser.add_argument("-o", "--out", default="", help=text)


def add_null_images(parser: argparse.ArgumentParser) -> None:
    """Add the option what the null question shows."""
    text = "what the question that says nothing shows in place of images: nothing, or the images"
    add_choice(parser, "--null-images", ("placeholders", "pixels"), text)


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


def add_number(
    parser: argparse.ArgumentParser,
    name: str,
    default: float,
    text: str,
    kind: type = int,
    low: float = 1,
    high: float = math.inf,
) -> None:
    """Add an option that is a number from `low` to `high`; the help shows a default but for 0."""
    text += f" (default: {default})" * bool(default)
    parser.add_argument(name, type=number(kind, low, high), default=default, help=text)


def add_choice(
    parser: argparse.ArgumentParser, name: str, choices: Sequence[str], text: str
) -> None:
    """Add an option that is one of some words, by default the first."""
    text += f" (default: {choices[0]})"
    parser.add_argument(name, default=choices[0], choices=choices, help=text)


def add_fraction(parser: argparse.ArgumentParser, of: str) -> None:
    """Add the option how many heads are chosen."""
    add_number(parser, "--fraction", 0.05, f"share of all heads {of}", float, 1e-6, 1.0)


def note(text: str) -> None:
    """Say something that is not a result: on standard error, so that pipes get only results."""
    print(f"mmheads: {text}", file=sys.stderr)


def duration(seconds: float) -> str:
    """A time as a reader wants it: "40 s", "3 min", "2.5 h"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def read_heads(given: str, fraction: float) -> HeadSet:
    """Heads from a score file (`.parquet`), a head list, or the name of a shipped list.

    Raises:
        ValueError: There is no head in it.
    """
    from mmheads.heads import HeadSet
    from mmheads.scores import HeadScores, union_of_top

    if given.endswith(".parquet"):
        return union_of_top(HeadScores.load(given), fraction)
    heads = HeadSet.load(given)
    if not len(heads):
        raise ValueError(f"{given} holds no head; if `mmheads detect` wrote it, it found none")
    return heads


def known_heads(vlm: VLM) -> HeadSet:
    """The heads of a model that are shipped, or that the authors of paper A released.

    Raises:
        ValueError: There are none.
    """
    from mmheads.heads import HeadSet

    with suppress(FileNotFoundError):
        return HeadSet.load(vlm.model_id)
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
    return list(json.loads(table.to_json(orient="records", double_precision=15)))


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
