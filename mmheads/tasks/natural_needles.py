"""The four needle tasks of paper A in natural language, at any length, for any model.

A haystack is real reading matter: the shipped corpus, or a user's folder (`corpus.folder`). It is a
row of units, each a text or a page (a picture); where pages are drawn from text, the same sentences
are shown either as text or as a page. Every page has a small picture on it. The needle is a
sentence about an invented thing (text, rendered_text) or the small picture of one page (image,
identical_image).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from mmheads.checks import expect, expect_one_of
from mmheads.examples import Example, Part, Region
from mmheads.metrics import normalised
from mmheads.models import VLM
from mmheads.prompts import encode
from mmheads.tasks import corpus, inventions
from mmheads.tasks.grids import SPLITS, TASKS, Grid, check_answer
from mmheads.tasks.haystack_units import Unit, endless, fill, make_room, page_texts, text_part
from mmheads.tasks.mm_niah import needle_answer
from mmheads.tasks.rendered_pages import PICTURES, PageStyle, PictureName, draw_picture

LENGTHS = (256, 512, 1024, 2048)
"""Lengths by default, in tokens of the model."""
OPTIONS = ("A", "B", "C", "D")
BEFORE_QUESTION = "Question: "
"""Ends the context."""
INSTRUCTIONS = {
    "text": "\nAnswer in a few words.",
    "image": "\nAnswer with the letter of the right picture.",
    "rendered_text": "\nAnswer in a few words.",
    "identical_image": "\nAnswer with yes or no.",
}


@dataclass(frozen=True, eq=False)
class _Needle:
    """What is asked for, and what answers it.

    Attributes:
        question: Text and pictures.
        answer: The right answer while the needle is there.
        choices: All answers that the question allows, or none.
        sentence: The needle's sentence, or "".
        picture: The needle's picture, or None.
        options: Pictures that no page shows except for the needle.
    """

    question: tuple[Part, ...]
    answer: str
    choices: tuple[str, ...] = ()
    sentence: str = ""
    picture: PictureName | None = None
    options: tuple[PictureName, ...] = ()


@dataclass(frozen=True, eq=False)
class NaturalNeedles(Grid):
    """Makes the needle tasks; use `for_model` to get one that fits a model.

    Attributes:
        source: Texts and pages of the haystacks.
        count_tokens: Returns the number of tokens of an example's whole prompt.
        image_ratio: Share of pages among the units of a haystack, as near as whole units allow;
            a needle on a page always has a page.
        style: How pages, sentences and small pictures are drawn.
        seed: Another seed gives other haystacks and needles.
        reads_images: Whether there are the tasks with pages.
    """

    source: corpus.Source
    count_tokens: Callable[[Example], int]
    image_ratio: float = 0.5
    style: PageStyle = field(default_factory=PageStyle)
    seed: int = 0
    reads_images: bool = True
    lengths: ClassVar[Sequence[int]] = LENGTHS
    _costs: dict[object, int] = field(default_factory=dict, repr=False, init=False)

    def __post_init__(self) -> None:
        ratio = self.image_ratio
        most = 1 if self.reads_images else 0
        expected = f"a number from 0 to {most}" if most else "0, since the model reads only text"
        expect(0 <= ratio <= most, "image_ratio", ratio, expected)
        expect(self.seed >= 0, "seed", self.seed, "0 or more")

    @property
    def name(self) -> str:
        """Name of the haystacks in the results store and in the names of files."""
        seed = f"-{self.seed}" if self.seed else ""
        return f"natural-{self.source.name}-{self.image_ratio:g}{seed}"

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that the model can read."""
        return TASKS if self.reads_images else TASKS[:1]

    def count(self, task: str, length: int, split: str = "detection") -> int:
        """Number of haystacks with different needles; the same for every task and length."""
        return inventions.THINGS

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

        The same haystack and split have the same question at every length and depth, and the same
        reading matter: a longer prompt goes on where a shorter one ends. When all of it has been
        used, it comes again in another order. Where a depth would need more tokens than another,
        the last sentence may be missing. The evidence is the needle's sentence, the box of its
        lines, or the box of the small picture.

        Args:
            task: One of `tasks`.
            length: Largest number of tokens of the prompt. The next sentence (or, where a page is
                next, the next page) would not fit. Only a changed answer may add a few tokens.
            depth: Where the needle is, from 0 (start of the context) to 1 (its end): between the
                sentences nearest to this share of the context's tokens, or on the page nearest to
                it.
            haystack: Which question and haystack, from 0 to `count` - 1.
            split: One of `SPLITS`. Splits share reading matter, but no invented thing, value or
                small picture.
            needle: False takes the sentence out (text, rendered_text) or puts a different picture
                in the place of the small one (image, identical_image): then the question cannot be
                answered, or its answer is "no" (identical_image).
            answer: Make this the right answer, by changing only the needle: any text (text,
                rendered_text; `another_answer` gives one of the same kind), the letter of the
                option that is on a page (image), or whether the picture is on a page
                (identical_image). By default the seed decides, and identical_image has the needle.

        Raises:
            ValueError: A setting is unknown, out of range, or too small for the needle.
        """
        self._check(task, length, depth, haystack, split)
        allowed = {"image": OPTIONS, "identical_image": ("yes", "no")}
        check_answer(answer, allowed.get(task), task, needle=needle)
        own = self._ask(task, haystack, split, None)
        asked = self._ask(task, haystack, split, answer)

        def build(units: list[Unit], asked: _Needle, present: bool) -> Example:
            if task == "text":
                sentence = asked.sentence if present else ""
                context, region = _place_sentence(units, depth, sentence, self.style, self._cost)
            else:
                context, region = _place(units, depth, asked if present else None, self.style)
            right = "no" if task == "identical_image" and not present else asked.answer
            return Example(
                context=(*context, BEFORE_QUESTION),
                question=asked.question,
                answer=right,
                choices=asked.choices,
                evidence=(region,) if region else None,
                instruction=INSTRUCTIONS[task],
                task=task,
                length=length,
                depth=float(depth),
                haystack=(self.seed, SPLITS.index(split), haystack, int(asked.picture is not None)),
            )

        pages = int(task != "text")
        units = fill(
            self._units(pages, own, haystack, split),
            pages,
            length,
            self._cost,
            lambda units: self.count_tokens(build(units, own, True)),
        )
        return build(units, asked, needle and answer != "no")

    def another_answer(self, haystack: int, split: str = "detection") -> str:
        """A wrong answer to the question of a text haystack, of the kind of the right one."""
        given = inventions.fact(haystack, split, seed=self.seed)
        return inventions.other_answer(given, split, self.seed)

    @cached_property
    def texts(self) -> list[tuple[corpus.Paragraph, ...]]:
        """The texts of the source, cut into pieces that fill a page."""
        needle = inventions.fact(0, SPLITS[0], answer="m" * 20).sentence
        texts = page_texts(self.source.paragraphs, self.style, needle)
        expect(bool(texts), "style", self.style, "a page on which a sentence of the source fits")
        return texts

    def _check(self, task: str, length: int, depth: float, haystack: int, split: str) -> None:
        expect_one_of("task", task, self.tasks)
        expect(length >= 1, "length", length, "1 or more")
        expect(0 <= depth <= 1, "depth", depth, "a number from 0 to 1")
        expect_one_of("split", split, SPLITS)
        most = inventions.THINGS - 1
        expect(0 <= haystack <= most, "haystack", haystack, f"a number from 0 to {most}")

    def _ask(self, task: str, haystack: int, split: str, answer: str | None) -> _Needle:
        if task in ("text", "rendered_text"):
            fact = inventions.fact(haystack, split, seed=self.seed, answer=answer)
            return _Needle((fact.question,), fact.answer, sentence=fact.sentence)
        part = SPLITS.index(split)
        rng = np.random.default_rng((self.seed, part, haystack, 1))
        own = _of_split(part)
        options = tuple(own[index] for index in rng.choice(len(own), len(OPTIONS), replace=False))
        drawn = [draw_picture(option, self.style.picture) for option in options]
        right = int(rng.integers(len(OPTIONS)))
        if task == "identical_image":
            asked = ("Is this picture on one of the pages above? ", drawn[right])
            return _Needle(
                asked, answer or "yes", ("yes", "no"), picture=options[right], options=options
            )
        right = OPTIONS.index(answer) if answer else right
        question: list[Part] = ["Which of these pictures is on one of the pages above?\nA. "]
        for letter, picture in zip((*OPTIONS[1:], ""), drawn, strict=True):
            question += [picture, f"\n{letter}. "] if letter else [picture]
        return _Needle(
            tuple(question), OPTIONS[right], OPTIONS, picture=options[right], options=options
        )

    def _units(self, least: int, asked: _Needle, haystack: int, split: str) -> Iterator[Unit]:
        """The units of a haystack in order, without end; pages come first until `least`."""
        part = SPLITS.index(split)
        rng = np.random.default_rng((self.seed, part, haystack, 2))
        phase = float(rng.random())
        texts = endless(self.texts, (self.seed, part, haystack, 3))
        pages = endless(self.source.pages, (self.seed, part, haystack, 4))
        pictures = [each for each in _of_split(part) if each not in asked.options]
        drawn = 0
        for number in count(1):
            is_page = drawn < max(int(self.image_ratio * number + phase), least)
            drawn += is_page
            picture = pictures[int(rng.random() * len(pictures))]
            down, right, slot = (float(each) for each in rng.random(3))
            yield Unit(is_page, next(texts), next(pages, None), picture, (down, right, slot))

    def _cost(self, unit: Unit, step: str) -> int:
        """Tokens that a page, or a sentence with the white space before it, adds to a prompt."""
        key = (unit.page or self.style.size) if unit.is_page else step
        if key not in self._costs:
            contexts: tuple[tuple[Part, ...], ...] = (("Text.",), (f"Text.{step}",))
            if unit.is_page:
                page = Image.new("RGB", unit.draw(self.style)[0].size)
                contexts = ((page,), (page, page))
            fewer, more = (
                self.count_tokens(Example(context=context, question=("What is it?",)))
                for context in contexts
            )
            self._costs[key] = more - fewer
        return self._costs[key]


def for_model(
    vlm: VLM,
    folder: str | Path = "",
    *,
    image_ratio: float | None = None,
    style: PageStyle | None = None,
    seed: int = 0,
    dpi: int = corpus.DPI,
) -> NaturalNeedles:
    """Needles whose lengths are counted in the tokens of a model, its chat template included.

    Args:
        vlm: The model.
        folder: Where the texts, PDF files and images of the haystacks are, see `corpus.folder`; by
            default they are drawn from the shipped corpus.
        image_ratio: See `NaturalNeedles`; by default 0.5, or 0 for a model that reads only text.
        style: See `NaturalNeedles`.
        seed: See `NaturalNeedles`.
        dpi: Resolution at which PDF pages are drawn, in pixels per inch.

    Raises:
        ValueError: The folder holds nothing that can be read, or a setting is out of range.
    """
    if image_ratio is None:
        image_ratio = 0.0 if vlm.is_text_only else 0.5
    return NaturalNeedles(
        source=corpus.folder(folder, dpi=dpi) if folder else corpus.shipped(),
        count_tokens=lambda example: len(encode(vlm, example, max_tokens=sys.maxsize)),
        image_ratio=image_ratio,
        style=style or PageStyle(),
        seed=seed,
        reads_images=not vlm.is_text_only,
    )


def score(answer: str, gold: str) -> float:
    """1 for a right answer, else 0.

    The letter of an option, and yes or no, are read as `mm_niah.needle_answer` reads them. Of any
    other gold answer, all words must be in the answer, as whole words and in any order; case and
    punctuation do not count.
    """
    if gold in (*OPTIONS, "yes", "no"):
        return needle_answer(answer, gold)
    return float(set(normalised(gold).split()) <= set(normalised(answer).split()))


def _place(
    units: list[Unit], depth: float, asked: _Needle | None, style: PageStyle
) -> tuple[list[Part], Region | None]:
    """The context of some units with a needle on a page, if there is one, and where it is."""
    units = list(units)
    position = make_room(units, depth)
    context: list[Part] = []
    region = None
    for index, unit in enumerate(units):
        if not unit.is_page:
            context.append(text_part(unit.steps)[0])
        elif asked is None or index != position:
            context.append(unit.draw(style)[0])
        else:
            unit = replace(unit, picture=asked.picture or unit.picture)
            image, picture, lines = unit.draw(style, asked.sentence)
            context.append(image)
            region = Region(part=index, box=picture if asked.picture else lines)
    return context, region


def _place_sentence(
    units: list[Unit],
    depth: float,
    sentence: str,
    style: PageStyle,
    cost: Callable[[Unit, str], int],
) -> tuple[list[Part], Region | None]:
    """The context with a sentence where the share `depth` of its tokens is before it."""
    steps = [(index, at) for index, unit in enumerate(units) for at in range(len(unit.steps))]
    costs = [cost(units[index], units[index].steps[at]) for index, at in steps]
    ends = np.cumsum([0, *costs])
    before = int(np.abs(ends - depth * ends[-1]).argmin())
    if before and not units[steps[before - 1][0]].is_page:
        target, last = steps[before - 1]
        position = last + 1
    else:
        target, position = steps[before] if before < len(steps) else (len(units), 0)
        if target == len(units) or units[target].is_page:  # Between pages: a text of its own.
            units = [*units[:target], Unit(is_page=False), *units[target:]]
    context: list[Part] = []
    region = None
    for index, unit in enumerate(units):
        if unit.is_page:
            context.append(unit.draw(style)[0])
            continue
        text, chars = text_part(unit.steps, sentence if index == target else "", position)
        if chars:
            region = Region(part=len(context), chars=chars)
        context += [text] if text.strip() else []
    return context, region


def _of_split(part: int) -> list[PictureName]:
    """The small pictures of one split."""
    order = np.random.default_rng(0).permutation(len(PICTURES))
    return [PICTURES[index] for index in order[part :: len(SPLITS)]]
