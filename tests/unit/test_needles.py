"""Generated needles on pages of lines: where a needle is, what it changes, what is refused."""

import dataclasses
import itertools
from collections import Counter
from functools import cache

import numpy as np
import pytest
from PIL import Image
from tiny_tokens import count_tokens, evidence_tokens

from mmheads.examples import Example, Region
from mmheads.tasks import line_pages, needles
from mmheads.tasks.grids import DEPTHS, HAYSTACKS, SPLITS, TASKS
from mmheads.tasks.needles import (
    ANSWERS,
    CONTROL,
    GENERATED,
    LENGTHS,
    OPTIONS,
    Needles,
    document,
    similar_keys,
)

NAMES = (*line_pages.CODES, *line_pages.VALUES, *line_pages.ICONS, line_pages.STOP)


@cache
def drawings() -> dict[bytes, str]:
    """The name of every cell as it can look, by its pixels."""
    blank = np.full((16, 16, 3), 255, np.uint8)
    table = {blank.tobytes(): line_pages.BLANK}
    for name, y, x in itertools.product(NAMES, range(3), range(3)):
        cell = blank.copy()
        cell[y : y + 14, x : x + 14] = line_pages.sprite(name)
        assert table.setdefault(cell.tobytes(), name) == name
    return table


def cells(image: Image.Image) -> list[str]:
    """What each cell of an image shows, line by line."""
    return [
        drawings()[np.asarray(image.crop((x, y, x + 16, y + 16))).tobytes()]
        for y in range(0, image.height, 16)
        for x in range(0, image.width, 16)
    ]


def words(example: Example) -> list[str]:
    """All words of the context, and what the cells of its pages show."""
    return [
        word
        for part in example.context
        for word in (part.split() if isinstance(part, str) else cells(part))
    ]


def evidence(example: Example) -> list[str]:
    """The words or cells of the evidence."""
    (region,) = example.evidence
    part = example.context[region.part]
    if region.chars:
        return part[slice(*region.chars)].split()
    return cells(part.crop(region.box))


def asked(example: Example) -> list[str]:
    return [
        word
        for part in example.question
        for word in (part.split() if isinstance(part, str) else cells(part))
    ]


def key_of(example: Example) -> str:
    """The key that a question asks for."""
    match example.task, asked(example):
        case "image", options:
            return options[1 + 2 * OPTIONS.index(example.answer)]
        case _, question:
            return question[1]


def by_part(example: Example) -> list[list[str]]:
    return [part.split() if isinstance(part, str) else cells(part) for part in example.context]


def test_every_line_of_a_page_reads_like_a_sentence():
    rng = np.random.default_rng(0)
    records = [
        line_pages.Record("B7", "K"),
        line_pages.Record("red-disc", "Q"),
    ]
    page = Image.fromarray(line_pages.page(records, rng))
    assert page.size == (64, 64)
    for line, record in enumerate(records):
        shown = cells(page.crop(line_pages.line_box(line)))
        assert shown == [record.key, record.value, ".", "blank"]
    with pytest.raises(ValueError, match="1 records; expected 2"):
        line_pages.page(records[:1], rng)


def test_icons_differ_in_gray_or_in_shape_and_all_differ_in_colour():
    sprites = {icon: line_pages.sprite(icon).astype(int) for icon in line_pages.ICONS}
    for a, b in itertools.combinations(sprites, 2):
        assert np.abs(sprites[a] - sprites[b]).mean() > 5, (a, b)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("task", TASKS)
def test_needle_is_in_the_context_once_at_its_depth(task, depth):
    example = GENERATED.make(task, 512, depth, haystack=2)
    key = key_of(example)
    shown = evidence(example)
    assert shown[0] == key
    assert words(example).count(key) == 1
    assert len(shown) == (3 if task == "text" else 4)
    if task in ("text", "rendered_text"):
        assert shown[1] == example.answer
    (region,) = example.evidence
    assert region.part == round(depth * (len(example.context) - 1))
    assert example.choices == ANSWERS[task]


@pytest.mark.parametrize("task", TASKS)
def test_tokens_are_those_of_the_evidence(task):
    example = GENERATED.make(task, 256, 0.4, haystack=1)
    flat = ["<bos>"]
    for part in example.context:
        if isinstance(part, str):
            flat += part.split()
        else:
            flat += ["<start>", *cells(part), "<end>"]
    assert [flat[token] for token in evidence_tokens(example)] == evidence(example)
    length = 1 + count_tokens((*example.context, *example.question))
    assert 256 <= length < 256 + line_pages.UNIT_TOKENS


def test_image_question_has_four_options_of_which_one_is_in_the_context():
    for haystack in range(6):
        example = GENERATED.make("image", 256, 0.6, haystack=haystack)
        options = asked(example)[1:8:2]
        counts = Counter(words(example))
        right = OPTIONS.index(example.answer)
        assert len(set(options)) == 4
        assert [counts[icon] for icon in options] == [int(i == right) for i in range(4)]


