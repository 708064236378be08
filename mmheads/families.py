"""Where the visual tokens of each model family lie on an image, and how many there are."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mmheads.examples import Example, Video
from mmheads.models import VLM

Boxes = NDArray[np.float64]


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
    whole = (0.0, 0.0, float(width), float(height))
    earlier = sum(isinstance(p, type(part)) for p in example.context[:index])
    family, processor = vlm.family, vlm.processor
    if family.startswith(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")):
        name = "video_grid_thw" if isinstance(part, Video) else "image_grid_thw"
        slots, rows, columns = inputs[name][earlier].tolist()
        merge = vlm.model.config.vision_config.spatial_merge_size
        boxes = np.tile(_grid(rows // merge, columns // merge, whole), (slots, 1))
    elif isinstance(part, Video):
        return None
    elif family == "internvl":
        side = math.isqrt(processor.image_seq_length)
        columns, rows = _internvl_tiles(vlm, part)
        grids = _tiles(rows, columns, side, width, height)
        boxes = np.concatenate([*grids, _grid(side, side, whole)] if len(grids) > 1 else grids)
    elif family == "gemma3":
        if getattr(processor.image_processor, "do_pan_and_scan", False):
            return None
        side = math.isqrt(processor.image_seq_length)
        boxes = _grid(side, side, whole)
    elif family in ("idefics3", "smolvlm"):
        side = math.isqrt(processor.image_seq_len)
        names = re.findall(r"<row_(\d+)_col_(\d+)>", replacement)
        rows = max((int(row) for row, _ in names), default=0)
        columns = max((int(column) for _, column in names), default=0)
        grids = _tiles(rows, columns, side, width, height) if names else []
        boxes = np.concatenate([*grids, _grid(side, side, whole)])
    elif family == "llava_onevision":
        boxes = _llava_boxes(vlm, example, part, tokens)
    else:
        return None
    if len(boxes) != tokens:
        raise ValueError(
            f"image {earlier} has {tokens} visual tokens, but {len(boxes)} places were computed "
            f"for a {family} model"
        )
    return boxes


def _internvl_tiles(vlm: VLM, image: Image.Image) -> tuple[int, int]:
    """Columns and rows of tiles; an image in one tile has no thumbnail."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    settings = vlm.processor.image_processor
    columns, rows = get_optimal_tiled_canvas(
        (image.height, image.width),
        (settings.size["height"], settings.size["width"]),
        settings.min_patches,
        settings.max_patches,
    )
    return int(columns), int(rows)


def _llava_boxes(vlm: VLM, example: Example, image: Image.Image, tokens: int) -> Boxes:
    """One image: a base grid and a fine one with a newline a row. Several: each padded square."""
    from transformers.image_processing_utils import select_best_resolution

    processor = vlm.processor
    width, height = image.size
    side = math.isqrt(processor.num_image_tokens)
    if len(example.images()) > 1:
        edge = max(width, height)
        x, y = (edge - width) / 2, (edge - height) / 2
        square = _grid(side, side, (-x, -y, edge - x, edge - y))
        return np.concatenate([square, np.full((1, 4), np.nan)])
    size = processor.image_processor.size
    tile = size.get("height") or size["shortest_edge"]
    best = select_best_resolution((height, width), processor.image_processor.image_grid_pinpoints)
    fine, rows = processor._get_unpadded_features(
        height, width, side, side, best[0] // tile, best[1] // tile
    )
    columns = fine // rows
    grid = _grid(rows, columns, (0, 0, width, height)).reshape(rows, columns, 4)
    newline = np.full((rows, 1, 4), np.nan)
    base = _grid(side, side, (0, 0, width, height))
    return np.concatenate([base, np.concatenate([grid, newline], axis=1).reshape(-1, 4)])


def count_tokens(vlm: VLM, image: Image.Image) -> int:
    """Visual tokens of an image alone, by its size."""
    processor, size = vlm.processor, (image.height, image.width)
    if vlm.family in ("idefics3", "smolvlm"):
        tiles, *_ = processor.image_processor.get_number_of_image_patches(*size, {})
        return max(1, int(tiles)) * int(processor.image_seq_len)
    counts = processor._get_num_multimodal_tokens(image_sizes=[size])
    if vlm.family == "internvl":  # its tokens count the wrappers too
        return int(counts["num_image_patches"][0]) * int(processor.image_seq_length)
    return int(counts["num_image_tokens"][0])
