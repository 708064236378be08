"""The four needle tasks of paper A in miniature, a control without evidence, and small documents.

A haystack interleaves text units (six sentences, some of them records such as "B7 K .", most of
them prose such as "rain falls .") and pages (four blocks, each an icon or a code beside a value).
One sentence or block is the needle: its key occurs nowhere else.
Paper A (arXiv 2605.27243) scores heads on MM-NIAH at five lengths and six depths, with 20 haystacks
per condition.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
from PIL import Image

from mmheads.checks import expect, expect_one_of
from mmheads.examples import Example, Part, Region
from mmheads.tasks import line_pages
from mmheads.tasks.generated_needles import KINDS, SEED, GeneratedNeedles, key_of, tokens
from mmheads.tasks.grids import SPLITS
from mmheads.tasks.line_pages import (
    CODES,
    ICONS,
    NOUNS,
    PROSE,
    SENTENCES,
    UNIT_TOKENS,
    VALUES,
    VERBS,
    Record,
)
from mmheads.tasks.pages import BLOCKS, block_box, option, page


class Unit(line_pages.Unit):
    """Six sentences of text, or the four blocks of a page."""

    def part(self, rng: np.random.Generator) -> Part:
        """The unit as a part of an example; `rng` shifts the sprites of a page."""
        return Image.fromarray(page(self.records, rng)) if self.is_page else super().part(rng)

    def region(self, part: int, index: int) -> Region:
        """Where record `index` is, if the unit is part `part` of a context."""
        if self.is_page:
            return Region(part=part, box=block_box(index))
        return super().region(part, index)


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
        records = (Record(str(k), str(v)) for k, v in zip(keys, values, strict=True))
        units.append(Unit(bool(is_page), tuple(records)))
    return units


class Needles(GeneratedNeedles):
    """Makes the needle tasks and the control on pages of blocks: the evidence may be a block."""

    one_depth_each = True
    _fill = staticmethod(fill)
    _option = staticmethod(option)

    @property
    def name(self) -> str:
        """Name of the haystacks in the results store and in the names of files."""
        return "generated"

    @property
    def about(self) -> dict[str, Any]:
        """What the results store notes about the haystacks: their share of pages too."""
        return {**super().about, "image_ratio": self.image_ratio}


GENERATED = Needles()
"""The needles by default: half of the units of their haystacks are pages."""


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
    expect(pages >= 1, "pages", pages, "1 or more")
    expect_one_of("question", question, ("rendered", "icon"))
    expect_one_of("split", split, SPLITS)
    expect(index >= 0, "index", index, "0 or more")
    seed = (SEED, len(KINDS) + (question == "icon"), SPLITS.index(split), pages, index)
    rng = np.random.default_rng(seed)
    key = key_of("image" if question == "icon" else "rendered_text", split, pages, index)
    record = Record(key, str(rng.choice(VALUES)))
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
