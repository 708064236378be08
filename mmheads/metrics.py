"""The score of an answer in [0, 1]: the rules of MMLongBench (arXiv 2505.10610) for documents."""

from __future__ import annotations

import json
import math
import re
import string
from collections import Counter
from collections.abc import Callable

from mmheads.checks import expect_one_of

Metric = Callable[[str, str], float]
"""(answer, gold) -> a number in [0, 1]."""

KINDS = ("Integer", "Float", "String", "List", "None")
"""Kinds of gold answers in MMLongBench's document questions."""
TOLERANCE = 0.01
_UNITS = (
    *("kg", "meters", "acres", "minutes", "miles", "mile", "feet"),
    *("million", "thousand", "billion", "mm", "m"),
)
_NUMBER = re.compile(r"-?\d+(?:\.\d*)?|-?\.\d+")
_EXACT = re.compile(
    r"""https://                                    # an address
    | \.(?:py|ipynb)$                               # a file
    | ^page
    | ^\d+(?:[-\s]\d+)?$                            # a telephone number
    | a\.m\. | p\.m\.                               # a time
    | ^\d{4}[-/\s]\d{1,2}(?:[-/\s]\d{1,2})?$        # a month or day, year first
    | ^\d{1,2}[-/\s]\d{1,2}[-/\s]\d{2,4}$           # a day, year last
    | ^[\w.%+-]+@[a-zA-Z0-9.-]+\.[a-zA-Z]{2,}$      # a mail address
    """,
    re.VERBOSE | re.ASCII,
)


def same(answer: str, gold: str) -> float:
    """Return 1 if the answer is the gold answer, apart from white space at the ends, else 0."""
    return float(answer.strip() == gold.strip())


def normalised(text: str) -> str:
    """Return a text in lower case without punctuation, articles and extra spaces (as SQuAD)."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def token_f1(answer: str, gold: str) -> float:
    """Return the F1 score of the words of the normalised answers (SlideVQA)."""
    given, expected = normalised(answer).split(), normalised(gold).split()
    shared = (Counter(given) & Counter(expected)).total()
    return 2 * shared / (len(given) + len(expected)) if shared else 0.0


def document_answer(answer: str, gold: str, kind: str = "String") -> float:
    """Return MMLongBench's rule-based score of the answer to a document question.

    The rule depends on the kind of the gold answer:

    - Integer: 1 if any number in the answer equals it.
    - Float: 1 if any number in the answer is within 1% of it, of a hundredth of it, or of a
      hundred times it.
    - String and None: token F1; but web addresses, files, pages, telephone numbers, times, dates
      and mail addresses must be in the answer as they are.
    - List, as JSON: the mean score of the items; the strings that are scored by F1 count together
      as one item.

    As in MMLongBench, commas are dropped before numbers are read, and a hyphen before a digit is a
    minus sign.

    Args:
        answer: What the model answered.
        gold: The right answer.
        kind: One of `KINDS`.

    Raises:
        ValueError: An unknown kind, or a gold answer that is not of its kind.
    """
    expect_one_of("kind", kind, KINDS)
    if kind == "List":
        items = _items(gold)
        return sum(document_answer(answer, item, of) for item, of in items) / len(items)
    if kind in ("String", "None"):
        return float(gold in answer) if _EXACT.search(gold) else token_f1(answer, gold)
    expected = _number(gold)
    if expected is None or (kind == "Integer" and expected != int(expected)):
        raise ValueError(f"the gold answer {gold!r} is not of the kind {kind}")
    numbers = [float(number) for number in _NUMBER.findall(_bare(answer))]
    if kind == "Integer":
        return float(expected in numbers)
    close = (expected / 100, expected, expected * 100)
    return float(any(math.isclose(w, n, rel_tol=TOLERANCE) for w in close for n in numbers))


def _items(gold: str) -> list[tuple[str, str]]:
    """The items of a list with their kinds, strings scored by F1 joined."""
    try:
        values = json.loads(gold)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, list) or not values:
        raise ValueError(
            f'the gold answer {gold!r} is not a list; expected JSON such as [1, "two"]'
        )
    words, rest = [], []
    for value in values:
        kind = _kind(value)
        if kind == "String" and not _EXACT.search(value):
            words.append(value)
        else:
            rest.append((str(value), kind))
    return [(" ".join(words), "String"), *rest] if words else rest


def _kind(value: object) -> str:
    if not isinstance(value, str):
        return "Integer" if isinstance(value, int) else "Float"
    number = _number(value)
    if number is None:
        return "String"
    return "Integer" if number == int(number) and "%" not in value else "Float"


def _number(text: str) -> float | None:
    try:
        number = float(_bare(text))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _bare(text: str) -> str:
    """Lower case, without commas, a unit at the end, quotes, currency and percent signs."""
    text = text.lower().strip().replace(",", "")
    for unit in _UNITS:
        text = text.removesuffix(unit).strip()
    text = re.sub(r"^['\"]|['\"]$", "", text).strip()
    for sign in "$£%":
        text = text.strip(sign).strip()
    return text
