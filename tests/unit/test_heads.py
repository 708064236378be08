"""Heads, geometries, and sets of heads with their files."""

import dataclasses
import json
import subprocess
import sys

import pytest

from mmheads import paths
from mmheads.heads import Head, HeadGeometry, HeadSet, Origin, format_heads, overlap
from mmheads.provenance import folder_revision

GEOMETRY = HeadGeometry(2, 4, 2, architecture="toy_vl")


def test_head_prints_layer_first_and_counts_from_zero():
    assert str(Head(8, 10)) == "L8H10"
    assert format_heads([(0, 1), (8, 10)]) == "L0H1, L8H10"


def test_heads_fit_a_model_of_equal_geometry_and_architecture():
    unknown = HeadGeometry(2, 4, 2)
    assert unknown == GEOMETRY
    assert GEOMETRY.fits(unknown)
    assert unknown.fits(GEOMETRY)
    assert not GEOMETRY.fits(HeadGeometry(2, 4, 2, architecture="toy"))
    assert not GEOMETRY.fits(HeadGeometry(2, 4, 4, architecture="toy_vl"))


def test_set_algebra_and_views():
    a = HeadSet(((1, 3), (0, 0), (1, 2)), GEOMETRY)
    b = HeadSet(((0, 0), (0, 1)), GEOMETRY)
    assert [str(a & b), str(a - b), str(a | b)] == ["L0H0", "L1H3 L1H2", "L1H3 L0H0 L1H2 L0H1"]
    assert (0, 0) in a
    assert (0, 1) not in a
    assert a.layers == (0, 1)
    assert a.kv_groups == {(1, 1), (0, 0)}  # heads 2 and 3 of a layer share KV group 1
    assert a.mean_layer == pytest.approx(2 / 3)
    assert a.mask.sum() == 3
    assert a.mask[1, 3]


@pytest.mark.parametrize("heads", [((2, 0),), ((0, 4),), ((-1, 0),)])
def test_heads_outside_the_model_are_refused(heads):
    with pytest.raises(ValueError, match="not among the 2 layers x 4 heads of toy"):
        HeadSet(heads, GEOMETRY, "toy")


def test_a_head_stands_once_in_a_set():
    with pytest.raises(ValueError, match="each head once"):
        HeadSet(((0, 0), (0, 0)), GEOMETRY)


def test_overlap_of_equal_sizes():
    a, b = (HeadSet(heads, GEOMETRY) for heads in (((0, 0), (0, 1)), ((0, 1), (1, 1))))
    assert overlap(a, b) == 0.5
    assert overlap(a, a) == 1.0


def test_overlap_refuses_other_sizes_empty_sets_and_other_models():
    a = HeadSet(((0, 0),), GEOMETRY)
    for b in (HeadSet((), GEOMETRY), HeadSet(((0, 0), (0, 1)), GEOMETRY)):
        with pytest.raises(ValueError, match="sets of one size"):
            overlap(a, b)
    with pytest.raises(ValueError, match="sets of one size"):
        overlap(HeadSet((), GEOMETRY), HeadSet((), GEOMETRY))
    with pytest.raises(ValueError, match="different models"):
        overlap(a, HeadSet(((0, 0),), HeadGeometry(3, 4, 2)))


@pytest.mark.parametrize("shape", [(2, 4, 3), (0, 4, 2), (2, 4, 2, (2,))])
def test_impossible_geometries_are_refused(shape):
    with pytest.raises(ValueError, match=r"KV groups|not among the 2 layers"):
        HeadGeometry(*shape)


def selected() -> HeadSet:
    origin = Origin("abc", "text", "128", "top 5% by mean score", "mmheads.scoring")
    return HeadSet(((1, 3), (0, 0)), GEOMETRY, "toy", origin, {Head(1, 3): 0.5})


