"""Scores of every head: equal to full eager passes, resumable, never mixed."""

import dataclasses

import example_prompts
import numpy as np
import pandas as pd
import pytest
import random_models
import torch

from cluster import ship
from mmheads import kept_scores, models, paths, prompts, scoring, store
from mmheads.examples import Example, Region
from mmheads.models import VLM, load
from mmheads.tasks.needles import GENERATED, Needles


@pytest.fixture(scope="module", params=random_models.FAMILIES)
def vlm(request) -> VLM:
    return example_prompts.vlm(request.param)


@pytest.fixture(scope="module")
def tiny() -> VLM:
    return load(paths.MODELS / "tiny-qwen3-vl-m", device="cpu")


def head_outputs(vlm: VLM, prompt: prompts.Prompt) -> np.ndarray:
    """[layer, question token, head, channel] as they enter the output projection, or 0."""
    outputs, hooks = {}, []
    for layer, module in vlm.attentions.items():

        def keep(_, args, layer=layer):
            outputs[layer] = args[0][0].unflatten(-1, (vlm.geometry.heads, -1))

        hooks.append(module.o_proj.register_forward_pre_hook(keep))
    with torch.no_grad():
        vlm.model(**prompt.inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    every = example_prompts.every_layer(vlm, [outputs[layer] for layer in sorted(outputs)])
    return torch.stack(every)[:, prompt.question].numpy()


@pytest.mark.parametrize("option_images", [True, False])
def test_scores_equal_full_eager_passes(vlm, option_images):
    example = example_prompts.example(vlm.family)
    if not option_images:
        example = example_prompts.without_images(example)
    scores = scoring.score_heads(vlm, [example], null_images="pixels", progress=False)
    found = {name: array[0] for name, array in scores.quantities.items()}

    def mass(prompt):
        return (
            example_prompts.eager_attention(vlm, prompt.own).numpy()
            @ prompt.weights(prompt.evidence)
        ).mean(-1)

    def with_other(question):
        return prompts.encode(vlm, dataclasses.replace(example, question=question))

    prompt = prompts.encode(vlm, example)
    attention = example_prompts.eager_attention(vlm, prompt.own).numpy()
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
    everywhere = (attention @ same_kind).mean(-1)
    share = np.divide(found["raw"], everywhere, out=everywhere * 0, where=everywhere > 0)
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
    example = GENERATED.make("rendered_text", 128, 0.4, split="test")
    scores = scoring.score_heads(tiny, [example], progress=False)
    prompt = prompts.encode(tiny, example)
    attention = example_prompts.eager_attention(tiny, prompt.own).numpy()
    visual = np.isin(prompt.ids, list(tiny.visual_ids))
    visual[prompt.question] = False
    raw = (attention @ prompt.weights(prompt.evidence)).mean(-1)
    expected = raw / (attention @ visual.astype(np.float32)).mean(-1)
    np.testing.assert_allclose(scores.quantities["share"][0], expected, atol=1e-4)


def test_placeholders_in_the_null_question_are_fed_without_pixels():
    vlm = example_prompts.vlm("qwen3_vl")
    example = example_prompts.example("qwen3_vl")
    pixels = scoring.score_heads(vlm, [example], null_images="pixels", progress=False)
    empty = scoring.score_heads(vlm, [example], progress=False)
    for name in ("raw", "shuffled"):
        np.testing.assert_array_equal(pixels.quantities[name], empty.quantities[name])
    assert np.abs(pixels.quantities["null"] - empty.quantities["null"]).max() > 1e-4
    with pytest.raises(ValueError, match="null_images is 'none'"):
        scoring.score_heads(vlm, [example], null_images="none", progress=False)


@pytest.mark.parametrize("option_images", [True, False])
def test_examples_in_one_batch_have_the_scores_of_each_alone(vlm, option_images, monkeypatch):
    own = example_prompts.example(vlm.family)
    if not option_images:
        own = example_prompts.without_images(own)
    longer = dataclasses.replace(own, context=(*own.context, "One more page says that it rains."))
    examples = [longer, own, dataclasses.replace(own, question=(*own.question, "or what else"))]
    batches = []
    score = scoring.score_prompts

    def counted(vlm, prompts, **settings):
        batches.append(len(prompts))
        return score(vlm, prompts, **settings)

    monkeypatch.setattr(scoring, "score_prompts", counted)
    monkeypatch.setattr(scoring, "SIMILAR", 0)
    together = scoring.score_heads(vlm, examples, progress=False)
    monkeypatch.setitem(scoring.BATCH_TOKENS, "cpu", 1)
    alone = scoring.score_heads(vlm, examples, progress=False)
    assert batches == [3, 1, 1, 1]
    for name in scoring.QUANTITIES:
        rtol = 1e-3 if name == "share" else 1e-5
        close = {"atol": 1e-5, "rtol": rtol}
        np.testing.assert_allclose(together[name].values, alone[name].values, **close)


def test_a_batch_holds_similar_contexts_and_similar_questions(tiny, monkeypatch):
    batches = []
    score = scoring.score_prompts

    def counted(vlm, prompts, **settings):
        batches.append([prompt.example.task for prompt in prompts])
        return score(vlm, prompts, **settings)

    monkeypatch.setattr(scoring, "score_prompts", counted)
    text = [GENERATED.make("text", 64, depth) for depth in (0.0, 1.0)]
    longer, images = GENERATED.make("text", 128, 0.0), GENERATED.make("image", 64, 0.0)
    scoring.score_heads(tiny, [*text, images, longer], progress=False)
    assert batches == [["text", "text"], ["image"], ["text"]]
    batches.clear()
    monkeypatch.setitem(scoring.BATCH_TOKENS, "cpu", 100)
    scoring.score_heads(tiny, text, progress=False)
    assert batches == [["text"], ["text"]], "padded tokens stay within the limit"


def test_a_bad_example_in_a_batch_is_named_and_those_before_it_are_kept(tiny, tmp_path, scored):
    examples = [GENERATED.make("text", 64, depth) for depth in (0.0, 0.5, 1.0)]
    score, bad = scoring.score_prompts, examples[1].fingerprint()

    def failing(vlm, prompts, **settings):
        if any(prompt.example.fingerprint() == bad for prompt in prompts):
            raise ValueError("the attention scores of L0H1 are not finite")
        return score(vlm, prompts, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "score_prompts", failing)
        with pytest.raises(ValueError, match=r"example 1 \(from 0\): the attention scores of L0H1"):
            scoring.score_heads(tiny, examples, folder=tmp_path, progress=False)
    assert len(scored) == 1
    scoring.score_heads(tiny, examples[:1], folder=tmp_path, progress=False)
    assert len(scored) == 1


def test_stale_state_of_an_earlier_prompt_does_not_leak(tiny):
    long = GENERATED.make("image", 256, 0.2, split="test")
    text = Example(context=("B7 K .", "A1 Q ."), question=("? A1",), evidence=(Region(part=1),))
    alone = scoring.score_heads(tiny, [text], progress=False)
    after = scoring.score_heads(tiny, [long, text], progress=False)
    np.testing.assert_array_equal(alone.values[0], after.values[1])


@pytest.fixture
def scored(monkeypatch) -> list[Example]:
    """Examples that are really scored, in order."""
    examples: list[Example] = []
    score = scoring.score_prompts

    def counted(vlm, prompts, **settings):
        examples.extend(prompt.example for prompt in prompts)
        return score(vlm, prompts, **settings)

    monkeypatch.setattr(scoring, "score_prompts", counted)
    return examples


def test_scores_before_an_interrupt_are_kept(tiny, tmp_path, monkeypatch, scored):
    examples = list(GENERATED.generate(["text"], [64], haystacks=1))
    complete = scoring.score_heads(tiny, examples, progress=False)
    distinct = len({example.fingerprint() for example in examples})
    scored.clear()
    monkeypatch.setitem(scoring.BATCH_TOKENS, "cpu", 70)  # one example per batch

    def interrupted():
        for index, example in enumerate(examples):
            if index == 3:
                raise KeyboardInterrupt
            yield example

    with pytest.raises(KeyboardInterrupt):
        scoring.score_heads(tiny, interrupted(), folder=tmp_path, progress=False)
    before = len(scored)
    scores = scoring.score_heads(tiny, examples, folder=tmp_path, progress=False)
    assert len(scored) == distinct > before > 0
    for name in scoring.QUANTITIES:
        np.testing.assert_allclose(scores[name].values, complete[name].values, atol=1e-5)
    pd.testing.assert_frame_equal(scores.metadata, complete.metadata)
    fewer = scoring.score_heads(tiny, reversed(examples[:2]), folder=tmp_path, progress=False)
    np.testing.assert_array_equal(fewer.values, scores.values[1::-1])
    assert len(scored) == distinct


def test_scores_before_a_bad_example_are_kept_and_the_example_is_named(tiny, tmp_path, scored):
    examples = [GENERATED.make("text", 64, depth) for depth in (0.0, 1.0)]
    without = GENERATED.make("text", 64, 0.0, needle=False)
    with pytest.raises(ValueError, match=r"example 2 \(from 0\): .* has no evidence"):
        scoring.score_heads(tiny, [*examples, without], folder=tmp_path, progress=False)
    assert len(scored) == 2
    scoring.score_heads(tiny, examples, folder=tmp_path, progress=False)
    assert len(scored) == 2


def test_a_users_own_examples_have_no_nominal_length_and_are_units_by_themselves(tiny):
    texts = [f"B7 {value} ." for value in "KQ"]
    examples = [
        Example(context=(text,), question=("? B7",), evidence=(Region(part=0),)) for text in texts
    ]
    scores = scoring.score_heads(tiny, examples, progress=False)
    assert scores.metadata["length"].tolist() == [0, 0]
    assert (scores.metadata["tokens"] > 0).all()
    assert scores.by_haystack().shape[:2] == (2, 1)


def test_scores_that_are_not_finite_are_refused_by_head_and_example(tiny, tmp_path, monkeypatch):
    score = scoring.score_prompts

    def overflow(*arguments, **settings):
        (values,) = score(*arguments, **settings)
        values["norm"] = values["norm"].copy()
        values["norm"][1, 2] = np.inf
        return [values]

    monkeypatch.setattr(scoring, "score_prompts", overflow)
    with pytest.raises(ValueError, match=r"example 0 \(from 0\): norm of L1H2 is not finite"):
        scoring.score_heads(
            tiny, [GENERATED.make("text", 64, 0.0)], folder=tmp_path, progress=False
        )
    assert not list(tmp_path.iterdir())


def test_equal_prompts_of_two_depths_are_scored_once_and_keep_their_depths(tiny):
    examples = [GENERATED.make("text", 64, depth) for depth in (0.2, 0.4)]
    assert len({example.fingerprint() for example in examples}) == 1
    scores = scoring.score_heads(tiny, examples, progress=False)
    assert scores.metadata["depth"].tolist() == [0.2, 0.4]
    np.testing.assert_array_equal(scores.values[0], scores.values[1])


def test_kept_needle_scores_are_read_without_the_model(tiny, tmp_path):
    folder = {"folder": tmp_path}
    settings = {"haystacks": 1, "progress": False, **folder}
    name = "tiny-qwen3-vl-m"
    scores = scoring.score_needles(tiny, lengths=[64, 96], **settings)
    stored = kept_scores.load_needle_scores(name, [64, 96], **folder)
    pd.testing.assert_frame_equal(stored.metadata, scores.metadata)
    np.testing.assert_array_equal(stored.values, scores.values)
    assert stored.provenance == scores.provenance
    assert stored.geometry == scores.geometry
    scoring.score_needles(tiny, source=Needles(0.0), tasks=["text"], lengths=[128], **settings)
    every = kept_scores.load_needle_scores(name, **folder)
    pd.testing.assert_frame_equal(every.metadata, stored.metadata)
    message = r"holds no scores of tiny-qwen3-vl-m on text at length 256 \(generated needles"
    with pytest.raises(ValueError, match=message):
        kept_scores.load_needle_scores(name, [256], **folder)
    for missing in ({"model": "another"}, {"null_images": "pixels"}, {"split": "test"}):
        with pytest.raises(ValueError, match="holds no needle scores of"):
            kept_scores.load_needle_scores(**{"model": name, **missing, **folder})
    other = dataclasses.replace(tiny, revision="other", loaded="")
    scoring.score_needles(other, tasks=["text"], lengths=[64], **settings)
    with pytest.raises(ValueError, match=r"computed in several ways \(revision"):
        kept_scores.load_needle_scores(name, [64], **folder)


def test_scored_examples_of_a_condition_are_counted_without_the_model(tiny, tmp_path):
    count = {"model": "tiny-qwen3-vl-m", "task": "text", "length": 64, "folder": tmp_path}
    assert kept_scores.count_scored(**count) == 0
    settings = {"tasks": ["text"], "lengths": [64], "folder": tmp_path, "progress": False}
    scoring.score_needles(tiny, haystacks=1, **settings)
    assert kept_scores.count_scored(**count) == 6
    scoring.score_needles(tiny, haystacks=2, **settings)
    assert kept_scores.count_scored(**count) == 12
    others = [{"length": 96}, {"task": "image"}, {"null_images": "pixels"}, {"split": "test"}]
    for other in [*others, {"source": Needles(0.0)}, {"model": "tiny-qwen3-m"}]:
        assert kept_scores.count_scored(**{**count, **other}) == 0


def test_data_sets_are_scored_by_name_and_kept(tiny, tmp_path, monkeypatch):
    sets = {"a": [GENERATED.make("text", 64, 0.0)], "b": [GENERATED.make("image", 64, 1.0)]}
    found = scoring.score_datasets(tiny, sets, folder=tmp_path, progress=False)
    for name, examples in sets.items():
        alone = scoring.score_heads(tiny, examples, progress=False)
        np.testing.assert_array_equal(found[name].values, alone.values)
    monkeypatch.setattr(scoring, "_score_batch", None)
    again = scoring.score_datasets(tiny, sets, folder=tmp_path, progress=False)
    np.testing.assert_array_equal(again["b"].values, found["b"].values)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_id": "another"},
        {"revision": "abc", "loaded": ""},
        {"null": "nothing"},
        {"null_images": "pixels"},
        {"seed": 1},
        {"template": "abc"},
        {"tokenizer_hash": "abc"},
        {"versions": {"torch": "0.0.1"}},
    ],
)
def test_scores_of_another_provenance_are_computed_again(
    tiny, tmp_path, monkeypatch, changes, scored
):
    settings = {
        name: changes.pop(name) for name in ("null", "null_images", "seed") & changes.keys()
    }
    example = GENERATED.make("text", 64, 0.0)
    scoring.score_heads(tiny, [example], folder=tmp_path, progress=False)
    if versions := changes.pop("versions", None):
        monkeypatch.setattr(models, "library_versions", lambda: versions)
    for name in ("template", "tokenizer_hash"):
        if name in changes:
            monkeypatch.setattr(VLM, name, changes.pop(name))
    other = dataclasses.replace(tiny, **changes)
    scoring.score_heads(other, [example], folder=tmp_path, progress=False, **settings)
    assert len(scored) == 2
    scoring.score_heads(tiny, [example], folder=tmp_path, progress=False)
    assert len(scored) == 2


