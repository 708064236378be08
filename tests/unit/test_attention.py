"""Recorded masses equal eager attention, and recording changes no bit."""

from types import SimpleNamespace

import example_prompts
import numpy as np
import pytest
import random_models
import torch
from transformers import DynamicCache

from mmheads.attention import (
    Recording,
    ablate,
    gate,
    hook,
    record_keys,
    record_mass,
    recording,
    stop_after,
)
from mmheads.heads import Head, HeadGeometry, HeadSet
from mmheads.models import VLM


@pytest.fixture(params=random_models.FAMILIES)
def vlm(request) -> VLM:
    return example_prompts.vlm(request.param)


def padded_batch(vlm: VLM, side: str) -> dict[str, torch.Tensor]:
    """Two prompts of unequal length; vision families see two images in each."""
    texts, images = [], []
    for words in ("one short", "the other one is longer than that"):
        content = [{"type": "text", "text": words}]
        if not vlm.is_text_only:
            content[:0] = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]
            images.append([example_prompts.picture(60, 40), example_prompts.picture(40, 60, 1)])
        else:
            content = words
        texts.append(
            vlm.processor.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False
            )
        )
    vlm.tokenizer.padding_side = side
    extra = {} if vlm.is_text_only else {"images": images}
    return dict(vlm.processor(text=texts, padding=True, return_tensors="pt", **extra))


@pytest.mark.parametrize("side", ["left", "right"])
def test_masses_equal_eager_attention_and_logits_keep_every_bit(vlm, side):
    inputs = padded_batch(vlm, side)
    examples, tokens = inputs["input_ids"].shape
    rng = np.random.default_rng(0)
    first = inputs["attention_mask"].argmax(-1)
    rows = torch.stack([start + torch.tensor([3, 7, 11]) for start in first])
    rows[0, 2] = -1
    weights = torch.from_numpy(rng.random((examples, tokens, 2), dtype=np.float32))
    with torch.no_grad():
        plain = vlm.model(**inputs, use_cache=False).logits
        with record_mass(vlm, rows, weights) as recording:
            recorded = vlm.model(**inputs, use_cache=False).logits
        again = vlm.model(**inputs, use_cache=False).logits
        vlm.model.set_attn_implementation("eager")
        maps = vlm.model(**inputs, use_cache=False, output_attentions=True).attentions
    eager = example_prompts.every_layer(vlm, maps)
    assert torch.equal(plain, recorded)
    assert torch.equal(plain, again)
    mass = recording.mass(len(eager))
    assert mass.shape == (examples, 4, 8, 3, 2)
    for example in range(examples):
        for index, row in enumerate(rows[example].tolist()):
            expected = torch.stack([layer[example, :, row] @ weights[example] for layer in eager])
            if row < 0:
                expected = torch.zeros_like(expected)
            torch.testing.assert_close(mass[example, :, :, index], expected, atol=1e-5, rtol=0)


def test_masses_are_recorded_in_the_prefill_of_generate(vlm):
    inputs = padded_batch(vlm, "left")
    tokens = inputs["input_ids"].shape[1]
    rows, weights = torch.full((2, 1), tokens - 1), torch.ones(2, tokens, 1)
    with record_mass(vlm, rows, weights) as recording:
        vlm.model.generate(**inputs, max_new_tokens=2, do_sample=False)
    everywhere = torch.from_numpy(vlm.geometry.every).float()[None, :, :, None, None]
    torch.testing.assert_close(recording.mass(4), everywhere.expand(2, -1, -1, -1, -1))


def test_the_model_is_restored_after_an_exception():
    vlm = example_prompts.vlm("qwen3_vl")
    before = vlm.text_config._attn_implementation, vlm.model.config._attn_implementation
    nothing = (torch.zeros(1, 1).long(), torch.ones(1, 1, 1))
    with pytest.raises(RuntimeError, match="on purpose"), record_mass(vlm, *nothing):
        raise RuntimeError("on purpose")
    assert (vlm.text_config._attn_implementation, vlm.model.config._attn_implementation) == before
    assert not any(hasattr(module, "_mmheads") for module in vlm.attentions.values())


def test_recording_nothing_is_an_error():
    vlm = example_prompts.vlm("qwen3")
    with record_mass(vlm, torch.zeros(1, 1).long(), torch.ones(1, 1, 1)) as recording:
        pass
    with pytest.raises(ValueError, match="nothing was recorded"):
        recording.mass(4)


def test_another_attention_is_refused():
    vlm = example_prompts.vlm("qwen3")
    vlm.text_config._attn_implementation_internal = "flex_attention"
    recording = record_mass(vlm, torch.zeros(1, 1).long(), torch.ones(1, 1, 1))
    with pytest.raises(ValueError, match="load it with one of 'sdpa', 'eager'"), recording:
        pass


