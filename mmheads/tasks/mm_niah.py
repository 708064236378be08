"""MM-NIAH as MMLongBench publishes it (arXiv 2505.10610): the detection data of paper A.

Paper A (arXiv 2605.27243): five lengths, six depths, 20 pairs of question and evidence a condition,
four tasks. MMLongBench has two of them, retrieval-text and retrieval-image; the other two are built
from their records, as paper A's code builds them unless said otherwise at `Needles.make`.

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

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import ceil
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from mmheads.examples import Example, Part, Region
from mmheads.metrics import normalised
from mmheads.tasks.needles import PAIRS, SPLITS, TASKS
from mmheads.tasks.sources import Record

DATA, IMAGES = "mmlb_data", "mmlb_image"
LENGTHS = (8192, 16384, 32768, 65536, 131072)
KINDS = {
    "text": "retrieval-text",
    "image": "retrieval-image",
    "rendered": "retrieval-text",
    "identical": "retrieval-image",
}
"""The published records that a task is made from."""
BEFORE_QUESTION = "\n\nQuestion: "
"""Ends the context."""
INSTRUCTIONS = {
    "text": "\nAnswer in a few words.",
    "image": "\nAnswer with the letter of the right option alone.",
    "rendered": "\nAnswer in a few words.",
    "identical": "\nAnswer with yes or no alone.",
}

_COLUMNS: dict[str, type | tuple[type, ...]] = {
    "id": str,
    "depth": (int, float),
    "ctxs": list,
    "positive_ctxs": list,
    "image_list": list,
    "question": str,
}
_MORE: dict[str, dict[str, type | tuple[type, ...]]] = {
    "retrieval-text": {"answer": (str, list)},
    "retrieval-image": {"answer": int, "choices_image": list},
}
_FONT, _WIDTH, _MARGIN = 24, 448, 16
_Unit = str | Path | Image.Image
"""A unit of a haystack: a text, the path of an image, or an image."""


@dataclass(frozen=True, eq=False)
class _File:
    """The records of a kind and length; one is read when it is asked for."""

    path: Path
    kind: str
    length: int
    images: Path

    def parse(self, line: bytes, where: str) -> Record:
        try:
            values = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{self.path}, {where}: {error}; expected a JSON object") from error
        record = Record(values if isinstance(values, dict) else {}, f"{self.path}, {where}")
        record.expect(_COLUMNS | _MORE[self.kind])
        return Record(record.values, record.where, self.images)

    def first(self) -> Record:
        with self.path.open("rb") as lines:
            return self.parse(lines.readline(), "row 0")

    @cached_property
    def places(self) -> dict[float, dict[int, int]]:
        """By depth and number of the pair, in ascending order: the byte at which a record begins.

        A file has up to 1.5 GB: it is read once to find them, and never kept.
        """
        found: dict[float, dict[int, int]] = {}
        with self.path.open("rb") as lines:
            at = 0
            for row, line in enumerate(lines):
                if line.strip():
                    record = self.parse(line, f"row {row}")
                    pairs = found.setdefault(_depth(record), {})
                    if pairs.setdefault(_number(record), at) != at:
                        raise record.error(f"{record.values['id']} has two records of one depth")
                at += len(line)
        return {depth: dict(sorted(pairs.items())) for depth, pairs in sorted(found.items())}

    def read(self, depth: float, number: int) -> Record:
        with self.path.open("rb") as lines:
            lines.seek(self.places[depth][number])
            return self.parse(lines.readline(), f"pair {number} at depth {depth:g}")


@dataclass(frozen=True, eq=False)
class Needles:
    """The needle tasks on published haystacks; `make` and `generate` are as in `needles`.

    The pairs of a kind and length are ordered by the number in their `id`, as in paper A's code,
    and split at every depth alike: detection has the first 20 (paper A's own), heldout the next
    20, test all others.

    Attributes:
        folder: What was opened.
        opened: By kind ("retrieval-text") and length.
    """

    folder: Path
    opened: Mapping[tuple[str, int], _File]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Nominal lengths in tokens of which there are records."""
        return tuple(sorted({length for _, length in self.opened}))

    @cached_property
    def depths(self) -> tuple[float, ...]:
        """Depths of the needle, from a file of the shortest length."""
        return tuple(min(self.opened.values(), key=lambda file: file.length).places)

    @property
    def files(self) -> dict[str, int]:
        """The files of records, by their path in the folder, with their sizes in bytes."""
        paths = [file.path for file in self.opened.values()]
        return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in paths}

    def count(self, task: str, length: int, split: str = "detection") -> int:
        """Number of pairs.

        Raises:
            ValueError: As `make` does.
        """
        return len(self._pairs(self._file(task, length), self.depths[0], split))

    def make(
        self,
        task: str,
        length: int,
        depth: float,
        *,
        pair: int = 0,
        split: str = "detection",
        needle: bool = True,
        answer: str | None = None,
    ) -> Example:
        """Make one example.

        - text: the evidence is the needle's sentence, in its part of the context.
        - image: the question shows the options with their letters; the evidence is all of the
          image that the right one was pasted into, as in paper A.
        - rendered: the sentence drawn as an image, which stands in its place. (In paper A's code it
          stands after the paragraph, and the drawn images are not published.)
        - identical: the image that the question shows stands in the haystack in place of the one
          that it was pasted into.

        Units of the haystack are joined by a space, as in paper A's code.

        Args:
            task: One of `needles.TASKS`.
            length: One of `lengths`.
            depth: One of `depths`, as near as 0.05.
            pair: Which question and evidence, from 0.
            split: One of `needles.SPLITS`.
            needle: False takes the sentence (text, rendered) or the image that holds the needle
                (image) out of the haystack; in the task identical another of the options stands
                there, and the answer is "no".
            answer: "yes" or "no" for identical, where "no" is as `needle=False`; else None.

        Raises:
            ValueError: A setting is unknown; there is no such pair; the record lacks a column, an
                image cannot be read, or the needle is not in the haystack exactly once.
        """
        file = self._file(task, length)
        near = [each for each in self.depths if abs(each - depth) < 0.05]
        if not near:
            raise ValueError(f"depth is {depth!r}; expected one of {self.depths}")
        numbers = self._pairs(file, near[0], split)
        if not 0 <= pair < len(numbers):
            raise ValueError(
                f"pair is {pair}; {file.path.name} has {len(numbers)} pairs in the split {split} "
                f"at depth {near[0]:g}: expected 0 to {len(numbers) - 1}"
            )
        allowed = (None, "yes", "no") if task == "identical" else (None,)
        if answer not in allowed or (answer == "yes" and not needle):
            raise ValueError(
                f"answer is {answer!r}; expected one of {allowed}, and no needle for no: published "
                "needles cannot be changed"
            )
        record = file.read(near[0], numbers[pair])
        units = _units(record)
        needle = needle and answer != "no"
        if file.kind == "retrieval-text":
            at, chars = _place_sentence(record, units, task, needle)
            question: tuple[Part, ...] = (record.text("question"),)
            choices: tuple[str, ...] = ()
            right = _one_answer(record)
        else:
            at, chars = _place_image(record, units, task, needle), None
            question, choices, right = _asked(record, task, needle)
        context, starts = _joined(record, units)
        region = None
        if needle:
            part, first = starts[at]
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
            seed=(TASKS.index(task), length, numbers[pair]),
        )

    def generate(
        self,
        tasks: Sequence[str] = TASKS,
        lengths: Sequence[int] | None = None,
        depths: Sequence[float] | None = None,
        pairs: int = PAIRS,
        **settings: Any,
    ) -> Iterator[Example]:
        """Make every example of a grid, pairs innermost; `settings` go to `make`.

        By default all lengths and depths that there are.
        """
        lengths = self.lengths if lengths is None else lengths
        depths = self.depths if depths is None else depths
        for task, length, depth, pair in product(tasks, lengths, depths, range(pairs)):
            yield self.make(task, length, depth, pair=pair, **settings)

    def _file(self, task: str, length: int) -> _File:
        if task not in KINDS:
            raise ValueError(f"task is {task!r}; expected one of {TASKS}")
        if (KINDS[task], length) not in self.opened:
            there = [long for kind, long in self.opened if kind == KINDS[task]]
            raise ValueError(
                f"{self.folder} holds no records of {KINDS[task]} at length {length}; it has the "
                f"lengths {sorted(there)}"
            )
        return self.opened[KINDS[task], length]

    def _pairs(self, file: _File, depth: float, split: str) -> list[int]:
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; expected one of {SPLITS}")
        if depth not in file.places:
            raise ValueError(f"{file.path} has no record at depth {depth:g}")
        first = PAIRS * SPLITS.index(split)
        return list(file.places[depth])[first : None if split == SPLITS[-1] else first + PAIRS]


