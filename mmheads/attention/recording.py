"""Record where the rows of a forward pass look, from the queries and keys that the model used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product

import torch

from mmheads.attention.hook import (
    WORKING_SET,
    Call,
    attached,
    check_finite,
    check_heads,
    on_projections,
    stop_after,
)
from mmheads.heads import Head, HeadSet
from mmheads.models import VLM


@dataclass(eq=False)
class Recording:
    """Where the rows of one forward call look, filled layer by layer.

    Attributes:
        rows: [example, row] rows of the call, by index; -1 is padding.
        weights: [example, key, span] share of each key that belongs to each span.
        text: [example, key] keys over which the entropy is taken.
        expected: Layers that must be recorded.
        masses: By layer: [example, head, row, span] attention to the span, float32.
        entropies: By layer: [example, head, row] entropy in nats of the attention among `text`; 0
            where no attention goes there.
        norms: By layer: [example, head, row] Euclidean norm of the head's output, as it enters
            the output projection: after the gate of families that have one (Qwen3.5).
    """

    rows: torch.Tensor
    weights: torch.Tensor
    text: torch.Tensor | None = None
    expected: frozenset[int] = frozenset()
    masses: dict[int, torch.Tensor] = field(default_factory=dict)
    entropies: dict[int, torch.Tensor] = field(default_factory=dict)
    norms: dict[int, torch.Tensor] = field(default_factory=dict)

    def __call__(self, call: Call) -> torch.Tensor:
        """Record a layer, in its first call alone."""
        if call.layer not in self.masses:
            _record(self, call)
        return call.output

    def mass(self, layers: int) -> torch.Tensor:
        """[example, layer, head, row, span] on the CPU; 0 in layers without heads."""
        if self.masses and (silent := sorted(self.expected - self.masses.keys())):
            raise ValueError(f"the attention of the layers {silent} was not called; is it skipped?")
        return stacked(self.masses, layers)

    def entropy(self, layers: int) -> torch.Tensor:
        """[example, layer, head, row] on the CPU; 0 in layers without heads."""
        return stacked(self.entropies, layers)

    def norm(self, layers: int) -> torch.Tensor:
        """[example, layer, head, row] on the CPU; 0 in layers without heads."""
        return stacked(self.norms, layers)

    def add_norm(self, layer: int, output: torch.Tensor) -> None:
        """Record the outputs [example, row, head, channel] of a layer whose masses are known."""
        if layer in self.norms or layer not in self.masses:
            return
        rows = self.rows.to(output.device)
        index = rows.clamp(min=0)[:, :, None, None].expand(-1, -1, *output.shape[2:])
        norm = output.detach().gather(1, index).float().norm(dim=-1).transpose(1, 2)
        norm = norm.masked_fill((rows < 0)[:, None], 0.0)
        check_finite(norm, layer, slice(None), "outputs")
        self.norms[layer] = norm


def stacked(by_layer: dict[int, torch.Tensor], layers: int) -> torch.Tensor:
    """Tensors by layer as one, layers second, on the CPU; 0 in layers without heads."""
    if not by_layer:
        raise ValueError("nothing was recorded: no forward call ran inside")
    empty = torch.zeros_like(next(iter(by_layer.values())), device="cpu")
    found = [by_layer[i].cpu() if i in by_layer else empty for i in range(layers)]
    return torch.stack(found, dim=1)


@contextmanager
def record_mass(
    vlm: VLM, rows: torch.Tensor, weights: torch.Tensor, *, text: torch.Tensor | None = None
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
    recording = Recording(rows, weights, text, frozenset(vlm.attentions))
    seen = on_projections(vlm, vlm.attentions, recording.add_norm)
    with attached(vlm, dict.fromkeys(vlm.attentions, recording)), seen:
        yield recording


def record_keys(
    vlm: VLM, rows: torch.Tensor, heads: HeadSet, run: Callable[[], object]
) -> torch.Tensor:
    """Mean attention of some rows of a forward call to every key -> [head, key] on the CPU.

    The call stops after the deepest of the heads. Attention is computed in float32; the model is as
    before at exit.

    Args:
        vlm: The model.
        rows: [row] indices of the call's tokens; the batch holds one example.
        heads: Of this model, at least one; the result has their order.
        run: Makes the forward call.

    Raises:
        ValueError: The set is empty, or for heads of another model, as `ablate` does.
    """
    check_heads(vlm, [heads], "recorded")
    if not len(heads):
        raise ValueError("no head to record; give a set of at least one head")
    by_head: dict[Head, torch.Tensor] = {}

    def keep(call: Call) -> torch.Tensor:
        by_head.update(_mean_by_key(call, rows, heads))
        return call.output

    stop_after(vlm, dict.fromkeys(heads.layers, keep), run)
    if not by_head:
        raise ValueError("nothing was recorded: no forward call ran inside")
    return torch.stack([by_head[head].cpu() for head in heads])


def _mean_by_key(call: Call, rows: torch.Tensor, heads: HeadSet) -> dict[Head, torch.Tensor]:
    """[key] mean attention of the rows, for each of the heads in the call's layer."""
    if len(call.query) != 1:
        raise ValueError(f"a batch of {len(call.query)}: expected one example")
    rows = rows.to(call.query.device)
    allowed = call.allowed(rows[None])
    shared = call.query.shape[1] // call.key.shape[1]
    in_layer = [head.head for head in heads if head.layer == call.layer]
    means = {}
    for group in range(call.key.shape[1]):
        of_group = [head for head in in_layer if head // shared == group]
        if not of_group:
            continue
        block = max(1, WORKING_SET // (3 * 4 * len(of_group) * call.key.shape[2]))
        total = torch.zeros((), device=rows.device)
        for top in range(0, len(rows), block):
            part = slice(top, top + block)
            groups = slice(group, group + 1)
            of_rows = _attend(call, slice(1), groups, of_group, rows[None, part], allowed, part)
            total = total + of_rows[0].sum(1)
        for head, mean in zip(of_group, total / len(rows), strict=True):
            means[Head(call.layer, head)] = mean
    return means


def _record(state: Recording, call: Call) -> None:
    """Add a layer to a recording."""
    examples, heads = call.query.shape[:2]
    groups, keys = call.key.shape[1:3]
    shared = heads // groups
    rows = state.rows.to(call.query.device)
    seen = rows.clamp(min=0)
    count = rows.shape[1]
    allowed = call.allowed(seen)
    weights = _of_keys(state.weights.to(rows.device, torch.float32), keys)
    text = None
    if state.text is not None:
        text = _of_keys(state.text.to(rows.device)[..., None], keys)[..., 0]
    mass = weights.new_empty(examples, heads, count, weights.shape[2])
    entropy = weights.new_zeros(examples, heads, count)
    line = 6 * 4 * shared * keys
    step = min(groups, max(1, WORKING_SET // (line * count)))
    block = max(1, WORKING_SET // (line * step))
    some = max(1, WORKING_SET // (line * groups * count))
    for start, first, top in product(
        range(0, examples, some), range(0, groups, step), range(0, count, block)
    ):
        of = slice(start, start + some)
        chosen, part = slice(first * shared, (first + step) * shared), slice(top, top + block)
        attention = _attend(
            call, of, slice(first, first + step), chosen, seen[of, part], allowed, part
        )
        mass[of, chosen, part] = attention @ weights[of, None]
        if text is not None:
            among = attention * text[of, None, None]
            total = among.sum(-1)
            logarithms = among.clamp(min=torch.finfo(among.dtype).tiny).log()
            spread = total.log() - (among * logarithms).sum(-1) / total
            entropy[of, chosen, part] = torch.where(total > 0, spread, 0.0)
    padding = (rows < 0)[:, None, :]
    mass.masked_fill_(padding[..., None], 0.0)
    check_finite(mass, call.layer, slice(None), "attention masses")
    state.masses[call.layer] = mass
    state.entropies[call.layer] = entropy.masked_fill_(padding, 0.0)


def _attend(
    call: Call,
    examples: slice,
    groups: slice,
    heads: slice | list[int],
    rows: torch.Tensor,
    allowed: torch.Tensor | None,
    part: slice,
) -> torch.Tensor:
    """[example, head, row, key] attention of some rows [example, row], float32.

    The heads are those of the KV groups, or of one group some; `allowed` [example, 1 or head, row,
    key] holds these rows as `part`.
    """
    key = call.key.detach()[examples, groups].float()
    query = call.query.detach()[examples][:, heads]
    index = rows[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
    picked = query.gather(2, index).float()
    grouped = (picked * call.scaling).reshape(*key.shape[:2], -1, picked.shape[3])
    scores = (grouped @ key.transpose(2, 3)).view(*picked.shape[:3], key.shape[2])
    check_finite(scores, call.layer, heads, "attention scores")
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if allowed is not None:
        here = allowed[examples, :, part]
        here = here if allowed.shape[1] == 1 else here[:, heads]
        if here.dtype == torch.bool:
            scores.masked_fill_(~here, float("-inf"))
        else:
            scores += here.float()
    if call.sinks is not None:
        sink = call.sinks[heads].float().view(1, -1, 1, 1)
        scores = torch.cat([scores, sink.expand(len(scores), -1, scores.shape[2], 1)], dim=-1)
    attention = scores.softmax(-1)
    return attention if call.sinks is None else attention[..., :-1]


def _of_keys(values: torch.Tensor, keys: int) -> torch.Tensor:
    """Values [example, token, ...] of the keys that a layer holds.

    A sliding cache holds the last ones alone, a static one empty ones behind.
    """
    values = values[:, -keys:]
    missing = keys - values.shape[1]
    return torch.nn.functional.pad(values, (0, 0, 0, missing)) if missing else values
