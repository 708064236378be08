"""Everything that differs between model families.

Where visual tokens lie on an image and how many there are, and what the language model is given.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import __version__

from mmheads import compat
from mmheads.examples import Example, Video
from mmheads.models import VLM

Boxes = NDArray[np.float64]
"""[token, (left, top, right, bottom)] in pixels of an image; nan for a token without a place."""

GRIDS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
"""Inputs that tell a model how many tokens each image has, from which it counts positions."""


def box_shares(boxes: Boxes, box: tuple[float, float, float, float]) -> NDArray[np.float64]:
    """[token] share of each token's area that lies in `box`; 0 for a token without a place."""
    left, top, right, bottom = box
    width = np.minimum(boxes[:, 2], right) - np.maximum(boxes[:, 0], left)
    height = np.minimum(boxes[:, 3], bottom) - np.maximum(boxes[:, 1], top)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    inside: Boxes = np.clip(width, 0, None) * np.clip(height, 0, None) / area
    return np.nan_to_num(inside)


def frame_shares(
    vlm: VLM, video: Video, frames: tuple[int, int], tokens: int
) -> NDArray[np.float64]:
    """[token] share of each token's frames that are asked for; a token may cover several."""
    step = getattr(vlm.processor.video_processor, "temporal_patch_size", 1)
    slots = math.ceil(len(video.frames) / step)
    shares = [
        np.mean(
            [frames[0] <= min(f, len(video.frames) - 1) < frames[1] for f in range(s, s + step)]
        )
        for s in range(0, slots * step, step)
    ]
    return np.repeat(shares, tokens // slots)


def _grid(rows: int, columns: int, area: tuple[float, float, float, float]) -> Boxes:
    """[row x column, 4] boxes that tile an area, row by row."""
    x = np.linspace(area[0], area[2], columns + 1)
    y = np.linspace(area[1], area[3], rows + 1)
    top, left = np.meshgrid(y[:-1], x[:-1], indexing="ij")
    bottom, right = np.meshgrid(y[1:], x[1:], indexing="ij")
    return np.stack([left, top, right, bottom], axis=-1).reshape(-1, 4)


def _tiles(rows: int, columns: int, side: int, width: float, height: float) -> list[Boxes]:
    """Boxes of an image cut into tiles of side x side tokens, tile by tile."""
    return [_grid(side, side, tuple(tile)) for tile in _grid(rows, columns, (0, 0, width, height))]


def token_boxes(
    vlm: VLM,
    example: Example,
    inputs: Mapping[str, torch.Tensor],
    index: int,
    tokens: int,
    replacement: str,
) -> Boxes | None:
    """Boxes of an image's or a video's tokens in its pixels; None for a family not known."""
    part = example.context[index]
    assert not isinstance(part, str)
    frames = part.frames if isinstance(part, Video) else (part,)
    width, height = frames[0].size
    full_box = (0.0, 0.0, float(width), float(height))
    earlier = sum(isinstance(p, type(part)) for p in example.context[:index])
    family, processor = vlm.family, vlm.processor
    if family.startswith(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")):
        name = "video_grid_thw" if isinstance(part, Video) else "image_grid_thw"
        slots, rows, columns = inputs[name][earlier].tolist()
        merge = vlm.model.config.vision_config.spatial_merge_size
        boxes = np.tile(_grid(rows // merge, columns // merge, full_box), (slots, 1))
    elif isinstance(part, Video):
        return None
    elif family == "internvl":
        side = math.isqrt(processor.image_seq_length)
        columns, rows = compat.internvl_tiles(processor.image_processor, part)
        grids = _tiles(rows, columns, side, width, height)
        boxes = np.concatenate([*grids, _grid(side, side, full_box)] if len(grids) > 1 else grids)
    elif family in ("gemma3", "paligemma"):
        if getattr(processor.image_processor, "do_pan_and_scan", False):
            return None
        side = math.isqrt(processor.image_seq_length)
        boxes = _grid(side, side, full_box)
    elif family in ("idefics3", "smolvlm"):
        side = math.isqrt(processor.image_seq_len)
        names = re.findall(r"<row_(\d+)_col_(\d+)>", replacement)
        rows = max((int(row) for row, _ in names), default=0)
        columns = max((int(column) for _, column in names), default=0)
        grids = _tiles(rows, columns, side, width, height) if names else []
        boxes = np.concatenate([*grids, _grid(side, side, full_box)])
    elif family == "llava_onevision":
        boxes = _llava_boxes(vlm, example, part)
    else:
        return None
    if len(boxes) != tokens:
        raise ValueError(
            f"image {earlier} has {tokens} visual tokens, but {len(boxes)} places were computed "
            f"for a {family} model"
        )
    return boxes


def _llava_boxes(vlm: VLM, example: Example, image: Image.Image) -> Boxes:
    """Places on one image: a base grid and a fine one whose rows end in a newline token.

    Of several images, each is one grid over the image padded to a square, and a newline token.
    """
    processor = vlm.processor
    width, height = image.size
    side = math.isqrt(processor.num_image_tokens)
    if len(example.images()) > 1:
        edge = max(width, height)
        x, y = (edge - width) / 2, (edge - height) / 2
        square = _grid(side, side, (-x, -y, edge - x, edge - y))
        return np.concatenate([square, np.full((1, 4), np.nan)])
    rows, columns = compat.llava_grid(processor, image, side)
    grid = _grid(rows, columns, (0, 0, width, height)).reshape(rows, columns, 4)
    newline = np.full((rows, 1, 4), np.nan)
    base = _grid(side, side, (0, 0, width, height))
    return np.concatenate([base, np.concatenate([grid, newline], axis=1).reshape(-1, 4)])


def count_tokens(vlm: VLM, image: Image.Image) -> int:
    """Number of visual tokens of an image in a prompt of its own, from its size."""
    processor = vlm.processor
    if vlm.family in ("idefics3", "smolvlm"):
        tiles, *_ = processor.image_processor.get_number_of_image_patches(*image.size[::-1], {})
        return max(1, int(tiles)) * int(processor.image_seq_len)
    counts = compat.tokens_per_image(processor, image)
    if vlm.family == "internvl":  # its tokens count the wrappers too
        return counts["num_image_patches"][0] * int(processor.image_seq_length)
    return counts["num_image_tokens"][0]


def tokens_depend_on_neighbours(vlm: VLM) -> bool:
    """Whether an image has other tokens in a prompt of its own than beside other images."""
    return vlm.family == "llava_onevision"


# --- inputs of the language model

_BROKEN = ("llama4",) if __version__ == "5.24.0" else ()
_NOT_COMPARED = "it was never compared with full passes of the model"
REFUSED = {
    **dict.fromkeys(
        ("kosmos-2", "kosmos-2.5"), "it counts positions in a way that is not known here"
    ),
    **dict.fromkeys(("inkling2", "inkling_mm_model"), "it adds a bias to its scores"),
    **dict.fromkeys(_BROKEN, "transformers 5.24.0 fails in its call; take another version"),
    **dict.fromkeys(("blip-2", "instructblip", "instructblipvideo", "idefics"), _NOT_COMPARED),
}
"""Families that would run, but give other numbers or none, with the reason."""

TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
"""Model inputs [1, token] that say which tokens are text, and which images."""

PER_TOKEN = ("per_layer_inputs", "ple_input_ids")
"""Decoder inputs [1, token, ...] beside the embeddings (Gemma 3n and small Gemma 4; Qwen4)."""


def reading(vlm: VLM) -> AbstractContextManager[None]:
    """A context in which the processor reads a rendered prompt and adds nothing to its text."""
    return compat.text_as_written(vlm.processor) if vlm.family == "paligemma" else nullcontext()


def token_types(vlm: VLM, ids: torch.Tensor) -> torch.Tensor:
    """[1, token] kind of each token id: 0 for text, 1 for an image, 2 for a video."""
    if vlm.family == "paligemma":  # 1 is for what is to be written, which no prompt holds
        return torch.zeros_like(ids)
    if not vlm.family.startswith("gemma3"):  # its types have other names than its processor's
        kinds = compat.token_types(vlm.processor, ids)
        if kinds is not None:
            return kinds
    kinds = torch.zeros_like(ids)
    kinds[ids == vlm.model.config.image_token_id] = 1
    kinds[ids == getattr(vlm.model.config, "video_token_id", -1)] = 2
    return kinds


def has_known_masks(vlm: VLM) -> bool:
    """Whether a model's masks are those of `decoder.Blocks`; others are taken from the model."""
    stock = compat.attention_name(vlm.text_config) in ("sdpa", "eager")
    both_ways = compat.setting(vlm.text_config, "use_bidirectional_attention")
    return vlm.family in ("gemma3", "gemma3_text") and stock and not both_ways


def embed(vlm: VLM, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Decoder inputs of token ids [token] as words: embeddings, and `PER_TOKEN` where there are.

    The placeholders of images are embedded as words too.
    """
    ids = ids.to(vlm.device)[None]
    table = vlm.model.get_input_embeddings()
    words: int = getattr(table, "base_layer", table).num_embeddings  # an adapter has a base layer
    embedded = {"inputs_embeds": table(torch.where(ids < words, ids, 0))}
    if getattr(vlm.decoder, "hidden_size_per_layer_input", None):
        visual = torch.from_numpy(vlm.is_visual(ids.cpu())).to(vlm.device)
        blank = not vlm.family.startswith("gemma3n")  # which looks placeholders up too
        given = torch.where(visual & blank, vlm.text_config.pad_token_id or 0, ids)
        # Gemma 4 also takes embeddings, to find ids by; transformers 5.17 without a default.
        embedded["per_layer_inputs"] = vlm.decoder.get_per_layer_inputs(given, *[None] * blank)
    if compat.setting(vlm.text_config, "ple_layer_ids"):
        embedded["ple_input_ids"] = ids
    return embedded


def positions(vlm: VLM, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """[..., 1, token] positions of a prompt: those that count images are asked of the model."""
    count = getattr(getattr(vlm.model, "model", None), "get_rope_index", None)
    ids = inputs["input_ids"]
    if count is None:
        return torch.arange(ids.shape[1], device=vlm.device)[None]
    given = {name: inputs[name] for name in ("mm_token_type_ids", *GRIDS) if name in inputs}
    if "omni" in vlm.family:
        given["attention_mask"] = torch.ones_like(ids)
    counted: torch.Tensor = count(ids, **given)[0]
    return counted.to(vlm.device)
