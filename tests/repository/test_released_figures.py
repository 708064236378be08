"""Paper A's figures from the released scores: the printed numbers come out of our functions.

The files are read a second time here, with json alone, so that the same numbers also come from
arithmetic that shares no code with the package.
"""

import hashlib
import json
import math
import warnings
from collections import defaultdict
from statistics import mean

import pandas as pd
import pytest

from conftest import NOT_HERE, RELEASED
from mmheads import heads, paths, published
from mmheads.scores import spearman

MODELS, TASKS, LENGTHS = list(published.MODELS), list(published.TASKS), published.LENGTHS


@pytest.fixture(scope="session")
def plain():
    """(model, task, length) -> [(layer, head, score)], strongest first, straight from the files."""
    if RELEASED is None:
        pytest.skip(NOT_HERE)
    result = {}
    for model, name in published.MODELS.items():
        for task, prefix in published.TASKS.items():
            for length in LENGTHS:
                directory = RELEASED / "MMRetHead" / "results" / "detection" / name
                (path,) = directory.glob(f"{prefix}_test_K{length // 1024}_*.json")
                pairs = json.loads(path.read_bytes())["head_score_list"]
                result[model, task, length] = [(*map(int, h.split("-")), s) for h, s in pairs]
    return result


def plain_top(rows, model):
    k = math.ceil(len(rows) / 20)
    selectable = (row for row in rows if "Gemma" not in model or (row[0] + 1) % 6 == 0)
    return {row[:2] for row, _ in zip(selectable, range(k), strict=False)}


def test_the_folder_holds_the_registered_files(released):
    for key, sha256 in published.REGISTRY.items():
        path = RELEASED / published.TOP / key
        assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def test_every_score_is_read_exactly(released, plain):
    assert released.keys() == plain.keys()
    assert len(released) == 120
    for key, rows in plain.items():
        scores = released[key]
        assert scores.geometry.size == len(rows)
        assert all(scores.mean[layer, head] == score for layer, head, score in rows)
        assert scores.metadata["prompts"].item() == 120


def test_top_heads_are_those_of_the_files(released, plain):
    for key, scores in released.items():
        assert set(scores.top(0.05)) == plain_top(plain[key], key[0])


def test_fig3_all_24_cells_are_the_papers(released, plain):
    table = published.paper("A_fig3_sparsity")
    assert len(table) == 24
    for row in table.itertuples():
        keys = [(row.model, row.task, length) for length in LENGTHS]
        ours = 100 * mean(released[key].sparsity(0.5) for key in keys)
        assert ours == pytest.approx(row.paper, abs=0.15)
        counted = []
        for key in keys:
            positive = [score for *_, score in plain[key] if score > 0]
            held, count = 0.0, 0
            while held < sum(positive) / 2:
                held, count = held + positive[count], count + 1
            counted.append(100 * count / len(plain[key]))
        assert ours == pytest.approx(mean(counted), abs=1e-9)


def test_fig5_overlaps_at_128k_round_to_the_papers(released, plain):
    rounded = {}
    for task in TASKS:
        ours, counted = [], []
        for model in MODELS:
            short, long = (released[model, task, length].top(0.05) for length in (8192, 131072))
            ours.append(heads.overlap(short, long))
            a, b = (plain_top(plain[model, task, length], model) for length in (8192, 131072))
            counted.append(len(a & b) / len(a))
        assert ours == counted
        rounded[task] = round(100 * mean(ours))
    assert rounded == {"text": 71, "rendered_text": 76, "image": 60, "identical_image": 70}


def test_fig6_mean_layers_are_the_papers(released):
    short, long = (released["Qwen3-VL-32B", "image", n].top(0.05) for n in (8192, 131072))
    assert round((short - long).mean_layer, 1) == 33.1
    assert round((long - short).mean_layer, 1) == 52.4


