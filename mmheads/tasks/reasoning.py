r"""The reasoning benchmarks of paper A (arXiv 2605.27243, Fig. 9) and the worth of their answers.

MMMU (arXiv 2311.16502), MMMU-Pro (arXiv 2409.02813), MathVision (arXiv 2402.14804) and MathVista
(arXiv 2310.02255), asked for an answer alone or for a chain of thought. Their examples have no
evidence: they are answered, not scored.

Columns and files are as published on the hub under the names of `BENCHMARKS`, learned from the data
cards and the benchmarks' own evaluation code, not checked against the hub here. That code and
those papers give the rules of answers too, with these differences:

- No language model reads an answer: it stands after the last "Answer:" (to the end of that line),
  else in the last \boxed{}, else after the last "answer is", else it is the whole text. MathVista
  has GPT-4 extract it.
- An answer that names no option, or several, is wrong. MMMU draws one of the options instead, and
  MathVista takes the one with the nearest text: their floor is chance, ours is 0.
- LaTeX is computed by a small evaluator of arithmetic, roots and pi, not by `latex2sympy`.

The wording of questions is the benchmarks' own; options are listed as "(A) text" in all of them.
How to answer is said in our words. Paper A does not say which configuration of MMMU-Pro, which
split and which prompts it used.
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
from mmheads.tasks import sources
from mmheads.tasks.sources import Record

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
"""Of MMMU; the answers of its test split are not published."""
PRO = ("standard (4 options)", "standard (10 options)", "vision")
"""Configurations of MMMU-Pro; in the last, question and options stand in the image."""

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
    """Examples of MMMU: college exams in 30 subjects, with up to seven images a question.

    Args:
        source: Folder with the hub's files (`Accounting/validation-*`), or name on the hub.
        subjects: Some of `SUBJECTS`; all by default.
        split: "dev" or "validation".
        mode: One of `MODES`.

    Yields:
        Examples whose answer is as `mmmu_answer` takes it; haystack is (split, subject, number).

    Raises:
        ValueError: A setting is unknown, or a record is not as published.
    """
    _expect_mode(mode)
    if split not in SPLITS[:2]:
        raise ValueError(f"split is {split!r}; expected one of {SPLITS[:2]}, which have answers")
    if unknown := [subject for subject in subjects if subject not in SUBJECTS]:
        raise ValueError(f"subjects {unknown} are unknown; expected some of {SUBJECTS}")
    columns: dict[str, Any] = dict.fromkeys(
        ("id", "question", "options", "answer", "question_type"), str
    )
    for subject in subjects or SUBJECTS:
        for record in sources.read(
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
    """Examples of MMMU-Pro, all of multiple choice.

    Args:
        source: Folder with the hub's files (`vision/test-*`), or name on the hub.
        config: One of `PRO`.
        mode: One of `MODES`.

    Yields:
        Examples whose answer is as `choice` takes it; haystack is (config, split, subject, number).

    Raises:
        ValueError: A setting is unknown, or a record is not as published.
    """
    _expect_mode(mode)
    if config not in PRO:
        raise ValueError(f"config is {config!r}; expected one of {PRO}")
    seen = config == "vision"
    columns: dict[str, Any] = {"id": str, "options": str, "answer": str}
    columns |= {"image": object} if seen else {"question": str, **_IMAGES}
    for record in sources.read(
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
    """Examples of MathVision: problems of mathematics competitions, one image each.

    A question that names several images (`<image1>`, `<image2>`) has them all in its one image,
    which then comes first, and the names stay in the text.

    Args:
        source: Folder with the hub's files (`data/test-*`), or name on the hub.
        split: "test" or "testmini".
        mode: One of `MODES`.

    Yields:
        Examples whose answer is as `mathvision_answer` takes it; haystack is (id,).

    Raises:
        ValueError: A setting is unknown, or a record is not as published.
    """
    _expect_mode(mode)
    if split not in ("test", "testmini"):
        raise ValueError(f"split is {split!r}; expected test or testmini")
    columns: dict[str, Any] = {"id": str, "question": str, "answer": str}
    columns |= {"options": list, "decoded_image": object}
    for record in sources.read(source, columns, files=f"data/{split}-*", split=split):
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
    """Examples of MathVista's split testmini; the answers of its other split are not published.

    Args:
        source: Folder with the hub's files (`data/testmini-*`), or name on the hub.
        mode: One of `MODES`.

    Yields:
        Examples whose answer is as `mathvista_answer` takes it; haystack is (pid,).

    Raises:
        ValueError: An unknown mode, or a record is not as published.
    """
    _expect_mode(mode)
    names = ("pid", "question", "answer", "question_type", "answer_type")
    columns: dict[str, Any] = dict.fromkeys(names, str) | {"decoded_image": object}
    none = type(None)
    columns |= {"choices": (list, none), "unit": (str, none), "precision": (int, float, none)}
    for record in sources.read(source, columns, files="data/testmini-*", split="testmini"):
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
    """The answer as `mathvista_answer` takes it, and its form."""
    answer, kind = record.text("answer"), record.values["answer_type"]
    if record.values["question_type"] == "multi_choice":
        choices = record.values["choices"] or []
        if answer not in choices:
            raise record.error(f"the answer {answer!r} is none of the choices {choices}")
        return ascii_uppercase[choices.index(answer)], _LETTER
    if kind == "list":
        if not _listed(answer):
            raise record.error(f"the answer {answer!r} is no list")
        return answer, "a list such as [1, 2, 3]"
    try:
        number = float(answer)
    except ValueError as error:
        raise record.error(f"the answer {answer!r} is no number; answer_type is {kind}") from error
    if kind == "integer":
        return str(int(number)), "an integer"
    places = record.values["precision"]
    if kind != "float" or not places:
        raise record.error(f"answer_type {kind!r} with precision {places}; expected float with one")
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
        task: See `Example`.
        haystack: See `Example`.
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


_CONCLUDES = re.compile(r"\banswer\b[*_\s]*:", re.IGNORECASE)
_SAYS = re.compile(r"\banswer (?:is|should be|would be|must be)\b:?", re.IGNORECASE)
_WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_CUES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBER = re.compile(
    r"(?:(?<![\w)\]}])-)?(?<![\w.^])(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:[eE][-+]?\d+)?"
)
_SHORT, _MANY = 10, 10
"""Words of an answer in which a letter alone names an option; options where none are given."""


def choice(answer: str, gold: str) -> float:
    """1 where the answer picks the gold option (MMMU, MMMU-Pro, and all multiple choice here).

    A letter at its start ("B", "(B) nine", "**B.**") picks an option; else the one letter that is
    marked so somewhere; else, in a short answer, the one capital that stands alone; else the one
    option whose text it holds. Letters given together ("A or B") pick none.

    Args:
        answer: What the model gave.
        gold: The letter, and the options as a JSON list: `B ["four", "nine"]`; or a letter alone,
            of at most ten options.

    Raises:
        ValueError: The gold answer is no letter.
    """
    letter, options = _letter(gold)
    if not letter:
        raise ValueError(f'the gold answer {gold!r} is no option; expected such as B ["four", "9"]')
    return float(_picked(answer, options) == letter)


def mmmu_answer(answer: str, gold: str) -> float:
    """MMMU's rule: an option as in `choice`, or an open answer (its `eval/eval_utils.py`).

    Of each line of an open answer counts what follows the last "is", "so", "thus", "therefore",
    "final", "answer", "result", "could be", in the last line also "=": the shortest such tail, or
    the whole where no line has one. Right is a tail that holds the gold text, or a number in it
    that equals the gold number, both rounded to two decimals. Case does not count, nor thousands
    separators. A gold text of one character must stand alone; a number with separators is read
    whole, decimals included (the published code reads them apart).

    Args:
        answer: What the model gave.
        gold: As in `choice`, with options; or a text, or several as a JSON list.
    """
    if _letter(gold)[1]:
        return choice(answer, gold)
    tails = _tails(_final(answer))
    numbers = {round(number, 2) for tail in tails for number in _numbers(tail)}
    return float(any(_holds(tails, numbers, each) for each in _golds(gold)))


def mathvista_answer(answer: str, gold: str) -> float:
    """MathVista's rule (its `evaluation/calculate_score.py`), without GPT-4.

    An option as in `choice`. An integer: equal, decimals of the answer cut off. A float: equal
    after rounding to the decimals of the gold answer. A list: equal in number, order and value.
    Where the answer holds several numbers, the first after "Answer:" counts, or the last of all if
    there is no such mark; fractions and LaTeX are computed, numbers in words are not read.

    Args:
        answer: What the model gave.
        gold: As in `choice`, with options; an integer; a number with as many decimals as count; or
            a JSON list.

    Raises:
        ValueError: The gold answer is none of them.
    """
    if _letter(gold)[0]:
        return choice(answer, gold)
    if (wanted := _items(gold)) is not None:
        given = _items(_final(answer))
        return float(
            given is not None
            and len(given) == len(wanted)
            and all(_same(a, b) for a, b in zip(given, wanted, strict=True))
        )
    if not _NUMBER.fullmatch(gold):
        raise ValueError(f"the gold answer {gold!r} is no option, number or JSON list")
    value, places = _value(answer), len(gold.partition(".")[2])
    if value is None:
        return 0.0
    if not places:
        return float(int(value) == int(gold))
    return float(round(value, places) == round(float(gold), places))


def mathvision_answer(answer: str, gold: str) -> float:
    """MathVision's rule (its `evaluation/utils.py`): the same option, value or text.

    An option as in `choice`, or an answer equal to what the gold option says. Values are equal
    after rounding to two decimals, of tuples one by one; texts after removing LaTeX's spacing,
    degrees, units and white space. Beyond the published rule, a number in a sentence is found, as
    in `mathvista_answer`.

    Args:
        answer: What the model gave.
        gold: As in `choice`; or an expression or text.
    """
    letter, options = _letter(gold)
    if letter:
        if picked := _picked(answer, options):
            return float(picked == letter)
        gold = options[ascii_uppercase.index(letter)] if options else letter
    final = _final(answer)
    given, wanted = _items(final), _items(gold)
    if given is not None and wanted is not None and len(given) == len(wanted) > 1:
        return float(all(_same(a, b) for a, b in zip(given, wanted, strict=True)))
    value = _value(answer) if _is_sentence(final) else _evaluated(final)
    if (right := _evaluated(gold)) is not None and value is not None:
        return float(round(value, 2) == round(right, 2))
    return float(bool(final) and _plain(final) == _plain(gold))


def chance(examples: Iterable[Example]) -> float:
    """Mean score of random options: 0 where a question offers none.

    Raises:
        ValueError: No example.
    """
    rates = [1 / len(example.choices) if example.choices else 0.0 for example in examples]
    if not rates:
        raise ValueError("no example; expected one or more")
    return math.fsum(rates) / len(rates)


def _letter(gold: str) -> tuple[str, list[str]]:
    """Letter and options of a gold answer, as far as it has them."""
    found = re.fullmatch(r"([A-Z])(?: (\[.*\]))?", gold.strip(), re.DOTALL)
    if not found:
        return "", []
    try:
        options = json.loads(found[2] or "[]")
    except json.JSONDecodeError:
        return "", []
    inside = found[1] in ascii_uppercase[: len(options) or _MANY]
    return (found[1], [str(option) for option in options]) if inside else ("", [])


def _conclusion(answer: str) -> str | None:
    """What stands after the mark of a final answer; None without a mark."""
    text: str | None = None
    if marks := list(_CONCLUDES.finditer(answer)):
        lines = answer[marks[-1].end() :].splitlines()
        text = next((line for line in lines if re.search(r"\w", line)), "")
    if (box := (answer if text is None else text).rfind("oxed{")) >= 0:
        return _braced((answer if text is None else text)[box + len("oxed{") :])
    if text is None and (marks := list(_SAYS.finditer(answer))):
        said = answer[marks[-1].end() :].strip().partition("\n")[0]
        text = re.split(r"(?<!\b[A-Z])\.\s", said)[0]
    return text


def _braced(text: str) -> str:
    """Up to the brace that closes."""
    depth = 1
    for index, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if not depth:
            return text[:index]
    return text


def _final(answer: str) -> str:
    """The final answer, without the marks of Markdown and a full stop at its end."""
    text = _conclusion(answer)
    text = _WRAPPED.sub(r"\1", answer if text is None else text).replace("\N{MINUS SIGN}", "-")
    return text.strip().strip("*_`\"' ").removesuffix(".").strip("*_`\"' ")


def _picked(answer: str, options: Sequence[str]) -> str:
    """The letter of the option that an answer picks, or ""."""
    text = _final(answer)
    letters = ascii_uppercase[: len(options) or _MANY]
    if found := re.fullmatch(r"\W*([a-z])\W*", text):
        return found[1].upper() if found[1].upper() in letters else ""
    one = rf"[(\[*]*\b[{letters}]\b[)\]*]*"
    several = rf"{one}(?:\s*(?:,\s*(?:and|or)?|/|&|\band\b|\bor\b)\s*{one})+"
    alone = re.sub(several, " ", text)
    end = r"(?:\s*$|[.,):\]*_$\"'`\\]|\s*\n|\s+[-\N{EN DASH}\N{EM DASH}]\s)"
    if alone == text and (found := re.match(rf"[\W_]*([{letters}]){end}", text)):
        return found[1]
    marked = rf"(?:[(\[{{]|\*\*|(?<!\S))([{letters}])(?:[)\]}}.:]|\*\*)(?=\W|$)"
    article = r"(?!(?:A|I)\s+(?!(?:is|as|because|since)\b)[a-z])"
    bare = rf"(?<![\w'.]){article}([{letters}])(?![\w'])"
    for pattern in (marked, bare) if len(text.split()) <= _SHORT else (marked,):
        if len(found_letters := set(re.findall(pattern, alone))) == 1:
            return str(found_letters.pop())
    return _told(text, options)


def _told(text: str, options: Sequence[str]) -> str:
    """The letter of the one option whose text stands in a text, or ""; the longer text wins."""
    text = _spaced(text)
    told = {
        _spaced(option): letter
        for letter, option in zip(ascii_uppercase, options, strict=False)
        if re.search(
            rf"(?<![\w.+*/^{{\\-]){re.escape(_spaced(option))}(?!\w|\.\d|\s*[}}+*/^])", text
        )
    }
    longest = [o for o in told if o and not any(o != other and o in other for other in told)]
    return told[longest[0]] if len(longest) == 1 else ""


def _spaced(text: str) -> str:
    return " ".join(_WRAPPED.sub(r"\1", text).replace("$", " ").lower().split())


def _tails(text: str) -> list[str]:
    lines = [line for line in text.lower().splitlines() if line.strip()]
    tails = []
    for number, line in enumerate(lines, 1):
        cues = (*_CUES, "=") if number == len(lines) else _CUES
        ends = [line.rpartition(cue)[2].strip() for cue in cues if cue in line]
        if ends and re.search(r"\w", shortest := min(ends, key=len)):
            tails.append(shortest)
    return tails or [text.lower()]


def _golds(gold: str) -> list[str]:
    try:
        golds = json.loads(gold)
    except json.JSONDecodeError:
        return [gold]
    return [str(each) for each in golds] if isinstance(golds, list) else [gold]


def _holds(tails: Sequence[str], numbers: set[float], gold: str) -> bool:
    gold = gold.strip().lower()
    if _NUMBER.fullmatch(gold):
        return round(float(gold.replace(",", "")), 2) in numbers
    if len(gold) == 1:
        return any(re.search(rf"(?<!\w){re.escape(gold)}(?!\w)", tail) for tail in tails)
    return bool(gold) and any(gold in tail for tail in tails)


def _numbers(text: str) -> list[float]:
    values = (float(number.replace(",", "")) for number in _NUMBER.findall(text))
    return [value for value in values if math.isfinite(value)]


def _is_sentence(text: str) -> bool:
    """Whether a number in a text can be what it says: it has words, and no term such as 2a."""
    return bool(re.search(r"(?<!\\)\b[A-Za-z]{3}", text)) and not re.search(r"\d ?[A-Za-z]\b", text)


def _value(answer: str) -> float | None:
    """The number that an answer gives: computed whole, or found in it."""
    text = _final(answer)
    if (value := _evaluated(text)) is not None:
        return value
    numbers = _numbers(re.split(r"=|\\approx|\N{ALMOST EQUAL TO}", text)[-1].replace("{,}", ","))
    if not numbers:
        return None
    return numbers[-1] if _conclusion(answer) is None else numbers[0]


def _items(text: str) -> list[str] | None:
    """The items of the last list or tuple in a text, None where it has neither."""
    found = re.findall(r"[\[(]([^\[\]()]*)[\])]", text)
    return [item.strip(" \"'") for item in found[-1].split(",")] if found else None


def _same(given: str, wanted: str) -> bool:
    a, b = _evaluated(given), _evaluated(wanted)
    return _plain(given) == _plain(wanted) if a is None or b is None else round(a - b, 2) == 0


_DROPPED = re.compile(
    r"\\left|\\right|\\displaystyle|\\[!,;: ]|\\[()\[\]]|\^\{?\\circ\}?|\\?[%$]|[°€£~]"
)
_WRITTEN = (
    *(
        ("\N{MINUS SIGN}", "-"),
        ("\\times", "*"),
        ("\\cdot", "*"),
        ("\N{MULTIPLICATION SIGN}", "*"),
        ("·", "*"),
    ),
    *(("\\div", "/"), ("÷", "/"), ("√", "\\sqrt"), ("dfrac", "frac"), ("tfrac", "frac")),
    *(("\\pi", "π"), ("{,}", ","), ("\\,", ""), ("\\!", "")),
)
_UNIT = re.compile(
    r"(?<=[\d)}\s])(?:square |cubic )?(?:[mcdk]?m|m?g|kg|m?l|s|h|min(?:ute)?s?|hours?|days?|years?"
    r"|degrees?|units?|dollars?|euros?|cents?|percent|lit(?:er|re)s?)\s*(?:\^?\{?[23]\}?|[²³])?\s*$"
)
_ATOM = r"(?:\{([^{}]*)\}|(\d))"
_MIXED = re.compile(r"(?<![\w.])(\d+)\s*\\frac\s*\{(\d+)\}\s*\{(\d+)\}")
_FRACTION = re.compile(rf"\\frac\s*{_ATOM}\s*{_ATOM}")
_ROOT = re.compile(rf"\\sqrt\s*(?:\[(\d+)\])?\s*{_ATOM}")
_POWER = re.compile(rf"\^\s*{_ATOM}")
_LONGEST, _GREATEST = 120, 1e6
"""Characters of an expression, and the greatest base of a power, that are computed."""


def _cleaned(text: str) -> str:
    """An expression without LaTeX's spacing, degrees, currency, units, and what it is equal to."""
    text = _WRAPPED.sub(r" \1 ", text.strip())
    for old, new in _WRITTEN:
        text = text.replace(old, new)
    text = re.split(r"=|\\approx|\N{ALMOST EQUAL TO}", _DROPPED.sub(" ", text))[-1]
    return _UNIT.sub("", text.strip().rstrip("."))


