"""What single heads do to an answer: gradients of gates and ablations one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from mmheads import answers, store
from mmheads.attention.hook import check_finite
from mmheads.attention.interventions import ablate, gate
from mmheads.attention.sharing import ablate_rows, can_share
from mmheads.checks import DAMAGED
from mmheads.examples import Example
from mmheads.heads import HeadSet
from mmheads.models import VLM
from mmheads.prefix import on_device
from mmheads.prompts import Prompt, encode
from mmheads.provenance import code_version, hash_json

VERSION = 1
"""To be raised by hand when the same example gets other effects: shipped ones are left out."""

MODULES = (*answers.MODULES, "causal")
"""The code that measures; kept effects are computed again when it changes."""


def gate_gradients(
    vlm: VLM,
    examples: Iterable[Example],
    *,
    folder: str | Path | None = None,
    fresh: bool = False,
    progress: bool = True,
) -> NDArray[np.float32]:
    """First-order estimate of what each head does for the answer -> [example, layer, head], nats.

    The gradient of the right answer's log-odds (see `log_odds`) with respect to a factor of 1 on
    the head's output: to first order, what is lost when the head is ablated (mode "zero"). One
    forward and backward pass an example gives all heads.

    Args:
        vlm: The model.
        examples: Examples with an answer.
        folder: Folder of the results store; empty: `runs/effects`; None: nothing is read or kept.
        fresh: Leave out shipped results.
        progress: Show a progress bar.

    Raises:
        ValueError: No example, or one without an answer.
        OSError: The folder cannot be written.
    """
    shape = (1, vlm.geometry.layers, vlm.geometry.heads)

    def slopes(example: Example) -> NDArray[np.float32]:
        gates = torch.ones(shape, device=vlm.device, requires_grad=True)
        with torch.enable_grad(), gate(vlm, gates):
            odds = log_odds(vlm, encode(vlm, example))
        (slope,) = torch.autograd.grad(odds.sum(), gates)
        for layer, of_heads in enumerate(slope[0]):
            check_finite(of_heads[None], layer, slice(None), "gate gradients")
        values: NDArray[np.float32] = slope[0].float().cpu().numpy()
        return values

    return _measured(vlm, examples, ["gradient"], slopes, folder, fresh, progress)


def single_head_effects(
    vlm: VLM,
    examples: Iterable[Example],
    *,
    heads: HeadSet | None = None,
    batch_tokens: int = 0,
    folder: str | Path | None = None,
    fresh: bool = False,
    progress: bool = True,
) -> NDArray[np.float32]:
    """What the right answer loses when one head is ablated -> [example, layer, head], nats.

    The fall of the right answer's log-odds (see `log_odds`) under the mode "zero": as many forward
    passes as heads, and one; they share the layers below the head. `heads` are those to ablate one
    by one, by default all; those left out have NaN. Other arguments and errors are those of
    `gate_gradients`; `batch_tokens` is that of `mmheads.answers.answer`.
    """
    chosen = heads or vlm.every_head
    none = HeadSet((), vlm.geometry, vlm.model_id)
    sets = [none, *(dataclasses.replace(none, heads=(head,)) for head in chosen)]

    def falls(example: Example) -> NDArray[np.float32]:
        prompt = encode(vlm, example)
        rows = max(1, (batch_tokens or answers.default_batch_tokens(vlm)) // len(prompt))
        some = (sets[first : first + rows] for first in range(0, len(sets), rows))
        whole, *without = torch.cat([_ablated_odds(vlm, prompt, each).cpu() for each in some])
        effects = np.full(chosen.mask.shape, np.nan if heads else 0, np.float32)
        effects[tuple(zip(*chosen.heads, strict=True))] = (whole - torch.stack(without)).numpy()
        return effects

    names = ["effect", *sorted(map(str, heads or ()))]
    return _measured(vlm, examples, names, falls, folder, fresh, progress)


def _measured(
    vlm: VLM,
    examples: Iterable[Example],
    names: list[str],
    measure: Callable[[Example], NDArray[np.float32]],
    folder: str | Path | None,
    fresh: bool,
    progress: bool,
) -> NDArray[np.float32]:
    """[example, layer, head] of a quantity, from the results store where it has it.

    `names`: the quantity, then the heads if only some are measured; all are part of the key.
    """
    made = vlm.provenance("mmheads.causal", code=code_version(MODULES))
    keys = []
    with store.open("effects", made, version=VERSION, folder=folder, fresh=fresh) as results:
        for example in tqdm(examples, desc=names[0], disable=not progress, leave=False):
            key = hash_json([example.fingerprint(), example.answer, *names])
            if key not in results:
                how = {"quantity": names[0], "answer": example.answer, **example.labels()}
                results.add(key, {**how, "nats": measure(example)})
            keys.append(key)
        if not keys:
            raise ValueError("there is no example to measure heads on")
        return np.stack([results[key]["nats"] for key in keys])


@torch.no_grad()
def _ablated_odds(vlm: VLM, prompt: Prompt, sets: Sequence[HeadSet]) -> torch.Tensor:
    """[set] `log_odds` under ablations."""
    if not can_share(vlm):
        with ablate(vlm, sets):
            return log_odds(vlm, prompt, len(sets))
    with ablate_rows(vlm, on_device(vlm, prompt.inputs), sets):
        return log_odds(vlm, prompt)


def log_odds(vlm: VLM, prompt: Prompt, rows: int = 1) -> torch.Tensor:
    """[row] log p / (1 - p) of the first token of the right answer, of equal rows of a batch.

    Unlike log p, it does not saturate where the model is sure.

    Raises:
        ValueError: The example has no answer.
    """
    expected = prompt.example.answer
    ids = vlm.tokenizer(expected, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"the answer {expected!r} of an example has no token")
    inputs = answers.stacked([prompt] * rows)
    logits = vlm.model(**on_device(vlm, inputs), use_cache=False, logits_to_keep=1).logits
    logits = logits[:, -1].float()
    others = torch.arange(logits.shape[1], device=logits.device) != ids[0]
    odds: torch.Tensor = logits[:, ids[0]] - logits[:, others].logsumexp(-1)
    if not odds.isfinite().all():
        raise ValueError(f"the log-odds of {expected!r} are not finite in {vlm}; {DAMAGED}")
    return odds
