"""Small pages: blocks with a key (a coloured icon, or a code such as B7) and a value (a letter).

A page is 64 x 64 px, two by two blocks of 32 px, each of two by two cells of 16 px. The key stands
in a block's upper left cell, the value in its lower right one. A cell is one visual token of the
tiny models.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from mmheads.tasks.line_pages import (
    CELL,
    ICONS,
    PAGE,
    SPRITE,
    Box,
    Pixels,
    Record,
    glyph,
)

BLOCK = 32
BLOCKS = (PAGE // BLOCK) ** 2
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 220),
    "yellow": (230, 180, 30),
    "purple": (160, 60, 190),
    "cyan": (30, 190, 200),
    "orange": (240, 130, 30),
    "brown": (120, 80, 40),
}


@cache
def sprite(name: str) -> Pixels:
    """Draw an icon, a code or a value -> [14, 14, 3]."""
    if name in ICONS:
        return _icon(*name.split("-"))
    return np.hstack([glyph(character, SPRITE // len(name)) for character in name])


def page(blocks: Sequence[Record], rng: np.random.Generator) -> Pixels:
    """Draw four blocks, row by row -> [64, 64, 3]; `rng` shifts each sprite by 0 to 2 px."""
    pixels = np.full((PAGE, PAGE, 3), 255, np.uint8)
    for index, block in enumerate(blocks):
        left, top, right, bottom = block_box(index)
        _put(pixels, left, top, block.key, rng)
        _put(pixels, right - CELL, bottom - CELL, block.value, rng)
    return pixels


def option(icon: str, rng: np.random.Generator) -> Pixels:
    """Draw one icon alone -> [16, 16, 3]."""
    pixels = np.full((CELL, CELL, 3), 255, np.uint8)
    _put(pixels, 0, 0, icon, rng)
    return pixels


def block_box(index: int) -> Box:
    """Box of a page's block, counted row by row."""
    row, column = divmod(index, PAGE // BLOCK)
    return (column * BLOCK, row * BLOCK, (column + 1) * BLOCK, (row + 1) * BLOCK)


def _put(pixels: Pixels, left: int, top: int, name: str, rng: np.random.Generator) -> None:
    x, y = np.array([left, top]) + rng.integers(0, CELL - SPRITE + 1, 2)
    pixels[y : y + SPRITE, x : x + SPRITE] = sprite(name)


def _icon(color: str, shape: str) -> Pixels:
    image = Image.new("RGB", (64, 64), "white")
    draw, fill, a, b = ImageDraw.Draw(image), COLORS[color], 6, 58
    match shape:
        case "disc":
            draw.ellipse((a, a, b, b), fill=fill)
        case "square":
            draw.rectangle((a, a, b, b), fill=fill)
        case "triangle":
            draw.polygon([(32, a), (b, b), (a, b)], fill=fill)
        case "diamond":
            draw.polygon([(32, a), (b, 32), (32, b), (a, 32)], fill=fill)
        case "cross":
            draw.rectangle((a, 24, b, 40), fill=fill)
            draw.rectangle((24, a, 40, b), fill=fill)
        case "ring":
            draw.ellipse((a, a, b, b), outline=fill, width=12)
        case "wedge":
            draw.polygon([(a, a), (b, a), (32, b)], fill=fill)
        case "frame":
            draw.rectangle((a, a, b, b), outline=fill, width=12)
    return np.asarray(image.resize((SPRITE, SPRITE), Image.Resampling.LANCZOS))
