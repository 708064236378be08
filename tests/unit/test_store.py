"""Results by provenance: shipped, kept or computed; whole files, shared by processes."""

import dataclasses
import json
import multiprocessing
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmheads import paths, store, tables
from mmheads.provenance import Provenance

MADE = Provenance(
    model="folder/toy",
    revision="abc",
    template="t",
    versions={"torch": "2.13.0"},
    settings={"null_images": "placeholders"},
    code="c",
    source="mmheads.scoring",
)


@pytest.fixture(autouse=True)
def shipped(tmp_path, monkeypatch) -> Path:
    """The folder of shipped results, which is empty."""
    monkeypatch.setattr(store, "SHIPPED", tmp_path / "data")
    return tmp_path / "data"


def opened(folder: Path, made: Provenance = MADE, **more) -> store.Results:
    return store.open("scores", made, version=1, folder=folder, **more)


def row(value: float) -> dict:
    return {"tokens": 7, "raw": np.full((2, 3), value, np.float32)}


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.parquet"))


def test_rows_are_found_again_and_lie_in_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SAVE_EVERY", 0.0)
    with opened(tmp_path) as results:
        for index in range(5):
            results.add(f"k{index}", row(index))
        assert len(files(tmp_path)) == 5
    assert len(files(tmp_path)) == 1
    with opened(tmp_path) as results:
        assert "k5" not in results
        assert results["k3"]["tokens"] == 7
        np.testing.assert_array_equal(results["k3"]["raw"], np.full((2, 3), 3))


def test_what_another_process_has_only_begun_to_write_is_not_read(tmp_path):
    with opened(tmp_path) as results:
        results.add("k", row(1))
        results.note({"task": "text"}, [{"key": "k"}])
    (folder,) = {path.parent for path in files(tmp_path)}
    for suffix in ("parquet", "json"):
        with paths.write_whole(folder / f"later.{suffix}") as temporary:
            assert temporary.exists()
            with opened(tmp_path) as results:
                assert "k" in results
                assert len(results.notes()) == 1
            temporary.write_text("{}", encoding="utf-8")
        (folder / f"later.{suffix}").unlink()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_rows_before_an_error_are_kept(tmp_path, error):
    def fail() -> None:
        with opened(tmp_path) as results:
            results.add("a", row(1))
            raise error

    with pytest.raises(error):
        fail()
    assert "a" in opened(tmp_path)


def test_rows_of_a_killed_process_are_kept_but_for_the_last_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SAVE_EVERY", 0.0)
    results = opened(tmp_path)
    results.add("a", row(1))  # never closed, as after kill -9
    assert "a" in opened(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "folder/other"},
        {"revision": "abd"},
        {"template": "u"},
        {"tokenizer": "u"},
        {"generation": "u"},
        {"null_question": "nothing"},
        {"versions": {"torch": "2.14.0"}},
        {"settings": {"null_images": "pixels"}},
        {"code": "d"},
    ],
)
def test_kept_rows_of_another_provenance_are_never_returned(tmp_path, changes):
    with opened(tmp_path) as results:
        results.add("a", row(1))
    with opened(tmp_path, dataclasses.replace(MADE, **changes)) as results:
        assert "a" not in results
    with opened(tmp_path) as results:
        assert "a" in results


def test_a_file_in_the_wrong_folder_is_refused_with_the_difference(tmp_path):
    other = dataclasses.replace(MADE, revision="stranger")
    for made in (MADE, other):
        with opened(tmp_path, made) as results:
            results.add("a", row(1))
    (target,) = (path for path in files(tmp_path) if MADE.key[:12] in str(path))
    (source,) = (path for path in files(tmp_path) if other.key[:12] in str(path))
    target.write_bytes(source.read_bytes())
    with pytest.raises(ValueError, match=r"revision 'stranger', now 'abc'; delete it"):
        opened(tmp_path)["a"]


def test_a_damaged_file_is_refused_by_name(tmp_path):
    with opened(tmp_path) as results:
        results.add("a", row(1))
    (path,) = files(tmp_path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"{path.name} is not a readable parquet file"):
        opened(tmp_path)


def test_a_folder_that_cannot_be_written_is_an_error_at_once(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="file"):
        opened(tmp_path / "file")


def test_nothing_is_left_where_nothing_was_computed(tmp_path):
    with opened(tmp_path / "kept"):
        pass
    assert list((tmp_path / "kept").iterdir()) == []
    with opened(None) as results:
        results.add("a", row(1))
        assert "a" in results
    assert files(tmp_path) == []


