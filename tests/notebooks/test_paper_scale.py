"""The parameter files of both papers run to their end, on small random models and records.

Every line of the paper-scale path is run: published layouts, each family, every notebook. What is
made smaller is in `SMALL`; whatever else the files say is taken as it stands.
"""

from pathlib import Path

import fake_datasets
import pandas as pd
import pytest
import yaml
from test_repository import PUBLISHED

import reproduce
from mmheads import paths
from mmheads.tasks.grids import TASKS

pytestmark = pytest.mark.slow
FAMILIES = {
    "paper_mmrethead": ("qwen2_5_vl", "qwen3_vl", "gemma3"),
    "paper_core": ("internvl", "llava_onevision"),
}
LENGTHS = [8192, 32768]
SMALL = {
    "lengths": LENGTHS,
    "haystacks": 2,
    "detection_haystacks": 2,
    "prompts": 24,
    "draws": 2,
    "few_draws": 2,
    "resamples": 2,
    "fractions": [0.05],
    "cause_prompts": 4,
    "cause_length": 128,
    "answer_tokens": 2,
    "long_length": 8192,
    "long_questions": 3,
    "benchmark_tasks": [],  # lmms-eval is not among the requirements
    "probe_examples": 2,
    "share_length": 256,
    "image_shares": [0.0, 0.4],
    "documents": 2,
    "pages": 4,
    "windows": [2, 4],
    "cost_tokens": [1024],
    "cost_repeats": 1,
    "real_dpi": 30,
    "length": 8192,
    "shares": [0.1],
    "sinks": 2,
    "window": 6,
    "sweep": [[2, 6]],
    "shape": "small",
    "time_sinks": 4,
    "time_window": 28,
    "prefill_lengths": [128, 256],
    "decode_lengths": [128],
    "repeats": 1,
}
"""Nominal lengths stay: a stand-in's records are short whatever their file is called."""
MADE_ONCE = {"01_locate_evidence": {"length": 256}}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return fake_datasets.write_data(tmp_path_factory.mktemp("standins") / "data", haystacks=44)


def smaller(name: str, folder: Path, data: Path, models: list[str], **more) -> Path:
    """A paper's file with stand-ins for its models and data, and small numbers."""
    params = yaml.safe_load((paths.ROOT / "params" / f"{name}.yaml").read_text())
    params |= {"data": str(data)}
    params["models"] = [f"{folder / 'models' / model}" for model in models]
    for notebook in reproduce.select(paths.NOTEBOOKS, []):
        known = reproduce.defaults(notebook)
        kinds = ("scores", "answers", "effects", "figures")
        places = {f"{kind}_folder": f"{folder / kind}_folder" for kind in kinds}
        given = {**SMALL, **MADE_ONCE.get(notebook.stem, {}), **places, **more}
        section = params.setdefault(notebook.stem, {})
        section |= {key: value for key, value in given.items() if key in known}
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(params))
    return path


@pytest.mark.parametrize("name", FAMILIES)
def test_a_paper_runs_to_its_end_on_stand_ins(name, data, tmp_path, capsys):
    fake_datasets.write_models(tmp_path / "models", FAMILIES[name])
    models = [f"tiny-random-{family}" for family in FAMILIES[name]]
    params = smaller(name, tmp_path, data, models)
    before = {path.name: path.stat().st_mtime_ns for path in paths.FIGURES.iterdir()}

    assert reproduce.main(["--params", f"{params}", "--jobs", "2"], runs=tmp_path / "runs") == 0
    assert {path.name: path.stat().st_mtime_ns for path in paths.FIGURES.iterdir()} == before
    for model in models:
        made = {path.stem for path in (tmp_path / "figures_folder" / model).iterdir()}
        assert made >= PUBLISHED, f"{model} lacks {PUBLISHED - made}"

    capsys.readouterr()
    assert reproduce.main(["--params", f"{params}", "--plan"], runs=tmp_path / "runs") == 0
    printed = capsys.readouterr().out
    prompts = 6 * SMALL["haystacks"]
    assert f"{len(models)} models x 4 tasks x 2 lengths x {prompts} prompts" in printed
    rows = [line.split() for line in printed.splitlines() if "tiny-random" in line]
    grid = [row for row in rows if row[1:] and row[1] in TASKS and row[2] in map(str, LENGTHS)]
    assert len(grid) == len(models) * 4 * 2
    assert {row[-1] for row in grid} == {"yes"}

    last, *others = models
    params = smaller(name, tmp_path, data, [last], beside=others)
    only = ["--only", "03", "04", "--params", f"{params}"]
    assert reproduce.main(only, runs=tmp_path / "beside") == 0
    for figure in ("X_sparsity_models_live", "X_overlap_models_live"):
        path = tmp_path / "figures_folder" / last / f"{figure}.csv"
        if not path.exists():
            pytest.skip("figures of all models need the released scores")
        together = pd.read_csv(path)
        assert set(together.loc[together["source"] == "kept scores", "model"]) == set(others)
        assert (together["source"] == "released scores").any()