def test_shipped_scores_are_used_unless_fresh(tiny, tmp_path, monkeypatch, scored):
    settings = {"tasks": ["text"], "lengths": [64], "haystacks": 1, "progress": False}
    scores = scoring.score_needles(tiny, folder=tmp_path / "made", **settings)
    count = len(scored)
    monkeypatch.setattr(store, "SHIPPED", tmp_path / "data")
    about = {"version": scoring.VERSION, "machine": "2 CPU cores", "date": "2026-11-25"}
    store.ship(
        "scores",
        "tiny-qwen3-vl-m",
        now=scores.provenance,
        short=scoring.SHORT,
        folder=tmp_path / "made",
        **about,
    )
    settings["folder"] = tmp_path / "kept"
    shipped = scoring.score_needles(tiny, **settings)
    assert len(scored) == count
    np.testing.assert_allclose(shipped.values, scores.values, atol=2e-5)
    assert set(shipped.quantities) == set(scores.quantities)
    np.testing.assert_array_equal(
        shipped["norm"].values, scores["norm"].values.astype(np.float16).astype(np.float32)
    )
    stored = kept_scores.load_needle_scores(
        "tiny-qwen3-vl-m", tasks=["text"], folder=tmp_path / "kept"
    )
    np.testing.assert_array_equal(stored.values, shipped.values)
    fresh = scoring.score_needles(tiny, fresh=True, **settings)
    assert len(scored) == 2 * count
    np.testing.assert_array_equal(fresh.values, scores.values)


