"""Saving figures and tables: byte-stable, whole, and in the manifest."""

import hashlib
import json
from collections.abc import Callable

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from mmheads import figures, paths

DATA = pd.DataFrame({"task": ["text", "image_%"], "value": [0.1 + 0.2, 1e-9]})


@pytest.fixture
def make_run(tmp_path, monkeypatch) -> Callable[..., figures.Run]:
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")

    def make(notebook: str = "03_toy", folder: str = "figures") -> figures.Run:
        return figures.Run(
            notebook=notebook,
            parameters={"fraction": 0.05},
            seed=3,
            models={"toy/model": "abc"},
            folder=tmp_path / folder,
        )

    return make


def draw() -> plt.Figure:
    figures.set_style()
    figure, axis = plt.subplots(figsize=(figures.COLUMN, 2))
    axis.plot([0, 1], [1, 0], label="a line")
    axis.legend()
    return figure


def test_the_same_data_give_the_same_bytes(make_run, tmp_path):
    for folder in ("first", "second"):
        run = make_run(folder=folder)
        run.savefig(draw(), "X_toy_released", DATA)
        run.save_table(DATA, "X_table_released")
    written = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert written == [
        "X_table_released.csv",
        "X_table_released.md",
        "X_table_released.tex",
        "X_toy_released.csv",
        "X_toy_released.pdf",
        "X_toy_released.png",
        "manifest.json",
    ]
    for name in written:
        first, second = (tmp_path / folder / name for folder in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()


def test_pdf_text_stays_text(make_run, tmp_path):
    make_run().savefig(draw(), "X_toy_released", DATA)
    raw = (tmp_path / "figures" / "X_toy_released.pdf").read_bytes()
    assert b"/CIDFontType2" in raw
    assert b"/Type3" not in raw


def test_csv_keeps_every_digit(make_run, tmp_path):
    make_run().save_table(DATA, "X_table_released")
    loaded = pd.read_csv(tmp_path / "figures" / "X_table_released.csv")
    pd.testing.assert_frame_equal(loaded, DATA, check_exact=True)


def test_markdown_and_latex_show_the_layout(make_run, tmp_path):
    layout = pd.DataFrame({"task": ["image_%"], "ours (paper)": ["5.84 (5.8)"]})
    make_run().save_table(DATA, "X_table_released", layout=layout)
    markdown = (tmp_path / "figures" / "X_table_released.md").read_text()
    assert markdown.splitlines()[2] == "| image_% | 5.84 (5.8)     |"
    latex = (tmp_path / "figures" / "X_table_released.tex").read_text()
    assert r"image\_\% & 5.84 (5.8) \\" in latex
    assert r"\toprule" in latex


def test_the_manifest_says_how_each_file_was_made(make_run, tmp_path):
    make_run().savefig(draw(), "X_toy_released", DATA)
    entries = figures.manifest(tmp_path / "figures")
    assert [entry["file"] for entry in entries] == [
        "X_toy_released.csv",
        "X_toy_released.pdf",
        "X_toy_released.png",
    ]
    for entry in entries:
        raw = (tmp_path / "figures" / entry["file"]).read_bytes()
        assert entry["sha256"] == hashlib.sha256(raw).hexdigest()
        assert entry["notebook"] == "03_toy"
        assert entry["parameters"] == {"fraction": 0.05}
        assert entry["seed"] == 3
        assert entry["models"] == {"toy/model": "abc"}
        assert {"python", "matplotlib", "numpy", "mmheads"} <= entry["versions"].keys()


def test_saving_one_figure_keeps_the_entries_of_others(make_run, tmp_path):
    make_run("03_toy").save_table(DATA, "X_first_released")
    before = figures.manifest(tmp_path / "figures")
    make_run("04_toy").save_table(DATA, "X_second_released")
    after = figures.manifest(tmp_path / "figures")
    assert [entry for entry in after if entry["notebook"] == "03_toy"] == before
    assert len(after) == 6


@pytest.mark.parametrize("name", ["fig3", "A_fig3_sparsity", "C_fig3_released", "A_Fig3_live"])
def test_a_figure_is_named_after_paper_id_and_source(make_run, tmp_path, name):
    with pytest.raises(ValueError, match="expected <paper>_<id>_<slug>_<source>"):
        make_run().save_table(DATA, name)
    assert not (tmp_path / "figures").exists()


def test_a_failed_save_leaves_every_old_file(make_run, tmp_path, monkeypatch):
    run = make_run()
    run.savefig(draw(), "X_toy_released", DATA)
    before = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}

    def fail(data, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(figures, "_write_csv", fail)  # the last of the three
    with pytest.raises(OSError, match="disk full"):
        run.savefig(plt.figure(), "X_toy_released", DATA)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}


def test_a_folder_without_manifest_has_no_entries(tmp_path):
    assert figures.manifest(tmp_path) == []
    (tmp_path / "manifest.json").write_text(json.dumps([]))
    assert figures.manifest(tmp_path) == []
