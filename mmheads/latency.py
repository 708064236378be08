"""Time and memory, measured side by side in one run.

    python -m mmheads.latency scoring                       a small model on this machine
    python -m mmheads.latency scoring --shape qwen3-vl-8b --dtype bfloat16 --lengths 8192 131072
    python -m mmheads.latency retrieval --lengths 2048 8192
    python -m mmheads.latency prefill                       dense heads and windows against stock
    python -m mmheads.latency decode --dense 0.125

Variants take turns, so that a noisy machine disturbs all of them alike; a table gives medians with
the fastest and slowest run, and each variant's ratio to the first.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch
from PIL import Image
from tqdm import tqdm
from transformers import (
    Cache,
    DynamicCache,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    StaticCache,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmheads import paths
from mmheads.attention import record_keys, record_mass
from mmheads.examples import Example
from mmheads.heads import Head, HeadSet, ceil_share
from mmheads.models import VLM
from mmheads.prefix import on_device
from mmheads.prompts import Prompt, Question, Span, encode
from mmheads.retrieval import DocumentIndex
from mmheads.scoring import score_prompt
from mmheads.streaming import Streaming, cache_bytes, stream
from mmheads.tasks.pages import CELL
from mmheads.zoo import architectures

PEAK_RUNS = 3
"""Processes whose peaks of memory are taken: their allocators differ by tens of megabytes."""
QUESTION_TOKENS = 32
NULL_TOKENS = 10
"""Tokens that a null question and what follows it take in Qwen3-VL."""


@dataclass(frozen=True)
class Shape:
    """A language model's shape, filled with random weights."""

    layers: int
    hidden: int
    heads: int
    kv_groups: int
    channels: int
    intermediate: int
    vocabulary: int

    def __str__(self) -> str:
        return (
            f"{self.layers} layers, {self.heads} heads of {self.channels} in {self.kv_groups} KV "
            f"groups, hidden {self.hidden}"
        )


LENGTHS = {
    "scoring": [1024, 4096, 16384],
    "retrieval": [2048, 8192],
    "prefill": [1024, 2048, 4096, 8192, 16384],
    "decode": [1024, 4096, 16384],
}
SHAPES = {
    "wide": Shape(2, 512, 8, 8, 64, 1536, 1024),
    "small": Shape(4, 256, 8, 2, 32, 768, 1024),
    "qwen3-vl-8b": Shape(36, 4096, 32, 8, 128, 12288, 151936),
}


class _NoTokenizer:
    """Random token ids need no words."""

    is_fast = True
    chat_template = None


def random_model(shape: Shape, device: str, dtype: torch.dtype, seed: int = 0) -> VLM:
    """A Qwen3 decoder with random weights."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_groups,
        head_dim=shape.channels,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
        max_position_embeddings=262144,
        tie_word_embeddings=True,
    )
    with torch.device(device):
        model = Qwen3ForCausalLM._from_config(config, dtype=dtype)
    return VLM(model=model.eval(), processor=_NoTokenizer(), model_id=f"random weights, {shape}")


def random_prompt(vlm: VLM, tokens: int, seed: int = 0) -> Prompt:
    """A prompt of random tokens with evidence in its middle, and with a null question."""
    rng = np.random.default_rng(seed)
    context = tokens - QUESTION_TOKENS
    ids = rng.integers(0, vlm.text_config.vocab_size, tokens + NULL_TOKENS)

    def span(first: int, last: int) -> Span:
        return Span(np.arange(first, last), np.ones(last - first, np.float32))

    def question(chosen: np.ndarray) -> Question:
        given = torch.from_numpy(chosen)[None]
        return Question(
            parts=(),
            inputs={"input_ids": given, "attention_mask": torch.ones_like(given)},
            tokens=np.arange(context, len(chosen)),
            start=context,
            context=(span(0, context),),
            evidence=(span(context // 2, context // 2 + context // 4),),
        )

    return Prompt(
        example=Example(context=(), question=()),
        questions=(question(ids[:tokens]), question(np.concatenate([ids[:context], ids[tokens:]]))),
        shared=context,
        candidates={},
        boxes={},
        replacements=(),
    )


def random_reader(shape: Shape, device: str, dtype: torch.dtype, seed: int = 0) -> VLM:
    """A Qwen3-VL of this shape with random weights, the tiny models' words and a small eye."""
    torch.manual_seed(seed)
    base: Any = architectures.qwen3_vl(1).config
    side = shape.channels // 2 // 3
    text = {
        "vocab_size": max(shape.vocabulary, len(architectures.VOCABULARY)),
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_groups,
        "head_dim": shape.channels,
        "max_position_embeddings": 262144,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [shape.channels // 2 - 2 * side, side, side],
            "mrope_interleaved": True,
        },
    }
    vision = base.vision_config.to_dict() | {"out_hidden_size": shape.hidden}
    config = Qwen3VLConfig.from_dict(
        base.to_dict() | {"text_config": text, "vision_config": vision}
    )
    with torch.device(device):
        model = Qwen3VLForConditionalGeneration._from_config(config, dtype=dtype)
    return VLM(
        model=model.eval(),
        processor=architectures.processor(),
        model_id=f"random weights, {shape}",
    )