def read(folder: str | Path) -> Needles:
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
            opened[kind, length] = _File(path, kind, length, images)
            opened[kind, length].first()
    if not opened:
        raise ValueError(
            f"{folder / DATA / 'NIAH'} holds no file such as retrieval-text_test_K8_dep6.jsonl; "
            "expected the unpacked 0_mmlb_data.tar.gz of MMLongBench"
        )
    return Needles(folder, opened)


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


def score(answer: str, gold: str) -> float:
    """1 for a right answer, as MMLongBench counts them.

    The option given as the answer, or else the last letter that could be one; the last yes or no;
    else the gold answer anywhere in the answer, both normalised.
    """
    if re.fullmatch("[A-J]", gold):
        said = re.findall(r"(?i:answer is|answer:)\s*\(?([A-J])\b", answer)[:1]
        return float((said or re.findall(r"\b[A-J]\b", answer)[-1:]) == [gold])
    if gold in ("yes", "no"):
        return float(re.findall(r"\b(?:yes|no)\b", answer.lower())[-1:] == [gold])
    return float(normalised(gold) in normalised(answer))


def draw(text: str) -> Image.Image:
    """A text as an image: black on white, wrapped, the same each time."""
    font = ImageFont.load_default(size=_FONT)
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    words = text.split()
    width = max(_WIDTH - 2 * _MARGIN, *(ceil(pen.textlength(word, font)) for word in words))
    lines = words[:1]
    for word in words[1:]:
        longer = f"{lines[-1]} {word}"
        if pen.textlength(longer, font) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    step = round(1.5 * _FONT)
    image = Image.new("RGB", (width + 2 * _MARGIN, step * len(lines) + 2 * _MARGIN), "white")
    pen = ImageDraw.Draw(image)
    for row, line in enumerate(lines):
        pen.text((_MARGIN, _MARGIN + row * step), line, fill="black", font=font)
    return image


