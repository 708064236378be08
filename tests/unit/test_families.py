"""Every family works exactly, or is refused by name: never silently wrong.

Random models of each family, some with their stock processor and some given token ids.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import example_prompts
import numpy as np
import pytest
import random_models
import torch

from mmheads import decoder
from mmheads.attention import record_mass
from mmheads.examples import Example
from mmheads.models import VLM
from mmheads.prefix import Prefix, prefill
from mmheads.prompts import Prompt, Question, Span, encode, null_question
from mmheads.scoring import score_heads
from mmheads.tasks import needles

WHOLE_PASSES = {"paligemma", "paligemma2", "molmo2, images in the question"}
"""Tokens of the context see the question: nothing is cached, each question runs the prompt."""

REFUSED = {
    "lfm2": "has no attention layer with an `o_proj`",
}

TOKENS = [3, 50, *[60] * 3, 4, 51, *[60] * 3, 5, 6, 7, 8]
"""Words, an image, words, an image and words; the questions follow."""

QUESTIONS = {"words": ([9, 10, 11, 12], [13, 14]), "images": ([9, 60, 60, 10], [11, 60, 60, 12])}


@dataclass(frozen=True)
class Case:
    """A model and a prompt with two questions."""

    vlm: VLM
    prompt: Prompt


def given_tokens(name: str, questions: str) -> Case:
    """A model of `TOKEN_MODELS` with a prompt made of tokens."""
    model = random_models.token_model(name)
    tokenizer = random_models.build("qwen3")[1]
    vlm = VLM(model=model, processor=tokenizer, model_id=name)
    context = TOKENS if not vlm.is_text_only else [t if t != 60 else 20 for t in TOKENS]

    def question(tokens: list[int]) -> Question:
        ids = torch.tensor([context + tokens])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if not vlm.is_text_only:
            prefix_lm = name.startswith("paligemma")
            kinds = torch.zeros_like(ids) if prefix_lm else (ids == 60).long()
            inputs["token_type_ids" if prefix_lm else "mm_token_type_ids"] = kinds
        return Question(
            parts=(),
            inputs=inputs,
            tokens=np.arange(len(context), ids.shape[1]),
            start=len(context),
            context=(Span(np.arange(1, len(context)), np.ones(len(context) - 1, np.float32)),),
            evidence=(Span(np.arange(2, 5), np.ones(3, np.float32)),),
        )

    first, second = QUESTIONS["words" if vlm.is_text_only else questions]
    return Case(
        vlm,
        Prompt(
            example=Example(context=(), question=()),
            questions=(question(first), question(second)),
            shared=len(context),
            candidates={},
            boxes={},
            replacements=(),
        ),
    )


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


@torch.no_grad()
def hidden(vlm: VLM, run: Callable[[], object]) -> torch.Tensor:
    """[token, channel] what the decoder gives in a call."""
    outputs = []
    handle = vlm.decoder.register_forward_hook(
        lambda module, args, output: outputs.append(output.last_hidden_state[0])
    )
    try:
        run()
    finally:
        handle.remove()
    return outputs[0]


def body(vlm: VLM) -> torch.nn.Module:
    return vlm.model.model


def whole(vlm: VLM, question: Question) -> torch.Tensor:
    return hidden(vlm, lambda: body(vlm)(**question.inputs, use_cache=False))


def eager_masses(vlm: VLM, question: Question, spans: list[np.ndarray]) -> torch.Tensor:
    """[layer, head, question token, span] from the model's own attention maps."""
    weights = torch.from_numpy(np.stack(spans, axis=-1))
    return example_prompts.eager_attention(vlm, question) @ weights


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, atol=5e-6 * max(1, scale), rtol=1e-4)


@pytest.mark.parametrize(("build", "name", "questions"), list(cases()))
def test_a_family_is_exact_or_refused_by_name(build, name, questions):
    if name in REFUSED:
        case = build(name, questions)
        with pytest.raises(ValueError, match=REFUSED[name]):
            prefill(case.vlm, case.prompt)
        return
    case = build(name, questions)
    vlm, prompt = case.vlm, case.prompt
    own = prompt.own

    inputs = decoder.catch(vlm, own.inputs)
    once = hidden(vlm, lambda: vlm.decoder(**inputs.call(0, len(own)), use_cache=False))
    assert torch.equal(once, whole(vlm, own)), "one call through our inputs"

    prefix: Prefix = prefill(vlm, prompt)
    in_whole = {name, f"{name}, {questions} in the question"} & WHOLE_PASSES
    assert (prefix.cache is None) == bool(in_whole)
    for question in prompt.questions:
        first, run = prefix._ready(question, pixels=True)
        assert first == (0 if in_whole else prompt.shared)
        close(hidden(vlm, run), whole(vlm, question)[first:])
        spans = [question.weights(question.evidence), question.weights(question.context)]
        attention = prefix.attention(question, spans)
        expected = eager_masses(vlm, question, spans)
        torch.testing.assert_close(attention.mass, expected, atol=1e-5, rtol=0)
        keys = prefix.keys(question, vlm.every_head)
        means = np.einsum("hk,ks->hs", keys, np.stack(spans, axis=-1)[: prompt.shared])
        by_head = expected.mean(2)[list(vlm.attentions)].flatten(0, 1).numpy()
        np.testing.assert_allclose(means, by_head, atol=1e-5)

    rows, shares = torch.from_numpy(own.tokens)[None], torch.ones(1, len(own), 1)
    with torch.no_grad():
        plain = vlm.model(**own.inputs, use_cache=False).logits
        with record_mass(vlm, rows, shares):
            recorded = vlm.model(**own.inputs, use_cache=False).logits
    assert torch.equal(plain, recorded), "logits keep every bit"


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
    examples = needles.generate(needles.TASKS, [128], [0.4], pairs=1)
    scores = score_heads(vlm, examples, progress=False)
    assert len(scores.values) == len(needles.TASKS)
    assert not scores.values[:, [0, 2]].any()
    assert (scores.quantities["raw"][:, [1, 3]] > 0).all()
    assert {head.layer for head in scores.top(0.25)} <= {1, 3}
    assert len(scores.top(0.25)) == 4, "a quarter of the 16 heads that there are"


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