def add_rows(folder: Path, first: int) -> None:
    store.SAVE_EVERY = 0.0
    with opened(folder) as results:
        for index in range(first, first + 10):
            results.add(f"k{index}", row(index))
            results.note({"task": "text"}, [{"key": f"k{index}", "depth": 0.5}])


def test_two_processes_add_rows_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=add_rows, args=(tmp_path, n)) for n in (0, 5)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    results = opened(tmp_path)
    assert all(results[f"k{index}"]["raw"][0, 0] == index for index in range(15))
    (note,) = results.notes()
    assert {entry["key"] for entry in note["rows"]} == {f"k{index}" for index in range(15)}


def test_a_file_that_another_process_joined_with_others_is_found_again(tmp_path):
    with opened(tmp_path) as results:
        results.add("a", row(1))
    reader = opened(tmp_path)
    (path,) = files(tmp_path)
    path.rename(path.with_name("joined.parquet"))
    assert reader["a"]["raw"][0, 0] == 1


def ship(folder: Path, made: Provenance = MADE, version: int = 1, value: float = 0.5) -> Path:
    """Keep one row, and ship it."""
    with opened(folder, made, about={"geometry": {"layers": 2}}) as results:
        results.add("a", row(value))
        labels = {"task": "text", "length": 128, "haystack": "h"}
        results.note({"task": "text"}, [{"key": "a", "depth": at, **labels} for at in (0.5, 0.0)])
    settings = {"machine": "2 CPU cores", "date": "2026-11-25", "short": {"raw": "uint16"}}
    (path,) = store.ship("scores", "toy", version=version, now=made, folder=folder, **settings)
    return path


def test_shipped_rows_come_first_and_fresh_leaves_them_out(tmp_path, shipped):
    ship(tmp_path / "made")
    with opened(tmp_path / "kept", fresh=True) as results:
        assert "a" not in results
        results.add("a", row(0.25))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        newer = dataclasses.replace(MADE, code="d", versions={"torch": "2.14.0"})
        with opened(tmp_path / "other", newer) as results:
            assert results["a"]["raw"][0, 0] == pytest.approx(0.5, abs=1e-5)
        with opened(tmp_path / "kept") as results:
            assert results["a"]["raw"][0, 0] == pytest.approx(0.5, abs=1e-5)
            assert results.notes()[-1]["about"] == {"task": "text"}
    with opened(tmp_path / "kept", fresh=True) as results:
        assert results["a"]["raw"][0, 0] == 0.25


def test_a_shipped_file_holds_masses_in_sixteen_bits_and_says_how_it_was_made(tmp_path, shipped):
    path = ship(tmp_path / "made", value=0.123456)
    assert path.parent == shipped / "scores"
    about, scalars, arrays = tables.read_table(path)
    assert (about["machine"], about["date"], about["version"]) == ("2 CPU cores", "2026-11-25", 1)
    assert about["conditions"] == [{"task": "text"}]
    assert pq.read_schema(path).field("raw").type.value_type == "uint16"
    np.testing.assert_allclose(arrays["raw"], 0.123456, atol=0.5 / tables.STEPS + 1e-7)
    assert scalars["cpu_seconds"].to_pylist()[0] >= 0
    with pytest.raises(ValueError, match=r"raw cannot be written in 16 bits: .* \[0, 1\]"):
        ship(tmp_path / "wrong", value=1.5)


def test_arrays_are_written_in_half_precision_or_left_out(tmp_path):
    path, scalars = tmp_path / "rows.parquet", pa.table({"key": ["a"]})
    arrays = {"norm": np.array([[1234.567, 0.1]]), "share": np.array([[0.5]])}
    short = {"norm": "float16", "share": tables.LEFT_OUT}
    tables.write_table(path, scalars, arrays, {}, short=short)
    read = tables.read_table(path)[2]
    assert list(read) == ["norm"]
    assert read["norm"].dtype == np.float32
    np.testing.assert_array_equal(read["norm"], np.float32([[1235, 0.099975586]]))
    with pytest.raises(ValueError, match=r"norm cannot be written in 16 bits: .*65504\]"):
        tables.write_table(path, scalars, {"norm": np.array([[1e5]])}, {}, short=short)


def test_shipped_rows_that_lack_an_array_are_left_out(tmp_path, shipped):
    path = ship(tmp_path / "made")
    with opened(tmp_path / "kept", arrays=["raw"]) as results:
        assert "a" in results
    with (
        pytest.warns(UserWarning, match=f"{path.name} is not used: it has no norm"),
        opened(tmp_path / "kept", arrays=["raw", "norm"]) as results,
    ):
        assert "a" not in results


