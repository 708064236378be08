"""Published needles become examples with exact evidence; what does not fit them is one error."""

import json

import numpy as np
import pytest
from PIL import Image

from mmheads.tasks import mm_niah, mm_niah_records
from mmheads.tasks.grids import SPLITS

SENTENCE = "The secret fruit is a plum."
QUESTION = "\n\nQuestion: "
COLORS = {"a.png": "red", "b.png": "green", "c.png": "blue", "o0.png": "cyan", "o1.png": "gold"}


def record(kind: str, number: int, depth: float) -> dict:
    """Four units, the needle in the second (text) or the third (image)."""
    values = {
        "id": f"mm-niah-{number}",
        "depth": depth,
        "ctxs": [
            {"type": "image", "text": "<image>"},
            {"type": "text", "text": f"Pair {number}. {SENTENCE} More text.", "has_answer": True},
            {"type": "image", "text": "<image>"},
            {"type": "image", "text": "<image>"},
        ],
        "image_list": [f"mm-niah/{name}" for name in ("a.png", "b.png", "c.png")],
        "question": "Which fruit is it?",
    }
    if kind == "retrieval-text":
        return values | {
            "answer": "plum",
            "positive_ctxs": [{"type": "text", "text": SENTENCE, "len": 8}],
        }
    return values | {
        "answer": 1,
        "positive_ctxs": [{"type": "image", "text": "<image>", "image": "b.png"}],
        "choices_image": ["mm-niah/o0.png", "mm-niah/o1.png"],
    }


def write(folder, kind, length, records) -> None:
    path = folder / "mmlb_data" / "NIAH" / f"{kind}_test_K{length // 1024}_dep6.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(each) + "\n" for each in records))


@pytest.fixture
def folder(tmp_path):
    """Both kinds at 8K, 42 haystacks at two depths, those of the second depth backwards."""
    images = tmp_path / "mmlb_image" / "mm-niah"
    images.mkdir(parents=True)
    for name, color in COLORS.items():
        Image.new("RGB", (30, 20), color).save(images / name)
    for kind in ("retrieval-text", "retrieval-image"):
        records = [record(kind, number, 0) for number in range(42)]
        records += [record(kind, number, 0.1999) for number in reversed(range(42))]
        write(tmp_path, kind, 8192, records)
    return tmp_path


def color(image: Image.Image) -> str:
    return {Image.new("RGB", (1, 1), c).getpixel((0, 0)): c for c in COLORS.values()}[
        image.getpixel((3, 3))
    ]


def outline(example) -> list[str]:
    """Texts, and images by their color."""
    return [part if isinstance(part, str) else color(part) for part in example.context]


def cut(example) -> str:
    (region,) = example.evidence
    return example.context[region.part][slice(*region.chars)]


def test_the_folder_says_what_is_in_it(folder):
    opened = mm_niah.read_mm_niah(folder)
    assert opened.lengths == (8192,)
    assert opened.depths == (0.0, 0.2)
    assert [file.path.relative_to(folder).as_posix() for file in opened.opened.values()] == [
        "mmlb_data/NIAH/retrieval-text_test_K8_dep6.jsonl",
        "mmlb_data/NIAH/retrieval-image_test_K8_dep6.jsonl",
    ]


def test_a_text_needle_is_its_sentence(folder):
    example = mm_niah.read_mm_niah(folder).make("text", 8192, 0.2, haystack=3)
    text = f" Pair 3. {SENTENCE} More text. "
    assert outline(example) == ["red", text, "green", " ", "blue", QUESTION]
    assert cut(example) == SENTENCE
    assert (example.question, example.answer) == (("Which fruit is it?",), "plum")
    assert (example.length, example.depth, example.haystack) == (8192, 0.2, (0, 8192, 3))


def test_a_sentence_at_the_start_of_a_later_unit_is_found(folder):
    values = record("retrieval-text", 0, 0)
    values["ctxs"][1]["text"] = "First."
    values["ctxs"].insert(2, {"type": "text", "text": f"{SENTENCE} Last."})
    write(folder, "retrieval-text", 8192, [values])
    example = mm_niah.read_mm_niah(folder).make("text", 8192, 0)
    assert example.context[1] == f" First. {SENTENCE} Last. "
    assert cut(example) == SENTENCE


