"""Natural-language needles: exact evidence in every family, lengths, depths, splits, answers."""

import dataclasses
from pathlib import Path

import example_prompts
import numpy as np
import pytest
import random_models
from PIL import Image

from mmheads import families, prompts
from mmheads.tasks import corpus, inventions, natural_needles
from mmheads.tasks.grids import DEPTHS, SPLITS, TASKS
from mmheads.tasks.natural_needles import NaturalNeedles
from mmheads.tasks.rendered_pages import PageStyle, draw_strip

STYLE = PageStyle(width=200, height=260, margin=8, font_size=9, picture=24)
FEW = corpus.Source("few", corpus.shipped().paragraphs[:40])


def rough_count(example) -> int:
    """A counter without a model: words and pages."""
    return sum(len(p.split()) if isinstance(p, str) else 100 for p in example.parts())


def rough(**settings) -> NaturalNeedles:
    return NaturalNeedles(FEW, rough_count, style=STYLE, **settings)


def of(vlm, **settings) -> NaturalNeedles:
    made = natural_needles.for_model(vlm, style=STYLE, **settings)
    return dataclasses.replace(made, source=FEW)


@pytest.fixture(scope="module", params=random_models.FAMILIES)
def vlm(request):
    return example_prompts.vlm(request.param)


def pictures(parts) -> list[Image.Image]:
    return [part for part in parts if isinstance(part, Image.Image)]


def test_evidence_is_exact_in_every_family(vlm):
    needles = of(vlm)
    for task in needles.tasks:
        for depth in (0, 1):
            example = needles.make(task, 1500, depth, haystack=1)
            prompt = prompts.encode(vlm, example)
            (region,), (span,) = example.evidence, prompt.evidence
            fact = inventions.fact(1, "detection")
            if task == "text":
                decoded = vlm.tokenizer.decode(prompt.ids[span.tokens])
                assert decoded.strip() == fact.sentence
                continue
            boxes = prompt.boxes[region.part]
            left, top, right, bottom = region.box
            widths = np.minimum(boxes[:, 2], right) - np.maximum(boxes[:, 0], left)
            heights = np.minimum(boxes[:, 3], bottom) - np.maximum(boxes[:, 1], top)
            inside = np.nan_to_num(np.clip(widths, 0, None) * np.clip(heights, 0, None))
            assert inside.sum() >= 0.99 * (right - left) * (bottom - top)
            shares = families.box_shares(boxes, region.box)
            tokens = prompt.parts[region.part].tokens
            np.testing.assert_array_equal(span.tokens, tokens[shares > 0])
            shown = example.context[region.part].crop(region.box)
            if task == "rendered_text":
                expected = draw_strip(fact.sentence, STYLE)
            else:
                options = dict(zip("ABCD", pictures(example.question), strict=False))
                expected = options["A" if task == "identical_image" else example.answer]
            np.testing.assert_array_equal(np.asarray(shown), np.asarray(expected))


def test_prompts_are_as_long_as_whole_sentences_and_pages_allow(vlm):
    needles = of(vlm)
    for task in needles.tasks:
        for length in (1200,):
            tokens = len(prompts.encode(vlm, needles.make(task, length, 0.4, haystack=2)))
            assert length - max(needles._costs.values()) < tokens <= length


def test_a_prompt_of_text_ends_within_one_sentence_of_its_length():
    vlm = example_prompts.vlm("qwen3")
    needles = of(vlm)
    for depth in DEPTHS:
        tokens = len(prompts.encode(vlm, needles.make("text", 3000, depth)))
        longest = max(len(s) for p in FEW.paragraphs for s in p)
        assert 3000 - longest < tokens <= 3000


def test_the_needle_is_at_its_depth():
    needles = rough(image_ratio=0.3)
    for depth in DEPTHS:
        example = needles.make("text", 2000, depth)
        (region,) = example.evidence
        before = example.context[region.part][: region.chars[0]]
        bare = dataclasses.replace(example, evidence=None, question=(), instruction="")
        ahead = rough_count(dataclasses.replace(bare, context=bare.context[: region.part]))
        total = rough_count(bare)
        assert abs((ahead + len(before.split())) / total - depth) < 0.06
    for task in TASKS[1:]:
        parts = [needles.make(task, 2000, depth).evidence[0].part for depth in DEPTHS]
        units = len(needles.make(task, 2000, 0).context) - 1
        assert parts == [round(depth * (units - 1)) for depth in DEPTHS]


