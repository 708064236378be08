"""Attention of sliding layers for training: a block of tokens sees itself and its neighbours."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "blocks of windows"


def use(model: Any) -> None:
    """Let the sliding layers of a model run in blocks; what it computes stays the same.

    That holds without dropout, and where no image has more tokens than the window.
    """
    text = "text_config" in model.config.sub_configs
    model.set_attn_implementation({"text_config": NAME} if text else NAME)


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """Attention with a mask [row, 1, token, token] that is empty outside of the next blocks.

    A block is as long as the window. Tokens of an image, which see each other, reach into the block
    after their own at most.
    """
    window = getattr(module, "sliding_window", None) or 0
    length = query.shape[2]
    if attention_mask is None or not window or length <= 2 * window:
        found: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **settings
        )
        return found
    blocks = -(-length // window)
    more = blocks * window - length
    groups = query.shape[1] // key.shape[1]
    neighbours = range(-1, 2 if attention_mask.triu(1).any() else 1)  # images look ahead
    around = (window, window + more)

    def spread(states: torch.Tensor) -> torch.Tensor:
        """[row x block, head, key of the neighbours, channel]."""
        padded = functional.pad(states.repeat_interleave(groups, 1), (0, 0, *around))
        parts = padded.unflatten(2, (blocks + 2, window))
        near = [parts[:, :, 1 + place : 1 + place + blocks] for place in neighbours]
        return torch.cat(near, 3).transpose(1, 2).flatten(0, 1)

    asking = functional.pad(query, (0, 0, 0, more)).unflatten(2, (blocks, window))
    rows = functional.pad(attention_mask, (*around, 0, more)).unflatten(2, (blocks, window))
    wide = len(neighbours) * window
    near = [rows[:, :, i, :, i * window : i * window + wide] for i in range(blocks)]
    seen = torch.stack(near, 1).flatten(0, 1)
    seen = seen | ~seen.any(-1, keepdim=True)  # what fills up the last block sees anything
    output = functional.scaled_dot_product_attention(
        asking.transpose(1, 2).flatten(0, 1),
        spread(key),
        spread(value),
        attn_mask=seen,
        scale=settings.get("scaling"),
    )
    joined = output.unflatten(0, (-1, blocks)).transpose(2, 3).flatten(1, 2)  # [row, token, head]
    return joined[:, :length], None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
