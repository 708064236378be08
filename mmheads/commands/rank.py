"""Rank the pages of PDF files, and regions of them, for questions.

Pages are ranked by the attention that chosen heads give them. The command prints the best pages
and writes a picture of them for each question. A model that reads only text ranks the texts of the
pages. Resolution and window are chosen to fit the model and the memory; the command says what it
chose, and how long the index will take.

Examples:
    mmheads rank a.pdf --model Qwen/Qwen3-VL-8B-Instruct --question "What was sold?"
    mmheads rank a.pdf --model tiny-qwen3-vl-m --question "? B7" --regions
    mmheads rank a.pdf b.pdf --model my-model --question-file questions.txt --index ab.index
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmheads import commands, paths
from mmheads.commands import Outcome

if TYPE_CHECKING:
    from mmheads.blocks import Block
    from mmheads.heads import HeadSet
    from mmheads.models import VLM
    from mmheads.pdfs import Page
    from mmheads.retrieval.candidates import Place
    from mmheads.retrieval.fitting import Fit
    from mmheads.retrieval.index import DocumentIndex

KNOWN = 0.5
"""Part of the words of a question that a tokenizer must know."""

CELLS = (3, 4)
"""Columns and rows into which a page without paragraphs and pictures is divided."""

SMALLEST = 64
"""In square points; on an image of a page, a smaller paragraph (a page number) is not ranked."""


def add(subparsers: Any) -> None:
    """Add the command."""
    parser = commands.add(subparsers, "rank", run, __doc__)
    parser.add_argument("pdf", nargs="+", help="the documents, whose pages are ranked together")
    parser.add_argument("--model", required=True, help=commands.MODEL)
    parser.add_argument(
        "--question", action="append", default=[], help="what is asked; may be given several times"
    )
    parser.add_argument(
        "--question-file",
        default="",
        help="a text file in UTF-8 with one question per line; - reads them from a pipe",
    )
    heads = f"{commands.HEADS}; by default the list that is shipped or released for --model"
    parser.add_argument("--heads", default="", help=heads)
    commands.add_fraction(parser, "to take from a score file")
    parser.add_argument(
        "--index",
        default="",
        help="file that keeps the index: after an interrupt it goes on from there, and later "
        "questions are answered from it, with or without --regions",
    )
    commands.add_flag(
        parser,
        "--on-disk",
        "make --index a folder and keep only one window of pages in memory, for documents "
        "whose index is larger than the memory; a question then reads the whole folder",
    )
    commands.add_number(parser, "--window", 0, "pages per forward pass")
    commands.add_number(
        parser, "--dpi", 0, "resolution of the pages, in pixels per inch", high=2400
    )
    memory = "GB that may be used, by default most of what is free"
    commands.add_number(parser, "--memory", 0, memory, float, 0.001)
    commands.add_flag(
        parser,
        "--regions",
        "also rank the paragraphs and pictures of the pages (paragraphs only, if the model "
        f"reads only text); a page without any is divided into {CELLS[0]} x {CELLS[1]} cells",
    )
    parser.add_argument("--password", default="", help="password of encrypted PDF files")
    commands.add_flag(parser, "--skip-broken", "leave out pages that cannot be read")
    commands.add_number(parser, "--top", 5, "number of pages, and of regions, to print")
    heat = "what the picture shows: the attention from the question less that from a question that "
    heat += "says nothing, or all of it"
    commands.add_choice(parser, "--heat", ("calibrated", "raw"), heat)
    commands.add_out(parser, "picture to write, by default <document>.rank.png here")


def run(options: argparse.Namespace) -> Outcome:
    """Index the documents and rank their pages for each question."""
    from mmheads.attention import check_heads
    from mmheads.models import load
    from mmheads.retrieval.fitting import DPIS, fit_pages, fit_texts
    from mmheads.retrieval.index import DocumentIndex

    questions = _questions(options)
    pictures = _pictures(options, len(questions))
    files = _files(options)
    kept_dpi, kept_window = _index_before(options, files)
    dpi = options.dpi or kept_dpi
    pages = _pages(options, dpi or DPIS[-1])
    given = commands.read_heads(options.heads, options.fraction) if options.heads else None
    vlm = load(options.model, device=options.device)
    heads = commands.known_heads(vlm) if given is None else given
    check_heads(vlm, [heads], "used to rank")
    for question in questions:
        _check_words(vlm, question)
    asked: dict[str, Any] = {
        "window": options.window or kept_window,
        "memory": 1e9 * options.memory,
        "on_disk": options.on_disk,
    }
    if vlm.is_text_only:
        pages = _with_text(pages)
        ranked: list[Any] = [tuple(f"{p.text}\n" for p in page.paragraphs) for page in pages]
        fit = fit_texts(vlm, heads, ["\n".join(texts) for texts in ranked], questions, **asked)
    else:
        fit = fit_pages(vlm, heads, [page.size for page in pages], questions, dpi=dpi, **asked)
        pages = pages if fit.dpi == (dpi or DPIS[-1]) else _pages(options, fit.dpi, warn=False)
        ranked = [page.image for page in pages]
    regions = _regions(pages, vlm.is_text_only) if options.regions else []
    _say(vlm, heads, ranked, fit, options, going_on=kept_window > 0)
    about = json.dumps({"documents": files, "dpi": fit.dpi, "skip_broken": options.skip_broken})
    index = DocumentIndex(
        vlm,
        heads,
        ranked,
        window=fit.window,
        keep="disk" if options.on_disk else "device",
        path=options.index,
        about=about,
        progress=True,
    )
    lines: list[str] = []
    results = []
    for question, picture in zip(questions, pictures, strict=True):
        lines += [question] if len(questions) > 1 else []
        result, printed = _answered(index, question, pages, regions, options, picture)
        results.append(result)
        lines += printed
    data = {
        "model": vlm.model_id,
        "heads": commands.listed(heads),
        "pages": len(pages),
        "dpi": fit.dpi,
        "window": fit.window,
        "questions": results,
    }
    return Outcome(data, lines)


def _answered(
    index: DocumentIndex,
    question: str,
    pages: Sequence[Page],
    regions: Sequence[tuple[Block, Place]],
    options: argparse.Namespace,
    picture: Path,
) -> tuple[dict[str, Any], list[str]]:
    """The best pages and regions for a question, as data and in lines; writes their picture."""
    several = len(options.pdf) > 1
    ranking = index.rank(question, [place for _, place in regions] if regions else None)
    result: dict[str, Any] = {"question": question, "pages": [], "picture": None}
    lines = []
    for row in (ranking.candidates or ranking).table().head(options.top).to_dict("records"):
        found, line = _row(pages[row["candidate"]], row, several)
        result["pages"].append(found)
        lines.append(line)
    if regions:
        result["regions"] = []
        lines.append("regions (left, top, right and bottom in points):")
        for row in ranking.table().head(options.top).to_dict("records"):
            page, block = pages[row["candidate"]], regions[row["region"]][0]
            found, line = _row(page, row, several)
            result["regions"].append(found | asdict(block) | {"size": page.size})
            box = ", ".join(f"{value:.0f}" for value in block.box)
            start = textwrap.shorten(block.text, 50, placeholder=" …") or block.kind
            lines.append(f"{line}  ({box})  {start}")
    if not index.vlm.is_text_only:
        labels = [f"{p.title} of {p.document}" if several else p.label for p in pages]
        images = [page.image for page in pages]
        figure = ranking.picture(images, heat=options.heat, labels=labels, outlined=options.top)
        commands.write_picture(figure, picture)
        result["picture"] = str(picture)
        lines.append(str(picture))
    return result, lines


def _row(page: Page, row: dict[Any, Any], several: bool) -> tuple[dict[str, Any], str]:
    """A rank with its page and score, as data and as a line."""
    place = {"document": page.document, "page": page.number, "label": page.label}
    where = f"{page.document} " if several else ""
    line = f"{row['rank']:>4}  {where}page {page.title:<10} {row['score']:+.5f}"
    return {"rank": row["rank"], **place, "score": row["score"]}, line


def _regions(pages: Sequence[Page], as_text: bool) -> list[tuple[Block, Place]]:
    """The paragraphs of texts, or the paragraphs, pictures and cells of images, with places."""
    from mmheads.blocks import grid
    from mmheads.pdfs import PageBox
    from mmheads.retrieval.candidates import PagePart

    regions: list[tuple[Block, Place]] = []
    for number, page in enumerate(pages):
        if as_text:
            texts = enumerate(page.paragraphs)
            regions += [(block, PagePart(number, part)) for part, block in texts]
        else:
            blocks = [block for block in page.blocks if block.area >= SMALLEST]
            blocks = blocks or grid(page.size, *CELLS)
            regions += [(block, PageBox(number, block.box, page.size)) for block in blocks]
    cells = sum(block.kind == "cell" for block, _ in regions)
    of_cells = f", {cells} of them cells of pages that hold neither paragraphs nor pictures"
    commands.note(f"{len(regions)} regions{of_cells * bool(cells)}")
    return regions


def _questions(options: argparse.Namespace) -> list[str]:
    """The questions of the options and of the file, at least one."""
    questions = list(options.question)
    if options.question_file:
        name = options.question_file
        try:
            raw = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} is not a text in UTF-8 ({error})") from error
        questions += [line.strip() for line in text.split("\n") if line.strip()]
    if not questions or not all(question.strip() for question in questions):
        given = "a question is empty" if questions else "no question is given"
        raise ValueError(
            f"{given}; give --question, or a --question-file with one question per line"
        )
    return questions


def _pictures(options: argparse.Namespace, count: int) -> list[Path]:
    """The picture of each question, if pictures can be written there."""
    from matplotlib.figure import Figure

    path = Path(options.out or f"{Path(options.pdf[0]).stem}.rank.png")
    kinds = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in kinds:
        raise ValueError(
            f"--out is {path}; expected the name of a picture that ends in one of "
            f"{', '.join('.' + kind for kind in kinds)}"
        )
    paths.writable_file(path)
    several = [path.with_stem(f"{path.stem}-{number}") for number in range(1, count + 1)]
    return several if count > 1 else [path]


def _files(options: argparse.Namespace) -> dict[str, str]:
    """SHA-256 of each document by its name, checked to be there and to have names of their own."""
    from mmheads.provenance import file_sha256

    for path in options.pdf:
        if not Path(path).is_file():
            what = "is a folder" if Path(path).is_dir() else "does not exist"
            raise ValueError(f"{path} {what}; expected the name of a PDF file")
    files = {Path(path).name: file_sha256(Path(path)) for path in options.pdf}
    if len(files) < len(options.pdf):
        raise ValueError(f"two of the documents have one name ({', '.join(options.pdf)})")
    return files


def _index_before(options: argparse.Namespace, files: dict[str, str]) -> tuple[int, int]:
    """Resolution and window of the index that is kept, if it is of these files; 0, 0 for none."""
    from mmheads.retrieval.saved import what_is_indexed

    if not options.index:
        if options.on_disk:
            raise ValueError("--on-disk needs a folder to keep the index in; name it by --index")
        return 0, 0
    path = Path(options.index)
    if options.on_disk and not path.is_file():
        paths.writable(path)
    elif path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of a file, or add --on-disk")
    else:
        paths.writable_file(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return 0, 0
    text, window = what_is_indexed(path)
    about: dict[str, Any] = json.loads(text or "{}")
    if about.get("documents") != files:
        raise ValueError(
            f"{options.index} is an index of other documents ({text[:200]}), not of "
            f"{', '.join(files)} as they are now; name another file, or delete it"
        )
    return about["dpi"], window


def _pages(options: argparse.Namespace, dpi: int, *, warn: bool = True) -> list[Page]:
    """The pages of all documents, with images of a resolution."""
    from mmheads.pdfs import open_pdf

    pages: list[Page] = []
    settings = {"password": options.password or None, "skip_broken": options.skip_broken}
    for path in options.pdf:
        document = open_pdf(path, dpi=dpi, **settings)
        for problem in document.problems if warn else ():
            commands.note(f"warning: {problem}")
        pages += document.pages
    return pages


def _with_text(pages: Sequence[Page]) -> list[Page]:
    """The pages that hold text."""
    blank = [f"page {page.title} of {page.document}" for page in pages if not page.paragraphs]
    if blank:
        commands.note(f"warning: without text, and left out: {', '.join(blank)}")
    if len(blank) == len(pages):
        raise ValueError("no page holds text, and the model reads only text; take another model")
    return [page for page in pages if page.paragraphs]


def _check_words(vlm: VLM, question: str) -> None:
    """Raise ValueError if the tokenizer does not know most words of a question."""
    encoded = vlm.tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)
    ids, places = encoded["input_ids"], encoded["offset_mapping"]
    unknown = vlm.unknown(ids)
    words = [question[slice(*at)] for at, missing in zip(places, unknown, strict=True) if missing]
    if len(words) > (1 - KNOWN) * len(ids):
        raise ValueError(
            f"{vlm} does not know the words {', '.join(dict.fromkeys(words))} of the question; "
            "take a model that reads natural language"
        )


def _say(
    vlm: VLM,
    heads: HeadSet,
    ranked: Sequence[Any],
    fit: Fit,
    options: argparse.Namespace,
    *,
    going_on: bool,
) -> None:
    """Say what was chosen, and about how long the index takes, measured on the first page."""
    from mmheads.retrieval.index import DocumentIndex

    pages = f"{len(ranked)} pages" + (f" at {fit.dpi} dpi" if fit.dpi else " as texts")
    commands.note(
        f"{len(heads)} heads of {vlm}; {pages} in windows of {fit.window}, at most {fit.tokens} of "
        f"{vlm.positions or 'any number of'} tokens; the index takes about {fit.bytes / 1e6:.0f} MB"
        + f", of which {fit.held / 1e6:.0f} MB are in memory"
        * options.on_disk
    )
    if going_on:
        commands.note(f"going on with {options.index}")
        return
    start = time.perf_counter()
    DocumentIndex(vlm, heads, ranked[:1])
    seconds = (time.perf_counter() - start) / fit.share
    commands.note(f"the index takes about {commands.duration(seconds)}")
