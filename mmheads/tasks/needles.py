"""The four needle tasks of paper A in miniature, a control without evidence, and small documents.

A haystack interleaves text units (six sentences, some of them records such as "B7 K .", most of
them prose such as "rain falls .") with pages (two lines, each a record: a code or an icon, a
value, a full stop and a blank). One sentence or line is the needle: its key occurs nowhere else.
Paper A (arXiv 2605.27243) scores heads on MM-NIAH at five lengths and six depths, with 20 haystacks
per condition.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from math import ceil
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmheads.checks import expect, expect_one_of
from mmheads.examples import Example, Part, Region
from mmheads.tasks.grids import SPLITS, TASKS, Grid, check_answer
from mmheads.tasks.line_pages import (
    CODES,
    ICONS,
    LINES,
    SENTENCES,
    UNIT_TOKENS,
    VALUES,
    Pixels,
    Record,
    Unit,
    fill,
    line_box,
    option,
)

CONTROL = "successor"
"""Needs no evidence: "after J" is answered by K, which the model knows."""
LENGTHS = (128, 256, 512, 1024, 2048)
OPTIONS = ("a", "b", "c", "d")
ANSWERS = {
    "text": VALUES,
    "image": OPTIONS,
    "rendered_text": VALUES,
    "identical_image": ("yes", "no"),
    CONTROL: VALUES,
}
"""All answers that the question of a task allows."""
DISTRACTORS = ("random", "similar", "near-identical")
"""How hard it is to tell the other lines and pages of a document from the right one."""

SEED = 2605
KINDS = (*TASKS, CONTROL)
_QUESTION_TOKENS = {"text": 2, "image": 18, "rendered_text": 2, "identical_image": 5, CONTROL: 2}


@dataclass(frozen=True)
class Needles(Grid):
    """Makes the needle tasks and the control.

    Attributes:
        image_ratio: Share of pages among the units of a haystack, as near as whole units allow;
            the needle's own unit is a page or text as its task demands. The control has only text.
    """

    image_ratio: float = 0.5
    name: ClassVar[str] = "generated"
    one_depth_each: ClassVar[bool] = True
    lengths: ClassVar[Sequence[int]] = LENGTHS

    def __post_init__(self) -> None:
        ratio = self.image_ratio
        expect(0 <= ratio <= 1, "image_ratio", ratio, "a number from 0 to 1")

    @property
    def about(self) -> dict[str, Any]:
        """What the results store notes about the haystacks: their share of pages too."""
        return {**super().about, "image_ratio": self.image_ratio}

    def make(
        self,
        task: str,
        length: int,
        depth: float,
        *,
        haystack: int = 0,
        split: str = "detection",
        needle: bool = True,
        answer: str | None = None,
    ) -> Example:
        """Make one example.

        The same `task`, `length`, `haystack` and `split` give the same units and question at every
        depth. Haystacks of a condition differ in their key up to 21 of them, and no key is asked
        for in two splits. The evidence is the needle's whole record: a sentence or a line.

        Args:
            task: One of `TASKS`, or `CONTROL`.
            length: Least number of tokens of the prompt in the tiny Qwen models; at most 17 are
                added, so that it holds whole units.
            depth: Where the needle is, from 0 (first unit) to 1 (last unit).
            haystack: Which question and evidence, from 0.
            split: One of `SPLITS`.
            needle: False leaves another record where the needle would be: the question cannot be
                answered any more, or its answer is "no" in the task identical_image. The control
                never has a needle.
            answer: Make this the right answer, by changing only the needle: its value (text,
                rendered_text), which of the options is on the page (image), or whether it is there
                (identical_image). By default the seed decides, and identical_image has the needle.

        Raises:
            ValueError: A setting is unknown, out of range, or too small for the needle.
        """
        _check(task, length, depth, haystack, split)
        check_answer(answer, ANSWERS[task], task, needle=needle and task != CONTROL)
        shared = _haystack(task, split, length, haystack, self.image_ratio, answer)
        asked, is_page = shared.asked, shared.is_page.copy()
        position = round(depth * (len(is_page) - 1))
        if task == CONTROL:
            is_page[:] = False
        else:
            _make_room(is_page, position, task != "text")
        unit = shared.unit(position, is_page[position])
        slot = shared.slots[len(unit.records)]
        context = [shared.part(place, on_page) for place, on_page in enumerate(is_page.tolist())]
        needle = needle and task != CONTROL and (task, asked.answer) != ("identical_image", "no")
        if needle:
            unit = unit.replace(slot, asked.record)
            context[position] = unit.part(np.random.default_rng((*shared.seed, position)))
            if task == "identical_image":
                _paste_icon(context[position], asked.icons[asked.record.key], slot)
        right = "no" if task == "identical_image" and not needle else asked.answer
        return Example(
            context=tuple(context),
            question=asked.question,
            answer=right,
            choices=ANSWERS[task],
            evidence=(unit.region(position, slot),) if needle else None,
            task=task,
            length=length,
            depth=None if task == CONTROL else float(depth),
            haystack=shared.seed,
        )


GENERATED = Needles()
"""The needles by default: half of the units of their haystacks are pages."""


def document(
    pages: int,
    *,
    question: str = "rendered_text",
    index: int = 0,
    split: str = "detection",
    distractors: str = "random",
) -> Example:
    """Make a document of pages, one of which answers the question.

    The candidates to rank are the pages ("page") and all their lines ("layout"); the evidence is
    one line.

    Args:
        pages: Number of pages.
        question: "rendered_text" asks for the value beside a code, "icon" for the value beside an
            icon, which the question shows.
        index: Which document, from 0.
        split: One of `SPLITS`.
        distractors: One of `DISTRACTORS`. "random" draws all other keys. "similar" draws only keys
            that share something with the right one: codes its letter or its digit, icons its
            colour or its shape. "near-identical" makes all pages alike but for the line where the
            needle is on its own page; there, the others have similar keys.

    Raises:
        ValueError: A setting is unknown or out of range.
    """
    expect(pages >= 1, "pages", pages, "1 or more")
    expect_one_of("question", question, ("rendered_text", "icon"))
    expect_one_of("split", split, SPLITS)
    expect(index >= 0, "index", index, "0 or more")
    expect_one_of("distractors", distractors, DISTRACTORS)
    kind = (question == "icon", DISTRACTORS.index(distractors))
    seed = (SEED, len(KINDS), *map(int, kind), SPLITS.index(split), pages, index)
    rng = np.random.default_rng(seed)
    key = key_of("image" if question == "icon" else "rendered_text", split, pages, index)
    record = Record(key, str(rng.choice(VALUES)))
    page_index, slot = int(rng.integers(pages)), int(rng.integers(LINES))
    units = _pages(pages, record, slot, distractors, rng)
    units[page_index] = units[page_index].replace(slot, record)
    context = tuple(unit.part(rng) for unit in units)
    asked: tuple[Part, ...] = (f"? {key}",)
    if question == "icon":
        asked = ("?", Image.fromarray(option(key, rng)))
    return Example(
        context=context,
        question=asked,
        answer=record.value,
        choices=VALUES,
        evidence=(units[page_index].region(page_index, slot),),
        candidates={
            "page": tuple(Region(part=part) for part in range(pages)),
            "layout": tuple(
                Region(part=part, box=line_box(line))
                for part, line in product(range(pages), range(LINES))
            ),
        },
        task=f"document-{question}",
        length=pages * UNIT_TOKENS,
        depth=page_index / max(1, pages - 1),
        haystack=seed,
    )


def similar_keys(key: str) -> list[str]:
    """Other codes with the letter or the digit of a code, or icons with an icon's colour or shape.

    There are 14 of them.
    """
    keys = ICONS if key in ICONS else CODES
    pieces = {name: name.split("-") if key in ICONS else list(name) for name in keys}
    a, b = pieces[key]
    return [name for name, (c, d) in pieces.items() if (c == a) != (d == b)]


def _pages(
    pages: int, record: Record, slot: int, distractors: str, rng: np.random.Generator
) -> list[Unit]:
    """Pages without the needle."""
    codes = [code for code in CODES if code != record.key]
    icons = [icon for icon in ICONS if icon != record.key]
    if distractors == "random":
        return fill(np.ones(pages, bool), codes, icons, rng)
    near = similar_keys(record.key)
    if distractors == "similar":
        return fill(np.ones(pages, bool), near, near, rng)
    (template,) = fill([True], codes, icons, rng)
    keys, values = rng.choice(near, pages), rng.choice(VALUES, pages)
    records = (Record(str(k), str(v)) for k, v in zip(keys, values, strict=True))
    return [template.replace(slot, other) for other in records]


@dataclass(frozen=True)
class _Asked:
    """A question, its answer, the needle's record, and the icons that the question may show."""

    question: tuple[Part, ...]
    answer: str
    record: Record
    icons: dict[str, Pixels]


