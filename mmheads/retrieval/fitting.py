"""Which resolution and which window of pages fit a model and the memory."""

from __future__ import annotations

import functools
import math
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import psutil
import torch
from PIL import Image

from mmheads import compat
from mmheads.examples import Example, Part
from mmheads.heads import HeadSet
from mmheads.models import VLM
from mmheads.prompts import encode
from mmheads.retrieval.candidates import spread

DPIS = (144, 120, 96, 72, 60, 48)
"""Resolutions to choose from, in pixels per inch; the first one that fits is taken."""

MOST = 200
"""Most pages per window (paper A)."""

SHARE = 0.8
"""Share of the free memory that an index may take by default."""

STEP = 32
"""Pixels; sizes of pages are rounded up to multiples before their tokens are counted."""


@dataclass(frozen=True)
class Fit:
    """A choice that fits.

    Attributes:
        dpi: Resolution of the pages; 0 for texts.
        window: Pages per forward pass.
        windows: Number of forward passes.
        tokens: Tokens of the longest window with the longest question.
        share: Tokens of the first page, as a share of those of all pages.
        bytes: About how large the index becomes.
        held: How much of it is in memory at a time.
    """

    dpi: int
    window: int
    windows: int
    tokens: int
    share: float
    bytes: int
    held: int


def fit_pages(
    vlm: VLM,
    heads: HeadSet,
    sizes: Sequence[tuple[float, float]],
    questions: Sequence[str],
    *,
    dpi: int = 0,
    window: int = 0,
    memory: float = 0,
    on_disk: bool = False,
) -> Fit:
    """The highest resolution, and then the largest window, at which pages fit.

    Args:
        vlm: The model.
        heads: The heads that rank: only layers up to the deepest of them are kept.
        sizes: Width and height of each page, in points.
        questions: What will be asked.
        dpi: Resolution; by default one of `DPIS`.
        window: Pages per forward pass; by default as many as fit, at most `MOST`.
        memory: Bytes that index and forward pass may take; by default most of what is free.
        on_disk: Only one window of the index is in memory at a time.

    Raises:
        ValueError: No choice fits; the message says what a page takes and what there is.
    """
    resolutions = (dpi,) if dpi else DPIS
    choices = ((each, _page_tokens(vlm, sizes, each)) for each in resolutions)
    return _fit(vlm, heads, choices, questions, window, memory, on_disk)


def fit_texts(
    vlm: VLM,
    heads: HeadSet,
    texts: Sequence[str],
    questions: Sequence[str],
    *,
    window: int = 0,
    memory: float = 0,
    on_disk: bool = False,
) -> Fit:
    """The largest window at which pages as texts fit; see `fit_pages`."""
    ids = vlm.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    tokens = [len(each) + 2 for each in ids]
    return _fit(vlm, heads, [(0, tokens)], questions, window, memory, on_disk)


def free_memory(vlm: VLM) -> float:
    """Bytes that an index may take: most of what is free on the model's device."""
    if vlm.device.type == "cuda":
        return SHARE * torch.cuda.mem_get_info(vlm.device)[0]
    return SHARE * float(psutil.virtual_memory().available)


def _fit(
    vlm: VLM,
    heads: HeadSet,
    choices: Iterable[tuple[int, Sequence[int]]],
    questions: Sequence[str],
    window: int,
    memory: float,
    on_disk: bool,
) -> Fit:
    """The first choice that fits, with the largest window or the given one.

    Args:
        vlm: See `fit_pages`.
        heads: See `fit_pages`.
        choices: Each a resolution, and the tokens of each page at it.
        questions: See `fit_pages`.
        window: See `fit_pages`.
        memory: See `fit_pages`.
        on_disk: See `fit_pages`.

    Raises:
        ValueError: No choice fits; the message is about the last one.
    """
    memory = memory or free_memory(vlm)
    base = max(_tokens(vlm, ("Text.",), question) for question in questions)
    per_token = _cache_bytes(vlm, heads)
    for dpi, tokens in choices:
        total = sum(tokens)
        for size in (window,) if window else range(min(MOST, len(tokens)), 0, -1):
            ranges = spread(len(tokens), size, 0)
            longest = max(sum(tokens[each.start : each.stop]) for each in ranges)
            held = per_token * (longest if on_disk else total)
            if base + longest <= _room(vlm, held, memory):
                first, cache = tokens[0] / total, per_token * total
                return Fit(dpi, len(ranges[0]), len(ranges), base + longest, first, cache, held)
    where = f" at {dpi} dpi" if dpi else ""
    takes = f"{vlm} takes {vlm.positions} tokens" if vlm.positions else f"{vlm} takes any length"
    raise ValueError(
        f"{len(tokens)} pages do not fit{where} in windows of {window or 1}: the longest page has "
        f"{max(tokens)} tokens and the longest question {base}, {takes}, and the index needs "
        f"{held / 1e9:.2g} GB beside its forward passes, of {memory / 1e9:.2g} GB; give fewer "
        f"pages, a smaller --window or --dpi, {'' if on_disk else 'an --index with --on-disk, '}or "
        "more --memory"
    )


def _room(vlm: VLM, cache: float, memory: float) -> float:
    """Longest prompt in tokens: what the positions allow, and the memory beside the cache.

    A forward pass is taken to hold, per token, 16 hidden states and 4 of the feed-forward layer:
    a rough upper estimate.
    """
    config = vlm.text_config
    wide = 16 * config.hidden_size + 4 * (compat.setting(config, "intermediate_size") or 0)
    by_memory: float = (memory - cache) / (wide * vlm.model.dtype.itemsize)
    return min(vlm.positions or math.inf, by_memory)


def _cache_bytes(vlm: VLM, heads: HeadSet) -> int:
    """Bytes of one token's keys and values in the layers up to the deepest head."""
    config = vlm.text_config
    width = compat.setting(config, "head_dim") or config.hidden_size // vlm.geometry.heads
    layers = heads.layers[-1] + 1
    return int(2 * layers * vlm.geometry.kv_groups * width * vlm.model.dtype.itemsize)


def _page_tokens(vlm: VLM, sizes: Sequence[tuple[float, float]], dpi: int) -> list[int]:
    """Tokens of the image of each page, whose sizes are given in points, at a resolution."""
    pixels = STEP * np.ceil(np.multiply(sizes, dpi) / 72 / STEP).astype(int)
    return [_image_tokens(vlm, (width, height)) for width, height in pixels.tolist()]


@functools.lru_cache(maxsize=4096)
def _image_tokens(vlm: VLM, size: tuple[int, int]) -> int:
    """Tokens that an image of a size adds to a prompt."""
    image = Image.new("RGB", size)
    return _tokens(vlm, (image, image)) - _tokens(vlm, (image,))


def _tokens(vlm: VLM, context: tuple[Part, ...], question: str = "What is it?") -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of words that a model does not know: they only count
        example = Example(context=context, question=(question,))
        return len(encode(vlm, example, max_tokens=sys.maxsize))