def test_a_rendered_needle_stands_in_the_place_of_its_sentence(folder):
    example = mm_niah.read_mm_niah(folder).make("rendered_text", 8192, 0, haystack=3)
    drawn = example.context[2]
    assert [p if isinstance(p, str) else "image" for p in example.context[:5]] == [
        *("image", " Pair 3. ", "image", " More text. ", "image")
    ]
    assert [(r.part, r.chars, r.box) for r in example.evidence] == [(2, None, None)]
    assert np.array_equal(drawn, mm_niah_records.draw(SENTENCE))
    assert not any(SENTENCE in part for part in example.context if isinstance(part, str))
    assert example.answer == "plum"


def test_a_drawn_text_is_wrapped_and_whole():
    drawn, twice = (
        np.asarray(mm_niah_records.draw(text)) for text in (SENTENCE, f"{SENTENCE} {SENTENCE}")
    )
    assert drawn.shape[1] == twice.shape[1] == 448
    assert twice.shape[0] == 2 * drawn.shape[0] - 2 * 16
    assert 0.01 < (drawn < 128).mean() < 0.3
    assert (drawn[:, -16:] == 255).all()
    assert mm_niah_records.draw("x" * 60).width > 448


def test_an_image_needle_is_the_whole_image_that_holds_it(folder):
    example = mm_niah.read_mm_niah(folder).make("image", 8192, 0)
    assert outline(example)[2] == "green"
    assert [(r.part, r.box) for r in example.evidence] == [(2, None)]
    texts = [p if isinstance(p, str) else color(p) for p in example.question]
    assert texts == ["Which fruit is it?\nA. ", "cyan", "\nB. ", "gold"]
    assert (example.answer, example.choices) == ("B", ("A", "B"))


def test_an_identical_image_is_that_of_the_question(folder):
    example = mm_niah.read_mm_niah(folder).make("identical_image", 8192, 0, answer="yes")
    (region,) = example.evidence
    assert np.array_equal(example.context[region.part], example.question[1])
    assert outline(example)[2:5] == ["gold", " ", "blue"]
    assert (example.answer, example.choices) == ("yes", ("yes", "no"))


@pytest.mark.parametrize("setting", [{"needle": False}, {"answer": "no"}])
def test_an_identical_image_that_is_not_there(folder, setting):
    example = mm_niah.read_mm_niah(folder).make("identical_image", 8192, 0, **setting)
    assert outline(example)[2:5] == ["cyan", " ", "blue"]
    assert color(example.question[1]) == "gold"
    assert (example.answer, example.evidence) == ("no", None)


@pytest.mark.parametrize(
    ("task", "rest"),
    [
        ("text", ["red", " Pair 0. More text. ", "green", " ", "blue", QUESTION]),
        ("rendered_text", ["red", " Pair 0. More text. ", "green", " ", "blue", QUESTION]),
        ("image", ["red", f" Pair 0. {SENTENCE} More text. ", "blue", QUESTION]),
    ],
)
def test_without_needle_nothing_else_changes(folder, task, rest):
    example = mm_niah.read_mm_niah(folder).make(task, 8192, 0, needle=False)
    assert outline(example) == rest
    assert example.evidence is None


def test_splits_are_disjoint_and_the_same_at_every_depth(folder):
    opened = mm_niah.read_mm_niah(folder)
    found = {
        (split, depth): [
            opened.make("text", 8192, depth, haystack=number, split=split).haystack[-1]
            for number in range(opened.count("text", 8192, split))
        ]
        for split in SPLITS
        for depth in opened.depths
    }
    for depth in opened.depths:
        assert found["detection", depth] == list(range(20))
        assert found["heldout", depth] == list(range(20, 40))
        assert found["test", depth] == [40, 41]


