"""Intervals and tests on scores: bootstrap, paired differences, Holm correction.

scipy does the work; this module fixes the choices (percentile intervals, two-sided tests, seeds
that are always given) so that every figure makes the same ones.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike, NDArray


class Interval(NamedTuple):
    """An estimate with the ends of its bootstrap interval, from `n` units."""

    value: float
    low: float
    high: float
    n: int


class PairedDifference(NamedTuple):
    """Mean of `a - b` over `n` pairs, its bootstrap interval, and a two-sided p-value."""

    value: float
    low: float
    high: float
    p: float
    n: int


def bootstrap_interval(
    values: ArrayLike,
    statistic: Callable[[NDArray[Any]], float] = np.mean,
    *,
    seed: int,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> Interval:
    """Percentile bootstrap interval of `statistic(values)`.

    Args:
        values: [unit, ...]; units (examples, models) are drawn with replacement.
        statistic: Takes an array like `values` and returns one number.
        seed: Seed of the resampling.
        confidence: Coverage of the interval.
        resamples: Number of resamples.

    Raises:
        ValueError: fewer than two units, or values that are not finite.
    """
    units = _finite(values)
    if statistic is np.mean:
        found = _interval([units], _means, seed, confidence, resamples)
    else:
        found = _interval(
            [units], lambda drawn: map(statistic, *drawn), seed, confidence, resamples
        )
    return Interval(float(statistic(units)), *found, len(units))


def stratified_interval(
    strata: Sequence[NDArray[Any]],
    statistic: Callable[[Sequence[NDArray[Any]]], float],
    *,
    seed: int,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> Interval:
    """Percentile bootstrap interval of `statistic(strata)`, units drawn within each stratum.

    Args:
        strata: One array [unit, ...] per condition.
        statistic: Takes such a list and returns one number.
        seed: Seed of the resampling.
        confidence: Coverage of the interval.
        resamples: Number of resamples.

    Raises:
        ValueError: a stratum of fewer than two units, or with values that are not finite.
    """
    units = [_finite(values) for values in strata]
    found = _interval(
        units, lambda drawn: map(statistic, zip(*drawn, strict=True)), seed, confidence, resamples
    )
    return Interval(float(statistic(units)), *found, sum(map(len, units)))


def _interval(
    strata: Sequence[NDArray[Any]],
    statistic: Callable[[Sequence[NDArray[Any]]], Iterable[float]],
    seed: int,
    confidence: float,
    resamples: int,
) -> tuple[float, float]:
    """Ends of the interval; `statistic` takes strata [resample, unit, ...] of a few resamples."""

    def values(*rows: NDArray[np.int_], axis: int) -> NDArray[np.float64]:
        blocks = ([row[i : i + 8] for row in rows] for i in range(0, resamples, 8))
        drawn = ([v[row] for v, row in zip(strata, block, strict=True)] for block in blocks)
        return np.array(list(chain.from_iterable(map(statistic, drawn))))

    ends = scipy.stats.bootstrap(
        [np.arange(len(each)) for each in strata],
        values,
        vectorized=True,
        method="percentile",
        confidence_level=confidence,
        n_resamples=resamples,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(ends.low), float(ends.high)


def _means(drawn: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
    """[resample] means over units and all that a unit holds."""
    means: NDArray[np.float64] = drawn[0].reshape(len(drawn[0]), -1).mean(axis=1)
    return means


def paired_difference(
    a: ArrayLike, b: ArrayLike, *, seed: int, confidence: float = 0.95, resamples: int = 10_000
) -> PairedDifference:
    """Mean difference of paired measurements, [unit] each.

    The p-value is that of a two-sided sign-flip permutation test: exact where the 2^n sign
    patterns are no more than `resamples`.

    Raises:
        ValueError: unequal lengths, fewer than two pairs, or values that are not finite.
    """
    first, second = _finite(a), _finite(b)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"pairs expected, got shapes {first.shape} and {second.shape}")
    difference = first - second
    interval = bootstrap_interval(difference, seed=seed, confidence=confidence)
    p = scipy.stats.permutation_test(
        (difference,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        rng=np.random.default_rng(seed),
    ).pvalue
    return PairedDifference(*interval[:3], float(p), interval.n)


def exact_sign_test(a: ArrayLike, b: ArrayLike) -> float:
    """Two-sided exact p-value of pairs, [unit] each: whether one side is the larger more often.

    Pairs of equal values do not count. Of paired right and wrong answers it is McNemar's exact
    test.

    Raises:
        ValueError: fewer than two pairs, or values that are not finite.
    """
    difference = _finite(a) - _finite(b)
    larger, other = int((difference > 0).sum()), int((difference < 0).sum())
    return float(scipy.stats.binomtest(larger, larger + other).pvalue) if larger + other else 1.0


def draws_p_value(observed: float, draws: ArrayLike) -> float:
    """Two-sided Monte-Carlo p-value of a value among random draws of the same statistic.

    Twice the smaller tail, the observed value counted among the draws, at most 1.
    """
    reference = _finite(draws)
    tails = ((reference <= observed).sum(), (reference >= observed).sum())
    return float(min(1.0, 2 * (min(tails) + 1) / (len(reference) + 1)))


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Holm's step-down adjustment of p-values, [comparison], for one family of comparisons.

    Raises:
        ValueError: a p-value outside [0, 1] or not a number.
    """
    p = np.asarray(p_values, dtype=float)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p-values in [0, 1] expected, got {p.tolist()}")
    order = p.argsort(stable=True)
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def _finite(values: ArrayLike) -> NDArray[np.float64]:
    units = np.asarray(values, dtype=float)
    if units.ndim < 1 or len(units) < 2 or not np.isfinite(units).all():
        raise ValueError(f"at least two finite values expected, got {units.tolist()}")
    return units
