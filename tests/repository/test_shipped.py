"""A sample of every shipped file, computed again; which one, its own hash decides."""

import hashlib
import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster import ship
from mmheads import causal, models, paths, scoring, store
from mmheads.answers import stacked
from mmheads.attention.interventions import ablate
from mmheads.examples import Example
from mmheads.heads import HeadSet
from mmheads.models import VLM
from mmheads.pdfs import PageBox
from mmheads.prefix import on_device
from mmheads.prompts import encode
from mmheads.retrieval import DocumentIndex
from mmheads.streaming import stream
from mmheads.tables import read_table
from mmheads.tasks import needles
from mmheads.tasks.grids import SPLITS

FILES = sorted(store.SHIPPED.glob("*/*.parquet"))
NAMES = [path.relative_to(store.SHIPPED).as_posix() for path in FILES]
ROWS = 4
MEGABYTES = 25


@pytest.fixture(autouse=True)
def _nothing_is_shipped() -> None:
    """Here, and nowhere else, tests read the results that the repository ships."""


def sample(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a file, drawn by its hash."""
    digest = hashlib.sha256(path.read_bytes()).digest()
    rng = np.random.default_rng(list(digest))
    return [rows[i] for i in rng.choice(len(rows), min(ROWS, len(rows)), replace=False)]


def remade(row: dict[str, Any]) -> Example:
    """The generated example of a row."""
    numbers = json.loads(row["haystack"])
    if row["task"].startswith("document-"):
        *_, hard, split, pages, index = numbers
        asked = {"question": row["task"].removeprefix("document-"), "index": index}
        asked |= {"split": SPLITS[split], "distractors": needles.DISTRACTORS[hard]}
        return needles.document(pages, **asked)
    _, _, split, length, number, share = numbers
    where = {"split": SPLITS[split]}
    given = None if row["task"] == needles.CONTROL else row.get("answer")
    where |= {"haystack": number, "answer": given}
    return needles.Needles(share / 1000).make(row["task"], length, row["depth"] or 0.0, **where)


def head_pairs(row: dict[str, Any]) -> tuple[Any, ...]:
    """The heads of a row."""
    return tuple(map(tuple, json.loads(row["heads"])))


def changed(vlm: VLM, row: dict[str, Any]) -> AbstractContextManager[Any]:
    """The model as it was when it gave the answer of a row."""
    heads = HeadSet(head_pairs(row), vlm.geometry, vlm.model_id)
    mode, *how = json.loads(row["settings"])
    return stream(vlm, heads, *how[:2]) if mode == "stream" else ablate(vlm, heads, mode, how[0])


@pytest.fixture(scope="module")
def loaded():
    """Models by name, each loaded once."""
    held: dict[str, VLM] = {}
    return lambda name: held.setdefault(name, models.load(name))


def files(kind: str) -> Any:
    """One case for every shipped file of a kind and of a model that is shipped too.

    Those of the pretrained text model are in test_real_model.py.
    """
    models_here = {path.name for path in paths.MODELS.iterdir()}
    chosen = [
        path
        for path in FILES
        if path.parent.name == kind and read_table(path)[0]["provenance"]["model"] in models_here
    ]
    return pytest.mark.parametrize("path", chosen, ids=[path.stem for path in chosen])


@files("scores")
def test_scores_are_computed_again_within_a_ten_thousandth(path, loaded):
    about, scalars, arrays = read_table(path)
    vlm, settings = loaded(about["provenance"]["model"]), about["provenance"]["settings"]
    rows = [row | {"place": i} for i, row in enumerate(scalars.to_pylist()) if row["haystack"]]
    chosen = sample(path, rows)
    null_images = settings["null_images"]
    again = scoring.score_heads(vlm, map(remade, chosen), null_images=null_images, progress=False)
    for name in [name for name in scoring.MASSES if name in arrays]:
        before = arrays[name][[row["place"] for row in chosen]]
        np.testing.assert_allclose(again[name].values, before, atol=1e-4, err_msg=name)
    assert again.metadata["example"].tolist() == [row["key"] for row in chosen]


@files("effects")
def test_effects_are_computed_again_within_a_thousandth_of_a_nat(path, loaded):
    about, scalars, arrays = read_table(path)
    vlm = loaded(about["provenance"]["model"])
    rows = [row | {"place": i} for i, row in enumerate(scalars.to_pylist())]
    measure = {"effect": causal.single_head_effects, "gradient": causal.gate_gradients}
    for row in sample(path, rows):
        (again,) = measure[row["quantity"]](vlm, [remade(row)], progress=False)
        np.testing.assert_allclose(again, arrays["nats"][row["place"]], atol=1e-3)


@files("answers")
def test_answers_are_given_again_unless_two_are_equally_good(path, loaded):
    about, scalars, _ = read_table(path)
    vlm = loaded(about["provenance"]["model"])
    rows = [row for row in scalars.to_pylist() if "mean" not in json.loads(row["settings"])]
    for row in sample(path, rows):
        example = remade(row)
        with changed(vlm, row), torch.no_grad():
            inputs = on_device(vlm, stacked([encode(vlm, example)]))
            logits = vlm.model(**inputs, logits_to_keep=1).logits[0, -1]
        best, second = logits.topk(2).values.tolist()
        given = vlm.tokenizer.decode(logits.argmax(), skip_special_tokens=True)
        assert given == row["prediction"] or best - second < 1e-3


@files("rankings")
def test_rankings_are_made_again_but_for_candidates_of_equal_score(path, loaded):
    about, scalars, _ = read_table(path)
    vlm = loaded(about["provenance"]["model"])
    for row in sample(path, scalars.to_pylist()):
        how = json.loads(row["settings"])
        window, best = how.pop("window"), how.pop("best")
        example, heads = remade(row), HeadSet(head_pairs(row), vlm.geometry, vlm.model_id)
        index = DocumentIndex(vlm, heads, list(example.context), window=window)
        boxes = [PageBox(r.part, r.box, (64, 64)) for r in example.candidates["layout"]]
        lines = index.rank(example.question, boxes, **how)
        for level, ranking in {"layout": lines, "page": lines.candidates}.items():
            orders = ranking.order[:best], row[level]
            again, before = (ranking.scores[order] for order in orders)
            np.testing.assert_allclose(before, again, atol=1e-5)


def test_the_list_of_shipped_files_is_true_and_they_are_small():
    assert (store.SHIPPED / "README.md").read_text(encoding="utf-8") == ship.describe()
    assert sum(path.stat().st_size for path in FILES) < MEGABYTES * 1e6
    assert {path.parent.name for path in FILES} <= set(ship.KINDS)


def test_results_that_nobody_has_are_not_shipped(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(store, "SHIPPED", tmp_path)
    assert ship.main(["no-such-model", "--machine", "2 CPU cores"]) == 1
    assert "there are no results of no-such-model" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
