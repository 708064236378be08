"""Small random models of every supported family, each with a stock processor that fits it."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BatchFeature,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.video_utils import make_batched_metadata, make_batched_videos

from mmheads.compat import without_video

FAMILIES = (
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen2_5_vl",
    "qwen3_5",
    "qwen3_5_moe",
    "internvl",
    "llava_onevision",
    "gemma3",
    "smolvlm",
    "idefics3",
    "qwen3",
)
"""The last one reads text alone."""


def build(family: str, seed: int = 0) -> tuple[PreTrainedModel, Any]:
    """A model in float32 and its processor; a tokenizer alone for a text-only model."""
    processor = _processor(family)
    auto = AutoModelForCausalLM if family == "qwen3" else AutoModelForImageTextToText
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = _config(family, getattr(processor, "tokenizer", processor))
        model = auto.from_config(config, dtype=torch.float32).eval()
        for name, weight in model.get_decoder().named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):  # else attention is near uniform
                torch.nn.init.normal_(weight, std=1.5 / weight.shape[1] ** 0.5)
        if family == "gemma3":  # else it is zero, and the model blind
            weight = model.model.multi_modal_projector.mm_input_projection_weight
            torch.nn.init.normal_(weight, std=weight.shape[0] ** -0.5)
    return model, processor


def with_heads(family: str, *, layers: int, heads: int, kv_groups: int) -> PreTrainedModel:
    """A model of a family with other numbers of layers, heads per layer and KV groups."""
    config = build(family)[0].config
    config.text_config.num_hidden_layers = layers
    config.text_config.num_attention_heads = heads
    config.text_config.num_key_value_heads = kv_groups
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    return model.eval()


def save(family: str, folder: Path, seed: int = 0) -> Path:
    """Save a model and its processor in one folder -> the folder."""
    for part in build(family, seed):
        part.save_pretrained(folder)
    return folder


def add_video(processor: Any, family: str) -> None:
    """Let a Qwen-VL processor take videos without torchvision; it cannot be saved any more.

    All frames are taken: nothing is sampled.
    """
    if not family.startswith("qwen") or family == "qwen3":
        raise ValueError(f"{family} has no video processor here")
    processor.video_processor = _Videos(processor.image_processor)


class _Videos:
    """The stock video processor's patches and grids, from the image processor's."""

    temporal_patch_size = 2

    def __init__(self, images: Any) -> None:
        self.images = images
        self.merge_size = images.merge_size

    def __call__(self, videos: Any, video_metadata: Any = None, **_: Any) -> BatchFeature:
        videos = make_batched_videos(videos)
        patches, grids = zip(*map(self._patches, videos), strict=True)
        return BatchFeature(
            {
                "pixel_values_videos": np.concatenate(patches),
                "video_grid_thw": np.array(grids),
                "video_metadata": make_batched_metadata(videos, video_metadata),
            }
        )

    def _patches(self, video: np.ndarray) -> tuple[np.ndarray, tuple[int, int, int]]:
        step = self.temporal_patch_size
        frames = [*video, *[video[-1]] * (-len(video) % step)]
        encoded = self.images(frames, temporal_patch_size=1, return_tensors="np")
        _, height, width = encoded["image_grid_thw"][0]
        steps = len(frames) // step
        # [step, frame, patch, channel, pixel] -> [step, patch, channel, frame, pixel]
        patches = encoded["pixel_values"].reshape(steps, step, height * width, 3, -1)
        patches = patches.transpose(0, 2, 3, 1, 4)
        return patches.reshape(steps * height * width, -1), (steps, height, width)


# --- processors

_PATCH, _MERGE = 4, 2
_TILE = 16
"""Side of an image tile of InternVL, SmolVLM and Idefics3 in pixels: 2 x 2 tokens."""
_SIDE = 32
"""Side of an image, or of a tile of one, of LLaVA-OneVision and Gemma 3 in pixels: 4 x 4 tokens."""
_PINPOINTS = [[_SIDE * i, _SIDE * j] for i in range(1, 4) for j in range(1, 4)]

_QWEN = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
_IDEFICS = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}
_NAMED = {
    "qwen3_vl": _QWEN,
    "qwen3_vl_moe": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_5": _QWEN,
    "qwen3_5_moe": _QWEN,
    "internvl": {
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
        "start_image_token": "<img>",
        "end_image_token": "</img>",
    },
    "llava_onevision": {"image_token": "<image>", "video_token": "<video>"},
    "gemma3": {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    },
    "paligemma": {"image_token": "<image>"},
    "smolvlm": _IDEFICS,
    "idefics3": _IDEFICS,
    "qwen3": {},
}
"""A family's special tokens by the names its processor knows them by."""
_QWEN_MARKS = (
    "<|vision_start|><|image_pad|><|vision_end|>",
    "<|vision_start|><|video_pad|><|vision_end|>",
)
_MARKS = {
    "qwen3_vl": _QWEN_MARKS,
    "qwen3_vl_moe": _QWEN_MARKS,
    "qwen2_5_vl": _QWEN_MARKS,
    "qwen3_5": _QWEN_MARKS,
    "qwen3_5_moe": _QWEN_MARKS,
    "internvl": ("<IMG_CONTEXT>\n", "<video>\n"),
    "llava_onevision": ("<image>", "<video>"),
    "gemma3": ("<start_of_image>", ""),
    "paligemma": ("<image>", ""),
    "smolvlm": ("<image>", "<video>"),
    "idefics3": ("<image>", ""),
    "qwen3": ("", ""),
}
"""What the chat template writes for an image and for a video."""

