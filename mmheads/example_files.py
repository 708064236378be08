"""Read a user's examples from a JSON Lines file.

All that can be known without the model is checked before the first example is returned: every line,
every field, every region, and that every image is a readable file. The pixels of an image are
decoded when the turn of its example comes, so that a long file needs the memory of two examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, overload

from PIL import Image
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat

from mmheads.checks import parse
from mmheads.examples import Example, Part, Region
from mmheads.images import MAX_PIXELS, image_size, open_image


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


_PartRecord = str | dict[str, str]
"""A text, or the name of an image file as {"image": "page.png"}."""


def _as_parts(value: object) -> list[_PartRecord]:
    """The parts of a context or a question, from a text or a list of texts and images."""
    parts = [value] if isinstance(value, str) else value
    if not isinstance(parts, list):
        raise ValueError('expected a text, or a list of texts and {"image": "file"} objects')
    for part in parts:
        is_image = isinstance(part, dict) and set(part) == {"image"}
        if not isinstance(part["image"] if is_image else part, str):
            raise ValueError(
                f'{str(part)[:80]} is neither a text nor an {{"image": "file"}} object'
            )
    return parts


_Parts = Annotated[list[_PartRecord], BeforeValidator(_as_parts)]


class _RegionRecord(_Strict):
    part: int = Field(ge=0)
    text: str | None = Field(default=None, min_length=1)
    chars: tuple[int, int] | None = None
    box: tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat] | None = None

    def region(self, context: Sequence[Part]) -> Region:
        """The region in a context; `text` becomes the characters at which it occurs once."""
        given = [name for name in ("text", "chars", "box") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"a region has {' and '.join(given)}; expected only one of them")
        if self.part >= len(context):
            raise ValueError(
                f"a region names part {self.part}, and the context has {len(context)} parts; parts "
                "are counted from 0"
            )
        if self.text is None:
            return Region(part=self.part, chars=self.chars, box=self.box)
        part = context[self.part]
        if not isinstance(part, str):
            raise ValueError(
                f"a region gives the text {self.text!r}, but part {self.part} is an image"
            )
        if (count := part.count(self.text)) != 1:
            raise ValueError(
                f"{self.text!r} occurs {count} times in part {self.part}, expected once; give the "
                'range of characters: "chars": [first, last + 1]'
            )
        first = part.index(self.text)
        return Region(part=self.part, chars=(first, first + len(self.text)))


class _Record(_Strict):
    context: _Parts
    question: _Parts
    answer: str = ""
    choices: tuple[str, ...] = ()
    evidence: tuple[_RegionRecord, ...] | None = None
    candidates: dict[str, tuple[_RegionRecord, ...]] = Field(default_factory=dict)
    instruction: str = ""
    task: str = ""
    depth: float | None = Field(default=None, ge=0, le=1)

    def example(self, image: Callable[[str], Image.Image]) -> Example:
        """The example, its images made by a function of the name of their file."""

        def made(parts: Sequence[_PartRecord]) -> tuple[Part, ...]:
            return tuple(part if isinstance(part, str) else image(part["image"]) for part in parts)

        def regions(records: Sequence[_RegionRecord]) -> tuple[Region, ...]:
            return tuple(record.region(context) for record in records)

        context, question = made(self.context), made(self.question)
        if not any(not isinstance(part, str) or part.strip() for part in question):
            raise ValueError("the question is empty; expected text or an image")
        return Example(
            context=context,
            question=question,
            evidence=None if self.evidence is None else regions(self.evidence),
            candidates={kind: regions(records) for kind, records in self.candidates.items()},
            **self.model_dump(include={"answer", "choices", "instruction", "task", "depth"}),
        )


@dataclass(frozen=True, eq=False)
class ExampleFile(Sequence[Example]):
    """The examples of a file, each made when it is asked for.

    Attributes:
        path: The JSON Lines file.
        lines: Number of each example's line in the file, from 1.
    """

    path: Path
    lines: tuple[int, ...]
    _records: tuple[_Record, ...]
    _decoded: dict[str, Image.Image] = field(default_factory=dict)
    """Images of the example that was made last, by name: neighbours often share their pages."""

    @property
    def has_evidence(self) -> tuple[bool, ...]:
        """Whether each example has evidence."""
        return tuple(bool(record.evidence) for record in self._records)

    @property
    def has_answer(self) -> tuple[bool, ...]:
        """Whether each example has an answer."""
        return tuple(bool(record.answer.strip()) for record in self._records)

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> ExampleFile: ...
    def __getitem__(self, index: int | slice) -> Example | ExampleFile:
        """One example, or a part of the file.

        Raises:
            ValueError: An image is damaged; the message names file and line.
        """
        if isinstance(index, slice):
            return ExampleFile(self.path, self.lines[index], self._records[index])
        record = self._records[index]
        parts = (*record.context, *record.question)
        names = {part["image"] for part in parts if not isinstance(part, str)}
        for name in set(self._decoded) - names:
            del self._decoded[name]
        with _place(self.path, self.lines[index]):
            for name in names - set(self._decoded):
                self._decoded[name] = open_image(self.path.parent / name)
            return record.example(self._decoded.__getitem__)


def read_examples(path: str | Path) -> ExampleFile:
    """Read the examples of a JSON Lines file, or of `examples.jsonl` in a folder.

    A line is an object with `context` and `question`, each a text or a list of parts: a text, or
    `{"image": "page.png"}` with a path relative to the file. An evidence region is `{"part": 0}`,
    with `"box": [left, top, right, bottom]` in the pixels of the upright image, `"chars": [12, 20]`
    or `"text"`, a text that occurs once in the part. Further fields are `answer`, `choices`,
    `candidates`, `instruction`, `task` and `depth` of `Example`.

    Args:
        path: The file, in UTF-8, or its folder.

    Raises:
        ValueError: There is no such file, it holds no example, or a line is not an example; the
            message names file, line and field.
    """
    path = Path(path)
    path = path / "examples.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path} does not exist; expected a .jsonl file, or a folder with one")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8 ({error}); save it as UTF-8") from error
    lines: list[int] = []
    records: list[_Record] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            with _place(path, number):
                record = parse(_Record, line)
                record.example(lambda name: _stand_in(path.parent / name))
            lines.append(number)
            records.append(record)
    if not records:
        raise ValueError(f"{path} holds no example")
    return ExampleFile(path, tuple(lines), tuple(records))


@contextmanager
def _place(path: Path, line: int) -> Iterator[None]:
    """Let an error inside name the file and the line."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}, line {line}: {error}") from error


def _stand_in(path: Path) -> Image.Image:
    """A blank image as large as the file's longer side, whichever way up it is to be seen."""
    size = image_size(path)
    side = max(size)
    return _blank((side, side) if side * side <= MAX_PIXELS else size)


@lru_cache(maxsize=2)
def _blank(size: tuple[int, int]) -> Image.Image:
    """A blank image in RGB, so that `Example` takes it as it is and converts nothing."""
    return Image.new("RGB", size)
