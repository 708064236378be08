"""Ask a pretrained text model real questions about real documents, whole and without heads.

python -m cluster.real_questions [MODEL.gguf] [--questions N]

The questions are those of MMDocIR whose answer stands in the text that the model reads: the
beginnings of the gold page and of the pages before and after it. Heads and random sets are those of
`cluster.real_model`, which were found on needles; each question is asked with another random set.
Answers are kept in `runs` and shipped by `python -m cluster.ship`; what is interrupted goes on from
there. The order of the questions is random, so that the first ones stand for all.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cluster import real_model as plan
from cluster.real_documents import documents, texts_of
from mmheads import answers
from mmheads.examples import Example, Region
from mmheads.metrics import normalised
from mmheads.scores import HeadScores
from mmheads.tasks.mmdocir import AnnotatedDocument, Question
from mmheads.tasks.mmlongbench_docs import question_answer

if TYPE_CHECKING:
    from mmheads.models import VLM

TASK = "real-questions"
INSTRUCTION = "\nAnswer as concisely as you can, with a phrase or a sentence."
"""MMLongBench's without its offer to say 'Not answerable', which this model took up when whole."""
LEAST = 3
"""Characters of an answer; shorter ones ("2") would stand in many texts by chance."""
QUESTIONS = 60
NEW_TOKENS = 32
SHARES = (0.05, 0.1)
"""Shares of heads that are ablated."""
SHARE_OF_RANDOM = 0.05
"""Share of the random sets, another one for each question."""


def examples() -> list[Example]:
    """Returns the questions that can be asked, in random order.

    Raises:
        ValueError: The documents are not at hand.
    """
    found = [
        example
        for number, document in enumerate(documents())
        for place, question in enumerate(document.questions)
        if (example := _example(document, question, (number, place)))
    ]
    return [found[index] for index in np.random.default_rng(0).permutation(len(found))]


def _example(
    document: AnnotatedDocument, question: Question, which: tuple[int, int]
) -> Example | None:
    """A question with three pages; None if it has several gold pages or another answer."""
    gold = typed(question.answer)
    (page, *others), texts = question.pages, texts_of(document)
    words = normalised(gold.partition(": ")[2])
    if others or len(words) < LEAST or f" {words} " not in f" {normalised(texts[page])} ":
        return None
    shown = range(max(0, page - 1), min(page + 2, len(texts)))
    context = [f"Page {each + 1}:\n{texts[each]}\n" for each in shown]
    return Example(
        context=(*context, "Question: "),
        question=(question.text,),
        answer=gold,
        evidence=(Region(part=page - shown[0]),),
        instruction=INSTRUCTION,
        task=TASK,
        haystack=which,
    )


def typed(answer: str) -> str:
    """Returns an answer of MMDocIR as MMLongBench's rule takes it: "Integer: 204".

    The kind is that of the Python literal that the answer is; all else is a string.
    """
    try:
        value = ast.literal_eval(answer.strip())
    except (ValueError, SyntaxError):
        value = None
    kinds = {int: "Integer", float: "Float", list: "List"}
    kind = kinds.get(type(value), "String")
    return f"{kind}: {json.dumps(value) if kind == 'List' else answer.strip()}"


def answered(vlm: VLM, scores: HeadScores, asked: Sequence[Example]) -> Iterator[pd.DataFrame]:
    """Yields the answers to each question: of the whole model, and without each set of heads."""
    top = {plan.top_name(share): scores.top(share) for share in SHARES}
    name = plan.random_name(SHARE_OF_RANDOM)
    drawn = plan.random_sets(scores.top(SHARE_OF_RANDOM))
    for number, example in enumerate(asked):
        yield answers.answer(
            vlm,
            [example],
            top | {name: drawn[number]},
            max_new_tokens=NEW_TOKENS,
            metric=question_answer,
            progress=False,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    from mmheads.models import load

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--questions", type=int, default=QUESTIONS, help="how many are asked")
    options = plan.parsed(parser, arguments)
    try:
        asked = examples()[: options.questions]
        vlm = load(options.model)
        for table in answered(vlm, plan.searched(vlm), asked):
            plan.say_right(table)
    except (ValueError, OSError) as error:
        print(f"cluster.real_questions: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
