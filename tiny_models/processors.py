"""The words of the tiny models, their tokenizer and their stock processors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    GotOcr2ImageProcessorPil,
    InternVLProcessor,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
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

Family = Literal["qwen3_vl", "internvl", "llava_onevision", "gemma3"]
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
    "gemma3": "<|vision_start|>",  # which its processor replaces
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
    gemma = {
        "image_token": "<|image_pad|>",
        "boi_token": "<|vision_start|>",
        "eoi_token": "<|vision_end|>",
    }
    names = {"internvl": internvl, "gemma3": gemma}
    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        extra_special_tokens=names.get(family, qwen),
        chat_template=chat_template(family),
    )


def image_processor(family: Family = "qwen3_vl") -> Any:
    """Stock image processor, which leaves a page as it is: a visual token is 16 x 16 px of it.

    That of Qwen3-VL keeps the size of other images too, up to 1,024 tokens. That of InternVL cuts
    an image into at most 16 tiles of one token each and adds a thumbnail. Those of LLaVA-OneVision
    and Gemma 3 give every image the size and the 16 tokens of a page: a single icon is enlarged.
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
    if family == "gemma3":
        return Gemma3ImageProcessorPil(size=size, resample=Image.Resampling.BICUBIC, **colors)
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
    elif family == "gemma3":
        kind, settings = Gemma3Processor, {"image_seq_length": PAGE_CELLS}
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
    if family not in _VIDEO:
        return
    path = folder / "processor_config.json"
    settings = json.loads(path.read_text())
    images = settings["image_processor"]
    video = {name: value for name, value in images.items() if name not in _ONLY_IMAGES}
    settings["video_processor"] = {**video, "video_processor_type": _VIDEO[family]}
    with paths.write_whole(path) as whole:
        whole.write_text(json.dumps(settings, indent=2) + "\n")
