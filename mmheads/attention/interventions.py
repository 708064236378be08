"""Take heads out of a model, replace their output, or weigh it by a gate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from mmheads.attention.hook import WORKING_SET, Call, attached, check_heads, on_projections, seen
from mmheads.attention.recording import stacked
from mmheads.heads import HeadSet
from mmheads.models import VLM

MODES = ("zero", "mean", "uniform")


WHEN = ("both", "prefill", "decode", "answer")


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
            equal over the keys that the head may see, before the gate of families that have one.
        when: For which tokens: "prefill" is a call with several, "decode" one with a single token,
            "answer" the tokens that an answer's tokens are predicted at: the last of the prompt
            (padded on the left, if at all) and those decoded.
        means: [layer, head, channel] for the mode "mean": see `mean_outputs`.

    Raises:
        ValueError: An unknown mode or time, heads of another model, means where none are used or
            none where they are, or another number of sets than rows in a batch.
    """
    state = ablation(vlm, [heads] if isinstance(heads, HeadSet) else heads, mode, when, means)
    layers = state.heads.any(dim=(0, 2)).nonzero()[:, 0].tolist()
    with attached(vlm, dict.fromkeys(layers, state)), state.putting_means(vlm, layers):
        yield


def ablation(
    vlm: VLM, sets: Sequence[HeadSet], mode: str, when: str, means: torch.Tensor | None
) -> Ablation:
    """What `ablate` does in a layer, its arguments checked."""
    if mode not in MODES or when not in WHEN:
        raise ValueError(f"mode {mode!r}, when {when!r}; expected one of {MODES}, one of {WHEN}")
    if (means is None) == (mode == "mean"):
        raise ValueError(f"mode {mode!r} with {'no' if means is None else 'given'} means")
    check_heads(vlm, sets, "ablated")
    masks = torch.from_numpy(np.stack([chosen.mask for chosen in sets]))
    return Ablation(masks, mode, when, means)


@dataclass(eq=False)
class Ablation:
    """What `ablate` does in a layer; heads [row of the batch or 1, layer, head] bool."""

    heads: torch.Tensor
    mode: str
    when: str
    means: torch.Tensor | None

    def __call__(self, call: Call, heads: torch.Tensor | None = None) -> torch.Tensor:
        """The output of a layer's heads; `heads`, by default its own, belong to the rows."""
        if self.mode == "mean":  # put where heads give their outputs to the projection
            return call.output
        uniform = partial(_uniform, call) if self.mode == "uniform" else None
        return self._changed(call.layer, call.output, uniform, heads)

    def putting_means(
        self,
        vlm: VLM,
        layers: Iterable[int],
        heads: Callable[[int], torch.Tensor | None] = lambda layer: None,
    ) -> AbstractContextManager[None]:
        """A context in which heads give their means, if that is the mode."""
        means = self.means
        if means is None:
            return nullcontext()

        def put(layer: int, output: torch.Tensor) -> torch.Tensor:
            return self._changed(layer, output, lambda rows: means[layer], heads(layer))

        return on_projections(vlm, layers, put)

    def _changed(
        self,
        layer: int,
        output: torch.Tensor,
        instead: Callable[[slice], torch.Tensor] | None,
        heads: torch.Tensor | None,
    ) -> torch.Tensor:
        """The output with something, by default zeros, in place of that of the heads."""
        here = (self.heads if heads is None else heads)[:, layer].to(output.device)
        if len(here) not in (1, len(output)):
            raise ValueError(f"{len(here)} head sets for a batch of {len(output)} rows")
        decoding = output.shape[1] == 1
        rows = slice(-1, None) if self.when == "answer" else slice(None)
        if self.when == ("prefill" if decoding else "decode"):
            return output
        if instead is None and self.when != "answer":
            return output.masked_fill(here[:, None, :, None], 0.0)
        other = instead(rows).to(output) if instead else output.new_zeros(())
        changed = output.clone()
        changed[:, rows] = torch.where(here[:, None, :, None], other, output[:, rows])
        return changed


def _uniform(call: Call, rows: slice) -> torch.Tensor:
    """[example, row, head, channel] mean of the values that each row may see."""
    count, values = call.query.shape[2], call.value.float()
    shared = call.query.shape[1] // values.shape[1]
    index = torch.arange(count, device=values.device)[rows].expand(len(values), -1)
    if call.mask is None and call.causal and count > 1:
        keys = index + 1
        means = values[:, :, :count].cumsum(dim=2)[:, :, rows] / keys[:, None, :, None]
        return means.repeat_interleave(shared, dim=1).transpose(1, 2)
    values = values.repeat_interleave(shared, dim=1)
    block = max(1, WORKING_SET // (4 * values.shape[1] * values.shape[2] * len(values)))
    parts = []
    for some in index.split(block, dim=1):
        allowed = call.allowed(some)
        if allowed is None:
            parts.append(values.mean(dim=2, keepdim=True).expand(-1, -1, some.shape[1], -1))
            continue
        allowed = seen(allowed)
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

    def add(layer: int, output: torch.Tensor) -> None:
        total = output.detach().double().sum(dim=(0, 1)).cpu()
        sums[layer] = sums.get(layer, 0) + total
        counts[layer] = counts.get(layer, 0) + output[..., 0, 0].numel()

    def means() -> torch.Tensor:
        found = {layer: total / counts[layer] for layer, total in sums.items()}
        return stacked({layer: mean[None].float() for layer, mean in found.items()}, layers)[0]

    with on_projections(vlm, vlm.attentions, add):
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

    def multiply(call: Call) -> torch.Tensor:
        return call.output * gates[:, call.layer].to(call.output)[:, None, :, None]

    with attached(vlm, dict.fromkeys(vlm.attentions, multiply)):
        yield
