"""The four needle tasks of paper A in miniature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmheads.tasks.line_pages import LINES, VALUES, Record

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


@dataclass(frozen=True)
class Unit:
    """A part of a haystack: six sentences of text, or a page of four lines."""

    is_page: bool
    records: tuple[Record, ...]

    def replace(self, index: int, record: Record) -> Unit:
        """The unit with another record at `index`."""
        return Unit(self.is_page, (*self.records[:index], record, *self.records[index + 1 :]))


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
    for is_page in pages:
        count = LINES if is_page else SENTENCES
        on_code = np.ones(count, bool)
        if is_page or icon_sentences:
            on_code = rng.random(count) >= (0.5 if is_page else icon_sentences)
        keys = np.where(on_code, rng.choice(codes, count), rng.choice(icons, count))
        values = rng.choice(VALUES, count)
        if prose and not is_page:
            is_prose = rng.random(count) < prose
            keys = np.where(is_prose, rng.choice(NOUNS, count), keys)
            values = np.where(is_prose, rng.choice(VERBS, count), values)
        records = (Record(str(k), str(v)) for k, v in zip(keys, values, strict=True))
        units.append(Unit(bool(is_page), tuple(records)))
    return units
