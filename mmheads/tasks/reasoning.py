r"""The reasoning benchmarks of paper A (arXiv 2605.27243, Fig. 9).

MMMU (arXiv 2311.16502), MMMU-Pro (arXiv 2409.02813), MathVision (arXiv 2402.14804) and MathVista
(arXiv 2310.02255) are asked either only for an answer or for a chain of thought. Their examples
have no evidence, so that they can be answered but not scored.

Columns and files are those of MMMU/MMMU, MMMU/MMMU_Pro, MathLLMs/MathVision and
AI4Math/MathVista on the hub. They are taken from
the data cards and from the benchmarks' evaluation code, and were not checked against the hub.
`mmheads.tasks.reasoning_answers` scores the answers by the rules of that code, except that:

- No language model extracts the answer (MathVista uses GPT-4). The answer is what follows the last
  "Answer:" in its line, else the content of the last \boxed{}, else what follows the last
  "answer is", else the whole text.
- An answer that names no option, or several, is wrong. MMMU draws one of the options at random
  instead, and MathVista takes the option with the most similar text: a model that never answers
  scores at chance there, and 0 here.
- LaTeX is compared by `math-verify`, not by `latex2sympy`.

Questions are worded as in the benchmarks, with options listed as "(A) text" in all of them; the
instructions on how to answer are our own. Paper A does not say which configuration of MMMU-Pro,
which split and which prompts it used.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from string import ascii_uppercase
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from mmheads.checks import expect, expect_one_of
from mmheads.examples import Example, Part
from mmheads.metrics import Metric
from mmheads.tasks import reasoning_answers as answers
from mmheads.tasks.records import Columns, Record, Text, read_records

MODES = ("direct", "cot")
SUBJECTS = (
    *("Accounting", "Agriculture", "Architecture_and_Engineering", "Art", "Art_Theory"),
    *("Basic_Medical_Science", "Biology", "Chemistry", "Clinical_Medicine", "Computer_Science"),
    *("Design", "Diagnostics_and_Laboratory_Medicine", "Economics", "Electronics"),
    *("Energy_and_Power", "Finance", "Geography", "History", "Literature", "Manage", "Marketing"),
    *("Materials", "Math", "Mechanical_Engineering", "Music", "Pharmacy", "Physics", "Psychology"),
    *("Public_Health", "Sociology"),
)
"""Configurations of MMMU."""
SPLITS = ("dev", "validation", "test")
"""Splits of MMMU; the answers of the test split are not published."""
PRO = ("standard (4 options)", "standard (10 options)", "vision")
"""Configurations of MMMU-Pro; in the last, question and options are in the image."""

_SAY = {
    "direct": "\nAnswer with {} alone.",
    "cot": '\nThink step by step. Then end with a line "Answer: " and {}.',
}
_LETTER = "the letter of the right option"
_IN_IMAGE = "Answer the multiple-choice question in the image."

_PLACE = re.compile(r"<image ?(\d)>")
_MMMU_ID = re.compile(r"([a-z]+)_(\w+)_(\d+)")


class _Question(Columns):
    id: str
    options: str
    answer: Text


class _Mmmu(_Question):
    model_config = ConfigDict(extra="allow")  # image_1 to image_7

    question: Text


class _MmmuOpen(_Mmmu):
    question_type: Literal["multiple-choice", "open"]


class _InImage(_Question):
    image: Any


_Digits = Annotated[str, Field(pattern=r"^\d+$")]


class _MathVision(Columns):
    id: _Digits
    question: Text
    answer: Text
    options: list[Any]
    decoded_image: Any


class _MathVista(Columns):
    pid: _Digits
    question: Text
    answer: Text
    question_type: str
    answer_type: str
    decoded_image: Any
    choices: list[str] | None
    unit: str | None
    precision: float | None


def mmmu(
    folder: str | Path, *, subjects: Sequence[str] = SUBJECTS, mode: str = "direct"
) -> Iterator[Example]:
    """Yield MMMU's validation split: college exams with up to seven images per question.

    Args:
        folder: Folder with the hub's files (`Accounting/validation-*`).
        subjects: Some of `SUBJECTS`.
        mode: One of `MODES`.

    Yields:
        Examples with answers for `reasoning_answers.mmmu_answer`; haystack is (split, subject,
        number).

    Raises:
        ValueError: A setting is unknown, or a record is not as published.
    """
    expect_one_of("mode", mode, MODES)
    if unknown := [subject for subject in subjects if subject not in SUBJECTS]:
        raise ValueError(f"subjects {unknown} are unknown; expected some of {SUBJECTS}")
    for subject in subjects:
        for record in read_records(folder, _MmmuOpen, files=f"{subject}/validation-*"):
            values = record.values
            options = _options(record) if values.question_type == "multiple-choice" else []
            yield _example(
                record,
                "mmmu",
                _mmmu_haystack(record),
                mode,
                text=values.question,
                pictures=_pictures(record),
                options=options,
                answer=values.answer if options else _open_gold(values.answer),
                form="a single word, number or phrase",
            )


def mmmu_pro(
    folder: str | Path, *, config: str = "standard (10 options)", mode: str = "direct"
) -> Iterator[Example]:
    """Yield examples of MMMU-Pro, all of them multiple-choice questions.

    Args:
        folder: Folder with the hub's files (`vision/test-*`).
        config: One of `PRO`.
        mode: One of `MODES`.

    Yields:
        Examples with answers for `reasoning_answers.choice`; haystack is (config, split, subject,
        number).

    Raises:
        ValueError: A setting is unknown, or a record is not as published.
    """
    expect_one_of("mode", mode, MODES)
    expect_one_of("config", config, PRO)
    in_image = config == "vision"
    columns: type[Columns] = _InImage if in_image else _Mmmu
    records: Iterator[Record[Any]] = read_records(folder, columns, files=f"{config}/test-*")
    for record in records:
        yield _example(
            record,
            "mmmu_pro",
            (PRO.index(config), *_mmmu_haystack(record)),
            mode,
            text=_IN_IMAGE if in_image else record.values.question,
            pictures={0: record.values.image} if in_image else _pictures(record),
            options=_options(record),
            answer=record.values.answer,
        )


def mathvision(folder: str | Path, *, mode: str = "direct") -> Iterator[Example]:
    """Yield MathVision's test split: problems of mathematics competitions, with one image each.

    A question that names several images (`<image1>`, `<image2>`) has them all in its one image,
    which then comes first, and the names stay in the text.

    Args:
        folder: Folder with the hub's files (`data/test-*`).
        mode: One of `MODES`.

    Yields:
        Examples with answers for `reasoning_answers.mathvision_answer`; haystack is (id,).

    Raises:
        ValueError: A setting is unknown, or a record is not as published.
    """
    expect_one_of("mode", mode, MODES)
    for record in read_records(folder, _MathVision, files="data/test-*"):
        values = record.values
        named = {int(number) for number in _PLACE.findall(values.question)}
        yield _example(
            record,
            "mathvision",
            (int(values.id),),
            mode,
            text=values.question,
            pictures={named.pop() if len(named) == 1 else 0: values.decoded_image},
            options=[str(option) for option in values.options],
            answer=values.answer,
            form="a number or an expression",
        )


def mathvista(folder: str | Path, *, mode: str = "direct") -> Iterator[Example]:
    """Yield examples of MathVista's split testmini; answers of the other split are not published.

    Args:
        folder: Folder with the hub's files (`data/testmini-*`).
        mode: One of `MODES`.

    Yields:
        Examples with answers for `reasoning_answers.mathvista_answer`; haystack is (pid,).

    Raises:
        ValueError: An unknown mode, or a record is not as published.
    """
    expect_one_of("mode", mode, MODES)
    for record in read_records(folder, _MathVista, files="data/testmini-*"):
        values = record.values
        answer, form = _vista_gold(record)
        yield _example(
            record,
            "mathvista",
            (int(values.pid),),
            mode,
            text=values.question + (f" (Unit: {values.unit})" if values.unit else ""),
            pictures={0: values.decoded_image},
            options=values.choices or [] if form == _LETTER else [],
            answer=answer,
            form=form,
        )


def _mmmu_haystack(record: Record[Any]) -> tuple[int, ...]:
    match = _MMMU_ID.fullmatch(record.values.id)
    if not match or match[1] not in SPLITS or match[2] not in SUBJECTS:
        raise record.error(f"id is {record.values.id!r}; expected such as validation_Art_1")
    return SPLITS.index(match[1]), SUBJECTS.index(match[2]), int(match[3])


def _options(record: Record[Any]) -> list[str]:
    """MMMU's options: a text that holds a Python list of texts."""
    options = _listed(record.values.options)
    if options is None or len(options) < 2:
        raise record.error(
            f"options is {record.values.options!r}; expected a Python list of two texts or more"
        )
    return options


