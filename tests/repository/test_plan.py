"""What a run will compute and cost, before it runs."""

import json
from itertools import product

import fake_datasets
import numpy as np
import pytest
import random_models

import reproduce
from mmheads import kept_scores, paths, plan, published, scoring
from mmheads.models import load
from mmheads.plan import ScoreRun
from mmheads.tasks import needles

LENGTHS = (8192, 16384, 32768, 65536, 131072)
TINY = "tiny-qwen3-vl-m"


@pytest.fixture(scope="module")
def tiny():
    return load(TINY, device="cpu")


@pytest.fixture
def printed(capsys, tmp_path):
    """What `--plan` prints for a parameter file of the repository."""

    def show(file: str, *words: str) -> str:
        command = ["--plan", "--params", str(paths.ROOT / "params" / file), *words]
        assert reproduce.main(command, runs=tmp_path) == 0
        assert not list(tmp_path.iterdir()), "a plan writes nothing"
        return capsys.readouterr().out

    return show


def test_paper_a_scores_six_models_without_any_of_them_here(printed):
    out = printed("paper_mmrethead.yaml", "--gpu", "H100")
    assert "6 models x 4 tasks x 5 lengths x 120 prompts = 14,400 prompts" in out
    rows = [line.split() for line in out.splitlines()]
    needed = {
        (row[0], row[2]): row[6]
        for row in rows
        if len(row) == 10 and row[1] == "rendered_text" and row[9] == "no"
    }
    assert len(needed) == 6 * len(LENGTHS)
    assert needed["Qwen3-VL-8B-Instruct", "131072"] == "1"
    assert needed["Qwen3-VL-32B-Instruct", "131072"] == "2"
    assert "estimates, not measurements" in out
    for model in plan.MODELS:
        assert (f"\n{plan.name_of(model)}/02_score_heads\n" in out) == (
            plan.name_of(model) in published.GEOMETRIES
        )


def test_paper_b_scores_its_five_models(printed):
    assert "5 models x 4 tasks x 3 lengths x 120 prompts = 7,200" in printed("paper_core.yaml")


def test_table_has_the_heads_that_the_released_scores_have():
    known = {plan.name_of(model): shape for model, shape in plan.MODELS.items()}
    for name, geometry in published.GEOMETRIES.items():
        shape = known[name]
        assert (shape.layers, shape.heads) == (geometry.layers, geometry.heads)
        assert shape.kv_groups == geometry.kv_groups
        full = geometry.layers if geometry.global_layers is None else len(geometry.global_layers)
        assert shape.layers - shape.sliding == full


def test_estimates_give_back_the_logs_that_they_are_from():
    fast, slow = plan.speeds()
    shape, gpu = plan.MODELS[plan.LOGGED], plan.GPUS[plan.TAKEN_FOR]
    for length, (most, least) in plan.LOGS.items():
        assert fast.seconds(shape, length, gpu) == pytest.approx(1 / most)
        assert slow.seconds(shape, length, gpu) == pytest.approx(1 / least)
    assert 19e9 < shape.memory(8192) < 20e9
    assert 47e9 < shape.memory(131072) < 53e9


def test_sliding_layers_keep_and_read_their_window_alone():
    whole = plan.MODELS["google/gemma-3-27b-it"]
    dense = plan.replace(whole, sliding=0)
    assert whole.memory(1024) == dense.memory(1024)
    assert whole.operations(1024) == dense.operations(1024)
    kept = 2 * plan.BYTES * whole.kv_groups * whole.channels * 52
    assert dense.memory(8192) - whole.memory(8192) == kept * (8192 - 1024)
    seen = 8192**2 / 2 - (1024**2 / 2 + 1024 * (8192 - 1024))
    saved = 4 * whole.heads * whole.channels * 52 * seen
    assert dense.operations(8192) - whole.operations(8192) == pytest.approx(saved)


