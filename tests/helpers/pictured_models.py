"""Random models of newer families, which read images through their stock processors.

Gemma 4 and Gemma 3n have image processors that do without torchvision. Those of LFM2-VL and Molmo2
need it: `_LfmImages` and `_MolmoImages` stand in for them with the same kinds of tensors, and the
stock processor writes the tokens. Gemma 3n's vision tower needs timm: `_Tower` stands in for it.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import random_models
import torch
import transformers
from every_family import _without_timm
from PIL import Image
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    BaseImageProcessor,
    BatchFeature,
)
from transformers.processing_utils import ImagesKwargs

from mmheads.compat import without_video
from mmheads.models import VLM

FAMILIES = ("gemma4", "gemma4, small", "gemma3n", "lfm2_vl", "molmo2")

_PATCH = 4
_GEMMA = {
    "image_token": "<image_soft_token>",
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "audio_token": "<audio_soft_token>",
    "boa_token": "<start_of_audio>",
    "eoa_token": "<end_of_audio>",
}
_NAMED = {
    "gemma4": _GEMMA,
    "gemma3n": _GEMMA,
    "lfm2_vl": {
        "image_token": "<image>",
        "image_start_token": "<|image_start|>",
        "image_end_token": "<|image_end|>",
        "image_thumbnail_token": "<|img_thumbnail|>",
        **{
            f"tile_{row}_{column}": f"<|img_row_{row}_col_{column}|>"
            for row in (1, 2)
            for column in (1, 2)
        },
    },
    "molmo2": {
        "image_token": "<|image|>",
        "video_token": "<|video|>",
        **{
            name: f"<{name}>"
            for name in ("im_patch", "im_col", "im_start", "low_res_im_start", "frame_start")
        },
        **{name: f"<{name}>" for name in ("im_end", "frame_end", "im_low")},
    },
}
"""A family's special tokens by the names its processor knows them by."""

_WIDTH = 64
_TEXT = {
    **random_models.SMALL,
    "hidden_size": _WIDTH,
    "max_position_embeddings": 32_768,
}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 16}
_SHARED = {
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
}


def build(family: str, seed: int = 0) -> VLM:
    """A model in float32 with its processor."""
    kind = family.partition(",")[0]
    tokenizer = _tokenizer(kind)
    processor = _processor(kind, tokenizer)
    text = {**_TEXT, "vocab_size": len(tokenizer)}
    text |= {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")
    }
    config = CONFIG_MAPPING[kind](**_config(family, text, tokenizer))
    with torch.random.fork_rng(devices=[]), _without_timm():
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
        if kind == "gemma3n":
            model.model.vision_tower = _Tower(config.vision_config.hidden_size)
        for weight in model.get_decoder().parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=0.25)
        for weight in model.parameters():
            if weight.ndim > 1 and not weight.any():  # else the model is blind
                torch.nn.init.normal_(weight, std=0.25)
    return VLM(model=model, processor=processor, model_id=family)


def _tokenizer(kind: str) -> Any:
    named = _NAMED[kind]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=random_models._byte_pairs(tuple(named.values())),
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        bos_token="<bos>",
        extra_special_tokens=named,
    )


def _processor(kind: str, tokenizer: Any) -> Any:
    settings: dict[str, Any] = {}
    match kind:
        case "gemma4":
            stock: Any = without_video(transformers.Gemma4Processor)
            images: Any = transformers.Gemma4ImageProcessorPil(
                patch_size=_PATCH, pooling_kernel_size=2, max_soft_tokens=70
            )
            audio: Any = transformers.Gemma4AudioFeatureExtractor()
            settings = {"feature_extractor": audio, "video_processor": None}
        case "gemma3n":
            stock = transformers.Gemma3nProcessor
            images = transformers.SiglipImageProcessorPil(size={"height": 32, "width": 32})
            settings = {
                "feature_extractor": transformers.Gemma3nAudioFeatureExtractor(),
                "image_seq_length": 16,
            }
        case "lfm2_vl":
            stock, images = transformers.Lfm2VlProcessor, _LfmImages()
        case _:
            # The stock one takes no image processor but its own.
            any_kind = {"check_argument_for_proper_class": lambda self, name, part: type(part)}
            stock = type("Molmo2Processor", (transformers.Molmo2Processor,), any_kind)
            images = _MolmoImages()
    image = {"lfm2_vl": "<image>", "molmo2": "<|image|>"}.get(kind, _GEMMA["image_token"])
    template = random_models._TEMPLATE.replace("PARTS", random_models._IN_ORDER)
    template = template.replace("IMAGE", image).replace("VIDEO", "")
    return stock(image_processor=images, tokenizer=tokenizer, chat_template=template, **settings)