def test_brief_scores_can_be_loaded_and_are_not_taken_for_whole_ones(
    tiny, tmp_path, monkeypatch, scored
):
    settings = {"tasks": ["text"], "lengths": [64], "haystacks": 1, "progress": False}
    scores = scoring.score_needles(tiny, folder=tmp_path / "made", **settings)
    count = len(scored)
    monkeypatch.setattr(store, "SHIPPED", tmp_path / "data")
    about = {"version": scoring.VERSION, "machine": "2 CPU cores", "date": "2026-12-01"}
    about |= {"now": scores.provenance, "short": ship.BRIEF, "folder": tmp_path / "made"}
    store.ship("scores", "tiny-qwen3-vl-m", **about)
    kept = {"folder": tmp_path / "kept"}
    brief = kept_scores.load_needle_scores("tiny-qwen3-vl-m", tasks=["text"], **kept)
    assert set(brief.quantities) == {"raw", "null"}
    assert len(scored) == count
    np.testing.assert_allclose(brief.values, scores.values, atol=2e-5)
    with pytest.warns(UserWarning, match="is not used: it has no context, entropy, norm"):
        whole = scoring.score_needles(tiny, **kept, **settings)
    assert len(scored) == 2 * count
    assert set(whole.quantities) == set(scoring.QUANTITIES)


