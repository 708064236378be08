"""Effects of ablations: paired over haystacks, tested and corrected."""

import numpy as np
import pandas as pd
import pytest

from mmheads.effects import against_random, effects


def test_effects_are_paired_over_haystacks():
    rows = [
        {"ablation": name, "draw": draw, "heads": count, "task": "text", "depth": depth}
        | {"haystack": str(unit), "score": score(unit, draw, depth)}
        for name, draws, count, score in (
            ("full model", 1, 0, lambda unit, draw, depth: 1.0),
            ("all", 1, 3, lambda unit, draw, depth: 0.0),
            ("some", 2, 3, lambda unit, draw, depth: float(draw == 0 or depth == 0)),
        )
        for draw in range(draws)
        for unit in range(10)
        for depth in (0, 1)
    ]
    table = effects(pd.DataFrame(rows), seed=1)
    full, every, some = table.to_dict("records")
    assert (full["score"], full["n"], full["draws"]) == (1.0, 10, 1)
    assert np.isnan(full["p"])
    assert (every["change"], every["change_low"], every["change_high"]) == (-1.0, -1.0, -1.0)
    assert every["p"] == pytest.approx(2 / 2**10)
    assert every["p_holm"] == pytest.approx(4 / 2**10)
    assert (some["score"], some["change"], some["draws"]) == (0.75, -0.25, 2)
    wider = effects(pd.DataFrame(rows), seed=1, family=10)
    assert wider["p_holm"].max() == pytest.approx(20 / 2**10)
    paired = effects(pd.DataFrame(rows), baseline="some", seed=1).set_index("ablation")
    assert paired.loc["all", "change"] == -0.75
    assert np.isnan(paired.loc["some", "p_holm"])
    with pytest.raises(ValueError, match="has no ablation 'full model'"):
        effects(pd.DataFrame(rows[20:]))


def test_a_selection_is_tested_in_pairs_and_ranked_among_random_sets():
    """Ten haystacks: the selection loses eight, each random set loses as many as its number."""
    rows = [
        {"ablation": name, "draw": draw, "haystack": str(unit), "score": float(unit >= lost)}
        for name, losses in (("full model", [0]), ("chosen", [8]), ("random", range(10)))
        for draw, lost in enumerate(losses)
        for unit in range(10)
    ]
    table = pd.DataFrame(rows)
    effect = effects(table.assign(task="text", heads=3)).set_index("ablation")
    assert effect.loc["chosen", "p"] == pytest.approx(2 / 2**8)
    among = against_random(table, "chosen", "random")
    assert (among.draws, among.as_low, among.mean) == (10, 2, pytest.approx(0.55))
    assert among.p == pytest.approx(2 * (2 + 1) / (10 + 1))


def test_an_ablation_of_some_haystacks_is_compared_on_these():
    rows = [
        {"ablation": name, "draw": 0, "heads": 1, "task": "text", "haystack": f"{unit}"}
        | {"score": float(name == "full model" and unit < 6)}
        for name, units in (("full model", range(9)), ("some", range(2, 7)))
        for unit in units
    ]
    full, some = effects(pd.DataFrame(rows)).to_dict("records")
    assert (full["n"], full["score"]) == (9, pytest.approx(6 / 9))
    assert (some["n"], some["score"], some["change"]) == (5, 0.0, pytest.approx(-4 / 5))
    assert some["p"] == pytest.approx(2 / 2**4)  # the pair without a difference does not count
