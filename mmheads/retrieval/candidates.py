"""Checks of what is to be ranked and asked, and the windows into which candidates are divided."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from PIL import Image

from mmheads.pdfs import PageBox

Part = str | Image.Image


Candidate = Part | Sequence[Part] | Callable[[], Part | Sequence[Part]]
"""An image, a text, several of them, or a function that makes one of these when its turn comes."""


@dataclass(frozen=True)
class PagePart:
    """One of the texts and images of which a candidate consists, as a region to rank.

    Attributes:
        page: Number of the candidate.
        part: Index among its texts and images.
    """

    page: int
    part: int


Place = PageBox | PagePart
"""A region of a candidate: a box on its image, or one of its parts."""


FILE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pdf", ".png", ".tif", ".tiff", ".txt", ".webp")
"""A candidate of one line that ends with one of these is taken for the name of a file."""


def check_candidates(candidates: object) -> None:
    """Refuse what is not a sequence of candidates.

    Functions among them are not called, and the elements of a sequence that may make them on
    demand (any but a list or tuple) are not read: these are checked when their turn comes.

    Raises:
        TypeError: `candidates` is not a list or another sequence, or one of them cannot be ranked.
        ValueError: There is no candidate, or one is the name of a file.
    """
    if not _is_list(candidates):
        raise TypeError(
            f"candidates are {_shown(candidates)}; expected a list of images, texts, lists of "
            "them, or functions that make them"
        )
    if not len(candidates):
        raise ValueError("there is no candidate to rank; expected at least one page or text")
    for number, candidate in enumerate(candidates if isinstance(candidates, (list, tuple)) else ()):
        if not callable(candidate):
            candidate_parts(candidate, number)


def candidate_parts(candidate: Candidate, number: int) -> tuple[Part, ...]:
    """The texts and images of a candidate, which is made first if it is a function.

    Args:
        candidate: What is to be ranked.
        number: Its number among the candidates, for error messages.

    Raises:
        TypeError: It holds something else than texts and images.
        ValueError: It is the name of a file.
    """
    parts = _as_tuple(candidate() if callable(candidate) else candidate)
    for part in parts:
        if isinstance(part, Path) or (isinstance(part, str) and _is_file_name(part)):
            raise ValueError(
                f"candidate {number} is {str(part)!r}, the name of a file; open it first (an image "
                "with PIL.Image.open, a text with read_text)"
            )
    return _checked(parts, f"candidate {number}")


def question_parts(question: str | Sequence[Part]) -> tuple[Part, ...]:
    """The texts and images of a question.

    Raises:
        TypeError: It holds something else than texts and images.
    """
    return _checked(_as_tuple(question), "the question")


def check_regions(regions: object) -> None:
    """Refuse what is not a sequence of at least one `PageBox` or `PagePart`.

    Raises:
        TypeError: It is something else.
        ValueError: There is no region.
    """
    if not _is_list(regions):
        raise TypeError(f"regions are {_shown(regions)}; expected a list of PageBox or PagePart")
    if not len(regions):
        raise ValueError("there is no region to rank; give at least one, or None for candidates")
    for region in regions:
        if not isinstance(region, Place):
            raise TypeError(f"a region is {_shown(region)}; expected a PageBox or PagePart")


def spread(count: int, window: int, overlap: int) -> list[range]:
    """Windows of one size, as equal as whole numbers allow, that cover all candidates.

    Args:
        count: Number of candidates, at least 1.
        window: Largest number of candidates per window.
        overlap: Least number of candidates that two neighbouring windows share.

    Raises:
        ValueError: The window is below 1, or the overlap is not smaller than it.
    """
    are_integers = all(isinstance(value, (int, np.integer)) for value in (window, overlap))
    if not are_integers or window < 1 or not 0 <= overlap < window:
        raise ValueError(
            f"windows of {window!r} candidates that overlap by {overlap!r}: expected whole "
            "numbers, a window of at least 1, and an overlap from 0 to less than the window"
        )
    windows = 1 if count <= window else ceil((count - overlap) / (window - overlap))
    size = ceil((count + (windows - 1) * overlap) / windows)
    starts = np.linspace(0, count - size, windows).round().astype(int)
    return [range(start, start + size) for start in starts.tolist()]


def _is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _as_tuple(given: object) -> tuple[Any, ...]:
    return tuple(given) if _is_list(given) else (given,)


def _checked(parts: tuple[Any, ...], name: str) -> tuple[Part, ...]:
    for part in parts:
        if not isinstance(part, (str, Image.Image)):
            raise TypeError(f"{name} holds {_shown(part)}; expected texts and images")
    return parts


def _is_file_name(text: str) -> bool:
    return "\n" not in text and text.strip().lower().endswith(FILE_SUFFIXES)


def _shown(value: object) -> str:
    """A value as error messages show it, with its type and at most 60 characters."""
    return f"{repr(value)[:60]} (type {type(value).__name__})"
