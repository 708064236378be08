"""A key-value cache that evicts the keys which window heads no longer see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from mmheads import compat
from mmheads.streaming.kernels import Pair


def cache_bytes(cache: Cache) -> int:
    """Bytes of the keys and values that a cache keeps."""
    layers: list[Any] = cache.layers
    return sum(
        layer.bytes
        if isinstance(layer, CompactLayer)
        else sum(tensor.nbytes for tensor in compat.layer_tensors(layer).values())
        for layer in layers
    )


class CompactLayer(DynamicLayer):
    """One layer of a cache, whose window groups keep only the sinks and the window.

    KV groups then hold different numbers of keys, which no tensor can show to the model. `update`
    therefore returns only the new keys, and the attention reads the others from this object:
    `Streaming` finds it among the arguments of the layer's call, and announces that call to it.

    Attributes:
        full_groups: KV groups that keep all keys; `keys` and `values` hold these.
        window_groups: KV groups that keep only sinks and window.
        sinks: Number of first tokens that the window groups keep.
        window: Number of last tokens that the window groups keep.
        seen: Number of tokens so far, kept or evicted.
        evicted: (first, stop) positions that the window groups have evicted.
        window_pair: Keys and values that the window groups see in the current call, those kept
            before it and the new ones; None in the first call, which sees its own, and between
            calls.
    """

    is_croppable = False

    def __init__(
        self, full_groups: list[int], window_groups: list[int], sinks: int, window: int
    ) -> None:
        """Make an empty layer; see the attributes."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.full_groups, self.window_groups = full_groups, window_groups
        self.sinks, self.window = sinks, window
        self.seen = 0
        self.evicted = (0, 0)
        self.window_pair: Pair | None = None
        self._announced = False
        self._kept: Pair | None = None

    def announce(self) -> None:
        """Allow the next `update`: its attention will read this object."""
        self._announced = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values, [example, KV group, token, channel]; return only these.

        Raises:
            ValueError: The call runs outside of `stream`, where no attention reads this object.
        """
        if not self._announced:
            raise ValueError("this cache evicts keys: use it only inside `stream`")
        self._announced = False
        self.append(key_states, value_states)
        return key_states, value_states

    def append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Append keys and values outside of a forward pass, as `update` does inside of one."""
        super().update(key_states[:, self.full_groups], value_states[:, self.full_groups])
        pair = key_states, value_states
        visible = pair
        if self._kept is not None:
            kept = self._kept[0].shape[2]
            early = min(self.sinks, kept)
            self.evicted = early, self.seen - (kept - early)
            new = key_states[:, self.window_groups], value_states[:, self.window_groups]
            visible = (
                torch.cat([self._kept[0], new[0]], dim=2),
                torch.cat([self._kept[1], new[1]], dim=2),
            )
            self.window_pair = visible
        self.seen += key_states.shape[2]
        keys, values = self._trimmed(visible[0]), self._trimmed(visible[1])
        if visible is pair:
            keys, values = keys[:, self.window_groups], values[:, self.window_groups]
        self._kept = keys, values

    def _trimmed(self, states: torch.Tensor) -> torch.Tensor:
        if states.shape[2] <= self.sinks + self.window:
            return states
        return torch.cat([states[:, :, : self.sinks], states[:, :, -self.window :]], dim=2)

    def get_seq_length(self) -> int:
        """Number of tokens so far, kept or evicted."""
        return self.seen

    @property
    def bytes(self) -> int:
        """Bytes of the keys and values that are kept."""
        kept = (self.keys, self.values, *(self._kept or ()))
        return sum(states.nbytes for states in kept if states is not None)

    @property
    def full_pair(self) -> Pair:
        """Keys and values of the full groups."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.seen, self.evicted, self.window_pair, self._kept = 0, (0, 0), None, None
        self._announced = False

    def _change(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply a change of the batch to all keys and values that are kept."""
        if self._kept is not None:
            self.keys, self.values = map(change, self.full_pair)
            self._kept = change(self._kept[0]), change(self._kept[1])

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Select rows of the batch anew (beam search)."""
        self._change(lambda states: states[beam_idx.to(states.device)])

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to remove tokens: evicted keys cannot come back.

        Raises:
            ValueError: `tokens_to_remove` is not 0.
        """
        if tokens_to_remove:
            raise ValueError("a cache that has evicted keys cannot be cropped; prefill again")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        self._change(lambda states: states.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows of the batch."""
        self._change(lambda states: states[indices.to(states.device)])
