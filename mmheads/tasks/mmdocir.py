"""MMDocIR (arXiv 2501.08828): long documents, questions about them, and where the answers are.

It is read from a folder that holds `MMDocIR_annotations.jsonl`, with one document per line, and
either the two tables that are published with it (`MMDocIR_pages.parquet`,
`MMDocIR_layouts.parquet`) or a folder `pdfs/` of the documents themselves, which have no layout
candidates.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mmheads.examples import Example, Region
from mmheads.images import open_image
from mmheads.pdfs import DPI, Document, Page, PageBox, open_pdf

ANNOTATIONS = "MMDocIR_annotations.jsonl"
PAGES, LAYOUTS = "MMDocIR_pages.parquet", "MMDocIR_layouts.parquet"
_QUESTION = {"Q", "A", "page_id", "type", "layout_mapping"}
_GOLD = {"page", "bbox", "page_size"}
_LINE = {"doc_name", "domain", "page_indices", "layout_indices", "questions"}
_PAGE_COLUMNS = {"doc_name", "image_binary", "ocr_text"}
_LAYOUT_COLUMNS = {"doc_name", "type", "page_id", "image_binary", "bbox", "page_size"}


@dataclass(frozen=True)
class Question:
    """A question about a document, and where it is answered.

    Attributes:
        text: What is asked.
        answer: The right answer.
        pages: Indices of the pages that hold the evidence, from 0.
        boxes: The evidence on these pages.
        kind: Modality of the evidence, as annotated.
    """

    text: str
    answer: str
    pages: tuple[int, ...]
    boxes: tuple[PageBox, ...] = ()
    kind: str = ""


@dataclass(frozen=True, eq=False)
class Layout:
    """A layout element of a page (paragraph, table, figure), which is a candidate to rank.

    Attributes:
        where: Its place.
        kind: What it is, as annotated.
        image: Returns its picture, in RGB.
    """

    where: PageBox
    kind: str
    image: Callable[[], Image.Image]


@dataclass(frozen=True, eq=False)
class AnnotatedDocument(Document):
    """A document with questions and, where they are annotated, layout candidates.

    Attributes:
        domain: Kind of document, such as "Brochure".
        questions: Questions about it.
        layouts: Its layout elements; empty for a folder of PDF files.
    """

    domain: str = ""
    questions: tuple[Question, ...] = ()
    layouts: Sequence[Layout] = ()


@dataclass(frozen=True, eq=False)
class Collection:
    """What could be read of MMDocIR.

    Attributes:
        documents: The documents that could be read.
        problems: One sentence, with file and line, for each document that could not be read.
    """

    documents: tuple[AnnotatedDocument, ...]
    problems: tuple[str, ...] = ()


def read_mmdocir(folder: str | Path, *, dpi: int = DPI) -> Collection:
    """Read MMDocIR from a folder, with the published tables or with the PDF files.

    A document that cannot be read, or whose annotations do not fit it, is left out and becomes a
    sentence of `problems`; the others are read.

    Args:
        folder: Holds the annotations, and the tables or `pdfs/`.
        dpi: Resolution of the page images of PDF files, in pixels per inch.

    Raises:
        ValueError: The folder holds no annotations, or neither tables nor `pdfs/`; the
            annotations are not UTF-8; or a table cannot be read or has other columns.
    """
    folder = Path(folder)
    path = folder / ANNOTATIONS
    if not path.is_file():
        raise ValueError(f"{folder} holds no {ANNOTATIONS}; expected a folder of MMDocIR")
    tables: tuple[_Table, _Table] | None = None
    if (folder / PAGES).is_file():
        tables = _Table(folder / PAGES, _PAGE_COLUMNS), _Table(folder / LAYOUTS, _LAYOUT_COLUMNS)
    elif not (folder / "pdfs").is_dir():
        raise ValueError(f"{folder} holds neither {PAGES} nor pdfs/; expected one of them")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not encoded in UTF-8 ({error})") from error
    documents, problems = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            document = _document(json.loads(line), folder, tables, dpi)
        except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
            problems.append(f"{ANNOTATIONS}, line {number}: {error}")
        else:
            documents.append(document)
    return Collection(tuple(documents), tuple(problems))


def _document(
    row: dict[str, Any], folder: Path, tables: tuple[_Table, _Table] | None, dpi: int
) -> AnnotatedDocument:
    """The document of one line of annotations."""
    _expect_keys(row, _LINE)
    name = str(row["doc_name"])
    pages: Sequence[Page]
    layouts: list[Layout] = []
    if tables:
        of_pages, of_layouts = tables
        pages = [
            of_pages.page(index, number)
            for number, index in enumerate(_rows(row, "page_indices", of_pages), 1)
        ]
        layouts = [of_layouts.layout(index) for index in _rows(row, "layout_indices", of_layouts)]
    else:
        pages = open_pdf(folder / "pdfs" / name, dpi=dpi).pages
    document = AnnotatedDocument(
        name, pages, domain=row["domain"], questions=tuple(_questions(row)), layouts=layouts
    )
    _check_questions(document)
    return document


def to_example(document: AnnotatedDocument, question: Question, *, pages: int = 20) -> Example:
    """Return a question and the pages around its evidence as one prompt.

    The evidence is all of each gold page in the context (paper B); the pages are candidates.

    Args:
        document: The document.
        question: One of its questions.
        pages: Largest number of pages in the context; a shorter document is shown whole.

    Raises:
        ValueError: pages is below 1, or an image cannot be read.
    """
    if pages < 1:
        raise ValueError(f"pages is {pages}; expected 1 or more")
    count = len(document.pages)
    first = max(0, min(question.pages[0] - pages // 2, count - pages))
    shown = range(first, min(first + pages, count))
    regions = tuple(Region(part=part) for part in range(len(shown)))
    return Example(
        context=tuple(document.pages[page].image() for page in shown),
        question=(question.text,),
        answer=question.answer,
        evidence=tuple(regions[page - first] for page in question.pages if page in shown),
        candidates={"page": regions},
        task="mmdocir",
        depth=(question.pages[0] - first) / max(1, len(shown) - 1),
    )


class _Table:
    """A parquet table of MMDocIR, whose images are read when asked for."""

    def __init__(self, path: Path, columns: set[str]) -> None:
        if not path.is_file():
            raise ValueError(f"{path} does not exist; expected it beside {PAGES}")
        self.path = path
        with self._errors_named():
            self.file = pq.ParquetFile(path)
            types = dict(
                zip(self.file.schema_arrow.names, self.file.schema_arrow.types, strict=True)
            )
            if missing := columns - set(types):
                raise ValueError(f"lacks the columns {sorted(missing)}; it has {list(types)}")
            if not pa.types.is_binary(kind := types["image_binary"]) and kind != pa.large_binary():
                raise ValueError(f"holds {kind} in image_binary; expected the bytes of images")
            light = [name for name in types if name != "image_binary"]
            self.rows: list[dict[str, Any]] = self.file.read(columns=light).to_pylist()
        groups = self.file.metadata
        self.ends = np.cumsum([groups.row_group(i).num_rows for i in range(groups.num_row_groups)])
        self.last_group: tuple[int, Any] = (-1, None)
        """Number and images of the row group read last: neighbouring pages are in one group."""

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError, pa.ArrowException) as error:
            raise ValueError(f"{self.path} {error}") from error

    def page(self, row: int, number: int) -> Page:
        return Page(number, lambda: self.rows[row]["ocr_text"] or "", lambda: self._image(row))

    def layout(self, row: int) -> Layout:
        values = self.rows[row]
        where = _page_box(values["page_id"], values)
        return Layout(where, values["type"], lambda: self._image(row))

    def _image(self, row: int) -> Image.Image:
        group = int(np.searchsorted(self.ends, row, side="right"))
        if group != self.last_group[0]:
            with self._errors_named():
                images = self.file.read_row_group(group, columns=["image_binary"])["image_binary"]
            self.last_group = group, images
        first = self.ends[group - 1] if group else 0
        content = self.last_group[1][int(row - first)].as_py()
        name = f"The image in row {row} of {self.path} ({self.rows[row]['doc_name']})"
        return open_image(content or b"", name)


def _page_box(page: Any, values: dict[str, Any]) -> PageBox:
    box, size = tuple(values["bbox"]), tuple(values["page_size"])
    if (len(box), len(size)) != (4, 2) or not all(map(math.isfinite, (*box, *size))):
        raise ValueError(f"bbox {box} with page_size {size}; expected four numbers and two")
    return PageBox(int(page), box, size)


def _rows(row: dict[str, Any], name: str, table: _Table) -> range:
    """The rows of a document in a table, from the numbers of its first and last row."""
    first, last = _integers(row, name, 2)
    if not 0 <= first <= last < len(table.rows):
        raise ValueError(
            f"{row['doc_name']}: {name} {first} to {last} are not rows of {table.path} "
            f"({len(table.rows)} rows)"
        )
    rows = range(first, last + 1)
    if others := {table.rows[index]["doc_name"] for index in rows} - {row["doc_name"]}:
        raise ValueError(f"{row['doc_name']}: its {name} hold rows of {sorted(others)}")
    return rows


def _questions(row: dict[str, Any]) -> Iterator[Question]:
    for entry in _list(row, "questions"):
        _expect_keys(entry, _QUESTION)
        pages = _integers(entry, "page_id")
        boxes = []
        for gold in _list(entry, "layout_mapping"):
            _expect_keys(gold, _GOLD)
            boxes.append(_page_box(gold["page"], gold))
        question, answer = str(entry["Q"]), str(entry["A"])
        yield Question(question, answer, tuple(pages), tuple(boxes), entry["type"])


def _expect_keys(entry: Any, names: set[str]) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{str(entry)[:50]!r} is not an object with {sorted(names)}")
    if missing := names - set(entry):
        raise ValueError(f"{entry.get('doc_name', 'a question or box')} lacks {sorted(missing)}")


def _list(row: dict[str, Any], name: str) -> list[Any]:
    values = row[name]
    if not isinstance(values, list):
        raise ValueError(f"{name} is {str(values)[:50]!r}; expected a list")
    return values


def _integers(row: dict[str, Any], name: str, count: int | None = None) -> list[int]:
    values = _list(row, name)
    if not all(type(value) is int for value in values) or count not in (None, len(values)):
        raise ValueError(f"{name} is {values}; expected {count or 'a list of'} integers")
    return values


def _check_questions(document: AnnotatedDocument) -> None:
    last = len(document.pages) - 1
    for question in document.questions:
        if not question.text.strip():
            raise ValueError(f"{document.name}: a question is empty")
        if not question.pages:
            raise ValueError(f"{document.name}: {question.text!r} names no page")
        named = {*question.pages, *(box.page for box in question.boxes)}
        if wrong := sorted(page for page in named if not 0 <= page <= last):
            raise ValueError(
                f"{document.name}: {question.text!r} points to the pages {wrong}; the document "
                f"has the pages 0 to {last}"
            )
