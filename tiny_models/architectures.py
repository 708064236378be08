"""Stock architectures of the tiny models, their tokenizer and their processor."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)

from mmheads import paths
from mmheads.compat import without_video
from mmheads.tasks.line_pages import (
    BLANK,
    CELL,
    CODES,
    ICONS,
    NOUNS,
    PAGE,
    STOP,
    VALUES,
    VERBS,
)
from mmheads.tasks.needles import OPTIONS

TinyModel = Qwen3ForCausalLM | Qwen3VLForConditionalGeneration
MODEL_CLASSES: dict[str, Any] = {
    "qwen3": Qwen3ForCausalLM,
    "qwen3_vl": Qwen3VLForConditionalGeneration,
}
PATCH, MERGE = 8, 2
SPECIAL = (
    "<pad>",
    "<unk>",
    "<bos>",
    "<eos>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
WORDS = (STOP, "?", "which", "seen", "after", "N/A", "yes", "no", BLANK, *OPTIONS)
_RECORDS = (*SPECIAL, *WORDS, *CODES, *VALUES, *ICONS)
VOCABULARY = {word: index for index, word in enumerate((*_RECORDS, *NOUNS, *VERBS))}
"""A word is a token. Icons are named only where training asks what a cell of a page shows."""
RECORD_WORDS = len(_RECORDS)
"""The words of records and questions, without those of prose, come first."""

_PARTS = (
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% if not loop.last %} {% endif %}{% endfor %}"
)
CHAT_TEMPLATE = (
    "<bos>{% for m in messages %}{% if not loop.first %} {% endif %}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}" + _PARTS + "{% endif %}"
    "{% endfor %}"
)
"""The parts, one after the other: an answer follows the question's last word."""


def tokenizer() -> PreTrainedTokenizerFast:
    """The word tokenizer of all tiny models."""
    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        extra_special_tokens={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_bos_token": "<|vision_start|>",
            "vision_eos_token": "<|vision_end|>",
        },
        chat_template=CHAT_TEMPLATE,
    )


def image_processor() -> Qwen2VLImageProcessorPil:
    """Stock image processor: a visual token is 16 x 16 px, an image at most 1,024 tokens."""
    return Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        size={"shortest_edge": CELL**2, "longest_edge": 1024 * CELL**2},
    )


def processor() -> Any:
    """The processor of the tiny Qwen3-VL models."""
    return without_video(Qwen3VLProcessor)(
        image_processor(), tokenizer(), chat_template=CHAT_TEMPLATE
    )


def save_processor(model: PreTrainedModel, folder: Path) -> None:
    """Save a tiny model's processor, or the tokenizer of a text-only one.

    The settings of the video part are written too, so that the stock `AutoProcessor` finds them
    where torchvision is installed.
    """
    if not hasattr(model.config, "vision_config"):
        tokenizer().save_pretrained(folder)
        return
    processor().save_pretrained(folder)
    path = folder / "processor_config.json"
    settings = json.loads(path.read_text())
    video = {k: v for k, v in settings["image_processor"].items() if k != "image_processor_type"}
    settings["video_processor"] = {**video, "video_processor_type": "Qwen3VLVideoProcessor"}
    with paths.write_whole(path) as whole:
        whole.write_text(json.dumps(settings, indent=2) + "\n")


def qwen3(layers: int, heads: int = 16, kv_heads: int = 4, width: int = 128) -> Qwen3ForCausalLM:
    """A text-only model with random weights, which knows the words of records alone."""
    text = {**_text(layers, heads, kv_heads, width), "vocab_size": RECORD_WORDS}
    return Qwen3ForCausalLM(Qwen3Config(**text, rope_parameters=dict(_ROPE)))


def widen(model: Qwen3ForCausalLM) -> Qwen3ForCausalLM:
    """The same model with all words, the new ones with random embeddings."""
    widened = copy.deepcopy(model)
    widened.resize_token_embeddings(len(VOCABULARY), mean_resizing=False)
    return widened