@dataclass(frozen=True)
class _Haystack:
    """What examples share that differ only in the depth of their needle, and its absence.

    Attributes:
        seed: What identifies it.
        asked: The question.
        is_page: [unit] bool, which are pages before there is room for the needle.
        texts: The units as texts.
        sheets: The same units as pages.
        slots: The needle's place among the records of its unit, by their number.
        drawn: Parts that were drawn before, by the number of the unit and whether it is a page.
    """

    seed: tuple[int, ...]
    asked: _Asked
    is_page: NDArray[np.bool_]
    texts: list[Unit]
    sheets: list[Unit]
    slots: dict[int, int]
    drawn: dict[tuple[int, bool], Part] = field(default_factory=dict)

    def unit(self, place: int, on_page: bool) -> Unit:
        """A unit without the needle."""
        return self.sheets[place] if on_page else self.texts[place]

    def part(self, place: int, on_page: bool) -> Part:
        """A unit without the needle as a part of an example, which is drawn once."""
        if (place, on_page) not in self.drawn:
            rng = np.random.default_rng((*self.seed, place))
            self.drawn[place, on_page] = self.unit(place, on_page).part(rng)
        return self.drawn[place, on_page]


@lru_cache(maxsize=32)
def _haystack(
    task: str, split: str, length: int, haystack: int, image_ratio: float, answer: str | None
) -> _Haystack:
    """The haystack of a question; those of a condition are kept for its next depth."""
    share = round(1000 * image_ratio)
    seed = (SEED, KINDS.index(task), SPLITS.index(split), length, haystack, share)
    rng = np.random.default_rng(seed)
    asked = _ask(task, key_of(task, split, length, haystack), answer, rng)
    count = ceil((length - 1 - _QUESTION_TOKENS[task]) / UNIT_TOKENS)
    is_page = rng.permutation(np.arange(count) < round(image_ratio * count))
    codes = [code for code in CODES if code != asked.record.key]
    icons = [icon for icon in ICONS if icon not in asked.icons]
    texts = fill(np.zeros(count, bool), codes, icons, rng)
    sheets = fill(np.ones(count, bool), codes, icons, rng)
    slots = {many: int(copy.deepcopy(rng).integers(many)) for many in (LINES, SENTENCES)}
    return _Haystack(seed, asked, is_page, texts, sheets, slots)


