"""MMDocIR (arXiv 2501.08828): long documents, questions about them, and where the answers are.

It is read from a folder that holds `MMDocIR_annotations.jsonl`, with one document per line, and
either the two tables that are published with it (`MMDocIR_pages.parquet`,
`MMDocIR_layouts.parquet`) or a folder `pdfs/` of the documents themselves, which have no layout
candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pydantic import BaseModel, Field, FiniteFloat

from mmheads.checks import parse
from mmheads.examples import Example, Region
from mmheads.images import open_image
from mmheads.pdfs import DPI, Document, Page, PageBox, open_pdf
from mmheads.tasks.records import Text

ANNOTATIONS = "MMDocIR_annotations.jsonl"
PAGES, LAYOUTS = "MMDocIR_pages.parquet", "MMDocIR_layouts.parquet"
_PAGE_COLUMNS = {"doc_name", "image_binary", "ocr_text"}
_LAYOUT_COLUMNS = {"doc_name", "type", "page_id", "image_binary", "bbox", "page_size"}


class _Place(BaseModel):
    """A box on a page, as the annotations and the table of layouts have it."""

    page: int
    bbox: tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]
    page_size: tuple[FiniteFloat, FiniteFloat]

    def box(self) -> PageBox:
        return PageBox(self.page, self.bbox, self.page_size)


class _Question(BaseModel):
    Q: Text
    A: Any
    page_id: Annotated[list[int], Field(min_length=1)]
    type: str
    layout_mapping: list[_Place]


class _Line(BaseModel):
    """A line of the annotations; the two pairs of indices are the first and the last row."""

    doc_name: str
    domain: str
    page_indices: tuple[int, int]
    layout_indices: tuple[int, int]
    questions: list[_Question]


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
            documents.append(_document(parse(_Line, line), folder, tables, dpi))
        except (ValueError, OSError) as error:
            problems.append(f"{ANNOTATIONS}, line {number}: {error}")
    return Collection(tuple(documents), tuple(problems))


def _document(
    line: _Line, folder: Path, tables: tuple[_Table, _Table] | None, dpi: int
) -> AnnotatedDocument:
    """The document of one line of annotations."""
    name = line.doc_name
    pages: Sequence[Page]
    layouts: list[Layout] = []
    if tables:
        of_pages, of_layouts = tables
        pages = [
            of_pages.page(index, number)
            for number, index in enumerate(of_pages.rows_of(name, *line.page_indices), 1)
        ]
        layouts = [
            of_layouts.layout(index) for index in of_layouts.rows_of(name, *line.layout_indices)
        ]
    else:
        pages = open_pdf(folder / "pdfs" / name, dpi=dpi).pages
    questions = tuple(_question(entry, len(pages)) for entry in line.questions)
    return AnnotatedDocument(name, pages, domain=line.domain, questions=questions, layouts=layouts)


def _question(entry: _Question, pages: int) -> Question:
    boxes = tuple(place.box() for place in entry.layout_mapping)
    named = {*entry.page_id, *(box.page for box in boxes)}
    if wrong := sorted(page for page in named if not 0 <= page < pages):
        raise ValueError(
            f"{entry.Q!r} points to the pages {wrong}; the document has the pages 0 to {pages - 1}"
        )
    return Question(entry.Q, str(entry.A), tuple(entry.page_id), boxes, entry.type)


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
            types = {column.name: column.type for column in self.file.schema_arrow}
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

    def rows_of(self, name: str, first: int, last: int) -> range:
        """The rows of a document, from the numbers of its first and last row."""
        if not 0 <= first <= last < len(self.rows):
            raise ValueError(
                f"{name}: {first} to {last} are no rows of {self.path}, which has {len(self.rows)}"
            )
        rows = range(first, last + 1)
        if others := {self.rows[index]["doc_name"] for index in rows} - {name}:
            raise ValueError(
                f"{name}: rows {first} to {last} of {self.path} are of {sorted(others)}"
            )
        return rows

    def page(self, row: int, number: int) -> Page:
        return Page(number, lambda: self.rows[row]["ocr_text"] or "", lambda: self._image(row))

    def layout(self, row: int) -> Layout:
        values = self.rows[row]
        place = {"page": values["page_id"], **{n: values[n] for n in ("bbox", "page_size")}}
        return Layout(parse(_Place, place).box(), values["type"], lambda: self._image(row))

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