def test_the_same_seed_gives_the_same_examples():
    def marks(seed: int) -> list[str]:
        grid = rough(seed=seed).generate((), [600], [0.0, 0.6], 1, both_answers=True)
        return [example.fingerprint() for example in grid]

    assert marks(0) == marks(0)
    assert not set(marks(0)) & set(marks(1))


def test_a_longer_prompt_begins_like_a_shorter_one():
    short, long = (rough(image_ratio=0).make("text", n, 0, haystack=3) for n in (300, 600))
    assert (long.question, long.haystack) == (short.question, short.haystack)
    assert "".join(long.context).startswith("".join(short.context[:-1]).strip())


def test_the_same_text_is_shown_at_every_share_of_pages():
    drawn, told = rough(image_ratio=0.5), rough(image_ratio=0)
    mixed = drawn.make("text", 1200, 0, needle=False).context
    text = told.make("text", 1200, 0, needle=False).context
    assert any(isinstance(part, Image.Image) for part in mixed)
    places = [i for i, part in enumerate(mixed[:-2]) if isinstance(part, str)]
    assert places
    assert [mixed[i] for i in places] == [text[i] for i in places]


def test_haystacks_longer_than_the_source_repeat_it_in_another_order():
    source = corpus.Source("two", FEW.paragraphs[:2])
    needles = dataclasses.replace(rough(image_ratio=0), source=source)
    text = " ".join(needles.make("text", 3000, 0.5).context)
    assert text.count(source.paragraphs[0][0]) > 3


def test_no_invented_thing_is_shared_between_splits():
    used = []
    for split in SPLITS:
        facts = [inventions.fact(number, split) for number in range(300)]
        assert len({fact.thing for fact in facts}) == 300
        shown = {
            picture.tobytes()
            for number in range(10)
            for picture in pictures(
                rough().make("image", 600, 0, haystack=number, split=split).parts()
            )
        }
        used.append({fact.thing for fact in facts} | {fact.answer for fact in facts} | shown)
        assert {fact.kind for fact in facts} == set(inventions.KINDS)
    assert not used[0] & used[1] | used[0] & used[2] | used[1] & used[2]
    words = [
        {f.thing.split()[0] for f in map(inventions.fact, range(300), [s] * 300)} for s in SPLITS
    ]
    assert not words[0] & words[1] | words[0] & words[2] | words[1] & words[2]


def test_every_fact_has_its_answer_once_and_its_thing_in_the_question():
    for number in range(200):
        fact = inventions.fact(number, "test")
        assert fact.sentence.count(fact.answer) == 1
        assert fact.thing in fact.question
        assert fact.thing in fact.sentence
        assert fact.answer not in fact.question
        assert natural_needles.score(f"It is {fact.answer}.", fact.answer) == 1
        other = inventions.other_answer(fact, "test")
        assert natural_needles.score(other, fact.answer) == 0


def test_without_the_needle_only_the_needle_is_gone():
    needles = rough()
    sentence = inventions.fact(5, "detection").sentence
    whole = needles.make("text", 1500, 0.4, haystack=5)
    bare = needles.make("text", 1500, 0.4, haystack=5, needle=False)
    part = whole.evidence[0].part
    assert sentence in whole.context[part]
    assert whole.context[part].replace(sentence, "").split() == bare.context[part].split()
    assert whole.context[:part] + whole.context[part + 1 :] == (
        bare.context[:part] + bare.context[part + 1 :]
    )
    assert bare.evidence is None
    for task in TASKS[1:]:
        whole = needles.make(task, 1500, 0.4, haystack=5)
        bare = needles.make(task, 1500, 0.4, haystack=5, needle=False)
        pairs = zip(whole.context, bare.context, strict=True)
        assert [i for i, (a, b) in enumerate(pairs) if a != b] == [whole.evidence[0].part]
        assert (bare.evidence, bare.depth, bare.haystack) == (None, whole.depth, whole.haystack)
        assert bare.answer == ("no" if task == "identical_image" else whole.answer)


def test_a_changed_answer_changes_only_the_needle():
    needles = rough()
    for task in ("text", "rendered_text"):
        value = needles.another_answer(2)
        own, other = (
            needles.make(task, 1500, 0.6, haystack=2, answer=answer) for answer in (None, value)
        )
        assert other.answer == value != own.answer
        pairs = zip(own.context, other.context, strict=True)
        assert [i for i, (a, b) in enumerate(pairs) if a != b] == [own.evidence[0].part]
    for letter in natural_needles.OPTIONS:
        example = needles.make("image", 1500, 0.6, haystack=2, answer=letter)
        (region,) = example.evidence
        shown = example.context[region.part].crop(region.box)
        options = pictures(example.question)
        assert [shown.tobytes() == option.tobytes() for option in options] == [
            letter == each for each in natural_needles.OPTIONS
        ]
        assert (example.answer, example.choices) == (letter, natural_needles.OPTIONS)
    absent = needles.make("identical_image", 1500, 0.6, answer="no")
    assert (absent.answer, absent.evidence) == ("no", None)


