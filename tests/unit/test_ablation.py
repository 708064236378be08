"""Ablated heads are out, and nothing else is: against changed weights, and against other calls."""

import copy
import dataclasses

import example_prompts
import pytest
import random_models
import torch
from test_attention import padded_batch

from mmheads import compat
from mmheads.answers import answer
from mmheads.attention import ablate, gate, mean_outputs
from mmheads.causal import gate_gradients, single_head_effects
from mmheads.heads import Head, HeadSet
from mmheads.models import VLM

CHOSEN = ((0, 1), (1, 0), (1, 7), (3, 4))


@pytest.fixture(params=random_models.FAMILIES)
def vlm(request) -> VLM:
    return example_prompts.vlm(request.param)


def heads(vlm: VLM, *chosen: tuple[int, int]) -> HeadSet:
    """Some heads, without those of layers that have none."""
    there = tuple(Head(*head) for head in chosen if head[0] not in vlm.geometry.without_heads)
    return HeadSet(there, vlm.geometry, vlm.model_id)


@torch.no_grad()
def logits(vlm: VLM, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return vlm.model(**inputs, use_cache=False).logits


def generated(vlm: VLM, inputs: dict[str, torch.Tensor], count: int = 4) -> list:
    """The tokens and their logits."""
    result = vlm.model.generate(
        **inputs,
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return [result.sequences, *result.logits]


def assert_same(first: list, second: list) -> None:
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def without_columns(vlm: VLM, chosen: HeadSet) -> VLM:
    """A copy whose output projections ignore the heads."""
    other = copy.deepcopy(vlm)
    for layer, head in chosen:
        weight = compat.output_projection(other.attentions[layer]).weight
        width = weight.shape[1] // vlm.geometry.heads
        weight.data[:, head * width : (head + 1) * width] = 0
    return other


def test_an_empty_set_changes_no_bit(vlm):
    inputs = padded_batch(vlm, "left")
    plain, plain_tokens = logits(vlm, inputs), generated(vlm, inputs)
    with ablate(vlm, heads(vlm)):
        assert torch.equal(logits(vlm, inputs), plain)
        assert_same(generated(vlm, inputs), plain_tokens)


def test_zero_equals_zeroed_columns_of_the_projection(vlm):
    inputs, chosen = padded_batch(vlm, "left"), heads(vlm, *CHOSEN)
    plain = logits(vlm, inputs)
    other = without_columns(vlm, chosen)
    with ablate(vlm, chosen):
        assert torch.equal(logits(vlm, inputs), logits(other, inputs))
        assert_same(generated(vlm, inputs), generated(other, inputs))
    assert not torch.equal(plain, logits(other, inputs))
    assert torch.equal(logits(vlm, inputs), plain), "as before at exit"


def test_uniform_equals_queries_of_zero(vlm):
    inputs, chosen = padded_batch(vlm, "left"), heads(vlm, *CHOSEN)
    other = copy.deepcopy(vlm)
    for layer, head in chosen:
        project = other.attentions[layer].q_proj
        width = project.out_features // vlm.geometry.heads  # perhaps with a gate behind the query
        rows = slice(head * width, head * width + other.attentions[layer].head_dim)
        project.weight.data[rows] = 0
        if project.bias is not None:
            project.bias.data[rows] = 0
    seen = inputs["attention_mask"].bool()
    with ablate(vlm, chosen, "uniform"):
        found, steps = logits(vlm, inputs)[seen], generated(vlm, inputs)
    torch.testing.assert_close(found, logits(other, inputs)[seen], atol=1e-4, rtol=1e-4)
    for ours, wanted in zip(steps, generated(other, inputs), strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-4)
    row = {name: value[:1] for name, value in padded_batch(vlm, "left").items()}
    if vlm.is_text_only:  # no padding: the mask is left to the kernel
        row = {name: value[:, row["attention_mask"][0].bool()] for name, value in row.items()}
        with ablate(vlm, chosen, "uniform"):
            found = logits(vlm, row)
        torch.testing.assert_close(found, logits(other, row), atol=1e-4, rtol=1e-4)


def test_mean_puts_the_given_output_in_place(vlm):
    inputs, chosen = padded_batch(vlm, "left"), heads(vlm, *CHOSEN)
    width = next(iter(vlm.attentions.values())).o_proj.in_features // vlm.geometry.heads
    shape = (vlm.geometry.layers, vlm.geometry.heads, width)
    means = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def hook(layer):
        def replace(module, args):
            given = args[0].clone()
            for head in (head for at, head in chosen if at == layer):
                given[..., head * width : (head + 1) * width] = means[layer, head]
            return (given,)

        return replace

    with ablate(vlm, chosen, "mean", means=means):
        found = logits(vlm, inputs)
    for layer, module in vlm.attentions.items():
        module.o_proj.register_forward_pre_hook(hook(layer))
    assert torch.equal(found, logits(vlm, inputs))


def test_mean_outputs_are_means_over_tokens_and_examples():
    vlm = example_prompts.vlm("qwen3_vl")
    inputs = padded_batch(vlm, "left")
    caught: dict[int, list[torch.Tensor]] = {}
    for layer, module in vlm.attentions.items():
        module.o_proj.register_forward_pre_hook(
            lambda module, args, layer=layer: caught.setdefault(layer, []).append(args[0])
        )
    with mean_outputs(vlm) as means:
        logits(vlm, inputs)
        logits(vlm, {name: value.clone() for name, value in inputs.items()})
    found = means()
    for layer, (first, _) in caught.items():
        expected = first.mean(dim=(0, 1)).view(vlm.geometry.heads, -1)
        torch.testing.assert_close(found[layer], expected, atol=1e-6, rtol=1e-5)


def test_rows_of_a_batch_do_not_leak_into_each_other(vlm):
    inputs = padded_batch(vlm, "left")
    sets = [heads(vlm, *CHOSEN[:2]), heads(vlm, *CHOSEN[2:])]
    with ablate(vlm, sets):
        together, tokens = logits(vlm, inputs), generated(vlm, inputs)
    for row, chosen in enumerate(sets):
        with ablate(vlm, chosen):
            assert torch.equal(together[row], logits(vlm, inputs)[row])
            alone = generated(vlm, inputs)
        for part, wanted in zip(tokens, alone, strict=True):
            if vlm.family.endswith("_moe"):  # tokens of all rows share an expert's multiplication
                torch.testing.assert_close(part[row], wanted[row], atol=1e-5, rtol=1e-5)
            else:
                assert torch.equal(part[row], wanted[row])
    with (
        pytest.raises(ValueError, match="3 head sets for a batch of 2 rows"),
        ablate(vlm, [*sets, sets[0]]),
    ):
        logits(vlm, inputs)


def test_decoding_alone_leaves_the_first_token(vlm):
    inputs, chosen = padded_batch(vlm, "left"), heads(vlm, *CHOSEN)
    plain, both = generated(vlm, inputs), None
    found = {}
    for when in ("both", "prefill", "decode", "answer"):
        with ablate(vlm, chosen, when=when):
            found[when] = generated(vlm, inputs)
    both = found["both"]
    assert torch.equal(found["decode"][1], plain[1])
    assert not torch.equal(found["decode"][2], plain[2])
    assert torch.equal(found["prefill"][1], both[1])
    assert not torch.equal(found["prefill"][2], both[2])
    assert not torch.equal(found["answer"][1], plain[1])
    assert not torch.equal(found["answer"][1], both[1])


def test_answer_is_decoding_from_the_last_token_of_the_prompt():
    vlm = example_prompts.vlm("qwen3")
    inputs, chosen = {"input_ids": torch.tensor([[5, 9, 7, 6, 8]])}, heads(vlm, *CHOSEN)
    with torch.no_grad():
        cache = vlm.model(input_ids=inputs["input_ids"][:, :-1], use_cache=True).past_key_values
        with ablate(vlm, chosen, when="decode"):
            step = vlm.model(input_ids=inputs["input_ids"][:, -1:], past_key_values=cache).logits
    with ablate(vlm, chosen, when="answer"):
        whole = logits(vlm, inputs)
    torch.testing.assert_close(whole[:, -1:], step, atol=1e-5, rtol=1e-5)
    assert torch.equal(whole[:, :-1], logits(vlm, inputs)[:, :-1])


def test_the_model_is_restored_after_an_exception():
    vlm = example_prompts.vlm("gemma3")
    inputs = padded_batch(vlm, "left")
    plain, stock = logits(vlm, inputs), vlm.text_config._attn_implementation
    with pytest.raises(RuntimeError, match="on purpose"), ablate(vlm, heads(vlm, *CHOSEN)):
        raise RuntimeError("on purpose")
    assert vlm.text_config._attn_implementation == stock
    assert torch.equal(logits(vlm, inputs), plain)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "none"}, "mode 'none'"),
        ({"when": "never"}, "when 'never'"),
        ({"mode": "mean"}, "mode 'mean' with no means"),
        ({"means": torch.zeros(1)}, "mode 'zero' with given means"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    vlm = example_prompts.vlm("qwen3")
    with pytest.raises(ValueError, match=message), ablate(vlm, heads(vlm), **settings):
        pass


def test_heads_of_another_model_are_refused():
    vlm = example_prompts.vlm("qwen3")
    wrong = [
        HeadSet((), dataclasses.replace(vlm.geometry, **other), vlm.model_id)
        for other in ({"layers": 2}, {"architecture": "llama"})
    ]
    unknown = dataclasses.replace(vlm.geometry, architecture="")
    wrong.append(HeadSet((), unknown, "other/model"))
    for wrong_heads in wrong:
        with (
            pytest.raises(ValueError, match="cannot be ablated in qwen3"),
            ablate(vlm, wrong_heads),
        ):
            pass
    with pytest.raises(ValueError, match="L9H0 not among the 4 layers"):
        heads(vlm, (9, 0))


def test_contexts_do_not_nest_and_gates_have_the_shape_of_the_heads():
    vlm = example_prompts.vlm("qwen3")
    again = pytest.raises(ValueError, match="inside another")
    with ablate(vlm, heads(vlm)), again, ablate(vlm, heads(vlm)):
        pass
    wrong = pytest.raises(ValueError, match=r"gates have shape \(1, 2, 3\)")
    with wrong, gate(vlm, torch.ones(1, 2, 3)):
        pass


def test_gates_of_zero_ablate_and_their_gradient_is_the_slope():
    vlm = example_prompts.vlm("qwen3_vl")
    inputs = padded_batch(vlm, "left")
    shape = (2, vlm.geometry.layers, vlm.geometry.heads)
    gates = torch.ones(shape)
    gates[0, 1, 3] = 0
    with gate(vlm, gates):
        gated = logits(vlm, inputs)
    with ablate(vlm, [heads(vlm, (1, 3)), heads(vlm)]):
        assert torch.equal(gated, logits(vlm, inputs))
    gates = torch.ones(shape, requires_grad=True)
    with gate(vlm, gates):
        vlm.model(**inputs, use_cache=False).logits[:, -1, 7].sum().backward()
    step = 1e-2
    for row, layer, head in ((0, 0, 0), (1, 2, 5), (0, 3, 7)):
        ends = []
        for sign in (1, -1):
            moved = torch.ones(shape)
            moved[row, layer, head] += sign * step
            with gate(vlm, moved):
                ends.append(logits(vlm, inputs)[row, -1, 7])
        slope = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close(gates.grad[row, layer, head], slope, atol=1e-3, rtol=2e-2)


@pytest.mark.parametrize(("layer", "place"), [(1, "q_proj"), (3, "v_proj")])
def test_answers_gates_and_single_heads_refuse_numbers_that_are_not_finite(layer, place, tmp_path):
    vlm = example_prompts.vlm("qwen3")
    getattr(vlm.attentions[layer], place).weight.data[:] = float("nan")
    example = dataclasses.replace(example_prompts.example("qwen3"), answer="rain")
    named = "queries of L1H0, L1H1, L1H2, L1H3 and 4 more" if layer == 1 else "log-odds|logits"
    for run in (
        lambda: answer(vlm, [example], folder=tmp_path, progress=False),
        lambda: answer(vlm, [example], {"one": heads(vlm, (0, 1))}, folder=tmp_path),
        lambda: gate_gradients(vlm, [example], progress=False),
        lambda: single_head_effects(vlm, [example], progress=False),
    ):
        with pytest.raises(ValueError, match=f"the ({named}).* not finite"):
            run()
