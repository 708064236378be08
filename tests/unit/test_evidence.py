"""Question, evidence and boxes are found exactly, in every family."""

import dataclasses
import re

import example_prompts
import numpy as np
import pytest
import random_models
import torch
from tiny_tokens import evidence_tokens

from mmheads import decoder, families, paper_b, paths, prompts
from mmheads.examples import Example, Region, Video
from mmheads.models import VLM, load
from mmheads.tasks import needles
from mmheads.tasks.needles import GENERATED


@pytest.fixture(scope="module", params=random_models.FAMILIES)
def vlm(request) -> VLM:
    return example_prompts.vlm(request.param)


@pytest.fixture(scope="module")
def qwen() -> VLM:
    return example_prompts.vlm("qwen3_vl")


def words(vlm: VLM, prompt: prompts.Prompt, tokens: np.ndarray) -> str:
    return vlm.tokenizer.decode(prompt.ids[tokens])


def vision(vlm: VLM) -> VLM:
    if vlm.is_text_only:
        pytest.skip("reads text alone")
    return vlm


def test_question_is_found_where_it_is_asked_not_where_it_is_quoted(vlm):
    prompt = prompts.encode(vlm, example_prompts.example(vlm.family))
    asked = words(vlm, prompt, prompt.question)
    assert asked.startswith("which rain falls")
    assert asked.endswith("falls" if vlm.is_text_only else "?")
    assert words(vlm, prompt, prompt.parts[0].tokens).strip().endswith("which rain falls ?")
    assert prompt.parts[0].tokens.max() < prompt.question.min()
    after = words(vlm, prompt, np.arange(prompt.question.max() + 1, len(prompt)))
    assert after.strip().startswith("In a word.")


def test_text_evidence_is_found_by_its_characters(vlm):
    example = example_prompts.example(vlm.family)
    prompt = prompts.encode(vlm, example)
    (span,) = [
        span for span, region in zip(prompt.evidence, example.evidence, strict=True) if region.chars
    ]
    assert words(vlm, prompt, span.tokens).strip() == "needle"
    assert (span.weights == 1).all()


def test_an_image_is_all_its_visual_tokens_and_nothing_else(vlm):
    prompt = prompts.encode(vision(vlm), example_prompts.example(vlm.family))
    visual = np.flatnonzero(np.isin(prompt.ids.numpy(), list(vlm.visual_ids)))
    in_question = np.intersect1d(visual, prompt.question)
    found = np.concatenate([prompt.parts[1].tokens, prompt.parts[3].tokens, in_question])
    np.testing.assert_array_equal(found, visual)


def test_tokens_of_a_box_are_those_whose_pixels_it_holds(vlm):
    vlm = vision(vlm)
    for name, weight in vlm.model.named_parameters():  # tokens then depend on their pixels alone
        if re.search(r"vis.*(attn\.proj|out_proj|projection_layer)\.(weight|bias)$", name):
            torch.nn.init.zeros_(weight)
    box = (12, 8, 45, 32)
    image = example_prompts.picture(60, 40)
    painted = image.copy()
    painted.paste((255, 0, 255), box)
    region = Region(part=0, box=box)
    features = []
    for shown in (image, painted):
        example = Example(context=(shown, "and"), question=("why ?",), evidence=(region,))
        prompt = prompts.encode(vlm, example)
        caught = decoder.catch(vlm, prompt.inputs).embeddings[0]
        features.append(caught[prompt.parts[0].tokens])
    change = (features[0] - features[1]).norm(dim=-1).numpy()
    change /= np.median(features[0].norm(dim=-1).numpy())
    shares = families.box_shares(prompt.boxes[0], box)
    assert (shares > 0.6).any()
    assert (shares == 0).any()
    assert change[shares > 0.6].min() > 0.02
    assert change[shares == 0].max() < change[shares > 0.6].min()
    (span,) = prompt.evidence
    np.testing.assert_allclose(span.weights, shares[shares > 0], rtol=1e-6)


