"""Stock architectures of the tiny models."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from mmheads.tasks.line_pages import CELL, CODES, ICONS, PAGE
from tiny_models.processors import MERGE, PAGE_CELLS, PATCH, RECORD_WORDS, VOCABULARY, Family

TextModel = Qwen3ForCausalLM | Gemma3ForCausalLM
TinyModel = (
    TextModel
    | Qwen3VLForConditionalGeneration
    | InternVLForConditionalGeneration
    | LlavaOnevisionForConditionalGeneration
    | Gemma3ForConditionalGeneration
)
MODEL_CLASSES: dict[str, Any] = {
    "qwen3": Qwen3ForCausalLM,
    "gemma3_text": Gemma3ForCausalLM,
    "qwen3_vl": Qwen3VLForConditionalGeneration,
    "internvl": InternVLForConditionalGeneration,
    "llava_onevision": LlavaOnevisionForConditionalGeneration,
    "gemma3": Gemma3ForConditionalGeneration,
}


def qwen3(layers: int, heads: int, kv_heads: int, width: int) -> Qwen3ForCausalLM:
    """A text-only model with random weights, which knows the words of records alone."""
    text = {**_text(layers, heads, kv_heads, width), "vocab_size": RECORD_WORDS}
    return Qwen3ForCausalLM(Qwen3Config(**text, rope_parameters=dict(_ROPE)))


def gemma3(
    layers: int, heads: int, kv_heads: int, width: int, window: int = 16
) -> Gemma3ForCausalLM:
    """A text-only Gemma 3 with random weights, which knows the words of records alone.

    The last layer of either half sees everything, the others a sliding window. With twelve layers
    that is Gemma 3's own pattern of five sliding layers and one global layer.
    """
    config = Gemma3TextConfig(
        **{**_text(layers, heads, kv_heads, width), "vocab_size": RECORD_WORDS},
        query_pre_attn_scalar=_HEAD,
        sliding_window=window,
        layer_types=[
            "full_attention" if i in (layers // 2 - 1, layers - 1) else "sliding_attention"
            for i in range(layers)
        ],
        rope_parameters={"sliding_attention": dict(_ROPE), "full_attention": dict(_ROPE)},
    )
    return Gemma3ForCausalLM(config)


def widen(model: TextModel) -> TextModel:
    """The same model with all words, the new ones with random embeddings."""
    widened = copy.deepcopy(model)
    widened.resize_token_embeddings(len(VOCABULARY), mean_resizing=False)
    return widened


def grow(model: TextModel, after: Collection[int]) -> TextModel:
    """Insert a new layer after each of these layers; in Gemma 3 its attention has a window.

    A new layer has random weights but adds nothing yet, so the model computes what it did.
    """
    old: list[int | None] = []  # by new layer: the old one, or None
    for index in range(model.config.num_hidden_layers):
        old += [index, None] if index in after else [index]
    settings = {**model.config.to_dict(), "num_hidden_layers": len(old), "layer_types": None}
    if isinstance(model, Gemma3ForCausalLM):
        types = model.config.layer_types or []
        settings["layer_types"] = [
            "sliding_attention" if index is None else types[index] for index in old
        ]
    grown: TextModel = _like(model, settings)
    given = model.state_dict()
    weights = {name: value for name, value in given.items() if ".layers." not in name}
    new = []
    for at, source in enumerate(old):
        if source is None:
            new.append(at)
            _add_nothing(grown.model.layers[at])
        prefix = f"model.layers.{source}."
        weights |= {
            name.replace(prefix, f"model.layers.{at}."): value
            for name, value in given.items()
            if name.startswith(prefix)
        }
    missing, unexpected = grown.load_state_dict(weights, strict=False)
    if unexpected or sorted({int(name.split(".")[2]) for name in missing}) != new:
        raise RuntimeError(f"growing went wrong: missing {missing}, unexpected {unexpected}")
    return grown


def _like(model: TextModel, settings: Mapping[str, Any]) -> Any:
    """A model of the same class with random weights and these settings."""
    kind: Any = type(model)
    return kind(kind.config_class.from_dict(dict(settings)))


def _add_nothing(layer: Any) -> None:
    """Let a layer add zeros: by its last matrices or, in Gemma 3, by the norms after these."""
    if hasattr(layer, "post_feedforward_layernorm"):
        for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
            nn.init.constant_(norm.weight, -1.0)  # its factor is 1 + weight
    else:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)


def icons_like_codes(model: TextModel, seed: int = 0) -> None:
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


def stretch(model: TextModel, rope_theta: float, window: int = 0) -> TextModel:
    """The same weights with another base of the rotary position embedding.

    A head of 32 channels turns 16 pairs of them with the position; the larger the base, the more
    pairs turn so slowly that they can match content over the whole context. In Gemma 3 this is for
    its global layers; the others get another window.
    """
    rope: dict[str, Any] = {**_ROPE, "rope_theta": rope_theta}
    changes: dict[str, Any] = {"rope_parameters": rope}
    if isinstance(model, Gemma3ForCausalLM):
        ropes = {"sliding_attention": dict(_ROPE), "full_attention": rope}
        changes = {"rope_parameters": ropes, "sliding_window": window}
    stretched: TextModel = _like(model, {**model.config.to_dict(), **changes})
    stretched.load_state_dict(model.state_dict())
    return stretched


def adapt(text: Any, family: Family = "qwen3_vl") -> Any:
    """A vision-language model that starts from a text model, with a vision tower of its own."""
    builders: dict[Family, Any] = {
        "qwen3_vl": _qwen3_vl,
        "internvl": _internvl,
        "llava_onevision": _llava,
        "gemma3": _gemma3,
    }
    model = builders[family](text)
    language: Any = model.model.language_model
    language.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    if isinstance(model, LlavaOnevisionForConditionalGeneration):
        end = language.embed_tokens.weight[VOCABULARY["<|vision_end|>"]]
        model.model.image_newline.data.copy_(end)
    return model


def is_vision(name: str) -> bool:
    """Whether a weight of this name belongs to the vision tower, with what follows it."""
    parts = ("visual.", "vision_tower.", "multi_modal_projector.", "image_newline")
    return any(part in name for part in parts)


def _qwen3_vl(text: Qwen3ForCausalLM) -> Qwen3VLForConditionalGeneration:
    """Two-dimensional positions, and a tower of two layers that joins 2 x 2 patches to a token."""
    config = text.config
    rope: dict[str, Any] = dict(config.rope_parameters or {})
    side = _HEAD // 2 // 3
    sections = {
        "mrope_section": [_HEAD // 2 - 2 * side, side, side],
        "mrope_interleaved": True,
    }
    settings = _text(
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads or config.num_attention_heads,
        config.hidden_size,
    )
    rope = {**_ROPE, "rope_theta": rope["rope_theta"], **sections}
    model = Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            text_config={**settings, "rope_parameters": rope},
            vision_config={
                "depth": 2,
                "hidden_size": 96,
                "intermediate_size": 192,
                "num_heads": 4,
                "patch_size": PATCH,
                "spatial_merge_size": MERGE,
                "temporal_patch_size": 2,
                "out_hidden_size": config.hidden_size,
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
    for merger in model.model.visual.deepstack_merger_list:
        nn.init.zeros_(merger.linear_fc2.weight)
        nn.init.zeros_(merger.linear_fc2.bias)
    return model


def _internvl(text: Qwen3ForCausalLM) -> InternVLForConditionalGeneration:
    """A tower of two layers sees tiles; the projector joins the 2 x 2 patches of one to a token."""
    return InternVLForConditionalGeneration(
        InternVLConfig(
            text_config=_text_of(text),
            vision_config={
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "hidden_size": 96,
                "intermediate_size": 192,
                "image_size": [CELL] * 2,
                "patch_size": [PATCH] * 2,
                "layer_scale_init_value": 1.0,
            },
            image_token_id=VOCABULARY["<|image_pad|>"],
            image_seq_length=1,
            downsample_ratio=1 / MERGE,
            tie_word_embeddings=False,
        )
    )


def _llava(text: Qwen3ForCausalLM) -> LlavaOnevisionForConditionalGeneration:
    """A tower of three layers, in which a patch is a token.

    The model ends an image with a learned vector, which starts as the wrapper that ends an image
    elsewhere.
    """
    return LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            text_config=_text_of(text),
            vision_config=_siglip(),
            image_token_index=VOCABULARY["<|image_pad|>"],
            video_token_index=VOCABULARY["<|video_pad|>"],
            image_grid_pinpoints=[[PAGE] * 2],
            tie_word_embeddings=False,
        )
    )


def _gemma3(text: Gemma3ForCausalLM) -> Gemma3ForConditionalGeneration:
    """A tower of three layers, in which a patch is a token; the tokens of a page see each other."""
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=_text_of(text),
            vision_config=_siglip(),
            mm_tokens_per_image=PAGE_CELLS,
            image_token_index=VOCABULARY["<|image_pad|>"],
            boi_token_index=VOCABULARY["<|vision_start|>"],
            eoi_token_index=VOCABULARY["<|vision_end|>"],
            tie_word_embeddings=False,
        )
    )
    projection = model.model.multi_modal_projector.mm_input_projection_weight
    nn.init.normal_(projection, std=projection.shape[0] ** -0.5)  # else it is zero
    return model


def _siglip() -> dict[str, Any]:
    """A tower of three layers that gives each cell of a page a token."""
    return {
        "model_type": "siglip_vision_model",
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "hidden_size": 128,
        "intermediate_size": 256,
        "image_size": PAGE,
        "patch_size": CELL,
        "vision_use_head": False,
    }


def _text_of(text: TextModel) -> dict[str, Any]:
    """The text model's own configuration, as a part of another."""
    settings = text.config.to_dict()
    for name in ("_name_or_path", "architectures", "dtype", "transformers_version"):
        settings.pop(name, None)
    return settings


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