def test_identical_image_shows_the_very_pixels_of_the_page():
    example = GENERATED.make("identical_image", 256, 0.2)
    (region,) = example.evidence
    left, top, *_ = region.box
    cell = example.context[region.part].crop((left, top, left + 16, top + 16))
    assert cell.tobytes() == example.question[1].tobytes()


@pytest.mark.parametrize("task", TASKS)
def test_removing_the_needle_changes_only_its_record(task):
    with_needle = GENERATED.make(task, 256, 0.4, haystack=3)
    without = GENERATED.make(task, 256, 0.4, haystack=3, needle=False)
    assert without.evidence is None
    assert asked(with_needle) == asked(without)
    assert key_of(with_needle) not in words(without)
    changed = [a != b for a, b in zip(words(with_needle), words(without), strict=True)]
    (first, last), *_ = np.flatnonzero(changed)[[0, -1]].reshape(1, 2)
    assert last - first < 2
    if task == "identical_image":
        assert (with_needle.answer, without.answer) == ("yes", "no")
    else:
        assert with_needle.answer == without.answer


@pytest.mark.parametrize("task", TASKS)
def test_a_demanded_answer_changes_only_the_needle(task):
    examples = [GENERATED.make(task, 256, 0.6, haystack=1, answer=a) for a in ANSWERS[task]]
    assert [example.answer for example in examples] == list(ANSWERS[task])
    assert all(asked(example) == asked(examples[0]) for example in examples)
    for example in examples:
        changed = [a != b for a, b in zip(words(examples[0]), words(example), strict=True)]
        assert sum(changed) <= 2
        if task in ("text", "rendered_text"):
            assert evidence(example)[1] == example.answer
        elif example.evidence:
            assert evidence(example)[0] == key_of(example)


@pytest.mark.parametrize("task", TASKS)
def test_depths_of_a_haystack_share_its_question_and_its_identity(task):
    examples = [GENERATED.make(task, 256, depth, haystack=4) for depth in DEPTHS]
    assert len({example.haystack for example in examples}) == 1
    assert len({(tuple(asked(e)), e.answer) for e in examples}) == 1
    assert len({example.fingerprint() for example in examples}) == len(DEPTHS)
    # every other unit is the same at two depths, unless a page and text changed places
    first, second = by_part(examples[1]), by_part(examples[2])
    assert sum(a != b for a, b in zip(first, second, strict=True)) <= 4


@pytest.mark.parametrize("task", TASKS)
def test_haystacks_ask_for_different_keys_and_splits_for_none_of_each_others(task):
    keys = {
        split: [
            key_of(GENERATED.make(task, 128, 0, haystack=h, split=split, answer=ANSWERS[task][0]))
            for h in range(HAYSTACKS)
        ]
        for split in SPLITS
    }
    if task != "image":  # there, the demanded answer chooses the key among the options
        assert all(len(set(k)) == HAYSTACKS for k in keys.values())
        assert not any(set(keys[a]) & set(keys[b]) for a, b in itertools.combinations(SPLITS, 2))
    natural = {
        split: [key_of(GENERATED.make(task, 128, 0, haystack=h, split=split)) for h in range(20)]
        for split in SPLITS
    }
    assert not any(set(natural[a]) & set(natural[b]) for a, b in itertools.combinations(SPLITS, 2))


def test_both_answers_cross_the_answer_with_depth_length_and_haystack():
    grid = (["identical_image"], [128, 256], DEPTHS, 3)
    examples = list(GENERATED.generate(*grid, both_answers=True))
    cells_of = Counter((e.length, e.depth, e.haystack, e.answer) for e in examples)
    assert len(examples) == len(cells_of) == 2 * 6 * 3 * 2
    for yes, no in zip(examples[::2], examples[1::2], strict=True):
        assert (yes.answer, no.answer) == ("yes", "no")
        assert (yes.depth, yes.length, yes.haystack) == (no.depth, no.length, no.haystack)
        assert asked(yes) == asked(no)
        assert yes.evidence
        assert no.evidence is None


def test_generate_gives_the_grid_with_haystacks_innermost():
    examples = list(GENERATED.generate(["text", CONTROL], [128], [0.0, 1.0], 2, split="test"))
    assert [(e.task, e.depth) for e in examples] == [
        *[("text", 0.0)] * 2,
        *[("text", 1.0)] * 2,
        *[(CONTROL, None)] * 4,
    ]
    assert (GENERATED.depths, GENERATED.lengths) == (DEPTHS, LENGTHS)
    assert len({Needles(ratio).about["image_ratio"] for ratio in (0, 0.25, 0.5, 1)}) == 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        GENERATED.image_ratio = 0.0


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 1.0])
def test_image_ratio_is_the_share_of_pages(ratio):
    example = Needles(ratio).make("rendered_text" if ratio else "text", 1024, 0.4)
    pages = sum(isinstance(part, Image.Image) for part in example.context)
    assert abs(pages - ratio * len(example.context)) <= 1


