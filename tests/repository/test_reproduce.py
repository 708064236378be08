"""The one script, on small notebooks made here."""

import base64
import io
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from PIL import Image

import reproduce
from benchmarks.random_models import SIZES
from cluster import parameters
from cluster.models import UsageError
from cluster.notebooks import Job
from cluster.scores import ScoreRun
from mmheads import scoring
from mmheads.tasks.grids import TASKS

PARAMETERS = """\
fraction = 0.05  # share of heads
lengths = [1, 2]  # a list
name = "text"  # a word
quick = True  # a switch
"""


@pytest.fixture
def notebooks(tmp_path: Path) -> Path:
    """Two numbered notebooks that note what they ran with, and one that is not numbered."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    for stem in ("01_first", "02_second", "scratch"):
        log = tmp_path / f"{stem}.log"
        source = f"open({str(log)!r}, 'a').write(f'{{fraction}} {{lengths}} {{name}} {{quick}}\\n')"
        own = "other = 1  # a number\n" if stem == "02_second" else ""
        cells = [
            new_markdown_cell("# Title"),
            new_code_cell(PARAMETERS + own, metadata={"tags": ["parameters"]}),
            new_code_cell(source + "\nprint(fraction)"),
        ]
        write(folder / f"{stem}.ipynb", cells)
    return folder


def write(path: Path, cells: list) -> None:
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), path)


@pytest.fixture
def run(notebooks: Path, tmp_path: Path):
    """Call the command line with these notebooks."""
    return lambda *words: reproduce.main(words, notebooks=notebooks, runs=tmp_path / "runs")


def log(notebooks: Path, stem: str) -> str:
    path = notebooks.parent / f"{stem}.log"
    return path.read_text() if path.exists() else ""


DEFAULTS = "0.05 [1, 2] text True\n"


def test_all_numbered_notebooks_run_with_their_defaults(run, notebooks, tmp_path, capsys):
    assert run() == 0
    assert [log(notebooks, stem) for stem in ("01_first", "02_second")] == [DEFAULTS] * 2
    assert log(notebooks, "scratch") == ""
    assert sorted(path.name for path in (tmp_path / "runs").glob("*.ipynb")) == [
        "01_first.ipynb",
        "02_second.ipynb",
    ]
    out, progress = capsys.readouterr()
    assert "2 notebooks run, 0 failed" in out
    del progress  # written by the workers, past this capture


def test_fresh_is_set_in_the_notebooks_that_have_it(notebooks, tmp_path):
    cells = [new_code_cell("fresh = False  # a switch", metadata={"tags": ["parameters"]})]
    write(notebooks / "03_third.ipynb", cells)
    selected = reproduce.select(notebooks, [])
    chosen = {path: {} for path in selected}
    for fresh in (True, False):
        jobs = reproduce.jobs_of(selected, chosen, [], tmp_path, fresh=fresh)
        has = {job.notebook.stem: job.parameters.get("fresh", False) for job in jobs}
        assert has == {"01_first": False, "02_second": False, "03_third": fresh}


def test_only_some_notebooks_by_number_or_name(run, notebooks):
    assert run("--only", "02", "--jobs", "2") == 0
    assert (log(notebooks, "01_first"), log(notebooks, "02_second")) == ("", DEFAULTS)
    assert run("--only", "01_first") == 0
    assert log(notebooks, "01_first") == DEFAULTS


def test_parameters_by_name(run, notebooks):
    words = [
        "-p",
        "fraction",
        "1",
        "-p",
        "lengths",
        "[4]",
        "-p",
        "name",
        "3",
        "-p",
        "quick",
        "false",
    ]
    assert run("--only", "01", *words) == 0
    assert log(notebooks, "01_first") == "1.0 [4] 3 False\n"


def test_parameters_from_a_file_with_a_section_a_notebook(run, notebooks, tmp_path):
    params = tmp_path / "params.yaml"
    params.write_text("01: {fraction: 0.1}\n02_second: {name: image}\n")
    assert run("--params", str(params), "-p", "quick", "no") == 0
    assert log(notebooks, "01_first") == "0.1 [1, 2] text False\n"
    assert log(notebooks, "02_second") == "0.05 [1, 2] image False\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-p", "fractoin", "0.1"], "no notebook has a parameter 'fractoin'; there are fraction"),
        (["--only", "01", "-p", "other", "1"], "no notebook has a parameter 'other'"),
        (["-p", "fraction", "many"], "parameter fraction is 'many', expected float"),
        (["-p", "quick", "1"], "parameter quick is 1, expected bool"),
        (["-p", "lengths", "3"], "parameter lengths is 3, expected list"),
        (["-p", "lengths", "[abc]"], "parameter lengths is 'abc', expected int"),
        (["-p", "lengths", "[[128]]"], "parameter lengths is [128], expected int"),
        (["-p", "lengths", "[128.5]"], "parameter lengths is 128.5, expected int"),
        (["-p", "lengths", "[true]"], "parameter lengths is True, expected int"),
        (["-p", "lengths", "[1, -5]"], "parameter lengths has the value -5, expected at least 1"),
        (["-p", "lengths", "[]"], "parameter lengths is an empty list"),
        (["-p", "lengths", "[128"], "-p lengths [128: while parsing"),
        (["-p", "other", "-3"], "parameter other has the value -3, expected at least 1"),
        (["-p", "fraction", "nan"], "parameter fraction has the value nan"),
        (["-p", "fraction", "0"], "parameter fraction has the value 0.0"),
        (["-p", "fraction", "1.5"], "has the value 1.5, expected a share above 0 and at most 1"),
        (["--gpu", ""], "--gpu : unknown"),
        (["--only", "07"], "no notebook 07; there are 01_first, 02_second"),
        (["--jobs", "0"], "--jobs is 0"),
        (["--params", "absent.yaml"], "absent.yaml: no such file"),
        (["--plan", "--gpu", "abacus"], "--gpu abacus: unknown; there are A100-80GB, H100"),
        (["--in-place", "-p", "quick", "no"], "--in-place takes the default parameters"),
    ],
)
def test_what_is_unknown_is_refused_before_anything_runs(run, notebooks, capsys, words, message):
    assert run(*words) == 2
    assert message in capsys.readouterr().err
    assert log(notebooks, "01_first") == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("'09': {fraction: 0.1}", "no notebook '09'"),
        ("'02': {speed: 1}", "02_second has no parameter 'speed'"),
        ("'02': {fraction: fast}", "parameter fraction is 'fast', expected float"),
        ("'02': [", "params.yaml: while parsing"),
        ("'02': fast", "section 02 is 'fast', expected name: value"),
        ("- fraction", "expected a section of parameters per notebook"),
        ("'01': {fraction: 0.1, fraction: 0.2}", "the key 'fraction' is given twice"),
        ("'01': {fraction: 0.1}\n'01': {fraction: 0.2}", "the key '01' is given twice"),
        ("'01': {fraction: 0.1}\n1: {fraction: 0.2}", "01_first has two sections"),
        ("'01': {fraction: 0.1}\n01_first: {fraction: 0.2}", "01_first has two sections"),
        ("yes: {fraction: 0.1}", "no notebook True"),
        ("? [1]\n: 2", "params.yaml: "),
        ("'02': {fraction: .nan}", "02_second: parameter fraction has the value nan"),
        ("'02': {lengths: [1, x]}", "params.yaml, 02_second: parameter lengths is 'x'"),
        ("a: !!python/name:os.system", "params.yaml: could not determine a constructor"),
    ],
)
def test_a_bad_parameter_file_is_refused(run, notebooks, tmp_path, capsys, text, message):
    params = tmp_path / "params.yaml"
    params.write_text(text)
    assert run("--params", str(params), "--only", "01") == 2
    assert message in capsys.readouterr().err
    assert log(notebooks, "01_first") == ""


@pytest.mark.parametrize(
    ("value", "default", "name", "message"),
    [
        ([[0, 64], [4]], [[4, 60]], "sweep", "expected lists of 2"),
        ([[0, -64]], [[4, 60]], "sweep", "has the value -64"),
        ([2.0], [0.1, 0.4], "image_shares", "2.0, expected a share from 0 to 1"),
        ([0.0], [0.1], "fractions", "0.0, expected a share above 0"),
        ("none", "placeholders", "null_images", "expected one of pixels, placeholders"),
        ("huge", "wide", "shape", "expected one of wide, small, qwen3-vl-8b"),
        ([1], [], "benchmark_tasks", "expected a list of names"),
        ([""], ["tiny-internvl-m"], "beside", "expected a list of names"),
        (0, 3, "haystacks", "at least 1"),
        (float("inf"), 0.5, "depth", "from 0 to 1"),
    ],
)
def test_values_out_of_their_range_are_refused(value, default, name, message):
    with pytest.raises(UsageError, match=f"parameter {name} .*{message}"):
        parameters.check(value, default, name)


def test_values_in_their_range_are_taken():
    assert parameters.check([1, 0.5], [0.1], "fractions") == [1.0, 0.5]
    assert parameters.check([0, 1], [0.1], "image_shares") == [0.0, 1.0]
    assert parameters.check([[0, 64]], [[4, 60]], "sweep") == [[0, 64]]
    assert parameters.check(0, 3, "seed") == 0
    assert parameters.check([], ["tiny-internvl-m"], "beside") == []


def test_choices_are_those_of_the_code_that_reads_them():
    assert parameters.CHOICES["null_images"] == scoring.NULL_IMAGES
    assert parameters.CHOICES["shape"] == tuple(SIZES)
    assert parameters.CHOICES["task"] == TASKS[1:]


@pytest.fixture
def with_model(notebooks, tmp_path):
    """A third notebook, which has a model, data and figures."""
    names = ("model", "data", "figures_folder")
    parameters = "".join(f'{name} = ""  # a word\n' for name in names)
    log = tmp_path / "03_third.log"
    source = f"open({str(log)!r}, 'a').write(f'{{model}} {{data}} {{figures_folder}}\\n')"
    cells = [
        new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        new_code_cell(source),
    ]
    write(notebooks / "03_third.ipynb", cells)


@pytest.mark.usefixtures("with_model")
def test_models_run_each_notebook_that_has_a_model_once_a_model(run, notebooks, tmp_path, capsys):
    params = tmp_path / "params.yaml"
    params.write_text("models: [one/a, two/b]\n'02': {name: both}\n")
    assert run("--params", str(params), "--only", "02", "03") == 0
    runs = tmp_path / "runs"
    assert log(notebooks, "02_second") == DEFAULTS.replace("text", "both")
    assert log(notebooks, "03_third") == (
        f"one/a  {runs / 'a' / 'figures'}\ntwo/b  {runs / 'b' / 'figures'}\n"
    )
    assert sorted(path.relative_to(runs).as_posix() for path in runs.rglob("*.ipynb")) == [
        "02_second.ipynb",
        "a/03_third.ipynb",
        "b/03_third.ipynb",
    ]
    assert "3 notebooks run, 0 failed" in capsys.readouterr().out
    assert run("--params", str(params), "--only", "03", "--resume") == 0
    assert "a/03_third: finished before" in capsys.readouterr().out


@pytest.mark.usefixtures("with_model")
def test_figures_of_several_models_lie_below_the_folder_that_was_named(run, notebooks, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    params = tmp_path / "params.yaml"
    params.write_text(f"models: [one/a]\ndata: {data}\n")
    assert run("--params", str(params), "--only", "03", "-p", "figures_folder", "/mine") == 0
    assert log(notebooks, "03_third") == f"one/a {data} /mine/a\n"


@pytest.mark.usefixtures("with_model")
@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("models: one", [], "models is 'one', expected a list"),
        ("models: [one/a, two/a]", [], "two models are named a"),
        ("models: [one/a]", ["-p", "model", "b"], "no section or -p may name a model"),
        ("models: [one/a]\n'03': {model: b}", [], "no section or -p may name a model"),
        ("data: [1]", [], "data is [1], expected a folder"),
        ("data: absent", [], "absent: no such folder"),
    ],
)
def test_models_and_data_that_cannot_be_are_refused(
    run, notebooks, tmp_path, capsys, text, words, message
):
    params = tmp_path / "params.yaml"
    params.write_text(text)
    assert run("--params", str(params), *words) == 2
    assert message in capsys.readouterr().err
    assert log(notebooks, "03_third") == ""


def test_a_notebook_whose_scores_failed_is_not_run(run, notebooks, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    parameters = f"model = {str(broken)!r}  # a folder\nlengths = [64]  # a list\n"
    parameters += f"scores_folder = {str(tmp_path)!r}  # a folder\n"
    row = "{'task': 'text', 'length': n, 'haystacks': 1, 'split': 'detection'}"
    workload = f"workload = {{'scores': [{row} for n in lengths]}}"
    cells = [
        new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        new_code_cell(workload, metadata={"tags": ["workload"]}),
        new_code_cell(f"open({str(tmp_path / 'ran')!r}, 'w')"),
    ]
    write(notebooks / "03_third.ipynb", cells)
    assert run("--only", "01", "03") == 1
    out = capsys.readouterr().out
    assert "FAILED scores of broken text 64: ValueError" in out
    assert "FAILED 03_third: not run, the scores of broken text 64 failed" in out
    assert "1 notebooks run, 1 failed" in out
    assert log(notebooks, "01_first") == DEFAULTS
    assert not (tmp_path / "ran").exists()


def test_what_records_times_runs_last_and_alone(notebooks, tmp_path):
    cells = [new_code_cell("record_timings = True  # a switch", metadata={"tags": ["parameters"]})]
    for stem in ("00_before", "01_first", "03_third"):
        write(notebooks / f"{stem}.ipynb", cells)
    together = []

    def runner(units, progress=""):
        together.append([unit.name for unit in units])
        return [f"said of {unit.name}" for unit in units]

    selected = reproduce.select(notebooks, [])
    jobs = reproduce.jobs_of(selected, {path: {} for path in selected}, [], tmp_path)
    errors = reproduce.execute(jobs, runner)
    assert together == [["02_second"], ["00_before"], ["01_first"], ["03_third"]]
    assert errors == {path.stem: f"said of {path.stem}" for path in selected}


@pytest.mark.parametrize("scored", [5, 6])
def test_scores_that_are_there_are_not_run_first(tmp_path, monkeypatch, scored):
    scores = ScoreRun(model="tiny-qwen3-vl-m", task="text", length=64, haystacks=1)
    monkeypatch.setattr(ScoreRun, "scored", lambda self: scored)
    job = Job(tmp_path / "01_first.ipynb", {}, {}, tmp_path, scores=(scores,))
    units = []
    reproduce.execute([job], lambda more, progress="": [units.append(unit) or "" for unit in more])
    assert units == ([job] if scored == scores.prompts else [scores, job])


@pytest.mark.parametrize(
    ("words", "workers"),
    [
        ([], 3),
        (["--fresh"], 1),
        (["-p", "quick", "no"], 1),
        (["--in-place"], 1),
        (["--fresh", "--jobs", "2"], 2),
    ],
)
def test_notebooks_run_side_by_side_where_they_only_read(run, monkeypatch, words, workers):
    asked = []

    def here(count):
        asked.append(count)
        return lambda units, progress="": ["not run"] * len(units)

    monkeypatch.setattr(reproduce, "usable_cores", lambda: 3)
    monkeypatch.setattr(reproduce, "here", here)
    assert run(*words) == 1
    assert asked == [workers]


def test_ray_is_asked_for_by_name_where_it_is_missing(run, notebooks, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run("--ray", "local") == 2
    assert "--ray needs Ray: pip install 'mmheads[ray]'" in capsys.readouterr().err
    assert log(notebooks, "01_first") == ""


def test_a_failing_notebook_is_kept_and_named_and_the_others_run(run, notebooks, tmp_path, capsys):
    write(notebooks / "01_first.ipynb", [new_code_cell("x = 1"), new_code_cell("x / 0")])
    assert run() == 1
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("FAILED")]
    assert line.startswith("FAILED 01_first: ZeroDivisionError: division by zero")
    assert str(tmp_path / "runs" / "01_first.ipynb") in line
    kept = nbformat.read(tmp_path / "runs" / "01_first.ipynb", as_version=4)
    outputs = [output for cell in kept.cells for output in cell.get("outputs", [])]
    assert any(output.get("ename") == "ZeroDivisionError" for output in outputs)
    assert log(notebooks, "02_second") == DEFAULTS


def test_resume_runs_only_what_did_not_finish_with_these_parameters(run, notebooks, capsys):
    assert run("--only", "01") == 0
    assert run("--resume") == 0
    assert log(notebooks, "01_first") == log(notebooks, "02_second") == DEFAULTS
    assert "01_first: finished before, not run again" in capsys.readouterr().out
    assert run("--resume", "--only", "01", "-p", "fraction", "0.2") == 0
    assert log(notebooks, "01_first") == DEFAULTS + DEFAULTS.replace("0.05", "0.2")


def test_resume_runs_again_what_was_deleted(run, notebooks, tmp_path):
    assert run("--only", "01") == 0
    (tmp_path / "runs" / "01_first.ipynb").unlink()
    assert run("--only", "01", "--resume") == 0
    assert log(notebooks, "01_first") == DEFAULTS * 2


def test_resume_runs_again_what_was_cut(run, notebooks, tmp_path):
    assert run("--only", "01") == 0
    done = tmp_path / "runs" / "01_first.ipynb"
    done.write_bytes(done.read_bytes()[:200])
    assert run("--only", "01", "--resume") == 0
    assert log(notebooks, "01_first") == DEFAULTS * 2
    (tmp_path / "runs" / "01_first.done").write_text("cut")
    assert run("--only", "01", "--resume") == 0
    assert log(notebooks, "01_first") == DEFAULTS * 3


DRAWS = """\
import pandas as pd
from mmheads import figures
run = figures.Run(notebook="01_first", parameters={}, seed=0, folder=figures_folder)
run.save_table(pd.DataFrame({"a": [1]}), "X_table_live")
print("drawn", file=open(figures_folder + "/../drawn", "a"))
"""


@pytest.fixture
def drawing(run, notebooks, tmp_path):
    """Resumes the first notebook, which reads a model and draws a table; returns its runs."""
    model, folder = tmp_path / "model", tmp_path / "figures"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    parameters = f"model = {str(model)!r}  # a folder\nfigures_folder = {str(folder)!r}  # a folder"
    cells = [
        new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        new_code_cell(DRAWS),
    ]
    write(notebooks / "01_first.ipynb", cells)

    def resume() -> int:
        assert run("--only", "01", "--resume", "-p", "figures_folder", f"{folder}") == 0
        return len((tmp_path / "drawn").read_text().splitlines())

    return resume


def test_resume_makes_figures_again_that_are_gone_or_changed(drawing, tmp_path):
    assert [drawing(), drawing()] == [1, 1]
    table = tmp_path / "figures" / "X_table_live.csv"
    before = table.read_bytes()
    table.unlink()
    assert [drawing(), drawing()] == [2, 2]
    table.write_bytes(b"other")
    assert [drawing(), drawing()] == [3, 3]
    assert table.read_bytes() == before


def test_resume_runs_again_with_other_weights_in_the_same_folder(drawing, tmp_path):
    assert [drawing(), drawing()] == [1, 1]
    (tmp_path / "model" / "model.safetensors").write_bytes(b"changed weights")
    assert [drawing(), drawing()] == [2, 2]


def test_resume_runs_again_with_other_released_scores(run, notebooks, tmp_path, monkeypatch):
    released = tmp_path / "released"
    released.mkdir()
    monkeypatch.setenv("MMHEADS_PUBLISHED", f"{released}")
    path = notebooks / "01_first.ipynb"
    cells = nbformat.read(path, as_version=4).cells
    cells[1]["source"] += "published_folder = ''  # a folder\n"
    write(path, cells)
    for expected in (1, 1):
        assert run("--only", "01", "--resume") == 0
        assert log(notebooks, "01_first") == DEFAULTS * expected
    (released / "scores.json").write_text("{}")
    assert run("--only", "01", "--resume") == 0
    assert log(notebooks, "01_first") == DEFAULTS * 2


def test_a_broken_manifest_is_named_with_what_to_do(run, notebooks, drawing, tmp_path, capsys):
    drawing()
    (tmp_path / "figures" / "manifest.json").write_text("[{")
    assert run("--only", "01", "-p", "figures_folder", f"{tmp_path / 'figures'}") == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "FAILED" in line]
    assert "manifest.json is damaged" in line
    assert "restore it" in line


def test_a_notebook_that_is_cut_is_named(run, notebooks, capsys):
    (notebooks / "02_second.ipynb").write_text('{"cells"')
    assert run("--only", "01") == 2
    assert "02_second.ipynb cannot be read as a notebook" in capsys.readouterr().err
    assert log(notebooks, "01_first") == ""


def test_a_run_that_had_to_skip_something_is_not_finished(run, notebooks, capsys):
    write(notebooks / "01_first.ipynb", [new_code_cell("print('Skipped: the data. Get them.')")])
    for _ in range(2):
        assert run("--only", "01", "--resume") == 0
        out = capsys.readouterr().out
        assert "01_first: Skipped: the data. Get them." in out
        assert "1 notebooks run" in out


def test_list_shows_notebooks_and_parameters_and_runs_nothing(run, notebooks, capsys):
    assert run("--list") == 0
    out = capsys.readouterr().out
    assert "01_first\n    fraction = 0.05\n    lengths = [1, 2]\n    name = 'text'" in out
    assert "scratch" not in out
    assert log(notebooks, "01_first") == ""


def test_in_place_commits_outputs_without_traces_of_the_run(run, notebooks):
    assert run("--in-place", "--only", "01") == 0
    done = nbformat.read(notebooks / "01_first.ipynb", as_version=4)
    assert done.cells[2].outputs[0]["text"] == "0.05\n"
    assert [cell.execution_count for cell in done.cells[1:]] == [1, 2]
    assert "papermill" not in done.metadata
    assert not any({"papermill", "execution"} & cell.metadata.keys() for cell in done.cells)


def test_pictures_in_few_colours_look_the_same_and_are_smaller():
    figure, axis = plt.subplots(figsize=(3, 2))
    axis.imshow(np.random.default_rng(0).random((9, 16)))
    axis.plot([1, 5], [2, 7], color="red")
    axis.set_title("a title")
    written = io.BytesIO()
    figure.savefig(written, format="png")
    plt.close(figure)
    few = base64.b64decode(reproduce.in_few_colours(base64.b64encode(written.getvalue()).decode()))
    assert len(few) < len(written.getvalue()) / 2
    before, after = (
        np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=int)
        for png in (written.getvalue(), few)
    )
    assert np.abs(after - before).max() <= 24
    assert (after[0, 0] == 255).all()


def test_in_place_keeps_the_outputs_of_a_notebook_that_had_to_skip_something(run, notebooks):
    path = notebooks / "01_first.ipynb"
    cell = new_code_cell("print('Skipped: the data')")
    cell.outputs = [nbformat.v4.new_output("stream", text="0.06\n")]
    write(path, [cell])
    before = path.read_bytes()
    assert run("--in-place", "--only", "01") == 0
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "250000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
    ],
)
def test_cores_are_those_of_the_affinity_and_of_the_container(tmp_path, monkeypatch, files, cores):
    monkeypatch.setattr(reproduce.os, "sched_getaffinity", lambda process: range(8), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="ascii")
    assert reproduce.usable_cores(tmp_path) == cores


@pytest.mark.parametrize(
    ("workers", "given", "threads"),
    [(1, "", 4), (2, "", 2), (3, "", 1), (4, "8", 1), (1, "2", 2), (1, "all", 4), (8, "", 1)],
)
def test_threads_of_all_processes_are_no_more_than_the_cores(monkeypatch, workers, given, threads):
    monkeypatch.setattr(reproduce, "usable_cores", lambda: 4)
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert reproduce.threads_of(workers) == threads
    assert min(workers, reproduce.usable_cores()) * threads <= 4
