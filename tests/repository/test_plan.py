"""What a run will compute and cost, before it runs."""

import json
from itertools import product

import fake_datasets
import numpy as np
import pandas as pd
import pytest
import random_models
from nbformat.v4 import new_code_cell, new_notebook, writes

import reproduce
from cluster import cost, models, parameters, real_results, scores, workload
from cluster.models import UsageError
from cluster.scores import ScoreRun
from cluster.workload import Passes, Scores, Workload
from mmheads import kept_scores, paths, published, scoring
from mmheads.models import load
from mmheads.tasks.grids import DEPTHS, TASKS, Grid
from mmheads.tasks.needles import GENERATED, Needles

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


def declared(stem: str, **parameters) -> Workload:
    """What a notebook of the repository declares with its defaults and these parameters."""
    path = paths.NOTEBOOKS / f"{stem}.ipynb"
    return workload.read(path, reproduce.defaults(path) | parameters)


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
    for model in models.MODELS:
        assert (f"\n{models.name_of(model)}/02_score_heads\n" in out) == (
            models.name_of(model) in published.GEOMETRIES
        )


def test_paper_b_scores_its_five_models(printed):
    assert "5 models x 4 tasks x 3 lengths x 120 prompts = 7,200" in printed("paper_core.yaml")


def test_the_pretrained_text_model_is_named_in_notebooks_that_show_it(printed):
    out = printed("real_text.yaml", "--only", "02", "03", "04", "05", "07")
    assert "1 model x 4 tasks" in out, "the other sections run as ever"
    sections = parameters.read_params(paths.ROOT / "params" / "real_text.yaml").sections
    named = {value["real_model"] for value in sections.values()}
    assert named == {f"{real_results.MODEL}.gguf"}
    for section in sections:
        assert reproduce.defaults(paths.NOTEBOOKS / f"{section}.ipynb")["real_model"]


def test_table_has_the_heads_that_the_released_scores_have():
    known = {models.name_of(model): size for model, size in models.MODELS.items()}
    for name, geometry in published.GEOMETRIES.items():
        size = known[name]
        assert (size.layers, size.heads) == (geometry.layers, geometry.heads)
        assert size.kv_groups == geometry.kv_groups
        full = geometry.layers if geometry.global_layers is None else len(geometry.global_layers)
        assert size.layers - size.sliding == full


def test_estimates_give_back_the_logs_that_they_are_from():
    fast, slow = cost.speeds()
    size, gpu = models.MODELS[cost.LOGGED], cost.GPUS[cost.TAKEN_FOR]
    for length, (most, least) in cost.LOGS.items():
        assert fast.seconds(size, length, gpu) == pytest.approx(1 / most)
        assert slow.seconds(size, length, gpu) == pytest.approx(1 / least)
    assert 19e9 < size.memory(8192) < 20e9
    assert 47e9 < size.memory(131072) < 53e9


def test_sliding_layers_keep_and_read_only_their_window():
    gemma = models.MODELS["google/gemma-3-27b-it"]
    dense = cost.replace(gemma, sliding=0)
    assert gemma.memory(1024) == dense.memory(1024)
    assert gemma.operations(1024) == dense.operations(1024)
    kept = 2 * models.BYTES * gemma.kv_groups * gemma.channels * 52
    assert dense.memory(8192) - gemma.memory(8192) == kept * (8192 - 1024)
    seen = 8192**2 / 2 - (1024**2 / 2 + 1024 * (8192 - 1024))
    saved = 4 * gemma.heads * gemma.channels * 52 * seen
    assert dense.operations(8192) - gemma.operations(8192) == pytest.approx(saved)


def test_a_folder_is_read_for_its_size(tiny, tmp_path):
    size = models.size_of(TINY)
    assert size.parameters == sum(weight.numel() for weight in tiny.model.parameters())
    assert (size.layers, size.hidden, size.heads) == (8, 128, 16)
    assert (size.kv_groups, size.channels, size.sliding) == (4, 32, 0)
    assert models.size_of(str(paths.MODELS / TINY)) == size
    assert models.size_of("nobody/nothing") is None
    with pytest.raises(UsageError, match=r"holds no config.json"):
        models.size_of(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"holds no \*.safetensors"):
        models.size_of(str(tmp_path))


def test_sliding_layers_of_a_folder_are_counted(tmp_path):
    folder = random_models.save("gemma3", tmp_path)
    text = load(folder, device="cpu").text_config
    size = models.size_of(str(folder))
    assert size.window == text.sliding_window
    assert size.sliding == text.layer_types.count("sliding_attention") > 0


