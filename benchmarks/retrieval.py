"""Measures what a question about a document costs, with an index and without."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from tqdm import tqdm

from benchmarks.random_models import QUESTION_TOKENS, Size, random_reader, token_pixels, words
from benchmarks.timing import (
    Peak,
    conditions,
    peak_bytes,
    seconds_of,
    show_megabytes,
    show_seconds,
    summary,
)
from mmheads.attention import record_keys
from mmheads.compat import continuing
from mmheads.examples import Example
from mmheads.heads import Head, HeadSet, head_count
from mmheads.models import VLM
from mmheads.prefix import on_device, prefill
from mmheads.prompts import encode
from mmheads.retrieval import DocumentIndex

FULL, SHORT, INDEX = "full pass", "pass up to the deepest head", "index"
PREFIX = "question after a prefix cache"
FIRST, TWENTIETH = "1st question", "20th question"
PAGE_SIDE = 512
"""Side of a page in pixels: 1,024 visual tokens of 16 x 16 pixels."""
FRACTION = 0.05
"""Share of all heads that rank the pages, where none are given."""


@dataclass(frozen=True)
class _Document:
    """Pages of noise, questions of random words, and the heads that rank the pages."""

    vlm: VLM
    heads: HeadSet
    pages: list[Image.Image]
    questions: list[str]

    @classmethod
    def draw(
        cls, vlm: VLM, length: int, questions: int, heads: HeadSet | None = None, seed: int = 0
    ) -> _Document:
        rng = np.random.default_rng(seed)
        pages = [
            Image.fromarray(rng.integers(0, 255, (PAGE_SIDE, PAGE_SIDE, 3), np.uint8))
            for _ in range(math.ceil(length * token_pixels() ** 2 / PAGE_SIDE**2))
        ]
        vocabulary = words()
        texts = [" ".join(rng.choice(vocabulary, QUESTION_TOKENS)) for _ in range(questions)]
        if heads is None:
            size = vlm.geometry.size
            rng = np.random.default_rng(seed)
            chosen = rng.choice(size, head_count(FRACTION, size), replace=False)
            drawn = tuple(Head(*divmod(int(index), vlm.geometry.heads)) for index in chosen)
            heads = HeadSet(drawn, vlm.geometry, vlm.model_id)
        return cls(vlm, heads, pages, texts)

    def index(self) -> DocumentIndex:
        return DocumentIndex(self.vlm, self.heads, self.pages, window=len(self.pages))

    def passes(self) -> tuple[int, dict[str, Callable[[], Any]]]:
        """Returns the tokens of pages and question, and passes over them without an index.

        The full pass is that of the stock model and records nothing. Reading the pages is left out
        of both passes: it would make the index look better.
        """
        asked = Example(context=tuple(self.pages), question=(self.questions[0],))
        prompt = encode(self.vlm, asked)
        inputs = on_device(self.vlm, prompt.inputs)
        rows = torch.from_numpy(prompt.question)

        @torch.no_grad()
        def full() -> None:
            self.vlm.model(**inputs, use_cache=False, logits_to_keep=1)

        @torch.no_grad()
        def short() -> None:
            record_keys(
                self.vlm, rows, self.heads, lambda: self.vlm.model(**inputs, use_cache=False)
            )

        return len(prompt), {FULL: full, SHORT: short}

    def after_prefix(self) -> Callable[[], Any]:
        """Returns a pass of the stock model over the question, after a cache of the pages.

        All layers run, up to the logits. The words of the question are embedded beforehand.
        """
        prompt = encode(self.vlm, Example(context=tuple(self.pages), question=(self.questions[0],)))
        prefix = prefill(self.vlm, prompt)
        first, arguments = prefix.ready(prompt.own, True)
        head: Any = self.vlm.model.get_output_embeddings()
        cache: Any = prefix.cache

        @torch.no_grad()
        def after() -> None:
            states = self.vlm.decoder(**arguments, **continuing(self.vlm.decoder, cache))
            head(states.last_hidden_state[:, -1:])
            cache.crop(first - len(prompt))

        if first < prefix.length:
            cache.crop(first - prefix.length)
        return after


def retrieval_peak(size: Size, device: str, dtype: torch.dtype, length: int, variant: str) -> int:
    """Returns the peak memory of one variant in bytes; run it in a fresh process."""
    vlm = random_reader(size, device, dtype)
    _Document.draw(vlm, PAGE_SIDE, 1).index().rank("?")
    document = _Document.draw(vlm, length, 1)
    if variant == INDEX:
        return peak_bytes(document.index, device)
    if variant in (FULL, SHORT):
        return peak_bytes(document.passes()[1][variant], device)
    if variant == PREFIX:
        return peak_bytes(document.after_prefix(), device)
    index = document.index()
    index.rank("?")
    return peak_bytes(lambda: index.rank(document.questions[0]), device)


def measure_retrieval(
    vlm: VLM,
    lengths: Sequence[int],
    *,
    heads: HeadSet | None = None,
    questions: int = 100,
    repeats: int = 3,
    peak: Peak | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Returns what a question about a document costs, from its index and without, per variant.

    A full pass is the stock model's pass over pages and question; after a prefix cache, which holds
    the keys and values of the pages, it runs only the question. The index runs the pages and the
    null question once; then questions are asked one after the other. All are timed in turn. The
    time of many questions is compared with as many full passes. Without an index, a calibrated
    ranking of n questions takes n + 1 passes, and 2 n where the null question is run again for each
    question, as the authors' code does.

    Args:
        vlm: The model, with the words and the processor of the tiny models.
        lengths: Least lengths of the document in tokens; a page has 1,024.
        heads: The heads that rank the pages; by default random ones.
        questions: Number of questions, at least 20.
        repeats: Number of timed turns.
        peak: See `fresh_processes`, called with a length and a variant; None measures no memory.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: There are fewer than 20 questions.
    """
    if questions < 20:
        raise ValueError(f"questions is {questions}; expected at least 20")
    device, many = str(vlm.device), f"{questions} questions"
    tables = []
    for length in tqdm(lengths, desc="retrieval", leave=False, disable=not progress):
        document = _Document.draw(vlm, length, questions, heads)
        tokens, passes = document.passes()
        passes[PREFIX] = document.after_prefix()
        names = (*passes, INDEX, FIRST, TWENTIETH, many)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(repeats + 1):
            taken = {name: seconds_of(run, device)[0] for name, run in passes.items()}
            taken[INDEX], index = seconds_of(document.index, device)
            asked = [seconds_of(partial(index.rank, q), device)[0] for q in document.questions]
            taken[FIRST], taken[TWENTIETH] = asked[0], asked[19]
            taken[many] = taken[INDEX] + sum(asked)
            for name in names if turn else ():
                seconds[name].append(taken[name])
        table = summary(seconds)
        table["time_ratio"] = table["seconds"] / table["seconds"][0]
        last = table.index[-1]
        table.loc[last, "time_ratio"] /= questions
        table["null_ratio"] = np.nan
        table.loc[last, "null_ratio"] = table.loc[last, "time_ratio"] / 2
        table["held_bytes"] = np.where(table["variant"] == INDEX, index.bytes, np.nan)
        measured = (*passes, INDEX, TWENTIETH) if peak else ()
        peaks = {name: statistics.median(peak(length, name)) for name in measured if peak}
        table["peak_bytes"] = table["variant"].map(peaks).astype(float)
        table.insert(0, "tokens", tokens)
        of_heads = {"heads": len(document.heads), "layers": document.heads.layers[-1] + 1}
        tables.append(table.assign(**of_heads))
        del index
    settings = {"questions": questions, "question_tokens": QUESTION_TOKENS}
    result = pd.concat(tables, ignore_index=True)
    return result.assign(**conditions(vlm, repeats, **settings))


def show_retrieval(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the table of `measure_retrieval` with rounded numbers and their units."""
    count = int(table["questions"].iloc[0])
    shares = table["time_ratio"].map("{:.1%} of a full pass".format)
    many = table["null_ratio"].notna()
    shares[many] = table.loc[many, "time_ratio"].map(f"{{:.1%}} of {count} full passes, ".format)
    shares[many] += table.loc[many, "null_ratio"].map(f"{{:.1%}} of {2 * count}".format)
    return pd.DataFrame(
        {
            "tokens": table["tokens"],
            "variant": table["variant"],
            "time, s": show_seconds(table),
            "share": shares,
            "held, MB": show_megabytes(table["held_bytes"]),
            "peak, MB": show_megabytes(table["peak_bytes"]),
        }
    )
