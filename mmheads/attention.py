"""One attention function, and what it does beside attending: record where heads look, ablate them.

It is registered once under a neutral name and switched on for the language model alone. It calls
the stock attention first, so that logits do not change by one bit, and then reads the queries and
keys that the model really used, or changes what the heads gave.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmheads.heads import HeadSet
from mmheads.models import VLM

_NAMES = {"sdpa": "mmheads", "eager": "mmheads_eager"}
"""By stock attention, the name of ours on top of it: masks are made by name."""
_STATE = "_mmheads"
"""Attribute of an attention module that says what to do there."""
WORKING_SET = 64 << 20
"""Bytes that the scores of a layer may take at a time."""
MODES = ("zero", "mean", "uniform")
WHEN = ("both", "prefill", "decode", "answer")


@dataclass(eq=False)
class _Call:
    """One layer's attention in one forward call.

    Attributes:
        layer: Its number.
        query: [example, head, row, channel].
        key: [example, KV group, key, channel].
        value: Like `key`.
        mask: [example, 1 or head, row, key] bool or a number to add; None where every row sees
            the keys up to its own, or `causal` is False and it sees all.
        causal: See `mask`.
        scaling: Factor on the scores.
        softcap: Bound of the scores, if any.
        sinks: [head] score of a key that takes attention and gives nothing, if any.
        output: [example, row, head, channel] what the stock attention gave.
    """

    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    causal: bool
    scaling: float
    softcap: float | None
    sinks: torch.Tensor | None
    output: torch.Tensor

    def allowed(self, rows: torch.Tensor) -> torch.Tensor | None:
        """[example, 1 or head, row, key] for rows by index; None where all is allowed."""
        keys, device = self.key.shape[2], self.query.device
        rows = rows.to(device)
        if self.mask is not None:
            mask = self.mask[..., :keys].expand(len(self.query), -1, -1, -1)
            index = rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[-1])
            return mask.gather(2, index)
        if self.causal and self.query.shape[2] > 1:
            return torch.arange(keys, device=device) <= rows[:, None, :, None]
        return None


_State = Callable[[_Call], torch.Tensor]
"""What is done in a layer -> [example, row, head, channel], the heads' output."""


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

    def __call__(self, call: _Call) -> torch.Tensor:
        """Record a layer, in its first call alone."""
        if call.layer not in self.masses:
            _record(self, call)
        return call.output

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
        raise ValueError("nothing was recorded: no forward call ran inside")
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
def ablate(
    vlm: VLM,
    heads: HeadSet | Sequence[HeadSet],
    mode: str = "zero",
    when: str = "both",
    *,
    means: torch.Tensor | None = None,
) -> Iterator[None]:
    """Take heads out of the model, in every forward call inside, also those of `generate`.

    With an empty set, nothing changes by one bit. The model is as before at exit, also after an
    exception.

    Args:
        vlm: The model.
        heads: For all rows of a batch, or a set for each row.
        mode: "zero": attention weights after the softmax, and so the head's output, are zero
            (paper A, Sec. 5). "mean": the output is that of `means`. "uniform": the weights are
            equal over the keys that the head may see.
        when: For which tokens: "prefill" is a call with several, "decode" one with a single token,
            "answer" the tokens that an answer's tokens are predicted at: the last of the prompt
            (padded on the left, if at all) and those decoded.
        means: [layer, head, channel] for the mode "mean": see `mean_outputs`.

    Raises:
        ValueError: An unknown mode or time, heads of another model, means where none are used or
            none where they are, or another number of sets than rows in a batch.
    """
    if mode not in MODES or when not in WHEN:
        raise ValueError(f"mode {mode!r}, when {when!r}; expected one of {MODES}, one of {WHEN}")
    if (means is None) == (mode == "mean"):
        raise ValueError(f"mode {mode!r} with {'no' if means is None else 'given'} means")
    sets = [heads] if isinstance(heads, HeadSet) else list(heads)
    for chosen in sets:
        of_other = chosen.model and vlm.model_id and chosen.model != vlm.model_id
        if of_other or chosen.geometry != vlm.geometry:
            raise ValueError(
                f"heads of {chosen.model or 'a model'} with {chosen.geometry} cannot be ablated in "
                f"{vlm} with {vlm.geometry}"
            )
    masks = torch.from_numpy(np.stack([chosen.mask for chosen in sets]))
    state = _Ablation(masks, mode, when, means)
    layers = masks.any(dim=(0, 2)).nonzero()[:, 0].tolist()
    with _attached(vlm, dict.fromkeys(layers, state)):
        yield


