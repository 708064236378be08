"""Compiled, adapted and quantised models are exact, or refused by name: no ablation does nothing.

Each is compared with a plain model that computes the same, whose projections ignore the heads.
Packages that are not installed are stood in for by small modules of the same layout.
"""

import copy
import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import example_prompts
import numpy as np
import pytest
import random_models
import torch
from test_ablation import CHOSEN, generated, heads, logits, without_columns
from test_attention import padded_batch
from torch.nn.functional import linear

from mmheads.answers import answer
from mmheads.attention import ablate, mean_outputs
from mmheads.causal import single_head_effects
from mmheads.models import VLM
from mmheads.scoring import score_heads
from mmheads.streaming import stream

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def wrapped(model: Any, family: str = "qwen3_vl") -> VLM:
    return VLM(model=model, processor=random_models.build(family)[1], model_id=family)


def plain(family: str = "qwen3_vl") -> VLM:
    return example_prompts.vlm(family)


def assert_close(found: Any, expected: Any, exact: bool) -> None:
    tolerance = 0 if exact else 1e-4
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def check(vlm: VLM, same: VLM, tmp_path: Any, *, exact: bool = True) -> None:
    """Assert that a model gives what a plain one gives that computes the same.

    Scores, and outputs under ablations of both kinds in one call, under `generate`, and of single
    heads; the ablated plain model has weights of zero.
    """
    example = dataclasses.replace(example_prompts.example(vlm.family), answer="rain")
    assert_close(*(score_heads(v, [example], progress=False).values for v in (vlm, same)), exact)
    inputs, chosen = padded_batch(vlm, "left"), heads(vlm, *CHOSEN)
    before, other = logits(vlm, inputs), without_columns(same, chosen)
    steps = generated(other, inputs)
    with ablate(vlm, chosen):
        assert_close(logits(vlm, inputs), logits(other, inputs), exact)
        assert_close(generated(vlm, inputs), steps, exact)
    assert not torch.allclose(before, logits(other, inputs), atol=1e-2)
    assert torch.equal(logits(vlm, inputs), before), "as before at exit"
    found = []
    for each in (vlm, same):
        with mean_outputs(each) as means:
            logits(each, inputs)
        assert means().any()
        with ablate(each, chosen, "mean", means=means()):
            found.append(logits(each, inputs))
        with stream(each, chosen, 2, 5):
            found.append(logits(each, inputs))
    assert_close(found[:2], found[2:], exact)
    assert not torch.allclose(found[0], before, atol=1e-2)
    effects = [
        single_head_effects(v, [example], folder=tmp_path / str(i), progress=False)
        for i, v in enumerate((vlm, same))
    ]
    np.testing.assert_allclose(*effects, atol=1e-3)
    settings = {"ablations": {"some": chosen}, "max_new_tokens": 3, "progress": False}
    given = [
        answer(v, [example], **settings, folder=tmp_path / f"answers {i}")
        for i, v in enumerate((vlm, same))
    ]
    assert list(given[0]["prediction"]) == list(given[1]["prediction"])


# --- compiled


def in_place(model: Any, **how: str) -> Any:
    model.compile(**how)
    return model


def by_layer(model: Any, **how: str) -> Any:
    for layer in model.get_decoder().layers:
        layer.compile(**how)
    return model


def by_function(model: Any, **how: str) -> Any:
    model.forward = torch.compile(model.forward, **how)
    return model


@pytest.mark.parametrize("compiled", [torch.compile, in_place, by_layer, by_function])
def test_a_compiled_model_is_scored_and_ablated_as_it_is(compiled, tmp_path):
    family = "qwen3_vl" if compiled is by_layer else "qwen3"
    torch.compiler.reset()
    model = compiled(random_models.build(family)[0], backend="eager")
    inputs = padded_batch(plain(family), "left")
    with torch.no_grad():
        model(**inputs, use_cache=False)  # compiled before anything is attached
    check(wrapped(model, family), plain(family), tmp_path)


# --- adapters


