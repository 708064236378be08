"""Reading released files: from a folder, by download, and with every kind of damage.

The files are made here in the released layout; those of the authors are read in
test_released_figures.py.
"""

import dataclasses
import hashlib
import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from mmheads import paths, published
from mmheads.heads import HeadSet

MODEL = "gemma-3-12b-it"
KEY = next(key for key in published.REGISTRY if f"/{MODEL}/mm_niah_retrieval-text" in key)
DEFECTIVE_KEY = KEY.replace(MODEL, "Qwen2.5-VL-7B-Instruct")
LENGTH = int(KEY.split("_in")[1].split("_")[0])


def content(model: str = MODEL) -> dict:
    """A file in the released schema: scores fall with the head's index."""
    shape = published.GEOMETRIES[model]
    heads = np.ndindex(shape.layers, shape.heads)
    return {
        "args": {"model_name_or_path": f"google/{model}", "seed": 42},
        "head_score_list": [
            [f"{layer}-{head}", (shape.size - rank) / 8192]
            for rank, (layer, head) in enumerate(heads)
        ],
        "metrics": {"input_len": [8000, 8200]},
    }


def parse(made: dict, key: str = KEY):
    return published.parse(json.dumps(made).encode(), key, task="text", length=LENGTH)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A published folder with one file, whose checksum is registered."""
    raw = json.dumps(content()).encode()
    path = tmp_path / "published" / published.TOP / KEY
    path.parent.mkdir(parents=True)
    path.write_bytes(raw)
    monkeypatch.setitem(published.REGISTRY, KEY, hashlib.sha256(raw).hexdigest())
    return tmp_path / "published"


def test_released_heads_are_found_by_name_folder_and_geometry(folder):
    shape = published.GEOMETRIES[MODEL]
    strongest = published.load("Gemma3-12B", "text", LENGTH, folder=folder).top(0.01)
    settings = {"tasks": ["text"], "length": LENGTH, "fraction": 0.01, "folder": folder}
    for name in ("Gemma3-12B", f"google/{MODEL}", f"/models/{MODEL}/", shape):
        heads = HeadSet.released(name, **settings)
        assert heads == strongest
        assert heads.origin.source.startswith("ab-cli/MMRetHead@")
    other = dataclasses.replace(shape, architecture="qwen3")
    for unknown in ("my-model", other, dataclasses.replace(shape, layers=49)):
        with pytest.raises(ValueError, match=r"model is .*expected .*Qwen2.5-VL-7B"):
            HeadSet.released(unknown, **settings)
    with pytest.raises(ValueError, match=r"tasks is \[\]; expected at least one of text"):
        HeadSet.released(MODEL, tasks=[])


def test_a_file_becomes_scores(folder):
    scores = published.load("Gemma3-12B", "text", LENGTH, folder=folder)
    assert scores.values.shape == (1, 48, 16)
    assert scores.mean[0, 0] == 768 / 8192
    assert scores.mean[47, 15] == 1 / 8192
    row = scores.metadata.iloc[0]
    assert (row.task, row.length, row.haystack, row.prompts, row.mean_input_tokens) == (
        "text",
        LENGTH,
        "",
        2,
        8100,
    )
    assert scores.provenance.model == "google/gemma-3-12b-it"
    assert scores.provenance.settings == {"shuffle_seed": 42}
    assert scores.provenance.source.endswith(KEY)
    assert {head.layer for head in scores.top(0.05)} == {5, 11, 17}  # global layers alone


def test_models_and_lengths_have_more_than_one_name(folder):
    for model in ("Gemma3-12B", MODEL, f"google/{MODEL}"):
        for length in (LENGTH, f"{LENGTH // 1024}K"):
            assert published.load(model, "text", length, folder=folder).mean[0, 0] == 768 / 8192


def test_the_setting_names_the_folder(folder, monkeypatch):
    monkeypatch.setenv("MMHEADS_PUBLISHED", str(folder))
    assert published.load("Gemma3-12B", "text", LENGTH).mean[0, 0] == 768 / 8192


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("Gemma4", "text", 8192), "model is 'Gemma4'; expected one of Qwen2.5-VL-7B"),
        (("Gemma3-12B", "video", 8192), "task is 'video'; expected one of text, image"),
        (("Gemma3-12B", "text", 8000), "length is 8000; expected one of 8K"),
    ],
)
def test_what_was_not_released_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        published.load(*arguments)


def test_truncated_and_changed_files_are_refused(folder):
    path = folder / published.TOP / KEY
    raw = path.read_bytes()
    for damaged in (raw[: len(raw) // 2], raw.replace(b"0.0937", b"0.0938"), b""):
        path.write_bytes(damaged)
        with pytest.raises(published.DefectiveFileError, match="it is truncated or changed"):
            published.load("Gemma3-12B", "text", LENGTH, folder=folder)


def set_score(made: dict, value: float) -> None:
    made["head_score_list"][17][1] = value  # L1H1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda made: made["head_score_list"].pop(17), "lacks the heads L1H1$"),
        (lambda made: made["head_score_list"].append(["1-1", 0.5]), "more than one score of L1H1$"),
        (lambda made: made["head_score_list"].append(["48-0", 0.5]), "does not have: L48H0$"),
        (lambda made: set_score(made, float("nan")), "has no number for L1H1$"),
        (lambda made: set_score(made, float("inf")), "has no number for L1H1$"),
        (lambda made: set_score(made, 1.5), "L1H1 lie outside"),
        (lambda made: set_score(made, "high"), "not a released score file: ValueError"),
        (lambda made: made.pop("head_score_list"), "not a released score file: KeyError"),
        (lambda made: made["head_score_list"].append(["5", 0.5]), "score file: ValueError"),
        (lambda made: made["metrics"]["input_len"].clear(), "score file: StatisticsError"),
        (lambda made: made.pop("args"), "not a released score file: KeyError"),
    ],
)
def test_damage_that_a_checksum_does_not_show_is_named_with_file_and_heads(damage, message):
    made = content()
    damage(made)
    with pytest.raises(published.DefectiveFileError, match=message) as error:
        parse(made)
    assert KEY in str(error.value)


def test_half_a_file_is_no_score_file():
    raw = json.dumps(content()).encode()
    with pytest.raises(published.DefectiveFileError, match="JSONDecodeError"):
        published.parse(raw[: len(raw) // 2], KEY, task="text", length=LENGTH)


def test_impossible_scores_of_the_known_model_warn_with_model_file_and_heads():
    made = content("Qwen2.5-VL-7B-Instruct")
    made["head_score_list"][29][1] = -11.3  # L1H1
    with pytest.warns(published.ImpossibleScoreWarning) as caught:
        scores = parse(made, DEFECTIVE_KEY)
    message = str(caught[0].message)
    assert "Qwen2.5-VL-7B-Instruct" in message
    assert DEFECTIVE_KEY in message
    assert "L1H1 lie outside [-1, 1]" in message
    assert [str(head) for head in scores.out_of_range(-1, 1)] == ["L1H1"]
    files = {
        ("Qwen2.5-VL-7B", "text", LENGTH): scores,
        ("Gemma3-12B", "text", LENGTH): parse(content()),
    }
    assert published.impossible_heads(files) == {"Qwen2.5-VL-7B": [(1, 1)], "Gemma3-12B": []}


def test_all_or_none_are_loaded_and_one_line_says_what_is_missing(folder, capsys):
    wanted = {"models": ["Gemma3-12B"], "tasks": ["text"], "folder": folder}
    assert list(published.load_all(lengths=[LENGTH], **wanted)) == [("Gemma3-12B", "text", LENGTH)]
    assert published.load_all(**wanted) == {}
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert "does not exist" in line
    assert line.startswith("Skipped: released scores")
    assert "complete that folder, or unset MMHEADS_PUBLISHED to download" in line


def test_a_damaged_file_is_an_error_and_not_skipped(folder):
    (folder / published.TOP / KEY).write_bytes(b"{}")
    with pytest.raises(published.DefectiveFileError):
        published.load_all(["Gemma3-12B"], ["text"], [LENGTH], folder=folder)


@pytest.fixture
def server(folder, tmp_path, monkeypatch):
    """The folder, served on this machine as if it were the source; no folder is set."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format, *arguments):
            del format, arguments

    serve = partial(Quiet, directory=str(folder / published.TOP))
    running = ThreadingHTTPServer(("127.0.0.1", 0), serve)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    monkeypatch.setattr(published, "SOURCE", f"http://127.0.0.1:{running.server_port}/")
    monkeypatch.setattr(paths, "published", lambda folder="": None)
    monkeypatch.setenv("MMHEADS_CACHE", str(tmp_path / "cache"))
    yield running
    running.shutdown()
    running.server_close()


