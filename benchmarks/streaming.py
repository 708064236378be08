"""Measures prefill and decoding with dense and window heads, beside the stock model."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm
from transformers import Cache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.random_models import QUESTION_TOKENS, Size, random_model
from benchmarks.timing import (
    Peak,
    compare,
    conditions,
    kernel_of,
    peak_bytes,
    show_megabytes,
    show_seconds,
)
from mmheads import compat
from mmheads.heads import Head, HeadSet, head_count
from mmheads.models import VLM
from mmheads.streaming import CompactLayer, Streaming, cache_bytes, kernels, stream

STOCK, STREAMED = "stock", "streaming"
FLEX = "streaming, FlexAttention"
COMPACT = "streaming, compact cache"
STATIC, STREAMED_STATIC = "stock, static cache", "streaming, static cache"
WHOLE_MODEL, ATTENTION = "whole model", "attention"
"""What a prefill is timed of: all of the model, or the attention of one layer."""
CALLED_TOKENS = 8192
"""Tokens of one timed call of a layer's attention: short prompts attend several times."""
STEPS = 8
"""Tokens decoded per measurement."""


def dense_heads(vlm: VLM, share: float, *, by: str = "group", seed: int = 0) -> HeadSet:
    """Returns random dense heads, as many in each layer.

    Args:
        vlm: The model.
        share: Share of each layer's KV groups or heads, in (0, 1].
        by: "group" draws whole KV groups, "head" single heads.
        seed: Seed of the draw.
    """
    geometry = vlm.geometry
    width = geometry.heads // geometry.kv_groups
    rng = np.random.default_rng(seed)
    heads: list[Head] = []
    for layer in vlm.attentions:
        if by == "group":
            count = head_count(share, geometry.kv_groups)
            groups = rng.permutation(geometry.kv_groups)[:count]
            chosen = [group * width + i for group in groups for i in range(width)]
        else:
            chosen = list(rng.permutation(geometry.heads)[: head_count(share, geometry.heads)])
        heads += [Head(layer, int(head)) for head in chosen]
    return HeadSet(tuple(heads), geometry, vlm.model_id)


def attention_share(length: int, heads: float, sinks: int, window: int) -> float:
    """Returns the share of a dense prefill's attention that remains, counted in keys seen.

    Args:
        length: Prompt length in tokens.
        heads: Share of the heads that stay dense.
        sinks: First tokens that the other heads see.
        window: Last tokens that they see, the query's own included.
    """
    row = np.arange(1, length + 1)
    narrow = np.minimum(row, window + np.minimum(sinks, np.maximum(row - window, 0))).sum()
    return heads + (1 - heads) * float(narrow / row.sum())


def arithmetic_limit(vlm: VLM, length: int, heads: float, sinks: int, window: int) -> float:
    """Returns the speed-up of a prefill that the number of operations allows.

    Attention and linear layers are counted; the arguments are those of `attention_share`.
    """
    weights = sum(w.numel() for w in vlm.decoder.layers.parameters() if w.ndim == 2)
    linear = 2 * length * weights
    channels = sum(module.head_dim for module in vlm.attentions.values())
    attention = 2 * vlm.geometry.heads * channels * length * (length + 1)
    kept = attention * attention_share(length, heads, sinks, window)
    return float((linear + attention) / (linear + kept))


def _variant(
    name: str, vlm: VLM, dense: HeadSet, sinks: int, window: int
) -> AbstractContextManager[Any]:
    """Returns the context manager `stream`, or one that leaves the stock model as it is."""
    return nullcontext() if name == STOCK else stream(vlm, dense, sinks, window)


