"""The four needle tasks of paper A in miniature, a control without evidence, and small documents.

A haystack interleaves text units (six sentences, some of them records such as "B7 K .", most of
them prose such as "rain falls .") and pages (four blocks, each an icon or a code beside a value).
One sentence or block is the needle: its key stands nowhere else.
Detection data of paper A (arXiv 2605.27243): MM-NIAH, five lengths, six depths, 20 pairs of
question and evidence a condition.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import ceil
from typing import Any

import numpy as np
from PIL import Image

from mmheads.examples import Example, Part, Region
from mmheads.tasks.pages import (
    BLOCKS,
    CELL,
    CODES,
    ICONS,
    VALUES,
    Block,
    Pixels,
    block_box,
    option,
    page,
)

TASKS = ("text", "image", "rendered_text", "identical_image")
CONTROL = "successor"
"""Needs no evidence: "after J" is answered by K, from what the model knows."""
LENGTHS = (128, 256, 512, 1024, 2048)
DEPTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
PAIRS = 20
SPLITS = ("detection", "heldout", "test")
OPTIONS = ("a", "b", "c", "d")
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

_SEED = 2605
_KINDS = (*TASKS, CONTROL)
_QUESTION_TOKENS = {"text": 2, "image": 18, "rendered_text": 2, "identical_image": 5, CONTROL: 2}
_CHOICES = {
    "text": VALUES,
    "image": OPTIONS,
    "rendered_text": VALUES,
    "identical_image": ("yes", "no"),
    CONTROL: VALUES,
}


@dataclass(frozen=True)
class Unit:
    """Six sentences of text, or the four blocks of a page."""

    is_page: bool
    records: tuple[Block, ...]

    def part(self, rng: np.random.Generator) -> Part:
        """The unit as an example's part; `rng` shifts the sprites of a page."""
        if self.is_page:
            return Image.fromarray(page(self.records, rng))
        return " ".join(sentence(record) for record in self.records)

    def replace(self, index: int, record: Block) -> Unit:
        """The unit with another record at `index`."""
        return Unit(self.is_page, (*self.records[:index], record, *self.records[index + 1 :]))

    def region(self, part: int, index: int) -> Region:
        """Where record `index` stands, if the unit is part `part` of a context."""
        if self.is_page:
            return Region(part=part, box=block_box(index))
        first = sum(len(sentence(record)) + 1 for record in self.records[:index])
        return Region(part=part, chars=(first, first + len(sentence(self.records[index]))))


def sentence(record: Block) -> str:
    """A record as text."""
    return f"{record.key} {record.value} ."


