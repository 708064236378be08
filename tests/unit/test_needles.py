"""The needle tasks: what an example holds, where its evidence is, and what is refused."""

import itertools
from collections import Counter

import numpy as np
import pytest
from page_reader import cells, sprites
from PIL import Image, ImageChops

from mmheads.examples import Example, Region
from mmheads.tasks import needles
from mmheads.tasks.generated_needles import CONTROL, OPTIONS
from mmheads.tasks.grids import DEPTHS, HAYSTACKS, SPLITS, TASKS
from mmheads.tasks.line_pages import NOUNS, PROSE, VALUES, VERBS
from mmheads.tasks.needles import GENERATED, Needles

ALL = (*TASKS, CONTROL)


def words(example: Example) -> list[str]:
    return " ".join(part for part in example.context if isinstance(part, str)).split()


def crop(example: Example, region: Region) -> Image.Image:
    return example.context[region.part].crop(region.box)


def same(a: Image.Image, b: Image.Image) -> bool:
    return ImageChops.difference(a, b).getbbox() is None


def same_parts(a: tuple, b: tuple) -> bool:
    return len(a) == len(b) and all(
        x == y if isinstance(x, str) or isinstance(y, str) else same(x, y)
        for x, y in zip(a, b, strict=True)
    )


def shown(example: Example) -> Counter[str]:
    """How often each sprite stands on the pages of the context."""
    images = [part for part in example.context if isinstance(part, Image.Image)]
    return Counter(name for image in images for name in cells(image))


@pytest.mark.parametrize("depth", DEPTHS)
def test_text_needle_stands_once_at_its_depth(depth):
    example = GENERATED.make("text", 512, depth, haystack=2)
    (evidence,) = example.evidence
    key = example.question[0].removeprefix("? ")
    first, last = evidence.chars
    assert example.context[evidence.part][first:last] == f"{key} {example.answer} ."
    assert words(example).count(key) == 1
    assert key not in shown(example)
    assert evidence.part == round(depth * (len(example.context) - 1))


@pytest.mark.parametrize("depth", DEPTHS)
def test_rendered_needle_stands_once_in_its_box(depth):
    example = GENERATED.make("rendered_text", 256, depth, haystack=1)
    (evidence,) = example.evidence
    key = example.question[0].removeprefix("? ")
    block = crop(example, evidence)
    assert sprites(block.crop((0, 0, 16, 16))) == {key}
    assert sprites(block.crop((16, 16, 32, 32))) == {example.answer}
    assert shown(example)[key] == 1
    assert key not in words(example)
    assert evidence.part == round(depth * (len(example.context) - 1))


def test_image_question_has_four_options_of_which_one_is_on_a_page():
    for haystack in range(6):
        example = GENERATED.make("image", 256, 0.6, haystack=haystack)
        pictures = [part for part in example.question if isinstance(part, Image.Image)]
        options = [next(iter(sprites(picture))) for picture in pictures]
        assert len(set(options)) == 4
        counts = shown(example)
        right = OPTIONS.index(example.answer)
        assert [counts[icon] for icon in options] == [int(i == right) for i in range(4)]
        (evidence,) = example.evidence
        assert sprites(crop(example, evidence).crop((0, 0, 16, 16))) == {options[right]}


def test_identical_image_is_cut_out_of_the_page():
    example = GENERATED.make("identical_image", 256, 0.2, haystack=4)
    (evidence,) = example.evidence
    assert example.answer == "yes"
    assert same(example.question[1], crop(example, evidence).crop((0, 0, 16, 16)))
    assert shown(example)[key_of(example)] == 1