def _listed(text: str) -> list[str] | None:
    """The texts or numbers of a Python list, or None."""
    try:
        values = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    if not isinstance(values, list) or not all(isinstance(v, str | int | float) for v in values):
        return None
    return [str(value) for value in values]


def _open_gold(answer: str) -> str:
    """Several right answers come as a list."""
    several = _listed(answer)
    return json.dumps(several, ensure_ascii=False) if several else answer


def _vista_gold(record: Record[_MathVista]) -> tuple[str, str]:
    """The answer as `reasoning_answers.mathvista_answer` takes it, and its form."""
    answer, kind = record.values.answer, record.values.answer_type
    if record.values.question_type == "multi_choice":
        choices = record.values.choices or []
        if answer not in choices:
            raise record.error(f"the answer {answer!r} is none of the choices {choices}")
        return ascii_uppercase[choices.index(answer)], _LETTER
    if kind == "list":
        if not _listed(answer):
            raise record.error(f"the answer {answer!r} is not a list of texts or numbers")
        return answer, "a list such as [1, 2, 3]"
    try:
        number = float(answer)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise record.error(f"the answer {answer!r} is not a number; answer_type is {kind!r}")
    if kind == "integer":
        return str(int(number)), "an integer"
    places = record.values.precision
    if kind != "float" or not places or not 0 < places < 20:
        raise record.error(
            f"answer_type is {kind!r} with precision {places}; expected float with 1 to 19"
        )
    return f"{number:.{int(places)}f}", f"a number with decimal places: {int(places)}"


