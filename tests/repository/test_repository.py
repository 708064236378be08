"""What a newcomer relies on: notebooks, figures and environments agree."""

import ast
import hashlib
import json
import re
import tomllib
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml

import reproduce
from mmheads import figures, paths

NOTEBOOKS = sorted(paths.NOTEBOOKS.glob("*.ipynb"))
TIMED = {"X_retrieval_cost_live", "B_fig7_latency_live", "X_decode_live"}
"""Measured times: written with `record_timings` alone."""
BENCHMARKS = {"A_fig9_reasoning_live"}
"""Of lmms-eval: made with `benchmark_tasks` alone."""
PUBLISHED = {
    "A_table1_layouts_live",
    "B_fig2_frames_live",
    "B_fig5_datasets_live",
    "B_fig8_overlay_live",
    "B_fig9_datasets_live",
}
"""Of published data sets: made with a folder `data` alone."""
FIGURE = re.compile(r"`([ABX]_\w+_(?:released|live|real|gpu|paper))`")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request) -> Path:
    return request.param


def cells(notebook: Path, kind: str) -> list:
    return [cell for cell in reproduce.read_cells(notebook) if cell.cell_type == kind]


def tagged(notebook: Path, tag: str) -> list:
    return [cell for cell in cells(notebook, "code") if tag in cell.metadata.get("tags", [])]


def made_by(notebook: Path) -> set[str]:
    """Figures and tables of the manifest that this notebook made."""
    entries = figures.manifest()
    return {Path(e["file"]).stem for e in entries if e["notebook"] == notebook.stem}


def test_there_are_notebooks():
    assert [path.stem[:2] for path in NOTEBOOKS] == [f"0{number}" for number in range(1, 8)]


def test_notebook_is_numbered_and_titled(notebook):
    assert re.fullmatch(r"\d\d_[a-z_]+", notebook.stem)
    assert cells(notebook, "markdown")[0].source.startswith(f"# {notebook.stem[:2]} · ")


def test_notebook_has_one_cell_of_plain_parameters(notebook):
    (cell,) = tagged(notebook, "parameters")
    for line in cell.source.splitlines():
        statement = ast.parse(line).body[0]
        assert isinstance(statement, ast.Assign), line
        assert isinstance(ast.literal_eval(statement.value), int | float | str | bool | list)
        assert "  # " in line, "a parameter says what it is"


def test_notebook_is_executed_in_order_without_errors(notebook):
    code = cells(notebook, "code")
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]


def test_notebook_holds_no_trace_of_its_run(notebook):
    content = json.loads(notebook.read_text())
    assert "papermill" not in content["metadata"]
    assert "widgets" not in content["metadata"]
    assert content["metadata"]["kernelspec"]["name"] == "python3"
    assert not [c for c in content["cells"] if {"papermill", "execution"} & c["metadata"].keys()]
    assert not [
        c for c in content["cells"] if "injected-parameters" in c["metadata"].get("tags", [])
    ]
    assert notebook.stat().st_size < 500_000


def test_notebook_shows_and_checks_its_numbers(notebook):
    checked = tagged(notebook, "nbval-check-output")
    last = cells(notebook, "code")[-1]
    assert "nbval-check-output" in last.metadata.tags
    for cell in checked:
        assert cell.outputs, "a checked cell without output checks nothing"
        assert {output.output_type for output in cell.outputs} == {"stream"}


def test_notebook_lists_exactly_the_figures_it_makes(notebook):
    listed = set(FIGURE.findall(cells(notebook, "markdown")[0].source))
    saved = {
        name
        for cell in cells(notebook, "code")
        for name in re.findall(r'"([ABX]_\w+)"', cell.source)
    }
    saved -= {path.stem for path in paths.PAPERS.glob("*.csv")}
    assert listed == saved
    assert made_by(notebook) == saved - PUBLISHED - BENCHMARKS


