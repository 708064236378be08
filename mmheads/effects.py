"""What an ablation does to answers, with paired tests and intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from mmheads.answers import FULL_MODEL
from mmheads.statistics import bootstrap_interval, draws_p_value, exact_sign_test, holm


def effects(
    table: pd.DataFrame,
    by: Sequence[str] = ("task",),
    *,
    baseline: str = FULL_MODEL,
    seed: int = 0,
    family: int = 0,
) -> pd.DataFrame:
    """What each ablation does to the score, paired with the full model: one row per comparison.

    The unit is a haystack: examples that differ only in the depth of their needle share it, and
    draws are averaged, so that what is said of random sets is said of these draws. An ablation
    that was not made on all haystacks is compared on its own. Intervals are 95% bootstrap
    intervals over haystacks; p is that of an exact sign test (of right and wrong answers,
    McNemar's), adjusted by Holm over the comparisons of the table.

    Args:
        table: What `answer` returned.
        by: Columns to compare within.
        baseline: The ablation to compare with.
        seed: Seed of bootstrap and test.
        family: Number of comparisons for Holm's adjustment, if this table is a part of a figure;
            the others then count as if their p were 1.

    Raises:
        ValueError: There are fewer than two haystacks in a cell, or no row of the baseline.
    """
    if baseline not in set(table["ablation"]):
        names = table["ablation"].unique().tolist()
        raise ValueError(f"the table has no ablation {baseline!r}; it has {names}")
    rows = []
    for cell, group in table.groupby(list(by), sort=False):
        units = group.groupby(["ablation", "haystack"], sort=False)["score"].mean()
        reference = units[baseline]
        for name in group["ablation"].unique():
            value = bootstrap_interval(units[name], seed=seed)
            part = group[group["ablation"] == name]
            row = dict(zip(by, cell, strict=True)) | {
                "ablation": name,
                "heads": int(part["heads"].max()),
                "draws": part["draw"].nunique(),
                "score": value.value,
                "low": value.low,
                "high": value.high,
                "n": value.n,
            }
            if name != baseline:
                pairs = pd.concat([units[name], reference], axis=1, join="inner").to_numpy().T
                change = bootstrap_interval(pairs[0] - pairs[1], seed=seed)
                row |= {
                    "change": change.value,
                    "change_low": change.low,
                    "change_high": change.high,
                    "p": exact_sign_test(*pairs),
                }
            rows.append(row)
    result = pd.DataFrame(rows)
    compared = result["ablation"] != baseline
    if compared.any():
        p = result.loc[compared, "p"].to_numpy()
        padded = np.concatenate([p, np.ones(max(0, family - len(p)))])
        result.loc[compared, "p_holm"] = holm(padded)[: len(p)]
    return result


class AmongRandom(NamedTuple):
    """Where the mean score of an ablation lies among those of random sets.

    Attributes:
        draws: Number of random sets.
        mean: Mean of their mean scores.
        as_low: How many of them have the ablation's mean score or a lower one.
        p: Two-sided Monte-Carlo p-value: exact if the sets are drawn as the selected one would be
            if it were random, that is, from all eligible heads.
    """

    draws: int
    mean: float
    as_low: int
    p: float


def against_random(table: pd.DataFrame, selected: str, random: str) -> AmongRandom:
    """Where an ablation of selected heads lies among ablations of random heads.

    Args:
        table: What `answer` returned.
        selected: Name of the ablation of the selected heads.
        random: Name of the ablation whose draws are the random sets.

    Raises:
        ValueError: There are fewer than two draws.
    """
    scores = table.groupby(["ablation", "draw"])["score"].mean()
    observed, draws = float(scores[selected].mean()), scores[random].to_numpy()
    p = draws_p_value(observed, draws)
    return AmongRandom(len(draws), float(draws.mean()), int((draws <= observed).sum()), p)
