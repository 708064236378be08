"""Records keep the values of their files; what cannot be read is one error with file and row."""

import io
import json

import datasets
import pandas as pd
import pytest
from PIL import Image

from mmheads.tasks.records import Record, parse_line, read_records


def values(folder, name="text", kind=str):
    return [record.values[name] for record in read_records(folder, {name: kind})]


def test_lines_end_at_line_feeds_only(tmp_path):
    texts = ["one\u2028two\u2029three\u0085four", "caf\u00e9", "last"]
    lines = "\n\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    (tmp_path / "a.jsonl").write_bytes(lines.encode())
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text":\r "with BOM"}\r\n')
    assert values(tmp_path) == [*texts, "with BOM"]


def test_values_keep_their_own_types(tmp_path):
    answers = ["2013-05-01", 5, 5.5, [1, "two"]]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"answer": a}) for a in answers))
    read = values(tmp_path, "answer", object)
    assert read == answers
    assert [type(value) for value in read] == [str, int, float, list]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "a.jsonl, row 1, cannot be read: Expecting value"),
        ("a.jsonl", b'{"text": "a"}\n5\n', "a.jsonl, row 1 is 5; expected a record"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', "a.jsonl, row 0, cannot be read: .*utf-8"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "row 0, cannot be read: .*utf-8"),
        ("a.jsonl", b'{"text": NaN}', "row 0, cannot be read: it holds NaN, which is not a number"),
        ("a.json", b"[" * 100_000, "a.json, row 0, cannot be read: .*nested too deeply"),
        ("a.json", b'["text"]', "a.json, row 0 is 'text'; expected a record"),
        ("a.json", b'{"text": null}', "row 0: text is None, a NoneType; expected str"),
        ("a.parquet", b"not a table", "a.parquet, row 0, cannot be read: .*[Pp]arquet"),
        ("a.csv", b"text\na\n", "holds no file '\\*' ending in .parquet, .jsonl, .json"),
        ("a.jsonl", b"\n", "holds no record"),
    ],
)
def test_what_cannot_be_read_is_one_error_with_its_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        values(tmp_path)


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (True, int, "a is True, a bool; expected int"),
        ([1, True], list[int], r"a is \[1, True\], a list; expected list\[int\]"),
        ("abc", list[str], r"a is 'abc', a str; expected list\[str\]"),
        ([["x"], "y"], list[list[str]], r"expected list\[list\[str\]\]"),
        (None, (str, list[str]), r"a is None, a NoneType; expected str or list\[str\]"),
    ],
)
def test_types_are_checked_to_the_items_of_lists(value, kind, message):
    with pytest.raises(ValueError, match=rf"^here: .*{message}"):
        Record({"a": value}, "here").expect({"a": kind})


def test_right_types_pass():
    record = Record({"a": [["x"], []], "b": None, "c": True}, "here")
    record.expect({"a": list[list[str]], "b": (str, type(None)), "c": bool})
    assert parse_line(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}


def test_images_are_upright_and_on_white(tmp_path):
    red = Image.new("RGB", (4, 2), "red")
    exif = red.getexif()
    exif[0x0112] = 6
    red.save(tmp_path / "turned.jpg", exif=exif)
    clear = io.BytesIO()
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(clear, "PNG")
    record = Record({}, "here", tmp_path)
    assert record.image("turned.jpg").size == (2, 4)
    assert record.image({"bytes": clear.getvalue(), "path": None}).getpixel((0, 0)) == (255,) * 3
    for value in (None, 5, "", {"bytes": None, "path": None}):
        with pytest.raises(ValueError, match=r"here: the picture is .*; expected an image, its"):
            record.image(value, "the picture")
    with pytest.raises(ValueError, match=r"here: the picture \(.*lost.jpg\) does not exist"):
        record.image("lost.jpg", "the picture")


def test_rows_of_the_hub_come_undecoded_and_their_errors_name_the_row(monkeypatch):
    picture = io.BytesIO()
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(picture, "PNG")
    table = datasets.Dataset.from_dict(
        {"image": [{"bytes": picture.getvalue(), "path": None}]},
        features=datasets.Features(image=datasets.Image()),
    ).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    (record,) = read_records("owner/name", {"image": dict}, config="all", split="test")
    assert record.where == "owner/name all test, row 0"
    assert record.image(record.values["image"]).getpixel((0, 0)) == (255, 255, 255)

    def broken(*_, **__):
        yield {"image": {}}
        raise ConnectionError("the line is dead")

    lost = datasets.IterableDataset.from_generator(broken)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: lost)
    with pytest.raises(ValueError, match=r"owner/name, row 1, cannot be read: .*line is dead"):
        list(read_records("owner/name", {}))


def test_tables_are_read_with_their_rows(tmp_path):
    pd.DataFrame({"text": ["a", "b"]}).to_parquet(tmp_path / "a.parquet")
    rows = list(read_records(tmp_path, {"text": str}))
    assert [row.where for row in rows] == [f"{tmp_path / 'a.parquet'}, row {n}" for n in (0, 1)]
