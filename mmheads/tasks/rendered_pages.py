"""Pages of text drawn at reading size, small pictures on them, and where both are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from math import ceil
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

Box = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels."""

PictureName = tuple[str, str, str, str]
"""Colour and shape of a small picture, and of the mark on it."""

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
SHAPES = ("disc", "square", "triangle", "diamond", "cross")
PICTURES: tuple[PictureName, ...] = tuple(
    (outer, shape, inner, mark)
    for outer, shape, inner, mark in product(COLORS, SHAPES, COLORS, SHAPES)
    if outer != inner and shape != mark
)
"""All small pictures; no two look alike."""


@dataclass(frozen=True)
class PageStyle:
    """How pages are drawn.

    Attributes:
        width: Width of a page in pixels.
        height: Height of a page in pixels.
        margin: Empty border of a page in pixels.
        font_size: Size of the font (DejaVu Sans) in pixels.
        picture: Width and height of a small picture in pixels.
    """

    width: int = 560
    height: int = 728
    margin: int = 24
    font_size: int = 16
    picture: int = 56

    def __post_init__(self) -> None:
        free = min(self.width, self.height) - 2 * self.margin
        if self.margin < 0 or self.font_size < 6 or not 8 <= self.picture <= free:
            raise ValueError(
                f"{self} cannot be drawn; expected a margin of 0 or more, a font size of 6 or more "
                "and a picture of at least 8 pixels that fits between the margins"
            )

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of a page in pixels."""
        return self.width, self.height

    @property
    def line_height(self) -> int:
        """Pixels from one line of text to the next."""
        return round(1.35 * self.font_size)

    @property
    def paragraph_gap(self) -> int:
        """Pixels between two paragraphs, beyond the height of a line."""
        return self.font_size // 2


@dataclass(frozen=True, eq=False)
class DrawnPage:
    """A page and where things are on it.

    Attributes:
        image: The page.
        paragraphs: Box of the lines of each paragraph.
        picture: Box of the small picture.
    """

    image: Image.Image
    paragraphs: tuple[Box, ...]
    picture: Box


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib; laid out the same way everywhere."""
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


@cache
def _width(text: str, size: int) -> float:
    """Width of a word or a letter in pixels."""
    return _font(size).getlength(text)


def wrap(text: str, style: PageStyle) -> list[str]:
    """The lines of a paragraph; a word that is wider than the page is cut."""
    size, room = style.font_size, style.width - 2 * style.margin
    lines: list[str] = []
    used = float(room)
    for word in text.split():
        width = _width(word, size)
        pieces = [word] if width <= room else list(word)
        for index, piece in enumerate(pieces):
            joint = "" if index else " "
            width = _width(joint, size) + _width(piece, size)
            if used + width <= room:
                lines[-1] += joint + piece
                used += width
            else:
                lines.append(piece)
                used = _width(piece, size)
    return lines


def text_height(paragraphs: Sequence[str], style: PageStyle) -> int:
    """Height of paragraphs in pixels, with the gaps below them."""
    lines = sum(len(wrap(paragraph, style)) for paragraph in paragraphs)
    return lines * style.line_height + len(paragraphs) * style.paragraph_gap


def draw_page(
    paragraphs: Sequence[str], style: PageStyle, picture: Image.Image, place: tuple[float, float]
) -> DrawnPage:
    """A page of paragraphs from top to bottom, with a picture between two of them.

    Args:
        paragraphs: Texts; each starts a new line.
        style: How the page is drawn.
        picture: A small picture.
        place: How far down (from before the first paragraph, 0, to after the last, 1) and how far
            to the right (from the left margin, 0, to the right one, 1) the picture is.

    Raises:
        ValueError: The paragraphs and the picture do not fit on the page.
    """
    height = text_height(paragraphs, style) + picture.height
    if height > style.height - 2 * style.margin:
        raise ValueError(
            f"{len(paragraphs)} paragraphs and a picture need {height} pixels between the margins "
            f"of a page, but {style} has {style.height - 2 * style.margin}; expected fewer"
        )
    image = Image.new("RGB", style.size, "white")
    before = round(place[0] * len(paragraphs))
    y = style.margin
    boxes: list[Box] = []
    for paragraph in paragraphs[:before]:
        boxes.append(_draw_lines(image, paragraph, y, style))
        y = boxes[-1][3] + style.paragraph_gap
    x = style.margin + round(place[1] * (style.width - 2 * style.margin - picture.width))
    image.paste(picture, (x, y))
    picture_box = (x, y, x + picture.width, y + picture.height)
    y += picture.height + style.paragraph_gap
    for paragraph in paragraphs[before:]:
        boxes.append(_draw_lines(image, paragraph, y, style))
        y = boxes[-1][3] + style.paragraph_gap
    return DrawnPage(image, tuple(boxes), picture_box)


