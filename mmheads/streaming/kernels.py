"""Attention of window heads, which see only the first keys (sinks) and the last ones (a window).

Only tensors are known here; `streaming.heads` decides which heads these are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

CHUNK = 128
"""Rows that share a slice of keys; larger chunks read keys that most of their rows do not see."""

BLOCK = 128
"""Rows, and keys, in a block of FlexAttention."""

SMALLEST_TILE = 16
"""Least number of rows in a tile; smaller ones cost more than they save."""

# The only private name of torch in this file.
_FLASH: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
"""Kernel of the stock attention on a CPU; it also returns the sums by which parts are joined."""

Pair = tuple[torch.Tensor, torch.Tensor]
"""Keys and values."""


def visible(rows: torch.Tensor, keys: torch.Tensor, sinks: int, window: int) -> torch.Tensor:
    """[row, key] whether a row of a window head sees a key; `rows` and `keys` are positions."""
    distance = rows[:, None] - keys
    return (distance >= 0) & ((distance < window) | (keys < sinks))


def banded(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    *,
    sinks: int,
    window: int,
    scale: float,
    groups: Sequence[tuple[int, int]] | None = None,
    first: int = 0,
    evicted: tuple[int, int] = (0, 0),
    allowed: torch.Tensor | None = None,
) -> None:
    """Write the attention of window heads into `output`.

    The work grows with rows x (sinks + window). On a CPU, the stock fused attention runs on tiles
    of rows with the keys that they see; on a GPU, FlexAttention skips blocks.

    Args:
        query: [example, KV group, head of the group, row, channel].
        key: [example, KV group, key, channel].
        value: Like `key`.
        output: Like `query`.
        sinks: Number of first keys that every row sees.
        window: Number of last keys that a row sees, its own included.
        scale: Factor on the scores.
        groups: (group of `query`, group of `key`) pairs to attend; by default all, each with the
            same number. Other groups of the output stay as they are, and keys that no row sees are
            never copied.
        first: Position of the first row.
        evicted: (first, stop) positions whose keys were evicted: `key` holds those before and
            after them.
        allowed: [example, 1, row, position] what the model's own mask allows; by default a row
            sees every position up to its own. Sinks begin at an example's first allowed token.
    """
    rows = query.shape[3]
    pairs = list(groups) if groups is not None else [(g, g) for g in range(query.shape[1])]
    plain = allowed is None and not first and evicted[0] == evicted[1]
    tiles = None
    if plain and query.device.type == "cpu" and not query.requires_grad:
        tiles = _Tiles.of(rows, sinks, window)
    if tiles is not None:
        for example, (group, key_group), head in product(
            range(len(query)), pairs, range(query.shape[2])
        ):  # one head at a time, so that its tiles stay in the processor's cache
            tiles.attend(
                query[example, group, head, None],
                key[example, key_group, None],
                value[example, key_group, None],
                scale,
                output[example, group, head, None],
            )
        parts = [slice(0, tiles.start), slice(tiles.stop, rows)]
    else:
        parts = [slice(0, rows)]
    query_groups = [group for group, _ in pairs]
    key_groups = [key_group for _, key_group in pairs]
    if plain and query.is_cuda and rows > BLOCK:
        keys, values = (select_groups(states, key_groups) for states in (key, value))
        queries = select_groups(query, query_groups)
        output[:, query_groups] = flex(
            queries, keys, values, sinks=sinks, window=window, scale=scale
        )
        return
    for part in parts:
        if part.start < part.stop:
            output[:, query_groups, :, part] = _attend_in_chunks(
                select_groups(query[:, :, :, part], query_groups),
                key,
                value,
                key_groups,
                sinks,
                window,
                scale,
                first + part.start,
                evicted,
                allowed,
            )


def select_groups(states: torch.Tensor, groups: list[int]) -> torch.Tensor:
    """Some groups of [example, group, ...], without a copy where they are consecutive."""
    if groups == list(range(groups[0], groups[-1] + 1)):
        return states[:, groups[0] : groups[-1] + 1]
    return states[:, groups]


def _attend_in_chunks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    groups: list[int],
    sinks: int,
    window: int,
    scale: float,
    first: int,
    evicted: tuple[int, int],
    allowed: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of `banded` for some groups of the keys, one chunk of rows after the other."""
    rows = query.shape[3]

    def visible_states(states: torch.Tensor, early: int, begin: int, end: int) -> torch.Tensor:
        parts = [states[:, :, a:b] for a, b in ((0, early), (begin, end)) if a < b]
        parts = [select_groups(part, groups) for part in parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def index_of(position: int) -> int:
        kept, resumed = evicted
        return position if position < kept else max(kept, kept + position - resumed)

    output = torch.empty_like(query)
    starts = None
    if allowed is not None:
        starts = allowed[:, 0, -1].int().argmax(dim=-1)
        if not starts.any():
            starts = None
    masks: dict[tuple[int, ...], torch.Tensor] = {}
    for top in range(0, rows, CHUNK):
        part = slice(top, min(top + CHUNK, rows))
        low, high = max(0, first + part.start - window + 1), first + part.stop
        if allowed is not None:
            seen_keys = allowed[:, :, part].any(dim=2).any(dim=0)[0].nonzero()
            high = int(seen_keys[-1]) + 1 if len(seen_keys) else high
            low = min(low, high - 1)
        early = min(sinks, low)
        if starts is not None:
            early = low = 0
        begin, end = index_of(low), index_of(high)
        early = min(early, begin)
        keys, values = (visible_states(states, early, begin, end) for states in (key, value))
        count = part.stop - part.start
        pattern = (count, end - begin, early)
        mask = masks.get(pattern)
        if mask is None:
            index = torch.arange(begin, end, device=query.device)
            positions = torch.where(index < evicted[0], index, index - evicted[0] + evicted[1])
            positions = torch.cat([torch.arange(early, device=query.device), positions])
            own = torch.arange(first + part.start, first + part.stop, device=query.device)
            mask = _mask(own, positions, sinks, window, starts, allowed, part)
            mask = mask.repeat(*[1] * (mask.ndim - 2), query.shape[2], 1)
            mask = query.new_zeros(mask.shape).masked_fill_(~mask, float("-inf"))
            if allowed is None and early == sinks:  # then it depends only on distances
                masks[pattern] = mask
        packed = query[:, :, :, part].flatten(2, 3)
        attended = scaled_dot_product_attention(packed, keys, values, attn_mask=mask, scale=scale)
        output[:, :, :, part] = attended.unflatten(2, (query.shape[2], count))
    return output


@dataclass(frozen=True)
class _Tiles:
    """Tiles of rows that need neither a full mask nor a copy of keys, on a CPU.

    The keys that a tile of C rows sees lie in four blocks, in this order:

        sinks | ... | C keys, row r sees the last C - 1 - r | window - C keys, all | C own, causal

    Each block is one call for all tiles, on views of the keys. The results are joined by the
    logarithms of their sums.

    Attributes:
        start: First row of the first tile; its window begins behind the sinks.
        stop: First row behind the last tile.
        side: Rows per tile, C.
        sinks: Number of first keys that every row sees.
        window: Number of last keys that a row sees, its own included.
    """

    start: int
    stop: int
    side: int
    sinks: int
    window: int

    @classmethod
    def of(cls, rows: int, sinks: int, window: int) -> _Tiles | None:
        """The tiles of a prompt; None where too few rows or too small a window make them slow."""
        side = min(CHUNK, window)
        start = -(-(window + sinks) // side) * side
        stop = rows - rows % side
        if side < SMALLEST_TILE or stop - start < 2 * side or _FLASH is None:
            return None
        return cls(start, stop, side, sinks, window)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        output: torch.Tensor,
    ) -> None:
        """Fill the tiles' rows of one head's output; all tensors are [1, row, channel]."""
        side, count = self.side, (self.stop - self.start) // self.side
        tiles = _windows(query, self.start, count, side, side)

        def see(begin: int, length: int, step: int = side, **settings: Any) -> Part:
            states = (_windows(t, begin, count, length, step) for t in (key, value))
            return _flash(tiles, *states, scale=scale, **settings)

        row = torch.arange(side)
        least = query.new_zeros(side, side).masked_fill_(row <= row[:, None], float("-inf"))
        parts = [see(self.start, side, causal=True)]
        if self.window > side:
            parts.append(see(self.start + side - self.window, self.window - side))
        attended, sums = see(self.start - self.window, side, mask=least)
        attended[:, :, -1], sums[:, :, -1] = 0.0, float("-inf")  # the last row sees none of these
        parts.append((attended, sums))
        if self.sinks:
            parts.append(see(0, self.sinks, step=0))
        _join(parts, _windows(output, self.start, count, side, side))


def causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """Causal attention of full prompts, [example, head, row, channel].

    On a CPU, the stock kernel gives each thread consecutive heads and rows. If the threads cannot
    share the heads equally, one thread gets the later rows, which see more keys. The rows are then
    computed as two halves of equal cost.
    """
    rows, threads = query.shape[2], torch.get_num_threads()
    half = rows // 2
    odd = len(query) * query.shape[1] % threads
    undivided = query.requires_grad or not odd or rows % 2 or half < CHUNK or _FLASH is None
    if query.device.type != "cpu" or undivided:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    output = torch.empty_like(query)
    for example in range(len(query)):
        halves = (_windows(t[example], 0, 2, half, half) for t in (query, key, value))
        attended, sums = _flash(*halves, scale=scale, causal=True)
        output[example, :, :half] = attended[0]
        late = query[example : example + 1, :, half:]
        early = (t[example : example + 1, :, :half] for t in (key, value))
        before = _flash(late, *early, scale=scale)
        _join([(attended[1:], sums[1:]), before], output[example : example + 1, :, half:])
    return output


Part = tuple[torch.Tensor, torch.Tensor]
"""An output, and per row the logarithm of the sum of its exponentials."""


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: torch.Tensor | None = None,
) -> Part:
    assert _FLASH is not None
    part: Part = _FLASH(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)
    return part