def test_yes_and_no_are_crossed_with_depth_and_haystack():
    grid = rough().generate(["identical_image"], [600], DEPTHS, 2, both_answers=True)
    rows = {(e.depth, e.haystack, e.answer, e.evidence is not None) for e in grid}
    assert len(rows) == len(DEPTHS) * 2 * 2
    assert {(answer, present) for _, _, answer, present in rows} == {("yes", True), ("no", False)}


def test_pages_of_a_folder_carry_needles(tmp_path):
    example_prompts.write_pdf(tmp_path / "a.pdf", 2)
    example_prompts.picture(180, 240).save(tmp_path / "b.png")
    needles = dataclasses.replace(rough(), source=corpus.folder(tmp_path))
    for task in TASKS[1:]:
        example = needles.make(task, 1500, 0.6)
        (region,) = example.evidence
        shown = example.context[region.part].crop(region.box)
        sizes = {part.size for part in pictures(example.context)}
        assert sizes <= {(816, 1056), (180, 240), (212, 240)}
        if task == "rendered_text":
            expected = draw_strip(inventions.fact(0, "detection").sentence, STYLE)
            np.testing.assert_array_equal(np.asarray(shown), np.asarray(expected))
        else:
            assert shown.tobytes() in {p.tobytes() for p in pictures(example.question)}


def test_a_model_of_text_has_the_text_task(tmp_path):
    vlm = example_prompts.vlm("qwen3")
    assert of(vlm).tasks == ("text",)
    assert {e.task for e in of(vlm).generate((), [900], [0.2], 1)} == {"text"}
    with pytest.raises(ValueError, match=r"task is 'image'; expected one of \('text',\)"):
        of(vlm).make("image", 900, 0)
    with pytest.raises(ValueError, match=r"image_ratio is 0.5; expected .* reads only text"):
        natural_needles.for_model(vlm, image_ratio=0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "rendered"}, "task is 'rendered'; expected one of"),
        ({"length": 40}, r"length is 40; expected at least \d+ tokens"),
        ({"length": 0}, "length is 0; expected 1 or more"),
        ({"depth": 1.1}, "depth is 1.1; expected a number from 0 to 1"),
        ({"split": "train"}, "split is 'train'; expected one of"),
        ({"haystack": inventions.THINGS}, "haystack is 3072; expected a number from 0 to 3071"),
        ({"answer": "E"}, "answer is 'E'; expected one of"),
        ({"answer": "A", "needle": False}, "answer is 'A'; expected None"),
        ({"task": "text", "answer": " "}, "answer is ' '; expected a text"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    wanted = {"task": "image", "length": 900, "depth": 0.2} | settings
    with pytest.raises(ValueError, match=message):
        rough().make(wanted.pop("task"), wanted.pop("length"), wanted.pop("depth"), **wanted)


def test_a_page_too_small_for_a_sentence_is_named():
    style = PageStyle(width=60, height=60, margin=4, font_size=9, picture=24)
    needles = dataclasses.replace(rough(), style=style)
    with pytest.raises(ValueError, match=r"style is .* expected a page on which a sentence"):
        needles.make("text", 900, 0)


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("The limit is 48,213.", "48213", 1),
        ("148213", "48213", 0),
        ("kx-4417", "KX-4417", 1),
        ("It was March 14, 1987.", "14 March 1987", 1),
        ("14 March 1988", "14 March 1987", 0),
        ("Ada Brockwell was", "Ada Brockwell", 1),
        ("Ada Dunmore", "Ada Brockwell", 0),
        ("The answer is B", "B", 1),
        ("A", "B", 0),
        ("No.", "no", 1),
        ("Yes", "no", 0),
    ],
)
def test_answers_are_checked_by_rule(answer, gold, right):
    assert natural_needles.score(answer, gold) == right


def test_the_name_tells_source_share_and_seed():
    assert rough(image_ratio=0.25, seed=3).name == "natural-few-0.25-3"
    assert Path(rough().name).name == "natural-few-0.5"
    assert rough().count("text", 512) == inventions.THINGS
