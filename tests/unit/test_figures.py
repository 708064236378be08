"""Saving figures and tables: byte-stable, whole, and in the manifest."""

import hashlib
import json
import re
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


def test_texts_stay_in_their_cell(make_run, tmp_path):
    nasty = ["a|b", "two\nlines", "<b>bold</b> & R&D &amp; <2", "5 < 6 | $1 & 100%"]
    data = pd.DataFrame({"a|b": nasty, "n": [1.0, 2.0, 3.0, 4.0]})
    make_run().save_table(data, "X_table_released")
    markdown = (tmp_path / "figures" / "X_table_released.md").read_text(encoding="utf-8")
    assert len(markdown.splitlines()) == 2 + len(nasty)
    cells = [re.split(r"(?<!\\)\|", line)[1].strip() for line in markdown.splitlines()]
    assert cells[0] == r"a\|b"
    assert cells[2:] == [
        r"a\|b",
        "two<br>lines",
        "&lt;b>bold&lt;/b> & R&D &amp;amp; <2",
        r"5 < 6 \| $1 & 100%",
    ]
    latex = (tmp_path / "figures" / "X_table_released.tex").read_text(encoding="utf-8")
    assert r"two lines & 2 \\" in latex
    assert r"5 < 6 | \$1 \& 100\% & 4 \\" in latex
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "figures" / "X_table_released.csv"), data, check_exact=True
    )


@pytest.mark.parametrize("file", sorted(paths.FIGURES.glob("*_released.md")), ids=lambda p: p.stem)
def test_tables_without_such_texts_are_written_as_pandas_does(file):
    shown = pd.read_csv(file.with_suffix(".csv"))
    assert figures._markdown(shown) == shown.to_markdown(index=False) + "\n"
    latex = shown.to_latex(index=False, escape=True, float_format="{:g}".format)
    assert figures._latex(shown) == latex


@pytest.mark.parametrize("content", ["[{", "{}", '[{"file": "a"}]', "[1]", "null"])
def test_a_damaged_manifest_is_named_with_what_to_do(make_run, tmp_path, content):
    folder = tmp_path / "figures"
    folder.mkdir()
    (folder / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest.json is damaged: .* restore it"):
        figures.manifest(folder)
    with pytest.raises(ValueError, match=r"manifest.json is damaged"):
        make_run().save_table(DATA, "X_table_released")
    assert [path.name for path in folder.iterdir()] == ["manifest.json"]


PARAMETERS = """model = "toy"  # shown
lengths = [1, 2]  # tokens
seed = 3  # of the draws
figures_folder = ""  # where figures go
"""


def write_notebook(folder, source: str, tags=("parameters",)) -> None:
    cells = [
        {"cell_type": "markdown", "metadata": {}, "source": ["# 03"]},
        {"cell_type": "code", "metadata": {"tags": list(tags)}, "source": source.splitlines(True)},
    ]
    (folder / "03_toy.ipynb").write_text(json.dumps({"cells": cells}), encoding="utf-8")


def test_a_notebook_starts_with_the_values_of_its_parameters_cell(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path)
    write_notebook(tmp_path, PARAMETERS)
    namespace = {"model": "other", "lengths": [4], "seed": 5, "figures_folder": "there"}
    run = figures.start("03_toy", namespace | {"later": 1}, models={"read": "abc"})
    assert run.notebook == "03_toy"
    assert run.parameters == {"model": "other", "lengths": [4], "seed": 5}
    assert (run.seed, run.folder, run.models) == (5, "there", {"read": "abc"})
    assert mpl.rcParams["font.size"] == 8.5


def test_a_notebook_does_not_start_before_its_parameters_are_set(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path)
    write_notebook(tmp_path, PARAMETERS)
    with pytest.raises(ValueError, match="model, lengths not set; run the parameters cell"):
        figures.start("03_toy", {"seed": 1, "figures_folder": ""})
    for source, tags in ((PARAMETERS, ()), ("fraction = 0.05", ("parameters",))):
        write_notebook(tmp_path, source, tags)
        with pytest.raises(ValueError, match="no cell tagged parameters that sets seed"):
            figures.start("03_toy", {"fraction": 1, "seed": 1})
    with pytest.raises(OSError, match="04_toy"):
        figures.start("04_toy", {"seed": 1})


def test_every_notebook_starts_with_the_parameters_that_the_manifest_lists():
    for path in sorted(paths.NOTEBOOKS.glob("[0-9]*.ipynb")):
        names = figures._parameter_names(path)
        run = figures.start(path.stem, dict.fromkeys(names, 0))
        made = [e["parameters"] for e in figures.manifest() if e["notebook"] == path.stem]
        assert made
        assert all(list(run.parameters) == list(each) for each in made)


def test_a_model_that_a_run_loads_is_in_its_manifest(tmp_path):
    run = figures.Run(notebook="03_toy", parameters={}, seed=0, models={"read": "abc"})
    vlm = run.load("tiny-qwen3-m", device="cpu")
    assert run.models == {"read": "abc", vlm.model_id: vlm.revision}