def adapted(family: str = "qwen3_vl", **settings: Any) -> Any:
    """A model with random LoRA weights, in PEFT's wrapper."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    config = peft.LoraConfig(target_modules=[*PROJECTIONS], r=4, init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return peft.get_peft_model(random_models.build(family)[0], config, **settings).eval()


@pytest.mark.parametrize("inside", [False, True])
def test_a_model_with_lora_equals_the_merged_one(inside, tmp_path):
    model = adapted()
    merged = copy.deepcopy(model).merge_and_unload()
    vlm = wrapped(model.get_base_model() if inside else model)
    check(vlm, wrapped(merged), tmp_path, exact=False)
    inputs = padded_batch(vlm, "left")
    assert not torch.allclose(logits(vlm, inputs), logits(plain(), inputs), atol=1e-2)


def test_a_compiled_model_with_lora_is_what_is_inside():
    model = adapted("qwen3")
    inside = model.get_base_model()
    assert wrapped(torch.compile(model), "qwen3").model is inside
    assert wrapped(torch.nn.DataParallel(model), "qwen3").model is inside


def test_results_with_an_adapter_and_without_it_are_told_apart():
    model = adapted("qwen3")
    vlm = wrapped(model, "qwen3")
    with_it = vlm.weights
    with model.disable_adapter():
        assert vlm.weights != with_it
    assert vlm.weights == with_it
    vlm.attentions[0].q_proj.set_scale("default", 0.5)
    assert vlm.weights != with_it


def test_embeddings_with_an_adapter_are_read():
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    config = peft.LoraConfig(target_modules=["embed_tokens"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(random_models.build("qwen3")[0], config).eval()
    merged = copy.deepcopy(model).merge_and_unload()
    examples = [example_prompts.example("qwen3")]
    scores = [
        score_heads(wrapped(each, "qwen3"), examples, progress=False).values
        for each in (model, merged)
    ]
    np.testing.assert_allclose(*scores, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("PrefixTuning", {"num_virtual_tokens": 3}),
        ("PromptTuning", {"num_virtual_tokens": 3}),
        ("Lora", {"target_modules": ["q_proj"], "alora_invocation_tokens": [5]}),
    ],
)
def test_adapters_that_do_more_than_layers_are_refused_by_name(kind, settings):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    config = getattr(peft, f"{kind}Config")(**settings, task_type="CAUSAL_LM")
    model = peft.get_peft_model(random_models.build("qwen3")[0], config)
    named = config.peft_type.value
    with pytest.raises(ValueError, match=f"the adapter 'default' of the kind {named} of PEFT"):
        wrapped(model, "qwen3")


def test_a_model_of_another_library_is_refused_by_name():
    with pytest.raises(ValueError, match="a model of transformers, not one of the class Linear"):
        wrapped(torch.nn.Linear(2, 2), "qwen3")
    adapter = SimpleNamespace(peft_type="PROMPT_TUNING")
    model = random_models.build("qwen3")[0]
    model.peft_config = {"mine": adapter}
    with pytest.raises(ValueError, match="adapter 'mine' of the kind PROMPT_TUNING"):
        wrapped(model, "qwen3")


# --- quantised


class Packed(torch.nn.Module):
    """As AWQ and GPTQ have it: whole numbers in buffers, no weight."""

    name = "qweight"

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 7
        numbers = (layer.weight.detach() / scale).round().to(torch.int8) + 8
        self.shape = layer.weight.shape
        packed = (numbers[:, ::2] * 16 + numbers[:, 1::2]).to(torch.int32)
        self.register(packed)
        self.register_buffer("scales", scale)
        self.bias = layer.bias

    def register(self, packed: torch.Tensor) -> None:
        self.register_buffer(self.name, packed)

    def whole(self) -> torch.Tensor:
        packed = getattr(self, self.name).reshape(self.shape[0], -1).long()
        numbers = torch.stack([packed // 16, packed % 16], -1).flatten(1) - 8
        return numbers * self.scales

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return linear(states, self.whole(), self.bias)


class PackedWeight(Packed):
    """As bitsandbytes has it: a weight that is one column of packed whole numbers."""

    name = "weight"

    def register(self, packed: torch.Tensor) -> None:
        self.weight = torch.nn.Parameter(packed.reshape(-1, 1), requires_grad=False)


class Float8(torch.nn.Module):
    """As fine-grained float8 has it: a weight in a narrow precision, and its scale."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        scale = layer.weight.detach().abs().max() / 448
        narrow = (layer.weight.detach() / scale).to(torch.float8_e4m3fn)
        self.weight = torch.nn.Parameter(narrow, requires_grad=False)
        self.weight_scale_inv = torch.nn.Parameter(scale)
        self.bias = layer.bias

    def whole(self) -> torch.Tensor:
        return self.weight.float() * self.weight_scale_inv.detach()

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return linear(states, self.whole(), self.bias)


