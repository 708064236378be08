"""Every family works exactly, or is refused by name: never silently wrong.

Random models of each family, some with their stock processor and some given token ids.
"""

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import exactness
import example_prompts
import pytest
import random_models
import torch
import transformers
from test_streaming import masked
from transformers import CONFIG_MAPPING

from mmheads import decoder
from mmheads.attention import ablate
from mmheads.heads import Head, HeadSet
from mmheads.models import VLM
from mmheads.prefix import prefill
from mmheads.prompts import Prompt, encode, null_question
from mmheads.retrieval import DocumentIndex
from mmheads.scoring import score_heads
from mmheads.streaming import stream
from mmheads.tasks import needles

WHOLE_PASSES = {"paligemma", "paligemma2", "molmo2, images in the question"}
"""Tokens of the context see the question: nothing is cached, each question runs the prompt."""


@dataclass(frozen=True)
class Case:
    """A model and a prompt with two questions."""

    vlm: VLM
    prompt: Prompt


def given_tokens(name: str, questions: str) -> Case:
    """A model of `TOKEN_MODELS` with a prompt made of tokens; skips where it is too new."""
    if random_models.TOKEN_MODELS[name][0] not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    model = random_models.token_model(name)
    tokenizer = random_models.build("qwen3")[1]
    vlm = VLM(model=model, processor=tokenizer, model_id=name)
    prompt = exactness.token_prompt(vlm, "words" if vlm.is_text_only else questions)
    return Case(vlm, prompt)


def with_processor(family: str, questions: str) -> Case:
    vlm = example_prompts.vlm(family)
    example = example_prompts.example(family)
    if questions == "words":
        example = example_prompts.without_images(example)
    return Case(vlm, encode(vlm, example, questions=[null_question(example.question)]))


def cases() -> Iterator[object]:
    for family in random_models.FAMILIES:
        for questions in ("words", "images") if family != "qwen3" else ("words",):
            yield pytest.param(with_processor, family, questions, id=f"{family}-{questions}")
    for name in random_models.TOKEN_MODELS:
        text_only = not name.startswith(("molmo2", "paligemma", "gemma4"))
        for questions in ("words",) if text_only else ("words", "images"):
            yield pytest.param(given_tokens, name, questions, id=f"{name}-{questions}")


@pytest.mark.parametrize(("build", "name", "questions"), list(cases()))
def test_a_family_is_exact_or_refused_by_name(build, name, questions):
    case = build(name, questions)
    in_whole = {name, f"{name}, {questions} in the question"} & WHOLE_PASSES
    assert exactness.check(case.vlm, case.prompt) != bool(in_whole)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("build", "name", "questions"),
    [
        (with_processor, "gemma3", "words"),
        (with_processor, "gemma3", "images"),
        (given_tokens, "gemma3_text", "words"),
    ],
)
def test_gemma_3_runs_in_pieces_whose_masks_are_made_by_rows(
    build, name, questions, attention, monkeypatch
):
    case = build(name, questions)
    case.vlm.model.set_attn_implementation(attention)
    monkeypatch.setattr(decoder, "PIECE", 9)
    made = []
    rows = decoder.Blocks.rows
    monkeypatch.setattr(
        decoder.Blocks, "rows", lambda *given: made.append(rows(*given)) or made[-1]
    )
    prefix = prefill(case.vlm, case.prompt)
    pieces = list(prefix._inputs.pieces(prefix.length))
    assert pieces[0][0] == 0
    assert pieces[-1][1] == prefix.length
    visual = case.vlm.is_visual(case.prompt.ids)
    for (_, last), (first, _) in pairwise(pieces):
        assert last == first
        assert not (visual[first - 1] and visual[first]), "an image is cut"
    longest = 9 + 16 * (name == "gemma3")  # tokens of an image
    assert all(9 <= last - first < longest + 1 for first, last in pieces[:-1])
    assert made
    assert max(mask.shape[-2] for mask in made) <= longest
    assert exactness.check(case.vlm, case.prompt, rtol=1e-4)


@pytest.mark.parametrize("questions", ["words", "images"])
def test_a_base_model_with_a_prefix_is_scored_by_full_passes_once_it_has_a_template(questions):
    case = with_processor("paligemma", questions)
    assert not exactness.check(case.vlm, case.prompt)
    example = example_prompts.example("paligemma")
    with pytest.raises(ValueError, match=r"paligemma.* tokens of the context see the question"):
        DocumentIndex(case.vlm, None, [example.context[1]])
    case.vlm.processor.chat_template = None
    with pytest.raises(ValueError, match=r"no chat template.* load\(..., chat_template=...\)"):
        encode(case.vlm, example)


@pytest.mark.parametrize("name", ["paligemma", "paligemma2"])
def test_a_context_that_sees_the_question_is_not_kept_for_later_ones(name):
    case = given_tokens(name, "words")
    with pytest.raises(ValueError, match=f"{name}.* tokens of the context see the question"):
        prefill(case.vlm, case.prompt).alone(case.prompt)


def test_a_question_that_needs_fewer_tokens_than_a_state_has_seen_is_refused():
    case = given_tokens("qwen3_5_text", "words")
    prefix = prefill(case.vlm, case.prompt)
    earlier = dataclasses.replace(case.prompt.own, start=case.prompt.shared - 1)
    with pytest.raises(ValueError, match=r"layers of qwen3_5_text .* keep a state that cannot be"):
        prefix.start(earlier)


