"""Attention of heads that see the first keys (sinks) and the last ones (a window) alone.

Tensors only: which heads these are is decided in `attention.stream`.
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
"""Rows that share a slice of keys: larger chunks read keys that most of their rows do not see."""


BLOCK = 128
"""Rows and keys of a block of FlexAttention."""


SMALLEST_TILE = 16


_FLASH: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
"""What the stock attention runs on a CPU; it also gives the sums by which parts are joined."""


Pair = tuple[torch.Tensor, torch.Tensor]
"""Keys and values."""


def visible(rows: torch.Tensor, keys: torch.Tensor, sinks: int, window: int) -> torch.Tensor:
    """[row, key] whether a window head's row sees a key; both are positions."""
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
    gap: tuple[int, int] = (0, 0),
    allowed: torch.Tensor | None = None,
) -> None:
    """Attention of window heads, written into `output`.

    The work grows with rows x (sinks + window). On a CPU, tiles of rows are taken with the keys
    that they see, through the stock fused attention; on a GPU, FlexAttention skips blocks.

    Args:
        query: [example, KV group, head of the group, row, channel].
        key: [example, KV group, key, channel].
        value: Like `key`.
        output: Like `query`.
        sinks: First keys that every row sees.
        window: Last keys that a row sees, itself included.
        scale: Factor on the scores.
        groups: Groups of `query` to attend, each with its group of `key`; by default all, each
            with its own. Other groups of the output stay as they are, and what no row sees is never
            copied.
        first: Position of the first row.
        gap: Keys up to the first number stand at their positions, the others from the second
            number on; those between were dropped.
        allowed: [example, 1, row, position] what the model's own mask allows; by default a row
            sees every position up to its own. Sinks then begin at an example's first token.
    """
    rows = query.shape[3]
    pairs = list(groups) if groups is not None else [(g, g) for g in range(query.shape[1])]
    plain = allowed is None and not first and gap[0] == gap[1]
    tiles = None
    if plain and query.device.type == "cpu" and not query.requires_grad:
        tiles = _Tiles.of(rows, sinks, window)
    if tiles is not None:
        for example, (group, of_keys), head in product(
            range(len(query)), pairs, range(query.shape[2])
        ):  # one after the other: their parts stay in the processor's cache
            tiles.attend(
                query[example, group, head, None],
                key[example, of_keys, None],
                value[example, of_keys, None],
                scale,
                output[example, group, head, None],
            )
        parts = [slice(0, tiles.start), slice(tiles.stop, rows)]
    else:
        parts = [slice(0, rows)]
    mine, theirs = [group for group, _ in pairs], [of_keys for _, of_keys in pairs]
    if plain and query.is_cuda and rows > BLOCK:
        states = picked(query, mine), picked(key, theirs), picked(value, theirs)
        output[:, mine] = flex(*states, sinks=sinks, window=window, scale=scale)
        return
    for part in parts:
        if part.start < part.stop:
            some = picked(query[:, :, :, part], mine)
            at = first + part.start
            output[:, mine, :, part] = _looped(
                some, key, value, theirs, sinks, window, scale, at, gap, allowed
            )


def picked(states: torch.Tensor, groups: list[int]) -> torch.Tensor:
    """Some groups of [example, group, ...], without a copy where they are consecutive."""
    if groups == list(range(groups[0], groups[-1] + 1)):
        return states[:, groups[0] : groups[-1] + 1]
    return states[:, groups]


