"""Run a model with a few dense heads, the others limited to the first tokens and a window."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import scaled_dot_product_attention
from transformers import Cache, DynamicCache

from mmheads import compat
from mmheads.attention.hook import Call, attached, check_heads, seen
from mmheads.heads import HeadSet
from mmheads.models import VLM
from mmheads.streaming.cache import CompactLayer
from mmheads.streaming.kernels import Pair, banded, causal, select_groups


class _LayerPlan(NamedTuple):
    """What the heads of one layer see.

    Attributes:
        full_groups: KV groups with a dense head.
        window_groups: KV groups without one.
        dense_heads: Heads that see everything.
        window_heads: The other heads of the full groups.
    """

    full_groups: list[int]
    window_groups: list[int]
    dense_heads: list[int]
    window_heads: list[int]


@dataclass(eq=False)
class Streaming:
    """Dense heads that see everything, and window heads that see sinks and a window; see `stream`.

    Attributes:
        vlm: The model.
        dense: The heads that see everything.
        sinks: Number of first tokens that the window heads see.
        window: Number of last tokens that the window heads see, the query itself included.
    """

    vlm: VLM
    dense: HeadSet
    sinks: int
    window: int
    _compact: dict[int, CompactLayer] = field(default_factory=dict, repr=False)
    """By layer: the compact cache of the call that runs now, if it has one."""

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Layers with window heads; layers that slide by themselves are left as they are."""
        geometry = self.vlm.geometry
        eligible = geometry.eligible & ~self.dense.mask
        return tuple(int(layer) for layer in np.flatnonzero(eligible.any(axis=1)))

    @property
    def dense_group_share(self) -> float:
        """Share of the KV groups in the whole-context layers that hold a dense head."""
        geometry = self.vlm.geometry
        full_layers = np.flatnonzero(geometry.eligible.any(axis=1))
        dense = sum(layer in full_layers for layer, _ in self.dense.kv_groups)
        return float(dense / (len(full_layers) * geometry.kv_groups))

    @property
    def dense_head_share(self) -> float:
        """Share of the heads in the whole-context layers that are dense."""
        eligible = self.vlm.geometry.eligible
        return float((self.dense.mask & eligible).sum() / eligible.sum())

    @contextmanager
    def again(self) -> Iterator[Streaming]:
        """Enter the same streaming again, for caches that it made before."""
        with attached(self.vlm, dict.fromkeys(self.layers, self)), ExitStack() as hooks:
            for layer in self.layers:
                handle = self.vlm.attentions[layer].register_forward_pre_hook(
                    partial(self._announce, layer), with_kwargs=True
                )
                hooks.callback(handle.remove)
            hooks.callback(self._compact.clear)
            yield self

    def cache(self) -> DynamicCache:
        """An empty cache in which KV groups without a dense head keep only sinks and window.

        It is for calls inside the context, and for batches without padding.

        Raises:
            ValueError: Layers attend to the keys of earlier layers, which would be evicted.
        """
        if compat.shares_keys(self.vlm.text_config):
            raise ValueError(
                f"layers of {self.vlm} ({self.vlm.family}) attend to the keys of earlier layers, "
                "so that none can be evicted; leave the cache to `generate`"
            )
        cache = DynamicCache(config=self.vlm.text_config)
        for layer in self.layers:
            plan = self._plans[layer]
            cache.layers[layer] = CompactLayer(
                plan.full_groups, plan.window_groups, self.sinks, self.window
            )
        return cache

    def _announce(
        self, layer: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Remember the compact cache among the arguments of a layer's call, if there is one."""
        self._compact.pop(layer, None)
        caches = (value for value in chain(args, kwargs.values()) if isinstance(value, Cache))
        for cache in caches:
            compact = cache.layers[layer] if layer < len(cache.layers) else None
            if isinstance(compact, CompactLayer):
                compact.announce()
                self._compact[layer] = compact

    @cached_property
    def _dense(self) -> NDArray[np.bool_]:
        """[layer, KV group, head of the group] True for dense heads."""
        geometry = self.vlm.geometry
        return self.dense.mask.reshape(geometry.layers, geometry.kv_groups, -1)

    @cached_property
    def _plans(self) -> dict[int, _LayerPlan]:
        return {layer: self._plan(layer) for layer in self.layers}

    def _plan(self, layer: int) -> _LayerPlan:
        geometry = self.vlm.geometry
        dense = self._dense[layer]
        full_groups = np.flatnonzero(dense.any(axis=1))
        heads = np.arange(geometry.heads).reshape(geometry.kv_groups, -1)
        return _LayerPlan(
            full_groups.tolist(),
            np.flatnonzero(~dense.any(axis=1)).tolist(),
            heads[dense].tolist(),
            heads[full_groups][~dense[full_groups]].tolist(),
        )

    def __call__(self, call: Call) -> torch.Tensor:
        """[example, row, head, channel] output of a layer's heads.

        Raises:
            ValueError: The layer's attention has a softcap, sink scores, no causal mask, a mask per
                head, or a bias; or the cache was made by another streaming; or there are more sinks
                than tokens.
        """
        compact = self._compact.pop(call.layer, None)
        allowed = _allowed(call, self.vlm)
        rows, keys = call.query.shape[2], call.key.shape[2]
        if compact is not None and (
            (compact.full_groups, compact.sinks, compact.window)
            != (self._plans[call.layer].full_groups, self.sinks, self.window)
        ):
            raise ValueError("the cache evicts other keys: make it with this context's `cache`")
        if compact is not None and compact.seen > rows:
            if allowed is not None and not allowed[:, 0, -1].all():
                raise ValueError("a cache that evicts keys takes only batches without padding")
            first, allowed = compact.seen - rows, None
        elif allowed is None:
            first, compact = keys - 1 if rows == 1 else 0, None
        else:
            seen = keys if keys == rows else int(allowed.any(2).any(0)[0].nonzero()[-1]) + 1
            first, compact = seen - rows, None
        total = first + rows
        if self.sinks > total and rows > 1:
            raise ValueError(
                f"{self.sinks} sinks are more than the {total} tokens of the prompt; give "
                "fewer, or a longer prompt"
            )
        if compact is None and total <= self.sinks + self.window:
            return call.output
        return self._attend(call, allowed, first, compact)

    def _attend(
        self, call: Call, allowed: torch.Tensor | None, first: int, compact: CompactLayer | None
    ) -> torch.Tensor:
        plan, query = self._plans[call.layer], call.query
        examples, heads, rows, channels = query.shape
        shared = heads // call.key.shape[1]
        output = query.new_empty(examples, rows, heads, channels)
        by_group = output.unflatten(2, (-1, shared)).movedim(1, 3)
        if compact is not None and compact.window_pair is not None:
            full_pair, window_pair, evicted = (
                compact.full_pair,
                compact.window_pair,
                compact.evicted,
            )
            key_groups = list(range(len(plan.window_groups)))
            compact.window_pair = None
        else:
            end = first + rows if allowed is None else None
            window_pair, evicted = (call.key[:, :, :end], call.value[:, :, :end]), (0, 0)
            key_groups = plan.window_groups
            full_pair = (
                _select_pair(window_pair, plan.full_groups) if plan.full_groups else window_pair
            )
        window = partial(
            banded,
            sinks=self.sinks,
            window=self.window,
            scale=call.scaling,
            first=first,
            allowed=allowed,
        )
        if plan.window_groups:
            groups = list(zip(plan.window_groups, key_groups, strict=True))
            grouped = query.unflatten(1, (-1, shared))
            window(grouped, *window_pair, by_group, evicted=evicted, groups=groups)
        if plan.full_groups and rows == 1:
            by_group[:, plan.full_groups] = self._decode(call, full_pair, allowed, first)
        elif plan.full_groups:
            group_of = {
                head: plan.full_groups.index(head // shared)
                for head in (*plan.dense_heads, *plan.window_heads)
            }
            pair = _select_pair(full_pair, [group_of[head] for head in plan.dense_heads])
            by_head = output.transpose(1, 2)
            by_head[:, plan.dense_heads] = self._full(call, pair, allowed, first)
            if plan.window_heads:
                groups = [(head, group_of[head]) for head in plan.window_heads]
                window(query.unsqueeze(2), *full_pair, by_head.unsqueeze(2), groups=groups)
        return output

    def _full(
        self, call: Call, pair: Pair, allowed: torch.Tensor | None, first: int
    ) -> torch.Tensor:
        """[example, head, row, channel] of dense heads, which see all that the model allows."""
        if allowed is None and first:
            positions = torch.arange(pair[0].shape[2], device=call.query.device)
            allowed = positions <= positions[first:, None]
        query = select_groups(call.query, self._plans[call.layer].dense_heads)
        if allowed is None:
            return causal(query, *pair, call.scaling)
        return scaled_dot_product_attention(
            query, pair[0], pair[1], attn_mask=allowed, scale=call.scaling
        )

    def _decode(
        self, call: Call, pair: Pair, allowed: torch.Tensor | None, first: int
    ) -> torch.Tensor:
        """[example, KV group, head of the group, 1, channel] of the full groups, for one token.

        The heads of a group are the rows of one call, so that keys are read once.
        """
        full_groups = self._plans[call.layer].full_groups
        shared = call.query.shape[1] // call.key.shape[1]
        dense = torch.from_numpy(self._dense[call.layer][full_groups])
        mask = None if allowed is None else allowed[:, :1]
        if not dense.all():
            device = call.query.device
            positions = torch.arange(pair[0].shape[2], device=device)
            start = 0 if mask is None else mask[:, :, -1:].int().argmax(-1, keepdim=True)
            near = (first - positions < self.window) | (positions < start + self.sinks)
            visible = dense.to(device)[None, :, :, None] | near
            mask = visible if mask is None else visible & mask
        queries = call.query.unflatten(1, (-1, shared))[:, full_groups, :, 0]
        output = scaled_dot_product_attention(
            queries, pair[0], pair[1], attn_mask=mask, scale=call.scaling
        )
        return output.unsqueeze(3)


def _allowed(call: Call, vlm: VLM) -> torch.Tensor | None:
    """[example, 1, row, key] bool, what the model's own mask allows; None if it is causal."""
    mask, why = call.mask, ""
    allowed = None if mask is None else seen(mask)
    if call.softcap is not None or call.sinks is not None or not call.causal:
        why = "has a bound on its scores, sink scores of its own, or no causal mask"
    elif mask is not None and mask.shape[1] != 1:
        why = "has a mask per head"
    elif mask is not None and allowed is not mask and mask[allowed].any():
        why = "adds a bias to its scores"
    if why:
        raise ValueError(f"layer {call.layer} of {vlm} {why}; window heads are not known there")
    return allowed


def _select_pair(pair: Pair, groups: list[int]) -> Pair:
    return select_groups(pair[0], groups), select_groups(pair[1], groups)


@contextmanager
def stream(vlm: VLM, dense: HeadSet, sinks: int = 4, window: int = 512) -> Iterator[Streaming]:
    """Let all heads but the dense ones see only the first tokens and a window (paper B, Sec. 5).

    The mask is the same in prefill and in decoding, for batches, padding, `generate`, dynamic and
    static caches, and the result equals attention under one mask per head. Layers that slide by
    themselves (Gemma 3) are left as they are. The model is as before at exit, also after an
    exception.

    Args:
        vlm: The model.
        dense: Heads that see everything. Choose whole KV groups to read and keep fewer keys.
        sinks: Number of first tokens that every head sees.
        window: Number of last tokens that the other heads see, the query itself included.

    Yields:
        What is streamed: shares of dense heads and KV groups, and a cache that evicts keys.

    Raises:
        ValueError: A window below 1, negative sinks, or heads of another model; in a call, also
            an attention that is not known here.
    """
    if not _is_count(window, 1) or not _is_count(sinks, 0):
        raise ValueError(
            f"sinks {sinks!r}, window {window!r}: expected a whole number of sinks of 0 or more, "
            "and a window of 1 or more"
        )
    check_heads(vlm, [dense], "dense")
    streaming = Streaming(vlm, dense, sinks, window)
    with streaming.again():
        yield streaming


def _is_count(value: object, least: int) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        return False
    return bool(value >= least)
