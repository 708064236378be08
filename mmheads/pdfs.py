"""PDF files as documents: a page image and a text per page, made when they are asked for."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pypdfium2
from PIL import Image

from mmheads.blocks import Block, page_blocks
from mmheads.images import MAX_PIXELS

DPI = 144
"""Default resolution of page images, in pixels per inch."""

MAX_DPI = 2400
MAX_PROBLEMS = 1000

# For every form that has a second version in XFA, pypdfium2 advises a different build of itself.
# The first version is drawn without that build.
logging.getLogger("pypdfium2").setLevel(logging.ERROR)


@dataclass(frozen=True)
class PageBox:
    """A rectangle on a page as it is displayed, that is, after the page's own rotation.

    Attributes:
        page: Index of the page in its document, from 0.
        box: Left, top, right and bottom, counted from the top left corner of the page.
        size: Width and height of the page, in the unit of `box` (points for PDF files).
    """

    page: int
    box: tuple[float, float, float, float]
    size: tuple[float, float]

    @classmethod
    def whole(cls, page: int, size: tuple[float, float]) -> PageBox:
        """Return the box that covers all of a page."""
        return cls(page, (0.0, 0.0, *size), size)


@dataclass(frozen=True, eq=False)
class Page:
    """One page: its number, and its text, image and blocks, which are made when asked for.

    Attributes:
        number: Position of the page in its file, from 1.
        read_text: Returns the text layer of a PDF, or the text that OCR found; "" if there is none.
        image: Returns the page as displayed, in RGB.
        label: The number that is printed on the page, such as "iv"; "" if the file names none.
        size: Width and height in points, as displayed; (0, 0) where they are not known.
        read_blocks: Returns its paragraphs and pictures; none where they are not known.
        document: Name of its file, where it is known.
    """

    number: int
    read_text: Callable[[], str]
    image: Callable[[], Image.Image]
    label: str = ""
    size: tuple[float, float] = (0.0, 0.0)
    read_blocks: Callable[[], tuple[Block, ...]] = tuple
    document: str = ""

    @cached_property
    def text(self) -> str:
        """The text of the page, read once."""
        return self.read_text()

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The paragraphs and pictures of the page, read once."""
        return self.read_blocks()

    @property
    def paragraphs(self) -> list[Block]:
        """The blocks that hold text."""
        return [block for block in self.blocks if block.text.strip()]

    @property
    def title(self) -> str:
        """The printed label with the position in the file, "iv (4)", or only the position, "4"."""
        return page_title(self.number, self.label)


@dataclass(frozen=True, eq=False)
class Document:
    """The pages of one document.

    Attributes:
        name: Name of its file.
        pages: Its pages, in reading order.
        problems: One sentence for each page that was left out.
    """

    name: str
    pages: Sequence[Page]
    problems: tuple[str, ...] = ()


def open_pdf(
    path: str | Path, *, dpi: int = DPI, password: str | None = None, skip_broken: bool = False
) -> Document:
    """Open a PDF file as a document.

    All pages are checked at once; their images (with filled forms and annotations drawn) and
    texts are made when asked for. The file is open only while it is read.

    Args:
        path: The file.
        dpi: Resolution of the page images, in pixels per inch.
        password: Password of a user or of the owner, for an encrypted file.
        skip_broken: Leave out pages that are broken or too large and list them in `problems`,
            in place of an error.

    Raises:
        ValueError: The file is missing, damaged, or encrypted with another password; it is a
            dynamic XFA form; a page is broken, or has more than `images.MAX_PIXELS` pixels at
            this resolution; or dpi is out of range.
    """
    if not 1 <= dpi <= MAX_DPI:
        raise ValueError(f"dpi is {dpi}; expected 1 to {MAX_DPI} pixels per inch")
    pdf = _Pdf(Path(path), dpi, password)
    pages, problems = [], []
    with pdf.opened() as file:
        for index in range(len(file)):
            try:
                pages.append(pdf.page(file, index))
            except ValueError as error:
                if not skip_broken:
                    advice = "skip_broken=True, or --skip-broken, leaves out such pages"
                    raise ValueError(f"{error}; {advice}") from None
                problems.append(str(error))
            if len(problems) > MAX_PROBLEMS:  # A forged number of pages.
                raise ValueError(f"{path} has over {MAX_PROBLEMS:,} broken pages: {problems[0]}")
    if not pages:
        raise ValueError(f"{path} has no page that can be read: {problems[0]}")
    return Document(pdf.path.name, pages, tuple(problems))


