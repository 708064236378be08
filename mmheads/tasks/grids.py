"""Grids of needle examples: every task, length, depth and haystack."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, ClassVar

from mmheads.checks import expect
from mmheads.examples import Example

TASKS = ("text", "image", "rendered_text", "identical_image")
DEPTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
SPLITS = ("detection", "heldout", "test")
HAYSTACKS = 20
"""Haystacks per condition, by default."""


class Grid:
    """What makes needle examples one by one (`make`) and in grids (`generate`).

    Attributes:
        one_depth_each: Whether a series of prompts (`data_root.prompts`) asks for every haystack at
            one depth only, instead of at all depths one after the other.
    """

    one_depth_each: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """Name of the haystacks in the results store and in the names of files."""
        raise NotImplementedError

    @property
    def about(self) -> dict[str, Any]:
        """What the results store notes about the haystacks."""
        return {"needles": self.name}

    @property
    def tasks(self) -> tuple[str, ...]:
        """The needle tasks."""
        return TASKS

    @property
    def lengths(self) -> Sequence[int]:
        """Lengths of the prompts in tokens."""
        raise NotImplementedError

    @property
    def depths(self) -> Sequence[float]:
        """Depths of the needle, from 0 (start of the context) to 1 (its end)."""
        return DEPTHS

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
        """Make one example; see the classes that do."""
        raise NotImplementedError

    def generate(
        self,
        tasks: Sequence[str] = (),
        lengths: Sequence[int] = (),
        depths: Sequence[float] = (),
        haystacks: int = HAYSTACKS,
        *,
        split: str = "detection",
        needle: bool = True,
        both_answers: bool = False,
    ) -> Iterator[Example]:
        """Make every example of a grid, haystacks innermost.

        Args:
            tasks: Needle tasks; by default all of `tasks`.
            lengths: Lengths of the prompts in tokens; by default all of `lengths`.
            depths: Depths of the needle; by default all of `depths`.
            haystacks: How many haystacks per condition.
            split: One of `SPLITS`.
            needle: See `make`.
            both_answers: After each example of identical_image, whose answer is "yes", give the
                same without the needle, whose answer is "no" and which has no evidence. So the
                answer is crossed with depth, length and haystack: none of them predicts it.

        Raises:
            ValueError: As `make` does.
        """
        tasks, lengths = tasks or self.tasks, lengths or self.lengths
        grid = product(tasks, lengths, depths or self.depths, range(haystacks))
        for task, length, depth, haystack in grid:
            both = both_answers and task == "identical_image"
            for present in (True, False) if both else (needle,):
                yield self.make(task, length, depth, haystack=haystack, split=split, needle=present)


def check_answer(
    answer: str | None, allowed: Sequence[str] | None, task: str, *, needle: bool
) -> None:
    """Raise ValueError if an example cannot have an answer that was asked for.

    Args:
        answer: The answer that was asked for; None for the one that the seed decides.
        allowed: All answers that can be asked for; None where any text can.
        task: The task.
        needle: Whether the example has a needle.
    """
    if allowed is None:
        expect(answer is None or answer.strip(), "answer", answer, "a text")
    elif answer is not None:
        known = f"one of {tuple(allowed)}" if allowed else "None, as it cannot be changed here"
        expect(answer in allowed, "answer", answer, known)
    fits = answer is None or needle or (task, answer) == ("identical_image", "no")
    expect(fits, "answer", answer, "None where the needle cannot change it")
