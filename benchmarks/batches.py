"""Measures what batches and shared layers save: examples scored, and ablations answered."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from benchmarks.timing import compare, conditions, show_seconds
from mmheads.answers import answer, stacked
from mmheads.attention import ablate, record_mass
from mmheads.controls import random_controls
from mmheads.examples import Example
from mmheads.heads import HeadSet
from mmheads.models import VLM
from mmheads.prefix import on_device, prefill
from mmheads.prompts import encode, null_question, shuffled_question
from mmheads.scoring import score_heads
from mmheads.tasks.needles import GENERATED

MODEL = "tiny-qwen3-vl-m"
DRAWS = 5
"""Random sets per prompt, as in notebook 05."""
LONG = 1024
"""Tokens of a prompt from which fewer are scored, and none are answered."""
ANSWER_TOKENS = 2
"""Generated tokens per answer: the answer and the end."""
ROW_TOKENS = 2048
"""Prompt tokens per batch where rows share nothing: on a CPU, larger ones are slower."""
PASSES = "scoring, a pass of the model for each question"
ONE_BY_ONE, BATCHED = "scoring, context once, one question at a time", "scoring in batches"
SINGLE = "ablations, one at a time"
ROWS, SHARED = "ablations in batches of rows", "ablations that share images and layers"


def measure_batches(vlm: VLM, lengths: Sequence[int], *, repeats: int) -> pd.DataFrame:
    """Returns the time of scoring and of ablation with and without batches, one row per variant.

    Scoring: 24 examples of the four needle tasks (4 from `LONG` tokens on), each with its question,
    the null question and the shuffled question. With nothing shared, each of them is a pass of the
    model over a prompt that is encoded anew; the other variants run a context once. Ablations, of
    shorter prompts alone: the answers of 4 prompts by the full model, without the 5% of the heads
    with the highest score, without as many random heads of the same layers (`DRAWS` sets), and
    without the lowest ones. Both include the encoding of prompts.
    The column `times_faster` compares a variant with the first of its kind, and `difference` is the
    largest difference of the last variant's scores from it, or the share of answers that differ.

    Args:
        vlm: A model that reads the generated needles.
        lengths: Prompt lengths in tokens.
        repeats: Number of timed turns.
    """
    tables = []
    for length in tqdm(lengths, desc="batches", leave=False):
        depths, haystacks = ((0.0, 0.5, 1.0), 2) if length < LONG else ((0.5,), 1)
        examples = list(GENERATED.generate((), [length], depths, haystacks=haystacks))
        batched = partial(score_heads, vlm, examples, null_images="pixels", progress=False)
        scores = batched()
        scoring: dict[str, Callable[[], object]] = {
            PASSES: partial(_scores_by_passes, vlm, examples),
            ONE_BY_ONE: partial(_scores_one_by_one, vlm, examples),
            BATCHED: batched,
        }
        difference = float(np.abs(scores.values - _scores_by_passes(vlm, examples)).max())
        tables.append(_compared(length, scoring, repeats, difference))
        if length >= LONG:
            continue
        top = scores.top(0.05)
        sets = {
            "top": [top],
            "random": random_controls(top, scores.eligible, draws=DRAWS, seed=0, match="layer"),
            "bottom": [scores.bottom(len(top))],
        }
        asked = examples[::6]
        answering: dict[str, Callable[[], list[str]]] = {
            SINGLE: partial(_answers_in_rows, vlm, asked, sets, row_tokens=1),
            ROWS: partial(_answers_in_rows, vlm, asked, sets),
            SHARED: partial(_answers, vlm, asked, sets),
        }
        pairs = zip(answering[SINGLE](), answering[SHARED](), strict=True)
        unequal = float(np.mean([one != other for one, other in pairs]))
        tables.append(_compared(length, answering, repeats, unequal))
    result = pd.concat(tables, ignore_index=True)
    return result.assign(**conditions(vlm, repeats), threads=torch.get_num_threads())


def _compared(
    length: int, variants: Mapping[str, Callable[[], object]], repeats: int, difference: float
) -> pd.DataFrame:
    """Times of variants, and how far the results of the last are from those of the first."""
    table = compare(variants, repeats=repeats, device="cpu")
    table["times_faster"] = table["seconds"][0] / table["seconds"]
    table["difference"] = [np.nan] * (len(table) - 1) + [difference]
    table.insert(0, "tokens", length)
    return table


def _scores_by_passes(vlm: VLM, examples: Iterable[Example]) -> np.ndarray:
    """Calibrated scores [example, layer, head], each question a prompt and a pass of its own."""
    scores = []
    for example in examples:
        others = null_question(example.question), shuffled_question(example.question, 0)
        means = []
        for question in (example.question, *others):
            prompt = encode(vlm, dataclasses.replace(example, question=question))
            rows = torch.from_numpy(prompt.question)[None]
            weights = torch.from_numpy(prompt.weights(prompt.evidence))[None, :, None]
            with torch.no_grad(), record_mass(vlm, rows, weights) as recording:
                vlm.model(**on_device(vlm, prompt.inputs), use_cache=False, logits_to_keep=1)
            means.append(recording.mass(vlm.geometry.layers)[0, ..., 0].mean(dim=2))
        scores.append((means[0] - means[1]).numpy())
    return np.stack(scores)


def _scores_one_by_one(vlm: VLM, examples: Iterable[Example]) -> np.ndarray:
    """Calibrated scores [example, layer, head], each question a pass of its own."""
    scores = []
    for example in examples:
        others = null_question(example.question), shuffled_question(example.question, 0)
        prompt = encode(vlm, example, questions=others)
        prefix = prefill(vlm, prompt)
        own, null, _ = (
            prefix.attention(question, [question.weights(question.evidence)])
            for question in prompt.questions
        )
        scores.append((own.mass.mean(dim=2) - null.mass.mean(dim=2))[..., 0].numpy())
    return np.stack(scores)


@torch.no_grad()
def _answers_in_rows(
    vlm: VLM,
    examples: Iterable[Example],
    sets: Mapping[str, Sequence[HeadSet]],
    row_tokens: int = ROW_TOKENS,
) -> list[str]:
    """Answers in batches in which every row runs through the whole model."""
    heads = [HeadSet((), vlm.geometry, vlm.model_id), *(one for of in sets.values() for one in of)]
    texts: list[str] = []
    for example in examples:
        prompt = encode(vlm, example)
        count = max(1, row_tokens // len(prompt))
        for first in range(0, len(heads), count):
            rows = heads[first : first + count]
            inputs = on_device(vlm, stacked([prompt] * len(rows)))
            with ablate(vlm, rows):
                tokens = vlm.model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
            new = tokens[:, inputs["input_ids"].shape[1] :]
            texts += vlm.tokenizer.batch_decode(new, skip_special_tokens=True)
    return texts


def _answers(
    vlm: VLM, examples: Sequence[Example], sets: Mapping[str, Sequence[HeadSet]]
) -> list[str]:
    settings: dict[str, Any] = {"max_new_tokens": ANSWER_TOKENS, "folder": None, "progress": False}
    table = answer(vlm, examples, sets, **settings)
    rows = [("full model", 0), *((name, i) for name, of in sets.items() for i in range(len(of)))]
    texts = table.set_index(["example", "ablation", "draw"])["prediction"]
    return [str(texts[(index, *row)]) for index, row in product(range(len(examples)), rows)]


def show_batches(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the table of `measure_batches` with rounded numbers and their units."""
    return pd.DataFrame(
        {
            "tokens": table["tokens"],
            "variant": table["variant"],
            "time, s": show_seconds(table),
            "times faster": table["times_faster"].map("{:.2f}".format),
            "largest difference": table["difference"].map("{:.0e}".format).replace("nan", ""),
        }
    )