def _join(parts: list[Part], output: torch.Tensor) -> None:
    """Write the attention over the keys of all parts into `output`."""
    sums = torch.stack([sums for _, sums in parts])
    weights = (sums - sums.logsumexp(dim=0)).exp_().unsqueeze(-1)
    exact = output.dtype == weights.dtype
    joined = output if exact else torch.empty_like(output, dtype=weights.dtype)
    torch.mul(parts[0][0], weights[0], out=joined)
    for (attended, _), weight in zip(parts[1:], weights[1:], strict=True):
        joined.addcmul_(attended, weight)
    if not exact:
        output.copy_(joined)


def _windows(states: torch.Tensor, start: int, count: int, length: int, step: int) -> torch.Tensor:
    """A view [window, head, row, channel] of `length` rows every `step` rows."""
    head, row, channel = states.stride()
    return states.as_strided(
        (count, states.shape[0], length, states.shape[2]),
        (step * row, head, row, channel),
        states.storage_offset() + start * row,
    )


def _mask(
    rows: torch.Tensor,
    keys: torch.Tensor,
    sinks: int,
    window: int,
    starts: torch.Tensor | None,
    allowed: torch.Tensor | None,
    part: slice,
) -> torch.Tensor:
    """[row, key] what rows see, or [example, 1, row, key] under a mask of the model's own."""
    if allowed is None:
        return visible(rows, keys, sinks, window)
    near = rows[:, None] - keys < window
    first_tokens = 0 if starts is None else starts[:, None, None, None]
    return allowed[:, :, part][..., keys] & (near | (keys < first_tokens + sinks))


def flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    sinks: int,
    window: int,
    scale: float,
    compiled: bool = True,
) -> torch.Tensor:
    """Attention of `banded` for a full prompt by FlexAttention; layers share one block mask."""
    mask = block_mask(query.shape[3], sinks, window, str(query.device))
    attend = _compiled() if compiled else flex_attention
    output: torch.Tensor = attend(
        query.flatten(1, 2), key, value, block_mask=mask, scale=scale, enable_gqa=query.shape[2] > 1
    )
    return output.view_as(query)


@cache
def _compiled() -> Any:
    compiled = torch.compile(flex_attention)
    return torch.compiler.set_stance("default")(compiled)  # the model around it runs uncompiled


@cache
def block_mask(length: int, sinks: int, window: int, device: str) -> BlockMask:
    """The blocks that window heads see, made without a length x length mask."""
    count = -(-length // BLOCK)
    row = torch.arange(count, device=device)[:, None]
    column = torch.arange(count, device=device)
    nearest = (row - column) * BLOCK - (BLOCK - 1)
    farthest = (row - column) * BLOCK + BLOCK - 1
    some = (column <= row) & ((nearest < window) | (column * BLOCK < sinks))
    full = (column < row) & ((farthest < window) | ((column + 1) * BLOCK <= sinks))

    def listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        order = blocks.int().argsort(dim=-1, descending=True, stable=True)
        return blocks.sum(-1).int()[None, None], order.int()[None, None]

    def sees(
        example: torch.Tensor, head: torch.Tensor, row: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        return (row >= key) & ((row - key < window) | (key < sinks))

    return BlockMask.from_kv_blocks(
        *listed(some & ~full),
        *listed(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(length, length),
    )