_IN_ORDER = (
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE"
    "{% elif c['type'] == 'video' %}VIDEO{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
)
_IMAGES_FIRST = (
    "{% for c in m['content'] if c['type'] == 'image' %}IMAGE{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'video' %}VIDEO{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ '\n' + c['text'] }}{% endfor %}"
)
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}PARTS{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CORPUS = (
    "What is the total revenue in 2023 on page 4? Answer with a number.",
    "Which figure shows the yellow taxi, and on which page of the document is it?",
    "The quick brown fox jumps over the lazy dog.",
    "user assistant system page image frame seconds first second third",
)


def _processor(family: str) -> Any:
    tokenizer = _tokenizer(family)
    template = _chat_template(family)
    settings: dict[str, Any] = {}
    match family:
        case "qwen3":
            tokenizer.chat_template = template
            return tokenizer
        case _ if family.startswith("qwen"):
            qwen3 = family.startswith("qwen3")
            kind = transformers.Qwen3VLProcessor if qwen3 else transformers.Qwen2_5_VLProcessor
            pixels = (_PATCH * _MERGE) ** 2
            images = transformers.Qwen2VLImageProcessorPil(
                patch_size=_PATCH,
                merge_size=_MERGE,
                temporal_patch_size=_Videos.temporal_patch_size,
                size={"shortest_edge": pixels, "longest_edge": 256 * pixels},
            )
        case "internvl":
            kind = transformers.InternVLProcessor
            images = transformers.GotOcr2ImageProcessorPil(
                size={"height": _TILE, "width": _TILE}, crop_to_patches=True, max_patches=6
            )
            settings = {"image_seq_length": 4}
        case "llava_onevision":
            kind = transformers.LlavaOnevisionProcessor
            images = transformers.LlavaOnevisionImageProcessorPil(
                size={"height": _SIDE, "width": _SIDE}, image_grid_pinpoints=_PINPOINTS
            )
            settings = {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}
        case "gemma3":
            kind = transformers.Gemma3Processor
            images = transformers.Gemma3ImageProcessorPil(size={"height": _SIDE, "width": _SIDE})
            settings = {"image_seq_length": 16}
        case "paligemma":
            kind = transformers.PaliGemmaProcessor
            images = transformers.SiglipImageProcessorPil(size={"height": _SIDE, "width": _SIDE})
            images.image_seq_length = 16
        case _:
            edges = {
                "size": {"longest_edge": 2 * _TILE},
                "max_image_size": {"longest_edge": _TILE},
            }
            settings = {"image_seq_len": 4}
            if family == "idefics3":
                kind = transformers.Idefics3Processor
                images = transformers.Idefics3ImageProcessorPil(**edges)
            else:
                kind = transformers.SmolVLMProcessor
                images = transformers.SmolVLMImageProcessorPil(**edges)
                settings["video_processor"] = None
    return without_video(kind)(images, tokenizer, chat_template=template, **settings)


def _chat_template(family: str) -> str:
    image, video = _MARKS[family]
    parts = _IMAGES_FIRST if family == "llava_onevision" else _IN_ORDER
    start = "{{ bos_token }}" if family in ("gemma3", "paligemma") else ""
    return start + _TEMPLATE.replace("PARTS", parts).replace("IMAGE", image).replace("VIDEO", video)


def _tokenizer(family: str) -> PreTrainedTokenizerFast:
    named = _NAMED[family]
    begins = family in ("gemma3", "paligemma")
    bos = {"bos_token": "<bos>", "add_bos_token": True} if begins else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_pairs(tuple(named.values())),
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens=named,
        **bos,
    )