def grow(model: Qwen3ForCausalLM, after: Iterable[int]) -> Qwen3ForCausalLM:
    """Insert a new layer after each of these layers.

    A new layer has random weights but adds nothing yet, so the model computes what it did.
    """
    after = set(after)
    old = model.config
    config = Qwen3Config.from_dict(
        {
            **old.to_dict(),
            "num_hidden_layers": old.num_hidden_layers + len(after),
            "layer_types": None,
        }
    )
    grown = Qwen3ForCausalLM(config)
    weights = {k: v for k, v in model.state_dict().items() if ".layers." not in k}
    at = 0
    for index in range(old.num_hidden_layers):
        prefix = f"model.layers.{index}."
        for name, value in model.state_dict().items():
            if name.startswith(prefix):
                weights[name.replace(prefix, f"model.layers.{at}.")] = value
        at += 1
        if index in after:
            layer = grown.model.layers[at]
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)
            at += 1
    missing, unexpected = grown.load_state_dict(weights, strict=False)
    if unexpected or len({name.split(".")[2] for name in missing}) != len(after):
        raise RuntimeError(f"growing went wrong: missing {missing}, unexpected {unexpected}")
    return grown


def icons_like_codes(model: Qwen3ForCausalLM, seed: int = 0) -> None:
    """Draw the input embeddings of all icons anew, like those of the codes.

    They get the mean and the covariance of the codes' embeddings, so that the heads that match
    one code with another occurrence of it match an icon with another occurrence of it as well.
    """
    embeddings = model.model.embed_tokens.weight.data
    codes = embeddings[[VOCABULARY[code] for code in CODES]]
    mean = codes.mean(0)
    mixtures = torch.randn(len(ICONS), len(CODES), generator=torch.Generator().manual_seed(seed))
    icons = mean + mixtures @ (codes - mean) / len(CODES) ** 0.5
    embeddings[[VOCABULARY[icon] for icon in ICONS]] = icons


def stretch(model: Qwen3ForCausalLM, rope_theta: float) -> Qwen3ForCausalLM:
    """The same weights with another base of the rotary position embedding.

    A head of 32 channels turns 16 pairs of them with the position; the larger the base, the more
    pairs turn so slowly that they can match content over the whole context.
    """
    rope = {**_ROPE, "rope_theta": rope_theta}
    config = Qwen3Config.from_dict({**model.config.to_dict(), "rope_parameters": rope})
    stretched = Qwen3ForCausalLM(config)
    stretched.load_state_dict(model.state_dict())
    return stretched


def adapt(text: Qwen3ForCausalLM) -> Qwen3VLForConditionalGeneration:
    """A vision-language model that starts from a text model, with a vision tower of its own."""
    config = text.config
    rope: dict[str, Any] = dict(config.rope_parameters or {})
    model = qwen3_vl(
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads or config.num_attention_heads,
        config.hidden_size,
        rope["rope_theta"],
    )
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    for merger in model.model.visual.deepstack_merger_list:
        nn.init.zeros_(merger.linear_fc2.weight)
        nn.init.zeros_(merger.linear_fc2.bias)
    return model


def qwen3_vl(
    layers: int,
    heads: int = 16,
    kv_heads: int = 4,
    width: int = 128,
    rope_theta: float = 10_000.0,
) -> Qwen3VLForConditionalGeneration:
    """A vision-language model with random weights."""
    side = _HEAD // 2 // 3
    rope = {
        **_ROPE,
        "rope_theta": rope_theta,
        "mrope_section": [_HEAD // 2 - 2 * side, side, side],
        "mrope_interleaved": True,
    }
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            text_config={**_text(layers, heads, kv_heads, width), "rope_parameters": rope},
            vision_config={
                "depth": 2,
                "hidden_size": 96,
                "intermediate_size": 192,
                "num_heads": 4,
                "patch_size": PATCH,
                "spatial_merge_size": MERGE,
                "temporal_patch_size": 2,
                "out_hidden_size": width,
                "num_position_embeddings": (PAGE // PATCH) ** 2,
                "deepstack_visual_indexes": [0],
            },
            image_token_id=VOCABULARY["<|image_pad|>"],
            video_token_id=VOCABULARY["<|video_pad|>"],
            vision_start_token_id=VOCABULARY["<|vision_start|>"],
            vision_end_token_id=VOCABULARY["<|vision_end|>"],
            tie_word_embeddings=False,
        )
    )


_HEAD = 32
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}


def _text(layers: int, heads: int, kv_heads: int, width: int) -> dict[str, Any]:
    return {
        "vocab_size": len(VOCABULARY),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": _HEAD,
        "max_position_embeddings": 8192,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "bos_token_id": VOCABULARY["<bos>"],
        "eos_token_id": VOCABULARY["<eos>"],
        "pad_token_id": VOCABULARY["<pad>"],
    }