def test_committed_figures_were_made_with_the_default_parameters(notebook):
    expected = reproduce.defaults(notebook)
    expected = {n: value for n, value in expected.items() if not n.endswith("_folder")}
    for entry in figures.manifest():
        if entry["notebook"] == notebook.stem:
            made = dict(entry["parameters"])
            if Path(entry["file"]).stem in TIMED:
                assert made.pop("record_timings") is True
                made["record_timings"] = False
                if "repeats" in expected:  # more runs may be recorded than are shown
                    assert made["repeats"] >= expected["repeats"]
                    made["repeats"] = expected["repeats"]
            assert made == expected
            assert entry["seed"] == expected["seed"]


def test_manifest_and_figures_agree():
    entries = figures.manifest()
    listed = [entry["file"] for entry in entries]
    assert listed == sorted(set(listed))
    there = {path.name for path in paths.FIGURES.glob("[!.]*")} - {"manifest.json"}
    assert set(listed) == there
    for entry in entries:
        raw = (paths.FIGURES / entry["file"]).read_bytes()
        assert hashlib.sha256(raw).hexdigest() == entry["sha256"], entry["file"]
        assert raw.strip(), f"{entry['file']} is empty"


def test_each_figure_comes_with_its_data():
    files = {entry["file"] for entry in figures.manifest()}
    for stem in {Path(file).stem for file in files}:
        suffixes = {Path(file).suffix for file in files if Path(file).stem == stem}
        assert suffixes in ({".csv", ".pdf", ".png"}, {".csv", ".md", ".tex"}), stem


def test_the_page_of_figures_names_every_figure_that_needs_a_data_set():
    page = (paths.ROOT / "docs" / "figures.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| `(\w+)` \| .+ \| \[\d\d\]\(\.\./notebooks/(\w+)\.ipynb\) \|$", page, re.M
    )
    assert {figure for figure, _ in rows} == PUBLISHED | BENCHMARKS
    for figure, name in rows:
        notebook = paths.NOTEBOOKS / f"{name}.ipynb"
        assert f"`{figure}`" in cells(notebook, "markdown")[0].source


def pyproject() -> dict:
    return tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["project"]


def requirements() -> set[str]:
    return {*pyproject()["dependencies"], *pyproject()["optional-dependencies"]["dev"]}


def test_conda_users_get_the_same_requirements():
    environment = yaml.safe_load((paths.ROOT / "environment.yml").read_text())
    conda = [item for item in environment["dependencies"] if isinstance(item, str)]
    (pip,) = [item["pip"] for item in environment["dependencies"] if isinstance(item, dict)]
    assert f"python{pyproject()['requires-python']}" in conda
    options = {"--constraint constraints.txt", "--editable ."}
    assert set(pip) == requirements() | options
    assert len(pip) == len(set(pip))


def test_constraints_pin_every_requirement():
    lines = (paths.ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert pins["torch"] == "2.13.0"
    names = {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in requirements()}
    assert names <= {name.lower().replace("_", "-") for name in pins}


def test_parameter_files_name_what_exists():
    files = sorted((paths.ROOT / "params").glob("*.yaml"))
    assert files
    for file in files:
        assert any(reproduce.overrides(NOTEBOOKS, NOTEBOOKS, [], file).values())


def test_both_papers_are_cited():
    citation = yaml.safe_load((paths.ROOT / "CITATION.cff").read_text())
    cited = {reference["url"] for reference in citation["references"]}
    assert cited == {"https://arxiv.org/abs/2605.27243", "https://arxiv.org/abs/2606.05843"}
    for url in cited:
        assert url.rsplit("/", 1)[1] in (paths.ROOT / "README.md").read_text()


def test_notebooks_are_valid(notebook):
    nbformat.validate(nbformat.read(notebook, as_version=4))


CSV_FILES = sorted([*paths.FIGURES.glob("*.csv"), *paths.DATA.rglob("*.csv")])


@pytest.mark.parametrize("path", CSV_FILES, ids=lambda path: path.stem)
def test_no_label_of_a_table_is_read_as_a_missing_value(path):
    as_read = pd.read_csv(path, encoding="utf-8")
    as_written = pd.read_csv(path, encoding="utf-8", dtype=str, keep_default_na=False)
    lost = {
        column: sorted(set(as_written[column][as_read[column].isna()]) - {""})
        for column in as_written
    }
    assert {column: labels for column, labels in lost.items() if labels} == {}, (
        "give these labels another name: pandas reads them as missing values"
    )
