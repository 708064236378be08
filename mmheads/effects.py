"""What an ablation does to answers, with paired tests and intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from mmheads.answers import WHOLE
from mmheads.statistics import bootstrap_interval, holm, paired_difference


def effects(
    table: pd.DataFrame,
    by: Sequence[str] = ("task",),
    *,
    against: str = WHOLE,
    seed: int = 0,
    family: int = 0,
) -> pd.DataFrame:
    """What each masking does to the score, in pairs with the whole model -> a row a comparison.

    The unit is a haystack: examples that differ in the depth of their needle alone share it, and
    draws are averaged, so that what is said of random sets is said of these draws. Intervals are
    95% bootstrap intervals over units; p is that of a sign-flip test, adjusted by Holm over the
    comparisons of the table.

    Args:
        table: What `answer` gave.
        by: Columns to compare within.
        against: The masking to compare with.
        seed: Seed of bootstrap and test.
        family: Number of comparisons for Holm's adjustment, if this table is a part of a figure;
            the others then count as if their p were 1.

    Raises:
        ValueError: Fewer than two units in a cell, or no row of the masking to compare with.
    """
    if against not in set(table["masking"]):
        raise ValueError(f"the table has no masking {against!r} to compare with")
    rows = []
    for cell, group in table.groupby(list(by), sort=False):
        units = group.groupby(["masking", "seed"], sort=False)["score"].mean()
        reference = units[against]
        for name in group["masking"].unique():
            values = units[name].loc[reference.index].to_numpy()
            value = bootstrap_interval(values, seed=seed)
            part = group[group["masking"] == name]
            row = dict(zip(by, cell, strict=True)) | {
                "masking": name,
                "heads": int(part["heads"].max()),
                "draws": part["draw"].nunique(),
                "score": value.value,
                "low": value.low,
                "high": value.high,
                "n": value.n,
            }
            if name != against:
                change = paired_difference(values, reference.to_numpy(), seed=seed)
                row |= {
                    "change": change.value,
                    "change_low": change.low,
                    "change_high": change.high,
                    "p": change.p,
                }
            rows.append(row)
    result = pd.DataFrame(rows)
    compared = result["masking"] != against
    if compared.any():
        p = result.loc[compared, "p"].to_numpy()
        padded = np.concatenate([p, np.ones(max(0, family - len(p)))])
        result.loc[compared, "p_holm"] = holm(padded)[: len(p)]
    return result
