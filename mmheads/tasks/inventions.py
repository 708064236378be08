"""Facts about things that do not exist: a sentence, a question, and the answer.

No thing, person, number or date is used in two splits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from mmheads.tasks.grids import SPLITS

KINDS: Mapping[str, Sequence[str]] = {
    "number": (
        *("storage limit", "inventory number", "registration number", "membership number"),
        *("licence number", "yearly output"),
    ),
    "code": ("access code", "call sign", "door code", "catalogue code", "locker code", "tax code"),
    "name": (
        *("head gardener", "first director", "night guard", "chief engineer", "treasurer"),
        "music teacher",
    ),
    "date": (
        *("opening date", "founding date", "inspection date", "closing date"),
        *("renovation date", "relocation date"),
    ),
}
"""Kinds of values, and what a thing can have of each kind."""

SENTENCES = (
    "The {what} of the {thing} is {value}.",
    "At the {thing}, the {what} is {value}.",
    "For the {thing}, the {what} is {value}.",
    "As recorded this year, the {what} of the {thing} is {value}.",
    "{value} is the {what} of the {thing}.",
)
QUESTIONS = (
    "What is the {what} of the {thing}?",
    "According to the text, what is the {what} of the {thing}?",
    "Can you tell me the {what} of the {thing}?",
)
QUESTIONS_FOR_NAMES = (
    "Who is the {what} of the {thing}?",
    "According to the text, who is the {what} of the {thing}?",
    "What is the name of the {what} of the {thing}?",
)

_FIRST = (
    *("maple", "amber", "copper", "willow", "silver", "cedar", "granite", "juniper", "marble"),
    *("heron", "falcon", "otter", "badger", "sparrow", "salmon", "lantern", "anchor", "mirror"),
    *("saffron", "clover", "thistle", "bramble", "poppy", "fern", "harbour", "orchard", "meadow"),
    *("winter", "summer", "autumn", "crystal", "velvet", "ivory", "scarlet", "indigo", "golden"),
    *("walnut", "hazel", "elder", "rowan", "linden", "aspen", "raven", "swallow", "kestrel"),
    *("pebble", "flint", "chalk"),
)
_SECOND = (
    *("hill", "creek", "valley", "bridge", "ridge", "lake", "field", "grove", "point", "forest"),
    *("island", "gate", "shore", "spring", "canyon", "square"),
)
_PLACES = (
    *("school", "library", "mill", "museum", "clinic", "theatre", "bakery", "observatory"),
    *("workshop", "market", "station", "archive"),
)
_GIVEN = (
    *("Ada", "Bruno", "Clara", "Dario", "Elena", "Felix", "Greta", "Hugo", "Ines", "Jonas"),
    *("Karin", "Leon", "Mara", "Nils", "Olga", "Pavel", "Rosa", "Stefan", "Thea", "Ulrik"),
    *("Vera", "Walter", "Xenia", "Yusuf", "Zora", "Amir", "Bianca", "Cyril", "Dora", "Emil"),
)
_FAMILY = (
    *("Abendroth", "Brockwell", "Castellan", "Dunmore", "Eskridge", "Fairholm", "Gundersen"),
    *("Hollowell", "Ivanko", "Jarrow", "Kettering", "Lindqvist", "Marchetti", "Nordvik"),
    *("Ostrander", "Pemberly", "Quillon", "Ravensdale", "Sorrento", "Thackray", "Underhay"),
    *("Vandermeer", "Whitcombe", "Xanthos", "Yarwood", "Zeller", "Ashgrove", "Blackthorn"),
    *("Cranleigh", "Dellacroce"),
)
_MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July", "August", "September"),
    *("October", "November", "December"),
)
_LETTERS = "BCDFGHJKLMNPQRSTVWXZ"

THINGS = len(_FIRST) // len(SPLITS) * len(_SECOND) * len(_PLACES)
"""Number of things, and so of facts, in each split."""


@dataclass(frozen=True)
class Fact:
    """Something to find.

    Attributes:
        thing: What it is about ("maple hill school").
        kind: One of `KINDS`.
        sentence: The only place where the answer is.
        question: Asks for the answer.
        answer: As it is in the sentence.
    """

    thing: str
    kind: str
    sentence: str
    question: str
    answer: str


def fact(number: int, split: str, *, seed: int = 0, answer: str | None = None) -> Fact:
    """A fact; each number below `THINGS` is about a different thing.

    Kinds of values take turns with the numbers.

    Args:
        number: Which fact, from 0 to `THINGS` - 1.
        split: One of `SPLITS`.
        seed: Another seed gives other facts; only facts of one seed differ in their things.
        answer: Take this value in place of the drawn one.
    """
    part = SPLITS.index(split)
    things = [" ".join(words) for words in product(_FIRST[part::3], _SECOND, _PLACES)]
    thing = things[int(np.random.default_rng((seed, part)).permutation(THINGS)[number])]
    rng = np.random.default_rng((seed, part, number))
    kind = list(KINDS)[number % len(KINDS)]
    what = str(rng.choice(KINDS[kind]))
    sentence = str(rng.choice(SENTENCES))
    question = str(rng.choice(QUESTIONS_FOR_NAMES if kind == "name" else QUESTIONS))
    value = _value(kind, part, rng) if answer is None else answer
    return Fact(
        thing=thing,
        kind=kind,
        sentence=sentence.format(what=what, thing=thing, value=value),
        question=question.format(what=what, thing=thing),
        answer=value,
    )


def other_answer(given: Fact, split: str, seed: int = 0) -> str:
    """Another value of the kind of a fact, from the same split."""
    part = SPLITS.index(split)
    rng = np.random.default_rng((seed, part, *given.answer.encode()))
    value = given.answer
    while value == given.answer:
        value = _value(given.kind, part, rng)
    return value


def _value(kind: str, part: int, rng: np.random.Generator) -> str:
    """A value that only this split has."""
    if kind == "name":
        return f"{rng.choice(_GIVEN[part::3])} {rng.choice(_FAMILY[part::3])}"
    if kind == "date":
        year = 1800 + 3 * int(rng.integers(60)) + part
        return f"{rng.integers(1, 29)} {rng.choice(_MONTHS)} {year}"
    if kind == "code":
        letters = "".join(rng.choice(list(_LETTERS), 2))
        return f"{letters}-{1000 + 3 * int(rng.integers(2990)) + part}"
    return str(10_000 + 3 * int(rng.integers(29_990)) + part)
