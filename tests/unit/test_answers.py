"""Answers under maskings: those of the stock `generate`, kept, resumed, compared in pairs."""

import dataclasses

import example_prompts
import numpy as np
import pandas as pd
import pytest
import random_models
import torch

from mmheads import answers, causal
from mmheads.answers import answer, answer_streaming
from mmheads.attention import ablate
from mmheads.causal import gate_gradients, single_head_effects
from mmheads.effects import effects
from mmheads.examples import Example
from mmheads.heads import Head, HeadSet
from mmheads.models import VLM, load
from mmheads.prefix import on_device
from mmheads.prompts import encode
from mmheads.streaming import stream
from mmheads.tasks import needles


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
    maskings = {"a": heads(vlm, (0, 1), (2, 3)), "b": [heads(vlm, (1, 0)), heads(vlm, (3, 7))]}
    table = answer(vlm, given, maskings, max_new_tokens=4, folder=tmp_path, progress=False)
    assert table.groupby("masking", sort=False).size().to_dict() == {"none": 2, "a": 2, "b": 4}
    sets = {("none", 0): heads(vlm), ("a", 0): maskings["a"]}
    sets |= {("b", draw): chosen for draw, chosen in enumerate(maskings["b"])}
    for row in table.itertuples():
        with ablate(vlm, sets[row.masking, row.draw]):
            assert row.given == stock(vlm, given[row.example], 4)
        assert row.heads == len(sets[row.masking, row.draw])