def _depth(record: Record) -> float:
    """To one digit, rounded up as MMLongBench does for its figures (0.1999 is 0.2)."""
    depth = float(record.values["depth"])
    if not 0 <= depth <= 1:
        raise record.error(f"depth is {depth}; expected 0 to 1")
    return ceil(10 * depth - 1e-6) / 10 + 0.0


def _number(record: Record) -> int:
    number = re.search(r"\d+$", record.values["id"])
    if not number:
        raise record.error(f"id is {record.values['id']!r}; expected one such as 'mm-niah-23'")
    return int(number.group())


def _one_answer(record: Record) -> str:
    given = record.values["answer"]
    answers = given if isinstance(given, list) else [given]
    if len(answers) != 1 or not isinstance(answers[0], str) or not answers[0].strip():
        raise record.error(f"answer is {given!r}; expected one text")
    return answers[0]


def _units(record: Record) -> list[_Unit]:
    """The haystack."""
    paths = [Path(path) for path in record.values["image_list"]]
    images = iter(paths)
    units: list[_Unit] = []
    for unit in record.values["ctxs"]:
        match unit:
            case {"type": "image"}:
                units.append(next(images, Path()))
            case {"type": "text", "text": str(text)}:
                units.append(text)
            case _:
                raise record.error(f"a unit of ctxs is {unit!r:.200}; expected a text or an image")
    places = sum(isinstance(unit, Path) for unit in units)
    if places != len(paths):
        raise record.error(f"ctxs has {places} images, but image_list {len(paths)}")
    return units