def test_some_scores_computed_again_show_the_largest_difference(tiny, tmp_path):
    settings = {"tasks": ["text", "image"], "lengths": [64], "haystacks": 2, "split": "heldout"}
    scores = scoring.score_needles(tiny, folder=tmp_path, progress=False, **settings)
    again = kept_scores.recompute_needles(tiny, scores, split="heldout", seed=1)
    assert again["task"].tolist() == ["text", "text", "image", "image"]
    assert set(again["example"]) <= set(scores.metadata["example"])
    assert again["difference"].max() < 1e-5
    scores = dataclasses.replace(scores, values=scores.values + 0.25)
    changed = kept_scores.recompute_needles(tiny, scores, split="heldout", seed=1)
    np.testing.assert_allclose(changed["difference"], 0.25, atol=1e-5)
    with pytest.raises(ValueError, match="none of the first 4 haystacks of 'text'"):
        kept_scores.recompute_needles(tiny, scores, split="test")


def test_what_cannot_be_scored_is_an_error(tiny):
    with pytest.raises(ValueError, match="no example"):
        scoring.score_heads(tiny, [])
    without = GENERATED.make("text", 128, 0.0, needle=False)
    with pytest.raises(ValueError, match="has no evidence"):
        scoring.score_heads(tiny, [without], progress=False)


def test_a_mass_outside_its_range_names_the_head():
    mass = np.zeros((2, 3), dtype=np.float32)
    mass[1, 2] = 1.5
    with pytest.raises(ValueError, match=r"raw attention of L1H2 lies outside \[0, 1\]"):
        scoring._check_mass(mass, "raw", GENERATED.make("text", 128, 0.0))


def test_shipped_models_have_heads_that_fetch_text(tiny):
    examples = GENERATED.generate(["text"], [512], haystacks=2, split="test")
    scores = scoring.score_heads(tiny, examples, progress=False)
    assert scores.mean.max() > 0.1
    assert np.median(scores.mean) < 0.02
    shuffled = scores["shuffled"].mean
    assert (scores["raw"].mean >= 0).all()
    assert shuffled.shape == scores.mean.shape


def test_the_text_only_predecessor_is_scored_by_the_same_call():
    text = load(paths.MODELS / "tiny-qwen3-m", device="cpu")
    assert text.is_text_only
    examples = Needles(0.0).generate(["text"], [256], haystacks=1, split="test")
    scores = scoring.score_heads(text, examples, progress=False)
    assert scores.mean.max() > 0.1