def test_a_grid_has_the_haystacks_innermost(folder):
    made = list(
        mm_niah.read_mm_niah(folder).generate(["text", "image"], haystacks=2, split="heldout")
    )
    assert [(e.task, e.depth, e.haystack[-1]) for e in made] == [
        (task, depth, number)
        for task in ("text", "image")
        for depth in (0, 0.2)
        for number in (20, 21)
    ]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"task": "video"}, "task is 'video'; expected one of"),
        ({"length": 512}, r"no records of retrieval-text at length 512; .* \[8192\]"),
        ({"depth": 0.5}, r"depth is 0.5; expected one of \(0.0, 0.2\)"),
        ({"split": "train"}, "split is 'train'; expected one of"),
        ({"haystack": 20}, "has 20 haystacks in the split detection at depth 0: expected 0 to 19"),
        ({"split": "test", "haystack": 2}, "has 2 haystacks in the split test"),
        ({"answer": "no"}, "answer is 'no'; expected None, as it cannot be changed here"),
    ],
)
def test_settings_that_do_not_fit_are_refused(folder, setting, message):
    opened = mm_niah.read_mm_niah(folder)
    setting = {"task": "text", "length": 8192, "depth": 0.0} | setting
    with pytest.raises(ValueError, match=message):
        opened.make(**setting)


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("text", {"positive_ctxs": [{"text": "Not there."}]}, "'Not there.' is 0 times in ctxs"),
        ("text", {"positive_ctxs": [{"text": "."}]}, "is 3 times in ctxs"),
        ("text", {"positive_ctxs": []}, r"positive_ctxs is \[\]: List should have at least 1 item"),
        ("text", {"answer": ["plum", "fig"]}, "answer is .*plum.*: Input should be a valid string"),
        ("text", {"image_list": ["mm-niah/a.png"]}, "ctxs has 3 images, but image_list 1"),
        ("text", {"image_list": ["mm-niah/x.png"] * 3}, r"image_list \(.*x.png\) does not exist"),
        ("text", {"ctxs": ["<image>"]}, "ctxs.0 is <image>: Input should be"),
        (
            "text",
            {"image_list": [5] * 3},
            r"image_list.0 is 5: Input should be a valid string",
        ),
        ("text", {"depth": True}, "depth is True: Input should be a valid number"),
        ("text", {"depth": 2}, "depth is 2: Input should be less than or equal to 1"),
        ("text", {"id": "seven"}, "id is seven: String should match pattern"),
        ("image", {"positive_ctxs": [{"image": "z.png"}]}, "'z.png' is 0 times in ctxs"),
        ("image", {"answer": 2}, "answer is 2 of the choices_image .* expected the index"),
        (
            "image",
            {"choices_image": ["mm-niah/no.png", "mm-niah/o1.png"]},
            r"choices_image \(.*no.png\) does not exist",
        ),
        (
            "image",
            {"choices_image": [{}, "o1.png"]},
            "choices_image.0 is .* should be a valid string",
        ),
        ("identical_image", {"choices_image": ["mm-niah/o1.png"] * 2}, "at least two that differ"),
    ],
)
def test_records_that_do_not_fit_name_their_place(folder, task, change, message):
    kind = mm_niah.KINDS[task]
    write(folder, "retrieval-text", 8192, [record("retrieval-text", 0, 0)])
    write(folder, kind, 8192, [record(kind, 0, 0) | change])
    with pytest.raises(ValueError, match=message) as raised:
        mm_niah.read_mm_niah(folder).make(task, 8192, 0)
    assert f"{kind}_test_K8_dep6.jsonl" in str(raised.value)


def test_two_records_of_one_pair_and_depth_are_refused(folder):
    write(folder, "retrieval-text", 8192, [record("retrieval-text", 0, 0)] * 2)
    opened = mm_niah.read_mm_niah(folder)
    with pytest.raises(ValueError, match=r"row 1: mm-niah-0 has two records of one depth"):
        opened.make("text", 8192, 0)


def test_changed_columns_are_said_when_the_folder_is_opened(folder):
    values = record("retrieval-text", 0, 0)
    values["contexts"] = values.pop("ctxs")
    write(folder, "retrieval-text", 8192, [values])
    with pytest.raises(ValueError, match=r"the field 'ctxs' is missing; there are .*contexts"):
        mm_niah.read_mm_niah(folder)


def test_folders_of_something_else_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no folder mmlb_image"):
        mm_niah.read_mm_niah(tmp_path)
    (tmp_path / "mmlb_image").mkdir()
    with pytest.raises(ValueError, match="holds no file such as retrieval-text_test_K8_dep6"):
        mm_niah.read_mm_niah(tmp_path)


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("B", "B", 1),
        ("Answer: (B). A cat", "B", 1),
        ("A or B", "A", 0),
        ("none", "B", 0),
        ("No. I mean yes", "yes", 1),
        ("nothing", "no", 0),
        ("It is the Plum.", "a plum", 1),
        ("a fig", "plum", 0),
    ],
)
def test_answers_are_scored_as_in_mmlongbench(answer, gold, expected):
    assert mm_niah.needle_answer(answer, gold) == expected
