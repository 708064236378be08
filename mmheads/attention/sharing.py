"""Ablations of one prompt in one batch, whose rows share all that comes before their first head.

Rows that differ only in the heads that are ablated are equal up to the first layer in which they
differ. Until then one row stands for all of them: the batch grows from layer to layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mmheads import compat
from mmheads.attention.hook import Call, attached
from mmheads.attention.interventions import Ablation, ablation
from mmheads.heads import HeadSet
from mmheads.models import VLM


def can_share(vlm: VLM) -> bool:
    """Whether rows can share layers: every layer has its own heads, keys and values."""
    kinds = compat.setting(vlm.text_config, "layer_types") or ()
    return (
        len(getattr(vlm.decoder, "layers", ())) == len(vlm.attentions) == vlm.geometry.layers
        and not compat.shares_keys(vlm.text_config)
        and all(kind.endswith("attention") and "linear" not in kind for kind in kinds)
    )


@contextmanager
def ablate_rows(
    vlm: VLM,
    inputs: Mapping[str, torch.Tensor],
    heads: Sequence[HeadSet],
    mode: str = "zero",
    when: str = "both",
    *,
    means: torch.Tensor | None = None,
) -> Iterator[None]:
    """As `ablate` with a set of heads for each row, for rows that all hold the same prompt.

    The first forward call inside must be that of the prompt, in one row or in all. Its images are
    embedded once, each layer runs once for all rows that are equal up to there, and in the last
    layer only the prompt's last token attends: the call gives the logits of that token, for
    all rows, and a cache of all rows. Later calls, those that decode, have all rows.

    Args:
        vlm: A model of which `can_share` is true.
        inputs: Model inputs of the prompt, a batch of one, on the model's device.
        heads: A set for each row.
        mode: See `ablate`.
        when: See `ablate`.
        means: See `ablate`.

    Raises:
        ValueError: As `ablate` does.
    """
    state = ablation(vlm, heads, mode, when, means)
    rows = _Rows.of(state.heads.numpy() & (when != "decode"))
    shared = _Shared(state, rows)

    def first(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if not shared.running:
            return args, kwargs
        replaced = {*inputs, compat.ENCODED_IMAGES}
        one = {name: value for name, value in kwargs.items() if name not in replaced}
        if one.get("position_ids") is not None:
            one["position_ids"] = one["position_ids"][..., :1, :]
        return args, {**one, **inputs}

    def grow(layer: int) -> Any:
        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            index = rows.grown[layer]
            if not shared.running or len(index) == 1:
                return None
            if args:
                return (args[0][index], *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": kwargs["hidden_states"][index]}

        return hook

    def spread(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not shared.running:
            return
        shared.running = False
        output.logits = output.logits[:, -1:][rows.of_layer[-1]]
        if (cache := output.get("past_key_values")) is not None:
            for layer, of_rows in zip(cache.layers, rows.of_layer, strict=True):
                layer.batch_select_indices(of_rows.to(layer.keys.device))

    with ExitStack() as stack:
        add = vlm.model.register_forward_pre_hook
        stack.callback(add(first, with_kwargs=True).remove)
        for number, layer in enumerate(vlm.decoder.layers):
            handle = layer.register_forward_pre_hook(grow(number), with_kwargs=True)
            stack.callback(handle.remove)
        handle = vlm.model.register_forward_hook(spread, with_kwargs=True)
        stack.callback(handle.remove)
        stack.enter_context(compat.deepstack_of_rows(vlm.decoder))
        stack.enter_context(attached(vlm, dict.fromkeys(vlm.attentions, shared)))
        stack.enter_context(state.putting_means(vlm, vlm.attentions, shared.heads))
        yield


@dataclass(frozen=True, eq=False)
class _Rows:
    """Which rows of a batch are still equal, by layer.

    Attributes:
        of_layer: [row] number of its class of equal rows once the layer's heads are ablated.
        standing: [class] a row of each class.
        grown: [class] the class that it was part of in the layer before.
    """

    of_layer: list[torch.Tensor]
    standing: list[torch.Tensor]
    grown: list[torch.Tensor]

    @classmethod
    def of(cls, heads: np.ndarray) -> _Rows:
        """Returns the classes of rows with heads [row, layer, head] bool."""
        before = np.zeros(len(heads), dtype=np.int64)
        found = cls([], [], [])
        for layer in range(heads.shape[1]):
            known = np.column_stack([before, heads[:, layer]])
            _, first, now = np.unique(known, axis=0, return_index=True, return_inverse=True)
            now = now.reshape(-1)
            found.of_layer.append(torch.from_numpy(now))
            found.standing.append(torch.from_numpy(first))
            found.grown.append(torch.from_numpy(before[first]))
            before = now
        return found


@dataclass(eq=False)
class _Shared:
    """What `ablate_rows` does in a layer."""

    state: Ablation
    rows: _Rows
    running: bool = True

    def __call__(self, call: Call) -> torch.Tensor:
        if not self.running:
            return self.state(call)
        rows, last = self.rows, call.layer == len(self.rows.grown) - 1
        _, at = np.unique(rows.grown[call.layer].numpy(), return_index=True)
        one, seen = torch.from_numpy(at), slice(-1 if last else None, None)
        mask = None if call.mask is None else call.mask[..., seen, :]
        attended, _ = call.stock(call.query[one][:, :, seen], call.key[one], call.value[one], mask)
        output = attended[rows.grown[call.layer]]
        if last:
            whole = output.new_zeros(len(output), call.query.shape[2], *output.shape[2:])
            whole[:, -1:] = output
            output = whole
        call.output = output
        return self.state(call, self.heads(call.layer))

    def heads(self, layer: int) -> torch.Tensor:
        """[row, layer, head] the heads of the rows that run in a layer now."""
        return self.state.heads[self.rows.standing[layer]] if self.running else self.state.heads