def test_head_sets_survive_a_round_trip(tmp_path):
    path = tmp_path / "toy.v1.5.json"
    heads = selected()
    heads.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["toy.v1.5.json"]
    again = HeadSet.load(path)
    assert again == heads
    assert (again.origin, dict(again.scores)) == (heads.origin, heads.scores)


READER = """
import json, sys
content = json.load(open(sys.argv[1], encoding="utf-8"))
about = {name: content[name] for name in ("model", "revision", "task", "length", "rule", "source")}
shape = content["geometry"]
print(about, shape["architecture"], f"{shape['layers']} x {shape['heads']}")
for layer, head, score in content["heads"]:
    print(f"L{layer}H{head}", "not scored" if score is None else score)
"""
"""How other tools read a list of heads, without mmheads."""


def test_files_of_heads_are_read_by_plain_python(tmp_path):
    selected().save(tmp_path / "heads.json")
    assert len(READER.strip().splitlines()) <= 10
    command = [sys.executable, "-I", "-S", "-c", READER, str(tmp_path / "heads.json")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    about = {
        **{"model": "toy", "revision": "abc", "task": "text", "length": "128"},
        **{"rule": "top 5% by mean score", "source": "mmheads.scoring"},
    }
    assert printed.splitlines() == [f"{about} toy_vl 2 x 4", "L1H3 0.5", "L0H0 not scored"]


def test_a_shipped_list_is_found_by_the_name_of_its_model(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "HEADS", tmp_path)
    selected().save(tmp_path / "Toy-VL2.5.json")
    for name in ("Toy-VL2.5", "maker/Toy-VL2.5", "/models/Toy-VL2.5/"):
        assert HeadSet.load(name) == selected()
    with pytest.raises(FileNotFoundError, match=r"Toy-VL3 is not a file; .* \(Toy-VL2\.5\)"):
        HeadSet.load("maker/Toy-VL3")


def test_every_shipped_list_is_of_the_model_that_it_is_named_for():
    for path in paths.HEADS.glob("*.json"):
        heads = HeadSet.load(path.stem)
        assert len(heads.scores) == len(heads) > 0
        assert heads.geometry.architecture
        assert all(dataclasses.astuple(heads.origin))
        assert heads.model.rpartition("/")[2] == path.stem
        if (folder := paths.MODELS / path.stem).is_dir():
            assert heads.origin.revision == folder_revision(folder), "run mmheads detect again"


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c.pop("heads"),
        lambda c: c.pop("geometry"),
        lambda c: c.pop("rule"),
        lambda c: c.update(format=9),
        lambda c: c.update(heads=[[1]]),
        lambda c: c.update(heads=[[1.5, 0, None]]),
        lambda c: c.update(heads=[["1", 0, None]]),
        lambda c: c.update(heads=[[7, 0, None]]),
        lambda c: c.update(heads=[[1, 0, "high"]]),
        lambda c: c.update(geometry={"layers": "2"}),
        lambda c: c.update(geometry=[]),
    ],
)
def test_damaged_files_of_heads_are_one_error_that_names_the_file(tmp_path, damage):
    path = tmp_path / "heads.json"
    selected().save(path)
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"heads.json is not a file of heads"):
        HeadSet.load(path)


@pytest.mark.parametrize("text", ["", "[]", "5", "{", "\xff"])
def test_other_files_are_not_read_as_heads(tmp_path, text):
    path = tmp_path / "heads.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"heads.json is not a file of heads"):
        HeadSet.load(path)
    with pytest.raises(FileNotFoundError, match="expected a JSON file of heads, or the name"):
        HeadSet.load(tmp_path)


def test_origins_of_joined_sets_are_joined():
    image = HeadSet(((0, 1),), GEOMETRY, "toy", Origin("abc", "image", "128"), {Head(0, 1): 0.2})
    joined = selected() | image
    assert joined.origin == Origin(
        "abc", "text + image", "128", "top 5% by mean score", "mmheads.scoring"
    )
    assert joined.scores == {Head(1, 3): 0.5, Head(0, 1): 0.2}