def page_title(number: int, label: str) -> str:
    """The printed label with the position from 1, or only the position; see `Page.title`."""
    return f"{label} ({number})" if label not in ("", str(number)) else str(number)


@dataclass(frozen=True, eq=False)
class _Pdf:
    """A PDF file that is opened whenever something is read from it."""

    path: Path
    dpi: int
    password: str | None = field(repr=False)

    @contextmanager
    def opened(self) -> Iterator[pypdfium2.PdfDocument]:
        """The file, open for a while, with its forms ready to be drawn."""
        if not self.path.is_file():
            raise ValueError(f"{self.path} does not exist; expected a PDF file")
        try:
            file = pypdfium2.PdfDocument(self.path, password=self.password)
        except pypdfium2.PdfiumError as error:
            raise ValueError(self._refusal(error)) from error
        with file:
            if file.get_formtype() == pypdfium2.raw.FORMTYPE_XFA_FULL:
                raise ValueError(
                    f"{self.path} is a dynamic XFA form, which holds no pages until a program in "
                    "it has run; print it to a new PDF file and open that one"
                )
            file.init_forms()  # Before any page is loaded, or filled fields are not drawn.
            yield file

    def _refusal(self, error: pypdfium2.PdfiumError) -> str:
        content = self.path.read_bytes()
        # The code is that of an earlier file where this one only lacks pages.
        if error.err_code == pypdfium2.raw.FPDF_ERR_PASSWORD and b"/Encrypt" in content:
            if self.password is None:
                return f"{self.path} is encrypted; give its password (password=..., or --password)"
            return f"{self.path} is encrypted with another password than the given one"
        return (
            f"{self.path} cannot be opened as a PDF (it begins with {content[:16]!r}): it is "
            "damaged, has no page, or is encrypted in an unknown way"
        )

    def page(self, file: pypdfium2.PdfDocument, index: int) -> Page:
        """A page of the file, without loading it; ValueError if it is broken or too large."""
        number, label = index + 1, file.get_page_label(index)
        title = f"Page {page_title(number, label)} of {self.path}"
        try:
            width, height = file.get_page_size(index)
        except pypdfium2.PdfiumError:
            raise ValueError(f"{title} is broken") from None
        pixels = _pixels(width, height, self.dpi)
        if not pixels:  # The crop box lies outside of the page.
            raise ValueError(f"{title} has no area ({width:,.0f} x {height:,.0f} points)")
        if pixels > MAX_PIXELS:
            lower = range(self.dpi, 0, -1)
            dpi = next((dpi for dpi in lower if _pixels(width, height, dpi) <= MAX_PIXELS), None)
            raise ValueError(
                f"{title} has {width:,.0f} x {height:,.0f} points, and thereby {pixels:,} pixels "
                f"at {self.dpi} dpi; expected at most {MAX_PIXELS:,} pixels: "
                + (f"{dpi} dpi or less would fit" if dpi else "no resolution would fit")
            )
        return Page(
            number,
            lambda: self.text(index, title),
            lambda: self.image(index, title),
            label,
            (width, height),
            lambda: self.blocks(index, title),
            self.path.name,
        )

    @cached_property
    def texts(self) -> dict[int, str]:
        """The texts of all pages that can be loaded, by index: who reads one often reads all."""
        texts = {}
        with self.opened() as file:
            for index in range(len(file)):
                with suppress(pypdfium2.PdfiumError):
                    page = file[index]
                    texts[index] = page.get_textpage().get_text_bounded()
                    page.close()
        return texts

    def text(self, index: int, title: str) -> str:
        if index not in self.texts:
            raise ValueError(f"{title} holds text that cannot be read")
        return self.texts[index]

    def blocks(self, index: int, title: str) -> tuple[Block, ...]:
        with self.opened() as file:
            try:
                return page_blocks(file[index])
            except pypdfium2.PdfiumError as error:
                raise ValueError(f"{title} holds text that cannot be read: {error}") from error

    def image(self, index: int, title: str) -> Image.Image:
        with self.opened() as file:
            try:
                bitmap = file[index].render(scale=self.dpi / 72)
                image: Image.Image = bitmap.to_pil().convert("RGB")
            except (pypdfium2.PdfiumError, ValueError, MemoryError) as error:
                reason = str(error) or "not enough memory"
                raise ValueError(f"{title} cannot be drawn at {self.dpi} dpi: {reason}") from error
        return image


def _pixels(width: float, height: float, dpi: int) -> int:
    """Pixels of a page whose size is given in points; each side is rounded up."""
    return math.ceil(width * dpi / 72) * math.ceil(height * dpi / 72)
