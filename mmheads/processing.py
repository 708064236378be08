"""Model inputs of a prompt from the stock processor, checked against our reading of its text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmheads.examples import Example, Video
from mmheads.families import TOKEN_TYPES, reading, token_types
from mmheads.models import VLM
from mmheads.rendering import Rendered, stand_in, tokenize


def process(
    vlm: VLM, rendered: Rendered, example: Example
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Model inputs from the processor, and what it put for each image and video.

    Control tokens of the user are still fillers in its token ids.
    """
    if vlm.is_text_only:
        ids, _ = tokenize(vlm, stand_in(rendered))
        made = torch.from_numpy(ids)[None]
        return {"input_ids": made, "attention_mask": torch.ones_like(made)}, ()
    images, videos = example.images(), example.videos()
    begin = vlm.tokenizer.bos_token
    settings: dict[str, Any] = {
        "return_tensors": "pt",
        "add_special_tokens": not (begin and rendered.text.startswith(begin)),
    }
    if images:
        settings["images"] = [list(images)]
    if videos:
        settings |= _video_settings(vlm, videos)
    try:
        with reading(vlm):
            settings |= {"text": [rendered.text], "return_text_replacement_offsets": True}
            encoding = dict(vlm.processor(**settings))
        encoding.pop("labels", None)  # what PaliGemma would be trained on
    except (TypeError, AttributeError) as error:
        raise ValueError(
            f"the processor of {vlm} cannot read {len(images)} images and {len(videos)} videos "
            f"with text: {error}"
        ) from error
    entries = encoding.pop("text_replacement_offsets", ())  # Without images, an empty tensor.
    replaced = [entry["replacement"] for entry in (entries[0] if len(entries) else ())]
    if len(replaced) != len(images) + len(videos):
        raise ValueError(
            f"the processor of {vlm} says what it put for {len(replaced)} of {len(images)} images "
            f"and {len(videos)} videos; a newer transformers may say it for all"
        )
    return encoding, tuple(replaced)


def _video_settings(vlm: VLM, videos: Sequence[Video]) -> dict[str, Any]:
    """Arguments of a processor for videos all of whose frames are taken."""
    if not vlm.reads_video:
        raise ValueError(
            f"the processor of {vlm} has no video part here: install "
            "torchvision, or give the frames as images"
        )
    about = [
        {
            "fps": video.fps,
            "total_num_frames": len(video.frames),
            "frames_indices": list(range(len(video.frames))),
        }
        for video in videos
    ]
    return {
        "videos": [[np.stack([np.asarray(f) for f in v.frames]) for v in videos]],
        "video_metadata": [about],
        "do_sample_frames": False,
    }


def keep_as_text(
    vlm: VLM, text: Rendered, ids: NDArray[np.int64], inputs: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], int]:
    """Model inputs with control tokens of the user as text, and the number of tokens before ours.

    Args:
        vlm: The model.
        text: The expanded text.
        ids: Its tokens.
        inputs: From the processor, which had fillers for control tokens; or made here before.

    Raises:
        ValueError: The processor's tokens are not those of our text, perhaps behind others.
    """
    given = inputs["input_ids"][0].numpy()
    before = len(given) - len(ids)
    if before >= 0 and np.array_equal(given[before:], ids):
        return inputs, before
    ours, _ = tokenize(vlm, stand_in(text))
    before = len(given) - len(ours)
    if before < 0 or not np.array_equal(given[before:], ours):
        raise ValueError(
            f"the processor of {vlm} changes the text that the chat template writes "
            f"({len(given)} tokens in place of {len(ours)}), so that words and images cannot be "
            "found in it; models of this family are not supported"
        )
    made = torch.from_numpy(np.concatenate([given[:before], ids]))[None]
    changed = inputs | {"input_ids": made, "attention_mask": torch.ones_like(made)}
    for name in TOKEN_TYPES:
        if name in inputs:
            if not torch.equal(token_types(vlm, inputs["input_ids"]), inputs[name]):
                raise ValueError(
                    f"the text holds the control tokens {text.controls[:40]!r}, and what {vlm} "
                    f"takes as `{name}` is not known here; take them out"
                )
            changed[name] = token_types(vlm, made)
    return changed, before
