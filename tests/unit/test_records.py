"""Records keep the values of their files; what cannot be read is one error with file and row."""

import io
import json
from typing import Any

import pandas as pd
import pytest
from PIL import Image
from pydantic import create_model

from mmheads.tasks.records import (
    Columns,
    OneText,
    Record,
    Text,
    check_record,
    parse_line,
    read_records,
)


class OfText(Columns):
    text: str


class OfAnswer(Columns):
    answer: Any


def values(folder, columns=OfText):
    (name,) = columns.model_fields
    return [getattr(record.values, name) for record in read_records(folder, columns)]


def test_lines_end_at_line_feeds_only(tmp_path):
    texts = ["one\u2028two\u2029three\u0085four", "caf\u00e9", "last"]
    lines = "\n\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    (tmp_path / "a.jsonl").write_bytes(lines.encode())
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text":\r "with BOM"}\r\n')
    assert values(tmp_path) == [*texts, "with BOM"]


def test_values_keep_their_own_types(tmp_path):
    answers = ["2013-05-01", 5, 5.5, [1, "two"]]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"answer": a}) for a in answers))
    read = values(tmp_path, OfAnswer)
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
        ("a.json", b'{"text": null}', "row 0: text is None: Input should be a valid string"),
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
        (True, int, "a is True: Input should be a valid integer"),
        ([1, True], list[int], "a.1 is True: Input should be a valid integer"),
        ("abc", list[str], "a is abc: Input should be a valid list"),
        ([["x"], "y"], list[list[str]], "a.1 is y: Input should be a valid list"),
        (5, float | None, None),
        (" ", Text, "a is  : expected a text that is not empty"),
        (["x", "y"], OneText, "a is .'x', 'y'.: Input should be a valid string"),
        (["x"], OneText, None),
    ],
)
def test_types_are_checked_to_the_items_of_lists(tmp_path, value, kind, message):
    columns = create_model("columns", __base__=Columns, a=(kind, ...))
    if message is None:
        assert check_record(columns, {"a": value}, "here", tmp_path).values.a in (5.0, "x")
        return
    with pytest.raises(ValueError, match=rf"^here: {message}"):
        check_record(columns, {"a": value}, "here", tmp_path)


def test_lines_with_a_byte_order_mark_are_parsed():
    assert parse_line(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}


def test_images_are_upright_and_on_white(tmp_path):
    red = Image.new("RGB", (4, 2), "red")
    exif = red.getexif()
    exif[0x0112] = 6
    red.save(tmp_path / "turned.jpg", exif=exif)
    clear = io.BytesIO()
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(clear, "PNG")
    record = Record(OfAnswer(answer=""), "here", tmp_path)
    assert record.image("turned.jpg").size == (2, 4)
    assert record.image({"bytes": clear.getvalue(), "path": None}).getpixel((0, 0)) == (255,) * 3
    for value in (None, 5, "", {"bytes": None, "path": None}):
        with pytest.raises(ValueError, match=r"here: the picture is .*; expected an image, its"):
            record.image(value, "the picture")
    with pytest.raises(ValueError, match=r"here: the picture \(.*lost.jpg\) does not exist"):
        record.image("lost.jpg", "the picture")


def test_tables_are_read_with_their_rows(tmp_path):
    pd.DataFrame({"text": ["a", "b"]}).to_parquet(tmp_path / "a.parquet")
    rows = list(read_records(tmp_path, OfText))
    assert [row.where for row in rows] == [f"{tmp_path / 'a.parquet'}, row {n}" for n in (0, 1)]
