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
    prompt = latency.random_prompt(vlm, 256)
    assert len(prompt) == 256
    assert len(prompt.question) == latency.QUESTION_TOKENS
    values = latency.score_prompt(vlm, prompt)
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


def test_prefill_is_timed_beside_what_operations_allow(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(latency.SHAPES, "wide", small)
    path = tmp_path / "prefill.csv"
    arguments = ["prefill", "--lengths", "128", "256", "--repeats", "1", "--device", "cpu"]
    arguments += ["--dense", "0.5", "--sinks", "4", "--window", "28", "--out", str(path)]
    assert latency.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "50.0% of the heads in 50.0% of the KV groups dense" in printed
    table = pd.read_csv(path)
    stock = table[table["variant"] == latency.STOCK]
    assert (stock["speed_up"] == 1).all()
    assert stock["limit"].isna().all()
    hybrid = table[table["variant"] == latency.STREAMED].set_index(["scope", "tokens"])
    kept = 0.5 + 0.5 * sum(min(i, 32) for i in range(1, 257)) / sum(range(1, 257))
    assert hybrid["limit"]["attention", 256] == pytest.approx(1 / kept)
    attention = 2 * 2 * 4 * 8 * 256 * 257
    linear = 2 * 256 * 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64)
    allowed = (linear + attention) / (linear + attention * kept)
    assert hybrid["limit"]["whole model", 256] == pytest.approx(allowed)
    assert (table["peak_bytes"].notna() == (table["scope"] == "whole model")).all()
    assert latency.main([*arguments, "--window", "0"]) == 1
    assert "window 0" in capsys.readouterr().err


def test_decoding_is_timed_and_caches_weighed(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(latency.SHAPES, "wide", small)
    path = tmp_path / "decode.csv"
    arguments = ["decode", "--lengths", "256", "--repeats", "1", "--device", "cpu"]
    arguments += ["--dense", "0.5", "--sinks", "4", "--window", "28", "--out", str(path)]
    assert latency.main(arguments) == 0
    table = pd.read_csv(path).set_index("variant")
    assert table["held_bytes"][latency.STOCK] == 2 * 2 * 2 * 8 * 256 * 4
    assert table["memory_ratio"][latency.STREAMED] == 1
    assert table["memory_ratio"][latency.STATIC] == (256 + 2 * latency.STEPS) / 256
    assert table["memory_ratio"][latency.COMPACT] == pytest.approx(0.5 + 0.5 * 32 / 256)


def test_dense_heads_are_whole_groups_or_single_heads():
    vlm = latency.random_model(latency.Shape(3, 32, 8, 4, 8, 64, 128), "cpu", torch.float32)
    groups = latency.dense_heads(vlm, 0.25)
    assert len(groups) == 3 * 2
    assert len(groups.kv_groups) == 3
    single = latency.dense_heads(vlm, 0.25, by="head")
    assert [head.layer for head in single] == [0, 0, 1, 1, 2, 2]


def test_too_short_lengths_are_refused(capsys):
    assert latency.main(["scoring", "--lengths", "16"]) == 1
    assert "at least 128 tokens" in capsys.readouterr().err