@pytest.mark.parametrize("task", TASKS)
def test_removing_the_needle_changes_its_record_alone(task):
    whole = GENERATED.make(task, 256, 0.4, haystack=3)
    without = GENERATED.make(task, 256, 0.4, haystack=3, needle=False)
    assert without.evidence is None
    assert without.tokens == ()
    assert same_parts(without.question, whole.question)
    assert without.answer == ("no" if task == "identical_image" else whole.answer)
    (evidence,) = whole.evidence
    for index, (a, b) in enumerate(zip(whole.context, without.context, strict=True)):
        if index != evidence.part:
            assert a == b if isinstance(a, str) else same(a, b)
        elif isinstance(a, str):
            changed = [
                (x, y) for x, y in zip(a.split(" . "), b.split(" . "), strict=True) if x != y
            ]
            assert len(changed) == 1
            assert key_of(whole) in a.split()
            assert key_of(whole) not in b.split()
        else:
            box = ImageChops.difference(a, b).getbbox()
            assert evidence.box[0] <= box[0]
            assert evidence.box[1] <= box[1]
            assert box[2] <= evidence.box[2]
            assert box[3] <= evidence.box[3]


def test_an_answer_can_be_demanded_without_changing_the_question():
    for task, other in (
        ("text", "Q"),
        ("rendered_text", "Q"),
        ("image", "c"),
        ("identical_image", "no"),
    ):
        plain = GENERATED.make(task, 256, 0.4, haystack=5)
        asked = GENERATED.make(task, 256, 0.4, haystack=5, answer=other)
        assert asked.answer == other
        assert same_parts(asked.question, plain.question)
    image = GENERATED.make("image", 256, 0.4, haystack=5, answer="c")
    on_page = sprites(crop(image, image.evidence[0]).crop((0, 0, 16, 16)))
    assert sprites(image.question[5]) == on_page


@pytest.mark.parametrize("task", TASKS)
def test_depths_of_a_haystack_share_units_and_question(task):
    a, b = (GENERATED.make(task, 512, depth, haystack=7) for depth in (0.0, 1.0))
    assert same_parts(a.question, b.question)
    differing = sum(not same_parts((x,), (y,)) for x, y in zip(a.context, b.context, strict=True))
    assert differing <= 4, "the two needles' units, and two that made room for them"


def key_of(example: Example) -> str:
    (evidence,) = example.evidence
    part = example.context[evidence.part]
    if isinstance(part, str):
        return part[slice(*evidence.chars)].split()[0]
    (key,) = sprites(crop(example, evidence).crop((0, 0, 16, 16)))
    return key


@pytest.mark.parametrize("task", TASKS)
def test_haystacks_ask_for_different_keys_and_splits_for_none_of_each_others(task):
    asked = {
        (split, length): [
            key_of(GENERATED.make(task, length, 0.4, haystack=haystack, split=split))
            for haystack in range(HAYSTACKS)
        ]
        for split in SPLITS
        for length in (64, 128)
    }
    assert all(len(set(keys)) == HAYSTACKS for keys in asked.values())
    for (a, _), (b, _) in itertools.combinations(asked, 2):
        if a != b:
            assert not {*asked[a, 64], *asked[a, 128]} & {*asked[b, 64], *asked[b, 128]}


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.4, 1.0])
def test_image_ratio_is_the_share_of_pages(ratio):
    for task in ("text", "image"):
        example = Needles(ratio).make(task, 1024, 0.4)
        found = sum(isinstance(part, Image.Image) for part in example.context)
        wanted = round(ratio * len(example.context))
        assert abs(found - wanted) <= 1
        if 0 < ratio < 1:
            assert found == wanted


def test_text_is_mostly_prose():
    example = Needles(0.0).make("text", 2048, 0.4)
    sentences = " ".join(example.context).split(" .")[:-1]
    prose = [tuple(s.split()) for s in sentences if s.split()[0] in NOUNS]
    assert len(prose) / len(sentences) == pytest.approx(PROSE, abs=0.05)
    assert {verb for _, verb in prose} <= set(VERBS)


def test_same_settings_give_the_same_example():
    a, b = (GENERATED.make("image", 256, 0.4, haystack=2, split="test") for _ in range(2))
    assert a.haystack == b.haystack
    assert same_parts((*a.context, *a.question), (*b.context, *b.question))


