"""One attention function, and what it does beside attending: record where heads look.

It is registered once under a neutral name and switched on for the language model alone. It calls
the stock attention first, so that logits do not change by one bit, and then reads the queries and
keys that the model really used.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmheads.models import VLM

_NAMES = {"sdpa": "mmheads", "eager": "mmheads_eager"}
"""By stock attention, the name of ours on top of it: masks are made by name."""
_STATE = "_mmheads"
"""Attribute of an attention module that says what to do there."""
WORKING_SET = 64 << 20
"""Bytes that the scores of a layer may take at a time."""


@dataclass(eq=False)
class Recording:
    """Where the rows of one forward call look, filled layer by layer.

    Attributes:
        rows: [example, row] rows of the call, by index; -1 is padding.
        weights: [example, key, span] share of each key that belongs to each span.
        text: [example, key] keys over which the entropy is taken.
        masses: By layer: [example, head, row, span] attention to the span, float32.
        entropies: By layer: [example, head, row] entropy in nats of the attention among `text`; 0
            where no attention goes there.
        norms: By layer: [example, head, row] Euclidean norm of the head's output.
    """

    rows: torch.Tensor
    weights: torch.Tensor
    text: torch.Tensor | None = None
    masses: dict[int, torch.Tensor] = field(default_factory=dict)
    entropies: dict[int, torch.Tensor] = field(default_factory=dict)
    norms: dict[int, torch.Tensor] = field(default_factory=dict)

    def mass(self, layers: int) -> torch.Tensor:
        """[example, layer, head, row, span] on the CPU; 0 in layers without heads."""
        return _stacked(self.masses, layers)

    def entropy(self, layers: int) -> torch.Tensor:
        """[example, layer, head, row] on the CPU; 0 in layers without heads."""
        return _stacked(self.entropies, layers)

    def norm(self, layers: int) -> torch.Tensor:
        """[example, layer, head, row] on the CPU; 0 in layers without heads."""
        return _stacked(self.norms, layers)


def _stacked(by_layer: dict[int, torch.Tensor], layers: int) -> torch.Tensor:
    if not by_layer:
        raise ValueError("nothing was recorded: no forward call ran inside `record_mass`")
    empty = torch.zeros_like(next(iter(by_layer.values())), device="cpu")
    found = [by_layer[i].cpu() if i in by_layer else empty for i in range(layers)]
    return torch.stack(found, dim=1)


@contextmanager
def record_mass(
    vlm: VLM,
    rows: torch.Tensor,
    weights: torch.Tensor,
    *,
    text: torch.Tensor | None = None,
) -> Iterator[Recording]:
    """Record, in the first forward call inside, where the given rows look.

    Masses are computed in float32 from the model's own queries and keys; memory grows with
    rows x keys. The model is as before at exit, also after an exception.

    Args:
        vlm: The model.
        rows: [example, row] indices of the call's tokens; -1 is padding and gives 0.
        weights: [example, key, span], keys counted from the first token in the cache.
        text: [example, key] bool; also record the entropy of the attention among these keys.

    Raises:
        ValueError: The model runs on another attention than "sdpa" or "eager".
    """
    recording = Recording(rows, weights, text)
    with _attached(vlm, dict.fromkeys(vlm.attentions, recording)):
        yield recording


@contextmanager
def _attached(vlm: VLM, states: dict[int, Recording]) -> Iterator[None]:
    """Switch the language model to our attention, with a state in some layers."""
    config = vlm.text_config
    stock = config._attn_implementation
    if stock not in _NAMES:
        raise ValueError(
            f"{vlm} runs on the attention {stock!r}; load it with one of "
            f"{', '.join(map(repr, _NAMES))}"
        )
    _switch(vlm, _NAMES[stock])
    try:
        for layer, state in states.items():
            setattr(vlm.attentions[layer], _STATE, state)
        yield
    finally:
        for module in vlm.attentions.values():
            module.__dict__.pop(_STATE, None)
        _switch(vlm, stock)


def _switch(vlm: VLM, name: str) -> None:
    config = vlm.model.config
    if vlm.is_text_only:
        vlm.model.set_attn_implementation(name)
        return
    key = next(key for key in config.sub_configs if getattr(config, key) is vlm.text_config)
    vlm.model.set_attn_implementation({key: name})


def _attention(base: str) -> Any:
    def attend(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        stock = ALL_ATTENTION_FUNCTIONS.get_interface(base, _eager(module))
        settings = dict(kwargs) if is_causal is None else {**kwargs, "is_causal": is_causal}
        output, attention = stock(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            dropout=dropout,
            **settings,
        )
        state: Recording | None = getattr(module, _STATE, None)
        layer = module.layer_idx
        if state is not None and layer not in state.masses:
            if kwargs.get("position_bias") is not None:
                raise ValueError("attention with a position bias cannot be recorded")
            causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
            _record(
                state,
                layer,
                query.detach(),
                key.detach(),
                output.detach(),
                _allowed(attention_mask, state.rows, query, key, causal),
                scaling or query.shape[-1] ** -0.5,
                kwargs.get("softcap"),
                kwargs.get("s_aux"),
            )
        return output, attention

    return attend


def _eager(module: Any) -> Any:
    """The eager attention of the module's own modelling file."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


