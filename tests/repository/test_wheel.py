"""The package as a wheel, outside the repository: models, head lists and corpus come with it."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import example_prompts
import pytest

from mmheads import commands, paths

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


LINE = {"context": ["rain falls . B7 K ."], "question": "? B7", "answer": "K"}
EVIDENCE = {"evidence": [{"part": 0, "text": "B7 K ."}]}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the sources."""
    source, wheels = (tmp_path_factory.mktemp(name) for name in ("source", "wheel"))
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
    return wheel


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A fresh environment with only the wheel, and the libraries of this one."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=False)
    base = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", "venv", vars=base))
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    scripts = Path(sysconfig.get_path("scripts", "venv", vars=base))
    pip = [sys.executable, "-m", "pip", "--python", str(scripts / "python"), "install", "-q"]
    options = ["--no-deps", "--no-index", "--force-reinstall", "--ignore-installed", str(wheel)]
    subprocess.run([*pip, *options], check=True, capture_output=True)
    return scripts


def run(scripts: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a script of the environment in a folder, without this process's PYTHONPATH."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [scripts / words[0], *words[1:]],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_wheel_holds_the_package_and_its_data_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    parts = {tuple(Path(name).parts[:3]) for name in names}
    assert {each[0] for each in parts} == {"benchmarks", "mmheads", "mmheads-0.1.0.dist-info"}
    data = {each[2] for each in parts if each[:2] == ("mmheads", "data")}
    # Shipped results are read by the notebooks, which are not in the wheel: they stay in the clone.
    assert data == {"corpus", "heads", "models", "papers"}
    assert "mmheads/explorer.html" in names


def test_an_installed_package_finds_its_data_and_keeps_results_where_it_is_run(installed, tmp_path):
    done = run(installed, tmp_path, "python", "-c", CHECK)
    assert done.returncode == 0, done.stderr
    about = json.loads(done.stdout)
    assert Path(about["package"]).is_relative_to(installed.parent)
    assert about["runs"] == str(tmp_path / "runs")
    assert min(about["heads"], about["paragraphs"], about["rows"]) > 5


def test_an_installed_command_ranks_with_the_shipped_model_and_list(installed, tmp_path):
    example_prompts.write_pdf(tmp_path / "d.pdf", 2)
    words = ("mmheads", "rank", "d.pdf", "--model", "tiny-qwen3-vl-m", "--question", "? B7")
    done = run(installed, tmp_path, *words, "--dpi", "48", "--json", "--regions")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["pages"] == 2
    assert data["heads"]
    assert len(data["questions"][0]["regions"]) == 5
    assert (tmp_path / data["questions"][0]["picture"]).exists()


OTHERS = [
    "score tiny-qwen3-vl-m examples.jsonl",
    "ablate tiny-qwen3-vl-m tiny-qwen3-vl-m examples.jsonl --draws 2 --max-new-tokens 2",
    "explore tiny-qwen3-vl-m examples.jsonl -o heads.html",
    "detect tiny-qwen3-vl-m --tasks text --lengths 128 --haystacks 4",
]
EACH = """
import sys
from mmheads import cli
print([cli.main([*words.split(), "--json"]) for words in sys.argv[1:]], file=sys.stderr)
"""


def test_every_other_installed_command_runs_outside_of_the_repository(installed, tmp_path):
    lines = [LINE | EVIDENCE, LINE | EVIDENCE | {"question": "? K"}]
    (tmp_path / "examples.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    done = run(installed, tmp_path, "python", "-c", EACH, *OTHERS)  # in one process: one start
    *codes, of_detect = json.loads(done.stderr.splitlines()[-1])
    assert (codes, of_detect in (0, commands.NOTHING_FOUND)) == ([0, 0, 0], True), done.stderr
    rest, printed = done.stdout, []
    while rest := rest.strip():
        data, end = json.JSONDecoder().raw_decode(rest)
        rest = rest[end:]
        printed.append(data)
        written = [data.get("page"), *(data.get("files") or {}).values()]
        assert all((tmp_path / name).exists() for name in written if name)
    assert len(printed) == len(OTHERS)
    assert {path.name for path in tmp_path.iterdir()} <= {"examples.jsonl", "heads.html", "runs"}


def test_an_installed_command_that_fails_says_so_in_one_sentence(installed, tmp_path):
    done = run(installed, tmp_path, "mmheads", "score", "tiny-qwen3-vl-m", ".")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("mmheads: examples.jsonl does not exist; expected a .jsonl file")
    assert list(tmp_path.iterdir()) == []