class Adapter(torch.nn.Module):
    """As PEFT has it: a layer inside of another, whose weight is not the whole of it."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer
        self.added = torch.randn(layer.weight.shape) * 0.1

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.base_layer(states) + linear(states, self.added)


def replaced(made: Callable[[torch.nn.Linear], torch.nn.Module]) -> tuple[VLM, VLM]:
    """A model with other projections, and a plain one with the weights that they stand for."""
    vlm, same = plain(), plain()
    for layer, module in vlm.attentions.items():
        for name in PROJECTIONS:
            layer_of = getattr(module, name)
            setattr(module, name, new := made(layer_of))
            zeros = torch.zeros(1, layer_of.in_features)
            unit = torch.eye(layer_of.in_features)
            with torch.no_grad():
                getattr(same.attentions[layer], name).weight.data = (new(unit) - new(zeros)).T
    return wrapped(vlm.model), wrapped(same.model)


def bitsandbytes_4bit(layer: torch.nn.Linear) -> torch.nn.Module:
    library = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    new = library.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=layer.bias is not None, quant_type="nf4"
    )
    new.load_state_dict(layer.state_dict())
    return new.to("cpu")


def torchao_int8(layer: torch.nn.Linear) -> torch.nn.Module:
    library = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    library.quantize_(parts := torch.nn.Sequential(layer), library.Int8WeightOnlyConfig())
    return parts[0]


def quanto_int8(layer: torch.nn.Linear) -> torch.nn.Module:
    library = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    library.quantize(parts := torch.nn.Sequential(layer), weights=library.qint8)
    library.freeze(parts)
    return parts[0]


QUANTISED = [Packed, PackedWeight, Float8, bitsandbytes_4bit, torchao_int8, quanto_int8]


@pytest.mark.parametrize("made", [*QUANTISED, Adapter])
def test_layers_that_are_not_linear_are_scored_and_ablated_as_they_are(made, tmp_path):
    check(*replaced(made), tmp_path, exact=False)


@pytest.mark.parametrize("made", QUANTISED)
def test_other_quantised_weights_are_other_weights(made):
    vlm, _ = replaced(made)
    known, kept = vlm.weights, vlm.attentions[1].o_proj
    vlm.attentions[1].o_proj = made(plain().attentions[0].o_proj)
    assert vlm.weights != known
    vlm.attentions[1].o_proj = kept
    assert vlm.weights == known


# --- changed by other libraries


def test_attention_that_another_library_computes_is_refused(tmp_path):
    """As Unsloth has it: the module is that of transformers, and its `forward` is not."""
    vlm = plain()
    inputs, chosen = padded_batch(vlm, "left"), heads(vlm, *CHOSEN)
    module = vlm.attentions[1]

    def forward(hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return module.o_proj(module.q_proj(hidden_states)), None

    module.forward = forward
    refused = pytest.raises(ValueError, match=r"layer 1 of qwen3_vl .* does not call the attent")
    for context in (ablate(vlm, chosen), stream(vlm, chosen, 2, 5)):
        with context, refused:
            logits(vlm, inputs)
    with refused:
        score_heads(vlm, [example_prompts.example("qwen3_vl")], progress=False)


def test_a_projection_whose_weight_is_used_directly_is_refused(monkeypatch):
    vlm = plain()
    inputs, chosen = padded_batch(vlm, "left"), heads(vlm, *CHOSEN)
    projection = vlm.attentions[1].o_proj
    monkeypatch.setattr(
        type(projection), "__call__", lambda self, states: self.forward(states), raising=False
    )
    refused = pytest.raises(ValueError, match="does not call its output projection")
    means = torch.zeros(vlm.geometry.layers, vlm.geometry.heads, 16)
    for context in (ablate(vlm, chosen, "mean", means=means), mean_outputs(vlm)):
        with context, refused:
            logits(vlm, inputs)
    with refused:
        score_heads(vlm, [example_prompts.example("qwen3_vl")], progress=False)
