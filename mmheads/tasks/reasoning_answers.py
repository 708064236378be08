"""What the answers to the reasoning benchmarks are worth: the rules of `mmheads.tasks.reasoning`.

Expressions are compared by `math-verify`.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any

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
    """Return 1 if the answer picks the gold option, else 0 (MMMU, MMMU-Pro, all multiple choice).

    The first of these that the answer has picks the option: a letter at its start ("B", "(B) nine",
    "**B.**"); the only letter that is marked like this anywhere; in a short answer, the only
    capital letter that is a word of its own; the only option whose text is in the answer. Letters
    that are given together ("A or B") pick no option.

    Args:
        answer: What the model answered.
        gold: The letter and the options as a JSON list, such as `B ["four", "nine"]`; or only the
            letter, for at most ten options.

    Raises:
        ValueError: The gold answer is not a letter of an option.
    """
    letter, options = _letter(gold)
    if not letter:
        raise ValueError(
            f'the gold answer {gold!r} is not an option; expected one such as B ["four", "9"]'
        )
    return float(_picked(answer, options) == letter)


def mmmu_answer(answer: str, gold: str) -> float:
    """Return MMMU's score of an answer: an option as in `choice`, or an open answer.

    In each line of an open answer, the shortest text after one of the words "is", "so", "thus",
    "therefore", "final", "answer", "result" or "could be" (in the last line also after "=")
    counts; without any such word, the whole answer counts. The answer is right if such a text
    contains the gold text, or a number that equals the gold number after both are rounded to two
    decimals. Upper and lower case and thousands separators do not matter. A gold text of one
    character must be a word of its own. Unlike in the published code (`eval/eval_utils.py`), a
    number with thousands separators is read together with its decimals.

    Args:
        answer: What the model answered.
        gold: As in `choice`, with options; or a text; or several texts as a JSON list.
    """
    if _letter(gold)[1]:
        return choice(answer, gold)
    tails = _tails(_final(answer))
    numbers = {round(number, 2) for tail in tails for number in _numbers(tail)}
    return float(any(_holds(tails, numbers, each) for each in _golds(gold)))


def mathvista_answer(answer: str, gold: str) -> float:
    """Return MathVista's score of an answer (`evaluation/calculate_score.py`), without GPT-4.

    An option counts as in `choice`. An integer must equal the answer without its decimals, a float
    the answer rounded to the decimals of the gold answer, and a list the answer in number, order
    and value of the items. If the answer holds several numbers, the first one after "Answer:"
    counts, or the last of all if "Answer:" is missing. Fractions and LaTeX are computed; numbers
    written as words are not read.

    Args:
        answer: What the model answered.
        gold: As in `choice`, with options; an integer; a number with as many decimals as count; or
            a JSON list.

    Raises:
        ValueError: The gold answer has none of these forms.
    """
    if _letter(gold)[0]:
        return choice(answer, gold)
    if (gold_items := _items(gold)) is not None:
        given = _items(_final(answer))
        return float(
            given is not None
            and len(given) == len(gold_items)
            and all(_same(a, b) for a, b in zip(given, gold_items, strict=True))
        )
    if not _NUMBER.fullmatch(gold):
        raise ValueError(f"the gold answer {gold!r} is not an option, number or JSON list")
    value, places = _value(answer), len(gold.partition(".")[2])
    if value is None:
        return 0.0
    if not places:
        return float(int(value) == int(gold))
    return float(round(value, places) == round(float(gold), places))


def mathvision_answer(answer: str, gold: str) -> float:
    """Return MathVision's score of an answer (`evaluation/utils.py`): same option, value or text.

    An option counts as in `choice`; an answer that equals the text of the gold option counts as
    well. Values must be equal after rounding to two decimals, and texts after LaTeX's spacing,
    degrees, units and white space are removed. Unlike in the published rule, a number in a
    sentence is found as in `mathvista_answer`, and expressions with variables are compared.

    Args:
        answer: What the model answered.
        gold: As in `choice`; or an expression or a text.
    """
    letter, options = _letter(gold)
    if letter:
        if picked := _picked(answer, options):
            return float(picked == letter)
        gold = options[ascii_uppercase.index(letter)] if options else letter
    final = _final(answer)
    if _is_sentence(final) and (value := _value(answer)) is not None:
        final = str(value)
    return float(bool(final) and _same(final, gold))


def _letter(gold: str) -> tuple[str, list[str]]:
    """Letter and options of a gold answer; empty where it lacks them."""
    match = re.fullmatch(r"([A-Z])(?: (\[.*\]))?", gold.strip(), re.DOTALL)
    if not match:
        return "", []
    try:
        options = json.loads(match[2] or "[]")
    except json.JSONDecodeError:
        return "", []
    inside = match[1] in ascii_uppercase[: len(options) or _MANY]
    return (match[1], [str(option) for option in options]) if inside else ("", [])


def _conclusion(answer: str) -> str | None:
    """The text after the mark of a final answer, such as "Answer:"; None without a mark."""
    text: str | None = None
    if marks := list(_CONCLUDES.finditer(answer)):
        lines = answer[marks[-1].end() :].split("\n")
        text = next((line for line in lines if re.search(r"\w", line)), "")
    if (box := (answer if text is None else text).rfind("oxed{")) >= 0:
        return _braced((answer if text is None else text)[box + len("oxed{") :])
    if text is None and (marks := list(_SAYS.finditer(answer))):
        said = answer[marks[-1].end() :].strip().partition("\n")[0]
        text = re.split(r"(?<!\b[A-Z])\.\s", said)[0]
    return text


def _braced(text: str) -> str:
    """The text up to the brace that closes it."""
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
    if match := re.fullmatch(r"\W*([a-z])\W*", text):
        return match[1].upper() if match[1].upper() in letters else ""
    one = rf"[(\[*]*\b[{letters}]\b[)\]*]*"
    several = rf"{one}(?:\s*(?:,\s*(?:and|or)?|/|&|\band\b|\bor\b)\s*{one})+"
    alone = re.sub(several, " ", text)
    end = r"(?:\s*$|[.,):\]*_$\"'`\\]|\s*\n|\s+[-\N{EN DASH}\N{EM DASH}]\s)"
    if alone == text and (match := re.match(rf"[\W_]*([{letters}]){end}", text)):
        return match[1]
    marked = rf"(?:[(\[{{]|\*\*|(?<!\S))([{letters}])(?:[)\]}}.:]|\*\*)(?=\W|$)"
    article = r"(?!(?:A|I)\s+(?!(?:is|as|because|since)\b)[a-z])"
    bare = rf"(?<![\w'.]){article}([{letters}])(?![\w'])"
    for pattern in (marked, bare) if len(text.split()) <= _SHORT else (marked,):
        if len(found_letters := set(re.findall(pattern, alone))) == 1:
            return str(found_letters.pop())
    return _told(text, options)


def _told(text: str, options: Sequence[str]) -> str:
    """The letter of the only option whose text is in a text, or ""; a longer option wins."""
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
    lines = [line for line in text.lower().split("\n") if line.strip()]
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
    """Whether a text has words, and no term such as 2a: its value is then the number in it."""
    return bool(re.search(r"(?<!\\)\b[A-Za-z]{3}", text)) and not re.search(r"\d ?[A-Za-z]\b", text)


def _value(answer: str) -> float | None:
    """The number that an answer gives: the value of an expression, or a number in a sentence."""
    text = _final(answer)
    if (value := _evaluated(text)) is not None:
        return value
    numbers = _numbers(_EQUALS.split(text)[-1].replace("{,}", ","))
    if not numbers:
        return None
    return numbers[-1] if _conclusion(answer) is None else numbers[0]


def _items(text: str) -> list[str] | None:
    """The items of the last list or tuple in a text, None where it has neither."""
    lists = re.findall(r"[\[(]([^\[\]()]*)[\])]", text)
    return [item.strip(" \"'") for item in lists[-1].split(",")] if lists else None


_EQUALS = re.compile(r"=|\\approx|\N{ALMOST EQUAL TO}")
_UNIT = re.compile(
    r"(?<=[\d)}\s])(?:square |cubic )?(?:[mcdk]?m|m?g|kg|m?l|s|h|min(?:ute)?s?|hours?|days?|years?"
    r"|degrees?|units?|dollars?|euros?|cents?|percent|lit(?:er|re)s?)\s*(?:\^?\{?[23]\}?|[²³])?\s*$"
)
_SIGNS = re.compile(r"\\?[%$]|[°€£~]|\^\{?\\circ\}?|\\[()\[\]]|\\[!,;: ]|\\left|\\right")
_LONGEST, _SECONDS = 200, 5
"""Characters of an expression that is computed, and how long that may take."""
_ENDLESS = re.compile(
    r"\^\s*\{[^{}]*[\^!]|\^\s*\d+\s*\^|\^\s*\{?\s*-?\d{4}|!\s*\)*\s*!|\\(?:sum|prod|int|lim)"
)
"""Towers of powers, and what else is not computed because it may never end."""


def _cleaned(text: str) -> str:
    """An expression without currency, degrees, percent signs, a unit, and what it is equal to."""
    text = _SIGNS.sub(" ", _WRAPPED.sub(r" \1 ", text.replace("{,}", ",").replace("**", "^")))
    return _UNIT.sub("", _EQUALS.split(text)[-1].strip().rstrip("."))


def _plain(text: str) -> str:
    text = re.sub(r"\s", "", _cleaned(text)).lower()
    return re.sub(r"^[({\[](.)[)}\]]$", r"\1", text)


def _same(given: str, gold: str) -> bool:
    """Whether two texts are the same, or expressions that are equal to two decimals."""
    if _plain(given) == _plain(gold):
        return True
    from math_verify import verify  # Loading sympy takes seconds, and few commands need it.

    return bool(
        verify(_parsed(gold), _parsed(given), float_rounding=2, timeout_seconds=_time_limit())
    )


def _evaluated(text: str) -> float | None:
    """The value of an expression, None if it holds a variable or is not an expression."""
    from math_verify.errors import TimeoutException
    from math_verify.utils import timeout

    try:
        number = timeout(_time_limit())(float)(_parsed(text)[0])
    except (IndexError, TypeError, ValueError, ArithmeticError, TimeoutException):
        return None
    return number if math.isfinite(number) else None


def _parsed(text: str) -> list[Any]:
    """An expression of sympy and its text; nothing for a text that is not an expression."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    text = _cleaned(text)
    if len(text) > _LONGEST or _ENDLESS.search(text):
        return []
    # Units are removed above: math-verify would also take the variables of "2 a b" for units.
    settings = NormalizationConfig(units=False, malformed_operators=True, nits=True)
    config = LatexExtractionConfig(normalization_config=settings)
    return list(parse(f"${text}$", [config], parsing_timeout=_time_limit()))


def _time_limit() -> int | None:
    """Seconds for an expression; math-verify can only stop itself in the main thread."""
    return _SECONDS if threading.current_thread() is threading.main_thread() else None
