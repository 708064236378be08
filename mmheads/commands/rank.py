"""`mmheads rank`: rank the pages of a PDF file for a question."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mmheads import commands, paths
from mmheads.commands import Outcome

EXAMPLES = """  mmheads rank a.pdf --model Qwen/Qwen3-VL-8B-Instruct --question "What was sold?"
  mmheads rank report.pdf --model tiny-qwen3-vl-m --heads scores.parquet --question "? B7" """


def add(subparsers: Any) -> None:
    """Add the command."""
    parser = commands.add(
        subparsers,
        "rank",
        run,
        "Rank the pages of a PDF file for a question. Pages are ranked by the attention of chosen "
        "heads; the best pages are printed, and a picture of them is written.",
        EXAMPLES,
    )
    parser.add_argument("pdf", help="the document")
    parser.add_argument("--model", required=True, help="folder, shipped model, or name on the hub")
    parser.add_argument(
        "--heads",
        default="",
        help="score file, head list, or name of a shipped list; by default the list of the model",
    )
    parser.add_argument("--question", required=True)
    parser.add_argument(
        "--fraction", type=commands.SHARE, default=0.05, help="share of heads per task"
    )
    parser.add_argument(
        "--window", type=commands.number(int, 1), default=0, help="pages per forward pass"
    )
    parser.add_argument(
        "--dpi", type=commands.number(int, 1, 2400), default=0, help="resolution of the pages"
    )
    parser.add_argument("--password", default="", help="of an encrypted PDF file")
    parser.add_argument(
        "--skip-broken", action="store_true", help="leave out pages that cannot be read"
    )
    parser.add_argument("--top", type=commands.number(int, 1), default=5, help="pages to print")
    parser.add_argument("-o", "--out", default="", help="picture, default <document>.rank.png here")


def run(options: argparse.Namespace) -> Outcome:
    """Index the document and rank its pages."""
    from mmheads.models import load
    from mmheads.pdfs import DPI, open_pdf
    from mmheads.retrieval.candidates import question_parts
    from mmheads.retrieval.index import WINDOW, DocumentIndex

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
        commands.note(f"warning: {problem}")
    images = [page.image for page in document.pages]
    given = commands.read_heads(options.heads, options.fraction) if options.heads else None
    vlm = load(options.model, device=options.device)
    heads = given or commands.known_heads(vlm)
    index = DocumentIndex(vlm, heads, images, window=options.window or WINDOW, progress=True)
    ranking = index.rank(options.question)
    table = ranking.table().head(options.top)
    titles = [document.pages[candidate].title for candidate in table["candidate"]]
    lines = [
        f"{row['rank']:>4}  page {title:<10} {row['score']:+.5f}"
        for title, row in zip(titles, table.to_dict("records"), strict=True)
    ]
    lines.append(f"{len(heads)} heads of {vlm}; {len(images)} pages in windows of {ranking.window}")
    commands.write_picture(ranking.picture(images), out)
    data = {"model": vlm.model_id, "pages": commands.records(table.assign(page=titles))}
    return Outcome(data, [*lines, str(out)])


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
