"""Attention of window heads, which see only the first keys (sinks) and the last ones (a window).

Only tensors are known here; `streaming.heads` decides which heads these are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

TILE = 32
"""Rows of a window head that share a view of keys on a CPU."""

CALLED_ROWS = 8192
"""Rows of window heads, together, in a call on a CPU: short prompts attend with several heads."""

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
    query_groups = [group for group, _ in pairs]
    key_groups = [key_group for _, key_group in pairs]
    plain = allowed is None and not first and evicted[0] == evicted[1]
    if plain and query.is_cuda and rows > BLOCK:
        keys, values = (select_groups(states, key_groups) for states in (key, value))
        queries = select_groups(query, query_groups)
        output[:, query_groups] = flex(
            queries, keys, values, sinks=sinks, window=window, scale=scale
        )
        return
    begin = min(rows, sinks + window) if plain else 0  # until then, rows see all before them
    for run, of_keys in _runs(pairs) if begin else ():
        keys, values = (t[:, of_keys, :begin] for t in (key, value))
        for head in range(query.shape[2]):
            queries = query[:, run, head, :begin]
            output[:, run, head, :begin] = causal(queries, keys, values, scale)
    end = begin
    if begin and query.device.type == "cpu" and not query.requires_grad and _FLASH is not None:
        end += (rows - begin) // TILE * TILE
        near = torch.arange(window + TILE)
        mask = query.new_zeros(TILE, len(near))
        mask.masked_fill_(~visible(near[window:], near, 0, window), float("-inf"))
    runs = _runs(pairs, max(1, CALLED_ROWS // rows)) if begin < end else ()
    for example, (run, of_keys), head in product(range(len(query)), runs, range(query.shape[2])):
        # few heads at a time, so that their tiles stay in the processor's cache
        states = query[example, run, head], key[example, of_keys], value[example, of_keys]
        _attend_in_tiles(*states, output[example, run, head], slice(begin, end), sinks, mask, scale)
    if end < rows:
        output[:, query_groups, :, end:] = _attend_in_chunks(
            select_groups(query[:, :, :, end:], query_groups),
            key,
            value,
            key_groups,
            sinks,
            window,
            scale,
            first + end,
            evicted,
            allowed,
        )


def _runs(pairs: Sequence[tuple[int, int]], most: int = 0) -> Iterator[tuple[slice, slice]]:
    """Consecutive groups of `banded`, at most so many, so that no states are copied."""
    first = 0
    for last, (group, key_group) in enumerate(pairs, start=1):
        full = last == len(pairs) or last - first == most
        if full or pairs[last] != (group + 1, key_group + 1):
            before = last - first - 1
            yield slice(group - before, group + 1), slice(key_group - before, key_group + 1)
            first = last


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


def _attend_in_tiles(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    rows: slice,
    sinks: int,
    mask: torch.Tensor,
    scale: float,
) -> None:
    """Fill rows of the output on a CPU; all tensors are [head, row, channel].

    A tile of rows, and the window before it with its own keys, are views: one call attends in all
    tiles under one mask [row, key], and another one to the sinks, which lie before all windows.
    """
    begin, width = rows.start, mask.shape[1]
    count = (rows.stop - begin) // TILE
    tiles = _windows(query, begin, count, TILE, TILE)
    states = (_windows(t, begin + TILE - width, count, width, TILE) for t in (key, value))
    attended, sums = _flash(tiles, *states, scale=scale, mask=mask)
    filled = _windows(output, begin, count, TILE, TILE)
    if not sinks:
        filled.copy_(attended)
        return
    early = (t[None, :, :sinks] for t in (key, value))
    parts = _flash(query[None, :, rows], *early, scale=scale)
    first, weights = (part[0].unflatten(1, (count, TILE)).transpose(0, 1) for part in parts)
    _join((attended, sums), (first, weights), filled)


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
        _join((attended[1:], sums[1:]), before, output[example : example + 1, :, half:])
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


def _join(one: Part, other: Part, output: torch.Tensor) -> None:
    """Write the attention over the keys of both parts into `output`."""
    weight = torch.sigmoid(one[1] - other[1]).unsqueeze(-1)
    output.copy_(torch.lerp(other[0].to(weight), one[0].to(weight), weight))


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
