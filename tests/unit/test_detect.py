"""Finding heads without data: what is searched, what counts as found, and the command."""

import json
import math
import subprocess
import sys
from itertools import product

import example_prompts
import numpy as np
import pandas as pd
import pytest

from mmheads import cli, commands, detection, paths, scoring
from mmheads.detection import Search, detect, search_for, strong_heads
from mmheads.heads import Head, HeadSet
from mmheads.models import load
from mmheads.scores import HeadScores
from mmheads.tasks.needles import Needles

TEXT = ("--tasks", "text", "--lengths", "128")


@pytest.fixture(scope="session")
def tiny():
    """The shipped tiny model, loaded once."""
    return load("tiny-qwen3-vl-m", device="cpu")


@pytest.fixture
def quick(tiny, monkeypatch):
    """The commands use the loaded model, and nothing is measured before they start."""
    monkeypatch.setattr("mmheads.models.load", lambda name, **_: {tiny.model_id: tiny}[name])
    monkeypatch.setattr(Search, "seconds", lambda self, vlm: (200.0, 9000.0))
    return tiny


def scores_of(values, evidence=1.0):
    """Scores whose null question attends to nothing; even attention is a tenth of `evidence`."""
    values = np.asarray(values, dtype=np.float32)
    metadata = pd.DataFrame(
        {
            **dict.fromkeys(("task", "length", "depth", "haystack"), [""] * len(values)),
            "tokens": 10,
            "evidence_tokens": evidence,
        }
    )
    return HeadScores(values, metadata=metadata, quantities={"raw": values})


def test_heads_count_only_if_they_look_at_the_evidence_more_than_even_attention_would():
    scores = scores_of(np.full((2, 1, 4), [0.1, 0.5, 0.3, 0.19]))
    strong = strong_heads(scores, 1.0)
    assert [str(head) for head in strong] == ["L0H1", "L0H2"]
    assert set(strong.scores) == {Head(0, 1), Head(0, 2)}
    assert strong.origin.rule == "top 100% by mean score, at least 2 times even attention"
    assert len(strong_heads(scores_of(scores.values, evidence=4.0), 1.0)) == 0


def test_halves_are_even_and_odd_haystacks_and_are_compared_with_random_sets():
    values = np.full((8, 2, 8), 0.0)  # four haystacks of two examples
    values[:, 0, :3] = 0.9
    values[[0, 1, 4, 5], 0, 3] = 0.8  # strong in one half
    values[[2, 3, 6, 7], 1, 7] = 0.8  # strong in the other
    row = detection._halves(scores_of(values), 2, 0.25)
    assert (row["heads"], row["shared"], row["chance"]) == (4, 3, 1.0)
    ways = sum(math.comb(4, k) * math.comb(12, 4 - k) for k in (3, 4))
    assert row["p"] == pytest.approx(ways / math.comb(16, 4))
    assert row["times_even"] == pytest.approx(9)


def test_a_search_fits_its_model(tiny, tmp_path):
    search = search_for(tiny)
    assert isinstance(search.needles, Needles)
    assert (len(search.tasks), search.lengths, search.haystacks) == (4, (1024,), 20)
    natural = search_for(example_prompts.vlm("qwen2_5_vl"), lengths=[700])
    assert natural.needles.name == "natural-corpus-0.5"
    assert search_for(example_prompts.vlm("qwen3")).tasks == ("text",)
    (tmp_path / "a.txt").write_text("Whales sing to each other in the deep sea.")
    with pytest.raises(ValueError, match=r"of the words of .* are unknown to the tokenizer of tin"):
        search_for(tiny, tmp_path)
    with pytest.raises(ValueError, match="length is 9000; expected 1 to 8192, the tokens that"):
        search_for(tiny, lengths=[128, 9000])
    with pytest.raises(ValueError, match="task is 'music'; expected one of"):
        search_for(tiny, tasks=["music"])
    with pytest.raises(ValueError, match="haystacks is 3; expected at least 4"):
        search_for(tiny, haystacks=3)