def _looped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    groups: list[int],
    sinks: int,
    window: int,
    scale: float,
    first: int,
    gap: tuple[int, int],
    allowed: torch.Tensor | None,
) -> torch.Tensor:
    """`banded` with some groups of the keys, chunk of rows by chunk."""
    rows = query.shape[3]

    def seen_by(states: torch.Tensor, early: int, begin: int, end: int) -> torch.Tensor:
        parts = [states[:, :, a:b] for a, b in ((0, early), (begin, end)) if a < b]
        parts = [picked(part, groups) for part in parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    output = torch.empty_like(query)
    kept, resumed = gap
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
            seen = allowed[:, :, part].any(dim=2).any(dim=0)[0].nonzero()
            high = int(seen[-1]) + 1 if len(seen) else high
            low = min(low, high - 1)
        early = min(sinks, low)
        if starts is not None:
            early = low = 0
        begin, end = (at if at < kept else max(kept, kept + at - resumed) for at in (low, high))
        early = min(early, begin)
        keys, values = (seen_by(states, early, begin, end) for states in (key, value))
        count = part.stop - part.start
        pattern = (count, end - begin, early)
        mask = masks.get(pattern)
        if mask is None:
            at = torch.arange(begin, end, device=query.device)
            at = torch.where(at < kept, at, at - kept + resumed)
            at = torch.cat([torch.arange(early, device=query.device), at])
            own = torch.arange(first + part.start, first + part.stop, device=query.device)
            mask = _mask(own, at, sinks, window, starts, allowed, part)
            mask = mask.repeat(*[1] * (mask.ndim - 2), query.shape[2], 1)
            mask = query.new_zeros(mask.shape).masked_fill_(~mask, float("-inf"))
            if allowed is None and early == sinks:  # then it depends on distances alone
                masks[pattern] = mask
        packed = query[:, :, :, part].flatten(2, 3)
        found = scaled_dot_product_attention(packed, keys, values, attn_mask=mask, scale=scale)
        output[:, :, :, part] = found.unflatten(2, (query.shape[2], count))
    return output


@dataclass(frozen=True)
class _Tiles:
    """Whole tiles of rows, on a CPU, without a mask over what a row sees or a copy of its keys.

    A tile of C rows sees its own keys causally, the window - C keys before them all, of the C keys
    before those each row one less, and the sinks. Each kind is one call for all tiles, on views;
    their results are joined by the logarithms of their sums.

    Attributes:
        start: First row of the first tile, which sees all sinks behind a whole window.
        stop: Row behind the last tile.
        side: Rows of a tile.
    """

    start: int
    stop: int
    side: int
    sinks: int
    window: int

    @classmethod
    def of(cls, rows: int, sinks: int, window: int) -> _Tiles | None:
        """None where there are too few rows, or too small a window, to pay."""
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
        """Fill the tiles' rows of a head's output; all [1, row, channel]."""
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
        found, sums = see(self.start - self.window, side, mask=least)
        found[:, :, -1], sums[:, :, -1] = 0.0, float("-inf")  # the last row sees none of these
        parts.append((found, sums))
        if self.sinks:
            parts.append(see(0, self.sinks, step=0))
        _join(parts, _windows(output, self.start, count, side, side))


def causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """Causal attention of whole prompts, [example, head, row, channel].

    On a CPU, threads share out heads and rows in order, so that one of them gets the later, longer
    rows of an odd head: then halves of the rows are taken as equals.
    """
    rows, threads = query.shape[2], torch.get_num_threads()
    half = rows // 2
    odd = len(query) * query.shape[1] % threads
    whole = query.requires_grad or not odd or rows % 2 or half < CHUNK or _FLASH is None
    if query.device.type != "cpu" or whole:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    output = torch.empty_like(query)
    for example in range(len(query)):
        halves = (_windows(t[example], 0, 2, half, half) for t in (query, key, value))
        found, sums = _flash(*halves, scale=scale, causal=True)
        output[example, :, :half] = found[0]
        late = query[example : example + 1, :, half:]
        early = (t[example : example + 1, :, :half] for t in (key, value))
        before = _flash(late, *early, scale=scale)
        _join([(found[1:], sums[1:]), before], output[example : example + 1, :, half:])
    return output


Part = tuple[torch.Tensor, torch.Tensor]
"""An output, and by row the logarithm of the sum of its exponentials."""


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
    """Write the attention over the keys of all parts."""
    sums = torch.stack([sums for _, sums in parts])
    weights = (sums - sums.logsumexp(dim=0)).exp_().unsqueeze(-1)
    exact = output.dtype == weights.dtype
    joined = output if exact else torch.empty_like(output, dtype=weights.dtype)
    torch.mul(parts[0][0], weights[0], out=joined)
    for (found, _), weight in zip(parts[1:], weights[1:], strict=True):
        joined.addcmul_(found, weight)
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
    """[row, key], or [example, 1, row, key] with a mask of the model's own."""
    if allowed is None:
        return visible(rows, keys, sinks, window)
    near = rows[:, None] - keys < window
    if starts is None:
        band = near | (keys < sinks)
    else:
        band = near | (keys < starts[:, None, None, None] + sinks)
    return allowed[:, :, part][..., keys] & band


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
    """`banded` for a whole prompt by FlexAttention, with one block mask a length for all layers."""
    mask = block_mask(query.shape[3], sinks, window, str(query.device))
    attend = _compiled() if compiled else flex_attention
    output: torch.Tensor = attend(
        query.flatten(1, 2),
        key,
        value,
        block_mask=mask,
        scale=scale,
        enable_gqa=query.shape[2] > 1,
    )
    return output.view_as(query)


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention)


@cache
def block_mask(length: int, sinks: int, window: int, device: str) -> BlockMask:
    """Blocks that window heads see, made without a length x length mask."""
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