for _base, _name in _NAMES.items():
    AttentionInterface.register(_name, _attention(_base))
    AttentionMaskInterface.register(_name, ALL_MASK_ATTENTION_FUNCTIONS[_base])


def _allowed(
    mask: torch.Tensor | None,
    rows: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    causal: bool,
) -> torch.Tensor | None:
    """[example, 1 or head, row, key]: bool, or a number to add; None where all is allowed."""
    keys, device = key.shape[2], query.device
    rows = rows.to(device).clamp(min=0)
    if mask is not None:
        mask = mask[..., :keys].expand(len(query), -1, -1, -1)
        index = rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[-1])
        return mask.gather(2, index)
    if causal and query.shape[2] > 1:
        return torch.arange(keys, device=device) <= rows[:, None, :, None]
    return None


def _record(
    state: Recording,
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    output: torch.Tensor,
    allowed: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> None:
    """Add a layer to a recording; query [example, head, token, channel], key by KV group."""
    examples, heads = query.shape[:2]
    groups, keys = key.shape[1:3]
    shared = heads // groups
    rows = state.rows.to(query.device)
    count = rows.shape[1]
    weights = _of_keys(state.weights.to(query.device, torch.float32), keys)
    text = None
    if state.text is not None:
        text = _of_keys(state.text.to(query.device)[..., None], keys)[..., 0]
    mass = weights.new_empty(examples, heads, count, weights.shape[2])
    entropy = weights.new_zeros(examples, heads, count)
    step = max(1, WORKING_SET // (12 * shared * count * keys))
    for example in range(examples):
        picked = query[example].index_select(1, rows[example].clamp(min=0)).float() * scaling
        for first in range(0, groups, step):
            some = slice(first * shared, min(groups, first + step) * shared)
            grouped = picked[some].reshape(-1, shared * count, picked.shape[-1])
            scores = grouped @ key[example, first : first + step].float().transpose(1, 2)
            scores = scores.view(-1, count, keys)
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if allowed is not None:
                here = allowed[example] if allowed.shape[1] == 1 else allowed[example, some]
                if here.dtype == torch.bool:
                    scores.masked_fill_(~here, float("-inf"))
                else:
                    scores += here.float()
            if sinks is not None:
                sink = sinks[some].float().view(-1, 1, 1).expand(-1, count, 1)
                attention = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
            else:
                attention = scores.softmax(-1)
            mass[example, some] = attention @ weights[example]
            if text is not None:
                among = attention * text[example]
                total = among.sum(-1)
                spread = total.log() - torch.xlogy(among, among).sum(-1) / total
                entropy[example, some] = torch.where(total > 0, spread, 0.0)
    padding = (rows < 0)[:, None, :]
    index = rows.clamp(min=0)[:, :, None, None].expand(-1, -1, *output.shape[2:])
    norm = output.gather(1, index).float().norm(dim=-1).transpose(1, 2)
    state.masses[layer] = mass.masked_fill_(padding[..., None], 0.0)
    state.entropies[layer] = entropy.masked_fill_(padding, 0.0)
    state.norms[layer] = norm.masked_fill(padding, 0.0)


def _of_keys(values: torch.Tensor, keys: int) -> torch.Tensor:
    """Values [example, token, ...] of the keys that a layer holds.

    A sliding cache holds the last ones alone, a static one empty ones behind.
    """
    values = values[:, -keys:]
    missing = keys - values.shape[1]
    return torch.nn.functional.pad(values, (0, 0, 0, missing)) if missing else values