def test_what_is_scored_already_is_found(tmp_path):
    run = ScoreRun(model=TINY, task="text", length=128, haystacks=1, folder=str(tmp_path))
    assert (run.prompts, run.scored()) == (6, 0)
    assert run.run() == ""
    assert run.scored() == 6
    twice = cost.replace(run, haystacks=2)
    assert (twice.prompts, twice.scored()) == (12, 6)
    others = [{"length": 256}, {"task": "image"}, {"null_images": "pixels"}]
    others += [{"source": Needles(0.0)}, {"model": "tiny-qwen3-m"}, {"split": "test"}]
    for other in others:
        assert cost.replace(run, **other).scored() == 0
    runs = [run, twice, cost.replace(run, length=256)]
    assert [row.done for row in cost.plan_rows(runs, [])] == ["yes", "6 prompts", "no"]


def test_scores_of_other_versions_do_not_count(tmp_path, monkeypatch):
    run = ScoreRun(model=TINY, task="text", length=64, haystacks=1, folder=str(tmp_path))
    assert run.run() == ""
    monkeypatch.setattr(kept_scores, "library_versions", lambda: {"torch": "0.0"})
    assert run.scored() == 0


def test_files_of_others_among_the_scores_are_left_alone(tmp_path):
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / f"{TINY}-text-64.parquet")
    (tmp_path / "notes.txt").write_text("not a table", encoding="utf-8")
    run = ScoreRun(model=TINY, task="text", length=64, haystacks=1, folder=str(tmp_path))
    assert run.scored() == 0


@pytest.mark.parametrize("about", [True, False])
def test_a_damaged_store_is_named(tmp_path, about):
    run = ScoreRun(model=TINY, task="text", length=64, haystacks=1, folder=str(tmp_path))
    assert run.run() == ""
    (folder,) = tmp_path.glob(f"{TINY}-*")
    damaged = next(path for path in folder.glob("*.json") if (path.name == "about.json") == about)
    damaged.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=damaged.name):
        run.scored()


def test_a_failing_run_says_so_in_one_line():
    run = ScoreRun(model=TINY, task="text", length=3, haystacks=1)
    assert run.run() == "ValueError: length is 3; expected at least 21 tokens for the task text"


def test_runs_of_several_notebooks_are_done_once_with_the_most_haystacks():
    grid = [Scores(task="text", length=n, haystacks=1, split="detection") for n in (64, 128)]
    more = [Scores(task="text", length=128, haystacks=3, split="detection")]
    one = {"task": "text", "length": 128, "haystacks": 3, "split": "detection"}
    more += [Scores(image_ratio=0.0, **one), Scores(image_ratio=0.0, model="b", **one)]
    parameters = {"model": "a", "scores_folder": "", "data": "published"}
    first, second = (scores.score_runs(Workload(tuple(rows)), parameters) for rows in (grid, more))
    found = [
        (r.model, r.task, r.length, r.haystacks, r.source) for r in scores.merged([*first, *second])
    ]
    assert found == [
        ("a", "text", 64, 1, "published"),
        ("a", "text", 128, 3, "published"),
        ("a", "text", 128, 3, Needles(0.0)),
        ("b", "text", 128, 3, Needles(0.0)),
    ]


@pytest.mark.parametrize("stem", ["02_score_heads", "03_sparsity_curves", "05_ablations"])
def test_notebooks_declare_the_scores_of_every_task_and_length(stem):
    counts = {"haystacks" if stem != "05_ablations" else "detection_haystacks": 3}
    rows = declared(stem, lengths=[64, 128], **counts).scores
    assert {(row.task, row.length, row.haystacks, row.split) for row in rows} == {
        (task, n, 3, "detection") for task in TASKS for n in (64, 128)
    }


def test_notebook_04_declares_shares_of_images_and_the_predecessor():
    rows = declared("04_spearman_stability", lengths=[64], image_shares=[0.0, 0.4]).scores[4:]
    assert [(row.image_ratio, row.model) for row in rows] == [
        (0.0, ""), (0.4, ""), (0.0, "tiny-qwen3-m"), (0.5, "")
    ]  # fmt: skip
    assert len(declared("04_spearman_stability", lengths=[64], predecessor="").scores) == 4 + 4


def test_documents_and_windows_of_layouts_are_ranked_where_there_are_data():
    windows = {"real_window": 200, "layout_window": 50, "real_dpi": 144, "cost_tokens": [64]}
    rows = {row.what: row for row in declared("06_retrieval", data="there", **windows).passes}
    pages, layouts = rows["MMDocIR pages"], rows["MMDocIR layouts"]
    assert (pages.length, pages.prompts) == (65 * 1862, 314)
    assert (layouts.length, layouts.prompts) == (50 * 256, 3407)
    assert not [row for row in declared("06_retrieval").passes if "MMDocIR" in row.what]


def cell(folder, source: str, tags=("workload",)):
    path = folder / "01_made.ipynb"
    cells = [new_code_cell(source, metadata={"tags": list(tags)})]
    path.write_text(writes(new_notebook(cells=cells)), encoding="utf-8")
    return path


