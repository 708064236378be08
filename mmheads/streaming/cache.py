"""A key-value cache that drops the keys which window heads no longer see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from mmheads.streaming.kernels import Pair

OWNER = "_mmheads_cache"


def cache_bytes(cache: Cache) -> int:
    """Size of what a cache keeps."""
    layers: list[Any] = cache.layers
    return sum(
        layer.bytes
        if isinstance(layer, CompactLayer)
        else int(layer.keys.nbytes + layer.values.nbytes)
        for layer in layers
    )


class CompactLayer(DynamicLayer):
    """A layer of a cache whose window groups keep sinks and window alone.

    `keys` and `values` hold the open groups; `band` the keys and values of the others.

    The keys that `update` gives carry the layer as their attribute `OWNER`.

    Attributes:
        open: KV groups that keep everything.
        closed: The others.
        sinks: First tokens that those keep.
        window: Last tokens that those keep.
        seen: Tokens so far.
        gap: As in `banded`, of what `band` holds.
        band: In a call behind the first, keys and values that the closed groups' rows may see.
    """

    is_croppable = False
    streams = 0
    """How many `stream` contexts are open."""

    def __init__(self, open_: list[int], closed: list[int], sinks: int, window: int) -> None:
        """An empty layer; see the attributes."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.open, self.closed, self.sinks, self.window = open_, closed, sinks, window
        self.seen = 0
        self.gap = (0, 0)
        self.band: Pair | None = None
        self._kept: Pair | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take new tokens; gives them alone back, since groups hold unequal numbers of tokens.

        Raises:
            ValueError: No heads stream now.
        """
        if not CompactLayer.streams:
            raise ValueError("this cache drops keys: use it inside of `stream` alone")
        super().update(key_states[:, self.open], value_states[:, self.open])
        pair = key_states, value_states
        if self._kept is None:
            band = pair
        else:
            new = key_states[:, self.closed], value_states[:, self.closed]
            held = self._kept[0].shape[2]
            early = min(self.sinks, held)
            self.gap = early, self.seen - (held - early)
            band = self.band = (
                torch.cat([self._kept[0], new[0]], dim=2),
                torch.cat([self._kept[1], new[1]], dim=2),
            )
        self.seen += key_states.shape[2]
        kept = self._trimmed(band[0]), self._trimmed(band[1])
        if band is pair:
            kept = kept[0][:, self.closed], kept[1][:, self.closed]
        self._kept = kept
        setattr(key_states, OWNER, self)
        return pair

    def _trimmed(self, states: torch.Tensor) -> torch.Tensor:
        if states.shape[2] <= self.sinks + self.window:
            return states
        return torch.cat([states[:, :, : self.sinks], states[:, :, -self.window :]], dim=2)

    def get_seq_length(self) -> int:
        """Tokens so far, kept or not."""
        return self.seen

    @property
    def bytes(self) -> int:
        """Size of what is kept."""
        held = (self.keys, self.values, *(self._kept or ()))
        return sum(states.nbytes for states in held if states is not None)

    @property
    def whole(self) -> Pair:
        """Keys and values of the open groups."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.seen, self.gap, self.band, self._kept = 0, (0, 0), None, None

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Change the batch of all that is kept."""
        if self._kept is not None:
            self.keys, self.values = map(change, self.whole)
            self._kept = change(self._kept[0]), change(self._kept[1])

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Choose rows of the batch again (beam search)."""
        self._each(lambda states: states[beam_idx.to(states.device)])

    def crop(self, tokens_to_remove: int) -> None:
        """Raises ValueError, but for 0 tokens: dropped keys cannot come back."""
        if tokens_to_remove:
            raise ValueError("a cache that has dropped keys cannot be cut; prefill again")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        self._each(lambda states: states.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows of the batch."""
        self._each(lambda states: states[indices.to(states.device)])
