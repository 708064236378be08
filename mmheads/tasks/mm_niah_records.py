"""The parts of an MM-NIAH record: the units of its haystack, its needle, its question.

See `mm_niah` for the columns of a record.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import ceil
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mmheads.examples import Part
from mmheads.tasks.records import Record

BEFORE_QUESTION = "\n\nQuestion: "
"""The end of the context, before the question."""
_FONT, _WIDTH, _MARGIN = 24, 448, 16

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


def depth_of(record: Record) -> float:
    """Return the depth of the needle, rounded up to one digit as in MMLongBench (0.1999 is 0.2).

    Raises:
        ValueError: The depth is not between 0 and 1.
    """
    depth = float(record.values["depth"])
    if not 0 <= depth <= 1:
        raise record.error(f"depth is {depth}; expected 0 to 1")
    return ceil(10 * depth - 1e-6) / 10 + 0.0


def number_of(record: Record) -> int:
    """Return the number at the end of the record's id, which all depths of a pair share.

    Raises:
        ValueError: The id does not end with a number.
    """
    number = re.search(r"(?<!\d)\d{1,9}$", record.values["id"])
    if not number:
        raise record.error(f"id is {record.values['id']!r}; expected one such as 'mm-niah-23'")
    return int(number.group())


def one_answer(record: Record) -> str:
    """Return the only answer to a question about a text needle.

    Raises:
        ValueError: There are several answers, or none.
    """
    given = record.values["answer"]
    answers = given if isinstance(given, list) else [given]
    if len(answers) != 1 or not isinstance(answers[0], str) or not answers[0].strip():
        raise record.error(f"answer is {given!r:.200}; expected one text")
    return answers[0]


def units_of(record: Record) -> list[Unit]:
    """Return the units of the haystack in their order.

    Raises:
        ValueError: A unit is neither a text nor an image, or there are more or fewer images in the
            haystack than paths.
    """
    paths = [Path(path) for path in record.values["image_list"]]
    images = iter(paths)
    units: list[Unit] = []
    for unit in record.values["ctxs"]:
        match unit:
            case {"type": "image"}:
                units.append(next(images, Path()))
            case {"type": "text", "text": str(text)}:
                units.append(text)
            case _:
                raise record.error(f"a unit of ctxs is {unit!r:.200}; expected a text or an image")
    places = sum(isinstance(unit, Path) for unit in units)
    if places != len(paths):
        raise record.error(f"ctxs has {places} images, but image_list {len(paths)}")
    return units


def _needle(record: Record, name: str) -> str:
    given = record.values["positive_ctxs"]
    value = given[0].get(name) if len(given) == 1 and isinstance(given[0], dict) else None
    if not isinstance(value, str) or not value.strip():
        raise record.error(f"positive_ctxs is {given!r:.200}; expected one unit with {name!r}")
    return value.strip()


def place_sentence(
    record: Record, units: list[Unit], task: str, needle: bool
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
    sentence = _needle(record, "text")
    counts = [unit.count(sentence) if isinstance(unit, str) else 0 for unit in units]
    if sum(counts) != 1:
        raise record.error(f"the needle {sentence!r} is {sum(counts)} times in ctxs; expected once")
    at = counts.index(1)
    text = str(units[at])
    first = text.index(sentence)
    if needle and task == "text":
        return at, (first, first + len(sentence))
    before, after = text[:first].rstrip(), text[first + len(sentence) :].lstrip()
    if needle:
        units[at : at + 1] = [*filter(None, (before,)), draw(sentence), *filter(None, (after,))]
        return at + bool(before), None
    units[at : at + 1] = [" ".join(filter(None, (before, after)))]
    return at, None


def place_image(record: Record, units: list[Unit], task: str, needle: bool) -> int:
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
    name = _needle(record, "image")
    found = [i for i, unit in enumerate(units) if unit in (Path(name), Path("mm-niah", name))]
    if len(found) != 1:
        raise record.error(f"the image {name!r} is {len(found)} times in ctxs; expected once")
    if task == "identical_image":
        options, right = _options(record)
        units[found[0]] = Path(options[right if needle else (right + 1) % len(options)])
    elif not needle:
        del units[found[0]]
    return found[0]


def _options(record: Record) -> tuple[list[str], int]:
    options, right = record.values["choices_image"], record.values["answer"]
    if len(options) < 2 or len({*options}) < len(options) or not 0 <= right < len(options):
        raise record.error(
            f"answer is {right} of the choices_image {options}; expected the index of one, from 0, "
            "of at least two that differ"
        )
    return options, right


def question_of(
    record: Record, task: str, needle: bool
) -> tuple[tuple[Part, ...], tuple[str, ...], str]:
    """Return question, choices and right answer of a task with image needles.

    Raises:
        ValueError: The options are not at least two different images, the answer is not the index
            of one of them, or an image cannot be read.
    """
    options, right = _options(record)
    if task == "identical_image":
        image = record.image(options[right], "choices_image")
        text = "Does this image appear anywhere in the document? "
        return (text, image), ("yes", "no"), "yes" if needle else "no"
    letters = tuple(chr(ord("A") + index) for index in range(len(options)))
    parts: list[Part] = [record.text("question")]
    for letter, option in zip(letters, options, strict=True):
        parts += [f"\n{letter}. ", record.image(option, "choices_image")]
    return (f"{parts[0]}{parts[1]}", *parts[2:]), letters, letters[right]


def join_units(
    record: Record, units: Sequence[Unit]
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
