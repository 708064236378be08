"""Files of examples: what is read, what is refused, and when images are decoded."""

import json

import example_prompts
import numpy as np
import pytest
from PIL import Image

from mmheads import example_files
from mmheads.example_files import read_examples

LINE = {"context": ["rain falls . B7 K ."], "question": "? B7", "evidence": [{"part": 0}]}


def write(path, *records) -> None:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))


def test_every_field_is_read(tmp_path):
    example_prompts.picture(60, 40).save(tmp_path / "page 1.png")
    record = {
        "context": ["Two pages .", {"image": "page 1.png"}],
        "question": ["? B7", {"image": "page 1.png"}],
        "answer": "K",
        "choices": ["K", "L"],
        "evidence": [{"part": 0, "text": "pages"}, {"part": 1, "box": [0, 0, 30, 20.5]}],
        "candidates": {"page": [{"part": 1}]},
        "instruction": "Answer with a letter.",
        "task": "mine",
        "depth": 0.5,
    }
    write(tmp_path / "examples.jsonl", "", record, "   ", LINE)
    examples = read_examples(tmp_path)
    assert len(examples) == 2
    assert examples.lines == (2, 4)
    assert examples.has_evidence == (True, True)
    first = examples[0]
    assert first.context[0] == "Two pages ."
    assert first.context[1].size == (60, 40)
    assert first.question[1] is first.context[1]
    assert [region.chars for region in first.evidence] == [(4, 9), None]
    assert first.evidence[1].box == (0, 0, 30, 20.5)
    assert first.candidates["page"][0].part == 1
    assert (first.answer, first.choices, first.depth) == ("K", ("K", "L"), 0.5)
    assert (first.task, first.instruction, first.length) == ("mine", "Answer with a letter.", 0)
    assert [example.answer for example in examples] == ["K", ""]
    assert [example.answer for example in examples[1:]] == [""]


def test_lines_end_at_line_feeds_only(tmp_path):
    text = "a\u2028b\u2029c\u0085d\x0ce"
    record = LINE | {"context": [text], "evidence": [{"part": 0, "text": "d"}]}
    content = json.dumps(record, ensure_ascii=False) + "\r\n" + json.dumps(LINE) + "\n"
    (tmp_path / "mine.jsonl").write_bytes(b"\xef\xbb\xbf" + content.encode())
    examples = read_examples(tmp_path / "mine.jsonl")
    assert examples.lines == (1, 2)
    assert examples[0].context == (text.replace("\x0c", "\x0c"),)


