"""Ablations of one prompt that share layers: the logits and tokens of each ablation by itself."""

import example_prompts
import numpy as np
import pytest
import random_models
import torch

from mmheads.attention import ablate, mean_outputs
from mmheads.attention.sharing import ablate_rows, can_share
from mmheads.heads import Head, HeadSet
from mmheads.models import VLM
from mmheads.prefix import on_device
from mmheads.prompts import encode

CHOSEN = [[], [(0, 1)], [(2, 3)], [(0, 1), (3, 0)], [(2, 3), (3, 7)], [], [(3, 2)]]
"""Rows that part at the first layer, in the middle, at the last, or never."""


def sets(vlm: VLM) -> list[HeadSet]:
    return [
        HeadSet(tuple(Head(*head) for head in row), vlm.geometry, vlm.model_id) for row in CHOSEN
    ]


@pytest.fixture(params=random_models.FAMILIES)
def vlm(request) -> VLM:
    vlm = example_prompts.vlm(request.param)
    if not can_share(vlm):
        pytest.skip(f"rows of {request.param} do not share layers")
    return vlm


@pytest.mark.parametrize(
    ("mode", "when"), [("zero", "both"), ("mean", "prefill"), ("uniform", "answer")]
)
@torch.no_grad()
def test_rows_that_share_layers_have_the_logits_of_each_alone(vlm, mode, when):
    inputs = on_device(vlm, encode(vlm, example_prompts.example(vlm.family)).inputs)
    settings = {"mode": mode, "when": when}
    if mode == "mean":
        with mean_outputs(vlm) as means:
            vlm.model(**inputs, use_cache=False)
        settings["means"] = means()
    with ablate_rows(vlm, inputs, sets(vlm), **settings):
        together = vlm.model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
    assert len(together) == len(CHOSEN)
    for row, heads in zip(together, sets(vlm), strict=True):
        with ablate(vlm, heads, **settings):
            alone = vlm.model(**inputs, use_cache=False, logits_to_keep=1).logits[0, -1]
        np.testing.assert_allclose(row, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("when", ["both", "decode"])
@torch.no_grad()
def test_decoding_goes_on_from_the_cache_of_each_row(vlm, when):
    inputs = on_device(vlm, encode(vlm, example_prompts.example(vlm.family)).inputs)
    settings = {"max_new_tokens": 4, "do_sample": False, "output_logits": True}
    settings["return_dict_in_generate"] = True
    copies = {name: torch.cat([value] * len(CHOSEN)) for name, value in inputs.items()}
    with ablate_rows(vlm, inputs, sets(vlm), when=when):
        together = vlm.model.generate(**copies, **settings)
    for row, heads in enumerate(sets(vlm)):
        with ablate(vlm, heads, when=when):
            alone = vlm.model.generate(**inputs, **settings)
        for shared, single in zip(together.logits, alone.logits, strict=False):
            np.testing.assert_allclose(shared[row], single[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_model_is_as_before(vlm):
    inputs = on_device(vlm, encode(vlm, example_prompts.example(vlm.family)).inputs)
    before = vlm.model(**inputs, use_cache=False).logits
    with ablate_rows(vlm, inputs, sets(vlm)):
        vlm.model(**inputs, use_cache=False)
    assert torch.equal(vlm.model(**inputs, use_cache=False).logits, before)