@pytest.mark.parametrize("place", ["q_proj", "k_proj", "o_proj"])
def test_numbers_that_are_not_finite_are_refused_with_layer_and_head(place):
    vlm = example_prompts.vlm("qwen3")
    width = vlm.attentions[2].head_dim
    weight = getattr(vlm.attentions[2], place).weight
    rows = slice(None) if place == "o_proj" else slice(width, 2 * width)
    weight.data[rows] = float("nan")
    named = {  # one head, the KV group of heads 4 to 7, and all of the next layer
        "q_proj": "queries of L2H1 are",
        "k_proj": "keys of L2H4, L2H5, L2H6, L2H7 are",
        "o_proj": "queries of L3H0, L3H1, L3H2, L3H3 and 4 more are",
    }
    inputs = {"input_ids": torch.tensor([[5, 9, 7, 6, 8]])}
    rows, shares = torch.tensor([[3]]), torch.ones(1, 5, 1)
    every = vlm.every_head

    def run() -> None:
        vlm.model(**inputs, use_cache=False)

    message = f"the {named[place]} not finite"
    with pytest.raises(ValueError, match=message), record_mass(vlm, rows, shares):
        run()
    with pytest.raises(ValueError, match=message):
        record_keys(vlm, rows[0], every, run)
    gates = torch.ones(1, vlm.geometry.layers, vlm.geometry.heads)
    with pytest.raises(ValueError, match=message), gate(vlm, gates):
        run()
    nothing = HeadSet((), vlm.geometry, vlm.model_id)
    with pytest.raises(ValueError, match=message), ablate(vlm, nothing):
        run()


def test_a_last_layer_whose_values_are_not_finite_is_refused():
    vlm = example_prompts.vlm("qwen3")
    vlm.attentions[3].v_proj.weight.data[:] = float("inf")
    refused = pytest.raises(ValueError, match="outputs of L3H0, L3H1, L3H2, L3H3 and 4 more")
    with refused, record_mass(vlm, torch.tensor([[3]]), torch.ones(1, 5, 1)):
        vlm.model(input_ids=torch.tensor([[5, 9, 7, 6, 8]]), use_cache=False)


@pytest.mark.parametrize("name", ["position_bias", "sinks", "indices", "block_indices", "s_other"])
def test_keywords_that_are_not_known_are_refused_by_name(name):
    vlm = example_prompts.vlm("qwen3")
    refused = pytest.raises(ValueError, match=f"layer 0 .* takes {name}, which is not known")
    with refused, record_mass(vlm, torch.tensor([[3]]), torch.ones(1, 5, 1)):
        vlm.model(input_ids=torch.tensor([[5, 9, 7, 6, 8]]), **{name: torch.zeros(1)})


def test_a_call_that_is_stopped_fills_the_cache_up_to_there_and_loses_no_line_of_the_caller():
    vlm = example_prompts.vlm("qwen3")
    ids = torch.tensor([[5, 9, 7, 6, 8]])
    cache = DynamicCache()
    lines = []

    def run() -> None:
        vlm.model(input_ids=ids, past_key_values=cache, use_cache=True)
        lines.append("behind the stop")

    stop_after(vlm, {1: lambda call: call.query}, run)
    assert len(cache.layers) == 2
    assert not lines
    assert vlm.text_config._attn_implementation == "sdpa"