def make(
    task: str,
    length: int,
    depth: float,
    *,
    pair: int = 0,
    split: str = "detection",
    image_ratio: float = 0.5,
    needle: bool = True,
    answer: str | None = None,
) -> Example:
    """Make one example.

    The same `task`, `length`, `pair`, `split` and `image_ratio` give the same haystack and
    question at every depth. Pairs of a condition differ in their key up to 21 pairs, and no key
    is asked for in two splits. The evidence is the needle's whole record: a sentence, or a block
    with key and value.

    Args:
        task: One of `TASKS`, or `CONTROL`.
        length: Least number of tokens of the prompt in the tiny models; at most 17 are added, so
            that it holds whole units.
        depth: Where the needle stands, 0 (first unit) to 1 (last unit).
        pair: Which question and evidence, from 0.
        split: One of `SPLITS`.
        image_ratio: Share of pages among the units, as near as whole units allow; the needle's
            own unit is a page or text as its task demands. The control has text alone.
        needle: False puts another record where the needle stood: the question cannot be answered
            any more, or is answered by "no" in the task identical_image. The control has no needle.
        answer: Make this the right answer, by changing the needle alone: its value (text,
            rendered_text), which of the options is on the page (image), or whether it is there
            (identical_image). By default the seed decides; identical_image has the needle.

    Raises:
        ValueError: A setting is unknown, out of range, or too small for the needle.
    """
    least = 1 + UNIT_TOKENS + _QUESTION_TOKENS.get(task, 0)
    _expect(task in _KINDS, "task", task, f"one of {_KINDS}")
    _expect(split in SPLITS, "split", split, f"one of {SPLITS}")
    _expect(0 <= depth <= 1, "depth", depth, "a number from 0 to 1")
    _expect(0 <= image_ratio <= 1, "image_ratio", image_ratio, "a number from 0 to 1")
    _expect(length >= least, "length", length, f"at least {least} tokens for the task {task}")
    _expect(pair >= 0, "pair", pair, "0 or more")
    _expect(answer in (None, *_CHOICES[task]), "answer", answer, f"one of {_CHOICES[task]}")

    fits = answer is None or (
        task != CONTROL and (needle or (task, answer) == ("identical_image", "no"))
    )
    _expect(fits, "answer", answer, "None where the needle cannot change it")

    seed = (_SEED, _KINDS.index(task), SPLITS.index(split), length, pair, round(1000 * image_ratio))
    rng = np.random.default_rng(seed)
    key = _key(task, split, length, pair)
    value = str(rng.choice(VALUES))
    others = [icon for icon in ICONS if icon != key]
    shown = [key, *(str(icon) for icon in rng.choice(others, len(OPTIONS) - 1, replace=False))]
    rng.shuffle(shown)
    icons = {icon: option(icon, rng) for icon in shown}
    count = ceil((length - 1 - _QUESTION_TOKENS[task]) / UNIT_TOKENS)
    pages = rng.permutation(np.arange(count) < round(image_ratio * count))
    at = round(depth * (count - 1))
    if task == CONTROL:
        pages[:], needle = False, False
    else:
        _make_room(pages, at, task != "text")
    free = [code for code in CODES if code != key], [icon for icon in ICONS if icon not in shown]
    texts = fill(np.zeros(count, bool), *free, rng)
    sheets = fill(np.ones(count, bool), *free, rng)
    units = [
        sheet if is_page else text
        for is_page, sheet, text in zip(pages, sheets, texts, strict=True)
    ]
    slot = int(rng.integers(SENTENCES if task == "text" else BLOCKS))

    question: tuple[Part, ...]
    match task:
        case "text" | "rendered_text":
            right = value = answer or value
            question = (f"? {key}",)
        case "image":
            right = answer or OPTIONS[shown.index(key)]
            key = shown[OPTIONS.index(right)]
            pairs = zip(icons.values(), (*OPTIONS[:-1], f"{OPTIONS[-1]} ?"), strict=True)
            question = (
                "which",
                *(p for icon, word in pairs for p in (Image.fromarray(icon), word)),
            )
        case "identical_image":
            needle = needle and answer != "no"
            right = "yes" if needle else "no"
            question = ("seen", Image.fromarray(icons[key]), "?")
        case _:
            right = VALUES[(VALUES.index(value) + 1) % len(VALUES)]
            question = (f"after {value}",)
    if needle:
        units[at] = units[at].replace(slot, Block(key, value))

    drawn = [unit.part(np.random.default_rng((*seed, i))) for i, unit in enumerate(units)]
    evidence = units[at].region(at, slot)
    if needle and evidence.box and task == "identical_image":
        drawn[at] = _pasted(drawn[at], icons[key], evidence.box)
    context = tuple(drawn)
    return Example(
        context=context,
        question=question,
        answer=right,
        choices=_CHOICES[task],
        evidence=(evidence,) if needle else None,
        candidates={},
        task=task,
        length=length,
        depth=None if task == CONTROL else float(depth),
        haystack=seed,
        tokens=tokens(context, (evidence,)) if needle else (),
    )


def generate(
    tasks: Sequence[str] = TASKS,
    lengths: Sequence[int] = LENGTHS,
    depths: Sequence[float] = DEPTHS,
    pairs: int = PAIRS,
    **settings: Any,
) -> Iterator[Example]:
    """Make every example of a grid, pairs innermost; `settings` go to `make`."""
    for task, length, depth, pair in product(tasks, lengths, depths, range(pairs)):
        yield make(task, length, depth, pair=pair, **settings)


def document(
    pages: int, *, question: str = "rendered", index: int = 0, split: str = "detection"
) -> Example:
    """Make a document of pages, one of which answers the question.

    Candidates to rank are the pages ("page") and all their blocks ("layout"); the evidence is
    one block.

    Args:
        pages: Number of pages.
        question: "rendered" asks for the value beside a code, "icon" for that beside an icon,
            which the question shows.
        index: Which document, from 0.
        split: One of `SPLITS`.

    Raises:
        ValueError: A setting is unknown or out of range.
    """
    _expect(pages >= 1, "pages", pages, "1 or more")
    _expect(question in ("rendered", "icon"), "question", question, "rendered or icon")
    _expect(split in SPLITS, "split", split, f"one of {SPLITS}")
    _expect(index >= 0, "index", index, "0 or more")
    seed = (_SEED, len(_KINDS) + (question == "icon"), SPLITS.index(split), pages, index)
    rng = np.random.default_rng(seed)
    key = _key("image" if question == "icon" else "rendered_text", split, pages, index)
    record = Block(key, str(rng.choice(VALUES)))
    units = fill(
        np.ones(pages, bool),
        [code for code in CODES if code != record.key],
        [icon for icon in ICONS if icon != record.key],
        rng,
    )
    at, slot = int(rng.integers(pages)), int(rng.integers(BLOCKS))
    units[at] = units[at].replace(slot, record)
    context = tuple(unit.part(rng) for unit in units)
    evidence = units[at].region(at, slot)
    asked: tuple[Part, ...] = (f"? {record.key}",)
    if question == "icon":
        asked = ("?", Image.fromarray(option(record.key, rng)))
    return Example(
        context=context,
        question=asked,
        answer=record.value,
        choices=VALUES,
        evidence=(evidence,),
        candidates={
            "page": tuple(Region(part=part) for part in range(pages)),
            "layout": tuple(
                Region(part=part, box=block_box(block))
                for part, block in product(range(pages), range(BLOCKS))
            ),
        },
        task=f"document-{question}",
        length=pages * UNIT_TOKENS,
        depth=at / max(1, pages - 1),
        haystack=seed,
        tokens=tokens(context, (evidence,)),
    )


