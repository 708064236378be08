"""Gradients of gates and ablations of single heads."""

import dataclasses

import example_prompts
import numpy as np
import pytest
import torch

from mmheads import causal
from mmheads.attention import ablate
from mmheads.causal import gate_gradients, single_head_effects
from mmheads.heads import Head, HeadSet
from mmheads.prompts import encode


def test_gradients_estimate_what_single_heads_do():
    vlm = example_prompts.vlm("qwen3_vl")
    given = [dataclasses.replace(example_prompts.example("qwen3_vl"), answer="rain")]
    slopes = gate_gradients(vlm, given, progress=False)
    true = single_head_effects(vlm, given, batch_tokens=400, progress=False)
    assert slopes.shape == true.shape == (1, vlm.geometry.layers, vlm.geometry.heads)
    assert np.corrcoef(slopes.ravel(), true.ravel())[0, 1] > 0.9
    prompt, one = encode(vlm, given[0]), HeadSet((Head(2, 5),), vlm.geometry, vlm.model_id)
    with torch.no_grad():
        whole = causal.log_odds(vlm, prompt)
        with ablate(vlm, one):
            without = causal.log_odds(vlm, prompt)
        logits = vlm.model(**prompt.inputs).logits[0, -1]
    p = logits.softmax(-1)[vlm.tokenizer("rain", add_special_tokens=False)["input_ids"][0]]
    assert float(whole) == pytest.approx(float((p / (1 - p)).log()), abs=1e-4)
    assert true[0, 2, 5] == pytest.approx(float(whole - without), abs=1e-5)
    assert not any(p.grad is not None for p in vlm.model.parameters())


def test_some_heads_have_the_effects_that_they_have_among_all(tmp_path, monkeypatch):
    vlm = example_prompts.vlm("qwen3_vl")
    given = [dataclasses.replace(example_prompts.example("qwen3_vl"), answer="rain")]
    some = HeadSet((Head(2, 5), Head(0, 1)), vlm.geometry, vlm.model_id)
    how = {"folder": tmp_path, "progress": False}
    (every,) = single_head_effects(vlm, given, **how)
    (few,) = single_head_effects(vlm, given, heads=some, **how)
    assert (np.isnan(few) == ~some.mask).all()
    np.testing.assert_allclose(few[some.mask], every[some.mask], atol=1e-5)
    monkeypatch.setattr(causal, "log_odds", None)  # both are kept, one beside the other
    np.testing.assert_array_equal(single_head_effects(vlm, given, heads=some, **how)[0], few)
    np.testing.assert_array_equal(single_head_effects(vlm, given, **how)[0], every)