def _plain(text: str) -> str:
    text = re.sub(r"\s", "", _cleaned(text)).lower()
    return re.sub(r"^[({\[](.)[)}\]]$", r"\1", text)


def _evaluated(text: str) -> float | None:
    """The value of an expression of numbers, fractions, roots, powers and pi; None of any other."""
    text = _cleaned(text)
    if len(text) > _LONGEST:
        return None
    text = _MIXED.sub(r"(\1+\2/\3)", text)
    before = ""
    while text != before:
        before = text
        text = _ROOT.sub(lambda m: f"(({m[2] or m[3]})**(1/{m[1] or 2}))", text)
        text = _FRACTION.sub(lambda m: f"(({m[1] or m[2]})/({m[3] or m[4]}))", text)
        text = _POWER.sub(lambda m: f"**({m[1] or m[2]})", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text).replace("π", f"({math.pi})")
    text = re.sub(r"(?<=[\d)])\s*(?=\()|(?<=\))\s*(?=\d)", "*", text.strip())
    if not re.fullmatch(r"[\d.+\-*/() eE]+", text):
        return None
    try:
        value = _computed(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, TypeError, MemoryError, RecursionError):
        return None
    return value if math.isfinite(value) else None


def _computed(node: ast.expr) -> float:
    match node:
        case ast.Constant(value=int() | float() as value):
            return float(value)
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
            return -_computed(operand) if isinstance(sign, ast.USub) else _computed(operand)
        case ast.BinOp(left=left, op=operation, right=right):
            a, b = _computed(left), _computed(right)
            match operation:
                case ast.Add():
                    return a + b
                case ast.Sub():
                    return a - b
                case ast.Mult():
                    return a * b
                case ast.Div():
                    return a / b
                case ast.Pow() if abs(a) <= _GREATEST and abs(b) <= 100:
                    return math.pow(a, b)
    raise ValueError(f"{ast.dump(node)} is no arithmetic")


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A data set to ask.

    Attributes:
        load: Reads it: (source, mode=..., further settings).
        metric: What its answers are worth.
        hub: Its name on the hub.
    """

    load: Callable[..., Iterator[Example]]
    metric: Metric
    hub: str


BENCHMARKS: Mapping[str, Benchmark] = {
    "mmmu": Benchmark(load=mmmu, metric=mmmu_answer, hub="MMMU/MMMU"),
    "mmmu_pro": Benchmark(load=mmmu_pro, metric=choice, hub="MMMU/MMMU_Pro"),
    "mathvision": Benchmark(load=mathvision, metric=mathvision_answer, hub="MathLLMs/MathVision"),
    "mathvista": Benchmark(load=mathvista, metric=mathvista_answer, hub="AI4Math/MathVista"),
}
"""Their chance level depends on the examples: see `chance`."""


def read(
    name: str,
    source: str | Path = "",
    *,
    mode: str = "direct",
    limit: int | None = None,
    **settings: Any,
) -> list[Example]:
    """First examples of a benchmark.

    Args:
        name: One of `BENCHMARKS`.
        source: Folder with the hub's files; by default the hub.
        mode: One of `MODES`.
        limit: How many; by default all.
        settings: Of the benchmark's own function (subjects, split, config).

    Raises:
        ValueError: An unknown name, a limit below 1, or as that function does.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"benchmark is {name!r}; expected one of {', '.join(BENCHMARKS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; expected 1 or more, or None for all")
    benchmark = BENCHMARKS[name]
    return list(islice(benchmark.load(source or benchmark.hub, mode=mode, **settings), limit))
