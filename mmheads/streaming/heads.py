"""Run a model with a few dense heads, the others limited to the first tokens and a window."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache

from mmheads.attention.hook import Call, attached, check_heads
from mmheads.heads import HeadSet
from mmheads.models import VLM
from mmheads.streaming.cache import OWNER, CompactLayer
from mmheads.streaming.kernels import Pair, banded, causal, picked

CROSSOVER = 4
"""Times sinks + window: below this length the banded kernel does not pay on a CPU."""


@dataclass(eq=False)
class Streaming:
    """Heads that see everything, and all others sinks and a window alone; see `stream`.

    Attributes:
        vlm: The model.
        dense: The heads that see everything.
        sinks: First tokens that the others see.
        window: Last tokens that the others see, the row's own included.
        fallback: See `stream`.
    """

    vlm: VLM
    dense: HeadSet
    sinks: int
    window: int
    fallback: str = ""

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Layers with window heads; those that slide by themselves are left as they are."""
        geometry = self.vlm.geometry
        eligible = geometry.eligible & ~self.dense.mask
        return tuple(int(layer) for layer in np.flatnonzero(eligible.any(axis=1)))

    @property
    def groups(self) -> float:
        """Share of the KV groups of the whole-context layers that hold a dense head."""
        geometry = self.vlm.geometry
        whole = np.flatnonzero(geometry.eligible.any(axis=1))
        held = sum(layer in whole for layer, _ in self.dense.kv_groups)
        return float(held / (len(whole) * geometry.kv_groups))

    @property
    def heads(self) -> float:
        """Share of the heads of the whole-context layers that are dense."""
        eligible = self.vlm.geometry.eligible
        return float((self.dense.mask & eligible).sum() / eligible.sum())

    @contextmanager
    def again(self) -> Iterator[Streaming]:
        """Enter the same streaming again, for caches that were made of it."""
        with attached(self.vlm, dict.fromkeys(self.layers, self)):
            CompactLayer.streams += 1
            try:
                yield self
            finally:
                CompactLayer.streams -= 1

    def cache(self) -> DynamicCache:
        """An empty cache in which KV groups without a dense head keep sinks and window alone.

        For calls inside of the context, in batches without padding.
        """
        cache = DynamicCache(config=self.vlm.text_config)
        for layer in self.layers:
            open_, closed, _, _ = self._plans[layer]
            cache.layers[layer] = CompactLayer(open_, closed, self.sinks, self.window)
        return cache

    @cached_property
    def _dense(self) -> NDArray[np.bool_]:
        """[layer, KV group, head of the group]."""
        geometry = self.vlm.geometry
        return self.dense.mask.reshape(geometry.layers, geometry.kv_groups, -1)

    @cached_property
    def _plans(self) -> dict[int, tuple[list[int], list[int], list[int], list[int]]]:
        """By layer: KV groups with a dense head, others; dense heads, others of open groups."""
        return {layer: self._plan(layer) for layer in self.layers}

    def _plan(self, layer: int) -> tuple[list[int], list[int], list[int], list[int]]:
        geometry = self.vlm.geometry
        shared = geometry.heads // geometry.kv_groups
        dense = self._dense[layer]
        open_ = np.flatnonzero(dense.any(axis=1))
        heads = np.arange(geometry.heads).reshape(-1, shared)
        return (
            open_.tolist(),
            np.flatnonzero(~dense.any(axis=1)).tolist(),
            heads[dense].tolist(),
            heads[open_][~dense[open_]].tolist(),
        )

    def __call__(self, call: Call) -> torch.Tensor:
        """The output of a layer."""
        if call.softcap is not None or call.sinks is not None or not call.causal:
            raise ValueError(
                f"layer {call.layer} of {self.vlm} has a bound on its scores, sink scores of its "
                "own, or no causal mask; window heads are not known there"
            )
        held: CompactLayer | None = getattr(call.key, OWNER, None)
        if held is not None:
            mine = (self._plans[call.layer][0], self.sinks, self.window)
            if (held.open, held.sinks, held.window) != mine:
                raise ValueError("the cache drops other keys: make it with this context's `cache`")
        rows, keys = call.query.shape[2], call.key.shape[2]
        allowed = call.mask
        if allowed is not None and allowed.dtype != torch.bool:
            allowed = allowed > torch.finfo(allowed.dtype).min / 2
        if held is not None and held.seen > rows:
            first = held.seen - rows
            if allowed is not None:
                if not allowed[:, 0, -1].all():
                    raise ValueError("a cache that drops keys takes batches without padding alone")
                allowed = None
        elif allowed is None:
            first = keys - 1 if rows == 1 else 0
            held = None
        else:
            seen = keys if keys == rows else int(allowed.any(2).any(0)[0].nonzero()[-1]) + 1
            first, held = seen - rows, None
        total = first + rows
        if self.sinks > total and rows > 1:
            raise ValueError(
                f"{self.sinks} sinks are more sinks than the {total} tokens of the prompt; give "
                "fewer, or a longer prompt"
            )
        short = total < CROSSOVER * (self.sinks + self.window) and rows > 1
        if held is None and (total <= self.window or (short and self.fallback == "dense")):
            return call.output
        return self._attend(call, allowed, first, held)

    def _attend(
        self, call: Call, allowed: torch.Tensor | None, first: int, held: CompactLayer | None
    ) -> torch.Tensor:
        open_, closed, dense, rest = self._plans[call.layer]
        query = call.query
        examples, heads, rows, channels = query.shape
        shared = heads // call.key.shape[1]
        output = query.new_empty(examples, rows, heads, channels)
        by_group = output.unflatten(2, (-1, shared)).movedim(1, 3)
        if held is not None and held.band is not None:
            whole, band, gap, kept = held.whole, held.band, held.gap, list(range(len(closed)))
        else:
            end = first + rows if allowed is None else None
            band, gap, kept = (call.key[:, :, :end], call.value[:, :, :end]), (0, 0), closed
            whole = _picked(band, open_) if open_ else band
        window = partial(
            banded,
            sinks=self.sinks,
            window=self.window,
            scale=call.scaling,
            first=first,
            allowed=allowed,
        )
        if closed:
            groups = list(zip(closed, kept, strict=True))
            window(query.unflatten(1, (-1, shared)), *band, by_group, gap=gap, groups=groups)
        if open_ and rows == 1:
            by_group[:, open_] = self._decode(call, whole, allowed, first, open_)
        elif open_:
            of_head = {head: open_.index(head // shared) for head in (*dense, *rest)}
            pair = _picked(whole, [of_head[head] for head in dense])
            output.transpose(1, 2)[:, dense] = self._full(call, pair, allowed, first, dense)
            if rest:
                groups = [(head, of_head[head]) for head in rest]
                by_head = output.transpose(1, 2).unsqueeze(2)
                window(query.unsqueeze(2), *whole, by_head, groups=groups)
        if held is not None:
            held.band = None
        return output

    def _full(
        self,
        call: Call,
        pair: Pair,
        allowed: torch.Tensor | None,
        first: int,
        heads: list[int],
    ) -> torch.Tensor:
        """[example, head, row, channel] of dense heads."""
        if allowed is None and first:
            at = torch.arange(pair[0].shape[2], device=call.query.device)
            allowed = at <= at[first:, None]
        query = picked(call.query, heads)
        if allowed is None:
            return causal(query, *pair, call.scaling)
        return scaled_dot_product_attention(
            query, pair[0], pair[1], attn_mask=allowed, scale=call.scaling
        )

    def _decode(
        self,
        call: Call,
        whole: Pair,
        allowed: torch.Tensor | None,
        first: int,
        open_: list[int],
    ) -> torch.Tensor:
        """[example, KV group, head of the group, 1, channel] of the open groups, for one token.

        The heads of a group are the rows of one call, so that keys are read once.
        """
        shared = call.query.shape[1] // call.key.shape[1]
        dense = torch.from_numpy(self._dense[call.layer][open_])
        mask = None if allowed is None else allowed[:, :1]
        if not dense.all():
            device = call.query.device
            at = torch.arange(whole[0].shape[2], device=device)
            start = 0 if mask is None else mask[:, :, -1:].int().argmax(-1, keepdim=True)
            band = (first - at < self.window) | (at < start + self.sinks)
            seen = dense.to(device)[None, :, :, None] | band
            mask = seen if mask is None else seen & mask
        rows = call.query.unflatten(1, (-1, shared))[:, open_, :, 0]
        found = scaled_dot_product_attention(
            rows, whole[0], whole[1], attn_mask=mask, scale=call.scaling
        )
        return found.unsqueeze(3)


def _picked(pair: Pair, groups: list[int]) -> Pair:
    return picked(pair[0], groups), picked(pair[1], groups)


@contextmanager
def stream(
    vlm: VLM,
    dense: HeadSet,
    sinks: int = 4,
    window: int = 512,
    *,
    fallback: str = "",
) -> Iterator[Streaming]:
    """Let every head but the dense ones see the first tokens and a window alone (paper B, Sec. 5).

    In prefill and decoding, for batches, padding, `generate`, dynamic and static caches. The result
    equals attention under a mask a head. Layers that slide by themselves (Gemma 3) are left as they
    are. The model is as before at exit, also after an exception.

    Args:
        vlm: The model.
        dense: Heads that see everything. Choose whole KV groups to read and keep fewer keys.
        sinks: First tokens that every head sees.
        window: Last tokens that the others see, the row's own included.
        fallback: "dense" runs the stock attention on prompts shorter than `CROSSOVER` x (sinks +
            window): for timing alone, since it is another model.

    Yields:
        What is streamed: shares of dense heads and KV groups, and a cache that drops keys.

    Raises:
        ValueError: A window of less than 1, negative sinks, another fallback, heads of another
            model; or, in a call, an attention that is not known here.
    """
    if window < 1 or sinks < 0 or fallback not in ("", "dense"):
        raise ValueError(
            f"sinks {sinks}, window {window}, fallback {fallback!r}: expected 0 or more sinks, a "
            "window of 1 or more, and the fallback '' or 'dense'"
        )
    check_heads(vlm, [dense], "dense")
    streaming = Streaming(vlm, dense, sinks, window, fallback)
    with streaming.again():
        yield streaming