def test_control_is_text_alone_and_needs_no_evidence():
    example = GENERATED.make(CONTROL, 256, 0.0)
    assert example.evidence is None
    assert not example.images()
    asked = example.question[0].removeprefix("after ")
    values = VALUES
    assert example.answer == values[(values.index(asked) + 1) % len(values)]


def test_generate_yields_the_grid():
    grid = list(GENERATED.generate(["text"], [128, 256], [0.0, 1.0], 3, split="heldout"))
    assert [(e.length, e.depth) for e in grid] == [
        (length, depth) for length in (128, 256) for depth in (0.0, 1.0) for _ in range(3)
    ]
    assert len({e.haystack for e in grid}) == 6


@pytest.mark.parametrize("question", ["rendered", "icon"])
def test_document_has_pages_and_layouts_to_rank(question):
    example = needles.document(5, question=question, index=2)
    assert [r.part for r in example.candidates["page"]] == list(range(5))
    assert len(example.candidates["layout"]) == 20
    (evidence,) = example.evidence
    assert evidence in example.candidates["layout"]
    asked = example.question[-1]
    key = asked.removeprefix("? ") if isinstance(asked, str) else next(iter(sprites(asked)))
    block = crop(example, evidence)
    assert sprites(block.crop((0, 0, 16, 16))) == {key}
    assert sprites(block.crop((16, 16, 32, 32))) == {example.answer}
    assert shown(example)[key] == 1


def test_picture_outlines_the_evidence():
    example = GENERATED.make("rendered_text", 128, 0.4)
    picture = np.asarray(example.picture())
    assert (picture == (213, 94, 0)).all(-1).any()
    without = np.asarray(GENERATED.make("rendered_text", 128, 0.4, needle=False).picture())
    assert not (without == (213, 94, 0)).all(-1).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "sound"}, "task is 'sound'; expected one of"),
        ({"length": 20}, "length is 20; expected at least 21 tokens for the task text"),
        ({"task": "image", "length": 36}, "length is 36; expected at least 37"),
        ({"depth": 1.2}, "depth is 1.2; expected a number from 0 to 1"),
        ({"depth": -0.1}, "depth is -0.1"),
        ({"depth": float("nan")}, "depth is nan"),
        ({"split": "train"}, "split is 'train'; expected one of"),
        ({"haystack": -1}, "haystack is -1"),
        ({"answer": "A"}, "answer is 'A'; expected one of"),
        ({"answer": "K", "needle": False}, "answer is 'K'; expected None"),
        ({"task": "successor", "answer": "K"}, "answer is 'K'; expected None"),
        (
            {"task": "identical_image", "answer": "yes", "needle": False},
            "answer is 'yes'; expected None",
        ),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        GENERATED.make(**{"task": "text", "length": 128, "depth": 0.5, **settings})


def test_a_share_of_pages_out_of_range_is_named():
    with pytest.raises(ValueError, match="image_ratio is 2; expected a number from 0 to 1"):
        Needles(2)


def test_shortest_length_holds_the_needle():
    assert GENERATED.make("text", 21, 0.0).evidence
    assert GENERATED.make("image", 37, 1.0).evidence


@pytest.mark.parametrize(
    "region",
    [
        Region(part=3),
        Region(part=0, chars=(4, 4)),
        Region(part=0, chars=(0, 99)),
        Region(part=0, box=(0, 0, 1, 1)),
        Region(part=1, box=(0, 0, 99, 8)),
        Region(part=1, chars=(0, 1)),
    ],
)
def test_evidence_outside_the_context_is_refused(region):
    with pytest.raises(ValueError, match="not"):
        Example(
            context=("some text", Image.new("RGB", (16, 16))),
            question=("?",),
            answer="",
            choices=(),
            evidence=(region,),
            candidates={},
            task="",
            length=0,
            depth=None,
            haystack=(),
        )
