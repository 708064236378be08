"""Heads, geometries, and sets of heads with their files."""

import json

import pytest

from mmheads.heads import Head, HeadGeometry, HeadSet, Origin, format_heads, overlap

GEOMETRY = HeadGeometry(2, 4, 2)


def test_head_prints_layer_first_and_counts_from_zero():
    assert str(Head(8, 10)) == "L8H10"
    assert format_heads([(0, 1), (8, 10)]) == "L0H1, L8H10"


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


def test_files_of_heads_are_read_by_plain_python(tmp_path):
    selected().save(tmp_path / "heads.json")
    content = json.loads((tmp_path / "heads.json").read_text())
    assert content["heads"] == [[1, 3, 0.5], [0, 0, None]]
    expected = ("toy", "abc", "text", "128", "top 5% by mean score", "mmheads.scoring")
    names = ("model", "revision", "task", "length", "rule", "source")
    assert tuple(content[name] for name in names) == expected


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
    with pytest.raises(FileNotFoundError, match="expected a JSON file of heads"):
        HeadSet.load(tmp_path)


def test_origins_of_joined_sets_are_joined():
    image = HeadSet(((0, 1),), GEOMETRY, "toy", Origin("abc", "image", "128"), {Head(0, 1): 0.2})
    joined = selected() | image
    assert joined.origin == Origin(
        "abc", "text + image", "128", "top 5% by mean score", "mmheads.scoring"
    )
    assert joined.scores == {Head(1, 3): 0.5, Head(0, 1): 0.2}
