"""Answers under ablations: those of the stock `generate`, kept and resumed."""

import dataclasses
import warnings

import example_prompts
import pandas as pd
import pytest
import random_models

from mmheads import answers
from mmheads.answers import answer, answer_streaming
from mmheads.attention import ablate
from mmheads.causal import gate_gradients, single_head_effects
from mmheads.examples import Example
from mmheads.heads import Head, HeadSet, Origin
from mmheads.models import VLM, load
from mmheads.prefix import on_device
from mmheads.prompts import encode
from mmheads.streaming import stream
from mmheads.tasks.grids import TASKS
from mmheads.tasks.needles import GENERATED


@pytest.fixture(scope="module")
def tiny() -> VLM:
    return load("tiny-qwen3-vl-m")


def heads(vlm: VLM, *chosen: tuple[int, int]) -> HeadSet:
    return HeadSet(tuple(Head(*head) for head in chosen), vlm.geometry, vlm.model_id)


def stock(vlm: VLM, example: Example, count: int) -> str:
    """Plain `generate`, one prompt."""
    inputs = on_device(vlm, encode(vlm, example).inputs)
    tokens = vlm.model.generate(**inputs, max_new_tokens=count, do_sample=False)
    return vlm.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("family", random_models.FAMILIES)
def test_answers_are_those_of_generate_row_by_row(family, tmp_path):
    vlm = example_prompts.vlm(family)
    given = [
        example_prompts.example(family, question) for question in ("which rain falls", "which one")
    ]
    ablations = {"a": heads(vlm, (1, 1), (3, 3)), "b": [heads(vlm, (1, 0)), heads(vlm, (3, 7))]}
    table = answer(vlm, given, ablations, max_new_tokens=4, folder=tmp_path, progress=False)
    assert table.groupby("ablation", sort=False).size().to_dict() == {
        "full model": 2,
        "a": 2,
        "b": 4,
    }
    sets = {("full model", 0): heads(vlm), ("a", 0): ablations["a"]}
    sets |= {("b", draw): chosen for draw, chosen in enumerate(ablations["b"])}
    for row in table.itertuples():
        with ablate(vlm, sets[row.ablation, row.draw]):
            assert row.prediction == stock(vlm, given[row.example], 4)
        assert row.heads == len(sets[row.ablation, row.draw])


