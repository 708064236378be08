"""The same plan on a Ray cluster, with a worker that dies."""

import os
import signal
import socket
import threading
import time
from pathlib import Path

import nbformat
import pandas as pd
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook

import reproduce
from cluster import ray_runner
from cluster.models import UsageError
from cluster.ray_runner import ray_cluster
from cluster.scores import ScoreRun
from mmheads import kept_scores

pytest.importorskip("ray", reason="Ray is not installed: pip install 'mmheads[ray]'")

pytestmark = pytest.mark.slow
MODEL = "tiny-qwen3-vl-m"
PARAMETERS = f"""\
model = "{MODEL}"  # a shipped model
lengths = [64, 96, 160]  # tokens; no scores of these lengths are shipped
haystacks = 1  # per condition
scores_folder = ""  # where scores are
figures_folder = ""  # where figures go
"""
WORKLOAD = """\
from mmheads.tasks.grids import TASKS

rows = [{"task": task, "length": length} for task in TASKS for length in lengths]
workload = {"scores": [row | {"haystacks": haystacks, "split": "detection"} for row in rows]}
"""
SOURCE = """\
import matplotlib.pyplot as plt

from mmheads import figures, plots
from mmheads.models import load
from mmheads.scoring import score_needles

settings = {"lengths": lengths, "haystacks": haystacks, "folder": scores_folder, "progress": False}
settings["null_images"] = "placeholders"
scores = score_needles(load(model), **settings)
figure, axis = plt.subplots()
plots.heat_map(axis, scores.mean)
run = figures.Run(notebook="01_map", parameters={}, seed=0, folder=figures_folder)
run.savefig(figure, "X_map_live", scores.to_frame())
"""
RUNS = 4 * 3


@pytest.fixture
def notebooks(tmp_path: Path) -> Path:
    folder = tmp_path / "notebooks"
    folder.mkdir()
    cells = [
        new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
        new_code_cell(WORKLOAD, metadata={"tags": ["workload"]}),
        new_code_cell(SOURCE),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), folder / "01_map.ipynb")
    return folder


def run(notebooks: Path, folder: Path, *words: str) -> int:
    places = ["-p", "scores_folder", f"{folder / 'scores'}"]
    places += ["-p", "figures_folder", f"{folder / 'figures'}"]
    return reproduce.main([*places, *words], notebooks=notebooks, runs=folder / "runs")


class Killer(threading.Thread):
    """Kills one worker while it computes a score that is not there yet."""

    def __init__(self, scores: Path) -> None:
        super().__init__(daemon=True)
        self.scores = scores
        self.workers: set[int] = set()
        self.killed: list[str] = []
        self.over = threading.Event()

    def there(self, title: str) -> bool:
        _, task, length = title.removeprefix("ray::").split()
        return kept_scores.count_scored(MODEL, task, int(length), folder=self.scores) > 0

    def run(self) -> None:
        while not self.over.is_set() and not self.killed:
            some = len(list(self.scores.glob(f"{MODEL}-*/*.parquet"))) >= 2
            for process in psutil.Process().children(recursive=True):
                try:
                    title = " ".join(process.cmdline()).strip()
                except psutil.Error:
                    continue
                if not title.startswith(f"ray::{MODEL} "):
                    continue
                self.workers.add(process.pid)
                if some and len(self.workers) > 1 and not self.there(title):
                    os.kill(process.pid, signal.SIGKILL)
                    self.killed.append(title)
                    break
            time.sleep(0.002)


def content(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_a_cluster_that_loses_a_worker_gives_what_one_process_gives(
    notebooks, tmp_path, monkeypatch, capsys
):
    killer = Killer(tmp_path / "ray" / "scores")
    killer.start()
    try:
        assert run(notebooks, tmp_path / "ray", "--ray", "local", "--jobs", "2") == 0
    finally:
        killer.over.set()
        killer.join()
    assert len(killer.workers) >= 2
    (lost,) = killer.killed
    assert killer.there(lost), "the run of the lost worker was not repeated"
    assert "1 notebooks run, 0 failed" in capsys.readouterr().out
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as Ray gives a worker of one core
    assert run(notebooks, tmp_path / "here") == 0
    lost, local = (
        kept_scores.load_needle_scores(MODEL, folder=tmp_path / name / "scores")
        for name in ("ray", "here")
    )
    assert len(lost.metadata.groupby(["task", "length"])) == RUNS
    pd.testing.assert_frame_equal(lost.to_frame(), local.to_frame())
    drawn = content(tmp_path / "ray" / "figures")
    assert {"X_map_live.png", "X_map_live.pdf", "X_map_live.csv"} < drawn.keys()
    assert drawn == content(tmp_path / "here" / "figures")


def test_errors_of_a_cluster_come_back_in_order(tmp_path):
    units = [
        ScoreRun(model=MODEL, task="text", length=n, haystacks=1, folder=str(tmp_path))
        for n in (3, 64, 4)
    ]
    with ray_cluster("local", 1) as runner:
        errors = runner(units)
    assert [error[:20] for error in errors] == ["ValueError: length i", "", "ValueError: length i"]
    assert "length is 3" in errors[0]
    assert "length is 4" in errors[2]


def test_an_address_without_a_cluster_is_refused(notebooks, tmp_path, capsys):
    assert run(notebooks, tmp_path, "--ray", "127.0.0.1:1") == 2
    assert "reproduce.py: --ray 127.0.0.1:1: no cluster" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_port_that_never_answers_ends_after_a_stated_time(monkeypatch):
    monkeypatch.setattr(ray_runner, "TIMEOUT", 3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        begin = time.monotonic()
        with (
            pytest.raises(UsageError, match=rf"{address}: no cluster \(no answer within 3 sec"),
            ray_cluster(address),
        ):
            pass
    assert time.monotonic() - begin < 60


@pytest.mark.parametrize("address", ["", " "])
def test_an_empty_address_is_refused(notebooks, tmp_path, capsys, address):
    assert run(notebooks, tmp_path, "--ray", address) == 2
    assert '--ray "": expected the address of a cluster' in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
