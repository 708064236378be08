"""Small pages that read like text: four lines, each a key, a value, a full stop and a blank.

A page has 64 x 64 px in cells of 16 px. A cell is one visual token of the tiny models, so that a
line of a page has the same tokens as a sentence such as "B7 K .", followed by a blank. The key is a
code such as B7 or a coloured icon; the value is a letter.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Pixels = npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]
"""Left, top, right and bottom edge in pixels; the right and bottom edges are exclusive."""

CELL, SPRITE, LINES, COLUMNS = 16, 14, 4, 4
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
    return tuple(name for r in records for name in (r.key, r.value, STOP, BLANK))


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
    """Draw a page of four records, one per line, as pixels of shape [64, 64, 3]."""
    if len(records) != LINES:
        raise ValueError(f"there are {len(records)} records; expected {LINES}, one per line")
    return draw(cells(records), COLUMNS, rng)


def option(icon: str, rng: np.random.Generator) -> Pixels:
    """Draw one icon by itself, as pixels of shape [16, 16, 3]."""
    return draw((icon,), 1, rng)


def line_box(line: int) -> Box:
    """Box of a line of a page: the region of the record on it."""
    return (0, line * CELL, PAGE, (line + 1) * CELL)


@cache
def sprite(name: str) -> Pixels:
    """Draw an icon, a code, a value or the full stop, as pixels of shape [14, 14, 3]."""
    if name in ICONS:
        return _icon(*name.split("-"))
    if name == STOP:
        pixels = np.full((SPRITE, SPRITE, 3), 255, np.uint8)
        pixels[9:12, 2:5] = 0
        return pixels
    return np.hstack([_glyph(character, SPRITE // len(name)) for character in name])


def _icon(color: str, shape: str) -> Pixels:
    image = Image.new("RGB", (_LARGE, _LARGE), "white")
    pen = ImageDraw.Draw(image)
    a, b, middle = 5, _LARGE - 6, _LARGE // 2
    low, high, width = 38, 73, 7
    fill, line = COLORS[color], {"outline": _OUTLINE, "width": width}
    match shape:
        case "disc":
            pen.ellipse((a, a, b, b), fill=fill, **line)
        case "square":
            pen.rectangle((a, a, b, b), fill=fill, **line)
        case "triangle":
            pen.polygon([(middle, a), (b, b), (a, b)], fill=fill, **line)
        case "diamond":
            pen.polygon([(middle, a), (b, middle), (middle, b), (a, middle)], fill=fill, **line)
        case "cross":
            plus = [(low, a), (high, a), (high, low), (b, low), (b, high), (high, high)]
            plus += [(high, b), (low, b), (low, high), (a, high), (a, low), (low, low)]
            pen.polygon(plus, fill=fill, **line)
        case "ring":
            pen.ellipse((a, a, b, b), fill=fill, **line)
            pen.ellipse((low - 2, low - 2, high + 2, high + 2), fill="white", **line)
        case "wedge":
            pen.polygon([(a, a), (b, a), (middle, b)], fill=fill, **line)
        case "frame":
            pen.rectangle((a, a, b, b), fill=fill, **line)
            pen.rectangle((low - 2, low - 2, high + 2, high + 2), fill="white", **line)
    return np.asarray(image.resize((SPRITE, SPRITE), Image.Resampling.LANCZOS))


def _glyph(character: str, width: int) -> Pixels:
    """Draw a black character that fills a white rectangle, as pixels of shape [14, width, 3]."""
    font = ImageFont.load_default(size=60)
    left, top, right, bottom = (round(edge) for edge in font.getbbox(character))
    image = Image.new("RGB", (right - left + 6, bottom - top + 6), "white")
    ImageDraw.Draw(image).text((3 - left, 3 - top), character, fill="black", font=font)
    return np.asarray(image.resize((width, SPRITE), Image.Resampling.LANCZOS))