def test_needle_tasks_run_through_layers_with_a_state():
    vlm = example_prompts.vlm("qwen3_5")
    examples = needles.GENERATED.generate(lengths=[128], depths=[0.4], haystacks=1)
    scores = score_heads(vlm, examples, progress=False)
    assert len(scores.values) == 4
    assert not scores.values[:, [0, 2]].any()
    assert (scores.quantities["raw"][:, [1, 3]] > 0).all()
    assert {head.layer for head in scores.top(0.25)} <= {1, 3}
    assert len(scores.top(0.25)) == 4, "a quarter of the 16 heads that there are"


def shared_keys() -> tuple[VLM, dict[str, torch.Tensor]]:
    case = given_tokens("gemma4 with shared KV", "words")
    return case.vlm, case.prompt.own.inputs


def first_logits(vlm: VLM, inputs: dict[str, torch.Tensor], **settings: object) -> torch.Tensor:
    settings |= {"max_new_tokens": 2, "min_new_tokens": 2, "return_dict_in_generate": True}
    return vlm.model.generate(**inputs, do_sample=False, output_logits=True, **settings).logits[0]


def test_a_prompt_is_not_taken_for_a_decoding_step_where_layers_share_keys():
    vlm, inputs = shared_keys()
    chosen = HeadSet((Head(3, 0), Head(3, 2)), vlm.geometry)
    plain = first_logits(vlm, inputs)
    other = copy.deepcopy(vlm)
    weight = other.attentions[3].o_proj.weight
    for _, head in chosen:
        weight.data.view(len(weight), 4, -1)[:, head] = 0
    expected = first_logits(other, inputs)
    with ablate(vlm, chosen, when="prefill"):
        torch.testing.assert_close(first_logits(vlm, inputs), expected, atol=1e-4, rtol=1e-4)
    with ablate(vlm, chosen, when="decode"):
        torch.testing.assert_close(first_logits(vlm, inputs), plain, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(plain, expected, atol=1e-2)


def test_window_heads_of_layers_that_share_keys_equal_a_mask_and_their_keys_stay():
    vlm, inputs = shared_keys()
    dense = HeadSet((Head(3, 1),), vlm.geometry)
    with masked(vlm, dense, 2, 5):
        expected = first_logits(vlm, inputs)
    with stream(vlm, dense, 2, 5) as streaming:
        torch.testing.assert_close(first_logits(vlm, inputs), expected, atol=1e-4, rtol=1e-4)
        with pytest.raises(ValueError, match="attend to the keys of earlier layers"):
            streaming.cache()


def test_masks_of_another_kind_are_refused_by_name():
    case = given_tokens("molmo2", "words")
    vlm = case.vlm

    def change(mask):
        def hook(module, args, kwargs):
            return args, {**kwargs, "attention_mask": mask(kwargs["attention_mask"])}

        return vlm.decoder.register_forward_pre_hook(hook, with_kwargs=True)

    for mask, message in (
        (lambda mask: mask[0], r"mask of shape \(1, 18, 18\)"),
        (lambda mask: {"full_attention": "causal"}, "mask of full attention of the kind str"),
        (lambda mask: torch.tensor([[0] + [1] * 17]), r"mask of shape \(1, 18\)"),
    ):
        handle = change(mask)
        with pytest.raises(ValueError, match=message):
            prefill(vlm, case.prompt)
        handle.remove()


def test_a_decoder_keyword_that_is_not_known_is_refused_by_name():
    case = given_tokens("gemma4", "words")

    def hook(module, args, kwargs):
        return args, {**kwargs, "vision_mask": torch.ones(1, 18)}

    case.vlm.decoder.register_forward_pre_hook(hook, with_kwargs=True)
    with pytest.raises(ValueError, match="decoder of gemma4 takes vision_mask, which is not known"):
        prefill(case.vlm, case.prompt)


@pytest.mark.parametrize(("change", "named"), [("words", "inputs_embeds"), ("+1", "position_ids")])
def test_a_family_that_makes_its_inputs_otherwise_is_refused(change, named):
    case = given_tokens("gemma4", "words")

    def hook(module, args, kwargs):
        positions = torch.arange(kwargs["inputs_embeds"].shape[1])[None] + (change == "+1")
        scale = 2 if change == "words" else 1
        embeds = kwargs["inputs_embeds"] * scale
        return args, {**kwargs, "position_ids": positions, "inputs_embeds": embeds}

    case.vlm.decoder.register_forward_pre_hook(hook, with_kwargs=True)
    with pytest.raises(ValueError, match=f"the model gemma4 makes {named} in a way"):
        prefill(case.vlm, case.prompt)


def test_kv_groups_are_those_of_the_global_layers():
    geometry = given_tokens("gemma4 with fewer global KV heads", "words").vlm.geometry
    assert (geometry.layers, geometry.heads, geometry.kv_groups) == (4, 4, 1)
    assert geometry.global_layers == (1, 3)
    assert given_tokens("gemma4", "words").vlm.geometry.kv_groups == 2