@pytest.mark.parametrize(
    ("other", "printed"), [("image", (0.18, 0.64, 0.51)), ("rendered_text", (0.50, 0.92, 0.79))]
)
def test_fig10_overlaps_are_the_papers(released, other, printed):
    values = [
        heads.overlap(released[model, "text", n].top(0.05), released[model, other, n].top(0.05))
        for model in MODELS
        for n in LENGTHS
    ]
    ours = (min(values), max(values), mean(values))
    assert ours == pytest.approx(printed, abs=0.0051)
    assert round(ours[2], 2) == printed[2]


def test_only_one_model_holds_impossible_scores_and_loading_warns(released):
    found = defaultdict(int)
    for (model, *_), scores in released.items():
        found[model] += bool(scores.out_of_range(-1, 1))
    assert dict(found) == dict.fromkeys(MODELS, 0) | {"Qwen2.5-VL-7B": 11}
    with pytest.warns(published.ImpossibleScoreWarning, match=r"K16_.*L0H10, L27H7, L27H10 lie"):
        published.load("Qwen2.5-VL-7B", "rendered_text", "16K", folder=RELEASED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        published.load("Qwen3-VL-8B", "rendered_text", "16K", folder=RELEASED)


def test_rank_correlation_hides_what_the_overlap_shows(released):
    short, long = (released["Gemma3-12B", "image", n].all_eligible() for n in (8192, 131072))
    agreement = spearman(short, long)
    assert agreement == (pytest.approx(0.966, abs=5e-4), pytest.approx(0.15, abs=5e-3))


def test_top_heads_of_qwen3_8b_crowd_into_kv_groups(released):
    tops = [released["Qwen3-VL-8B", task, 32768].top(0.05) for task in TASKS]
    assert {len(top) for top in tops} == {58}
    assert {len(top.kv_groups) for top in tops} <= set(range(38, 42))
    assert {len(top.layers) for top in tops} <= set(range(16, 21))
    random_sets = released["Qwen3-VL-8B", "text", 32768].random(58, draws=300, seed=0)
    assert mean(len(each.kv_groups) for each in random_sets) == pytest.approx(53.5, abs=0.5)


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("A_fig3_sparsity", ["model", "task", "value", "paper"]),
        ("A_fig5_overlap", ["pair", "task", "value", "paper"]),
        ("A_fig6_layers", ["set", "value", "paper"]),
        ("A_fig10_modalities", ["model", "length", "pair", "value"]),
    ],
)
def test_the_committed_tables_have_their_columns(name, columns):
    table = pd.read_csv(paths.FIGURES / f"{name}_released.csv")
    assert list(table.columns[: len(columns)]) == columns
    assert table.notna().all(axis=None)


def test_the_committed_tables_are_what_the_scores_give(released):
    fig3 = pd.read_csv(paths.FIGURES / "A_fig3_sparsity_released.csv")
    for row in fig3.itertuples():
        ours = mean(released[row.model, row.task, length].sparsity(0.5) for length in LENGTHS)
        assert row.value == pytest.approx(100 * ours, abs=1e-9)
    fig10 = pd.read_csv(paths.FIGURES / "A_fig10_modalities_released.csv")
    assert len(fig10) == 60
    for row in fig10.itertuples():
        a, b = (released[row.model, task, row.length].top(0.05) for task in row.pair.split("&"))
        assert row.value == heads.overlap(a, b)


def test_relative_layers_in_small_and_large_models(plain):
    table = pd.read_csv(paths.FIGURES / "B_fig4_scale_released.csv")
    assert len(table) == len(MODELS) * len(TASKS)
    for row in table.itertuples():
        last = max(layer for layer, *_ in plain[row.model, row.task, LENGTHS[0]])
        tops = [plain_top(plain[row.model, row.task, n], row.model) for n in LENGTHS]
        places = [mean(layer for layer, _ in top) / last for top in tops]
        expected = (mean(places), min(places), max(places))
        assert (row.value, row.least, row.most) == pytest.approx(expected)
