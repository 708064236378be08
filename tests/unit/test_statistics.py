"""Intervals and tests, against hand-worked cases and known distributions."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from mmheads.statistics import (
    bootstrap_interval,
    draws_p_value,
    exact_sign_test,
    holm,
    paired_difference,
    stratified_interval,
)


def test_bootstrap_of_two_units_spans_both():
    interval = bootstrap_interval([0.0, 1.0], seed=0)
    assert interval == (0.5, 0.0, 1.0, 2)


def test_bootstrap_interval_of_a_mean_is_near_the_normal_one():
    values = np.random.default_rng(0).normal(size=400)
    interval = bootstrap_interval(values, seed=1, resamples=4000)
    half = scipy.stats.norm.ppf(0.975) * values.std() / np.sqrt(400)
    assert interval.value == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.01)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.01)


def test_bootstrap_draws_whole_units_and_is_seeded():
    units = np.stack([np.arange(20.0), -np.arange(20.0)], axis=1)
    interval = bootstrap_interval(units, lambda drawn: float(drawn.sum()), seed=0)
    assert interval == (0.0, 0.0, 0.0, 20)  # a unit's two values cancel only if drawn together
    assert bootstrap_interval(range(9), seed=4) == bootstrap_interval(range(9), seed=4)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, float("nan")]])
def test_too_few_or_missing_values_are_refused(values):
    with pytest.raises(ValueError, match="at least two finite values"):
        bootstrap_interval(values, seed=0)


def test_paired_difference_is_the_exact_sign_flip_test():
    a, b = np.array([3.0, 5.0, 2.0, 4.0, 9.0]), np.array([1.0, 4.0, 3.0, 1.0, 2.0])
    difference = a - b
    flips = np.array(list(itertools.product([1, -1], repeat=5)))
    means = (flips * difference).mean(axis=1)
    expected = np.mean(np.abs(means) >= difference.mean() - 1e-12)
    result = paired_difference(a, b, seed=0)
    assert result.value == pytest.approx(2.4)
    assert result.p == pytest.approx(expected)
    assert result.low <= result.value <= result.high
    assert result.n == 5


def test_unpaired_values_are_refused():
    with pytest.raises(ValueError, match="pairs expected"):
        paired_difference([1.0, 2.0], [1.0, 2.0, 3.0], seed=0)


def test_p_value_among_draws_counts_the_observed_value():
    draws = np.arange(99)
    assert draws_p_value(-1, draws) == pytest.approx(2 / 100)
    assert draws_p_value(200, draws) == pytest.approx(2 / 100)
    assert draws_p_value(4, draws) == pytest.approx(2 * 6 / 100)
    assert draws_p_value(49, draws) == 1.0


def test_holm_of_a_worked_case():
    # sorted 0.01 0.02 0.03 0.04: times 4 3 2 1 = 0.04 0.06 0.06 0.04, made monotone
    np.testing.assert_allclose(holm([0.02, 0.04, 0.01, 0.03]), [0.06, 0.06, 0.04, 0.06])
    np.testing.assert_allclose(holm([0.9, 0.8]), [1.0, 1.0])


def test_holm_refuses_what_is_no_p_value():
    for values in ([0.5, 1.2], [float("nan")], [[0.1]]):
        with pytest.raises(ValueError, match="p-values"):
            holm(values)


def test_strata_are_drawn_apart():
    low, high = np.zeros(5), np.ones(3)
    interval = stratified_interval(
        [low, high], lambda strata: float(strata[1].mean() - strata[0].mean()), seed=0
    )
    assert interval == (1.0, 1.0, 1.0, 8)
    with pytest.raises(ValueError, match="at least two"):
        stratified_interval([low, [1.0]], lambda strata: 0.0, seed=0)


def test_the_exact_sign_test_counts_which_side_is_larger_more_often():
    right, wrong = np.array([1, 1, 1, 1, 1, 0, 1, 0]), np.array([0, 0, 0, 0, 0, 1, 1, 0])
    ways = math.comb(6, 0) + math.comb(6, 1)  # one of six pairs, or none, to either side
    assert exact_sign_test(right, wrong) == pytest.approx(2 * ways / 2**6)
    assert exact_sign_test(wrong, right) == exact_sign_test(right, wrong)
    assert exact_sign_test(right, right) == 1.0
    with pytest.raises(ValueError, match="at least two finite values"):
        exact_sign_test([1], [0])
