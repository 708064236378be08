"""What single heads do to an answer: gradients of gates and ablations one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from mmheads.answers import default_batch_tokens, stacked
from mmheads.attention.hook import check_finite
from mmheads.attention.interventions import ablate, gate
from mmheads.attention.sharing import ablate_rows, can_share
from mmheads.examples import Example
from mmheads.heads import HeadSet
from mmheads.models import VLM
from mmheads.prefix import on_device
from mmheads.prompts import Prompt, encode


def gate_gradients(
    vlm: VLM, examples: Iterable[Example], *, progress: bool = True
) -> NDArray[np.float32]:
    """First-order estimate of what each head does for the answer -> [example, layer, head], nats.

    The gradient of the right answer's log-odds (see `log_odds`) with respect to a factor of 1 on
    the head's output: to first order, what is lost when the head is ablated (mode "zero"). One
    forward and backward pass an example gives all heads.

    Raises:
        ValueError: No example, or one without an answer.
    """
    found = []
    shape = (1, vlm.geometry.layers, vlm.geometry.heads)
    for example in tqdm(examples, desc="gates", disable=not progress, leave=False):
        gates = torch.ones(shape, device=vlm.device, requires_grad=True)
        with torch.enable_grad(), gate(vlm, gates):
            odds = log_odds(vlm, encode(vlm, example))
        (slope,) = torch.autograd.grad(odds.sum(), gates)
        for layer, of_heads in enumerate(slope[0]):
            check_finite(of_heads[:, None], layer, slice(None), "gate gradients")
        found.append(slope[0].float().cpu().numpy())
    if not found:
        raise ValueError("there is no example to differentiate")
    return np.stack(found)


def single_head_effects(
    vlm: VLM,
    examples: Iterable[Example],
    *,
    batch_tokens: int = 0,
    progress: bool = True,
) -> NDArray[np.float32]:
    """What the right answer loses when one head is ablated -> [example, layer, head], nats.

    The fall of the right answer's log-odds (see `log_odds`) under the mode "zero": as many forward
    passes as heads, and one; they share the layers below the head.

    Raises:
        ValueError: No example, or one without an answer.
    """
    found = []
    none = HeadSet((), vlm.geometry, vlm.model_id)
    sets = [none, *(dataclasses.replace(none, heads=(head,)) for head in vlm.every_head)]
    for example in tqdm(examples, desc="heads", disable=not progress, leave=False):
        prompt = encode(vlm, example)
        values = []
        rows = max(1, (batch_tokens or default_batch_tokens(vlm)) // len(prompt))
        for some in (sets[first : first + rows] for first in range(0, len(sets), rows)):
            values.append(_ablated_odds(vlm, prompt, some).cpu())
        whole, *without = torch.cat(values).tolist()
        effects = np.zeros((vlm.geometry.layers, vlm.geometry.heads), np.float32)
        effects[vlm.every_head.mask] = whole - np.array(without, np.float32)
        found.append(effects)
    if not found:
        raise ValueError("there is no example to ablate heads on")
    return np.stack(found)


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
    inputs = stacked([prompt] * rows)
    logits = vlm.model(**on_device(vlm, inputs), use_cache=False, logits_to_keep=1).logits
    logits = logits[:, -1].float()
    others = torch.arange(logits.shape[1], device=logits.device) != ids[0]
    odds: torch.Tensor = logits[:, ids[0]] - logits[:, others].logsumexp(-1)
    if not odds.isfinite().all():
        raise ValueError(
            f"the log-odds of the answer {expected!r} are not finite in {vlm}; its weights are "
            "damaged, or float16 is too narrow for it: load it in bfloat16 or float32"
        )
    return odds
