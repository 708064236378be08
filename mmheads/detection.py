"""Find the retrieval heads of a model without data: needles are scored until top sets are stable.

Heads are those with the highest calibrated scores (paper A, arXiv 2605.27243, Sec. 3) that also
look at the evidence more than even attention would. Whether there are any is decided by a split of
the haystacks into halves: the top sets of both halves share more heads than random sets do.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats
from tqdm import tqdm

from mmheads.checks import expect, expect_one_of
from mmheads.examples import Example
from mmheads.heads import HeadSet, head_count
from mmheads.models import VLM
from mmheads.scores import HeadScores, concatenate
from mmheads.scoring import open_results, score_heads, score_into
from mmheads.statistics import holm
from mmheads.tasks import natural_needles
from mmheads.tasks.grids import HAYSTACKS, Grid
from mmheads.tasks.needles import Needles

LENGTH = 1024
"""Length of the prompts by default, in tokens."""

LEAST = 4
"""Haystacks per task before a search may stop: two in each half."""

STABLE = 0.8
"""A task's search stops once the two halves share this part of their top sets."""

ALPHA = 0.01
"""Level of the tests whether the halves agree more than by chance, corrected over the tasks."""

TIMES_EVEN = 2.0
"""Least attention to the evidence, as a multiple of what even attention over the prompt gives."""