def compare(
    variants: Mapping[str, Callable[[], Any]], *, repeats: int, device: str
) -> pd.DataFrame:
    """Time variants in turn, after a warm-up -> a row a variant: seconds (median, low, high)."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, run in variants.items():
            _synchronize(device)
            begin = time.perf_counter()
            run()
            _synchronize(device)
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    return _summary(seconds)


def _summary(seconds: Mapping[str, Sequence[float]]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "variant": list(seconds),
            "seconds": [statistics.median(times) for times in seconds.values()],
            "low": [min(times) for times in seconds.values()],
            "high": [max(times) for times in seconds.values()],
        }
    )


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """Memory that a call takes at its peak above what was held before: of the GPU or the process.

    A process keeps what it freed, so that on a CPU each call needs a process of its own.
    """
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run()
        return int(torch.cuda.max_memory_allocated() - held)
    process, over = psutil.Process(), threading.Event()
    held = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        over.set()
        watcher.join()
    return int(peak - held)


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


PLAIN, RECORDED, CALIBRATED, EAGER = (
    "plain forward",
    "forward with scoring",
    "calibrated example",
    "eager, output_attentions",
)


def _scoring_variants(vlm: VLM, length: int) -> dict[str, Callable[[], Any]]:
    prompt = random_prompt(vlm, length)
    inputs = {name: value.to(vlm.device) for name, value in prompt.inputs.items()}
    rows = torch.from_numpy(prompt.question)[None]
    weights = torch.from_numpy(prompt.weights(prompt.evidence))[None, :, None]

    @torch.no_grad()
    def plain(**settings: Any) -> None:
        vlm.model(**inputs, use_cache=True, logits_to_keep=1, **settings)

    def recorded() -> None:
        with record_mass(vlm, rows, weights, text=weights[..., 0] > 0):
            plain()

    def eager() -> None:
        vlm.model.set_attn_implementation("eager")
        try:
            plain(output_attentions=True)
        finally:
            vlm.model.set_attn_implementation("sdpa")

    def calibrated() -> None:
        score_prompt(vlm, prompt)

    return {PLAIN: plain, RECORDED: recorded, CALIBRATED: calibrated, EAGER: eager}


def _scoring_peak(shape: Shape, device: str, dtype: torch.dtype, length: int, name: str) -> int:
    vlm = random_model(shape, device, dtype)
    _scoring_variants(vlm, 4 * QUESTION_TOKENS)[name]()
    return peak_bytes(_scoring_variants(vlm, length)[name], device)


def _fresh() -> ProcessPoolExecutor:
    """Each call gets a process of its own; what they import is imported once where that can be."""
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    context.set_forkserver_preload(["mmheads.latency"])
    return ProcessPoolExecutor(1, context, max_tasks_per_child=1)


def _in_fresh(fresh: ProcessPoolExecutor, run: Callable[..., int], *args: Any) -> int:
    return fresh.submit(run, *args).result()


@contextmanager
def _peaks(run: Callable[..., int], *settings: Any) -> Iterator[Callable[[int, str], int]]:
    """(length, variant) -> the median of three fresh processes."""
    with _fresh() as fresh:

        def peak(length: int, name: str) -> int:
            job = (run, *settings, length, name)
            return int(statistics.median(_in_fresh(fresh, *job) for _ in range(PEAK_RUNS)))

        yield peak


def scoring(
    shape: Shape,
    lengths: Sequence[int],
    *,
    device: str,
    dtype: torch.dtype,
    repeats: int = 5,
    eager_up_to: int = 4096,
) -> pd.DataFrame:
    """What scoring adds to a plain forward pass -> a row a prompt length and variant.

    The plain pass on the stock fast attention; the same with masses, entropy and norms of 32
    question tokens recorded; a calibrated example (context once, question and null question from
    its cache); eager attention with `output_attentions`, up to `eager_up_to` tokens, and beyond
    that only the memory that its maps alone would need. Times are taken in turn in this process,
    memory as the median of three fresh processes.
    """
    vlm = random_model(shape, device, dtype)
    tables = []
    with _fresh() as fresh, tqdm(total=len(lengths), desc="scoring", leave=False) as progress:
        for length in lengths:
            variants = _scoring_variants(vlm, length)
            if length > eager_up_to:
                del variants[EAGER]
            table = compare(variants, repeats=repeats, device=device)
            peaks = pd.DataFrame(
                {
                    name: [
                        _in_fresh(fresh, _scoring_peak, shape, device, dtype, length, name)
                        for _ in range(PEAK_RUNS)
                    ]
                    for name in variants
                }
            )
            table["peak_bytes"] = peaks.median().to_numpy()
            table["peak_low"] = peaks.min().to_numpy()
            table["peak_high"] = peaks.max().to_numpy()
            if length > eager_up_to:
                maps = shape.layers * shape.heads * length**2 * torch.finfo(dtype).bits // 8
                computed = {"variant": f"{EAGER} (computed)", "peak_bytes": maps}
                table = pd.concat([table, pd.DataFrame([computed])], ignore_index=True)
            table["time_ratio"] = table["seconds"] / table["seconds"][0]
            table["memory_ratio"] = table["peak_bytes"] / table["peak_bytes"][0]
            table.insert(0, "tokens", length)
            tables.append(table)
            progress.update()
    result = pd.concat(tables, ignore_index=True)
    return result.assign(
        runs=repeats,
        question_tokens=QUESTION_TOKENS,
        model=vlm.model_id,
        dtype=str(dtype).removeprefix("torch."),
        machine=machine(device),
    )


FULL, SHORT, INDEX = "full pass", "pass up to the deepest head", "index"
PAGE_SIDE = 512
"""Pixels: 1,024 tokens a page, with a token of 16 pixels."""


@dataclass(frozen=True)
class _Document:
    """Pages of noise, questions of random words, and heads to rank with."""

    vlm: VLM
    heads: HeadSet
    pages: list[Image.Image]
    questions: list[str]

    @classmethod
    def draw(cls, vlm: VLM, length: int, questions: int, seed: int = 0) -> _Document:
        rng = np.random.default_rng(seed)
        pages = [
            Image.fromarray(rng.integers(0, 255, (PAGE_SIDE, PAGE_SIDE, 3), np.uint8))
            for _ in range(math.ceil(length * CELL**2 / PAGE_SIDE**2))
        ]
        words = list(architectures.VOCABULARY)[len(architectures.SPECIAL) :]
        asked = [" ".join(rng.choice(words, QUESTION_TOKENS)) for _ in range(questions)]
        size = vlm.geometry.size
        pool = np.random.default_rng(seed).choice(size, ceil_share(0.05, size), replace=False)
        heads = tuple(Head(*divmod(int(index), vlm.geometry.heads)) for index in pool)
        return cls(vlm, HeadSet(heads, vlm.geometry, vlm.model_id), pages, asked)

    def index(self) -> DocumentIndex:
        return DocumentIndex(self.vlm, self.heads, self.pages, window=len(self.pages))

    def passes(self) -> tuple[int, dict[str, Callable[[], Any]]]:
        """Tokens of pages and question, and passes over them without any index.

        The full one is the stock model's and records nothing. Reading the pages is left out of
        both: it would make the index look better.
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