@cache
def _byte_pairs(special: tuple[str, ...]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    grid = [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<bos>", *special, *grid)
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


# --- models

_LINEAR = {
    **{f"linear_num_{name}_heads": 2 for name in ("key", "value")},
    **{f"linear_{name}_head_dim": 8 for name in ("key", "value")},
}
"""Settings of gated delta nets."""
_TOWER = {"hidden_size": 32, "intermediate_size": 32}
_ENCODER = {**_TOWER, "num_hidden_layers": 2, "num_attention_heads": 2}
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}


def _config(family: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 32_768,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "rope_parameters": _ROPE,
    }
    kind = CONFIG_MAPPING[family]
    match family:
        case "qwen3":
            return kind(**text)
        case _ if family.startswith("qwen"):
            text["rope_parameters"] = {**_ROPE, "mrope_section": [4, 2, 2]}
            vision = {
                **_TOWER,
                "depth": 2,
                "num_heads": 2,
                "patch_size": _PATCH,
                "spatial_merge_size": _MERGE,
                "temporal_patch_size": _Videos.temporal_patch_size,
                "out_hidden_size": text["hidden_size"],
            }
            if family == "qwen2_5_vl":
                vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
            else:
                text["rope_parameters"]["mrope_interleaved"] = True
                vision["num_position_embeddings"] = 64
            if family.startswith("qwen3_vl"):
                vision["deepstack_visual_indexes"] = [0]
            elif family.startswith("qwen3_5"):
                text |= {**_LINEAR, "layer_types": ["linear_attention", "full_attention"] * 2}
                text["rope_parameters"]["partial_rotary_factor"] = 1.0
            if family.endswith("moe"):
                text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
            tokens = {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in _QWEN}
        case "internvl":
            text["model_type"] = "qwen3"
            vision = {**_ENCODER, "image_size": [_TILE] * 2, "patch_size": [_PATCH] * 2}
            tokens = {"image_token_id": tokenizer.context_image_token_id, "image_seq_length": 4}
        case "llava_onevision":
            text["model_type"] = "qwen2"
            vision = _siglip(patch=8)
            tokens = {
                "image_token_id": tokenizer.image_token_id,
                "video_token_id": tokenizer.video_token_id,
                "image_grid_pinpoints": _PINPOINTS,
            }
        case "gemma3":
            text |= {
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "sliding_window": 16,
                "query_pre_attn_scalar": text["head_dim"],
            }
            del text["rope_parameters"]  # each layer type has its own
            vision = _siglip(patch=4)
            tokens = {
                "image_token_id": tokenizer.image_token_id,
                "boi_token_id": tokenizer.boi_token_id,
                "eoi_token_id": tokenizer.eoi_token_id,
                "mm_tokens_per_image": 16,
            }
        case "paligemma":
            text["model_type"] = "gemma"
            vision = {**_siglip(patch=8), "projection_dim": text["hidden_size"]}
            tokens = {
                "image_token_id": tokenizer.image_token_id,
                "projection_dim": text["hidden_size"],
                "hidden_size": text["hidden_size"],
            }
        case _:
            text["model_type"] = "llama"
            vision = {**_ENCODER, "image_size": _TILE, "patch_size": _PATCH}
            tokens = {"image_token_id": tokenizer.image_token_id, "scale_factor": 2}
    return kind(text_config=text, vision_config=vision, **tokens)


def _siglip(patch: int) -> dict[str, Any]:
    return {
        **_ENCODER,
        "model_type": "siglip_vision_model",
        "image_size": _SIDE,
        "patch_size": patch,
        "vision_use_head": False,
    }


# --- models that are given token ids, for want of a processor without torchvision

IMAGE_ID = 60
"""Token id of a piece of an image in the models of `TOKEN_MODELS`."""

SMALL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 6}
_GEMMA_4 = {
    **SMALL,
    **_MIXED,
    "global_head_dim": 32,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 0,
    "use_bidirectional_attention": "vision",
}
_PER_LAYER = {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8}

