"""What haystacks are made of: the shipped corpus, or texts, PDF files and images of a folder."""

from __future__ import annotations

import re
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from mmheads import paths
from mmheads.images import open_frames
from mmheads.pdfs import open_pdf

CORPUS = paths.DATA / "corpus" / "factbook.txt"

TEXT_SUFFIXES = (".txt", ".md")
PDF_SUFFIXES = (".pdf",)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".tif", ".tiff", ".bmp")

DPI = 96
"""Default resolution at which PDF pages are drawn, in pixels per inch."""

LONGEST_SENTENCE = 600
"""Characters; longer stretches without an end of a sentence (tables, lists) are cut at a space."""

_ABBREVIATION = re.compile(
    r"(?:mr|mrs|ms|dr|prof|st|no|nos|vs|ca|fig|vol|pp|jr|sr|gen|col|lt|sgt|capt|rev|hon|gov|approx"
    r"|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|(?:\w\.)*[^\W\d_])",
    re.IGNORECASE,
)
"""What a full stop follows without an end of a sentence: abbreviations and initials."""
_END = re.compile(r"""[.!?]["')\]]*(\s+)(?=["'(\[]?[^\W_a-z])""")

Paragraph = tuple[str, ...]
"""Sentences."""


@dataclass(frozen=True, eq=False)
class Source:
    """Texts and pictures to fill haystacks with.

    Attributes:
        name: Short name, for the names of files.
        paragraphs: Paragraphs of running text, in reading order.
        pages: Functions that return a page as a picture; empty where pages have to be drawn from
            the text.
    """

    name: str
    paragraphs: tuple[Paragraph, ...]
    pages: tuple[Callable[[], Image.Image], ...] = ()


def sentences(text: str) -> list[str]:
    """The sentences of a paragraph, in order; joined by spaces they are the paragraph.

    A sentence ends at a full stop, exclamation or question mark before a space and a capital
    letter or digit, unless an abbreviation or an initial is before the full stop. A stretch that
    is longer than `LONGEST_SENTENCE` is cut at a space.
    """
    text = " ".join(text.split())
    first, pieces = 0, []
    for end in _END.finditer(text):
        word = re.split(r"[\s(\"'\[-]", text[first : end.start()])[-1]
        if text[end.start()] == "." and _ABBREVIATION.fullmatch(word):
            continue
        pieces.append(text[first : end.start(1)])
        first = end.end()
    pieces.append(text[first:])
    return [part for piece in pieces for part in textwrap.wrap(piece, LONGEST_SENTENCE)]


def shipped() -> Source:
    """The corpus of this repository: `data/corpus/factbook.txt`, one paragraph per line."""
    lines = CORPUS.read_text(encoding="utf-8").split("\n")
    return Source("corpus", tuple(tuple(sentences(line)) for line in lines if line.strip()))


def folder(path: str | Path, *, dpi: int = DPI) -> Source:
    """The texts and pages of all files in a folder and its subfolders, in the order of their paths.

    Read are text files in UTF-8 (`.txt`, `.md`; a blank line ends a paragraph), PDF files (their
    text layers as text, and their pages as pictures) and images (`.png`, `.jpg`, `.jpeg`, `.webp`,
    `.gif`, `.tif`, `.tiff`, `.bmp`; each frame is a page). Other files and hidden ones are passed
    over. Where there are pages but no text, the text is that of the shipped corpus.

    Args:
        path: The folder.
        dpi: Resolution at which PDF pages are drawn, in pixels per inch.

    Raises:
        ValueError: There is no such folder, or it holds nothing that can be read.

    Warns:
        UserWarning: Files cannot be read; one warning lists them all.
    """
    root = Path(path)
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder; expected one with texts, PDF files or images")
    paragraphs: list[Paragraph] = []
    pages: list[Callable[[], Image.Image]] = []
    problems = []
    for file in sorted(root.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
        if hidden or not file.is_file():
            continue
        try:
            more_paragraphs, more_pages, damage = _read(file, dpi)
        except (ValueError, OSError) as error:
            problems.append(str(error))
            continue
        paragraphs += more_paragraphs
        pages += more_pages
        problems += damage
    if problems:
        listed = "\n- ".join(["", *problems])
        warnings.warn(f"{len(problems)} files or pages are left out:{listed}", stacklevel=2)
    if not paragraphs and not pages:
        suffixes = ", ".join((*TEXT_SUFFIXES, *PDF_SUFFIXES, *IMAGE_SUFFIXES))
        raise ValueError(
            f"{root} holds nothing to fill haystacks with; looked for readable files in it and its "
            f"subfolders that end in {suffixes}"
        )
    return Source(root.resolve().name, tuple(paragraphs) or shipped().paragraphs, tuple(pages))


_Content = tuple[list[Paragraph], list[Callable[[], Image.Image]], list[str]]
"""Paragraphs, pages, and what is wrong with pages that are left out."""


def _read(file: Path, dpi: int) -> _Content:
    suffix = file.suffix.lower()
    if suffix in TEXT_SUFFIXES:
        try:
            blocks = re.split(r"\r?\n\s*\n", file.read_bytes().decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not text in UTF-8 ({error.reason})") from error
        paragraphs = [tuple(sentences(block)) for block in blocks if block.strip()]
        if not paragraphs:
            raise ValueError(f"{file} holds no text")
        return paragraphs, [], []
    if suffix in PDF_SUFFIXES:
        document = open_pdf(file, dpi=dpi, skip_broken=True)
        texts = [sentences(page.text) for page in document.pages]
        images = [page.image for page in document.pages]
        return [tuple(text) for text in texts if text], images, list(document.problems)
    if suffix in IMAGE_SUFFIXES:
        frames = range(len(open_frames(file)))
        return [], [partial(_frame, file, index) for index in frames], []
    return [], [], []


def _frame(file: Path, index: int) -> Image.Image:
    """One frame of an image file; opened when it is needed, so that a folder need not fit."""
    return open_frames(file)[index]