def _pictures(record: Record[Any]) -> dict[int, Any]:
    """MMMU's images by number."""
    columns = record.values.model_extra or {}
    images = {number: columns.get(f"image_{number}") for number in range(1, 8)}
    return {number: value for number, value in images.items() if value is not None}


def _example(
    record: Record[Any],
    task: str,
    haystack: tuple[int, ...],
    mode: str,
    *,
    text: str,
    pictures: Mapping[int, Any],
    options: Sequence[str],
    answer: str,
    form: str = "",
) -> Example:
    """One question, images where the text names them, those it does not name first.

    The context goes up to the last image of the question; images of options belong to the
    question, as does all that was written before an image that ends the record.

    Args:
        record: The record.
        task: Name of the benchmark.
        haystack: Numbers that identify the question.
        mode: One of `MODES`.
        text: The question.
        pictures: Images by their number in the text; with 0, one that the text does not place.
        options: Texts; none for an open question.
        answer: The right letter, or the answer to an open question.
        form: What an open question is to be answered with.
    """
    letters = tuple(ascii_uppercase[: len(options)])
    if options and answer not in letters:
        raise record.error(f"answer is {answer!r}; expected one of {', '.join(letters)}")
    listed = "".join(f"\n({a}) {o}" for a, o in zip(letters, options, strict=True))
    if text == _IN_IMAGE:
        listed = ""
    named = {int(number) for number in _PLACE.findall(text + listed)}
    first = [
        record.image(value, f"image {number}" if number else "the image")
        for number, value in pictures.items()
        if number == 0 or number not in named
    ]
    asked, offered = (_interleaved(record, each, pictures) for each in (text, listed))
    end = max((i for i, part in enumerate(asked, 1) if not isinstance(part, str)), default=0)
    if not any(isinstance(part, str) for part in (*asked[end:], *offered)):
        end = 0
    return Example(
        context=(*first, *asked[:end]),
        question=(*asked[end:], *offered),
        answer=f"{answer} {json.dumps(list(options), ensure_ascii=False)}" if options else answer,
        choices=letters,
        instruction=_SAY[mode].format(_LETTER if options else form),
        task=task,
        haystack=haystack,
    )


def _interleaved(record: Record[Any], text: str, pictures: Mapping[int, Any]) -> list[Part]:
    if 0 in pictures:
        return [text] if text.strip() else []
    parts: list[Part] = []
    for index, piece in enumerate(_PLACE.split(text)):
        if index % 2:
            name = f"image {piece}, which the text names,"
            parts.append(record.image(pictures.get(int(piece)), name))
        elif piece.strip():
            parts.append(piece)
    return parts


def chance(examples: Iterable[Example]) -> float:
    """Return the mean score of randomly chosen options; 0 for a question without options.

    Raises:
        ValueError: There is no example.
    """
    rates = [1 / len(example.choices) if example.choices else 0.0 for example in examples]
    if not rates:
        raise ValueError("no example; expected one or more")
    return math.fsum(rates) / len(rates)


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A benchmark.

    Attributes:
        load: Function of (folder, mode=..., further settings) that yields its examples.
        metric: Function of (answer, gold answer) that returns a score in [0, 1].
    """

    load: Callable[..., Iterator[Example]]
    metric: Metric


BENCHMARKS: Mapping[str, Benchmark] = {
    "mmmu": Benchmark(load=mmmu, metric=answers.mmmu_answer),
    "mmmu_pro": Benchmark(load=mmmu_pro, metric=answers.choice),
    "mathvision": Benchmark(load=mathvision, metric=answers.mathvision_answer),
    "mathvista": Benchmark(load=mathvista, metric=answers.mathvista_answer),
}
"""Their chance level depends on the examples: see `chance`."""


def read_benchmark(
    name: str,
    folder: str | Path,
    *,
    mode: str = "direct",
    limit: int | None = None,
    **settings: Any,
) -> list[Example]:
    """Return the first examples of a benchmark.

    Args:
        name: One of `BENCHMARKS`.
        folder: Folder with the hub's files.
        mode: One of `MODES`.
        limit: Largest number of examples; None for all.
        settings: Arguments of the benchmark's own function (subjects, config).

    Raises:
        ValueError: An unknown name, a limit below 1, or as that function does.
    """
    expect_one_of("benchmark", name, BENCHMARKS)
    expect(limit is None or limit >= 1, "limit", limit, "1 or more, or None for all")
    return list(islice(BENCHMARKS[name].load(folder, mode=mode, **settings), limit))
