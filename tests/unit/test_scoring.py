"""Scores of every head: equal to full eager passes, resumable, never mixed."""

import dataclasses

import example_prompts
import numpy as np
import pandas as pd
import pytest
import random_models
import torch

from mmheads import models, paths, prompts, scoring
from mmheads.examples import Example, Region
from mmheads.models import VLM, load
from mmheads.scores import HeadScores
from mmheads.tasks import needles


@pytest.fixture(scope="module", params=random_models.FAMILIES)
def vlm(request) -> VLM:
    return example_prompts.vlm(request.param)


@pytest.fixture(scope="module")
def tiny() -> VLM:
    return load(paths.MODELS / "tiny-qwen3-vl-m", device="cpu")


def eager_attention(vlm: VLM, prompt: prompts.Prompt) -> np.ndarray:
    """[layer, head, question token, token] of a full forward pass."""
    vlm.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            layers = vlm.model(**prompt.inputs, output_attentions=True, use_cache=False).attentions
    finally:
        vlm.model.set_attn_implementation("sdpa")
    return torch.stack(layers)[:, 0][:, :, prompt.question].numpy()


def head_outputs(vlm: VLM, prompt: prompts.Prompt) -> np.ndarray:
    """[layer, question token, head, channel] as they enter the output projection."""
    outputs, hooks = {}, []
    for layer, module in vlm.attentions.items():

        def keep(_, args, layer=layer):
            outputs[layer] = args[0][0].unflatten(-1, (vlm.geometry.heads, -1))

        hooks.append(module.o_proj.register_forward_pre_hook(keep))
    with torch.no_grad():
        vlm.model(**prompt.inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack([outputs[layer] for layer in sorted(outputs)])[:, prompt.question].numpy()


@pytest.mark.parametrize("option_images", [True, False])
def test_scores_equal_full_eager_passes(vlm, option_images):
    example = example_prompts.example(vlm.family)
    if not option_images:
        example = example_prompts.without_images(example)
    scores = scoring.score_heads(vlm, [example], progress=False)
    found = {name: array[0] for name, array in scores.quantities.items()}

    def mass(prompt):
        return (eager_attention(vlm, prompt) @ prompt.weights(prompt.evidence)).mean(-1)

    def with_other(question):
        return prompts.encode(vlm, dataclasses.replace(example, question=question))

    prompt = prompts.encode(vlm, example)
    attention = eager_attention(vlm, prompt)
    close = {"atol": 1e-5, "rtol": 0}
    np.testing.assert_allclose(found["raw"], mass(prompt), **close)
    null = with_other(prompts.null_question(example.question))
    np.testing.assert_allclose(found["null"], mass(null), **close)
    shuffled = with_other(prompts.shuffled_question(example.question, 0))
    np.testing.assert_allclose(found["shuffled"], mass(shuffled), **close)
    np.testing.assert_allclose(scores.values[0], found["raw"] - found["null"], **close)

    context = prompt.weights(part for part in prompt.parts if part)
    np.testing.assert_allclose(found["context"], (attention @ context).mean(-1), **close)
    visual = np.isin(prompt.ids, list(vlm.visual_ids))
    same_kind = context * (~visual if vlm.is_text_only else 1)
    share = found["raw"] / (attention @ same_kind).mean(-1)
    np.testing.assert_allclose(found["share"], share, atol=1e-4, rtol=0)
    among = attention[..., (context > 0) & ~visual]
    total = among.sum(-1, keepdims=True)
    among = np.divide(among, total, out=np.zeros_like(among), where=total > 0)
    powers = np.where(among > 0, among * np.log(np.where(among > 0, among, 1)), 0)
    np.testing.assert_allclose(found["entropy"], -powers.sum(-1).mean(-1), atol=1e-4)
    norms = np.linalg.norm(head_outputs(vlm, prompt), axis=-1).mean(1)
    np.testing.assert_allclose(found["norm"], norms, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(scores.eligible, vlm.geometry.eligible)


def test_share_of_visual_evidence_is_taken_among_visual_tokens(tiny):
    example = needles.make("rendered", 128, 0.4, split="test")
    scores = scoring.score_heads(tiny, [example], progress=False)
    prompt = prompts.encode(tiny, example)
    attention = eager_attention(tiny, prompt)
    visual = np.isin(prompt.ids, list(tiny.visual_ids))
    visual[prompt.question] = False
    raw = (attention @ prompt.weights(prompt.evidence)).mean(-1)
    expected = raw / (attention @ visual.astype(np.float32)).mean(-1)
    np.testing.assert_allclose(scores.quantities["share"][0], expected, atol=1e-4)


def test_placeholders_in_the_null_question_are_fed_without_pixels():
    vlm = example_prompts.vlm("qwen3_vl")
    example = example_prompts.example("qwen3_vl")
    pixels = scoring.score_heads(vlm, [example], progress=False)
    empty = scoring.score_heads(vlm, [example], null_images="placeholders", progress=False)
    for name in ("raw", "shuffled"):
        np.testing.assert_array_equal(pixels.quantities[name], empty.quantities[name])
    assert np.abs(pixels.quantities["null"] - empty.quantities["null"]).max() > 1e-4
    with pytest.raises(ValueError, match="null_images is 'none'"):
        scoring.score_heads(vlm, [example], null_images="none", progress=False)


def test_stale_state_of_an_earlier_prompt_does_not_leak(tiny):
    long = needles.make("image", 256, 0.2, split="test")
    text = Example(context=("B7 K .", "A1 Q ."), question=("? A1",), evidence=(Region(part=1),))
    alone = scoring.score_heads(tiny, [text], progress=False)
    after = scoring.score_heads(tiny, [long, text], progress=False)
    np.testing.assert_array_equal(alone.values[0], after.values[1])


def test_scores_are_saved_whole_and_resumed(tiny, tmp_path, monkeypatch):
    examples = list(needles.generate(["text"], [128], pairs=1))
    path = tmp_path / "scores.parquet"
    monkeypatch.setattr(scoring, "SAVE_EVERY", 0.0)
    complete = scoring.score_heads(tiny, examples, progress=False)

    scored = []
    one = scoring._score

    def interrupted(vlm, example, *settings):
        if len(scored) == 3:
            raise KeyboardInterrupt
        scored.append(example)
        return one(vlm, example, *settings)

    monkeypatch.setattr(scoring, "_score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scoring.score_heads(tiny, examples, path=path, progress=False)
    assert not path.exists()
    scored.clear()
    scores = scoring.score_heads(tiny, examples[:5], path=path, progress=False)
    assert len(scored) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["scores.parquet"]
    np.testing.assert_array_equal(scores.values, complete.values[:5])
    again = HeadScores.load(path, model="tiny-qwen3-vl-m")
    np.testing.assert_array_equal(again.values, scores.values)
    for name in scoring.QUANTITIES:
        np.testing.assert_array_equal(again[name].values, scores[name].values)
    pd.testing.assert_frame_equal(again.metadata, scores.metadata)
    assert again.provenance == scores.provenance
    scored.clear()
    scoring.score_heads(tiny, examples, path=path, progress=False)
    assert len(scored) == 1
    fewer = scoring.score_heads(tiny, reversed(examples[:2]), path=path, progress=False)
    assert len(fewer.values) == 2
    assert len(HeadScores.load(path).values) == 6
    assert len(scored) == 1


def test_equal_prompts_of_two_depths_are_scored_once_and_keep_their_depths(tiny):
    examples = [needles.make("text", 64, depth) for depth in (0.2, 0.4)]
    assert len({example.fingerprint() for example in examples}) == 1
    scores = scoring.score_heads(tiny, examples, progress=False)
    assert scores.metadata["depth"].tolist() == [0.2, 0.4]
    np.testing.assert_array_equal(scores.values[0], scores.values[1])


def test_kept_needle_scores_are_read_without_the_model(tiny, tmp_path):
    settings = {"lengths": [64, 128], "folder": tmp_path}
    scores = scoring.score_needles(tiny, pairs=1, progress=False, **settings)
    kept = scoring.kept_needles("tiny-qwen3-vl-m", **settings)
    other = {"image_ratio": 0.0, "tasks": ["text"], "lengths": [96], "folder": tmp_path}
    scoring.score_needles(tiny, pairs=1, progress=False, **other)
    every = scoring.kept_needles("tiny-qwen3-vl-m", folder=tmp_path)
    pd.testing.assert_frame_equal(every.metadata, kept.metadata)
    assert kept.provenance == scores.provenance
    for task in needles.TASKS:
        one, other = (each.where(task=task, length=128) for each in (kept, scores))
        np.testing.assert_array_equal(one.values, other.values)
    with pytest.raises(
        ValueError, match=r"none for tiny-qwen3-vl-m-text-256-detection-0.5; expected"
    ):
        scoring.kept_needles("tiny-qwen3-vl-m", [256], folder=tmp_path)
    (path,) = tmp_path.glob("*-text-64-*")
    path.with_name(path.name.replace(path.stem[-8:], "0" * 8)).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="keep one version"):
        scoring.kept_needles("tiny-qwen3-vl-m", [64], folder=tmp_path)
    with pytest.raises(ValueError, match="holds no needle scores of another"):
        scoring.kept_needles("another", folder=tmp_path)


def test_data_sets_are_scored_by_name_and_kept(tiny, tmp_path, monkeypatch):
    sets = {"a": [needles.make("text", 64, 0.0)], "b": [needles.make("image", 64, 1.0)]}
    found = scoring.score_sets(tiny, sets, folder=tmp_path, progress=False)
    for name, examples in sets.items():
        alone = scoring.score_heads(tiny, examples, progress=False)
        np.testing.assert_array_equal(found[name].values, alone.values)
    monkeypatch.setattr(scoring, "_score", None)
    again = scoring.score_sets(tiny, sets, folder=tmp_path, progress=False)
    np.testing.assert_array_equal(again["b"].values, found["b"].values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_id": "another"}, "model 'tiny-qwen3-vl-m', now 'another'"),
        ({"revision": "abc"}, "revision"),
        ({"template": "abc"}, "template"),
        ({"null": "nothing"}, "null_question"),
        ({"null_images": "placeholders"}, "settings"),
        ({"versions": "0.0.1"}, "versions"),
    ],
)
def test_scores_made_otherwise_are_not_mixed(tiny, tmp_path, monkeypatch, changes, message):
    path = tmp_path / "scores.parquet"
    example = needles.make("text", 128, 0.0)
    scoring.score_heads(tiny, [example], path=path, progress=False)
    before = path.read_bytes()
    settings = {name: changes.pop(name) for name in ("null", "null_images") if name in changes}
    if versions := changes.pop("versions", None):
        monkeypatch.setattr(models, "version", lambda _: versions)
    if template := changes.pop("template", None):
        monkeypatch.setattr(VLM, "template", template)
    other = dataclasses.replace(tiny, **changes)
    with pytest.raises(ValueError, match=message):
        scoring.score_heads(other, [example], path=path, progress=False, **settings)
    assert path.read_bytes() == before


def test_what_cannot_be_scored_is_an_error(tiny):
    with pytest.raises(ValueError, match="no example"):
        scoring.score_heads(tiny, [])
    without = needles.make("text", 128, 0.0, needle=False)
    with pytest.raises(ValueError, match="has no evidence"):
        scoring.score_heads(tiny, [without], progress=False)


def test_a_mass_outside_its_range_names_the_head():
    mass = np.zeros((2, 3), dtype=np.float32)
    mass[1, 2] = 1.5
    with pytest.raises(ValueError, match=r"raw attention of L1H2 lies outside \[0, 1\]"):
        scoring._check_mass(mass, "raw", needles.make("text", 128, 0.0))


def test_shipped_models_have_heads_that_fetch_text(tiny):
    examples = needles.generate(["text"], [512], pairs=2, split="test")
    scores = scoring.score_heads(tiny, examples, progress=False)
    assert scores.mean.max() > 0.1
    assert np.median(scores.mean) < 0.02
    shuffled = scores["shuffled"].mean
    assert (scores["raw"].mean >= 0).all()
    assert shuffled.shape == scores.mean.shape


def test_the_text_only_predecessor_is_scored_by_the_same_call():
    text = load(paths.MODELS / "tiny-qwen3-m", device="cpu")
    assert text.is_text_only
    examples = needles.generate(["text"], [256], pairs=1, split="test", image_ratio=0.0)
    scores = scoring.score_heads(text, examples, progress=False)
    assert scores.mean.max() > 0.1