def test_the_time_is_that_of_a_measured_example_of_each_task(tiny, monkeypatch):
    measured = []
    clock = iter(np.cumsum([0, 9, 0, 2, 0, 3]).tolist())
    monkeypatch.setattr(detection.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(detection, "score_heads", lambda vlm, given, **_: measured.extend(given))
    search = search_for(tiny, tasks=["text", "image"], lengths=[128, 256], haystacks=10)
    least, most = search.seconds(tiny)
    assert [(e.task, e.length) for e in measured] == [("text", 256), ("text", 256), ("image", 256)]
    assert least == pytest.approx(4 * (2 + 3) * 6 * 1.5)  # 6 depths, of 256 and of half as much
    assert most == pytest.approx(least * 10 / 4)


def test_a_stable_task_stops_and_its_heads_are_those_of_all_its_examples(tiny, tmp_path):
    search = search_for(tiny, tasks=["text"], lengths=[128])
    found = detect(tiny, search, folder=tmp_path, progress=False)
    (row,) = found.table.to_dict("records")
    assert row["stable"]
    assert 4 <= row["haystacks"] < 20
    assert row["shared"] >= 4
    examples = [
        search.needles.make("text", 128, depth, haystack=haystack)
        for haystack, depth in product(range(row["haystacks"]), search.needles.depths)
    ]
    scored = scoring.score_heads(tiny, examples, folder=None, progress=False)
    np.testing.assert_allclose(found.scores.values, scored.values, atol=1e-6)
    assert found.heads == strong_heads(scored)
    assert found.heads.origin.source == "mmheads.detection, generated"


def test_the_command_writes_a_list_and_goes_on_from_what_is_kept(
    quick, tmp_path, capsys, monkeypatch
):
    command = ["detect", "tiny-qwen3-vl-m", *TEXT, "--out", str(tmp_path)]
    batches = []
    score_batch = scoring._score_batch

    def interrupted(vlm, batch, *rest):
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(len(batch))
        return score_batch(vlm, batch, *rest)

    monkeypatch.setattr(scoring, "_score_batch", interrupted)
    assert cli.main(command) == 130
    assert "interrupted; what was computed is kept" in capsys.readouterr().err
    monkeypatch.setattr(
        scoring, "_score_batch", lambda *a: (batches.append(len(a[1])), score_batch(*a))
    )
    assert cli.main([*command, "--json"]) == 0
    printed = capsys.readouterr()
    data = json.loads(printed.out)
    assert sum(batches) == data["tasks"][0]["haystacks"] * 6  # nothing was scored twice
    assert "takes about 3 min if the top heads are soon stable, and at most about 2.5 h" in (
        printed.err
    )
    assert "needles generated; 128 tokens; 6 depths; 4 to 20 haystacks per task" in printed.err
    heads = HeadSet.load(data["files"]["json"])
    assert [each["name"] for each in data["heads"]] == list(map(str, heads))
    assert len(HeadScores.load(data["files"]["parquet"]).values) == sum(batches)
    assert all(path.stat().st_size for path in tmp_path.glob("*.png"))

    monkeypatch.setattr(scoring, "_score_batch", None)
    assert cli.main(command) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert "share" in first
    assert "by chance 0.4" in first
    assert [line.split()[0] for line in rest[:-1]] == list(map(str, heads))


def test_a_model_with_random_weights_has_no_heads(tmp_path, capsys, monkeypatch):
    vlm = example_prompts.vlm("qwen2_5_vl")
    monkeypatch.setattr("mmheads.models.load", lambda *_, **__: vlm)
    stale = tmp_path / "qwen2_5_vl-natural-corpus-0.5.json"
    stale.write_text("a list of an earlier run")
    command = ["detect", "random", "--tasks", "text", "--haystacks", "4", "--out", str(tmp_path)]
    assert cli.main([*command, "--lengths", "700"]) == commands.NOTHING_FOUND
    printed = capsys.readouterr()
    assert "no heads were found: the halves agree no better than by chance" in printed.out
    assert "takes about" in printed.err
    assert not stale.exists()
    assert {path.suffix for path in tmp_path.iterdir() if path.is_file()} == {".parquet", ".png"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-model"], "no-such-model could not be loaded"),
        (["tiny-qwen3-vl-m", "--from", "nowhere"], "nowhere is not a folder"),
        (["tiny-qwen3-vl-m", "--tasks", "music"], "task is 'music'"),
        (["tiny-qwen3-vl-m", "--lengths", "9000"], "length is 9000"),
        (["tiny-qwen3-vl-m", "--out", "file"], "file cannot be written to"),
    ],
)
def test_detect_refuses_bad_input_in_one_sentence(
    arguments, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("not a folder")
    assert cli.main(["detect", "--out", "out", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len([line for line in error.splitlines() if line.startswith("mmheads:")]) == 1


def test_a_mistyped_name_is_refused_at_once_where_there_is_no_network(tmp_path):
    """The hub is asked once, not six times in half a minute."""
    words = ["-m", "mmheads", "detect", "Qwen/Qwen3-VL-2B-Instuct", "--out", str(tmp_path / "out")]
    environment = {"PYTHONPATH": str(paths.ROOT), "HF_ENDPOINT": "http://127.0.0.1:1"}
    environment |= {"HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert "Qwen3-VL-2B-Instuct could not be loaded: the Hugging Face hub cannot be reached" in line
