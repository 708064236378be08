"""Small examples for the random models of `families`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pypdfium2
import pytest
import random_models
import torch
import transformers
from packaging.version import Version
from PIL import Image

from mmheads.examples import Example, Region
from mmheads.models import VLM
from mmheads.prompts import Question

VISION = tuple(family for family in random_models.FAMILIES if family != "qwen3")


def vlm(family: str) -> VLM:
    """A random model; skips where an old transformers cannot read its images."""
    try:
        model, processor = random_models.build(family)
    except ImportError as error:
        if "Torchvision" in str(error) and Version(transformers.__version__) < Version("5.23"):
            pytest.skip(f"transformers {transformers.__version__} wants torchvision for {family}")
        raise
    return VLM(model=model, processor=processor, model_id=family)


def write_pdf(path: Path, pages: int) -> None:
    file = pypdfium2.PdfDocument.new()
    for _ in range(pages):
        file.new_page(612, 792)
    file.save(path)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def example(family: str, question: str = "which rain falls") -> Example:
    """Text and two images of other sizes; the question's words stand in the context too."""
    text = ("First the rain falls. Ask which rain falls ?", "Here the needle is hidden.")
    evidence = (Region(part=len(text) - 1, chars=(9, 15)),)
    if family == "qwen3":
        return Example(
            context=text, question=(question,), evidence=evidence, instruction="In a word."
        )
    return Example(
        context=(text[0], picture(60, 40), text[1], picture(40, 60, 1), "The end."),
        question=(question, picture(32, 32, 2), "?"),
        evidence=(
            Region(part=1, box=(10, 5, 33, 28)),
            Region(part=2, chars=(9, 15)),
            Region(part=3),
        ),
        instruction="In a word.",
    )


@torch.no_grad()
def eager_attention(vlm: VLM, question: Question) -> torch.Tensor:
    """[layer, head, question token, token] from the model's own maps in a full forward pass.

    0 in layers without heads.
    """
    stock = vlm.text_config._attn_implementation
    vlm.model.set_attn_implementation("eager")
    try:
        maps = vlm.model(**question.inputs, use_cache=False, output_attentions=True).attentions
    finally:
        vlm.model.set_attn_implementation(stock)
    return torch.stack([each[0][:, question.tokens] for each in every_layer(vlm, maps)])


def every_layer(vlm: VLM, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Values of the layers with heads, and zeros for those without."""
    by_layer = dict(zip(vlm.attentions, values, strict=True))
    empty = torch.zeros_like(values[0])
    return [by_layer.get(layer, empty) for layer in range(vlm.geometry.layers)]


def without_images(given: Example) -> Example:
    return dataclasses.replace(given, question=given.question[:1])
