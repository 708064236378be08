r"""The reasoning benchmarks of paper A (arXiv 2605.27243, Fig. 9).

MMMU (arXiv 2311.16502), MMMU-Pro (arXiv 2409.02813), MathVision (arXiv 2402.14804) and MathVista
(arXiv 2310.02255) are asked either only for an answer or for a chain of thought. Their examples
have no evidence, so that they can be answered but not scored.

Columns and files are those of the data sets on the hub that `BENCHMARKS` names. They are taken from
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
from typing import Any

from mmheads.examples import Example, Part
from mmheads.metrics import Metric
from mmheads.tasks import reasoning_answers as answers
from mmheads.tasks.records import Kind, Record, read_records

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
_IMAGES = {f"image_{number}": object for number in range(1, 8)}


def mmmu(
    source: str | Path = "MMMU/MMMU",
    *,
    subjects: Sequence[str] = (),
    split: str = "validation",
    mode: str = "direct",
) -> Iterator[Example]:
    """Yield examples of MMMU: college exams in 30 subjects, with up to seven images per question.

    Args:
        source: Folder with the hub's files (`Accounting/validation-*`), or name on the hub.
        subjects: Some of `SUBJECTS`; all by default.
        split: "dev" or "validation".
        mode: One of `MODES`.

    Yields:
        Examples with answers for `reasoning_answers.mmmu_answer`; haystack is (split, subject,
        number).

    Raises:
        ValueError: A setting is unknown, or a record is not as published.
    """
    _expect_mode(mode)
    if split not in SPLITS[:2]:
        raise ValueError(f"split is {split!r}; expected one of {SPLITS[:2]}, which have answers")
    if unknown := [subject for subject in subjects if subject not in SUBJECTS]:
        raise ValueError(f"subjects {unknown} are unknown; expected some of {SUBJECTS}")
    columns: dict[str, Kind] = dict.fromkeys(
        ("id", "question", "options", "answer", "question_type"), str
    )
    for subject in subjects or SUBJECTS:
        for record in read_records(
            source, columns | _IMAGES, files=f"{subject}/{split}-*", config=subject, split=split
        ):
            kind = record.values["question_type"]
            if kind not in ("multiple-choice", "open"):
                raise record.error(f"question_type is {kind!r}; expected multiple-choice or open")
            options = _options(record) if kind == "multiple-choice" else []
            yield _example(
                record,
                "mmmu",
                _mmmu_seed(record),
                mode,
                pictures=_pictures(record),
                options=options,
                answer=record.text("answer") if options else _open_gold(record.text("answer")),
                form="a single word, number or phrase",
            )


def mmmu_pro(
    source: str | Path = "MMMU/MMMU_Pro",
    *,
    config: str = "standard (10 options)",
    mode: str = "direct",
) -> Iterator[Example]:
    """Yield examples of MMMU-Pro, all of them multiple-choice questions.

    Args:
        source: Folder with the hub's files (`vision/test-*`), or name on the hub.
        config: One of `PRO`.
        mode: One of `MODES`.

    Yields:
        Examples with answers for `reasoning_answers.choice`; haystack is (config, split, subject,
        number).

    Raises:
        ValueError: A setting is unknown, or a record is not as published.
    """
    _expect_mode(mode)
    if config not in PRO:
        raise ValueError(f"config is {config!r}; expected one of {PRO}")
    seen = config == "vision"
    columns: dict[str, Kind] = {"id": str, "options": str, "answer": str}
    columns |= {"image": object} if seen else {"question": str, **_IMAGES}
    for record in read_records(
        source, columns, files=f"{config}/test-*", config=config, split="test"
    ):
        yield _example(
            record,
            "mmmu_pro",
            (PRO.index(config), *_mmmu_seed(record)),
            mode,
            pictures={0: record.values["image"]} if seen else _pictures(record),
            options=_options(record),
            answer=record.text("answer"),
            text=_IN_IMAGE if seen else "",
        )


def mathvision(
    source: str | Path = "MathLLMs/MathVision", *, split: str = "test", mode: str = "direct"
) -> Iterator[Example]:
    """Yield examples of MathVision: problems of mathematics competitions, with one image each.

    A question that names several images (`<image1>`, `<image2>`) has them all in its one image,
    which then comes first, and the names stay in the text.

    Args:
        source: Folder with the hub's files (`data/test-*`), or name on the hub.
        split: "test" or "testmini".
        mode: One of `MODES`.

    Yields:
        Examples with answers for `reasoning_answers.mathvision_answer`; haystack is (id,).

    Raises:
        ValueError: A setting is unknown, or a record is not as published.
    """
    _expect_mode(mode)
    if split not in ("test", "testmini"):
        raise ValueError(f"split is {split!r}; expected test or testmini")
    columns: dict[str, Kind] = {"id": str, "question": str, "answer": str}
    columns |= {"options": list, "decoded_image": object}
    for record in read_records(source, columns, files=f"data/{split}-*", split=split):
        image = record.values["decoded_image"]
        named = {int(number) for number in _PLACE.findall(record.values["question"])}
        yield _example(
            record,
            "mathvision",
            (_integer(record, "id"),),
            mode,
            pictures={named.pop() if len(named) == 1 else 0: image},
            options=[str(option) for option in record.values["options"]],
            answer=record.text("answer"),
            form="a number or an expression",
        )


def mathvista(
    source: str | Path = "AI4Math/MathVista", *, mode: str = "direct"
) -> Iterator[Example]:
    """Yield examples of MathVista's split testmini; answers of the other split are not published.

    Args:
        source: Folder with the hub's files (`data/testmini-*`), or name on the hub.
        mode: One of `MODES`.

    Yields:
        Examples with answers for `reasoning_answers.mathvista_answer`; haystack is (pid,).

    Raises:
        ValueError: An unknown mode, or a record is not as published.
    """
    _expect_mode(mode)
    names = ("pid", "question", "answer", "question_type", "answer_type")
    columns: dict[str, Kind] = {**dict.fromkeys(names, str), "decoded_image": object}
    none = type(None)
    columns |= {"choices": (list[str], none), "unit": (str, none), "precision": (int, float, none)}
    for record in read_records(source, columns, files="data/testmini-*", split="testmini"):
        unit, choices = record.values["unit"], record.values["choices"]
        answer, form = _vista_gold(record)
        yield _example(
            record,
            "mathvista",
            (_integer(record, "pid"),),
            mode,
            pictures={0: record.values["decoded_image"]},
            options=choices if form == _LETTER else [],
            answer=answer,
            form=form,
            text=record.text("question") + (f" (Unit: {unit})" if unit else ""),
        )


def _expect_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; expected one of {MODES}")


def _integer(record: Record, name: str) -> int:
    if not record.text(name).isdecimal():
        raise record.error(f"{name} is {record.values[name]!r}; expected a number")
    return int(record.values[name])


def _mmmu_seed(record: Record) -> tuple[int, ...]:
    found = _MMMU_ID.fullmatch(record.values["id"])
    if not found or found[1] not in SPLITS or found[2] not in SUBJECTS:
        raise record.error(f"id is {record.values['id']!r}; expected such as validation_Art_1")
    return SPLITS.index(found[1]), SUBJECTS.index(found[2]), int(found[3])


def _options(record: Record) -> list[str]:
    """MMMU's options: a text that holds a Python list of texts."""
    options = _listed(record.values["options"])
    if options is None or len(options) < 2:
        raise record.error(
            f"options is {record.values['options']!r}; expected a Python list of two texts or more"
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


def _vista_gold(record: Record) -> tuple[str, str]:
    """The answer as `reasoning_answers.mathvista_answer` takes it, and its form."""
    answer, kind = record.text("answer"), record.values["answer_type"]
    if record.values["question_type"] == "multi_choice":
        choices = record.values["choices"] or []
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
    places = record.values["precision"]
    if kind != "float" or not places or not 0 < places < 20:
        raise record.error(
            f"answer_type is {kind!r} with precision {places}; expected float with 1 to 19"
        )
    return f"{number:.{int(places)}f}", f"a number with decimal places: {int(places)}"


def _pictures(record: Record) -> dict[int, Any]:
    """MMMU's images by number."""
    columns = {number: record.values[f"image_{number}"] for number in range(1, 8)}
    return {number: value for number, value in columns.items() if value is not None}


def _example(
    record: Record,
    task: str,
    haystack: tuple[int, ...],
    mode: str,
    *,
    pictures: Mapping[int, Any],
    options: Sequence[str],
    answer: str,
    form: str = "",
    text: str = "",
) -> Example:
    """One question, images where the text names them, those it does not name first.

    The context goes up to the last image of the question; images of options belong to the
    question, as does all that was written before an image that ends the record.

    Args:
        record: The record.
        task: Name of the benchmark.
        haystack: Numbers that identify the question.
        mode: One of `MODES`.
        pictures: Images by their number in the text; with 0, one that the text does not place.
        options: Texts; none for an open question.
        answer: The right letter, or the answer to an open question.
        form: What an open question is to be answered with.
        text: The question, by default that of the record.
    """
    letters = tuple(ascii_uppercase[: len(options)])
    if options and answer not in letters:
        raise record.error(f"answer is {answer!r}; expected one of {', '.join(letters)}")
    listed = "".join(f"\n({a}) {o}" for a, o in zip(letters, options, strict=True))
    if text == _IN_IMAGE:
        listed = ""
    text = text or record.text("question")
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


def _interleaved(record: Record, text: str, pictures: Mapping[int, Any]) -> list[Part]:
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
        load: Function of (source, mode=..., further settings) that yields its examples.
        metric: Function of (answer, gold answer) that returns a score in [0, 1].
        hub: Name of the data set on the hub.
    """

    load: Callable[..., Iterator[Example]]
    metric: Metric
    hub: str


BENCHMARKS: Mapping[str, Benchmark] = {
    "mmmu": Benchmark(load=mmmu, metric=answers.mmmu_answer, hub="MMMU/MMMU"),
    "mmmu_pro": Benchmark(load=mmmu_pro, metric=answers.choice, hub="MMMU/MMMU_Pro"),
    "mathvision": Benchmark(
        load=mathvision, metric=answers.mathvision_answer, hub="MathLLMs/MathVision"
    ),
    "mathvista": Benchmark(
        load=mathvista, metric=answers.mathvista_answer, hub="AI4Math/MathVista"
    ),
}
"""Their chance level depends on the examples: see `chance`."""


def read_benchmark(
    name: str,
    source: str | Path = "",
    *,
    mode: str = "direct",
    limit: int | None = None,
    **settings: Any,
) -> list[Example]:
    """Return the first examples of a benchmark.

    Args:
        name: One of `BENCHMARKS`.
        source: Folder with the hub's files; by default the hub.
        mode: One of `MODES`.
        limit: Largest number of examples; None for all.
        settings: Arguments of the benchmark's own function (subjects, split, config).

    Raises:
        ValueError: An unknown name, a limit below 1, or as that function does.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"benchmark is {name!r}; expected one of {', '.join(BENCHMARKS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; expected 1 or more, or None for all")
    benchmark = BENCHMARKS[name]
    return list(islice(benchmark.load(source or benchmark.hub, mode=mode, **settings), limit))
