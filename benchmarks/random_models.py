"""Models of any size with random weights, and prompts for them: time does not depend on weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Qwen3Config,
    Qwen3VLConfig,
)

from mmheads import paths
from mmheads.examples import Example
from mmheads.models import VLM, load_processor
from mmheads.prompts import Prompt, Question, Span

QUESTION_TOKENS = 32
NULL_TOKENS = 10
"""Tokens of a null question in Qwen3-VL, with the tokens that follow it."""
POSITIONS = 262144
"""Longest prompt of a random model, in tokens."""
TINY = paths.MODELS / "tiny-qwen3-vl-m"
"""Shipped model whose words, processor and small vision encoder the random readers share."""


@dataclass(frozen=True)
class Size:
    """The size of a language model.

    Attributes:
        layers: Number of layers.
        hidden: Width of the hidden states.
        heads: Query heads per layer.
        kv_groups: Key-value heads per layer.
        channels: Width of a head.
        intermediate: Width of the feed-forward layers.
        vocabulary: Number of tokens in the vocabulary.
    """

    layers: int
    hidden: int
    heads: int
    kv_groups: int
    channels: int
    intermediate: int
    vocabulary: int

    def __str__(self) -> str:
        return (
            f"{self.layers} layers, {self.heads} heads of {self.channels} in {self.kv_groups} KV "
            f"groups, hidden {self.hidden}"
        )


SIZES = {
    "wide": Size(2, 512, 8, 8, 64, 1536, 1024),
    "small": Size(4, 256, 8, 2, 32, 768, 1024),
    "qwen3-vl-8b": Size(36, 4096, 32, 8, 128, 12288, 151936),
}


class _NoTokenizer:
    """Stands in for a tokenizer: random token ids need no words."""

    is_fast = True
    chat_template = None


def random_model(size: Size, device: str, dtype: torch.dtype, seed: int = 0) -> VLM:
    """Returns a Qwen3 language model of this size with random weights."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        num_hidden_layers=size.layers,
        hidden_size=size.hidden,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_groups,
        head_dim=size.channels,
        intermediate_size=size.intermediate,
        vocab_size=size.vocabulary,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return VLM(model=model.eval(), processor=_NoTokenizer(), model_id=f"random weights, {size}")


@cache
def _processor() -> Any:
    return load_processor(TINY)


def words() -> list[str]:
    """Returns the words of the shipped tiny model, which are those of the random readers too."""
    tokenizer = _processor().tokenizer
    special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    vocabulary = tokenizer.get_vocab()
    return [word for word in sorted(vocabulary, key=vocabulary.get) if word not in special]


def token_pixels() -> int:
    """Returns the side of a visual token of the random readers, in pixels."""
    images = _processor().image_processor
    return int(images.patch_size * images.merge_size)


def random_reader(size: Size, device: str, dtype: torch.dtype, seed: int = 0) -> VLM:
    """Returns a Qwen3-VL of this size with random weights and a small vision encoder."""
    base: Any = AutoConfig.from_pretrained(TINY)
    side = size.channels // 2 // 3
    text = {
        "vocab_size": max(size.vocabulary, base.text_config.vocab_size),
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_groups,
        "head_dim": size.channels,
        "max_position_embeddings": POSITIONS,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [size.channels // 2 - 2 * side, side, side],
            "mrope_interleaved": True,
        },
    }
    vision = base.vision_config.to_dict() | {"out_hidden_size": size.hidden}
    config = Qwen3VLConfig.from_dict(
        base.to_dict() | {"text_config": text, "vision_config": vision}
    )
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    return VLM(
        model=model.eval(),
        processor=_processor(),
        model_id=f"random weights, {size}",
    )


def random_prompt(vlm: VLM, tokens: int, seed: int = 0) -> Prompt:
    """Returns a prompt of random tokens with evidence in its middle, and with a null question.

    Args:
        vlm: The model.
        tokens: Length of the prompt; its last `QUESTION_TOKENS` are the question.
        seed: Seed of the tokens.
    """
    rng = np.random.default_rng(seed)
    context = tokens - QUESTION_TOKENS
    ids = rng.integers(0, vlm.text_config.vocab_size, tokens + NULL_TOKENS)

    def span(first: int, last: int) -> Span:
        return Span(np.arange(first, last), np.ones(last - first, np.float32))

    def question(chosen: np.ndarray) -> Question:
        given = torch.from_numpy(chosen)[None]
        return Question(
            parts=(),
            inputs={"input_ids": given, "attention_mask": torch.ones_like(given)},
            tokens=np.arange(context, len(chosen)),
            start=context,
            context=(span(0, context),),
            evidence=(span(context // 2, context // 2 + context // 4),),
        )

    return Prompt(
        example=Example(context=(), question=()),
        questions=(question(ids[:tokens]), question(np.concatenate([ids[:context], ids[tokens:]]))),
        shared=context,
        candidates={},
        boxes={},
        replacements=(),
    )