TOKEN_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "molmo2": ("molmo2", {**SMALL, "additional_vocab_size": 8}),
    "paligemma": ("paligemma", {**SMALL, "model_type": "gemma"}),
    "paligemma2": ("paligemma", {**SMALL, **_MIXED, "model_type": "gemma2"}),
    "gemma4": ("gemma4", _GEMMA_4),
    "gemma4 with fewer global KV heads": (
        "gemma4",
        {**_GEMMA_4, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
    ),
    "gemma4 with shared KV": ("gemma4", {**_GEMMA_4, **_PER_LAYER}),
    "gemma3n_text": (
        "gemma3n_text",
        {**SMALL, **_MIXED, **_PER_LAYER, "vocab_size_per_layer_input": 64},
    ),
    "gemma2": ("gemma2", {**SMALL, **_MIXED, "query_pre_attn_scalar": 16}),
    "gemma3_text": ("gemma3_text", {**SMALL, **_MIXED, "query_pre_attn_scalar": 16}),
    "gpt_oss": ("gpt_oss", {**SMALL, **_MIXED, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "mistral": ("mistral", {**SMALL, "sliding_window": 6}),
    "cohere2": ("cohere2", {**SMALL, **_MIXED}),
    "qwen3_5_text": (
        "qwen3_5_text",
        {**SMALL, **_LINEAR, "layer_types": ["linear_attention", "full_attention"] * 2},
    ),
    "lfm2": ("lfm2", {**SMALL, "layer_types": ["conv", "full_attention"] * 2}),
}
"""By name, the type of a model and its text settings; the last families read only text."""


def token_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A random model that is given token ids; its images are words without pixels."""
    kind, text = TOKEN_MODELS[name]
    config = CONFIG_MAPPING[kind]
    auto: Any = AutoModelForCausalLM
    vision = {"molmo2": _molmo2, "paligemma": _paligemma, "gemma4": _gemma4}.get(kind)
    if vision:
        auto = AutoModelForImageTextToText
        config = config(text_config=text, **vision())
    else:
        config = config(**text)
    eager = {"attn_implementation": "eager"} if name in ("paligemma2", "gemma2", "gpt_oss") else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config, dtype=torch.float32, **eager).eval()
        for weight in model.get_decoder().parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=0.25)
    return model


def _molmo2() -> dict[str, Any]:
    small = {**_TOWER, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    return {
        "vision_config": {**small, "num_hidden_layers": 2, "image_size": [28, 28]},
        "adapter_config": {**small, "vision_feature_layer": [1, 0], "text_hidden_size": 64},
        "image_patch_id": IMAGE_ID,
    }


def _paligemma() -> dict[str, Any]:
    return {
        "vision_config": {**_siglip(patch=8), "projection_dim": 64},
        "image_token_index": IMAGE_ID,
        "projection_dim": 64,
        "hidden_size": 64,
        "vocab_size": 64,
    }


def _gemma4() -> dict[str, Any]:
    vision = {**_ENCODER, "num_key_value_heads": 2, "head_dim": 16}
    return {"vision_config": vision, "audio_config": None, "image_token_id": IMAGE_ID}
