"""The benchmarks measure what they say; no time is tested."""

import math

import pandas as pd
import pytest
import random_models as families
import torch

from benchmarks import __main__ as command
from benchmarks import batches, random_models, retrieval, scoring, streaming, timing
from benchmarks.random_models import SIZES, Size
from mmheads.examples import Example
from mmheads.models import VLM, load
from mmheads.prompts import encode
from mmheads.scoring import score_heads, score_prompt
from mmheads.streaming import stream
from mmheads.tasks.needles import GENERATED


@pytest.fixture(scope="module")
def small() -> Size:
    return Size(2, 32, 4, 2, 8, 64, 128)


def test_variants_are_compared_in_turn():
    calls = []
    table = timing.compare(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=2, device="cpu"
    )
    assert calls == ["a", "b"] * 3
    assert table["variant"].tolist() == ["a", "b"]
    assert (table["low"] <= table["seconds"]).all()
    assert (table["seconds"] <= table["high"]).all()


def peak_of_an_array(kept: int, length: int, variant: str) -> int:
    """Peak memory of `length` bytes, after an array twice as large came and went."""
    held = torch.ones(kept // 4)
    del variant
    torch.ones(2 * length // 4)
    peak = timing.peak_bytes(lambda: torch.ones(length // 4), "cpu")
    assert len(held)
    return peak


def test_peak_memory_is_what_a_call_allocates_above_what_was_held():
    size = 100_000_000
    with timing.fresh_processes(peak_of_an_array, 2 * size) as peak:
        peaks = peak(size, "ones")
    assert len(peaks) == timing.PEAK_PROCESSES
    assert all(0.9 * size < each < 1.1 * size for each in peaks)


def test_a_random_prompt_is_scored_like_any_other(small):
    vlm = random_models.random_model(small, "cpu", torch.float32)
    prompt = random_models.random_prompt(vlm, 256)
    assert len(prompt) == 256
    assert len(prompt.question) == random_models.QUESTION_TOKENS
    values = score_prompt(vlm, prompt)
    uniform = 56 / 240
    assert 0.5 * uniform < values["raw"].mean() < 2 * uniform


def test_command_prints_and_writes_ratios(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(SIZES, "small", small)
    path = tmp_path / "scoring.csv"
    arguments = ["scoring", "--lengths", "128", "256", "--repeats", "1", "--eager-up-to", "128"]
    assert command.main([*arguments, "--device", "cpu", "--out", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "2 layers, 4 heads of 8 in 2 KV groups" in printed
    assert "32 question tokens" in printed
    table = pd.read_csv(path)
    names = [scoring.PLAIN, scoring.RECORDED, scoring.CALIBRATED]
    computed = f"{scoring.EAGER} (computed)"
    assert table["variant"].tolist() == [*names, scoring.EAGER, *names, computed]
    plain = table[table["variant"] == scoring.PLAIN]
    assert (plain["time_ratio"] == 1).all()
    (maps,) = table.loc[table["variant"] == computed, "peak_bytes"]
    assert maps == 2 * 4 * 256 * 256 * 4
    assert math.isnan(table["seconds"].iloc[-1])


def test_retrieval_prints_shares_of_a_full_pass(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(SIZES, "small", small)
    path = tmp_path / "retrieval.csv"
    arguments = ["retrieval", "--lengths", "1024", "--repeats", "1", "--device", "cpu"]
    assert command.main([*arguments, "--out", str(path)]) == 0
    assert "of 100 full passes" in capsys.readouterr().out
    table = pd.read_csv(path).set_index("variant")
    assert (table["tokens"] == 1024 + 2 + random_models.QUESTION_TOKENS + 1).all()
    assert table["time_ratio"][retrieval.FULL] == 1
    whole, index, many = (table["seconds"][n] for n in (retrieval.FULL, "index", "100 questions"))
    assert many > index
    assert table["time_ratio"]["100 questions"] == pytest.approx(many / (100 * whole))
    assert table["null_ratio"]["100 questions"] == pytest.approx(many / (200 * whole))
    assert 0 < table["seconds"][retrieval.PREFIX] < whole
    layers = table["layers"].iloc[0]
    cached = 2 * layers * 2 * 8 * (1024 + 3) * 4
    assert 0 <= table["held_bytes"]["index"] - cached < 0.2 * cached
    assert (table["peak_bytes"].dropna() >= 0).all()


def test_a_prefix_cache_gives_the_logits_of_a_full_pass(small):
    vlm = random_models.random_reader(small, "cpu", torch.float32)
    document = retrieval._Document.draw(vlm, 1024, 1)
    prompt = encode(vlm, Example(context=tuple(document.pages), question=tuple(document.questions)))
    with torch.no_grad():
        whole = vlm.model(**prompt.inputs, use_cache=False).logits[0, -1]
    seen = []
    head = vlm.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, given, logits: seen.append(logits[0, -1]))
    run = document.after_prefix()
    run()
    run()
    hook.remove()
    for logits in seen:
        assert torch.allclose(logits, whole, atol=1e-4)
    assert len(seen) == 2


def test_prefill_is_timed_beside_what_operations_allow(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(SIZES, "wide", small)
    path = tmp_path / "prefill.csv"
    arguments = ["prefill", "--lengths", "128", "256", "--repeats", "1", "--device", "cpu"]
    arguments += ["--dense", "0.5", "--sinks", "4", "--window", "28", "--out", str(path)]
    assert command.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "50.0% of the heads in 50.0% of the KV groups dense" in printed
    table = pd.read_csv(path)
    stock = table[table["variant"] == streaming.STOCK]
    assert (stock["speed_up"] == 1).all()
    assert stock["limit"].isna().all()
    hybrid = table[table["variant"] == streaming.STREAMED].set_index(["scope", "tokens"])
    kept = 0.5 + 0.5 * sum(min(i, 32) for i in range(1, 257)) / sum(range(1, 257))
    assert hybrid["limit"]["attention", 256] == pytest.approx(1 / kept)
    attention = 2 * 2 * 4 * 8 * 256 * 257
    linear = 2 * 256 * 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64)
    allowed = (linear + attention) / (linear + attention * kept)
    assert hybrid["limit"]["whole model", 256] == pytest.approx(allowed)
    assert hybrid["limit_share"].to_numpy() == pytest.approx(hybrid["speed_up"] / hybrid["limit"])
    assert (table["kernel"] == "scaled_dot_product_flash_attention_for_cpu").all()
    assert (table["peak_bytes"].notna() == (table["scope"] == "whole model")).all()
    assert command.main([*arguments, "--window", "0"]) == 1
    assert "window 0" in capsys.readouterr().err


def test_decoding_is_timed_and_caches_weighed(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(SIZES, "wide", small)
    path = tmp_path / "decode.csv"
    arguments = ["decode", "--lengths", "256", "--repeats", "1", "--device", "cpu"]
    arguments += ["--dense", "0.5", "--sinks", "4", "--window", "28", "--out", str(path)]
    assert command.main(arguments) == 0
    table = pd.read_csv(path).set_index("variant")
    assert table["held_bytes"][streaming.STOCK] == 2 * 2 * 2 * 8 * 256 * 4
    assert table["memory_ratio"][streaming.STREAMED] == 1
    assert table["memory_ratio"][streaming.STATIC] == (256 + 2 * streaming.STEPS) / 256
    assert table["memory_ratio"][streaming.COMPACT] == pytest.approx(0.5 + 0.5 * 32 / 256)


def test_scores_of_separate_passes_are_those_of_batches():
    vlm = load(batches.MODEL)
    examples = list(GENERATED.generate((), [128], (0.5,), haystacks=1))
    scores = score_heads(vlm, examples, null_images="pixels", progress=False).values
    for run in (batches._scores_by_passes, batches._scores_one_by_one):
        assert run(vlm, examples) == pytest.approx(scores, abs=1e-5)


def test_without_a_name_all_benchmarks_run_briefly(capsys):
    ran = list(command.chosen(command.parse(["--device", "cpu"])))
    assert [one.what for one in ran] == list(command.LENGTHS)
    assert {one.what: one.lengths for one in ran} == command.BRIEF
    assert {one.repeats for one in ran} == {2}
    assert [one.lengths for one in command.chosen(command.parse(["decode"]))] == [
        command.LENGTHS["decode"]
    ]
    with pytest.raises(SystemExit):
        command.parse(["--out", "table.csv"])
    assert "belong to one benchmark" in capsys.readouterr().err


def test_dense_heads_are_whole_groups_or_single_heads():
    vlm = random_models.random_model(Size(3, 32, 8, 4, 8, 64, 128), "cpu", torch.float32)
    groups = streaming.dense_heads(vlm, 0.25)
    assert len(groups) == 3 * 2
    assert len(groups.kv_groups) == 3
    single = streaming.dense_heads(vlm, 0.25, by="head")
    assert [head.layer for head in single] == [0, 0, 1, 1, 2, 2]


def test_layers_may_have_other_head_sizes_and_kv_heads():
    model = families.token_model("gemma4 with fewer global KV heads")
    vlm = VLM(model=model, processor=families.build("qwen3")[1], model_id="gemma4")
    weights = sum(w.numel() for w in vlm.decoder.layers.parameters() if w.ndim == 2)
    linear, pairs = 2 * 64 * weights, 64 * 65 / 2
    attention = 4 * 4 * (16 + 32 + 16 + 32) * pairs
    kept = 0.25 + 0.75 * 64 / pairs  # window heads see only themselves
    expected = (linear + attention) / (linear + kept * attention)
    assert streaming.arithmetic_limit(vlm, 64, 0.25, 0, 1) == pytest.approx(expected)
    dense = streaming.dense_heads(vlm, 0.5, by="head")
    with stream(vlm, dense, 2, 4) as streamed:
        caches = streaming._filled_caches(vlm, streamed, 8, 12)
    layers = caches[streaming.STOCK].layers
    assert [tuple(layer.keys.shape[1:]) for layer in layers] == [(2, 8, 16), (1, 8, 32)] * 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["scoring", "--lengths", "16"], "at least 128 tokens"),
        (["scoring", "--repeats", "0"], "--repeats 0"),
        (["decode", "--sinks", "9999"], "--sinks 9999: expected at least 0, and at most the 1024"),
        (["decode", "--sinks", "-1"], "--sinks -1"),
        (["prefill", "--dense", "nan"], "--dense nan: expected a share in (0, 1]"),
        (["scoring", "--device", "nonsense"], "--device nonsense: it cannot be used"),
        (["scoring", "--out", "{folder}"], "this is a folder"),
        (["scoring", "--out", "{folder}/a.txt/b.csv"], "a.txt is not a folder"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_it_is(
    tmp_path, capsys, monkeypatch, words, message
):
    (tmp_path / "a.txt").touch()
    monkeypatch.setattr(command, "measure", None)
    assert command.main([word.format(folder=tmp_path) for word in words]) == 1
    out, error = capsys.readouterr()
    assert message in error
    assert (out, error.count("\n")) == ("", 1)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("out\nof memory"), OSError("disk")])
def test_what_fails_while_measuring_is_one_line(capsys, monkeypatch, error):
    def fail(options):
        raise error

    monkeypatch.setattr(command, "measure", fail)
    assert command.main(["scoring"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_random_readers_share_the_words_of_the_tiny_models():
    words = random_models.words()
    assert len(words) == len({*words}) > 100
    assert not [word for word in words if word.startswith("<")]
    vlm = random_models.random_reader(SIZES["small"], "cpu", torch.float32)
    assert vlm.tokenizer.unk_token_id not in vlm.tokenizer(" ".join(words))["input_ids"]
    assert random_models.token_pixels() == 16
