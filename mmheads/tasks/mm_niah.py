"""MM-NIAH as MMLongBench publishes it (arXiv 2505.10610): the detection data of paper A.

Paper A (arXiv 2605.27243) uses four tasks at five lengths and six depths, with 20 haystacks per
condition. MMLongBench has two of the tasks, retrieval-text and retrieval-image.
The other two are built from their records as paper A's code builds them, except as
`PublishedNeedles.make` says.

The folder is that of the hub's unpacked archives (`ZhaoweiWang/MMLongBench`: `0_mmlb_data.tar.gz`,
`2_mm-niah_image.tar.gz`): records in `mmlb_data/NIAH/retrieval-text_test_K128_dep6.jsonl` and the
like, images in `mmlb_image/`. File names and columns are those that the evaluation code of
MMLongBench and paper A's loader read; they were not checked against the hub here:

- `id` ("mm-niah-23"): the same at all six depths; `depth`: 0 to 1.
- `ctxs`: the haystack, units `{"type": "text", "text": ...}` and `{"type": "image"}`;
  `image_list`: paths of its images in their order.
- `positive_ctxs`: the needle: its sentence as `text`, or as `image` the haystack image that it was
  pasted into, a path in `mm-niah/`. No box of the pasted needle is published.
- `question`, `answer`: a text, or the index of the right one of `choices_image`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

from mmheads.checks import expect, expect_one_of
from mmheads.examples import Example, Part, Region
from mmheads.metrics import normalised
from mmheads.tasks import mm_niah_records
from mmheads.tasks.grids import HAYSTACKS, SPLITS, TASKS, Grid, check_answer
from mmheads.tasks.mm_niah_records import ImageNeedle, TextNeedle
from mmheads.tasks.records import Record, check_record, parse_line

DATA, IMAGES = "mmlb_data", "mmlb_image"
LENGTHS = (8192, 16384, 32768, 65536, 131072)
KINDS = {
    "text": "retrieval-text",
    "image": "retrieval-image",
    "rendered_text": "retrieval-text",
    "identical_image": "retrieval-image",
}
"""The published records that a task is made from."""
INSTRUCTIONS = {
    "text": "\nAnswer in a few words.",
    "image": "\nAnswer with the letter of the right option alone.",
    "rendered_text": "\nAnswer in a few words.",
    "identical_image": "\nAnswer with yes or no alone.",
}

_COLUMNS = {"retrieval-text": TextNeedle, "retrieval-image": ImageNeedle}


@dataclass(frozen=True, eq=False)
class _File:
    """The records of one kind and length; a record is read when it is asked for."""

    path: Path
    kind: str
    images: Path

    def parse(self, line: bytes, where: str) -> Record[Any]:
        where = f"{self.path}, {where}"
        try:
            values = parse_line(line)
        except ValueError as error:
            raise ValueError(f"{where}: {error}; expected a JSON object") from error
        return check_record(_COLUMNS[self.kind], values, where, self.images)

    def first(self) -> Record[Any]:
        with self.path.open("rb") as lines:
            return self.parse(lines.readline(), "row 0")

    @cached_property
    def places(self) -> dict[float, dict[int, int]]:
        """Byte at which each record begins, by depth and number of the haystack in ascending order.

        A file has up to 1.5 GB, so it is read once to find the records, and never kept.
        """
        places: dict[float, dict[int, int]] = {}
        with self.path.open("rb") as lines:
            start = 0
            for row, line in enumerate(lines):
                if line.strip():
                    record = self.parse(line, f"row {row}")
                    starts = places.setdefault(record.values.tenth, {})
                    if starts.setdefault(record.values.number, start) != start:
                        raise record.error(f"{record.values.id} has two records of one depth")
                start += len(line)
        return {depth: dict(sorted(starts.items())) for depth, starts in sorted(places.items())}

    def read(self, depth: float, number: int) -> Record[Any]:
        with self.path.open("rb") as lines:
            lines.seek(self.places[depth][number])
            return self.parse(lines.readline(), f"haystack {number} at depth {depth:g}")


@dataclass(frozen=True, eq=False)
class PublishedNeedles(Grid):
    """Makes the needle tasks from published haystacks.

    The haystacks of a kind and length are ordered by the number in their `id`, as in paper A's
    code, and split at every depth alike: detection has the first 20 (paper A's own), heldout the
    next 20, test all others.

    Attributes:
        folder: The folder that was opened.
        opened: The file of each kind of records ("retrieval-text") and length.
    """

    folder: Path
    opened: Mapping[tuple[str, int], _File]
    name: ClassVar[str] = "published"

    @property
    def lengths(self) -> tuple[int, ...]:
        """Nominal lengths in tokens that have records."""
        return tuple(sorted({length for _, length in self.opened}))

    @cached_property
    def depths(self) -> tuple[float, ...]:
        """Depths of the needle, from a file of the shortest length."""
        shortest = min(self.opened, key=lambda key: key[1])
        return tuple(self.opened[shortest].places)

    def count(self, task: str, length: int, split: str = "detection") -> int:
        """Number of haystacks.

        Raises:
            ValueError: As `make` does.
        """
        return len(self._numbers(self._file(task, length), self.depths[0], split))

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

        - text: the evidence is the needle's sentence, in its part of the context.
        - image: the question shows the options with their letters; the evidence is all of the
          image that the right one was pasted into, as in paper A.
        - rendered_text: the sentence drawn as an image, in its place. (In paper A's code the image
          follows the paragraph, and the drawn images are not published.)
        - identical_image: the image that the question shows is in the haystack in place of the one
          that it was pasted into.

        Units of the haystack are joined by a space, as in paper A's code.

        Args:
            task: One of `tasks`.
            length: One of `lengths`.
            depth: One of `depths`, as near as 0.05.
            haystack: Which question and evidence, from 0.
            split: One of `SPLITS`.
            needle: False takes the sentence (text, rendered_text) or the image that holds the
                needle (image) out of the haystack; in the task identical_image another of the
                options takes its place, and the answer is "no".
            answer: "yes" or "no" for identical_image, where "no" is as `needle=False`; else None.

        Raises:
            ValueError: A setting is unknown; there is no such haystack; the record lacks a column,
                an image cannot be read, or the needle is not in the haystack exactly once.
        """
        file = self._file(task, length)
        near = [each for each in self.depths if abs(each - depth) < 0.05]
        expect(near, "depth", depth, f"one of {self.depths}")
        numbers = self._numbers(file, near[0], split)
        if not 0 <= haystack < len(numbers):
            raise ValueError(
                f"haystack is {haystack}; {file.path.name} has {len(numbers)} haystacks in the "
                f"split {split} at depth {near[0]:g}: expected 0 to {len(numbers) - 1}"
            )
        allowed = ("yes", "no") if task == "identical_image" else ()  # published needles stay
        check_answer(answer, allowed, task, needle=needle)
        record = file.read(near[0], numbers[haystack])
        units = mm_niah_records.units_of(record)
        needle = needle and answer != "no"
        if file.kind == "retrieval-text":
            index, chars = mm_niah_records.place_sentence(record, units, task, needle)
            question: tuple[Part, ...] = (record.values.question,)
            choices: tuple[str, ...] = ()
            right = record.values.answer
        else:
            index, chars = mm_niah_records.place_image(record, units, task, needle), None
            question, choices, right = mm_niah_records.question_of(record, task, needle)
        context, starts = mm_niah_records.join_units(record, units)
        region = None
        if needle:
            part, first = starts[index]
            region = Region(part=part, chars=chars and (first + chars[0], first + chars[1]))
        return Example(
            context=context,
            question=question,
            answer=right,
            choices=choices,
            evidence=(region,) if region else None,
            instruction=INSTRUCTIONS[task],
            task=task,
            length=length,
            depth=near[0],
            haystack=(TASKS.index(task), length, numbers[haystack]),
        )

    def _file(self, task: str, length: int) -> _File:
        expect_one_of("task", task, TASKS)
        if (KINDS[task], length) not in self.opened:
            lengths = [long for kind, long in self.opened if kind == KINDS[task]]
            raise ValueError(
                f"{self.folder} holds no records of {KINDS[task]} at length {length}; it has the "
                f"lengths {sorted(lengths)}"
            )
        return self.opened[KINDS[task], length]

    def _numbers(self, file: _File, depth: float, split: str) -> list[int]:
        expect_one_of("split", split, SPLITS)
        if depth not in file.places:
            raise ValueError(f"{file.path} has no record at depth {depth:g}")
        first = HAYSTACKS * SPLITS.index(split)
        return list(file.places[depth])[first : None if split == SPLITS[-1] else first + HAYSTACKS]


def read_mm_niah(folder: str | Path) -> PublishedNeedles:
    """Open a folder with `mmlb_data` and `mmlb_image`; any of the lengths may be missing.

    Records are looked up when they are first asked for, images opened when an example is made.

    Raises:
        ValueError: The folder holds no such records or no images, or the first record of a file
            lacks a column.
    """
    folder = Path(folder)
    images = image_folder(folder)
    opened = {}
    for kind, length in product(dict.fromkeys(KINDS.values()), LENGTHS):
        path = folder / DATA / "NIAH" / f"{kind}_test_K{length // 1024}_dep6.jsonl"
        if path.is_file():
            opened[kind, length] = _File(path, kind, images)
            opened[kind, length].first()
    if not opened:
        raise ValueError(
            f"{folder / DATA / 'NIAH'} holds no file such as retrieval-text_test_K8_dep6.jsonl; "
            "expected the unpacked 0_mmlb_data.tar.gz of MMLongBench"
        )
    return PublishedNeedles(folder, opened)


def image_folder(folder: Path) -> Path:
    """The folder of MMLongBench's images.

    Raises:
        ValueError: There is none.
    """
    if not (folder / IMAGES).is_dir():
        raise ValueError(
            f"{folder} holds no folder {IMAGES}; expected the unpacked image archives of "
            "MMLongBench beside its records"
        )
    return folder / IMAGES


def needle_answer(answer: str, gold: str) -> float:
    """Return 1 for a right answer and else 0, by MMLongBench's rules.

    If the gold answer is a letter, the option after "answer is" or "Answer:" counts, or else the
    last letter that could be an option; if it is yes or no, the last yes or no counts; any other
    gold answer must be somewhere in the answer, both normalised.
    """
    if re.fullmatch("[A-J]", gold):
        said = re.findall(r"(?i:answer is|answer:)\s*\(?([A-J])\b", answer)[:1]
        return float((said or re.findall(r"\b[A-J]\b", answer)[-1:]) == [gold])
    if gold in ("yes", "no"):
        return float(re.findall(r"\b(?:yes|no)\b", answer.lower())[-1:] == [gold])
    return float(normalised(gold) in normalised(answer))
