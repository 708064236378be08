"""Control sets: as large as the selection, none of its heads, matched where that is possible."""

from collections import Counter

import numpy as np
import pytest

from mmheads.controls import random_controls
from mmheads.heads import Head, HeadGeometry, HeadSet

GEOMETRY = HeadGeometry(layers=4, heads=8, kv_groups=4)
EVERY = np.ones((4, 8), dtype=bool)
SELECTED = HeadSet((Head(1, 0), Head(1, 1), Head(1, 5), Head(3, 2)), GEOMETRY, "model")


@pytest.mark.parametrize("match", ["", "layer", "kv_group"])
def test_controls_are_other_heads_as_many_and_seeded(match):
    draws = random_controls(SELECTED, EVERY, draws=20, seed=1, match=match)
    assert len(draws) == 20
    for drawn in draws:
        assert len(drawn) == 4
        assert not len(drawn & SELECTED)
        assert (drawn.geometry, drawn.model) == (GEOMETRY, "model")
    assert len({drawn.heads for drawn in draws}) > 10
    assert {drawn.origin.rule.split(",")[0] for drawn in draws} == {"random"}
    assert not any(drawn.scores for drawn in draws)
    assert draws == random_controls(SELECTED, EVERY, draws=20, seed=1, match=match)
    assert draws != random_controls(SELECTED, EVERY, draws=20, seed=2, match=match)


def test_controls_match_layers():
    for drawn in random_controls(SELECTED, EVERY, draws=20, seed=0, match="layer"):
        assert Counter(head.layer for head in drawn) == {1: 3, 3: 1}


def test_controls_match_kv_groups():
    for drawn in random_controls(SELECTED, EVERY, draws=20, seed=0, match="kv_group"):
        assert Counter(head.layer for head in drawn) == {1: 3, 3: 1}
        assert not drawn.kv_groups & SELECTED.kv_groups
        shared = Counter(GEOMETRY.kv_group(head) for head in drawn)
        assert sorted(shared.values()) == [1, 1, 2]


@pytest.mark.parametrize("match", ["", "layer", "kv_group"])
def test_random_sets_for_a_rank_test_may_hold_selected_heads(match):
    draws = random_controls(SELECTED, EVERY, draws=200, seed=0, match=match, disjoint=False)
    shared = [len(drawn & SELECTED) for drawn in draws]
    assert max(shared) > 0
    assert min(shared) == 0
    if match:
        assert all(Counter(h.layer for h in drawn) == {1: 3, 3: 1} for drawn in draws)


def test_what_cannot_match_comes_from_the_nearest_layer_and_is_said():
    eligible = EVERY.copy()
    eligible[1] = SELECTED.mask[1]
    with pytest.warns(UserWarning, match="3 of 4 control heads do not match by layer"):
        draws = random_controls(SELECTED, eligible, draws=5, seed=0, match="layer")
    assert all({head.layer for head in drawn} <= {0, 2, 3} for drawn in draws)
    whole = HeadSet(tuple(Head(1, head) for head in range(0, 8, 2)), GEOMETRY)
    with pytest.warns(UserWarning, match="4 of 4 control heads do not match by kv_group"):
        draws = random_controls(whole, EVERY, draws=5, seed=0, match="kv_group")
    assert all({head.layer for head in drawn} <= {0, 2} for drawn in draws)
    many = HeadSet(tuple(Head(layer, 0) for layer in range(4)), HeadGeometry(4, 8, 1))
    with pytest.warns(UserWarning, match="4 of 4 control heads do not match by kv_group"):
        random_controls(many, EVERY, seed=0, match="kv_group")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"match": "depth"}, "match is 'depth'"),
        ({"draws": 0}, "0 draws beside 4 selected heads"),
        ({"eligible": SELECTED.mask}, "no more heads than the 0 that are left"),
        ({"selected": HeadSet((), GEOMETRY)}, "beside 0 selected heads"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        random_controls(**{"selected": SELECTED, "eligible": EVERY, "seed": 0, **settings})