def test_answers_are_kept_and_an_interrupted_run_goes_on(tiny, tmp_path, monkeypatch):
    given = list(GENERATED.generate(["text"], [128], depths=[0.0, 1.0], haystacks=2, split="test"))
    ablations = {"some": heads(tiny, (0, 1))}
    settings = {"max_new_tokens": 1, "folder": tmp_path, "progress": False, "batch_tokens": 300}
    generate, calls = answers._generate, []

    def counted(vlm, prompts, count):
        calls.append(len(prompts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(vlm, prompts, count)

    monkeypatch.setattr(answers, "_generate", counted)
    with pytest.raises(KeyboardInterrupt):
        answer(tiny, given, ablations, **settings)
    assert tiny.text_config._attn_implementation == "sdpa"
    table = answer(tiny, given, ablations, **settings)
    assert calls == [2, 2, 2, 2, 2]
    pd.testing.assert_frame_equal(answer(tiny, given, ablations, **settings), table)
    assert len(calls) == 5
    answer(tiny, given, ablations, when="prefill", **settings)
    assert calls[5:] == [2, 2], "the whole model answers the same whatever is done to heads"
    (folder,) = tmp_path.iterdir()
    changed = dataclasses.replace(tiny, revision="other", loaded="")
    answer(changed, given[:1], **settings)
    assert len(list(tmp_path.iterdir())) == 2
    assert folder.name.startswith("tiny-qwen3-vl-m-")


def test_answers_before_a_failing_metric_are_kept(tiny, tmp_path, monkeypatch):
    given = list(GENERATED.generate(["text"], [64], depths=[0.0], haystacks=3, split="test"))
    settings = {"max_new_tokens": 1, "folder": tmp_path, "progress": False}

    calls = []

    def broken(prediction, gold):
        calls.append(gold)
        if len(calls) == 3:
            raise ZeroDivisionError
        return 1.0

    with pytest.raises(ZeroDivisionError):
        answer(tiny, given, metric=broken, **settings)
    monkeypatch.setattr(answers, "_generate", None)
    assert len(answer(tiny, given, **settings)) == 3


@pytest.mark.parametrize("metric", [lambda text, gold: None, lambda text, gold: 2, lambda text: 1])
def test_a_wrong_metric_is_an_error_before_the_work(tiny, tmp_path, monkeypatch, metric):
    monkeypatch.setattr(answers, "_generate", None)
    given = [GENERATED.make("text", 64, 0.0)]
    with pytest.raises((ValueError, TypeError), match=r"expected a number in \[0, 1\]|argument"):
        answer(tiny, given, metric=metric, folder=tmp_path, progress=False)


def test_answers_of_a_users_examples_are_units_by_themselves(tiny, tmp_path):
    given = [Example(context=("B7 K .",), question=(f"? {key}",)) for key in ("B7", "A1")]
    settings = {"max_new_tokens": 1, "folder": None, "progress": False}
    table = answer(tiny, given, **settings)
    assert table["haystack"].nunique() == 2
    assert (table["length"] == 0).all()


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3", "qwen3"])
def test_streaming_answers_are_those_of_generate_row_by_row(family, tmp_path):
    vlm = example_prompts.vlm(family)
    given = [
        example_prompts.example(family, question) for question in ("which rain falls", "which one")
    ]
    dense = {"a": heads(vlm, (0, 1), (2, 3)), "b": [heads(vlm), heads(vlm, (1, 0))]}
    settings = {"max_new_tokens": 4, "folder": tmp_path, "progress": False}
    table = answer_streaming(vlm, given, dense, sinks=2, window=6, **settings)
    assert table.groupby("ablation", sort=False).size().to_dict() == {
        "full model": 2,
        "a": 2,
        "b": 4,
    }
    for row in table.itertuples():
        if row.ablation == "full model":
            assert row.prediction == stock(vlm, given[row.example], 4)
            assert row.heads == vlm.geometry.size
            continue
        chosen = dense["a"] if row.ablation == "a" else dense["b"][row.draw]
        with stream(vlm, chosen, 2, 6):
            assert row.prediction == stock(vlm, given[row.example], 4)
        assert row.heads == len(chosen)
    wider = answer_streaming(vlm, given, dense, sinks=2, window=10_000, **settings)
    assert wider.groupby("example")["prediction"].nunique().eq(1).all()
    assert set(answer(vlm, given, **settings)["prediction"]) == set(wider["prediction"])


def test_needles_are_answered(tiny, tmp_path):
    given = [GENERATED.make(task, 256, 0.4, haystack=i) for task in TASKS for i in range(5)]
    table = answer(tiny, given, max_new_tokens=1, folder=tmp_path, progress=False)
    assert table["score"].mean() > 0.9
    assert set(table.columns) >= {"task", "length", "depth", "haystack", "prediction"}
    assert (table["depth"] == 0.4).all()


def test_bad_input_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match="there is no example to answer"):
        answer(tiny, [], folder=tmp_path)
    one = [GENERATED.make("text", 128, 0.0)]
    with pytest.raises(ValueError, match="'full model' names the model without ablation"):
        answer(tiny, one, {"full model": heads(tiny, (0, 0))}, folder=tmp_path)
    with pytest.raises(ValueError, match="has no token"):
        gate_gradients(tiny, [dataclasses.replace(one[0], answer="")], progress=False)
    for function in (gate_gradients, single_head_effects):
        with pytest.raises(ValueError, match="there is no example"):
            function(tiny, [], progress=False)
    assert not list(tmp_path.iterdir())


def test_heads_are_told_apart_from_weights_that_were_changed_in_memory(tmp_path):
    vlm = dataclasses.replace(example_prompts.vlm("qwen3"), revision="abc")
    given = [example_prompts.example("qwen3")]
    chosen = dataclasses.replace(heads(vlm, (0, 1)), origin=Origin("abc"))
    settings = {"max_new_tokens": 1, "folder": tmp_path, "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answer(vlm, given, {"a": chosen}, **settings)
    vlm.model.lm_head.weight.data.mul_(-1)
    with pytest.warns(UserWarning, match="the weights abc of qwen3 are used with its weights abc"):
        answer(vlm, given, {"a": chosen}, **settings)
    assert len(list(tmp_path.iterdir())) == 2, "answers of other weights are not returned"