def _ask(task: str, key: str, answer: str | None, rng: np.random.Generator) -> _Asked:
    value = str(rng.choice(VALUES))
    others = [icon for icon in ICONS if icon != key]
    shown = [key, *(str(icon) for icon in rng.choice(others, len(OPTIONS) - 1, replace=False))]
    rng.shuffle(shown)
    icons = {icon: option(icon, rng) for icon in shown}
    match task:
        case "text" | "rendered_text":
            value = answer or value
            return _Asked((f"? {key}",), value, Record(key, value), icons)
        case "image":
            right = answer or OPTIONS[shown.index(key)]
            key = shown[OPTIONS.index(right)]
            names = (*OPTIONS[:-1], f"{OPTIONS[-1]} ?")
            pairs = zip(icons.values(), names, strict=True)
            options = [part for icon, word in pairs for part in (Image.fromarray(icon), word)]
            return _Asked(("which", *options), right, Record(key, value), icons)
        case "identical_image":
            question = ("seen", Image.fromarray(icons[key]), "?")
            return _Asked(question, answer or "yes", Record(key, value), icons)
        case _:
            right = VALUES[(VALUES.index(value) + 1) % len(VALUES)]
            return _Asked((f"after {value}",), right, Record(key, value), icons)


def key_of(task: str, split: str, length: int, haystack: int) -> str:
    """The key of a haystack; no two splits share one."""
    keys = ICONS if task in ("image", "identical_image") else CODES
    share = np.random.default_rng(SEED).permutation(keys)[SPLITS.index(split) :: len(SPLITS)]
    order = np.random.default_rng((SEED, KINDS.index(task), length)).permutation(share)
    return str(order[haystack % len(order)])


def _paste_icon(page: Part, icon: Pixels, line: int) -> None:
    """Put this very image into the first cell of a line of a page."""
    assert isinstance(page, Image.Image)
    page.paste(Image.fromarray(icon), line_box(line)[:2])


def _make_room(is_page: np.ndarray, position: int, wants_page: bool) -> None:
    """Make a unit a page or text, in exchange with the nearest unit of the kind it should be."""
    if is_page[position] != wants_page:
        fitting = np.flatnonzero(is_page == wants_page)
        if len(fitting):
            is_page[fitting[np.abs(fitting - position).argmin()]] = not wants_page
        is_page[position] = wants_page


def _check(task: str, length: int, depth: float, haystack: int, split: str) -> None:
    expect_one_of("task", task, KINDS)
    expect_one_of("split", split, SPLITS)
    expect(0 <= depth <= 1, "depth", depth, "a number from 0 to 1")
    least = 1 + UNIT_TOKENS + _QUESTION_TOKENS[task]
    expect(length >= least, "length", length, f"at least {least} tokens for the task {task}")
    expect(haystack >= 0, "haystack", haystack, "0 or more")