def _random_ids(vlm: VLM, length: int) -> tuple[torch.Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(vlm.text_config.vocab_size, (1, length), generator=generator)
    return ids.to(vlm.device), generator


@torch.no_grad()
def _prefill_once(
    vlm: VLM, ids: torch.Tensor, dense: HeadSet, sinks: int, window: int, name: str
) -> None:
    with _variant(name, vlm, dense, sinks, window):
        vlm.model(input_ids=ids, use_cache=True, logits_to_keep=1)


def prefill_peak(
    size: Size,
    device: str,
    dtype: torch.dtype,
    share: float,
    by: str,
    sinks: int,
    window: int,
    length: int,
    variant: str,
) -> int:
    """Returns the peak memory of a prefill in bytes; run it in a fresh process."""
    vlm = random_model(size, device, dtype)
    settings = (dense_heads(vlm, share, by=by), sinks, window, variant)
    _prefill_once(vlm, _random_ids(vlm, 4 * QUESTION_TOKENS)[0], *settings)
    ids = _random_ids(vlm, length)[0]
    return peak_bytes(lambda: _prefill_once(vlm, ids, *settings), device)


def measure_prefill(
    vlm: VLM,
    lengths: Sequence[int],
    dense: HeadSet,
    *,
    sinks: int,
    window: int,
    repeats: int = 3,
    peak: Peak | None = None,
    compiled: bool = False,
    progress: bool = True,
) -> pd.DataFrame:
    """Returns the time of a prefill of random tokens, per length, scope and variant.

    The scopes are the whole model and the attention of one layer. All are timed in turn. The column
    `limit` is the speed-up that the number of operations allows: for one layer, with the dense
    heads of that layer. `limit_share` is the part of it that is reached, and `kernel` the operator
    that most of the attention ran in.

    Args:
        vlm: The model, on its fastest stock attention.
        lengths: Prompt lengths in tokens.
        dense: Heads that stay dense.
        sinks: See `stream`.
        window: See `stream`.
        repeats: Number of timed turns.
        peak: See `fresh_processes`, called with a length and a variant; None measures no memory.
        compiled: Whether to time FlexAttention too, compiled, for the attention of the KV groups
            without a dense head; on a CPU this takes a C++ compiler and a minute.
        progress: Whether to show a progress bar.
    """
    tables = []
    layer = dense.layers[0] if len(dense) else 0
    module, geometry = vlm.attentions[layer], vlm.geometry
    channels = module.head_dim
    width = geometry.heads // geometry.kv_groups
    full = [head.head for head in dense if head.layer == layer]
    of_full = [head // width for head in full]
    narrow = [group for group in range(geometry.kv_groups) if group not in of_full]
    with stream(vlm, dense, sinks, window) as streaming:
        share = streaming.dense_head_share
    share_of_layer = float(dense.mask[layer].mean())
    for length in tqdm(lengths, desc="prefill", leave=False, disable=not progress):
        ids, generator = _random_ids(vlm, length)
        states = tuple(
            torch.randn(1, heads, length, channels, generator=generator).to(module.o_proj.weight)
            for heads in (geometry.heads, geometry.kv_groups, geometry.kv_groups)
        )

        calls = max(1, CALLED_TOKENS // length)  # entering the context is no part of a layer

        @torch.no_grad()
        def attend(
            name: str,
            states: tuple[torch.Tensor, ...] = states,
            calls: int = calls,
        ) -> None:
            with _variant(name, vlm, dense, sinks, window):
                function = ALL_ATTENTION_FUNCTIONS[vlm.text_config._attn_implementation]
                for _ in range(calls):
                    function(module, *states, None, scaling=module.scaling, dropout=0.0)

        @torch.no_grad()
        def attend_compiled(states: tuple[torch.Tensor, ...] = states, calls: int = calls) -> None:
            query, key, value = states
            of_groups = query.unflatten(1, (-1, width))
            settings = {"sinks": sinks, "window": window, "scale": module.scaling}
            for _ in range(calls):
                kernels.causal(query[:, full], key[:, of_full], value[:, of_full], module.scaling)
                kernels.flex(of_groups[:, narrow], key[:, narrow], value[:, narrow], **settings)

        once = partial(_prefill_once, vlm, ids, dense, sinks, window)
        variants = {(WHOLE_MODEL, name): partial(once, name) for name in (STOCK, STREAMED)}
        variants |= {(ATTENTION, name): partial(attend, name) for name in (STOCK, STREAMED)}
        if compiled:
            variants[ATTENTION, FLEX] = partial(attend_compiled, states)
        cases = list(variants)
        timed = {f"{case}": run for case, run in variants.items()}
        table = compare(timed, repeats=repeats, device=str(vlm.device))
        table.insert(0, "scope", [scope for scope, _ in cases])
        table["variant"] = [name for _, name in cases]
        one_layer = table["scope"] == ATTENTION
        table.loc[one_layer, ["seconds", "low", "high"]] /= calls
        first = table.groupby("scope", sort=False)["seconds"].transform("first")
        table["speed_up"] = first / table["seconds"]
        limits = {
            WHOLE_MODEL: arithmetic_limit(vlm, length, share, sinks, window),
            ATTENTION: 1 / attention_share(length, share_of_layer, sinks, window),
        }
        table["limit"] = table["scope"].map(limits).where(table["variant"] != STOCK)
        table["limit_share"] = table["speed_up"] / table["limit"]
        table["kernel"] = [kernel_of(run) for run in variants.values()]
        table.loc[table["variant"] == FLEX, "kernel"] = "flex_attention, compiled"  # has no name
        if peak is not None:
            peaks = {name: statistics.median(peak(length, name)) for name in (STOCK, STREAMED)}
            of_model = table["scope"] == WHOLE_MODEL
            table["peak_bytes"] = table["variant"].map(peaks).where(of_model)
        table.insert(0, "tokens", length)
        tables.append(table)
    return pd.concat(tables, ignore_index=True).assign(**_conditions(streaming, repeats))


def measure_decoding(
    vlm: VLM,
    lengths: Sequence[int],
    dense: HeadSet,
    *,
    sinks: int,
    window: int,
    repeats: int = 3,
    progress: bool = True,
) -> pd.DataFrame:
    """Returns the seconds per decoded token behind a cache of random keys, per length and variant.

    The variants are the stock model with a cache that grows, which is its default, and with a
    static cache, which is never copied; streaming that reads few keys of such caches; and streaming
    with a cache that keeps only the keys that it reads. The column `held_bytes` is the size of the
    cache when decoding begins.

    Args:
        vlm: The model.
        lengths: Tokens in the cache.
        dense: Heads that stay dense.
        sinks: See `stream`.
        window: See `stream`.
        repeats: Number of timed turns.
        progress: Whether to show a progress bar.
    """
    tables = []
    for length in tqdm(lengths, desc="decode", leave=False, disable=not progress):
        ids = torch.randint(
            vlm.text_config.vocab_size, (1, 1), generator=torch.Generator().manual_seed(length)
        ).to(vlm.device)
        with stream(vlm, dense, sinks, window) as streaming:
            caches = _filled_caches(vlm, streaming, length, length + STEPS * (repeats + 1))
        held = {name: cache_bytes(cache) for name, cache in caches.items()}

        @torch.no_grad()
        def decode(
            name: str,
            ids: torch.Tensor = ids,
            caches: dict[str, Cache] = caches,
            streaming: Streaming = streaming,
        ) -> None:
            with nullcontext() if name in (STOCK, STATIC) else streaming.again():
                for _ in range(STEPS):
                    vlm.model(input_ids=ids, past_key_values=caches[name], use_cache=True)

        variants = {name: partial(decode, name) for name in caches}
        table = compare(variants, repeats=repeats, device=str(vlm.device))
        table[["seconds", "low", "high"]] /= STEPS
        table["speed_up"] = table["seconds"].iloc[0] / table["seconds"]
        table["held_bytes"] = table["variant"].map(held)
        table["memory_ratio"] = table["held_bytes"] / held[STOCK]
        table.insert(0, "tokens", length)
        tables.append(table)
    return pd.concat(tables, ignore_index=True).assign(**_conditions(streaming, repeats))


def _filled_caches(vlm: VLM, streaming: Streaming, length: int, room: int) -> dict[str, Cache]:
    """Returns one cache per variant with random keys and values; static ones with `room` tokens."""
    generator = torch.Generator().manual_seed(length)

    def filled(cache: Cache) -> Cache:
        for layer, module in vlm.attentions.items():
            if not hasattr(module, "k_proj"):  # it attends to the keys of an earlier layer
                continue
            groups = module.k_proj.out_features // module.head_dim
            size = (1, groups, length, module.head_dim)
            states = torch.randn(size, generator=generator).to(module.o_proj.weight)
            cached = cache.layers[layer] if layer < len(cache.layers) else None
            if isinstance(cached, CompactLayer):
                cached.append(states, states)
            else:
                cache.update(states, states, layer)
        return cache

    return {
        STOCK: filled(compat.empty_cache(vlm.text_config)),
        STATIC: filled(StaticCache(vlm.text_config, max_cache_len=room)),
        STREAMED: filled(compat.empty_cache(vlm.text_config)),
        STREAMED_STATIC: filled(StaticCache(vlm.text_config, max_cache_len=room)),
        COMPACT: filled(streaming.cache()),
    }


def _conditions(streaming: Streaming, repeats: int) -> dict[str, Any]:
    return conditions(
        streaming.vlm,
        repeats,
        dense_heads=streaming.dense_head_share,
        dense_groups=streaming.dense_group_share,
        sinks=streaming.sinks,
        window=streaming.window,
    )


def show_prefill(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the table of `measure_prefill` with rounded numbers and their units."""
    shown = pd.DataFrame(
        {
            "tokens": table["tokens"],
            "scope": table["scope"],
            "variant": table["variant"],
            "time, s": show_seconds(table),
            "speed-up": table["speed_up"].map("{:.2f}".format),
            "limit": table["limit"].map("{:.2f}".format).replace("nan", ""),
        }
    )
    if "limit_share" in table:  # recorded tables may be older
        shown["of the limit"] = table["limit_share"].map("{:.0%}".format).replace("nan%", "")
        shown["kernel"] = table["kernel"]
    if "peak_bytes" in table:
        shown["peak, MB"] = show_megabytes(table["peak_bytes"])
    return shown


def show_decoding(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the table of `measure_decoding` with rounded numbers and their units."""
    return pd.DataFrame(
        {
            "tokens": table["tokens"],
            "variant": table["variant"],
            "time a token, s": show_seconds(table),
            "speed-up": table["speed_up"].map("{:.2f}".format),
            "cache, MB": (table["held_bytes"] / 1e6).map("{:,.1f}".format),
            "of stock": table["memory_ratio"].map("{:.0%}".format),
        }
    )
