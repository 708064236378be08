"""The package as a wheel, outside the repository: models, head lists and corpus come with it."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import example_prompts
import pytest

from mmheads import paths

SOURCES = ("mmheads", "benchmarks", "data", "pyproject.toml", "README.md", "LICENSE")

CHECK = """
import json, mmheads
from mmheads import paths, published
from mmheads.tasks import corpus
heads = mmheads.HeadSet.load("tiny-qwen3-vl-m")
print(json.dumps({
    "package": mmheads.__path__[0], "runs": str(paths.RUNS), "heads": len(heads),
    "paragraphs": len(corpus.shipped().paragraphs), "rows": len(published.paper("A_statements")),
}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that holds the content of the wheel and nothing else."""
    source, wheels, target = (tmp_path_factory.mktemp(name) for name in ("source", "wheel", "site"))
    for name in SOURCES:
        path = paths.ROOT / name
        if path.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(path, source / name, ignore=ignored)
        else:
            shutil.copy(path, source / name)
    build = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*build, "-w", str(wheels)], cwd=source, check=True, capture_output=True)
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(target)
    return target


def run(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_an_installed_package_finds_its_data_and_keeps_results_where_it_is_run(installed, tmp_path):
    done = run(installed, tmp_path, "-c", CHECK)
    assert done.returncode == 0, done.stderr
    about = json.loads(done.stdout)
    assert about["package"] == str(installed / "mmheads")
    assert about["runs"] == str(tmp_path / "runs")
    assert min(about["heads"], about["paragraphs"], about["rows"]) > 5


def test_an_installed_command_ranks_with_the_shipped_model_and_list(installed, tmp_path):
    example_prompts.write_pdf(tmp_path / "d.pdf", 2)
    words = ("-m", "mmheads", "rank", "d.pdf", "--model", "tiny-qwen3-vl-m", "--question", "? B7")
    done = run(installed, tmp_path, *words, "--dpi", "48", "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert (len(data["heads"]), data["pages"]) == (16, 2)
    assert (tmp_path / data["questions"][0]["picture"]).exists()
