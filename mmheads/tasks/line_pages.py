"""Pages that read like text, and haystacks of them and of text.

A page has 64 x 64 px in cells of 16 px and two lines, double-spaced: a key, a value, a full stop
and a blank. A cell is one visual token of the tiny models, so that a line has the same tokens as a
sentence such as "B7 K .", and a blank. The key is a code such as B7 or a coloured icon; the value
is a letter. With single spacing, the tiny models do not learn which row a key is in: heads of 32
channels turn by only 0.4 radians from one row to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from mmheads.examples import Part, Region

Pixels = npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]
"""Left, top, right and bottom edge in pixels; the right and bottom edges are exclusive."""

CELL, SPRITE, LINES, COLUMNS, SPACING = 16, 14, 2, 4, 3
PAGE = CELL * COLUMNS
"""Width and height of a page in pixels."""
CODES = tuple(letter + digit for letter, digit in product("ABCDEFGH", "12345678"))
VALUES = tuple("JKLMNPQRSTUVWXYZ")
COLORS = {
    "red": (214, 32, 32),
    "green": (20, 140, 50),
    "blue": (30, 60, 210),
    "yellow": (250, 205, 20),
    "purple": (150, 50, 180),
    "cyan": (40, 200, 230),
    "orange": (245, 120, 10),
    "brown": (115, 70, 30),
}
SHAPES = ("disc", "square", "triangle", "diamond", "cross", "ring", "wedge", "frame")
ICONS = tuple(f"{color}-{shape}" for color, shape in product(COLORS, SHAPES))
NOUNS = (
    *("rain", "wind", "snow", "smoke", "light", "water", "music", "bread"),
    *("birds", "boats", "bells", "trees", "children", "horses", "rivers", "stars"),
)
VERBS = (
    *("falls", "comes", "stays", "ends", "changes", "returns", "waits", "turns"),
    *("moves", "rests", "rises", "passes", "begins", "grows", "fades", "shines"),
)
PROSE = 0.75
"""Share of prose among the sentences of a haystack."""
SENTENCES = 6
UNIT_TOKENS = 3 * SENTENCES
"""Tokens of a text unit, and of a page with its two wrappers, in the tiny models."""
STOP, BLANK = ".", "blank"
"""Names of the cells that end a line."""

_OUTLINE = (40, 40, 40)
_LARGE = 112
"""Icons are drawn with edges of this many pixels and then made smaller."""


@dataclass(frozen=True)
class Record:
    """A key and its value: `key` is one of `CODES` or `ICONS`, `value` is one of `VALUES`.

    A record of prose has a noun as its key and a verb as its value.
    """

    key: str
    value: str


def cells(records: Sequence[Record]) -> tuple[str, ...]:
    """Names of what the cells of a page show, line by line from left to right."""
    lines = [(r.key, r.value, STOP, BLANK) for r in records]
    between = (BLANK,) * COLUMNS * (SPACING - 1)
    return tuple(name for line in lines[:-1] for name in (*line, *between)) + lines[-1]


def draw(names: Sequence[str], columns: int, rng: np.random.Generator) -> Pixels:
    """Draw a grid of cells.

    Args:
        names: What each cell shows, line by line: an icon, a code, a value, `STOP` or `BLANK`.
        columns: Cells per line.
        rng: Shifts each sprite by 0 to 2 px in both directions.

    Returns:
        Pixels of shape [16 x lines, 16 x columns, 3].
    """
    pixels = np.full((len(names) // columns * CELL, columns * CELL, 3), 255, np.uint8)
    for index, name in enumerate(names):
        if name != BLANK:
            row, column = divmod(index, columns)
            y, x = np.array([row, column]) * CELL + rng.integers(0, CELL - SPRITE + 1, 2)
            pixels[y : y + SPRITE, x : x + SPRITE] = sprite(name)
    return pixels


def page(records: Sequence[Record], rng: np.random.Generator) -> Pixels:
    """Draw a page of two records, one per line, as pixels of shape [64, 64, 3]."""
    if len(records) != LINES:
        raise ValueError(f"there are {len(records)} records; expected {LINES}, one per line")
    return draw(cells(records), COLUMNS, rng)


def option(icon: str, rng: np.random.Generator) -> Pixels:
    """Draw one icon by itself, as pixels of shape [16, 16, 3]."""
    return draw((icon,), 1, rng)


def line_box(line: int) -> Box:
    """Box of a line of a page: the region of the record on it."""
    top = line * SPACING * CELL
    return (0, top, PAGE, top + CELL)


@dataclass(frozen=True)
class Unit:
    """A part of a haystack: six sentences of text, or a page of two lines."""

    is_page: bool
    records: tuple[Record, ...]

    def part(self, rng: np.random.Generator) -> Part:
        """The unit as a part of an example; `rng` shifts the sprites of a page."""
        if self.is_page:
            return Image.fromarray(page(self.records, rng))
        return " ".join(sentence(record) for record in self.records)

    def replace(self, index: int, record: Record) -> Self:
        """The unit with another record at `index`."""
        return replace(self, records=(*self.records[:index], record, *self.records[index + 1 :]))

    def region(self, part: int, index: int) -> Region:
        """Where record `index` is, if the unit is part `part` of a context."""
        if self.is_page:
            return Region(part=part, box=line_box(index))
        first = sum(len(sentence(record)) + 1 for record in self.records[:index])
        return Region(part=part, chars=(first, first + len(sentence(self.records[index]))))


def sentence(record: Record) -> str:
    """A record as text."""
    return f"{record.key} {record.value} ."


def fill(
    pages: Sequence[bool] | np.ndarray,
    codes: Sequence[str],
    icons: Sequence[str],
    rng: np.random.Generator,
    prose: float = PROSE,
    icon_sentences: float = 0.0,
) -> list[Unit]:
    """Fill a haystack of pages (True) and text units with records of these keys, and with prose.

    Args:
        pages: Whether each unit is a page.
        codes: Codes that may be keys; on pages half of the keys are codes.
        icons: Icons that may be keys.
        rng: Source of randomness.
        prose: Share of prose among the sentences of text.
        icon_sentences: Share of sentences whose key is an icon's name, before prose is put in.
    """
    units = []
    of_code, of_icon, letters, nouns, verbs = map(np.array, (codes, icons, VALUES, NOUNS, VERBS))

    def some(words: npt.NDArray[Any], count: int) -> npt.NDArray[Any]:
        """What `rng.choice` draws, without its checks, which take longer."""
        return words[rng.integers(0, len(words), count)]

    for is_page in pages:
        count = LINES if is_page else SENTENCES
        on_code = np.ones(count, bool)
        if is_page or icon_sentences:
            on_code = rng.random(count) >= (0.5 if is_page else icon_sentences)
        keys = np.where(on_code, some(of_code, count), some(of_icon, count))
        values = some(letters, count)
        if prose and not is_page:
            is_prose = rng.random(count) < prose
            keys = np.where(is_prose, some(nouns, count), keys)
            values = np.where(is_prose, some(verbs, count), values)
        records = map(Record, keys.tolist(), values.tolist())
        units.append(Unit(bool(is_page), tuple(records)))
    return units


@cache
def sprite(name: str) -> Pixels:
    """Draw an icon, a code, a value or the full stop, as pixels of shape [14, 14, 3]."""
    if name in ICONS:
        return _icon(*name.split("-"))
    if name == STOP:
        pixels = np.full((SPRITE, SPRITE, 3), 255, np.uint8)
        pixels[9:12, 2:5] = 0
        return pixels
    return np.hstack([glyph(character, SPRITE // len(name)) for character in name])


def _icon(color: str, shape: str) -> Pixels:
    image = Image.new("RGB", (_LARGE, _LARGE), "white")
    pen = ImageDraw.Draw(image)
    a, b, middle = 5, _LARGE - 6, _LARGE // 2
    low, high, width = 38, 73, 7  # edges of bars and holes, and width of the outline
    fill = COLORS[color]
    line: dict[str, Any] = {"outline": _OUTLINE, "width": width}
    plus = [(low, a), (high, a), (high, low), (b, low), (b, high), (high, high)]
    plus += [(high, b), (low, b), (low, high), (a, high), (a, low), (low, low)]
    corners = {
        "triangle": [(middle, a), (b, b), (a, b)],
        "diamond": [(middle, a), (b, middle), (middle, b), (a, middle)],
        "cross": plus,
        "wedge": [(a, a), (b, a), (middle, b)],
    }
    if shape in corners:
        pen.polygon(corners[shape], fill=fill, **line)
    else:
        outline = pen.ellipse if shape in ("disc", "ring") else pen.rectangle
        outline((a, a, b, b), fill=fill, **line)
        if shape in ("ring", "frame"):
            outline((low - 2, low - 2, high + 2, high + 2), fill="white", **line)
    return np.asarray(image.resize((SPRITE, SPRITE), Image.Resampling.LANCZOS))


def glyph(character: str, width: int) -> Pixels:
    """Draw a black character that fills a white rectangle, as pixels of shape [14, width, 3]."""
    font = ImageFont.load_default(size=60)
    left, top, right, bottom = (round(edge) for edge in font.getbbox(character))
    image = Image.new("RGB", (right - left + 6, bottom - top + 6), "white")
    ImageDraw.Draw(image).text((3 - left, 3 - top), character, fill="black", font=font)
    return np.asarray(image.resize((width, SPRITE), Image.Resampling.LANCZOS))
