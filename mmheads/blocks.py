"""Blocks of a PDF page: paragraphs of its text layer, and pictures, with their places."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pypdfium2
from pypdfium2 import raw

Box = tuple[float, float, float, float]

GAP = 0.5
"""Heights of a line; lines that are further apart belong to two blocks."""

SIZES = 1.3
"""Lines of which one is higher than the other by this factor belong to two blocks."""

PICTURE = (0.01, 0.8)
"""Shares of the page; a smaller picture is an ornament, a larger one the background or a scan."""

UNITS = 16
"""Places are rounded to this part of a point."""

HYPHEN = "\x02"
"""What PDFium puts for a hyphen at the end of a line, in place of the line break."""


@dataclass(frozen=True)
class Block:
    """A paragraph, a picture or a cell of a page.

    Attributes:
        box: Left, top, right and bottom in points, from the top left corner of the page as it is
            displayed.
        text: The lines of a paragraph.
        kind: "text", "picture" or "cell".
    """

    box: Box
    text: str = ""
    kind: str = "text"

    @property
    def area(self) -> float:
        """In square points."""
        return _wide(self.box) * _high(self.box)


def page_blocks(page: pypdfium2.PdfPage) -> tuple[Block, ...]:
    """The paragraphs of a page in the order of its text layer, then its pictures.

    Lines that follow each other are one block if they stand below each other at a small distance
    and are of one size. Pictures, and drawings that the file holds as one object, are blocks too.
    What lies outside of the page is left out.
    """
    width, height = page.get_size()
    whole = (0, 0, round(UNITS * width), round(UNITS * height), 0)
    places = pypdfium2.PdfPosConv(page, whole)
    blocks: list[Block] = []
    last = None
    for line in _lines(page.get_textpage(), places):
        if last and _goes_on(blocks[-1].box, last.box, line.box):
            block = blocks.pop()
            blocks.append(Block(_union(block.box, line.box), block.text + line.text))
        else:
            blocks.append(line)
        last = line
    kinds = [raw.FPDF_PAGEOBJ_IMAGE, raw.FPDF_PAGEOBJ_FORM]
    objects = page.get_objects(kinds, max_depth=1)
    boxes = dict.fromkeys(_displayed(places, each.get_bounds()) for each in objects)
    pictures = [Block(box, kind="picture") for box in boxes]
    low, high = (share * width * height for share in PICTURE)
    return (*blocks, *(each for each in pictures if low <= each.area <= high))


def grid(size: tuple[float, float], columns: int, rows: int) -> list[Block]:
    """Cells of one size that cover a page, row by row."""
    wide, high = size[0] / columns, size[1] / rows
    cells = [(column, row) for row in range(rows) for column in range(columns)]
    return [
        Block((x * wide, y * high, (x + 1) * wide, (y + 1) * high), "", "cell") for x, y in cells
    ]


def _lines(text: pypdfium2.PdfTextPage, places: pypdfium2.PdfPosConv) -> Iterator[Block]:
    """The lines that are on the page; where a line runs on without a break elsewhere, it ends."""
    letters, box, last = "", None, None
    for index in range(text.count_chars()):
        letter = chr(raw.FPDFText_GetUnicode(text, index))
        if letter.isprintable() and not letter.isspace():
            place = _displayed(places, text.get_charbox(index, loose=True))
            if box and last and (letters.endswith("\n") or _jumps(last, place)):
                yield from _line(letters, box)
                letters, box = "", None
            last, box = place, _union(box, place) if box else place
        letters += letter
    if box:
        yield from _line(letters, box)


def _line(letters: str, box: Box) -> Iterator[Block]:
    """A line with its end, if it is on the page."""
    text = letters.replace("\r\n", "\n")
    text = text.removesuffix(HYPHEN) if text.endswith(HYPHEN) else text.removesuffix("\n") + "\n"
    if _wide(box) > 0 and _high(box) > 0:
        yield Block(box, text)


def _jumps(last: Box, box: Box) -> bool:
    """Whether a letter does not continue the line of the one before: further left, or elsewhere."""
    high, size = _high(last), max(_wide(last), _high(last))
    apart = max(box[1] - last[3], last[1] - box[3])
    return last[0] - box[2] > high or apart > GAP * size


def _goes_on(block: Box, last: Box, line: Box) -> bool:
    """Whether a line belongs to a block that ends with the last one."""
    high, low = sorted((_high(last), _high(line)), reverse=True)
    below = last[1] < line[1] and line[1] - last[3] <= GAP * low
    overlap = min(block[2], line[2]) - max(block[0], line[0])
    return below and overlap > 0 and high <= SIZES * low


def _displayed(places: pypdfium2.PdfPosConv, bounds: Box) -> Box:
    """Left, bottom, right and top of a PDF as a box on the page, without what is outside of it."""
    corners = zip(places.to_bitmap(*bounds[:2]), places.to_bitmap(*bounds[2:]), strict=True)
    (left, right), (top, bottom) = (
        sorted(min(max(value, 0), size) / UNITS for value in values)
        for values, size in zip(corners, places.pos_args[2:4], strict=True)
    )
    return left, top, right, bottom


def _union(a: Box, b: Box) -> Box:
    return min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])


def _wide(box: Box) -> float:
    return box[2] - box[0]


def _high(box: Box) -> float:
    return box[3] - box[1]