def test_rows_computed_later_join_and_replace_those_that_are_shipped(tmp_path, shipped):
    first = ship(tmp_path / "first")
    newer = dataclasses.replace(MADE, code="d")
    with opened(tmp_path / "second", newer, fresh=True) as results:
        results.add("b", row(0.75))
    settings = {
        "machine": "1 x H100",
        "date": "2026-11-26",
        "version": 1,
        "now": newer,
        "short": {},
    }
    (second,) = store.ship("scores", "toy", folder=tmp_path / "second", **settings)
    assert second == first
    _, scalars, arrays = tables.read_table(second)
    assert scalars["key"].to_pylist() == ["a", "a", "b"]
    assert scalars["depth"].to_pylist() == [0.5, 0.0, None]
    np.testing.assert_allclose(arrays["raw"][:, 0, 0], [0.5, 0.5, 0.75], atol=1e-5)
    with opened(tmp_path / "second", newer, fresh=True) as results:
        results.add("a", row(0.25))
    store.ship("scores", "toy", folder=tmp_path / "second", **settings)
    values = tables.read_table(second)[2]["raw"][:, 0, 0]
    np.testing.assert_allclose(values, [0.25, 0.25, 0.75], atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "version", "message"),
    [
        ({}, 2, "version 2, now 1"),
        ({"template": "old"}, 1, "template 'old', now 't'"),
        ({"revision": "old"}, 1, "revision 'old', now 'abc'"),
        (
            {"settings": {"null_images": "pixels"}},
            1,
            r"settings\['null_images'\] 'pixels', now 'placeholders'",
        ),
    ],
)
def test_shipped_rows_that_do_not_fit_are_left_out_with_the_difference(
    tmp_path, shipped, changes, version, message
):
    ship(tmp_path / "made", dataclasses.replace(MADE, **changes), version)
    with pytest.warns(UserWarning, match=f"toy-.*parquet is not used: {message}"):
        results = opened(tmp_path / "kept")
    assert "a" not in results
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened(tmp_path / "kept", dataclasses.replace(MADE, model="another"))


def test_results_are_known_by_the_models_name(tmp_path, shipped):
    now = Provenance(code="c", versions={"torch": "2.13.0"})
    with opened(tmp_path / "kept", about={"geometry": {"layers": 2}}) as results:
        results.add("a", row(1))
        results.note({"task": "text"}, [{"key": "a"}])
    find = {"version": 1, "folder": tmp_path / "kept"}
    (known,) = store.known("scores", "toy", now=now, **find)
    assert known.provenance == MADE
    assert known.about["geometry"] == {"layers": 2}
    assert known.notes() == [{"about": {"task": "text"}, "rows": [{"key": "a"}]}]
    assert store.known("scores", "other", now=now, **find) == []
    for stale in ({"code": "d"}, {"versions": {"torch": "2.14.0"}}):
        assert store.known("scores", "toy", now=dataclasses.replace(now, **stale), **find) == []
    ship(tmp_path / "made")
    (known,) = store.known("scores", "toy", now=now, **find)
    assert len(known.notes()) == 2
    (known,) = store.known("scores", "toy", now=dataclasses.replace(now, code="d"), **find)
    assert known["a"]["raw"][0, 0] == pytest.approx(0.5, abs=1e-5)


def test_a_note_lists_only_results_that_are_there(tmp_path):
    with opened(tmp_path) as results:
        results.add("a", row(1))
        results.note({"task": "text"}, [{"key": "a"}, {"key": "lost"}])
    assert opened(tmp_path).notes() == [{"about": {"task": "text"}, "rows": [{"key": "a"}]}]


def test_a_forged_provenance_is_refused_by_name(tmp_path):
    with opened(tmp_path) as results:
        results.add("a", row(1))
    (path,) = tmp_path.rglob("about.json")
    for text in ("{", "5", '{"provenance": []}', '{"provenance": {"model": 5}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"about.json.*delete it"):
            store.known("scores", "toy", version=1, now=MADE, folder=tmp_path)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"about": {}}', '{"about": [], "rows": []}', '{"about": {}, "rows": [{}]}'],
)
def test_a_damaged_note_is_refused_by_name(tmp_path, text):
    with opened(tmp_path) as results:
        results.add("a", row(1))
        results.note({"task": "text"}, [{"key": "a"}])
    (path,) = (each for each in tmp_path.rglob("*.json") if each.name != "about.json")
    assert json.loads(path.read_text())["rows"] == [{"key": "a"}]
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path.name} .*delete it"):
        opened(tmp_path).notes()