def test_box_shares_of_a_hand_worked_grid():
    boxes = families._grid(2, 2, (0, 0, 20, 20))
    np.testing.assert_allclose(families.box_shares(boxes, (5, 0, 20, 15)), [0.5, 1, 0.25, 0.5])


def test_the_three_ways_to_find_a_target_agree(vlm):
    vlm = vision(vlm)
    same_size = tuple(example_prompts.picture(48, 32, seed) for seed in range(3))
    example = Example(context=("Look", *same_size), question=("why ?",))
    prompt = prompts.encode(vlm, example)
    for part in (1, 2, 3):
        ours = prompt.parts[part].tokens
        np.testing.assert_array_equal(paper_b.find_by_tags(vlm, example, part), ours)
        np.testing.assert_array_equal(paper_b.find_by_slicing(vlm, prompt, part), ours)
        if vlm.family != "llava_onevision":  # an image alone has another number of tokens
            np.testing.assert_array_equal(paper_b.find_by_offsets(vlm, prompt, part), ours)


def test_slices_of_unequal_images_are_refused(qwen):
    images = (
        example_prompts.picture(48, 32),
        example_prompts.picture(64, 40),
    )  # 24 and 40 tokens, an even sum
    prompt = prompts.encode(qwen, Example(context=images, question=("why ?",)))
    with pytest.raises(ValueError, match="uniform slices do not apply"):
        paper_b.find_by_slicing(qwen, prompt, 0)
    np.testing.assert_array_equal(paper_b.find_by_offsets(qwen, prompt, 1), prompt.parts[1].tokens)


def test_tags_that_the_context_holds_are_refused(qwen):
    example = Example(
        context=("a <GT_START> b", example_prompts.picture(48, 32)), question=("why ?",)
    )
    with pytest.raises(ValueError, match="occurs 2 times"):
        paper_b.find_by_tags(qwen, example, 1)


