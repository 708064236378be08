"""What a tiny model can do, and which of its heads do it: the numbers of its card."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, groupby, product
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from mmheads.answers import answer
from mmheads.controls import random_controls
from mmheads.examples import Example
from mmheads.heads import HeadSet, head_count, overlap
from mmheads.models import VLM
from mmheads.prompts import encode
from mmheads.scores import HeadScores, spearman
from mmheads.scoring import score_heads
from mmheads.tasks.grids import DEPTHS, TASKS
from mmheads.tasks.needles import CONTROL, LENGTHS, Needles

FRACTIONS = (0.05, 0.10)
"""Sizes of the top sets whose overlap and ablation are measured."""
SPLIT = "test"
TOKENS_PER_BATCH = 8192


def needles(vlm: VLM) -> Needles:
    """The needles that a model is measured on: half pages, or only text."""
    return Needles(0.0 if vlm.is_text_only else 0.5)


def tasks(vlm: VLM) -> tuple[str, ...]:
    """The needle tasks that a model can be given."""
    return ("text",) if vlm.is_text_only else TASKS


@torch.no_grad()
def answers(vlm: VLM, examples: Iterable[Example]) -> list[str]:
    """The model's greedy answers of one token."""
    given: list[str] = []
    prompts = (encode(vlm, example).inputs for example in examples)
    for length, group in groupby(prompts, key=lambda inputs: inputs["input_ids"].shape[1]):
        for batch in _chunks(group, max(1, TOKENS_PER_BATCH // length)):
            joined = {name: torch.cat([inputs[name] for inputs in batch]) for name in batch[0]}
            logits = vlm.model(**joined, use_cache=False, logits_to_keep=1).logits[:, -1]
            given += vlm.tokenizer.convert_ids_to_tokens(logits.argmax(-1).tolist())
    return given


def accuracy(
    vlm: VLM, haystacks: int = 20, lengths: Sequence[int] = LENGTHS, changed: int = 5
) -> pd.DataFrame:
    """Accuracy on unseen examples by task, needle, length and depth.

    With the needle "removed", the answer counts that was right with it, except in the task
    identical_image, where "no" does. With the needle "changed", its value (or which of the options
    it is) is another than the seed decides: right answers must follow it.

    Args:
        vlm: The model.
        haystacks: Examples per depth, with the needle present and removed.
        lengths: Lengths of the prompt in tokens.
        changed: Examples per depth with a changed needle.

    Returns:
        One row per condition, with the number of right answers among `n` and the chance level.
    """
    source = needles(vlm)
    rows = []
    conditions = product((*tasks(vlm), CONTROL), ("present", "removed", "changed"), lengths)
    for task, needle, length in tqdm(list(conditions), desc="accuracy", leave=False):
        if needle != "present" and (task == CONTROL or (task, needle) == NO_CHANGE):
            continue
        depths = DEPTHS[:1] if task == CONTROL else DEPTHS
        count = (changed if needle == "changed" else haystacks) * len(DEPTHS) // len(depths)
        examples = [
            _example(source, task, needle, length, depth, haystack + (1000 * index))
            if needle == "removed"
            else _example(source, task, needle, length, depth, haystack)
            for index, depth in enumerate(depths)
            for haystack in range(count)
        ]
        given = answers(vlm, examples)
        right = np.array([a == e.answer for a, e in zip(given, examples, strict=True)])
        for depth, hits in zip(depths, right.reshape(-1, count), strict=True):
            rows.append(
                {
                    "task": task,
                    "needle": needle,
                    "length": length,
                    "depth": None if task == CONTROL else depth,
                    "n": count,
                    "right": int(hits.sum()),
                    "chance": 1 / len(examples[0].choices),
                }
            )
    return pd.DataFrame(rows)


NO_CHANGE = ("identical_image", "changed")
"""There, the needle can only be present or removed."""


def _example(
    source: Needles, task: str, needle: str, length: int, depth: float, haystack: int
) -> Example:
    settings: dict[str, Any] = {"haystack": haystack, "split": SPLIT}
    example = source.make(task, length, depth, needle=needle != "removed", **settings)
    if needle != "changed":
        return example
    choices = example.choices
    other = choices[
        (choices.index(example.answer) + 1 + haystack % (len(choices) - 1)) % len(choices)
    ]
    return source.make(task, length, depth, answer=other, **settings)


def scores(vlm: VLM, length: int = 512, haystacks: int = 20) -> dict[str, HeadScores]:
    """Retrieval scores of all heads by task, on the detection split at all depths."""
    source = needles(vlm)
    return {
        task: score_heads(vlm, source.generate([task], [length], DEPTHS, haystacks), progress=False)
        for task in tqdm(tasks(vlm), desc="scores", leave=False)
    }


def structure(
    by_task: dict[str, HeadScores],
    predecessor: HeadScores | None = None,
    twin: Mapping[str, HeadScores] = MappingProxyType({}),
    seed: int = 0,
) -> pd.DataFrame:
    """How concentrated the heads of each task are, and how far two tasks share them.

    Args:
        by_task: What `scores` gives.
        predecessor: Scores of the text model that the model was trained from, on its text task.
        twin: Scores by task of the model that was trained in the same way with seed 0.
        seed: Seed of the split halves.

    Returns:
        Rows with the columns measure, a, b, fraction, value, chance and ceiling. "rho" is the
        share of heads that hold half of the positive score; "overlap" is the share of a top set
        that two tasks have in common, "kept" the same with the predecessor's text heads, "seeds"
        with the same task of the twin, "halves" the mean overlap of the top sets of random halves
        of a task's haystacks. The ceiling is the lower "halves" of the two tasks.
    """
    rows: list[dict[str, Any]] = [
        {"measure": "rho", "a": task, "value": _rho(given)} for task, given in by_task.items()
    ]
    halves = {task: _split_half(given, seed) for task, given in by_task.items()}
    rows += [
        {"measure": "halves", "a": task, "b": task, "fraction": fraction, "value": value}
        for task, values in halves.items()
        for fraction, value in values.items()
    ]
    for a, b in combinations(by_task, 2):
        rows.append(
            {"measure": "spearman", "a": a, "b": b, "value": spearman(by_task[a], by_task[b]).rho}
        )
        rows += [
            _overlap("overlap", a, b, by_task[a], by_task[b], fraction)
            | {"ceiling": min(halves[a][fraction], halves[b][fraction])}
            for fraction in FRACTIONS
        ]
    if predecessor is not None:
        rows += [
            _overlap("kept", task, "predecessor", given, predecessor, fraction)
            | {"ceiling": halves[task][fraction]}
            for (task, given), fraction in product(by_task.items(), FRACTIONS)
        ]
    rows += [
        _overlap("seeds", task, "seed 0", by_task[task], given, fraction)
        | {"ceiling": halves[task][fraction]}
        for (task, given), fraction in product(twin.items(), FRACTIONS)
    ]
    columns = ["measure", "a", "b", "fraction", "value", "chance", "ceiling"]
    return pd.DataFrame(rows, columns=columns)


def _rho(given: HeadScores) -> float:
    """Share of heads that hold half of the positive score; NaN where no head has a positive one."""
    return given.sparsity(0.5) if (given.mean > 0).any() else float("nan")


def _overlap(
    measure: str, a: str, b: str, first: HeadScores, second: HeadScores, fraction: float
) -> dict[str, Any]:
    size = head_count(fraction, first.geometry.size)
    one, two = (HeadSet(s.top(fraction).heads, first.geometry) for s in (first, second))
    return {
        "measure": measure,
        "a": a,
        "b": b,
        "fraction": fraction,
        "value": overlap(one, two),
        "chance": size / int(first.eligible.sum()),
    }


def _split_half(given: HeadScores, seed: int, draws: int = 50) -> dict[float, float]:
    """Mean overlap of the top sets of two random halves of the haystacks, by fraction."""
    haystacks = given.metadata["haystack"].to_numpy()
    names = np.unique(haystacks)
    rng = np.random.default_rng(seed)
    found: dict[float, list[float]] = {fraction: [] for fraction in FRACTIONS}
    for _ in range(draws):
        half = np.isin(haystacks, rng.permutation(names)[: len(names) // 2])
        for fraction in FRACTIONS:
            sets = given.take(half).top(fraction), given.take(~half).top(fraction)
            found[fraction].append(overlap(*sets))
    return {fraction: float(np.mean(values)) for fraction, values in found.items()}


def ablation(
    vlm: VLM,
    by_task: dict[str, HeadScores],
    *,
    length: int = 512,
    haystacks: int = 5,
    random_sets: int = 20,
    selections: int = 6,
    seed: int = 0,
    folder: str | Path = "",
) -> pd.DataFrame:
    """Accuracy of each task with its top heads ablated, against random sets of the same size.

    Args:
        vlm: The model.
        by_task: What `scores` gives.
        length: Length of the prompts in tokens.
        haystacks: Examples per depth, of the split "heldout".
        random_sets: Random sets, matched by layer and without the selected heads; each answers one
            example per depth. Where a layer has too few heads left, as the global layers of Gemma 3
            may, the nearest layers give the rest.
        selections: Bootstrap selections: top sets by resampled haystacks.
        seed: Seed of random sets and resampling.
        folder: Where answers are kept, by default `runs/answers`.

    Returns:
        One row per task, fraction, ablation ("full model", "top", "bootstrap", "random") and draw,
        with the number of right answers among `n`.
    """
    source = needles(vlm)
    tables = []
    for (task, given), fraction in product(by_task.items(), FRACTIONS):
        examples = list(
            source.generate([task], [length], DEPTHS, haystacks, split="heldout", both_answers=True)
        )
        top = given.top(fraction)
        ablations: dict[str, HeadSet | list[HeadSet]] = {
            "top": top,
            "bootstrap": _bootstrap_tops(given, fraction, selections, seed),
            "random": random_controls(
                top, np.ones_like(given.eligible), draws=random_sets, seed=seed, match="layer"
            ),
        }
        table = answer(vlm, examples, ablations, max_new_tokens=1, folder=folder, progress=False)
        grouped = table.groupby(["ablation", "draw"], sort=False)["score"]
        counts = grouped.agg(right="sum", n="size").reset_index()
        tables.append(counts.assign(task=task, fraction=fraction, heads=len(top)))
    result = pd.concat(tables, ignore_index=True)
    return result[["task", "fraction", "heads", "ablation", "draw", "right", "n"]]


def _bootstrap_tops(given: HeadScores, fraction: float, draws: int, seed: int) -> list[HeadSet]:
    haystacks = given.metadata["haystack"].to_numpy()
    names = np.unique(haystacks)
    rng = np.random.default_rng(seed)
    tops = []
    for _ in range(draws):
        drawn = rng.choice(names, len(names))
        rows = np.concatenate([np.flatnonzero(haystacks == name) for name in drawn])
        tops.append(given.take(rows).top(fraction))
    return tops


def _chunks(entries: Iterable[Any], size: int) -> Iterable[list[Any]]:
    chunk = []
    for entry in entries:
        chunk.append(entry)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