def softmax_by_hand(query, key, scaling, softcap, sinks, allowed):
    """[head, row, key] in float64, one number at a time."""
    heads, rows, keys = query.shape[0], query.shape[1], key.shape[1]
    shared = heads // key.shape[0]
    result = np.zeros((heads, rows, keys))
    for head in range(heads):
        for row in range(rows):
            scores = key[head // shared] @ query[head, row] * scaling
            if softcap:
                scores = softcap * np.tanh(scores / softcap)
            powers = np.where(allowed[row], np.exp(scores), 0)
            result[head, row] = powers / (
                powers.sum() + (np.exp(sinks[head]) if sinks is not None else 0)
            )
    return result


@pytest.mark.parametrize("working_set", [1, 64 << 20])
@pytest.mark.parametrize(("softcap", "with_sinks"), [(None, False), (5.0, False), (None, True)])
def test_masses_entropies_and_norms_equal_a_computation_by_hand(
    softcap, with_sinks, working_set, monkeypatch
):
    monkeypatch.setattr(recording, "WORKING_SET", working_set)
    rng = np.random.default_rng(1)
    query, key = rng.normal(size=(1, 4, 5, 8)), rng.normal(size=(1, 2, 5, 8))
    sinks = rng.normal(size=4) if with_sinks else None
    output = rng.normal(size=(1, 5, 4, 8))
    rows, text = [1, 4], np.array([True, False, True, True, False])
    weights = rng.random((5, 2))
    as_tensor = torch.from_numpy
    state = Recording(torch.tensor([rows]), as_tensor(weights)[None].float(), as_tensor(text)[None])
    module = SimpleNamespace(layer_idx=0, is_causal=True, _mmheads=state)
    monkeypatch.setattr(
        hook.compat, "stock_attention", lambda *_: lambda *_, **__: (as_tensor(output), None)
    )
    hook._attention("sdpa")(
        module,
        as_tensor(query),
        as_tensor(key),
        None,
        None,
        scaling=0.3,
        softcap=softcap,
        s_aux=as_tensor(sinks) if with_sinks else None,
    )
    allowed = np.tril(np.ones((5, 5), dtype=bool))[rows]
    expected = softmax_by_hand(query[0][:, rows], key[0], 0.3, softcap, sinks, allowed)
    np.testing.assert_allclose(state.masses[0][0], expected @ weights, atol=1e-6)
    among = expected[..., text] / expected[..., text].sum(-1, keepdims=True)
    entropy = -np.where(among > 0, among * np.log(np.where(among > 0, among, 1)), 0).sum(-1)
    np.testing.assert_allclose(state.entropies[0][0], entropy, atol=1e-6)
    state.add_norm(0, as_tensor(output))
    norms = np.linalg.norm(output[0, rows], axis=-1).T
    np.testing.assert_allclose(state.norms[0][0], norms, rtol=1e-6)


def test_huge_logits_in_bfloat16_stay_probabilities():
    torch.manual_seed(0)
    query, key = (100 * torch.randn(1, heads, 64, 16, dtype=torch.bfloat16) for heads in (8, 2))
    state = Recording(torch.arange(64)[None], torch.ones(1, 64, 1))
    call = hook.Call(
        layer=0,
        query=query,
        key=key,
        value=key,
        mask=None,
        causal=True,
        scaling=1.0,
        softcap=None,
        sinks=None,
        stock=lambda: (query.transpose(1, 2), None),
    )
    assert state(call) is call.output
    assert ((state.masses[0] >= 0) & (state.masses[0] <= 1 + 1e-5)).all()
    torch.testing.assert_close(state.masses[0], torch.ones_like(state.masses[0]))


def test_sliding_layers_are_not_eligible():
    gemma, qwen = example_prompts.vlm("gemma3"), example_prompts.vlm("qwen3_vl")
    assert gemma.geometry.global_layers == (1, 3)
    assert gemma.geometry.eligible.any(axis=1).tolist() == [False, True, False, True]
    assert qwen.geometry.eligible.all()
    assert (qwen.geometry.layers, qwen.geometry.heads, qwen.geometry.kv_groups) == (4, 8, 2)


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"])
def test_only_attention_layers_have_heads_and_norms_are_those_behind_the_gate(family):
    vlm = example_prompts.vlm(family)
    assert vlm.geometry == HeadGeometry(4, 8, 2, global_layers=(1, 3), without_heads=(0, 2))
    assert (vlm.geometry.size, len(vlm.every_head)) == (16, 16)
    ids = torch.arange(5, 25)[None]
    inputs = {"input_ids": ids, "mm_token_type_ids": torch.zeros_like(ids)}
    projected: dict[str, torch.Tensor] = {}
    for name in ("q_proj", "v_proj"):
        getattr(vlm.attentions[3], name).register_forward_hook(
            lambda module, args, output, name=name: projected.update({name: output[0]})
        )
    with torch.no_grad(), record_mass(vlm, torch.tensor([[4, 19]]), torch.ones(1, 20, 1)) as found:
        vlm.model(**inputs, use_cache=False)
    vlm.model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = vlm.model(**inputs, use_cache=False, output_attentions=True).attentions[1][0]
    value = projected["v_proj"].unflatten(-1, (2, 16)).repeat_interleave(4, 1).transpose(0, 1)
    gate_of = projected["q_proj"].unflatten(-1, (8, 32))[..., 16:].transpose(0, 1).sigmoid()
    expected = (maps @ value * gate_of)[:, [4, 19]].norm(dim=-1)
    norms = found.norm(4)[0]
    torch.testing.assert_close(norms[3], expected, atol=1e-5, rtol=1e-4)
    assert not norms[[0, 2]].any()
    with pytest.raises(ValueError, match=r"L0H3 cannot be ablated in qwen3_5.*only \[1, 3\] have"):
        ablate(vlm, HeadSet((Head(0, 3),), vlm.geometry)).__enter__()