def test_answers_are_kept_and_an_interrupted_run_goes_on(tiny, tmp_path, monkeypatch):
    given = list(needles.generate(["text"], [128], depths=[0.0, 1.0], pairs=2, split="test"))
    maskings = {"some": heads(tiny, (0, 1))}
    settings = {"max_new_tokens": 1, "folder": tmp_path, "progress": False, "batch_tokens": 300}
    monkeypatch.setattr(answers, "SAVE_EVERY", 0.0)
    generate, calls = answers._generate, []

    def counted(vlm, prompts, count):
        calls.append(len(prompts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(vlm, prompts, count)

    monkeypatch.setattr(answers, "_generate", counted)
    with pytest.raises(KeyboardInterrupt):
        answer(tiny, given, maskings, **settings)
    assert tiny.text_config._attn_implementation == "sdpa"
    table = answer(tiny, given, maskings, **settings)
    assert calls == [2, 2, 2, 2, 2]
    pd.testing.assert_frame_equal(answer(tiny, given, maskings, **settings), table)
    assert len(calls) == 5
    answer(tiny, given, maskings, when="prefill", **settings)
    assert calls[5:] == [2, 2], "the whole model answers the same whatever is done to heads"
    (path,) = tmp_path.glob("*.parquet")
    changed = dataclasses.replace(tiny, revision="other")
    answer(changed, given[:1], **settings)
    assert len(list(tmp_path.glob("*.parquet"))) == 2
    assert path.name.startswith("tiny-qwen3-vl-m-")


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3", "qwen3"])
def test_streaming_answers_are_those_of_generate_row_by_row(family, tmp_path):
    vlm = example_prompts.vlm(family)
    given = [
        example_prompts.example(family, question) for question in ("which rain falls", "which one")
    ]
    dense = {"a": heads(vlm, (0, 1), (2, 3)), "b": [heads(vlm), heads(vlm, (1, 0))]}
    settings = {"max_new_tokens": 4, "folder": tmp_path, "progress": False}
    table = answer_streaming(vlm, given, dense, sinks=2, window=6, **settings)
    assert table.groupby("masking", sort=False).size().to_dict() == {"none": 2, "a": 2, "b": 4}
    for row in table.itertuples():
        if row.masking == "none":
            assert row.given == stock(vlm, given[row.example], 4)
            assert row.heads == vlm.geometry.size
            continue
        chosen = dense["a"] if row.masking == "a" else dense["b"][row.draw]
        with stream(vlm, chosen, 2, 6):
            assert row.given == stock(vlm, given[row.example], 4)
        assert row.heads == len(chosen)
    wider = answer_streaming(vlm, given, dense, sinks=2, window=10_000, **settings)
    assert wider.groupby("example")["given"].nunique().eq(1).all()
    assert set(answer(vlm, given, **settings)["given"]) == set(wider["given"])


def test_needles_are_answered(tiny, tmp_path):
    given = [needles.make(task, 256, 0.4, pair=i) for task in needles.TASKS for i in range(5)]
    table = answer(tiny, given, max_new_tokens=1, folder=tmp_path, progress=False)
    assert table["score"].mean() > 0.9
    assert set(table.columns) >= {"task", "length", "depth", "seed", "given"}
    assert (table["depth"] == 0.4).all()


def test_bad_input_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match="there is no example to answer"):
        answer(tiny, [], folder=tmp_path)
    one = [needles.make("text", 128, 0.0)]
    with pytest.raises(ValueError, match="'none' is the whole model and always there"):
        answer(tiny, one, {"none": heads(tiny, (0, 0))}, folder=tmp_path)
    with pytest.raises(ValueError, match="has no token"):
        gate_gradients(tiny, [dataclasses.replace(one[0], answer="")], progress=False)
    for function in (gate_gradients, single_head_effects):
        with pytest.raises(ValueError, match="there is no example"):
            function(tiny, [], progress=False)
    assert not list(tmp_path.iterdir())


def test_effects_are_paired_over_haystacks():
    rows = [
        {"masking": name, "draw": draw, "heads": count, "task": "text", "depth": depth}
        | {"seed": str(unit), "score": score(unit, draw, depth)}
        for name, draws, count, score in (
            ("none", 1, 0, lambda unit, draw, depth: 1.0),
            ("all", 1, 3, lambda unit, draw, depth: 0.0),
            ("some", 2, 3, lambda unit, draw, depth: float(draw == 0 or depth == 0)),
        )
        for draw in range(draws)
        for unit in range(10)
        for depth in (0, 1)
    ]
    table = effects(pd.DataFrame(rows), seed=1)
    none, every, some = table.to_dict("records")
    assert (none["score"], none["n"], none["draws"]) == (1.0, 10, 1)
    assert np.isnan(none["p"])
    assert (every["change"], every["change_low"], every["change_high"]) == (-1.0, -1.0, -1.0)
    assert every["p"] == pytest.approx(2 / 2**10)
    assert every["p_holm"] == pytest.approx(4 / 2**10)
    assert (some["score"], some["change"], some["draws"]) == (0.75, -0.25, 2)
    wider = effects(pd.DataFrame(rows), seed=1, family=10)
    assert wider["p_holm"].max() == pytest.approx(20 / 2**10)
    paired = effects(pd.DataFrame(rows), against="some", seed=1).set_index("masking")
    assert paired.loc["all", "change"] == -0.75
    assert np.isnan(paired.loc["some", "p_holm"])
    with pytest.raises(ValueError, match="has no masking 'none'"):
        effects(pd.DataFrame(rows[20:]))


def test_gradients_estimate_what_single_heads_do():
    vlm = example_prompts.vlm("qwen3_vl")
    given = [dataclasses.replace(example_prompts.example("qwen3_vl"), answer="rain")]
    slopes = gate_gradients(vlm, given, progress=False)
    true = single_head_effects(vlm, given, batch_tokens=400, progress=False)
    assert slopes.shape == true.shape == (1, vlm.geometry.layers, vlm.geometry.heads)
    assert np.corrcoef(slopes.ravel(), true.ravel())[0, 1] > 0.9
    prompt, one = encode(vlm, given[0]), heads(vlm, (2, 5))
    with torch.no_grad():
        whole = causal.log_odds(vlm, prompt)
        with ablate(vlm, one):
            without = causal.log_odds(vlm, prompt)
        logits = vlm.model(**prompt.inputs).logits[0, -1]
    p = logits.softmax(-1)[vlm.tokenizer("rain", add_special_tokens=False)["input_ids"][0]]
    assert float(whole) == pytest.approx(float((p / (1 - p)).log()), abs=1e-4)
    assert true[0, 2, 5] == pytest.approx(float(whole - without), abs=1e-5)
    assert not any(p.grad is not None for p in vlm.model.parameters())


def test_two_processes_keep_each_others_answers(tiny, tmp_path):
    first, second = (answers._Kept(tiny, tmp_path) for _ in range(2))
    first.add({"a": "1"})
    second.add({"b": "2"})
    first.save()
    second.save()
    assert answers._Kept(tiny, tmp_path).answers == {"a": "1", "b": "2"}