def test_same_settings_give_the_same_example():
    a, b = (GENERATED.make("image", 512, 0.8, haystack=5, split="test") for _ in range(2))
    assert a.fingerprint() == b.fingerprint()
    other = GENERATED.make("image", 512, 0.8, haystack=6, split="test")
    assert other.fingerprint() != a.fingerprint()


def test_control_has_only_text_and_needs_no_evidence():
    example = GENERATED.make(CONTROL, 256, 0.0)
    assert all(isinstance(part, str) for part in example.parts())
    assert example.evidence is None
    assert example.depth is None
    values = line_pages.VALUES
    before = example.question[0].removeprefix("after ")
    assert example.answer == values[(values.index(before) + 1) % len(values)]


@pytest.mark.parametrize("distractors", needles.DISTRACTORS)
@pytest.mark.parametrize("question", ["rendered_text", "icon"])
def test_document_has_the_needle_once_and_pages_and_lines_to_rank(question, distractors):
    for index in range(4):
        example = document(5, question=question, index=index, distractors=distractors)
        key = asked(example)[1]
        assert evidence(example)[:2] == [key, example.answer]
        assert words(example).count(key) == 1
        assert len(example.candidates["page"]) == 5
        assert len(example.candidates["layout"]) == 10
        assert example.evidence[0] in example.candidates["layout"]


def test_similar_keys_share_a_letter_or_a_digit_a_colour_or_a_shape():
    assert len(similar_keys("B7")) == len(similar_keys("red-disc")) == 14
    assert {"B1", "A7"} < set(similar_keys("B7"))
    assert {"red-ring", "blue-disc"} < set(similar_keys("red-disc"))


@pytest.mark.parametrize("question", ["rendered_text", "icon"])
def test_similar_documents_hold_only_similar_keys(question):
    example = document(6, question=question, distractors="similar")
    key = asked(example)[1]
    keys = set(words(example)[::4]) - {line_pages.BLANK}
    assert keys - {key} <= set(similar_keys(key))


def test_near_identical_pages_differ_in_one_line():
    example = document(6, distractors="near-identical")
    key = asked(example)[1]
    (region,) = example.evidence
    line = int(region.box[1]) // 16
    pages = by_part(example)
    for page in pages:
        others = [cell for i, cell in enumerate(page) if i // 4 != line]
        assert others == [cell for i, cell in enumerate(pages[0]) if i // 4 != line]
        assert page[4 * line] in (key, *similar_keys(key))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "poem"}, "task is 'poem'"),
        ({"split": "train"}, "split is 'train'"),
        ({"depth": 1.5}, "depth is 1.5"),
        ({"length": 20}, "length is 20; expected at least 21"),
        ({"haystack": -1}, "haystack is -1"),
        ({"answer": "A"}, "answer is 'A'"),
        ({"answer": "K", "needle": False}, "answer is 'K'"),
        ({"task": CONTROL, "answer": "K"}, "answer is 'K'"),
        ({"task": "identical_image", "answer": "yes", "needle": False}, "answer is 'yes'"),
    ],
)
def test_bad_settings_are_named(settings, message):
    given = {"task": "text", "length": 128, "depth": 0.0, **settings}
    with pytest.raises(ValueError, match=message):
        GENERATED.make(**given)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pages": 0}, "pages is 0"),
        ({"question": "image"}, "question is 'image'"),
        ({"index": -1}, "index is -1"),
        ({"split": "all"}, "split is 'all'"),
        ({"distractors": "hard"}, "distractors is 'hard'"),
    ],
)
def test_bad_settings_of_documents_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        document(**{"pages": 3, **settings})


def test_image_ratio_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"image_ratio is 1\.5; expected a number from 0 to 1"):
        Needles(1.5)


@pytest.mark.parametrize("task", TASKS)
def test_shortest_length_holds_the_needle(task):
    least = 1 + line_pages.UNIT_TOKENS
    least += count_tokens(GENERATED.make(task, 128, 0).question)
    assert evidence(GENERATED.make(task, least, 1.0))
    with pytest.raises(ValueError, match=f"at least {least} tokens"):
        GENERATED.make(task, least - 1, 1.0)


def test_text_is_mostly_prose():
    sentences = " ".join(Needles(0.0).make("text", 2048, 0.4).context).split(" .")[:-1]
    prose = [tuple(s.split()) for s in sentences if s.split()[0] in line_pages.NOUNS]
    assert len(prose) / len(sentences) == pytest.approx(line_pages.PROSE, abs=0.05)
    assert {verb for _, verb in prose} <= set(line_pages.VERBS)


def test_picture_outlines_the_evidence():
    outline = (213, 94, 0)
    whole = GENERATED.make("rendered_text", 128, 0.4).picture()
    without = GENERATED.make("rendered_text", 128, 0.4, needle=False).picture()
    assert (np.asarray(whole) == outline).all(-1).any()
    assert not (np.asarray(without) == outline).all(-1).any()


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
    example = GENERATED.make("text", 128, 0.4)
    context = ("some text", Image.new("RGB", (16, 16)))
    with pytest.raises(ValueError, match="not"):
        dataclasses.replace(example, context=context, evidence=(region,))