@dataclass(eq=False)
class _Ablation:
    """What `ablate` does in a layer; heads [row of the batch or 1, layer, head] bool."""

    heads: torch.Tensor
    mode: str
    when: str
    means: torch.Tensor | None

    def __call__(self, call: _Call) -> torch.Tensor:
        output = call.output
        here = self.heads[:, call.layer].to(output.device)
        if len(here) not in (1, len(output)):
            raise ValueError(f"{len(here)} head sets for a batch of {len(output)} rows")
        decoding = output.shape[1] == 1
        rows = slice(-1, None) if self.when == "answer" else slice(None)
        if self.when == ("prefill" if decoding else "decode"):
            return output
        if self.mode == "zero":
            instead = output.new_zeros(())
        elif self.means is not None:
            instead = self.means[call.layer].to(output)
        else:
            instead = _uniform(call, rows).to(output.dtype)
        changed = output.clone()
        changed[:, rows] = torch.where(here[:, None, :, None], instead, output[:, rows])
        return changed


def _uniform(call: _Call, rows: slice) -> torch.Tensor:
    """[example, row, head, channel] mean of the values that each row may see."""
    count, values = call.query.shape[2], call.value.float()
    shared = call.query.shape[1] // values.shape[1]
    index = torch.arange(count, device=values.device)[rows].expand(len(values), -1)
    if call.mask is None and call.causal and count > 1:
        seen = index + 1
        means = values[:, :, :count].cumsum(dim=2)[:, :, rows] / seen[:, None, :, None]
        return means.repeat_interleave(shared, dim=1).transpose(1, 2)
    values = values.repeat_interleave(shared, dim=1)
    block = max(1, WORKING_SET // (4 * values.shape[1] * values.shape[2] * len(values)))
    parts = []
    for some in index.split(block, dim=1):
        allowed = call.allowed(some)
        if allowed is None:
            parts.append(values.mean(dim=2, keepdim=True).expand(-1, -1, some.shape[1], -1))
            continue
        if allowed.dtype != torch.bool:
            allowed = allowed > torch.finfo(allowed.dtype).min / 2
        weights = allowed / allowed.sum(dim=-1, keepdim=True).clamp(min=1)
        parts.append(weights @ values)
    return torch.cat(parts, dim=2).transpose(1, 2)


@contextmanager
def mean_outputs(vlm: VLM) -> Iterator[Callable[[], torch.Tensor]]:
    """Average what each head gives over all tokens of all calls inside, for the mode "mean".

    Yields a function that gives the means [layer, head, channel], float32, on the CPU. Padding
    counts as tokens: run prompts of one length, or one by one.
    """
    sums: dict[int, torch.Tensor] = {}
    counts: dict[int, int] = {}
    layers = vlm.geometry.layers

    def add(call: _Call) -> torch.Tensor:
        total = call.output.detach().double().sum(dim=(0, 1)).cpu()
        sums[call.layer] = sums.get(call.layer, 0) + total
        counts[call.layer] = counts.get(call.layer, 0) + call.output[..., 0, 0].numel()
        return call.output

    def means() -> torch.Tensor:
        found = {layer: total / counts[layer] for layer, total in sums.items()}
        return _stacked({layer: mean[None].float() for layer, mean in found.items()}, layers)[0]

    with _attached(vlm, dict.fromkeys(vlm.attentions, add)):
        yield means


@contextmanager
def gate(vlm: VLM, gates: torch.Tensor) -> Iterator[None]:
    """Multiply each head's output by its gate [row of the batch, layer, head].

    A gate of 1 changes nothing; the gradient at 1 is the first-order effect of a head.

    Raises:
        ValueError: Gates of another shape than the model's heads.
    """
    shape = (vlm.geometry.layers, vlm.geometry.heads)
    if gates.ndim != 3 or gates.shape[1:] != shape:
        raise ValueError(f"gates have shape {tuple(gates.shape)}, expected [row, {shape}]")

    def multiply(call: _Call) -> torch.Tensor:
        return call.output * gates[:, call.layer].to(call.output)[:, None, :, None]

    with _attached(vlm, dict.fromkeys(vlm.attentions, multiply)):
        yield


@contextmanager
def _attached(vlm: VLM, states: Mapping[int, _State]) -> Iterator[None]:
    """Switch the language model to our attention, with something to do in some layers."""
    config = vlm.text_config
    stock = config._attn_implementation
    if stock in _NAMES.values():
        raise ValueError(
            f"{vlm} is inside another `record_mass`, `ablate` or `gate`; leave that one first"
        )
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
        state: _State | None = getattr(module, _STATE, None)
        if state is not None:
            if kwargs.get("position_bias") is not None:
                raise ValueError("attention with a position bias is not known here")
            causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
            scale = scaling or query.shape[-1] ** -0.5
            output = state(
                _Call(
                    module.layer_idx,
                    *(query, key, value, attention_mask, causal, scale),
                    kwargs.get("softcap"),
                    kwargs.get("s_aux"),
                    output,
                )
            )
        return output, attention

    return attend


def _eager(module: Any) -> Any:
    """The eager attention of the module's own modelling file."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


for _base, _name in _NAMES.items():
    AttentionInterface.register(_name, _attention(_base))
    AttentionMaskInterface.register(_name, ALL_MASK_ATTENTION_FUNCTIONS[_base])


def _record(state: Recording, call: _Call) -> None:
    """Add a layer to a recording."""
    query, key = call.query.detach(), call.key.detach()
    examples, heads = query.shape[:2]
    groups, keys = key.shape[1:3]
    shared = heads // groups
    rows = state.rows.to(query.device)
    seen = rows.clamp(min=0)
    count = rows.shape[1]
    allowed = call.allowed(seen)
    sinks = call.sinks
    weights = _of_keys(state.weights.to(query.device, torch.float32), keys)
    text = None
    if state.text is not None:
        text = _of_keys(state.text.to(query.device)[..., None], keys)[..., 0]
    mass = weights.new_empty(examples, heads, count, weights.shape[2])
    entropy = weights.new_zeros(examples, heads, count)
    line = 6 * 4 * shared * keys
    step = min(groups, max(1, WORKING_SET // (line * count)))
    block = max(1, WORKING_SET // (line * step))
    for example, first, top in product(
        range(examples), range(0, groups, step), range(0, count, block)
    ):
        some, part = slice(first * shared, (first + step) * shared), slice(top, top + block)
        picked = query[example, some].index_select(1, seen[example, part]).float()
        grouped = (picked * call.scaling).reshape(-1, shared * picked.shape[1], picked.shape[2])
        scores = grouped @ key[example, first : first + step].float().transpose(1, 2)
        scores = scores.view(*picked.shape[:2], keys)
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        if allowed is not None:
            here = (
                allowed[example, :, part] if allowed.shape[1] == 1 else allowed[example, some, part]
            )
            if here.dtype == torch.bool:
                scores.masked_fill_(~here, float("-inf"))
            else:
                scores += here.float()
        if sinks is not None:
            sink = sinks[some].float().view(-1, 1, 1).expand(-1, scores.shape[1], 1)
            attention = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
        else:
            attention = scores.softmax(-1)
        mass[example, some, part] = attention @ weights[example]
        if text is not None:
            among = attention * text[example]
            total = among.sum(-1)
            spread = total.log() - torch.xlogy(among, among).sum(-1) / total
            entropy[example, some, part] = torch.where(total > 0, spread, 0.0)
    padding = (rows < 0)[:, None, :]
    output = call.output.detach()
    index = seen[:, :, None, None].expand(-1, -1, *output.shape[2:])
    norm = output.gather(1, index).float().norm(dim=-1).transpose(1, 2)
    state.masses[call.layer] = mass.masked_fill_(padding[..., None], 0.0)
    state.entropies[call.layer] = entropy.masked_fill_(padding, 0.0)
    state.norms[call.layer] = norm.masked_fill(padding, 0.0)


def _of_keys(values: torch.Tensor, keys: int) -> torch.Tensor:
    """Values [example, token, ...] of the keys that a layer holds.

    A sliding cache holds the last ones alone, a static one empty ones behind.
    """
    values = values[:, -keys:]
    missing = keys - values.shape[1]
    return torch.nn.functional.pad(values, (0, 0, 0, missing)) if missing else values
