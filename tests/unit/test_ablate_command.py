"""`mmheads ablate` as a user runs it."""

import json

import pandas as pd
import pytest

from mmheads import answers, cli, paths
from mmheads.heads import HeadGeometry, HeadSet
from mmheads.tasks import needles

LINE = {"context": ["rain falls . B7 K ."], "question": "? B7", "answer": "K"}


@pytest.fixture
def examples(tmp_path, monkeypatch):
    """Four needles in text as a user's file."""
    made = [needles.Needles(0.0).make("text", 128, 0.5, haystack=i, split="test") for i in range(4)]
    lines = [
        {"context": list(each.context), "question": each.question[0], "answer": each.answer}
        for each in made
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    return path


def test_answers_are_compared_in_pairs_and_with_random_heads(
    examples, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "answers.csv"
    command = ["ablate", "tiny-qwen3-vl-m", "tiny-qwen3-vl-m", str(examples), "--draws", "3"]
    command += ["--max-new-tokens", "4", "--out", str(out)]
    assert cli.main([*command, "--json"]) == 0
    printed = capsys.readouterr()
    assert "10 heads of tiny-qwen3-vl-m and 3 random sets matched by layer: 20 answers" in (
        printed.err
    )
    data = json.loads(printed.out)
    full, selected, random = data["effects"]
    assert (full["ablation"], full["score"], full["n"]) == ("full model", 1.0, 4)
    assert (selected["heads"], random["draws"]) == (10, 3)
    assert selected["change"] == selected["score"] - 1
    lost = round(-4 * selected["change"])
    assert data["p_exact"] == pytest.approx(min(1, 2 / 2**lost))
    assert data["among_random"]["draws"] == 3
    assert [each["name"] for each in data["heads"]] == list(
        map(str, HeadSet.load("tiny-qwen3-vl-m"))
    )
    table = pd.read_csv(out)
    assert len(table) == 4 * 5
    assert table.groupby("ablation")["score"].mean()["selected"] == selected["score"]

    generate = answers._generate
    monkeypatch.setattr(
        answers, "_generate", lambda vlm, rows, n: generate(vlm, rows, n) if len(rows) < 3 else None
    )  # all but the first example, which is measured, are kept
    assert cli.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("full model: 100.0% [100.0%, 100.0%], 0 heads ablated, n = 4")
    assert "points, exact p = " in lines[1]
    assert "of 3 random sets are as low as the selected heads or lower: p = " in lines[3]
    assert lines[4] == str(out)


@pytest.mark.parametrize(
    ("lines", "heads", "message"),
    [
        ([LINE, LINE | {"answer": ""}], "tiny-qwen3-vl-m", "line 2: the example has no answer"),
        ([LINE], "tiny-qwen3-vl-m", "holds one example; expected at least 2"),
        ([LINE, LINE], "none.json", "none.json is not a file; expected a JSON file of heads"),
        (
            [LINE, LINE],
            "other.json",
            "heads of other (2 layers of 4 heads in 2 KV groups, architecture unknown) cannot",
        ),
    ],
)
def test_ablate_refuses_bad_input_in_one_sentence(
    lines, heads, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    HeadSet(((0, 1),), HeadGeometry(2, 4, 2), "other").save("other.json")
    text = "\n".join(map(json.dumps, lines))
    (tmp_path / "mine.jsonl").write_text(text, encoding="utf-8")
    assert cli.main(["ablate", "tiny-qwen3-vl-m", heads, "mine.jsonl", "--draws", "2"]) == 1
    printed = capsys.readouterr().err
    (error,) = [line for line in printed.splitlines() if line.startswith("mmheads: ")]
    assert message in error


def test_a_folder_in_place_of_the_table_is_refused_before_the_model_is_loaded(
    examples, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("mmheads.models.load", None)
    command = ["ablate", "m", "tiny-qwen3-vl-m", str(examples), "--out", str(tmp_path)]
    assert cli.main(command) == 1
    assert f"{tmp_path} is a folder; give the name of a file" in capsys.readouterr().err
