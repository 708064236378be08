"""The benchmark measures what it says; no time is tested."""

import math

import pandas as pd
import pytest
import torch

from mmheads import latency


@pytest.fixture(scope="module")
def small() -> latency.Shape:
    return latency.Shape(2, 32, 4, 2, 8, 64, 128)


def test_variants_are_compared_in_turn():
    calls = []
    table = latency.compare(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=2, device="cpu"
    )
    assert calls == ["a", "b"] * 3
    assert table["variant"].tolist() == ["a", "b"]
    assert (table["low"] <= table["seconds"]).all()
    assert (table["seconds"] <= table["high"]).all()


def test_peak_memory_sees_what_a_call_allocates():
    size = 200_000_000
    peak = latency.peak_bytes(lambda: torch.ones(size // 4), "cpu")
    assert 0.8 * size < peak < 1.5 * size


def test_a_random_prompt_is_scored_like_any_other(small):
    vlm = latency.random_model(small, "cpu", torch.float32)
    prompt, empty = latency.random_prompts(vlm, 256)
    assert len(prompt) == 256
    assert len(prompt.question) == latency.QUESTION_TOKENS
    values = latency.score_prompt(vlm, prompt, empty)
    uniform = 56 / 240
    assert 0.5 * uniform < values["raw"].mean() < 2 * uniform


def test_command_prints_and_writes_ratios(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(latency.SHAPES, "small", small)
    path = tmp_path / "scoring.csv"
    arguments = ["scoring", "--lengths", "128", "256", "--repeats", "1", "--eager-up-to", "128"]
    assert latency.main([*arguments, "--device", "cpu", "--out", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "2 layers, 4 heads of 8 in 2 KV groups" in printed
    assert "32 question tokens" in printed
    table = pd.read_csv(path)
    names = [latency.PLAIN, latency.RECORDED, latency.CALIBRATED]
    computed = f"{latency.EAGER} (computed)"
    assert table["variant"].tolist() == [*names, latency.EAGER, *names, computed]
    plain = table[table["variant"] == latency.PLAIN]
    assert (plain["time_ratio"] == 1).all()
    (maps,) = table.loc[table["variant"] == computed, "peak_bytes"]
    assert maps == 2 * 4 * 256 * 256 * 4
    assert math.isnan(table["seconds"].iloc[-1])


def test_retrieval_prints_shares_of_a_full_pass(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(latency.SHAPES, "small", small)
    path = tmp_path / "retrieval.csv"
    arguments = ["retrieval", "--lengths", "1024", "--repeats", "1", "--device", "cpu"]
    assert latency.main([*arguments, "--out", str(path)]) == 0
    assert "of 100 full passes" in capsys.readouterr().out
    table = pd.read_csv(path).set_index("variant")
    assert (table["tokens"] == 1024 + 2 + latency.QUESTION_TOKENS + 1).all()
    assert table["time_ratio"][latency.FULL] == 1
    whole, index, many = (table["seconds"][n] for n in (latency.FULL, "index", "100 questions"))
    assert many > index
    assert table["time_ratio"]["100 questions"] == pytest.approx(many / (100 * whole))
    assert table["null_ratio"]["100 questions"] == pytest.approx(many / (200 * whole))
    layers = table["layers"].iloc[0]
    cached = 2 * layers * 2 * 8 * (1024 + 3) * 4
    assert 0 <= table["held_bytes"]["index"] - cached < 0.2 * cached
    assert (table["peak_bytes"].dropna() >= 0).all()


def test_too_short_lengths_are_refused(capsys):
    assert latency.main(["scoring", "--lengths", "16"]) == 1
    assert "at least 128 tokens" in capsys.readouterr().err
