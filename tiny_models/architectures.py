"""Stock architectures of the tiny models, their tokenizer and their processor."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
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

TinyModel = (
    Qwen3ForCausalLM
    | Qwen3VLForConditionalGeneration
    | InternVLForConditionalGeneration
    | LlavaOnevisionForConditionalGeneration
)
MODEL_CLASSES: dict[str, Any] = {
    "qwen3": Qwen3ForCausalLM,
    "qwen3_vl": Qwen3VLForConditionalGeneration,
    "internvl": InternVLForConditionalGeneration,
    "llava_onevision": LlavaOnevisionForConditionalGeneration,
}
Family = Literal["qwen3_vl", "internvl", "llava_onevision"]
"""Model type of a vision-language model."""
PATCH, MERGE = 8, 2
PAGE_CELLS = (PAGE // CELL) ** 2
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

_IMAGES: dict[Family, str] = {
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "internvl": "<|image_pad|>",  # its processor adds the wrappers
    "llava_onevision": "<|vision_start|><|image_pad|>",  # the model ends an image by itself
}
"""What the chat template writes for an image."""


def chat_template(family: Family = "qwen3_vl") -> str:
    """The parts, one after the other: an answer follows the question's last word."""
    parts = (
        "{% for c in m['content'] %}{% if c['type'] == 'image' %}"
        + _IMAGES[family]
        + "{% else %}{{ c['text'] }}{% endif %}{% if not loop.last %} {% endif %}{% endfor %}"
    )
    return (
        "<bos>{% for m in messages %}{% if not loop.first %} {% endif %}"
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}" + parts + "{% endif %}"
        "{% endfor %}"
    )


def tokenizer(family: Family = "qwen3_vl") -> PreTrainedTokenizerFast:
    """The word tokenizer of all tiny models; families know its special tokens by other names."""
    qwen = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_bos_token": "<|vision_start|>",
        "vision_eos_token": "<|vision_end|>",
    }
    internvl = {
        "context_image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "start_image_token": "<|vision_start|>",
        "end_image_token": "<|vision_end|>",
    }
    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        extra_special_tokens=internvl if family == "internvl" else qwen,
        chat_template=chat_template(family),
    )


def image_processor(family: Family = "qwen3_vl") -> Any:
    """Stock image processor, which leaves a page as it is: a visual token is 16 x 16 px of it.

    That of Qwen3-VL keeps the size of other images too, up to 1,024 tokens. That of InternVL cuts
    an image into at most 16 tiles of one token each and adds a thumbnail. That of LLaVA-OneVision
    gives every image the size and the 16 tokens of a page: a single icon is enlarged to it.
    """
    colors: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    if family == "qwen3_vl":
        return Qwen2VLImageProcessorPil(
            patch_size=PATCH,
            merge_size=MERGE,
            temporal_patch_size=2,
            size={"shortest_edge": CELL**2, "longest_edge": 1024 * CELL**2},
            **colors,
        )
    if family == "internvl":
        size = {"height": CELL, "width": CELL}
        return GotOcr2ImageProcessorPil(
            size=size, crop_to_patches=True, max_patches=PAGE_CELLS, **colors
        )
    size = {"height": PAGE, "width": PAGE}
    return LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=[[PAGE] * 2], **colors)


def processor(family: Family = "qwen3_vl") -> Any:
    """The stock processor of a family's tiny models."""
    kind: Any = Qwen3VLProcessor
    settings: dict[str, Any] = {}
    if family == "internvl":
        kind, settings = InternVLProcessor, {"image_seq_length": 1}
    elif family == "llava_onevision":
        kind = LlavaOnevisionProcessor
        settings = {"num_image_tokens": PAGE_CELLS, "vision_feature_select_strategy": "full"}
    template = chat_template(family)
    return without_video(kind)(
        image_processor(family), tokenizer(family), chat_template=template, **settings
    )


_VIDEO = {
    "qwen3_vl": "Qwen3VLVideoProcessor",
    "internvl": "InternVLVideoProcessor",
    "llava_onevision": "LlavaOnevisionVideoProcessor",
}
_ONLY_IMAGES = (
    *("image_processor_type", "crop_to_patches", "min_patches", "max_patches"),
    *("image_grid_pinpoints", "do_pad"),
)
"""Settings of image processors that video processors do not have."""


def save_processor(model: PreTrainedModel, folder: Path) -> None:
    """Save a tiny model's processor, or the tokenizer of a text-only one.

    The settings of the video part are written too, so that the stock `AutoProcessor` finds them
    where torchvision is installed.
    """
    if not hasattr(model.config, "vision_config"):
        tokenizer().save_pretrained(folder)
        return
    family: Any = model.config.model_type
    processor(family).save_pretrained(folder)
    path = folder / "processor_config.json"
    settings = json.loads(path.read_text())
    images = settings["image_processor"]
    video = {name: value for name, value in images.items() if name not in _ONLY_IMAGES}
    settings["video_processor"] = {**video, "video_processor_type": _VIDEO[family]}
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


def adapt(text: Qwen3ForCausalLM, family: Family = "qwen3_vl") -> Any:
    """A vision-language model that starts from a text model, with a vision tower of its own."""
    builders: dict[Family, Any] = {
        "qwen3_vl": _qwen3_vl,
        "internvl": _internvl,
        "llava_onevision": _llava,
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
            vision_config={
                "model_type": "siglip_vision_model",
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "hidden_size": 128,
                "intermediate_size": 256,
                "image_size": PAGE,
                "patch_size": CELL,
                "vision_use_head": False,
            },
            image_token_index=VOCABULARY["<|image_pad|>"],
            video_token_index=VOCABULARY["<|video_pad|>"],
            image_grid_pinpoints=[[PAGE] * 2],
            tie_word_embeddings=False,
        )
    )


def _text_of(text: Qwen3ForCausalLM) -> dict[str, Any]:
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
