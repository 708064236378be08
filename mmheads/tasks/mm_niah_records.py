"""The parts of an MM-NIAH record: the units of its haystack, its needle, its question.

See `mm_niah` for the columns of a record.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from PIL import Image, ImageDraw, ImageFont
from pydantic import Field, model_validator

from mmheads.examples import Part
from mmheads.tasks.records import Columns, OneText, Record, Text

BEFORE_QUESTION = "\n\nQuestion: "
"""The end of the context, before the question."""
_FONT, _WIDTH, _MARGIN = 24, 448, 16


class _Unit(Columns):
    type: Literal["text", "image"]
    text: str = ""


class _TextPlace(Columns):
    text: Text


class _ImagePlace(Columns):
    image: Text


class _Haystack(Columns):
    id: Annotated[str, Field(pattern=r"(^|\D)\d{1,9}$")]
    depth: Annotated[float, Field(ge=0, le=1)]
    ctxs: list[_Unit]
    image_list: list[str]
    question: Text

    @property
    def number(self) -> int:
        """The number at the end of the id, which all depths of a haystack share."""
        return int(re.findall(r"\d+$", self.id)[0])

    @property
    def tenth(self) -> float:
        """The depth, rounded up to one digit as in MMLongBench (0.1999 is 0.2)."""
        return ceil(10 * self.depth - 1e-6) / 10 + 0.0


class TextNeedle(_Haystack):
    """Columns of a record of retrieval-text."""

    positive_ctxs: Annotated[list[_TextPlace], Field(min_length=1, max_length=1)]
    answer: OneText


class ImageNeedle(_Haystack):
    """Columns of a record of retrieval-image."""

    positive_ctxs: Annotated[list[_ImagePlace], Field(min_length=1, max_length=1)]
    choices_image: list[str]
    answer: int

    @model_validator(mode="after")
    def _options_differ(self) -> Self:
        options = self.choices_image
        if len({*options}) < max(2, len(options)) or not 0 <= self.answer < len(options):
            raise ValueError(
                f"answer is {self.answer} of the choices_image {options}; expected the index of "
                "one, from 0, of at least two that differ"
            )
        return self


Unit = str | Path | Image.Image
"""A unit of a haystack: a text, the path of an image, or an image."""


def draw(text: str) -> Image.Image:
    """Return an image of a text, black on white and wrapped; the same text gives the same image."""
    font = ImageFont.load_default(size=_FONT)
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    words = text.split()
    width = max(_WIDTH - 2 * _MARGIN, *(ceil(pen.textlength(word, font)) for word in words))
    lines = words[:1]
    for word in words[1:]:
        longer = f"{lines[-1]} {word}"
        if pen.textlength(longer, font) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    step = round(1.5 * _FONT)
    image = Image.new("RGB", (width + 2 * _MARGIN, step * len(lines) + 2 * _MARGIN), "white")
    pen = ImageDraw.Draw(image)
    for row, line in enumerate(lines):
        pen.text((_MARGIN, _MARGIN + row * step), line, fill="black", font=font)
    return image


def units_of(record: Record[TextNeedle] | Record[ImageNeedle]) -> list[Unit]:
    """Return the units of the haystack in their order.

    Raises:
        ValueError: There are more or fewer images in the haystack than paths.
    """
    units, paths = record.values.ctxs, record.values.image_list
    places = sum(unit.type == "image" for unit in units)
    if places != len(paths):
        raise record.error(f"ctxs has {places} images, but image_list {len(paths)}")
    images = map(Path, paths)
    return [next(images) if unit.type == "image" else unit.text for unit in units]


def place_sentence(
    record: Record[TextNeedle], units: list[Unit], task: str, needle: bool
) -> tuple[int, tuple[int, int] | None]:
    """Leave the needle's sentence in the haystack, draw it as an image, or take it out.

    Args:
        record: The record.
        units: The haystack, which is changed.
        task: "text" or "rendered_text".
        needle: False takes the sentence out.

    Returns:
        Index of the unit with the needle, and its first and last + 1 character there; None for
        the characters if the needle is an image or was taken out.

    Raises:
        ValueError: The sentence is not in the haystack exactly once.
    """
    sentence = record.values.positive_ctxs[0].text.strip()
    counts = [unit.count(sentence) if isinstance(unit, str) else 0 for unit in units]
    if sum(counts) != 1:
        raise record.error(f"the needle {sentence!r} is {sum(counts)} times in ctxs; expected once")
    index = counts.index(1)
    text = str(units[index])
    first = text.index(sentence)
    if needle and task == "text":
        return index, (first, first + len(sentence))
    before, after = text[:first].rstrip(), text[first + len(sentence) :].lstrip()
    if needle:
        units[index : index + 1] = [unit for unit in (before, draw(sentence), after) if unit]
        return index + bool(before), None
    units[index : index + 1] = [" ".join(filter(None, (before, after)))]
    return index, None


def place_image(record: Record[ImageNeedle], units: list[Unit], task: str, needle: bool) -> int:
    """Leave the image that holds the needle, put an option in its place, or take it out.

    Args:
        record: The record.
        units: The haystack, which is changed.
        task: "image", or "identical_image", which puts an option of the question in its place.
        needle: False takes the image out, or takes a wrong option in "identical_image".

    Returns:
        Index of the unit with the needle.

    Raises:
        ValueError: The image is not in the haystack exactly once.
    """
    name = record.values.positive_ctxs[0].image.strip()
    places = [i for i, unit in enumerate(units) if unit in (Path(name), Path("mm-niah", name))]
    if len(places) != 1:
        raise record.error(f"the image {name!r} is {len(places)} times in ctxs; expected once")
    if task == "identical_image":
        options, right = record.values.choices_image, record.values.answer
        units[places[0]] = Path(options[right if needle else (right + 1) % len(options)])
    elif not needle:
        del units[places[0]]
    return places[0]


def question_of(
    record: Record[ImageNeedle], task: str, needle: bool
) -> tuple[tuple[Part, ...], tuple[str, ...], str]:
    """Return question, choices and right answer of a task with image needles.

    Raises:
        ValueError: An image cannot be read.
    """
    options, right = record.values.choices_image, record.values.answer
    if task == "identical_image":
        image = record.image(options[right], "choices_image")
        text = "Does this image appear anywhere in the document? "
        return (text, image), ("yes", "no"), "yes" if needle else "no"
    letters = tuple(chr(ord("A") + index) for index in range(len(options)))
    parts: list[Part] = [record.values.question]
    for letter, option in zip(letters, options, strict=True):
        parts += [f"\n{letter}. ", record.image(option, "choices_image")]
    return (f"{parts[0]}{parts[1]}", *parts[2:]), letters, letters[right]


def join_units(
    record: Record[Any], units: Sequence[Unit]
) -> tuple[tuple[Part, ...], list[tuple[int, int]]]:
    """Return the context, and for each unit its part of the context and first character there.

    Raises:
        ValueError: An image cannot be read.
    """
    parts: list[Part] = []
    starts = []
    text = ""
    for index, unit in enumerate(units):
        text += " " if index else ""
        if isinstance(unit, str):
            starts.append((len(parts), len(text)))
            text += unit
            continue
        parts += [text] if text else []
        starts.append((len(parts), 0))
        parts.append(record.image(str(unit) if isinstance(unit, Path) else unit, "image_list"))
        text = ""
    return (*parts, text + BEFORE_QUESTION), starts