KNOWN = 0.5
"""Part of the words of a text that a tokenizer must know, or needles in it say little."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """What is scored to find heads.

    Attributes:
        needles: Makes the examples.
        tasks: Needle tasks.
        lengths: Lengths of the prompts, in tokens.
        haystacks: Most haystacks per task; each gives one example per length and depth.
        fraction: Share of all heads that each task selects.
    """

    needles: Grid
    tasks: Sequence[str]
    lengths: Sequence[int]
    haystacks: int = HAYSTACKS
    fraction: float = 0.05

    def __post_init__(self) -> None:
        expect(self.haystacks >= LEAST, "haystacks", self.haystacks, f"at least {LEAST}")

    def examples(self, task: str, haystack: int) -> Iterator[Example]:
        """The examples of one haystack: every length and depth."""
        for length, depth in product(self.lengths, self.needles.depths):
            yield self.needles.make(task, length, depth, haystack=haystack)

    def seconds(self, vlm: VLM) -> tuple[float, float]:
        """About how long the search takes at least and at most, from one example per task.

        The longest examples are measured, after one to warm up; shorter ones are taken to cost in
        proportion to their length.
        """
        longest, total = max(self.lengths), 0.0
        for number, task in enumerate(self.tasks):
            example = self.needles.make(task, longest, 0.5)
            for _ in range(1 if number else 2):
                start = time.perf_counter()
                score_heads(vlm, [example], folder=None, progress=False)
                measured = time.perf_counter() - start
            total += measured * len(self.needles.depths) * sum(self.lengths) / longest
        return LEAST * total, self.haystacks * total


def search_for(
    vlm: VLM,
    folder: str | Path = "",
    *,
    tasks: Sequence[str] = (),
    lengths: Sequence[int] = (),
    haystacks: int = HAYSTACKS,
    fraction: float = 0.05,
) -> Search:
    """A search that fits a model.

    Needles are in natural language. For a model whose tokenizer does not know the words of the
    corpus, as that of a tiny model, they are generated records.

    Args:
        vlm: The model.
        folder: Texts, PDF files and images for the haystacks, see `tasks.corpus.folder`; by
            default the shipped corpus.
        tasks: By default all that the model can read.
        lengths: In tokens; by default `LENGTH`, or what the model takes if that is less.
        haystacks: See `Search`.
        fraction: See `Search`.

    Raises:
        ValueError: The tokenizer does not know the words of the folder, a length is more than the
            model takes, or a setting is unknown or out of range.
    """
    needles: Grid = (natural := natural_needles.for_model(vlm, folder))
    text = " ".join(" ".join(part) for part in natural.source.paragraphs[:20])
    ids = vlm.tokenizer(text, add_special_tokens=False)["input_ids"]
    unknown = float(vlm.unknown(ids).mean())
    if unknown > KNOWN:
        if folder:
            raise ValueError(
                f"{unknown:.0%} of the words of {folder} are unknown to the tokenizer of {vlm}; "
                "leave out the folder to use generated needles"
            )
        needles = Needles(image_ratio=0.0 if vlm.is_text_only else 0.5)
    limit = vlm.positions or LENGTH
    lengths = lengths or (min(LENGTH, limit),)
    for length in lengths:
        expect(1 <= length <= limit, "length", length, f"1 to {limit}, the tokens that {vlm} takes")
    tasks = tasks or natural.tasks
    for task in tasks:
        expect_one_of("task", task, natural.tasks)
    return Search(
        needles=needles, tasks=tasks, lengths=lengths, haystacks=haystacks, fraction=fraction
    )


@dataclass(frozen=True, kw_only=True)
class Detection:
    """The heads that a search has found, and what says so.

    Attributes:
        scores: Scores on all examples.
        table: One row per task: `haystacks`; `heads`, the size of a top set; `shared`, how many of
            them both halves have; `chance`, how many random sets would share; `p`, one-sided, of
            at least as many by chance, and `p_holm`, corrected over the tasks; `stable`, whether
            the search stopped early; `times_even`, the largest attention to the evidence as a
            multiple of even attention; `found`, the number of heads found.
        heads: The heads of all tasks, each task's strongest first; empty if there are none.
    """

    scores: HeadScores
    table: pd.DataFrame
    heads: HeadSet


def detect(
    vlm: VLM, search: Search, *, folder: str | Path = "", progress: bool = True
) -> Detection:
    """Score needles until the top set of each task is stable; keep what chance does not explain.

    Top sets are those of `strong_heads`: in a model with random weights, small biases towards
    repeated tokens are stable too. Halves are the even and the odd haystacks. Their overlap is
    tested against random sets (hypergeometric), Holm-corrected over the tasks.

    Args:
        vlm: The model.
        search: What is scored, from `search_for`.
        folder: Folder of the results store, where scores are kept; empty: `runs/scores`.
        progress: Show a progress bar.

    Raises:
        ValueError: As `score_heads` does.
    """
    parts: dict[str, HeadScores] = {}
    rows = []
    each = len(search.lengths) * len(search.needles.depths)
    most = len(search.tasks) * search.haystacks * each
    with (
        open_results(vlm, folder, fresh=True) as results,
        tqdm(
            total=most, desc="detecting", unit="example", disable=not progress, leave=False
        ) as bar,
    ):
        for task in search.tasks:
            for haystack in range(search.haystacks):
                examples = _counted(search.examples(task, haystack), bar)
                part = score_into(vlm, examples, results, progress=False)
                parts[task] = concatenate([parts[task], part]) if haystack else part
                count = haystack + 1
                if count >= LEAST:
                    row = _halves(parts[task], each, search.fraction)
                    if row["stable"]:
                        break
            most -= (search.haystacks - count) * each
            bar.total = most
            rows.append({"task": task, "haystacks": count, **row})
    table = pd.DataFrame(rows)
    table["p_holm"] = holm(table["p"])
    sets = {task: strong_heads(parts[task], search.fraction) for task in parts}
    table["found"] = [
        len(sets[task]) if p <= ALPHA else 0
        for task, p in zip(table["task"], table["p_holm"], strict=True)
    ]
    none = HeadSet((), vlm.geometry, vlm.model_id)
    kept = [sets[task] for task in table["task"][table["found"] > 0]]
    heads = functools.reduce(operator.or_, kept) if kept else none
    origin = dataclasses.replace(heads.origin, source=f"mmheads.detection, {search.needles.name}")
    return Detection(
        scores=concatenate(list(parts.values())),
        table=table,
        heads=dataclasses.replace(heads, origin=origin),
    )


def strong_heads(scores: HeadScores, fraction: float = 0.05) -> HeadSet:
    """The strongest heads by mean score that look at the evidence more than even attention would.

    Args:
        scores: With the counts of tokens that `score_heads` adds.
        fraction: Share of all heads; fewer are taken if fewer look at the evidence.
    """
    top, times = scores.top(fraction), _times_even(scores)
    origin = dataclasses.replace(
        top.origin, rule=f"{top.origin.rule}, at least {TIMES_EVEN:g} times even attention"
    )
    heads = tuple(head for head in top if times[head] >= TIMES_EVEN and top.scores[head] > 0)
    kept = {head: top.scores[head] for head in heads}
    return dataclasses.replace(top, heads=heads, origin=origin, scores=kept)


def _times_even(scores: HeadScores) -> np.ndarray:
    """[layer, head] attention to the evidence, as a multiple of even attention over the prompt."""
    even = (scores.metadata["evidence_tokens"] / scores.metadata["tokens"]).mean()
    return np.asarray(scores["raw"].mean / even)


def _halves(scores: HeadScores, each: int, fraction: float) -> dict[str, float]:
    """How far the top sets of even and of odd haystacks agree, by column of `Detection.table`.

    Args:
        scores: Scores of whole haystacks in order.
        each: Number of examples per haystack.
        fraction: Share of all heads.
    """
    half = np.arange(len(scores.values)) // each % 2
    first, second = (strong_heads(scores.take(half == each), fraction) for each in (0, 1))
    size, eligible = head_count(fraction, scores.geometry.size), int(scores.eligible.sum())
    shared = len(first & second)
    return {
        "heads": size,
        "shared": shared,
        "chance": size * size / eligible,
        "p": float(scipy.stats.hypergeom.sf(shared - 1, eligible, size, size)),
        "times_even": float(_times_even(scores)[scores.eligible].max()),
        "stable": shared >= STABLE * size,
    }


def _counted(examples: Iterator[Example], bar: tqdm[Any]) -> Iterator[Example]:
    """The examples, each counted by a progress bar when the next one is asked for."""
    for example in examples:
        yield example
        bar.update()