def _config(family: str, text: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    encoder = {**random_models._ENCODER, "patch_size": _PATCH}
    tokens = {"image_token_id": tokenizer.image_token_id}
    match family:
        case "gemma4" | "gemma4, small":
            text |= {
                **_MIXED,
                "global_head_dim": 32,
                "vocab_size_per_layer_input": text["vocab_size"],
            }
            if family == "gemma4":
                text |= {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
                text |= {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
            else:
                text |= _SHARED
            vision = encoder | {
                **{"num_key_value_heads": 2, "head_dim": 16, "pooling_kernel_size": 2},
                "position_embedding_size": 128,
            }
            tokens |= {"audio_config": None}
        case "gemma3n":
            text |= {**_MIXED, **_SHARED, "vocab_size_per_layer_input": text["vocab_size"]}
            vision = {"hidden_size": 32, "vocab_size": 8, "vocab_offset": text["vocab_size"] - 16}
            tokens |= {"vision_soft_tokens_per_image": 16}
            audio = {"hidden_size": 32, "vocab_size": 8, "vocab_offset": text["vocab_size"] - 8}
            audio |= {"conf_num_hidden_layers": 1}
            tokens |= {"audio_config": audio, "audio_token_id": tokenizer.audio_token_id}
        case "lfm2_vl":
            text |= {"layer_types": ["conv", "full_attention"] * 2}
            vision = encoder | {"num_patches": 64}
            tokens |= {"projector_hidden_size": 32}
        case _:
            text |= {"additional_vocab_size": 8}
            small = {**random_models._TOWER, "num_attention_heads": 2, "num_key_value_heads": 2}
            small |= {"head_dim": 16}
            size = {"image_size": [_MolmoImages.side] * 2, "image_default_input_size": [16, 16]}
            vision = {
                **small,
                "num_hidden_layers": 2,
                "patch_size": _PATCH,
                "image_size": size["image_size"],
            }
            adapter = {"vision_feature_layer": [1, 0], "text_hidden_size": _WIDTH}
            ids = {
                f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<{token}>")
                for name, token in (
                    ("image_start", "im_start"),
                    ("low_res_image_start", "low_res_im_start"),
                    ("image_end", "im_end"),
                    ("frame_start", "frame_start"),
                    ("frame_end", "frame_end"),
                )
            }
            patch = tokenizer.convert_tokens_to_ids("<im_patch>")
            tokens = {"adapter_config": {**small, **adapter}, "image_patch_id": patch, **ids}
    return {"text_config": text, "vision_config": vision, **tokens}


class _Tower(torch.nn.Module):
    """Patches of 8 x 8 pixels, in place of Gemma 3n's convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.patches = torch.nn.Conv2d(3, channels, 8, 8)

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.patches(pixel_values))


def _flat(images: Any) -> list[Image.Image]:
    return [image for each in images for image in (each if isinstance(each, list) else [each])]


def _patches(image: Image.Image, width: int, height: int) -> torch.Tensor:
    """[patch, pixel and channel] of an image that is brought to a size, row by row."""
    pixels = np.asarray(image.convert("RGB").resize((width, height)), np.float32) / 127.5 - 1
    rows, columns = height // _PATCH, width // _PATCH
    grid = pixels.reshape(rows, _PATCH, columns, _PATCH, 3).swapaxes(1, 2)
    return torch.from_numpy(grid.reshape(rows * columns, -1).copy())


class _LfmKwargs(ImagesKwargs, total=False):
    return_row_col_info: bool


class _LfmImages(BaseImageProcessor):
    """Wide images as two tiles and a thumbnail, others as one image, as LFM2-VL has them."""

    model_input_names = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
    valid_kwargs = _LfmKwargs
    tile_size, encoder_patch_size, downsample_factor, use_thumbnail = 32, _PATCH, 2, True

    def __call__(self, images: Any, **_: Any) -> BatchFeature:
        made, shapes, rows, columns, sizes = [], [], [], [], []
        for image in _flat(images):
            tiles = 2 if image.width > image.height else 1
            side = self.tile_size
            if tiles == 2:
                middle = image.width // 2
                halves = ((0, middle), (middle, image.width))
                made += [
                    _patches(image.crop((a, 0, b, image.height)), side, side) for a, b in halves
                ]
                shapes += [[side // _PATCH] * 2] * 2
            size = (16, 24) if tiles == 2 else (24, 16)
            made.append(_patches(image, size[1], size[0]))
            shapes.append([size[0] // _PATCH, size[1] // _PATCH])
            rows.append(1)
            columns.append(tiles)
            sizes.append(list(size))
        longest = max(map(len, made))
        mask = torch.tensor([[1] * len(each) + [0] * (longest - len(each)) for each in made])
        padded = [torch.nn.functional.pad(each, (0, 0, 0, longest - len(each))) for each in made]
        return BatchFeature(
            {
                "pixel_values": torch.stack(padded),
                "pixel_attention_mask": mask,
                "spatial_shapes": torch.tensor(shapes),
                "image_rows": rows,
                "image_cols": columns,
                "image_sizes": sizes,
            }
        )


class _MolmoImages(BaseImageProcessor):
    """A coarse view and one crop of the same size, whose patches are pooled, as Molmo2 has it."""

    model_input_names = ("pixel_values", "image_token_pooling", "image_grids", "image_num_crops")
    side = 16

    def __call__(self, images: Any, **_: Any) -> BatchFeature:
        flat = _flat(images)
        views = [_patches(image, self.side, self.side) for image in flat for _ in range(2)]
        edge = self.side // _PATCH
        pooled = (
            torch.arange(edge**2).reshape(edge // 2, 2, edge // 2, 2).swapaxes(1, 2).reshape(-1, 4)
        )
        return BatchFeature(
            {
                "pixel_values": torch.stack(views),
                "image_token_pooling": torch.cat(
                    [pooled + view * edge**2 for view in range(len(views))]
                ),
                "image_grids": torch.tensor([[edge // 2] * 4] * len(flat)),
                "image_num_crops": torch.tensor([2] * len(flat)),
            }
        )
