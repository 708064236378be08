"""Whether a model gives through our inputs, our cache and our recording what it gives by itself."""

import inspect
from collections.abc import Callable

import example_prompts
import numpy as np
import torch

from mmheads import decoder
from mmheads.attention import record_mass
from mmheads.examples import Example
from mmheads.models import VLM
from mmheads.prefix import prefill
from mmheads.prompts import Prompt, Question, Span

TOKENS = [3, 50, *[60] * 3, 4, 51, *[60] * 3, 5, 6, 7, 8]
"""Words, an image, words, an image and words; the questions follow."""

QUESTIONS = {"words": ([9, 10, 11, 12], [13, 14]), "images": ([9, 60, 60, 10], [11, 60, 60, 12])}


def token_prompt(vlm: VLM, questions: str = "words") -> Prompt:
    """A prompt of tokens with two questions, in words or with images; images have no pixels."""
    context = [20 if vlm.is_text_only and token == 60 else token for token in TOKENS]
    taken = inspect.signature(vlm.model.forward).parameters

    def question(tokens: list[int]) -> Question:
        ids = torch.tensor([context + tokens])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "mm_token_type_ids" in taken:
            inputs["mm_token_type_ids"] = torch.from_numpy(vlm.is_visual(ids)).long()
        if "moe_mm_token_type_ids" in taken:
            inputs["moe_mm_token_type_ids"] = torch.zeros_like(ids)
        if "token_type_ids" in taken and vlm.family.startswith("paligemma"):
            inputs["token_type_ids"] = torch.zeros_like(ids)
        elif "token_type_ids" in taken:
            inputs["token_type_ids"] = torch.from_numpy(vlm.is_visual(ids)).long()
        return Question(
            parts=(),
            inputs=inputs,
            tokens=np.arange(len(context), ids.shape[1]),
            start=len(context),
            context=(Span(np.arange(1, len(context)), np.ones(len(context) - 1, np.float32)),),
            evidence=(Span(np.arange(2, 5), np.ones(3, np.float32)),),
        )

    first, second = QUESTIONS[questions]
    return Prompt(
        example=Example(context=(), question=()),
        questions=(question(first), question(second)),
        shared=len(context),
        candidates={},
        boxes={},
        replacements=(),
    )


@torch.no_grad()
def hidden(vlm: VLM, run: Callable[[], object]) -> torch.Tensor:
    """[token, channel] what the decoder gives in a call."""
    outputs = []
    handle = vlm.decoder.register_forward_hook(
        lambda module, args, output: outputs.append(output[0][0])
    )
    try:
        run()
    finally:
        handle.remove()
    return outputs[0]


def whole(vlm: VLM, question: Question) -> torch.Tensor:
    return hidden(vlm, lambda: vlm.model(**question.inputs, use_cache=False))


def eager_masses(vlm: VLM, question: Question, spans: list[np.ndarray]) -> torch.Tensor:
    """[layer, head, question token, span] from the model's own attention maps."""
    weights = torch.from_numpy(np.stack(spans, axis=-1))
    return example_prompts.eager_attention(vlm, question).float() @ weights


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    scale = max(1, float(expected.abs().max()))
    torch.testing.assert_close(found, expected, atol=5e-6 * scale, rtol=1e-4)


def check(vlm: VLM, prompt: Prompt, rtol: float = 0.0) -> bool:
    """Assert that every number is exact -> whether the context is cached.

    One call through our inputs, cached questions, masses, attention by key, and logits while
    masses are recorded are compared with full passes of the model, on its own eager attention.

    Args:
        vlm: The model.
        prompt: With its questions.
        rtol: Relative difference of masses that is allowed besides 1e-5.
    """
    own = prompt.own
    inputs = decoder.catch(vlm, own.inputs)
    once = hidden(vlm, lambda: vlm.decoder(**inputs.call(0, len(own)), use_cache=False))
    assert torch.equal(once, whole(vlm, own)), "one call through our inputs"

    prefix = prefill(vlm, prompt)
    cached = prefix.cache is not None
    for question in prompt.questions:
        first, run = prefix._ready(question, pixels=True)
        assert first == (prompt.shared if cached else 0)
        close(hidden(vlm, run), whole(vlm, question)[first:])
        spans = [question.weights(question.evidence), question.weights(question.context)]
        attention = prefix.attention(question, spans)
        expected = eager_masses(vlm, question, spans)
        torch.testing.assert_close(attention.mass, expected, atol=1e-5, rtol=rtol)
        keys = prefix.keys(question, vlm.every_head)
        means = np.einsum("hk,ks->hs", keys, np.stack(spans, axis=-1)[: prompt.shared])
        by_head = expected.mean(2)[list(vlm.attentions)].flatten(0, 1).numpy()
        np.testing.assert_allclose(means, by_head, atol=1e-5, rtol=rtol)

    rows, shares = torch.from_numpy(own.tokens)[None], torch.ones(1, len(own), 1)
    with torch.no_grad():
        plain = vlm.model(**own.inputs, use_cache=False).logits
        with record_mass(vlm, rows, shares):
            recorded = vlm.model(**own.inputs, use_cache=False).logits
    assert torch.equal(plain, recorded), "logits keep every bit"
    return cached
