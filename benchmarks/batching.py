"""Measures what batches and shared layers save: scoring and ablations of generated needles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from benchmarks.timing import compare, conditions, show_seconds
from mmheads import answers, scoring
from mmheads.attention import ablate
from mmheads.controls import random_controls
from mmheads.examples import Example
from mmheads.heads import Head, HeadSet
from mmheads.models import VLM
from mmheads.prefix import on_device, prefill
from mmheads.prompts import encode, null_question, shuffled_question
from mmheads.scores import HeadScores
from mmheads.tasks import needles

ALONE, BATCHED = "scoring, one question at a time", "scoring, in batches"
SIDE_BY_SIDE, SHARED = "ablations, rows that share nothing", "ablations, rows that share layers"
SIDE_BY_SIDE_TOKENS = 2048
"""Prompt tokens of a batch whose rows share nothing."""
SHARE, DRAWS = 0.05, 5
MASSES = ("raw", "null", "context", "shuffled")


def score_alone(vlm: VLM, examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """Returns the quantities of examples, each context and each question in a pass of its own."""
    found = []
    for example in examples:
        others = null_question(example.question), shuffled_question(example.question, 0)
        prompt = encode(vlm, example, questions=others)
        prefix = prefill(vlm, prompt)
        asked = scoring.asked_of(vlm, prompt, "placeholders")
        attention = [
            prefix.attention(each.question, each.spans, text=each.text, pixels=each.pixels)
            for each in asked
        ]
        found.append(scoring.quantities_of(*attention))
    return {name: np.stack([values[name] for values in found]) for name in MASSES}


def ablated_sets(scores: HeadScores, vlm: VLM) -> list[HeadSet]:
    """Returns no heads, the best, random ones of the same layers, and the last by score."""
    best = scores.top(SHARE)
    last = np.argsort(scores.mean.ravel(), kind="stable")[: len(best)]
    none = HeadSet((), vlm.geometry, vlm.model_id)
    heads = tuple(Head(*divmod(int(index), vlm.geometry.heads)) for index in last)
    drawn = random_controls(best, scores.eligible, draws=DRAWS, seed=0, match="layer")
    return [none, best, *drawn, HeadSet(heads, vlm.geometry, vlm.model_id)]


@torch.no_grad()
def answer_side_by_side(vlm: VLM, example: Example, sets: Sequence[HeadSet]) -> list[str]:
    """Returns answers of one token from plain `generate`, with every row of a batch in full."""
    prompt, found = encode(vlm, example), []
    rows = max(1, SIDE_BY_SIDE_TOKENS // len(prompt))
    for some in (sets[first : first + rows] for first in range(0, len(sets), rows)):
        inputs = on_device(vlm, answers.stacked([prompt] * len(some)))
        with ablate(vlm, some):
            tokens = vlm.model.generate(
                **inputs, max_new_tokens=1, do_sample=False, pad_token_id=0, repetition_penalty=1.0
            )
        found += vlm.tokenizer.batch_decode(tokens[:, -1:], skip_special_tokens=True)
    return found


def answer_shared(vlm: VLM, example: Example, sets: Sequence[HeadSet]) -> list[str]:
    """Returns answers of one token as `answer` gives them."""
    ablations = {"sets": sets[1:]}
    table = answers.answer(vlm, [example], ablations, max_new_tokens=1, folder=None, progress=False)
    return [str(text) for text in table["prediction"]]


def measure_batching(
    vlm: VLM, lengths: Sequence[int], *, pairs: int = 2, repeats: int = 5
) -> pd.DataFrame:
    """Returns time, speed-up and agreement of batches, per length, for scoring and ablations.

    Scoring takes needles of all four tasks at two depths. The ablations are those of the best 5%
    of each task's heads, of random heads of the same layers, of the last heads, and of none.

    Args:
        vlm: The model.
        lengths: Context lengths in tokens.
        pairs: Haystacks per task and depth.
        repeats: Number of timed turns.
    """
    device, tables = str(vlm.device), []
    settings: dict[str, Any] = {"folder": None, "progress": False}
    for length in tqdm(lengths, desc="batching", leave=False):
        given = {t: list(needles.generate([t], [length], (0.0, 0.6), pairs)) for t in needles.TASKS}
        kept: dict[str, Any] = {}

        def run(name: str, per_task: Any, kept: dict[str, Any] = kept) -> Any:
            return lambda: kept.update({name: per_task()})

        scores = {t: scoring.score_heads(vlm, given[t], **settings) for t in given}
        sets = {t: ablated_sets(scores[t], vlm) for t in given}
        variants = {
            ALONE: run(ALONE, lambda: {t: score_alone(vlm, given[t]) for t in given}),
            BATCHED: run(
                BATCHED, lambda: {t: scoring.score_heads(vlm, given[t], **settings) for t in given}
            ),
            SIDE_BY_SIDE: run(
                SIDE_BY_SIDE,
                lambda: [answer_side_by_side(vlm, given[t][0], sets[t]) for t in given],
            ),
            SHARED: run(SHARED, lambda: [answer_shared(vlm, given[t][0], sets[t]) for t in given]),
        }
        table = compare(variants, repeats=repeats, device=device)
        count, rows = sum(map(len, given.values())), sum(map(len, sets.values()))
        table["done"] = [count, count, rows, rows]
        table["per_second"] = table["done"] / table["seconds"]
        table["speed_up"] = table["per_second"] / table["per_second"].to_numpy()[[0, 0, 2, 2]]
        difference = max(
            float(np.abs(kept[ALONE][t][name] - kept[BATCHED][t].quantities[name]).max())
            for t in given
            for name in MASSES
        )
        table["largest_difference"] = [np.nan, difference, np.nan, np.nan]
        table["same_answers"] = [None, None, None, kept[SIDE_BY_SIDE] == kept[SHARED]]
        table.insert(0, "tokens", length)
        tables.append(table)
    return pd.concat(tables, ignore_index=True).assign(**conditions(vlm, repeats))


def show_batching(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the table of `measure_batching` with rounded numbers and their units."""
    return pd.DataFrame(
        {
            "tokens": table["tokens"],
            "variant": table["variant"],
            "time, s": show_seconds(table),
            "per second": table["per_second"].map("{:.1f}".format),
            "x": table["speed_up"].map("{:.2f}".format),
            "largest difference of masses": table["largest_difference"]
            .map("{:.1e}".format)
            .replace("nan", ""),
            "same answers": table["same_answers"].map({True: "yes", False: "no"}).fillna(""),
        }
    )