def _needle(record: Record, name: str) -> str:
    given = record.values["positive_ctxs"]
    value = given[0].get(name) if len(given) == 1 and isinstance(given[0], dict) else None
    if not isinstance(value, str) or not value.strip():
        raise record.error(f"positive_ctxs is {given!r:.200}; expected one unit with {name!r}")
    return value.strip()


def _place_sentence(
    record: Record, units: list[_Unit], task: str, needle: bool
) -> tuple[int, tuple[int, int] | None]:
    """Leave the sentence, draw it, or take it out; the unit it is in, and its characters there."""
    sentence = _needle(record, "text")
    counts = [unit.count(sentence) if isinstance(unit, str) else 0 for unit in units]
    if sum(counts) != 1:
        raise record.error(f"the needle {sentence!r} is {sum(counts)} times in ctxs; expected once")
    at = counts.index(1)
    text = str(units[at])
    first = text.index(sentence)
    if needle and task == "text":
        return at, (first, first + len(sentence))
    before, after = text[:first].rstrip(), text[first + len(sentence) :].lstrip()
    if needle:
        units[at : at + 1] = [*filter(None, (before,)), draw(sentence), *filter(None, (after,))]
        return at + bool(before), None
    units[at : at + 1] = [" ".join(filter(None, (before, after)))]
    return at, None


def _place_image(record: Record, units: list[_Unit], task: str, needle: bool) -> int:
    """Leave the image with the needle, put an option in its place, or take it out; its unit."""
    name = _needle(record, "image")
    found = [i for i, unit in enumerate(units) if unit in (Path(name), Path("mm-niah", name))]
    if len(found) != 1:
        raise record.error(f"the image {name!r} is {len(found)} times in ctxs; expected once")
    if task == "identical":
        options, right = _options(record)
        units[found[0]] = Path(options[right if needle else (right + 1) % len(options)])
    elif not needle:
        del units[found[0]]
    return found[0]


def _options(record: Record) -> tuple[list[str], int]:
    options, right = record.values["choices_image"], record.values["answer"]
    if len(options) < 2 or len({*options}) < len(options) or not 0 <= right < len(options):
        raise record.error(
            f"answer is {right} of the choices_image {options}; expected the index of one, from 0, "
            "of at least two that differ"
        )
    return options, right


def _asked(
    record: Record, task: str, needle: bool
) -> tuple[tuple[Part, ...], tuple[str, ...], str]:
    """Question, choices and answer of a task with image needles."""
    options, right = _options(record)
    if task == "identical":
        image = record.image(options[right], "choices_image")
        text = "Does this image appear anywhere in the document? "
        return (text, image), ("yes", "no"), "yes" if needle else "no"
    letters = tuple(chr(ord("A") + index) for index in range(len(options)))
    parts: list[Part] = [record.text("question")]
    for letter, option in zip(letters, options, strict=True):
        parts += [f"\n{letter}. ", record.image(option, "choices_image")]
    return (f"{parts[0]}{parts[1]}", *parts[2:]), letters, letters[right]


def _joined(
    record: Record, units: Sequence[_Unit]
) -> tuple[tuple[Part, ...], list[tuple[int, int]]]:
    """The context, and of each unit its part and its first character there."""
    parts: list[Part] = []
    starts = []
    text = ""
    for index, unit in enumerate(units):
        text += " " if index else ""
        if isinstance(unit, str):
            starts.append((len(parts), len(text)))
            text += unit
            continue
        parts += [text] if text else []
        starts.append((len(parts), 0))
        parts.append(record.image(str(unit) if isinstance(unit, Path) else unit, "image_list"))
        text = ""
    return (*parts, text + BEFORE_QUESTION), starts