def test_a_workload_is_what_its_cell_defines_from_the_parameters(tmp_path):
    source = "workload = {'passes': [{'what': 'x', 'length': n, 'prompts': 2, 'passes': 3}]}"
    read = workload.read(cell(tmp_path, source), {"n": 64})
    assert read == Workload(passes=(Passes(what="x", length=64, prompts=2, passes=3),))
    assert workload.read(cell(tmp_path, source, tags=()), {}) == Workload()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("workload = {'passes': [{'what': 'x'}]}", "missing 3 required"),
        ("workload = {'scores': [{'pairs': 3}]}", "unexpected keyword argument 'pairs'"),
        ("workload = [", "SyntaxError"),
        ("a = 1 / 0", "ZeroDivisionError"),
        ("a = 1", "KeyError: 'workload'"),
    ],
)
def test_a_workload_cell_that_fails_is_named(tmp_path, source, reason):
    with pytest.raises(UsageError, match=rf"01_made cannot say .*{reason}"):
        workload.read(cell(tmp_path, source), {})


def test_haystacks_are_those_of_scores_and_of_prompts_at_all_depths():
    one = {"task": "text", "length": 64}
    rows = Workload(
        (
            Scores(haystacks=2, split="detection", **one),
            Scores(haystacks=9, split="detection", image_ratio=0.1, **one),
        ),
        (
            Passes(what="a", prompts=13, passes=1, split="test", **one),
            Passes(what="b", prompts=6, passes=9, split="test", **one),
            Passes(what="c", prompts=99, passes=1, length=64),
        ),
    )
    assert rows.haystacks(depths=6) == {("text", 64, "detection"): 2, ("text", 64, "test"): 3}


def test_runs_take_the_gpus_that_hold_them():
    big = "Qwen/Qwen3-VL-32B-Instruct"
    runs = [ScoreRun(model=big, task="text", length=n, haystacks=1) for n in (8192, 131072)]
    assert [run.gpus for run in cost.on_gpus(runs, "")] == [1, 1]
    assert [run.gpus for run in cost.on_gpus(runs, "H100")] == [1, 2]
    assert [run.gpus for run in cost.on_gpus(runs, "H200")] == [1, 1]
    assert [run.gpus for run in cost.on_gpus(runs, "L40S")] == [2, 3]


def test_each_task_and_length_is_noted_as_a_condition_of_its_own(tiny, tmp_path):
    settings = {"haystacks": 1, "folder": tmp_path, "progress": False}
    tasks, lengths = ("image", "text"), (160, 128)
    scores = scoring.score_needles(tiny, tasks=tasks, lengths=lengths, **settings)
    notes = [json.loads(path.read_text()) for path in tmp_path.glob("*/*.json")]
    found = {
        (n["about"]["task"], n["about"]["length"]): len(n["rows"]) for n in notes if "rows" in n
    }
    assert found == dict.fromkeys(product(tasks, lengths), len(DEPTHS))
    order = scores.metadata[["task", "length", "depth"]].itertuples(index=False, name=None)
    assert list(order) == [(t, n, d) for t in tasks for n in lengths for d in DEPTHS]
    (one,) = tmp_path.glob(f"{TINY}-*/*.parquet")
    before = one.read_bytes()
    alone = scoring.score_needles(tiny, tasks=["text"], lengths=[128], **settings)
    np.testing.assert_array_equal(alone.values, scores.select(task="text", length=128).values)
    assert [path.read_bytes() for path in tmp_path.glob("*/*.parquet")] == [before]


class Others(Grid):
    """Needles with their own depths and name."""

    name = "mine"
    depths = (0.0, 1.0)

    def make(self, *where, **settings):
        return GENERATED.make(*where, **settings)


def test_other_needles_than_the_generated_are_another_condition(tiny, tmp_path):
    settings = {"tasks": ["text"], "lengths": [64], "haystacks": 1, "progress": False}
    scores = scoring.score_needles(tiny, source=Others(), folder=tmp_path, **settings)
    assert scores.metadata["depth"].tolist() == [0.0, 1.0]
    count = {"model": TINY, "task": "text", "length": 64, "folder": tmp_path}
    assert kept_scores.count_scored(**count, source=Others()) == 2
    assert kept_scores.count_scored(**count) == 0


def test_too_few_published_haystacks_are_an_error_before_anything_runs(tmp_path):
    data = f"{fake_datasets.write_data(tmp_path / 'data', haystacks=42, lengths=[8192])}"
    small = {"data": data, "lengths": [8192], "length": 8192, "haystacks": 2}
    small |= {"prompts": 12, "detection_haystacks": 20, "long_length": 8192}

    def check(**parameters) -> None:
        rows = declared("05_ablations", **(small | parameters))
        scores.check_haystacks(rows, parameters.get("data", data))

    check()
    check(data="", detection_haystacks=1000)
    with pytest.raises(UsageError, match=r"has 20 haystacks of the task text .* 21 are asked for"):
        check(detection_haystacks=21)
    with pytest.raises(UsageError, match=r"has 2 haystacks .* in the split test; 3 are asked for"):
        check(prompts=13)
    with pytest.raises(UsageError, match=r"has 2 haystacks .* in the split test; 3 are asked for"):
        check(haystacks=3)
