"""Pieces of work that any process can do, and what runs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Unit(Protocol):
    """A piece of work that any process can do."""

    @property
    def name(self) -> str:
        """Its name on the screen."""

    @property
    def gpus(self) -> int:
        """GPUs that it takes, where there are any."""

    def run(self) -> str:
        """Do it; returns the error in one line, or nothing."""


class Runner(Protocol):
    """Runs units, in any order and several at a time."""

    def __call__(self, units: Sequence[Unit], progress: str = "") -> list[str]:
        """Returns the error of each unit in the order given, empty where it succeeded.

        Args:
            units: The units.
            progress: Title of a progress bar; empty shows none.
        """


def first_line(error: BaseException) -> str:
    """Returns an error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