def draw_strip(text: str, style: PageStyle) -> Image.Image:
    """A text as black lines on white, cropped to its lines, to be pasted on a page."""
    height = text_height([text], style)
    image = Image.new("RGB", (style.width, height), "white")
    return image.crop(_draw_lines(image, text, 0, style))


def _draw_lines(image: Image.Image, text: str, y: int, style: PageStyle) -> Box:
    """Write a paragraph on a page from y downwards; the box of its lines."""
    pen, font = ImageDraw.Draw(image), _font(style.font_size)
    lines = wrap(text, style)
    for index, line in enumerate(lines):
        pen.text((style.margin, y + index * style.line_height), line, fill="black", font=font)
    # Letters may reach one pixel beyond their width.
    right = style.margin + max(ceil(font.getlength(line)) for line in lines) + 1
    bottom = y + len(lines) * style.line_height
    return (max(0, style.margin - 1), y, min(right, style.width), bottom)


def paste_on(
    page: Image.Image, piece: Image.Image, place: tuple[float, float]
) -> tuple[Image.Image, Box]:
    """A copy of a page with a piece pasted on it in a white frame, and the box of the piece.

    Args:
        page: A picture of any size; one that is too small is put on a larger white one.
        piece: What is pasted.
        place: How far down and how far to the right, from 0 to 1.
    """
    frame = 4
    size = max(page.width, piece.width + 2 * frame), max(page.height, piece.height + 2 * frame)
    copy = Image.new("RGB", size, "white")
    copy.paste(page)
    y = frame + round(place[0] * (copy.height - piece.height - 2 * frame))
    x = frame + round(place[1] * (copy.width - piece.width - 2 * frame))
    white = (x - frame, y - frame, x + piece.width + frame, y + piece.height + frame)
    copy.paste("white", white)
    copy.paste(piece, (x, y))
    return copy, (x, y, x + piece.width, y + piece.height)


@cache
def draw_picture(name: PictureName, size: int) -> Image.Image:
    """One of `PICTURES` as an image: a coloured shape in a thin frame, with a mark on it."""
    outer, shape, inner, mark = name
    large = Image.new("RGB", (256, 256), "white")
    pen = ImageDraw.Draw(large)
    pen.rectangle((0, 0, 255, 255), outline="grey", width=4)
    pen.polygon(_outline(shape, 128, 110), fill=COLORS[outer])
    pen.polygon(_outline(mark, 128, 59), fill="white")
    pen.polygon(_outline(mark, 128, 45), fill=COLORS[inner])
    return large.resize((size, size), Image.Resampling.LANCZOS)


def _outline(shape: str, center: float, radius: float) -> list[tuple[float, float]]:
    """Corners of a shape around a centre; a disc has very many."""
    match shape:
        case "disc":
            turns = np.linspace(0, 2 * np.pi, 90, endpoint=False)
            corners = np.stack([np.cos(turns), np.sin(turns)], axis=1)
        case "square":
            corners = np.array([(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)])
        case "triangle":
            corners = np.array([(0, -1), (1, 0.8), (-1, 0.8)])
        case "diamond":
            corners = np.array([(0, -1), (1, 0), (0, 1), (-1, 0)])
        case _:
            arm = [(0.3, -1), (0.3, -0.3), (1, -0.3)]
            corners = np.array([*arm, *((x, -y) for x, y in reversed(arm))])
            corners = np.concatenate([corners, -corners])
    return [(float(center + radius * x), float(center + radius * y)) for x, y in corners]