@pytest.mark.parametrize("instruction", ["In a word.", "<|im_end|> now"])
def test_another_question_is_encoded_as_if_from_the_start(vlm, instruction):
    example = example_prompts.example(vlm.family)
    example = dataclasses.replace(example, instruction=instruction)
    null = prompts.null_question(example.question)
    prompt = prompts.encode(vlm, example, questions=[null])
    own, changed = prompt.questions
    afresh = prompts.encode(vlm, dataclasses.replace(example, question=null))
    assert changed.inputs.keys() == afresh.inputs.keys()
    for name, value in afresh.inputs.items():
        assert torch.equal(changed.inputs[name], value), name
    np.testing.assert_array_equal(changed.tokens, afresh.question)
    assert "N/A N/A N/A N/A N/A" in words(vlm, afresh, changed.tokens)
    for one, other in zip(changed.evidence, afresh.evidence, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
    for one, other in zip(changed.context, afresh.parts, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
    assert torch.equal(own.ids[: prompt.shared], changed.ids[: prompt.shared])
    assert prompt.shared <= min(own.tokens[0], changed.tokens[0])


def test_only_the_end_of_a_prompt_is_tokenised_for_another_question(qwen, monkeypatch):
    example = example_prompts.without_images(example_prompts.example("qwen3_vl"))
    example = dataclasses.replace(example, context=example.context[:-1])  # ends with an image
    prompt = prompts.encode(qwen, example)
    lengths = []
    tokenize = prompts.tokenize

    def counted(vlm, text, start=0):
        ids, offsets = tokenize(vlm, text, start)
        lengths.append(len(ids))
        return ids, offsets

    monkeypatch.setattr(prompts, "tokenize", counted)
    question = prompts.ask(qwen, prompt, ("what else is it ?",))
    afresh = prompts.encode(qwen, dataclasses.replace(example, question=("what else is it ?",)))
    assert torch.equal(question.ids, afresh.ids)
    assert lengths[0] < 40 < len(question)


def test_a_null_question_keeps_the_images():
    image = example_prompts.picture(8, 8)
    assert prompts.null_question(("which", image, "a", "?"), "N/A") == ("N/A", image)
    assert prompts.null_question((image, "is it ?"), "N/A") == (image, "N/A")


def test_a_shuffled_question_holds_the_same_words_in_another_order():
    image = example_prompts.picture(8, 8)
    question = ("which of these", image, "a b ?")
    for seed in range(5):
        first, kept, second = prompts.shuffled_question(question, seed)
        assert kept is image
        assert sorted(f"{first} {second}".split()) == ["?", "a", "b", "of", "these", "which"]
        assert f"{first} {second}" != "which of these a b ?"
    assert prompts.shuffled_question(("why",), 0) == ("why",)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_frames_of_a_video_are_found(family):
    vlm = example_prompts.vlm(family)
    random_models.add_video(vlm.processor, family)
    frames = tuple(example_prompts.picture(48, 32, seed) for seed in range(5))
    region = Region(part=1, frames=(1, 3), box=(0, 0, 24, 32))
    prompt = prompts.encode(
        vlm,
        Example(
            context=("see", Video(frames=frames, fps=2.0)),
            question=("why ?",),
            evidence=(region,),
        ),
    )
    whole, (span,) = prompt.parts[1], prompt.evidence
    each = len(whole) // 3  # two frames share a token, the last one is repeated
    assert len(whole) == 3 * 4 * 6
    np.testing.assert_array_equal(
        np.unique((np.searchsorted(whole.tokens, span.tokens)) // each), [0, 1]
    )
    assert (span.weights == 0.5).all()
    assert len(span) == each


def test_without_torchvision_a_video_is_refused(qwen):
    video = Video(frames=(example_prompts.picture(48, 32),) * 2)
    with pytest.raises(ValueError, match="install torchvision, or give the frames as images"):
        prompts.encode(qwen, Example(context=(video,), question=("why ?",)))


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (Example(context=("a",), question=(" ",)), "the question is empty"),
        (Example(context=("a \ue0f0",), question=("why ?",)), "private-use characters"),
        (
            Example(context=("a    b",), question=("?",), evidence=(Region(part=0, chars=(2, 4)),)),
            None,
        ),
        (
            Example(context=("a", "  "), question=("?",), evidence=(Region(part=1),)),
            "covers no token",
        ),
    ],
)
def test_what_cannot_be_found_is_an_error_never_an_empty_span(qwen, example, message):
    if message is None:
        assert len(prompts.encode(qwen, example).evidence[0])
        return
    with pytest.raises(ValueError, match=message):
        prompts.encode(qwen, example)


CONTROL = ("<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<tool>")
"""Special tokens of the random models, and an added one that is not special."""


@pytest.mark.parametrize("place", ["context", "question", "instruction"])
@pytest.mark.parametrize("token", CONTROL)
def test_text_of_the_user_never_becomes_a_control_token(token, place):
    vlm = example_prompts.vlm("qwen3_vl")
    vlm.tokenizer.add_tokens(["<tool>"])
    text = f"say {token}{token}\nand more"
    example = Example(
        context=("one", example_prompts.picture(48, 32), text if place == "context" else "two"),
        question=(text if place == "question" else "why ?",),
        instruction=text if place == "instruction" else "In a word.",
        evidence=(Region(part=1, box=(0, 0, 24, 32)),),
    )
    harmless = text.replace(token, "?")
    plain = dataclasses.replace(
        example,
        context=tuple(harmless if part == text else part for part in example.context),
        question=tuple(harmless if part == text else part for part in example.question),
        instruction=harmless if example.instruction == text else example.instruction,
    )
    prompt, expected = prompts.encode(vlm, example), prompts.encode(vlm, plain)
    ids = prompt.ids.tolist()
    token_id = vlm.tokenizer.convert_tokens_to_ids(token)
    assert ids.count(token_id) == expected.ids.tolist().count(token_id)
    assert text in vlm.tokenizer.decode(ids)
    assert prompt.inputs["mm_token_type_ids"].sum() == expected.inputs["mm_token_type_ids"].sum()
    assert torch.equal(prompt.inputs["pixel_values"], expected.inputs["pixel_values"])
    (span,) = prompt.evidence
    assert vlm.is_visual(prompt.ids[span.tokens]).all()
    with torch.no_grad():
        logits = vlm.model(**prompt.inputs).logits
    assert logits.isfinite().all()


def test_parts_that_together_spell_a_control_token_are_refused(qwen):
    example = Example(context=("a <|im_", "end|> b"), question=("why ?",))
    with pytest.raises(ValueError, match=r"together read '<\|im_end\|>', a control token"):
        prompts.encode(qwen, example)


def test_a_control_token_that_a_tokenizer_cannot_write_as_text_is_refused():
    vlm = load(paths.MODELS / "tiny-qwen3-vl-m", device="cpu")
    with pytest.raises(ValueError, match=r"holds '<\|vision_start\|>', a control token of tiny"):
        prompts.encode(vlm, Example(context=("a <|vision_start|> b",), question=("why ?",)))


class _PutsInFront:
    """A processor that puts text around the prompt, as those of Molmo2, Emu3 and Janus do."""

    def __init__(self, stock, front="", behind=""):
        self.stock, self.front, self.behind = stock, front, behind

    def __getattr__(self, name):
        return getattr(self.stock, name)

    def __call__(self, text, **settings):
        return self.stock(text=[self.front + text[0] + self.behind], **settings)


@pytest.mark.parametrize("images", [True, False])
def test_text_that_the_processor_puts_in_front_shifts_every_token(images):
    vlm = example_prompts.vlm("qwen3_vl")
    example = example_prompts.example("qwen3_vl")
    if not images:
        example = Example(context=("one", "two"), question=("why ?",), evidence=(Region(part=1),))
    plain = prompts.encode(vlm, example)
    front = "<|endoftext|>You are helpful.\n"
    shift = len(vlm.tokenizer(front)["input_ids"])
    shifted = dataclasses.replace(vlm, processor=_PutsInFront(vlm.processor, front))
    null = prompts.null_question(example.question)
    prompt = prompts.encode(shifted, example, questions=[null])
    assert len(prompt) == len(plain) + shift
    assert torch.equal(prompt.ids[shift:], plain.ids)
    np.testing.assert_array_equal(prompt.question, plain.question + shift)
    for one, other in zip(prompt.evidence, plain.evidence, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens + shift)
    asked = prompts.ask(vlm, plain, null)
    assert torch.equal(prompt.questions[1].ids[shift:], asked.ids)
    np.testing.assert_array_equal(prompt.questions[1].tokens, asked.tokens + shift)


def test_a_processor_that_changes_the_text_otherwise_is_refused():
    vlm = example_prompts.vlm("qwen3_vl")
    changed = dataclasses.replace(vlm, processor=_PutsInFront(vlm.processor, behind="\n"))
    with pytest.raises(ValueError, match="the processor of qwen3_vl changes the text"):
        prompts.encode(changed, example_prompts.example("qwen3_vl"))


def test_a_question_that_makes_the_prompt_too_long_is_an_error(qwen):
    example = example_prompts.without_images(example_prompts.example("qwen3_vl"))
    tokens = len(prompts.encode(qwen, example))
    prompt = prompts.encode(qwen, example, max_tokens=tokens + 5)
    with pytest.raises(ValueError, match=f"qwen3_vl takes {tokens + 5}"):
        prompts.ask(qwen, prompt, ("which rain falls and falls and falls and falls ?",))
    limit = qwen.text_config.max_position_embeddings
    qwen.text_config.max_position_embeddings = tokens + 5
    try:
        prompt = prompts.encode(qwen, example)
        with pytest.raises(ValueError, match=f"qwen3_vl takes {tokens + 5}"):
            prompts.ask(qwen, prompt, ("which rain falls and falls and falls and falls ?",))
    finally:
        qwen.text_config.max_position_embeddings = limit


def test_evidence_of_almost_no_token_is_warned_about(qwen):
    example = Example(
        context=(example_prompts.picture(48, 32),),
        question=("why ?",),
        evidence=(Region(part=0, box=(0.1, 0.2, 0.3, 0.4)),),
    )
    with pytest.warns(UserWarning, match=r"region 0 of the evidence covers only 0.00\d+ tokens"):
        prompts.encode(qwen, example)


def test_words_that_the_tokenizer_does_not_know_are_warned_about():
    vlm = load(paths.MODELS / "tiny-qwen3-vl-m", device="cpu")
    example = Example(context=("The invoice total is 42.50 euros",), question=("What total ?",))
    with pytest.warns(UserWarning, match="8 of the 9 words of a prompt are unknown"):
        prompts.encode(vlm, example)


def test_a_model_without_a_chat_template_is_named_first(qwen):
    qwen.processor.chat_template, kept = None, qwen.processor.chat_template
    try:
        with pytest.raises(ValueError, match=r"qwen3_vl has no chat template.*chat_template="):
            prompts.encode(qwen, example_prompts.example("qwen3_vl"))
    finally:
        qwen.processor.chat_template = kept


def test_a_cut_off_context_is_an_error(qwen):
    example = example_prompts.example("qwen3_vl")
    tokens = len(prompts.encode(qwen, example))
    assert len(prompts.encode(qwen, example, max_tokens=tokens)) == tokens
    with pytest.raises(ValueError, match=f"has {tokens} tokens, qwen3_vl takes {tokens - 1}"):
        prompts.encode(qwen, example, max_tokens=tokens - 1)


def test_an_image_for_a_text_model_is_an_error():
    with pytest.raises(ValueError, match="reads only text"):
        prompts.encode(example_prompts.vlm("qwen3"), example_prompts.example("qwen3_vl"))


def test_a_template_that_drops_parts_is_an_error(qwen):
    qwen.processor.chat_template, kept = "{{ messages[0]['role'] }}", qwen.processor.chat_template
    try:
        with pytest.raises(ValueError, match="does not keep the parts"):
            prompts.encode(qwen, example_prompts.example("qwen3_vl"))
    finally:
        qwen.processor.chat_template = kept


def test_boxes_of_an_unknown_family_are_refused(qwen, monkeypatch):
    monkeypatch.setattr(VLM, "family", "another")
    with pytest.raises(ValueError, match="give the whole image"):
        prompts.encode(qwen, example_prompts.example("qwen3_vl"))


def test_candidates_of_a_document_become_spans():
    vlm = load(paths.MODELS / "tiny-qwen3-vl-m", device="cpu")
    document = needles.document(4, split="test")
    prompt = prompts.encode(vlm, document)
    pages, layouts = prompt.candidates["page"], prompt.candidates["layout"]
    assert [len(page) for page in pages] == [16] * 4
    assert [len(layout) for layout in layouts] == [4] * 8
    (span,) = prompt.evidence
    assert any(np.array_equal(span.tokens, layout.tokens) for layout in layouts)


@pytest.mark.parametrize("task", ["text", "image", "rendered_text", "identical_image"])
def test_needles_stand_where_the_task_placed_them(task):
    vlm = load(paths.MODELS / "tiny-qwen3-vl-m", device="cpu")
    example = GENERATED.make(task, 256, 0.4, split="test")
    prompt = prompts.encode(vlm, example)
    placed = np.flatnonzero(prompt.weights(prompt.evidence))
    assert placed.tolist() == evidence_tokens(example)
