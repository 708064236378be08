"""Saving figures and tables: byte-stable, whole, and in the manifest."""

import hashlib
import json
import re
import warnings
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


QUESTIONS = [
    "is $5 more than 3% of $100 ?",
    r"what does \frac{1}{2}$ # _ ^ mean $",
    "from $5 to $6",
]


@pytest.mark.parametrize("text", QUESTIONS)
def test_a_title_is_the_text_that_was_given(tmp_path, text):
    figure, axis = plt.subplots()
    figures.set_title(axis, text)
    figures.set_title(figure, text)
    figure.savefig(tmp_path / "a.png")
    assert axis.get_title() == figure.get_suptitle() == text


def test_a_long_title_is_wrapped():
    _, axis = plt.subplots()
    figures.set_title(axis, "word " * 100 + "x" * 100 + "\nlast", width=30)
    lines = axis.get_title().splitlines()
    assert max(map(len, lines)) <= 30
    assert lines[-1] == "last"


def test_signs_that_the_font_lacks_are_boxes_with_one_warning(tmp_path):
    figure, axis = plt.subplots()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        figures.set_title(axis, "总额是多少 total?")
        figure.savefig(tmp_path / "a.png")
        figure.savefig(tmp_path / "a.pdf")
    (warning,) = said
    assert "the font of the figures lacks" in str(warning.message)
    assert axis.get_title() == "□□□□□ total?"
