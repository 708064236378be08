"""Paper B's three procedures to find a whole target in a prompt, as a check on `prompts.encode`.

Source: arXiv 2606.05843, appendix.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mmheads.examples import Example
from mmheads.families import count_tokens
from mmheads.locating import describe
from mmheads.models import VLM
from mmheads.prompts import Prompt, encode

TAGS = ("<GT_START>", "<GT_END>")


def find_by_tags(
    vlm: VLM, example: Example, part: int, tags: tuple[str, str] = TAGS
) -> NDArray[np.int64]:
    """Context tagging: rebuild the context with two markers, scan for them -> [n] tokens.

    Everything between the markers is the target; of an image, its visual tokens. Indices are
    those of the prompt without markers.

    Raises:
        ValueError: A marker is not found in the tokens, or more than once.
    """
    context = list(example.context)
    context[part : part + 1] = [tags[0], context[part], tags[1]]
    tagged = encode(
        vlm, dataclasses.replace(example, context=tuple(context), evidence=None, candidates={})
    )
    start, end = (_scan(vlm, tagged.ids.tolist(), tag) for tag in tags)
    plain = encode(vlm, dataclasses.replace(example, evidence=None, candidates={}))
    if not isinstance(example.context[part], str):
        everywhere = _all_visual(vlm, tagged)
        inside = (everywhere >= start[1]) & (everywhere < end[0])
        return _all_visual(vlm, plain)[inside]
    between = np.arange(start[1], end[0])
    tokens = between - (start[1] - start[0])
    if not torch.equal(plain.ids[tokens], tagged.ids[between]):
        raise ValueError(f"the markers {tags} change how their neighbours become tokens")
    return tokens


def _scan(vlm: VLM, ids: list[int], tag: str) -> tuple[int, int]:
    marker_ids = vlm.tokenizer(tag, add_special_tokens=False)["input_ids"]
    width = len(marker_ids)
    hits = [i for i in range(len(ids) - width + 1) if ids[i : i + width] == marker_ids]
    if len(hits) != 1:
        raise ValueError(
            f"the marker {tag!r} (token ids {marker_ids}) occurs {len(hits)} times in the prompt, "
            "expected once; choose a marker that this tokenizer keeps apart"
        )
    return hits[0], hits[0] + width


def find_by_slicing(vlm: VLM, prompt: Prompt, part: int) -> NDArray[np.int64]:
    """Uniform expansion: all visual tokens in as many equal slices as images -> [n] tokens.

    Raises:
        ValueError: The part is not an image, or the images have unequal numbers of tokens.
    """
    everywhere = _all_visual(vlm, prompt)
    sizes = [_count(vlm, text) for text in prompt.replacements]
    if len(set(sizes)) > 1:
        raise ValueError(f"images of {sizes} visual tokens: uniform slices do not apply")
    which, each = _image_number(prompt.example, part), sizes[0]
    return everywhere[which * each : (which + 1) * each]


def _count(vlm: VLM, replacement: str) -> int:
    ids = vlm.tokenizer(replacement, add_special_tokens=False)["input_ids"]
    return int(vlm.is_visual(ids).sum())


def find_by_offsets(vlm: VLM, prompt: Prompt, part: int) -> NDArray[np.int64]:
    """Dynamic patches: tokens of each image from its size, added up -> [n] tokens.

    Raises:
        ValueError: The part is not an image, or the model does not tell an image's tokens from its
            size.
    """
    everywhere = _all_visual(vlm, prompt)
    counts = [count_tokens(vlm, image) for image in prompt.example.images()]
    if sum(counts) != len(everywhere):
        raise ValueError(
            f"images of {sum(counts)} tokens by their sizes, but the prompt holds "
            f"{len(everywhere)}; cumulative offsets do not apply"
        )
    which = _image_number(prompt.example, part)
    first = sum(counts[:which])
    return everywhere[first : first + counts[which]]


def _all_visual(vlm: VLM, prompt: Prompt) -> NDArray[np.int64]:
    return np.flatnonzero(vlm.is_visual(prompt.ids))


def _image_number(example: Example, part: int) -> int:
    if not isinstance(example.context[part], Image.Image):
        raise ValueError(f"part {part} of the context is {describe(example.context[part])}")
    return sum(isinstance(p, Image.Image) for p in example.context[:part])