def test_text_is_utf_8_whatever_the_locale(tmp_path, monkeypatch):
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.setenv("PYTHONUTF8", "0")
    write(tmp_path / "mine.jsonl", json.dumps(LINE | {"question": "Größe ?"}, ensure_ascii=False))
    assert read_examples(tmp_path / "mine.jsonl")[0].question == ("Größe ?",)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("5", "5: Input should be an object"),
        ("null", "Input should be an object"),
        ('"abc"', "Input should be an object"),
        ("[]", "Input should be an object"),
        ("{", "Invalid JSON"),
        ("[" * 100_000, "Invalid JSON: recursion limit"),
        ('{"question": "?"}', "the field 'context' is missing"),
        (LINE | {"colour": 3}, "unknown field 'colour'; expected some of context, question"),
        (LINE | {"context": {"image": "x.png"}}, "context is .*expected a text, or a list"),
        (LINE | {"question": {"image": "q.png"}}, "question is .*expected a text, or a list"),
        (LINE | {"question": 5}, "question is 5: expected a text, or a list"),
        (LINE | {"question": [["a"]]}, "is neither a text nor an"),
        (LINE | {"question": [{"image": "a.png", "size": 3}]}, "is neither a text nor an"),
        (LINE | {"question": " "}, "the question is empty"),
        (LINE | {"question": []}, "the question is empty"),
        (LINE | {"evidence": {}}, "evidence is {}: Input should be a valid array"),
        (LINE | {"evidence": "B7"}, "evidence is B7: Input should be a valid array"),
        (LINE | {"evidence": [0]}, "evidence.0 is 0: Input should be an object"),
        (LINE | {"evidence": [{}]}, "the field 'evidence.0.part' is missing"),
        (LINE | {"evidence": [{"part": 5}]}, "names part 5, and the context has 1 parts"),
        (LINE | {"evidence": [{"part": 5, "text": "a"}]}, "names part 5"),
        (LINE | {"evidence": [{"part": -1}]}, "evidence.0.part is -1"),
        (LINE | {"evidence": [{"part": "0"}]}, "evidence.0.part is 0: .*integer"),
        (LINE | {"evidence": [{"part": 0.5}]}, "evidence.0.part is 0.5"),
        (LINE | {"evidence": [{"part": 0, "chars": []}]}, "evidence.0.chars.0"),
        (LINE | {"evidence": [{"part": 0, "chars": [0.5, 2]}]}, "evidence.0.chars.0 is 0.5"),
        (LINE | {"evidence": [{"part": 0, "chars": [5, 2]}]}, "does not lie in its text"),
        (LINE | {"evidence": [{"part": 0, "chars": [0, 99]}]}, "does not lie in its text"),
        (
            LINE | {"evidence": [{"part": 0, "chars": [0, 4], "text": "rain"}]},
            "a region has text and chars; expected only one of them",
        ),
        (LINE | {"evidence": [{"part": 0, "text": "l"}]}, "'l' occurs 2 times in part 0"),
        (LINE | {"evidence": [{"part": 0, "text": "snow"}]}, "'snow' occurs 0 times"),
        (LINE | {"evidence": [{"part": 0, "text": ""}]}, "evidence.0.text"),
        (LINE | {"evidence": [{"part": 0, "box": [0, 0, 1, 1]}]}, "does not lie in its text"),
        (LINE | {"evidence": [{"part": 0, "box": [0, 0, 1]}]}, "evidence.0.box.3"),
        (
            '{"context": ["a"], "question": "?", "evidence": [{"part": 0, "box": [NaN, 0, 1, 1]}]}',
            "box",
        ),
        (LINE | {"candidates": {"page": [{"part": 3}]}}, "names part 3"),
        (LINE | {"candidates": []}, "candidates is"),
        (LINE | {"choices": "abc"}, "choices is abc: Input should be a valid array"),
        (LINE | {"answer": 5}, "answer is 5: Input should be a valid string"),
        (LINE | {"instruction": 5}, "instruction is 5"),
        (LINE | {"task": None}, "task is None"),
        (LINE | {"depth": "middle"}, "depth is middle"),
        (LINE | {"depth": 1.5}, "depth is 1.5"),
        (LINE | {"context": [{"image": "no.png"}]}, "no.png does not exist"),
        (LINE | {"context": [{"image": ""}]}, "is a folder"),
        (LINE | {"context": [{"image": "https://example.org/a.png"}]}, "is a URL"),
        (LINE | {"context": [{"image": "text.png"}]}, "text.png is damaged, or not an image"),
        (
            LINE | {"context": [{"image": "wide.png"}], "evidence": [{"part": 0, "chars": [0, 1]}]},
            "does not lie in its image",
        ),
        (
            LINE | {"context": [{"image": "wide.png"}], "evidence": [{"part": 0, "text": "a"}]},
            "gives the text 'a', but part 0 is an image",
        ),
        (
            LINE
            | {"context": [{"image": "wide.png"}], "evidence": [{"part": 0, "box": [0, 0, 99, 9]}]},
            "does not lie in its image",
        ),
    ],
)
def test_a_line_that_is_not_an_example_is_named(tmp_path, line, message):
    Image.new("RGB", (60, 40)).save(tmp_path / "wide.png")
    (tmp_path / "text.png").write_text("This is a text.", encoding="utf-8")
    write(tmp_path / "mine.jsonl", LINE, line)
    with pytest.raises(ValueError, match=rf"mine.jsonl, line 2: .*{message}"):
        read_examples(tmp_path / "mine.jsonl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "mine.jsonl holds no example"),
        (b"\n \n", "mine.jsonl holds no example"),
        ("{}".encode("utf-16"), "mine.jsonl is not a text in UTF-8"),
        (b'{"question": "\xed\xa0\x80"}', "mine.jsonl is not a text in UTF-8"),
    ],
)
def test_a_file_without_examples_is_refused(tmp_path, content, message):
    (tmp_path / "mine.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_examples(tmp_path / "mine.jsonl")


def test_a_missing_file_or_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"missing\.jsonl does not exist"):
        read_examples(tmp_path / "missing.jsonl")
    with pytest.raises(ValueError, match=r"examples\.jsonl does not exist"):
        read_examples(tmp_path)


def test_images_are_decoded_when_their_turn_comes_and_shared_with_the_neighbour(
    tmp_path, monkeypatch
):
    for number in (1, 2):
        example_prompts.picture(60, 40, number).save(tmp_path / f"{number}.png")
    opened = []
    original = example_files.open_image

    def counted(path):
        opened.append(path.name)
        return original(path)

    monkeypatch.setattr(example_files, "open_image", counted)
    pages = [LINE | {"context": [{"image": f"{number}.png"}]} for number in (1, 1, 2)]
    write(tmp_path / "examples.jsonl", *pages)
    examples = read_examples(tmp_path)
    assert opened == []
    first, second, third = examples
    assert opened == ["1.png", "2.png"]
    assert first.context[0] is second.context[0]
    assert not np.array_equal(np.asarray(first.context[0]), np.asarray(third.context[0]))
    assert list(examples._decoded) == ["2.png"]


def test_boxes_refer_to_the_upright_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # The stored picture is to be turned by 90 degrees.
    Image.new("RGB", (60, 40), "white").save(tmp_path / "photo.jpg", exif=exif)
    upright = LINE | {
        "context": [{"image": "photo.jpg"}],
        "evidence": [{"part": 0, "box": [0, 0, 40, 60]}],
    }
    write(tmp_path / "examples.jsonl", upright)
    example = read_examples(tmp_path)[0]
    assert example.context[0].size == (40, 60)
    write(tmp_path / "wrong.jsonl", upright | {"evidence": [{"part": 0, "box": [0, 0, 60, 40]}]})
    with pytest.raises(ValueError, match=r"wrong\.jsonl, line 1: .*does not lie in its image"):
        read_examples(tmp_path / "wrong.jsonl")[0]


def test_a_damaged_image_is_named_with_its_line_when_its_turn_comes(tmp_path):
    example_prompts.picture(60, 40).save(tmp_path / "cut.png")
    content = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    write(tmp_path / "examples.jsonl", LINE, LINE | {"context": [{"image": "cut.png"}]})
    examples = read_examples(tmp_path)
    assert examples[0].question == ("? B7",)
    with pytest.raises(ValueError, match=r"examples\.jsonl, line 2: .*cut.png cannot be read"):
        examples[1]
