"""Units of natural haystacks: pieces of text as large as a page, shown as a text or as a page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import TypeVar

import numpy as np
from PIL import Image

from mmheads.tasks.corpus import Paragraph
from mmheads.tasks.rendered_pages import (
    Box,
    PageStyle,
    PictureName,
    draw_page,
    draw_picture,
    draw_strip,
    paste_on,
    text_height,
)

BREAK = "\n\n"
"""Between paragraphs, and at the end of a text."""

SENTENCES_PER_PARAGRAPH = (2, 1, 3)
"""In turn. A paragraph of one sentence, as a needle on a page is, is therefore nothing special."""

_Item = TypeVar("_Item")


@dataclass(frozen=True, eq=False)
class Unit:
    """A text or a page of a haystack.

    Attributes:
        is_page: Whether it is shown as a page.
        paragraphs: What it says; at most what a page holds beside a needle and a small picture.
        page: Returns its page, if that is not drawn from the paragraphs.
        picture: The small picture on the page.
        place: How far down and how far to the right the small picture is, and how far down the
            sentence of a needle would be, from 0 to 1.
    """

    is_page: bool
    paragraphs: tuple[Paragraph, ...] = ()
    page: Callable[[], Image.Image] | None = None
    picture: PictureName = ("", "", "", "")
    place: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def steps(self) -> list[str]:
        """The sentences of a text, each with the white space before it; for a page, one text."""
        if self.is_page:
            return [""]
        return [
            (" " if index else BREAK) + sentence
            for paragraph in self.paragraphs
            for index, sentence in enumerate(paragraph)
        ]

    def draw(self, style: PageStyle, sentence: str = "") -> tuple[Image.Image, Box, Box | None]:
        """The page, the box of its small picture, and that of a needle's sentence if there is one.

        On a drawn page the sentence is a paragraph; on any other page it is pasted.
        """
        picture = draw_picture(self.picture, style.picture)
        down, right, slot = self.place
        if self.page is not None:
            image, picture_box = paste_on(self.page(), picture, (down / 2, right))
            if not sentence:
                return image, picture_box, None
            image, box = paste_on(image, draw_strip(sentence, style), (0.6 + 0.4 * slot, slot))
            return image, picture_box, box
        texts = [" ".join(paragraph) for paragraph in self.paragraphs]
        index = round(slot * len(texts))
        texts[index:index] = [sentence] if sentence else []
        drawn = draw_page(texts, style, picture, (down, right))
        return drawn.image, drawn.picture, drawn.paragraphs[index] if sentence else None


def text_part(
    steps: Sequence[str], sentence: str = "", position: int = 0
) -> tuple[str, tuple[int, int] | None]:
    """Sentences as a part of a context, and the characters of one that is put between them.

    Args:
        steps: Of a unit.
        sentence: A needle, or "".
        position: How many of the steps are before the needle.
    """
    pieces = list(steps)
    if sentence:
        pieces[position:position] = [f" {sentence}"]
        if position == 0 and steps:
            pieces[1] = f" {pieces[1].lstrip()}"
    text = "".join(pieces)
    margin = len(text) - len(text.lstrip())
    first = len("".join(pieces[:position])) + 1 - margin
    chars = (first, first + len(sentence)) if sentence else None
    return text.lstrip() + BREAK, chars


def fill(
    stream: Iterator[Unit],
    least: int,
    length: int,
    cost: Callable[[Unit, str], int],
    tokens: Callable[[list[Unit]], int],
) -> list[Unit]:
    """The first sentences and pages of a stream, as many as fit; the last text may be cut.

    Args:
        stream: Units without end.
        least: Number of sentences and pages that are needed.
        length: Largest number of tokens of the prompt.
        cost: Returns about how many tokens a step of a unit adds to a prompt.
        tokens: Returns the exact number of tokens of the prompt that some units are in.

    Raises:
        ValueError: Not even what is needed fits.
    """
    units: list[Unit] = []
    costs: list[int] = []

    def cost_of(step: int) -> int:
        while len(costs) <= step:
            units.append(next(stream))
            costs.extend(cost(units[-1], text) for text in units[-1].steps)
        return costs[step]

    cost_of(least)
    steps, used = least, tokens(_first(units, least))
    if used > length:
        raise ValueError(f"length is {length}; expected at least {used} tokens for this needle")
    while used + cost_of(steps) <= length:
        while used + cost_of(steps) <= length:  # by their costs, so that few prompts are counted
            used += cost_of(steps)
            steps += 1
        used = tokens(_first(units, steps))
    while used > length:
        steps -= 1
        used = tokens(_first(units, steps))
    return _first(units, steps)


def _first(units: Sequence[Unit], steps: int) -> list[Unit]:
    """The units of the first sentences and pages; the last text may be cut."""
    taken: list[Unit] = []
    for unit in units:
        if steps <= 0:
            break
        taken.append(unit if unit.is_page else _cut(unit, steps))
        steps -= len(unit.steps)
    return taken


def make_room(units: list[Unit], depth: float) -> int:
    """Let a page be at a depth, in exchange with the nearest page, and return its index."""
    position = round(depth * (len(units) - 1))
    pages = [index for index, unit in enumerate(units) if unit.is_page]
    nearest = min(pages, key=lambda index: abs(index - position))
    units[position], units[nearest] = units[nearest], units[position]
    return position


def page_texts(
    paragraphs: Sequence[Paragraph], style: PageStyle, needle: str
) -> list[tuple[Paragraph, ...]]:
    """Running text, cut into pieces that each fill a page beside a small picture and a needle.

    Sentences that are too long for a page are left out.
    """
    room = style.height - 2 * style.margin - style.picture - style.paragraph_gap
    room -= text_height([needle], style)
    pages: list[list[Paragraph]] = [[]]
    used = 0
    for paragraph in _short(paragraphs):
        height = text_height([" ".join(paragraph)], style)
        pieces = [paragraph] if height <= room else [(sentence,) for sentence in paragraph]
        for piece in pieces:
            height = text_height([" ".join(piece)], style)
            if height > room:
                continue
            if used + height > room:
                pages.append([])
                used = 0
            pages[-1].append(piece)
            used += height
    return [tuple(page) for page in pages if page]


def endless(items: Sequence[_Item], seed: tuple[int, ...]) -> Iterator[_Item]:
    """The items in random order; when all have been given, again in another one."""
    rng = np.random.default_rng(seed)
    while items:
        yield from (items[index] for index in rng.permutation(len(items)))


def _short(paragraphs: Sequence[Paragraph]) -> Iterator[Paragraph]:
    """The paragraphs, cut into shorter ones."""
    sizes = cycle(SENTENCES_PER_PARAGRAPH)
    for paragraph in paragraphs:
        left = iter(paragraph)
        while piece := tuple(islice(left, next(sizes))):
            yield piece


def _cut(unit: Unit, steps: int) -> Unit:
    """A text of the first sentences of another one."""
    kept: list[Paragraph] = []
    for paragraph in unit.paragraphs:
        kept.append(paragraph[: max(0, steps)])
        steps -= len(paragraph)
    return replace(unit, paragraphs=tuple(filter(None, kept)))