def _retrieval_peak(shape: Shape, device: str, dtype: torch.dtype, length: int, name: str) -> int:
    vlm = random_reader(shape, device, dtype)
    _Document.draw(vlm, PAGE_SIDE, 1).index().rank("?")
    document = _Document.draw(vlm, length, 1)
    if name == INDEX:
        return peak_bytes(document.index, device)
    if name in (FULL, SHORT):
        return peak_bytes(document.passes()[1][name], device)
    index = document.index()
    index.rank("?")
    return peak_bytes(lambda: index.rank(document.questions[0]), device)


def retrieval(
    vlm: VLM,
    lengths: Sequence[int],
    *,
    questions: int = 100,
    repeats: int = 3,
    peak: Callable[[int, str], int] | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """What a question about a document costs, from its index and without -> a row a variant.

    A full pass is the stock model's over pages and question. The index runs the pages and the null
    question once; then questions are asked one after the other. All are timed in turn; ratios to
    many passes are to so many times one. Without an index, a calibrated ranking of n questions
    takes n + 1 passes, and 2 n where the null question is run again for each (the authors' code).

    Args:
        vlm: The model, with the tiny models' processor.
        lengths: Tokens of the document, at least; pages have 1,024.
        questions: At least 20.
        repeats: Runs of everything.
        peak: (length, variant) -> bytes at its peak; by default not measured.
        progress: Show a progress bar.
    """
    if questions < 20:
        raise ValueError(f"{questions} questions; expected at least 20")
    tables = []
    for length in tqdm(lengths, desc="retrieval", leave=False, disable=not progress):
        document = _Document.draw(vlm, length, questions)
        tokens, passes = document.passes()
        names = (*passes, INDEX, "1st question", "20th question", f"{questions} questions")
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(repeats + 1):
            taken = {name: _seconds(run, vlm)[0] for name, run in passes.items()}
            taken[INDEX], index = _seconds(document.index, vlm)
            asked = [_seconds(partial(index.rank, q), vlm)[0] for q in document.questions]
            taken["1st question"], taken["20th question"] = asked[0], asked[19]
            taken[f"{questions} questions"] = taken[INDEX] + sum(asked)
            for name in names if turn else ():
                seconds[name].append(taken[name])
        table = _summary(seconds)
        whole = table["seconds"][0]
        table["time_ratio"] = table["seconds"] / whole
        last = table.index[-1]
        table.loc[last, "time_ratio"] /= questions
        table["null_ratio"] = np.nan
        table.loc[last, "null_ratio"] = table.loc[last, "time_ratio"] / 2
        table["held_bytes"] = np.where(table["variant"] == INDEX, index.bytes, np.nan)
        measured = (*passes, INDEX, "20th question")
        peaks = {name: peak(length, name) for name in measured} if peak else {}
        table["peak_bytes"] = table["variant"].map(peaks).astype(float)
        table.insert(0, "tokens", tokens)
        tables.append(table.assign(layers=document.heads.layers[-1] + 1))
        del index
    return pd.concat(tables, ignore_index=True).assign(
        runs=repeats,
        questions=questions,
        question_tokens=QUESTION_TOKENS,
        heads=ceil_share(0.05, vlm.geometry.size),
        model=vlm.model_id,
        dtype=str(vlm.model.dtype).removeprefix("torch."),
        machine=machine(str(vlm.device)),
    )


STOCK, STREAMED, FELL_BACK = "stock", "streaming", "streaming, dense when short"
COMPACT = "streaming, compact cache"
STATIC, STREAMED_STATIC = "stock, static cache", "streaming, static cache"
FALLBACKS = {STOCK: None, STREAMED: "", FELL_BACK: "dense"}
"""Variants of a prefill, and their fallback for short prompts."""
STEPS = 8
"""Tokens decoded a measurement."""


def dense_heads(vlm: VLM, share: float, *, by: str = "group", seed: int = 0) -> HeadSet:
    """Random dense heads: whole KV groups, or single heads, as many in each layer."""
    shape = vlm.geometry
    width = shape.heads // shape.kv_groups
    rng = np.random.default_rng(seed)
    heads: list[Head] = []
    for layer in range(shape.layers):
        if by == "group":
            groups = rng.permutation(shape.kv_groups)[: ceil_share(share, shape.kv_groups)]
            chosen = [group * width + i for group in groups for i in range(width)]
        else:
            chosen = list(rng.permutation(shape.heads)[: ceil_share(share, shape.heads)])
        heads += [Head(layer, int(head)) for head in chosen]
    return HeadSet(tuple(heads), shape, vlm.model_id)


def attention_share(length: int, heads: float, sinks: int, window: int) -> float:
    """Part of a prefill's dense attention that remains: keys seen by all rows, counted."""
    row = np.arange(1, length + 1)
    narrow = np.minimum(row, window + np.minimum(sinks, np.maximum(row - window, 0))).sum()
    return heads + (1 - heads) * float(narrow / row.sum())


def arithmetic_limit(vlm: VLM, length: int, heads: float, sinks: int, window: int) -> float:
    """The speed-up of a prefill that operations allow, attention and linear layers counted."""
    shape, config = vlm.geometry, vlm.text_config
    layers = vlm.decoder.layers
    weights = sum(w.numel() for w in layers.parameters() if w.ndim == 2)
    linear = 2 * length * weights
    channels = getattr(config, "head_dim", None) or config.hidden_size // shape.heads
    attention = 2 * shape.layers * shape.heads * channels * length * (length + 1)
    kept = attention * attention_share(length, heads, sinks, window)
    return float((linear + attention) / (linear + kept))


def prefill(
    vlm: VLM,
    lengths: Sequence[int],
    dense: HeadSet,
    *,
    sinks: int,
    window: int,
    repeats: int = 3,
    peak: Callable[[int, str], int] | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Prefill of random tokens, stock against streaming -> a row a length, scope and variant.

    Scopes are the whole model and one layer's attention alone; the whole model also with the dense
    fallback for short prompts. All are timed in turn. `limit` is what operations allow: of the
    layer alone, with the dense heads of that layer.

    Args:
        vlm: The model, on its fastest stock attention.
        lengths: Tokens.
        dense: Heads that stay dense.
        sinks: See `stream`.
        window: See `stream`.
        repeats: Runs of everything.
        peak: (length, variant) -> bytes of the whole model at its peak; by default not measured.
        progress: Show a progress bar.
    """
    tables = []
    device = str(vlm.device)
    layer = dense.layers[0] if len(dense) else 0
    module, shape = vlm.attentions[layer], vlm.geometry
    channels = module.head_dim
    with stream(vlm, dense, sinks, window) as streaming:
        share = streaming.heads
    share_of_layer = float(dense.mask[layer].mean())
    for length in tqdm(lengths, desc="prefill", leave=False, disable=not progress):
        ids, generator = _random_ids(vlm, length)
        query, key, value = (
            torch.randn(1, heads, length, channels, generator=generator).to(module.o_proj.weight)
            for heads in (shape.heads, shape.kv_groups, shape.kv_groups)
        )

        @torch.no_grad()
        def alone(
            fallback: str | None,
            given: tuple[torch.Tensor, ...] = (query, key, value),
        ) -> None:
            with _streamed(vlm, dense, sinks, window, fallback):
                name = vlm.text_config._attn_implementation
                attend = ALL_ATTENTION_FUNCTIONS[name]
                attend(module, *given, None, scaling=module.scaling, dropout=0.0)

        whole = partial(_prefill_once, vlm, ids, dense, sinks, window)
        variants = {("whole model", name): partial(whole, FALLBACKS[name]) for name in FALLBACKS}
        variants |= {
            ("attention", STOCK): partial(alone, None),
            ("attention", STREAMED): partial(alone, ""),
        }
        table = compare(variants, repeats=repeats, device=device)  # type: ignore[arg-type]
        table.insert(0, "scope", [scope for scope, _ in variants])
        table["variant"] = [name for _, name in variants]
        first = table.groupby("scope", sort=False)["seconds"].transform("first")
        table["speed_up"] = first / table["seconds"]
        limits = {
            "whole model": arithmetic_limit(vlm, length, share, sinks, window),
            "attention": 1 / attention_share(length, share_of_layer, sinks, window),
        }
        table["limit"] = table["scope"].map(limits).where(table["variant"] != STOCK)
        if peak is not None:
            peaks = {("whole model", name): peak(length, name) for name in FALLBACKS}
            table["peak_bytes"] = [peaks.get(variant) for variant in variants]
        table.insert(0, "tokens", length)
        tables.append(table)
    result = pd.concat(tables, ignore_index=True)
    return result.assign(**_conditions(streaming, repeats))


def _random_ids(vlm: VLM, length: int) -> tuple[torch.Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(vlm.text_config.vocab_size, (1, length), generator=generator)
    return ids.to(vlm.device), generator


@torch.no_grad()
def _prefill_once(
    vlm: VLM, ids: torch.Tensor, dense: HeadSet, sinks: int, window: int, fallback: str | None
) -> None:
    with _streamed(vlm, dense, sinks, window, fallback):
        vlm.model(input_ids=ids, use_cache=True, logits_to_keep=1)


def _prefill_peak(
    shape: Shape,
    device: str,
    dtype: torch.dtype,
    share: float,
    by: str,
    sinks: int,
    window: int,
    length: int,
    name: str,
) -> int:
    vlm = random_model(shape, device, dtype)
    dense = dense_heads(vlm, share, by=by)
    settings = (dense, sinks, window, FALLBACKS[name])
    _prefill_once(vlm, _random_ids(vlm, 4 * QUESTION_TOKENS)[0], *settings)
    ids = _random_ids(vlm, length)[0]
    return peak_bytes(lambda: _prefill_once(vlm, ids, *settings), device)


def decode(
    vlm: VLM,
    lengths: Sequence[int],
    dense: HeadSet,
    *,
    sinks: int,
    window: int,
    repeats: int = 3,
    progress: bool = True,
) -> pd.DataFrame:
    """Decoding behind a cache of random keys -> a row a length and variant, seconds a token.

    The stock model, with a cache that grows, as is its default, and with a static one, which is
    never copied; streaming that reads few keys of such caches; streaming with a cache that keeps no
    others. `held_bytes` is the size of the cache when decoding begins.

    Args: as `prefill`.
    """
    tables = []
    device, shape = str(vlm.device), vlm.geometry
    for length in tqdm(lengths, desc="decode", leave=False, disable=not progress):
        generator = torch.Generator().manual_seed(length)
        ids = torch.randint(vlm.text_config.vocab_size, (1, 1), generator=generator).to(device)

        def filled(
            cache: Cache, generator: torch.Generator = generator, length: int = length
        ) -> Cache:
            for layer, module in vlm.attentions.items():
                size = (1, shape.kv_groups, length, module.head_dim)
                states = torch.randn(size, generator=generator)
                states = states.to(module.o_proj.weight)
                cache.update(states, states, layer)
            return cache

        with stream(vlm, dense, sinks, window) as streaming:
            room = length + STEPS * (repeats + 1)

            def static(room: int = room) -> Cache:
                return StaticCache(vlm.text_config, max_cache_len=room)

            caches = {
                STOCK: filled(DynamicCache()),
                STATIC: filled(static()),
                STREAMED: filled(DynamicCache()),
                STREAMED_STATIC: filled(static()),
                COMPACT: filled(streaming.cache()),
            }
        held = {name: cache_bytes(cache) for name, cache in caches.items()}

        @torch.no_grad()
        def steps(
            name: str,
            ids: torch.Tensor = ids,
            caches: dict[str, Cache] = caches,
            streaming: Streaming = streaming,
        ) -> None:
            with nullcontext() if name in (STOCK, STATIC) else streaming.again():
                for _ in range(STEPS):
                    vlm.model(input_ids=ids, past_key_values=caches[name], use_cache=True)

        variants = {name: partial(steps, name) for name in caches}
        table = compare(variants, repeats=repeats, device=device)
        table[["seconds", "low", "high"]] /= STEPS
        table["speed_up"] = table["seconds"].iloc[0] / table["seconds"]
        table["held_bytes"] = table["variant"].map(held)
        table["memory_ratio"] = table["held_bytes"] / held[STOCK]
        table.insert(0, "tokens", length)
        tables.append(table)
    result = pd.concat(tables, ignore_index=True)
    return result.assign(**_conditions(streaming, repeats))


def _streamed(
    vlm: VLM, dense: HeadSet, sinks: int, window: int, fallback: str | None
) -> AbstractContextManager[Any]:
    """`stream`, or nothing for the stock model."""
    if fallback is None:
        return nullcontext()
    return stream(vlm, dense, sinks, window, fallback=fallback)


def _conditions(streaming: Streaming, repeats: int) -> dict[str, Any]:
    vlm = streaming.vlm
    return {
        "dense_heads": streaming.heads,
        "dense_groups": streaming.groups,
        "sinks": streaming.sinks,
        "window": streaming.window,
        "runs": repeats,
        "model": vlm.model_id,
        "dtype": str(vlm.model.dtype).removeprefix("torch."),
        "machine": machine(str(vlm.device)),
    }


def _seconds(run: Callable[[], Any], vlm: VLM) -> tuple[float, Any]:
    device = str(vlm.device)
    _synchronize(device)
    begin = time.perf_counter()
    result = run()
    _synchronize(device)
    return time.perf_counter() - begin, result


def machine(device: str) -> str:
    """What the times were measured on."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} CPU threads"


def _megabytes(bytes_: pd.Series) -> pd.Series:
    return (bytes_ / 1e6).map("{:,.0f}".format).replace("nan", "")


def _times(table: pd.DataFrame) -> pd.Series:
    """Median [low, high]."""
    shown = table[["seconds", "low", "high"]].map("{:.3f}".format)
    text = shown["seconds"] + " [" + shown["low"] + ", " + shown["high"] + "]"
    return text.where(table["seconds"].notna(), "not run")


def show_scoring(table: pd.DataFrame) -> pd.DataFrame:
    """The table of `scoring` as a reader wants it."""
    spread = " [" + _megabytes(table["peak_low"]) + ", " + _megabytes(table["peak_high"]) + "]"
    return pd.DataFrame(
        {
            "tokens": table["tokens"],
            "variant": table["variant"],
            "time, s": _times(table),
            "x plain": table["time_ratio"].map("{:.2f}".format).replace("nan", ""),
            "peak, MB": _megabytes(table["peak_bytes"])
            + spread.where(table["peak_low"].notna(), ""),
            "x plain memory": table["memory_ratio"].map("{:.2f}".format),
        }
    )


def show_retrieval(table: pd.DataFrame) -> pd.DataFrame:
    """The table of `retrieval` as a reader wants it."""
    count = int(table["questions"].iloc[0])
    shares = table["time_ratio"].map("{:.1%} of a full pass".format)
    many = table["null_ratio"].notna()
    shares[many] = table.loc[many, "time_ratio"].map(f"{{:.1%}} of {count} full passes, ".format)
    shares[many] += table.loc[many, "null_ratio"].map(f"{{:.1%}} of {2 * count}".format)
    return pd.DataFrame(
        {
            "tokens": table["tokens"],
            "variant": table["variant"],
            "time, s": _times(table),
            "share": shares,
            "held, MB": _megabytes(table["held_bytes"]),
            "peak, MB": _megabytes(table["peak_bytes"]),
        }
    )


def show_prefill(table: pd.DataFrame) -> pd.DataFrame:
    """The table of `prefill` as a reader wants it."""
    return pd.DataFrame(
        {
            "tokens": table["tokens"],
            "scope": table["scope"],
            "variant": table["variant"],
            "time, s": _times(table),
            "speed-up": table["speed_up"].map("{:.2f}".format),
            "limit": table["limit"].map("{:.2f}".format).replace("nan", ""),
            **({"peak, MB": _megabytes(table["peak_bytes"])} if "peak_bytes" in table else {}),
        }
    )


def show_decode(table: pd.DataFrame) -> pd.DataFrame:
    """The table of `decode` as a reader wants it."""
    return pd.DataFrame(
        {
            "tokens": table["tokens"],
            "variant": table["variant"],
            "time a token, s": _times(table),
            "speed-up": table["speed_up"].map("{:.2f}".format),
            "cache, MB": (table["held_bytes"] / 1e6).map("{:,.1f}".format),
            "of stock": table["memory_ratio"].map("{:.0%}".format),
        }
    )


def main(arguments: list[str] | None = None) -> int:
    """`python -m mmheads.latency`."""
    parser = argparse.ArgumentParser(prog="python -m mmheads.latency", description=__doc__)
    parser.add_argument("what", choices=list(LENGTHS))
    parser.add_argument("--shape", choices=list(SHAPES), help="default: small, or wide")
    parser.add_argument("--lengths", type=int, nargs="+", default=[])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--eager-up-to", type=int, default=4096, metavar="TOKENS")
    parser.add_argument("--dense", type=float, default=0.1, help="share of dense KV groups")
    parser.add_argument("--by", choices=["group", "head"], default="group", help="dense choice")
    parser.add_argument("--sinks", type=int, default=64)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--out", default="", help="also write the table to this CSV file")
    args = parser.parse_args(arguments)
    streams = args.what in ("prefill", "decode")
    shape = SHAPES[args.shape or ("wide" if streams else "small")]
    dtype = getattr(torch, args.dtype)
    lengths = args.lengths or LENGTHS[args.what]
    if min(lengths) < 4 * QUESTION_TOKENS or args.repeats < 1:
        print(
            f"lengths {lengths}, repeats {args.repeats}: expected lengths of at least "
            f"{4 * QUESTION_TOKENS} tokens and one repeat",
            file=sys.stderr,
        )
        return 1
    if streams and (args.window < 1 or args.sinks < 0 or not 0 < args.dense <= 1):
        print(
            f"window {args.window}, sinks {args.sinks}, dense {args.dense}: expected a window of 1 "
            "or more, 0 or more sinks, and a share of groups in (0, 1]",
            file=sys.stderr,
        )
        return 1
    if args.what == "scoring":
        table = scoring(
            shape,
            lengths,
            device=args.device,
            dtype=dtype,
            repeats=args.repeats,
            eager_up_to=args.eager_up_to,
        )
        shown = show_scoring(table)
    elif streams:
        vlm = random_model(shape, args.device, dtype)
        dense = dense_heads(vlm, args.dense, by=args.by)
        settings = {"sinks": args.sinks, "window": args.window, "repeats": args.repeats}
        if args.what == "prefill":
            given = (args.dense, args.by, args.sinks, args.window)
            with _peaks(_prefill_peak, shape, args.device, dtype, *given) as peak:
                shown = show_prefill(table := prefill(vlm, lengths, dense, **settings, peak=peak))
        else:
            shown = show_decode(table := decode(vlm, lengths, dense, **settings))
    else:
        vlm = random_reader(shape, args.device, dtype)
        with _peaks(_retrieval_peak, shape, args.device, dtype) as peak:
            table = retrieval(vlm, lengths, repeats=args.repeats, peak=peak)
        shown = show_retrieval(table)
    first = table.iloc[0]
    about = ""
    if "question_tokens" in table:
        about = f"{first['question_tokens']} question tokens; "
    if "heads" in table:
        about += f"{first['heads']} heads in {first['layers']} layers; "
    if streams:
        about = (
            f"{first['dense_heads']:.1%} of the heads in {first['dense_groups']:.1%} of the KV "
            f"groups dense, others {args.sinks} sinks and a window of {args.window}; "
        )
    print(
        f"{first['model']}; {first['dtype']}; {about}"
        f"{first['machine']}; median [low, high] of {args.repeats} runs taken in turn"
    )
    print(shown.to_markdown(index=False, disable_numparse=True))
    if args.out:
        with paths.write_whole(Path(args.out)) as path:
            table.to_csv(path, index=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
