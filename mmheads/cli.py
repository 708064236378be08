"""The commands of mmheads: `score`, `rank` and `explore`; `python -m mmheads` is the same."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmheads import paths

EXAMPLES = """examples:
  mmheads score --model tiny-qwen3-vl-m --examples examples.jsonl
  mmheads rank --model tiny-qwen3-vl-m --heads scores.parquet --question "? B7" report.pdf
  mmheads explore tiny-qwen3-vl-m examples.jsonl -o out.html
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Everything that can be checked without the model is checked before the model is loaded.

    Args:
        arguments: Words of the command line; by default those of this process.

    Returns:
        0, or 1 after an error, 130 after an interrupt. An error is one sentence on standard error.
    """
    parser = argparse.ArgumentParser(
        prog="mmheads",
        description="Find the attention heads that fetch evidence, and use them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_score(commands)
    _add_rank(commands)
    _add_explore(commands)
    options = parser.parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _print_warning
            options.run(options)
            sys.stdout.flush()
    except BrokenPipeError:  # The reader of a pipe has gone, as `head` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, TypeError, OSError, MemoryError) as error:
        print(f"mmheads: {_sentence(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mmheads: interrupted; what was computed is kept", file=sys.stderr)
        return 130
    return 0


def _print_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"mmheads: warning: {message}", file=sys.stderr)


def _sentence(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "not enough memory; give a smaller --window or --dpi, or a shorter example"
    return " ".join(str(error).split()) or type(error).__name__


def _number(kind: type, low: float, high: float = math.inf) -> Callable[[str], Any]:
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


_SHARE = _number(float, 1e-6, 1.0)


def _add_score(commands: Any) -> None:
    score = commands.add_parser(
        "score",
        help="score the heads of a model on your own examples",
        description="Score every head on your examples; write all scores, the means, and a heat "
        "map, and print the heads with the highest scores (L8H10 is layer 8, head 10, from 0).",
    )
    score.add_argument("--model", required=True, help="folder, shipped model, or name on the hub")
    score.add_argument("--examples", required=True, help="a .jsonl file, or a folder with one")
    score.add_argument("--out", default="", help="folder of the results, default runs/scores")
    score.add_argument("--device", default="", help="cpu, cuda:0 or auto")
    score.add_argument("--fraction", type=_SHARE, default=0.05, help="share of heads to print")
    score.set_defaults(run=_score)


def _score(options: argparse.Namespace) -> None:
    from mmheads.example_files import read_examples
    from mmheads.models import load
    from mmheads.provenance import hash_json
    from mmheads.scoring import score_heads
    from mmheads.store import kept_folder

    examples = read_examples(options.examples)
    for line, has_evidence in zip(examples.lines, examples.has_evidence, strict=True):
        if not has_evidence:
            raise ValueError(
                f"{examples.path}, line {line}: the example has no evidence; heads are scored by "
                "their attention to evidence"
            )
    folder = paths.writable(kept_folder("scores", options.out))
    vlm = load(options.model, device=options.device)
    # Files of one name in different folders, and models of one name, keep their own results.
    mark = hash_json([str(examples.path.resolve()), vlm.revision])[:6]
    stem = f"{Path(vlm.model_id).name}-{examples.path.name.removesuffix('.jsonl')}-{mark}"
    scores = score_heads(vlm, examples, folder=folder)
    scores.save(folder / f"{stem}.parquet")
    with paths.write_whole(folder / f"{stem}.csv") as path:
        scores.to_frame().to_csv(path, index=False)
    with paths.write_whole(folder / f"{stem}.json") as path:
        path.write_text(json.dumps(scores.to_released_json()), encoding="utf-8")
    with paths.write_whole(folder / f"{stem}.png") as path:
        _heat_map(scores).savefig(path)
    for head in scores.top(options.fraction):
        print(f"{head!s:>8}  {scores.mean[head]:+.4f}")
    print(f"{len(examples)} examples; {folder / stem}.parquet, .csv, .json, .png")


def _heat_map(scores: Any) -> Any:
    import numpy as np
    from matplotlib.figure import Figure

    from mmheads import figures, plots

    figure = Figure(figsize=(figures.COLUMN, figures.COLUMN), dpi=200, layout="constrained")
    axis = figure.subplots()
    plots.set_title(axis, f"{scores.provenance.model}, n = {len(scores.values)}", width=40)
    image = plots.heat_map(axis, np.where(scores.geometry.every, scores.mean, np.nan))
    figure.colorbar(image, label="calibrated retrieval score")
    return figure


def _add_rank(commands: Any) -> None:
    rank = commands.add_parser(
        "rank",
        help="rank the pages of a PDF file for a question",
        description="Rank the pages of a PDF file by the attention of chosen heads; print the "
        "best pages and write a picture of them.",
    )
    rank.add_argument("pdf", help="the document")
    rank.add_argument("--model", required=True, help="folder, shipped model, or name on the hub")
    rank.add_argument("--heads", required=True, help="score file that `mmheads score` has written")
    rank.add_argument("--question", required=True)
    rank.add_argument("--fraction", type=_SHARE, default=0.05, help="share of heads per task")
    rank.add_argument("--window", type=_number(int, 1), default=0, help="pages per forward pass")
    rank.add_argument(
        "--dpi", type=_number(int, 1, 2400), default=0, help="resolution of the pages"
    )
    rank.add_argument("--password", default="", help="of an encrypted PDF file")
    rank.add_argument(
        "--skip-broken", action="store_true", help="leave out pages that cannot be read"
    )
    rank.add_argument("--top", type=_number(int, 1), default=5, help="pages to print")
    rank.add_argument("--out", default="", help="picture, default <document>.rank.png here")
    rank.add_argument("--device", default="", help="cpu, cuda:0 or auto")
    rank.set_defaults(run=_rank)


def _rank(options: argparse.Namespace) -> None:
    from mmheads.models import load
    from mmheads.pdfs import DPI, open_pdf
    from mmheads.retrieval.candidates import question_parts
    from mmheads.retrieval.index import WINDOW, DocumentIndex
    from mmheads.scores import HeadScores, union_of_top

    question_parts(options.question)
    out = Path(options.out or f"{Path(options.pdf).stem}.rank.png")
    _check_picture(out)
    document = open_pdf(
        options.pdf,
        dpi=options.dpi or DPI,
        password=options.password or None,
        skip_broken=options.skip_broken,
    )
    for problem in document.problems:
        print(f"mmheads: warning: {problem}", file=sys.stderr)
    images = [page.image for page in document.pages]
    heads = union_of_top(HeadScores.load(options.heads), options.fraction)
    vlm = load(options.model, device=options.device)
    index = DocumentIndex(vlm, heads, images, window=options.window or WINDOW, progress=True)
    ranking = index.rank(options.question)
    for row in ranking.table().head(options.top).to_dict("records"):
        title = document.pages[row["candidate"]].title
        print(f"{row['rank']:>4}  page {title:<10} {row['score']:+.5f}")
    print(f"{len(heads)} heads of {vlm}; {len(images)} pages in windows of {ranking.window}")
    with paths.write_whole(out) as path:
        ranking.picture(images).savefig(path)
    print(out)


def _check_picture(path: Path) -> None:
    """Raise ValueError if a picture cannot be written there."""
    from matplotlib.figure import Figure

    kinds = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in kinds:
        raise ValueError(
            f"--out is {path}; expected the name of a picture that ends in one of "
            f"{', '.join('.' + kind for kind in kinds)}"
        )
    if path.is_dir():
        raise ValueError(f"--out {path} is a folder; give the name of a picture")
    paths.writable(path.parent)


def _add_explore(commands: Any) -> None:
    explore = commands.add_parser(
        "explore",
        help="write one HTML file that shows where every head looks",
        description="Write one HTML file, which needs no network, with a map of all heads and with "
        "their attention on your examples. Examples without evidence have attention but no scores.",
    )
    explore.add_argument("model", help="folder, shipped model, or name on the hub")
    explore.add_argument("examples", help="a .jsonl file, or a folder with one")
    explore.add_argument("-o", "--out", default="", help="default <examples>.html here")
    explore.add_argument("--title", default="", help="heading of the page")
    explore.add_argument(
        "--gradients", action="store_true", help="also show gate gradients; examples need answers"
    )
    explore.add_argument(
        "--null-images",
        default="placeholders",
        choices=("placeholders", "pixels"),
        help="what the null question shows of the question's images",
    )
    explore.add_argument("--device", default="", help="cpu, cuda:0 or auto")
    explore.set_defaults(run=_explore)


def _explore(options: argparse.Namespace) -> None:
    from mmheads.example_files import read_examples
    from mmheads.explorer import checked_path, explore
    from mmheads.models import load

    examples = read_examples(options.examples)
    out = checked_path(options.out or f"{examples.path.stem}.html")
    page = explore(
        load(options.model, device=options.device),
        examples,
        out,
        null_images=options.null_images,
        gradients=options.gradients,
        title=options.title,
    )
    for note in page.notes:
        print(f"mmheads: warning: {note}", file=sys.stderr)
    size = out.stat().st_size / 1e6
    print(f"{out}: {len(examples)} examples, {size:.1f} MB; open it in a browser")