def test_a_folder_is_read_for_its_shape(tiny, tmp_path):
    shape = plan.shape_of(TINY)
    assert shape.parameters == sum(weight.numel() for weight in tiny.model.parameters())
    assert (shape.layers, shape.hidden, shape.heads) == (6, 128, 16)
    assert (shape.kv_groups, shape.channels, shape.sliding) == (4, 32, 0)
    assert plan.shape_of(str(paths.MODELS / TINY)) == shape
    assert plan.shape_of("nobody/nothing") is None
    with pytest.raises(plan.UsageError, match=r"holds no config.json"):
        plan.shape_of(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(plan.UsageError, match=r"holds no \*.safetensors"):
        plan.shape_of(str(tmp_path))


def test_sliding_layers_of_a_folder_are_counted(tmp_path):
    folder = random_models.save("gemma3", tmp_path)
    text = load(folder, device="cpu").text_config
    shape = plan.shape_of(str(folder))
    assert shape.window == text.sliding_window
    assert shape.sliding == text.layer_types.count("sliding_attention") > 0


def test_what_is_scored_already_is_found(tmp_path):
    run = ScoreRun(model=TINY, task="text", length=128, pairs=1, folder=str(tmp_path))
    assert (run.prompts, run.scored()) == (6, 0)
    assert run.run() == ""
    assert run.scored() == 6
    twice = plan.replace(run, pairs=2)
    assert (twice.prompts, twice.scored()) == (12, 6)
    others = [{"length": 256}, {"task": "image"}, {"null_images": "pixels"}]
    others += [{"image_ratio": 0.0}, {"model": "tiny-qwen3-m"}]
    for other in others:
        assert plan.replace(run, **other).scored() == 0
    listed = [line.done for line in plan.lines([run, twice, plan.replace(run, length=256)], [])]
    assert listed == ["yes", "6 prompts", "no"]


def test_scores_of_other_versions_do_not_count(tmp_path, monkeypatch):
    run = ScoreRun(model=TINY, task="text", length=64, pairs=1, folder=str(tmp_path))
    assert run.run() == ""
    monkeypatch.setattr(kept_scores, "library_versions", lambda: {"torch": "0.0"})
    assert run.scored() == 0


def test_a_failing_run_says_so_in_one_line():
    run = ScoreRun(model=TINY, task="text", length=3, pairs=1)
    assert run.run() == "ValueError: length is 3; expected at least 21 tokens for the task text"


def test_runs_of_several_notebooks_are_done_once_with_the_most_pairs():
    first = {"model": "a", "lengths": [64, 128], "pairs": 1, "scores_folder": ""}
    second = {"model": "a", "lengths": [128], "detection_pairs": 3, "pairs": 9, "scores_folder": ""}
    second |= {"predecessor": "b", "image_shares": [0.0, 0.4], "share_length": 128}
    runs = plan.merged([*plan.score_runs(first), *plan.score_runs(second)])
    found = [(r.model, r.task, r.length, r.image_ratio, r.pairs) for r in runs]
    assert found == [
        *(("a", task, n, 0.5, 1 if n == 64 else 3) for task in needles.TASKS for n in (64, 128)),
        ("a", "text", 128, 0.0, 3),
        ("a", "text", 128, 0.4, 3),
        ("b", "text", 128, 0.0, 3),
    ]
    assert plan.score_runs({"model": "a", "length": 64, "scores_folder": ""}) == []


def test_answers_are_prompts_times_maskings():
    parameters = {
        "lengths": [8192, 16384],
        "length": 8192,
        "pairs": 3,
        "prompts": 10,
        "fractions": [0.01, 0.05],
        "all_controls": 0.05,
        "draws": 2,
        "cause_prompts": 5,
        "cause_length": 4096,
    }
    held_out = 4 * 10 * (1 + 2)
    curves = 4 * 10 * (1 + 2 * (1 + 2 + 1) + (2 + 2))
    rankings = 6 * 10 * (1 + 8 + 2) - 4 * 10 * 2  # the whole model, and a task's own heads, again
    causes = 4 * 10 * 3 + 4 * 10 * 2 * 3
    maps, transfer = 2 * 6 * 3 * 3, 2 * 5 * (1 + 2)
    assert plan.answers(parameters) == {
        8192: held_out + curves + rankings + causes + maps + transfer,
        16384: maps + transfer,
        288: 2 * 10 * (1 + 1 + 2 + 2),
    }
    published = {"data": "there", "long_length": 16384, "long_questions": 7}
    found = plan.answers(parameters | published | {"benchmark_questions": 11})
    assert found == {
        8192: held_out + curves + rankings - 2 * 10 * (1 + 8 + 2) + causes + maps + transfer,
        16384: maps + transfer + 2 * 7 * (1 + 1 + 2 + 2),
        plan.BENCHMARK_TOKENS: (4 * 2 + 1) * 11 * (1 + 1 + 2 + 2),
    }
    assert plan.single_heads(parameters, heads=96) == {4096: 4 * 5 * (96 + 1 + 3)}


def test_rankings_are_passes_over_documents_and_windows_of_layouts():
    parameters = {"data": "there", "real_window": 200, "layout_window": 50}
    assert plan.rankings(parameters) == {65 * 1862: 314, 50 * 256: 3407}
    assert plan.rankings(parameters | {"real_window": 20}) == {20 * 1862: 1020, 50 * 256: 3407}
    assert plan.rankings(parameters | {"data": ""}) == {}


def test_runs_take_the_gpus_that_hold_them():
    big = "Qwen/Qwen3-VL-32B-Instruct"
    runs = [ScoreRun(model=big, task="text", length=n, pairs=1) for n in (8192, 131072)]
    assert [run.gpus for run in plan.on_gpus(runs, "")] == [1, 1]
    assert [run.gpus for run in plan.on_gpus(runs, "H100")] == [1, 2]
    assert [run.gpus for run in plan.on_gpus(runs, "H200")] == [1, 1]
    assert [run.gpus for run in plan.on_gpus(runs, "L40S")] == [2, 3]


def test_each_task_and_length_is_noted_as_a_condition_of_its_own(tiny, tmp_path):
    settings = {"pairs": 1, "folder": tmp_path, "progress": False}
    tasks, lengths = ("image", "text"), (160, 128)
    scores = scoring.score_needles(tiny, tasks=tasks, lengths=lengths, **settings)
    notes = [json.loads(path.read_text()) for path in tmp_path.glob("*/*.json")]
    found = {
        (n["about"]["task"], n["about"]["length"]): len(n["rows"]) for n in notes if "rows" in n
    }
    assert found == dict.fromkeys(product(tasks, lengths), len(needles.DEPTHS))
    order = scores.metadata[["task", "length", "depth"]].itertuples(index=False, name=None)
    assert list(order) == [(t, n, d) for t in tasks for n in lengths for d in needles.DEPTHS]
    (one,) = tmp_path.glob(f"{TINY}-*/*.parquet")
    before = one.read_bytes()
    alone = scoring.score_needles(tiny, tasks=["text"], lengths=[128], **settings)
    np.testing.assert_array_equal(alone.values, scores.select(task="text", length=128).values)
    assert [path.read_bytes() for path in tmp_path.glob("*/*.parquet")] == [before]


class Published:
    """Needles that are not generated: their own depths and name."""

    name = "mine"
    depths = (0.0, 1.0)

    def generate(self, tasks, lengths, depths, pairs, *, split):
        return needles.generate(tasks, lengths, depths, pairs, split=split)


def test_other_needles_than_the_generated_are_another_condition(tiny, tmp_path):
    settings = {"tasks": ["text"], "lengths": [64], "pairs": 1, "progress": False}
    scores = scoring.score_needles(tiny, source=Published(), folder=tmp_path, **settings)
    assert scores.metadata["depth"].tolist() == [0.0, 1.0]
    count = {"model": TINY, "task": "text", "length": 64, "folder": tmp_path}
    assert kept_scores.count_scored(**count, source=Published()) == 2
    assert kept_scores.count_scored(**count) == 0


def test_too_few_published_pairs_are_an_error_before_anything_runs(tmp_path):
    data = fake_datasets.write_data(tmp_path / "data", pairs=42, lengths=[8192])
    asked = {"model": TINY, "data": f"{data}", "lengths": [8192], "scores_folder": ""}
    asked |= {"detection_pairs": 20, "prompts": 12, "length": 8192}
    plan.check_pairs(asked)
    plan.check_pairs(asked | {"data": "", "detection_pairs": 1000})
    with pytest.raises(plan.UsageError, match=r"has 20 pairs of the task text .* 21 are asked for"):
        plan.check_pairs(asked | {"detection_pairs": 21})
    with pytest.raises(plan.UsageError, match=r"has 2 pairs .* in the split test; 3 are asked for"):
        plan.check_pairs(asked | {"prompts": 13})
    maps = {"fractions": [0.05], "pairs": 3}
    with pytest.raises(plan.UsageError, match=r"has 2 pairs .* in the split test; 3 are asked for"):
        plan.check_pairs(asked | maps)