def test_a_file_is_downloaded_once_and_then_read_from_the_cache(server, tmp_path):
    assert published.load("Gemma3-12B", "text", LENGTH).mean[0, 0] == 768 / 8192
    assert (tmp_path / "cache" / "published" / published.TOP / KEY).is_file()
    server.shutdown()
    server.server_close()
    assert published.load("Gemma3-12B", "text", LENGTH).mean[0, 0] == 768 / 8192


def test_a_download_with_another_checksum_is_refused_and_not_kept(server, folder, tmp_path):
    (folder / published.TOP / KEY).write_bytes(b"{}")
    with pytest.raises(published.DefectiveFileError, match="hash"):
        published.load("Gemma3-12B", "text", LENGTH)
    assert not (tmp_path / "cache" / "published" / published.TOP / KEY).exists()


def test_the_cache_can_be_named_by_argument(server, tmp_path):
    assert published.complete_folder(cache=tmp_path / "mine") is None
    published.load("Gemma3-12B", "text", LENGTH, cache=tmp_path / "mine")
    assert (tmp_path / "mine" / "published" / published.TOP / KEY).is_file()
    assert not (tmp_path / "cache").exists()


def test_without_network_one_line_says_how_to_get_the_scores(server, capsys):
    server.shutdown()
    server.server_close()
    assert published.load_all(["Gemma3-12B"], ["text"], [LENGTH]) == {}
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert "could not be downloaded (ConnectionError); connect to the network" in line
    assert "set MMHEADS_PUBLISHED to a folder" in line


def test_every_released_file_is_registered():
    assert len(published.REGISTRY) == 120
    assert len({*published.REGISTRY.values()}) == 120
    assert all(len(sha256) == 64 for sha256 in published.REGISTRY.values())
