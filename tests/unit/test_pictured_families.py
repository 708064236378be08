"""The newer families with images through their processors: what people try first.

Qwen3.5 and the mixtures of experts are among the families of every other test, and are here too, so
that one file says what each of them can do.
"""

import dataclasses

import exactness
import example_prompts
import numpy as np
import pictured_models
import pytest
import torch
import transformers
from packaging.version import Version
from test_ablation import assert_same, generated, heads, without_columns
from test_streaming import SINKS, WINDOW, chosen, masked
from transformers import CONFIG_MAPPING

from mmheads.attention import ablate
from mmheads.examples import Example, Region
from mmheads.models import VLM
from mmheads.prompts import encode, null_question
from mmheads.retrieval import DocumentIndex
from mmheads.scoring import score_heads
from mmheads.streaming import stream

OTHERS = ("qwen3_5", "qwen3_5_moe", "qwen3_vl_moe")

IN_WHOLE = "molmo2"
"""Its images see those of the question: a context is not kept for a question with images."""


@pytest.fixture(scope="module", params=[*pictured_models.FAMILIES, *OTHERS])
def vlm(request) -> VLM:
    if request.param in OTHERS:
        return example_prompts.vlm(request.param)
    kind, version = request.param.partition(",")[0], transformers.__version__
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"transformers {version} has no {kind}")
    if kind.startswith("gemma") and Version(version) < Version("5.23"):
        why = "wants torchvision for it" if kind == "gemma4" else "does not say what images become"
        pytest.skip(f"{kind} is refused with transformers {version}, which {why}")
    return pictured_models.build(request.param)


@pytest.fixture
def example():
    """Text and two images, and an image in the question; the evidence is an image and a word."""
    made = example_prompts.example("qwen3_vl")
    return dataclasses.replace(made, evidence=(Region(part=1), Region(part=2, chars=(9, 15))))


def test_images_are_located_and_every_number_is_exact(vlm, example):
    prompt = encode(vlm, example, questions=[null_question(example.question)])
    evidence = prompt.own.evidence
    assert all(span is not None and len(span) for span in evidence)
    ids = prompt.own.inputs["input_ids"][0]
    image = set(ids[evidence[0].tokens].tolist())
    assert image <= vlm.visual_ids, "an image's tokens, and no row end or marker"
    cached = exactness.check(vlm, prompt, rtol=1e-4)
    assert cached != (vlm.family == IN_WHOLE)


def test_scores_are_those_of_eager_attention(vlm, example):
    scores = score_heads(vlm, [example], progress=False)
    prompt = encode(vlm, example)
    weights = prompt.own.weights(prompt.own.evidence)
    attention = example_prompts.eager_attention(vlm, prompt.own).float()
    expected = (attention @ torch.from_numpy(weights)).mean(-1).numpy()
    np.testing.assert_allclose(scores.quantities["raw"][0], expected, atol=1e-5)
    assert len(scores.top(0.25))


def test_ablated_heads_are_out_under_generate(vlm, example):
    inputs = dict(encode(vlm, example).inputs)
    selected = heads(vlm, (1, 0), (3, 1))
    plain, other = generated(vlm, inputs), without_columns(vlm, selected)
    with ablate(vlm, selected):
        for found, expected in zip(generated(vlm, inputs), generated(other, inputs), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    with ablate(vlm, heads(vlm)):
        assert_same(generated(vlm, inputs), plain)
    assert not all(torch.equal(a, b) for a, b in zip(plain, generated(other, inputs), strict=True))


def test_pages_are_ranked_as_a_full_pass_ranks_them(vlm):
    pages = [example_prompts.picture(60, 40, seed) for seed in range(3)]
    index = DocumentIndex(vlm, None, pages, window=3)
    question = "which rain falls"
    found = index.masses(question, calibrated=False)
    whole = Example(context=tuple(pages), question=(question,))
    prompt = encode(vlm, whole)
    attention = example_prompts.eager_attention(vlm, prompt.own).float().mean(2)
    by_head = torch.stack([attention[head] for head in index.heads]).numpy()
    for number, span in enumerate(prompt.parts[number] for number in range(3)):
        expected = by_head[:, span.tokens] @ span.weights
        np.testing.assert_allclose(found[:, number], expected, atol=1e-5)
    assert sorted(index.rank(question).table()["candidate"]) == [0, 1, 2]


def test_window_heads_equal_a_mask_in_prefill_and_decoding(vlm, example):
    inputs, dense = dict(encode(vlm, example).inputs), chosen(vlm)
    with masked(vlm, dense, SINKS, WINDOW):
        expected = generated(vlm, inputs)
    with stream(vlm, dense, SINKS, WINDOW):
        found = generated(vlm, inputs)
    for each, other in zip(found, expected, strict=True):
        torch.testing.assert_close(each, other, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(generated(vlm, inputs)[1], expected[1], atol=1e-3)