def fill(
    pages: Sequence[bool] | np.ndarray,
    codes: Sequence[str],
    icons: Sequence[str],
    rng: np.random.Generator,
    prose: float = PROSE,
) -> list[Unit]:
    """Fill a haystack of pages (True) and text units with records of these keys, and prose."""
    units = []
    for is_page in pages:
        count = BLOCKS if is_page else SENTENCES
        on_code = rng.random(count) < 0.5 if is_page else np.ones(count, bool)
        keys = np.where(on_code, rng.choice(codes, count), rng.choice(icons, count))
        values = rng.choice(VALUES, count)
        if prose and not is_page:
            told = rng.random(count) < prose
            keys = np.where(told, rng.choice(NOUNS, count), keys)
            values = np.where(told, rng.choice(VERBS, count), values)
        records = (Block(str(k), str(v)) for k, v in zip(keys, values, strict=True))
        units.append(Unit(bool(is_page), tuple(records)))
    return units


def count_tokens(parts: Sequence[Part]) -> int:
    """Number of tokens of these parts in the prompt of the tiny models."""
    return sum(
        len(part.split())
        if isinstance(part, str)
        else (_image(part).width // CELL) * (_image(part).height // CELL) + 2
        for part in parts
    )


def tokens(context: Sequence[Part], regions: Sequence[Region]) -> tuple[tuple[int, int], ...]:
    """Token intervals of regions in the prompt of the tiny models.

    There the prompt starts with one token, a word is one, an image has one a cell of 16 x 16 px
    between two wrappers. This is how the task itself counts; `evidence.encode` finds the same
    in any model's prompt.
    """
    starts = [1]
    for part in context:
        starts.append(starts[-1] + count_tokens([part]))
    intervals = []
    for region in regions:
        part, start = context[region.part], starts[region.part]
        if isinstance(part, str):
            first, last = region.chars or (0, len(part))
            before = len(part[:first].split())
            intervals.append((start + before, start + before + len(part[first:last].split())))
        else:
            image = _image(part)
            columns = image.width // CELL
            box = (int(edge) // CELL for edge in region.box or (0, 0, *image.size))
            left, top, right, bottom = box
            first = start + 1 + columns * top
            intervals += [
                (first + columns * row + left, first + columns * row + right)
                for row in range(bottom - top)
            ]
    return tuple(intervals)


def _key(task: str, split: str, length: int, pair: int) -> str:
    """The pair's key; no two splits share one."""
    keys = ICONS if task in ("image", "identical_image") else CODES
    share = np.random.default_rng(_SEED).permutation(keys)[SPLITS.index(split) :: len(SPLITS)]
    order = np.random.default_rng((_SEED, _KINDS.index(task), length)).permutation(share)
    return str(order[pair % len(order)])


def _pasted(page: Part, icon: Pixels, box: tuple[float, float, float, float]) -> Image.Image:
    """The page with this very image in the upper left cell of a block."""
    image = _image(page)
    image.paste(Image.fromarray(icon), (int(box[0]), int(box[1])))
    return image


def _image(part: Part) -> Image.Image:
    if not isinstance(part, Image.Image):
        raise TypeError(f"needle tasks hold text and images, here is a {type(part).__name__}")
    return part


def _make_room(pages: np.ndarray, at: int, is_page: bool) -> None:
    """Let unit `at` be a page or not, in exchange with the nearest unit that is as wanted."""
    if pages[at] != is_page:
        wanted = np.flatnonzero(pages == is_page)
        if len(wanted):
            pages[wanted[np.abs(wanted - at).argmin()]] = not is_page
        pages[at] = is_page


def _expect(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value!r}; expected {expected}")
