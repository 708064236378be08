"""Scores of every head on every example: selection and statistics."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.stats
from numpy.typing import NDArray

from mmheads import score_files
from mmheads.heads import (
    Head,
    HeadGeometry,
    HeadSet,
    Origin,
    format_heads,
    head_count,
    overlap,
    same_geometry,
)
from mmheads.provenance import Provenance as Provenance

METADATA = ("task", "length", "depth", "haystack")
"""Columns of every example: task, nominal context length in tokens (0 outside grids of needles),
depth in [0, 1], and what identifies its haystack."""


@dataclass(frozen=True, eq=False)
class HeadScores:
    """Scores of every head on every example.

    Attributes:
        values: [example, layer, head], float32, finite. Larger is more retrieval.
        geometry: The model's heads; by default those of `values`, each with its own KV group.
        eligible: [layer, head] bool, the heads that may be selected; by default those of the
            geometry's global layers.
        metadata: One row per example, with the columns of `METADATA`.
        quantities: Further quantities of the same heads and examples, [example, layer, head] by
            name; `scores["raw"]` gives one of them as scores.
        provenance: How the scores were computed.

    Raises:
        ValueError: The shapes disagree, there is no example, or a value is not finite.
    """

    values: NDArray[np.floating[Any]]
    _: KW_ONLY
    geometry: HeadGeometry = None  # type: ignore[assignment]
    eligible: NDArray[np.bool_] = None  # type: ignore[assignment]
    metadata: pd.DataFrame = None  # type: ignore[assignment]
    quantities: Mapping[str, NDArray[np.floating[Any]]] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        values = np.array(self.values, dtype=np.float32)
        if values.ndim != 3 or not values.size:
            raise ValueError(f"values have shape {values.shape}, expected [example, layer, head]")
        layers, heads = values.shape[1:]
        geometry = _checked_geometry(self.geometry, layers, heads)
        eligible = geometry.eligible if self.eligible is None else np.array(self.eligible, bool)
        if eligible.shape != (layers, heads):
            raise ValueError(f"eligible has shape {eligible.shape}, expected {(layers, heads)}")
        eligible.flags.writeable = False
        quantities = {n: np.array(q, dtype=np.float32) for n, q in self.quantities.items()}
        for name, array in {"scores": values, **quantities}.items():
            _check_array(name, array, values.shape)
            array.flags.writeable = False
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "quantities", quantities)
        object.__setattr__(self, "geometry", geometry)
        object.__setattr__(self, "eligible", eligible)
        object.__setattr__(self, "metadata", _checked_metadata(self.metadata, len(values)))

    def by_haystack(self, column: str = "haystack") -> NDArray[np.float32]:
        """[haystack, example, layer, head]: the values of examples that share a value of `column`.

        Examples that differ only in the depth of their needle share a haystack: they are not
        independent, and haystacks are what is resampled.

        Raises:
            ValueError: Haystacks have unequal numbers of examples.
        """
        number, names = pd.factorize(self.metadata[column])
        counts = np.bincount(number)
        if len(set(counts)) > 1:
            sizes = sorted(set(counts.tolist()))
            raise ValueError(f"values of {column} have {sizes} examples: expected equal numbers")
        order = number.argsort(stable=True)
        return self.values[order].reshape(len(names), -1, *self.values.shape[1:])

    @cached_property
    def mean(self) -> NDArray[np.float64]:
        """[layer, head], mean over examples."""
        mean = np.asarray(self.values.mean(axis=0, dtype=np.float64))
        mean.flags.writeable = False
        return mean

    def out_of_range(self, low: float, high: float) -> tuple[Head, ...]:
        """Heads with a score below `low` or above `high` on some example.

        A calibrated score is a difference of two attention masses, so it lies in [-1, 1].
        """
        beyond = ((self.values < low) | (self.values > high)).any(axis=0)
        return tuple(Head(int(layer), int(head)) for layer, head in np.argwhere(beyond))

    def __getitem__(self, quantity: str) -> HeadScores:
        """Another quantity of the same heads and examples as scores.

        Raises:
            KeyError: There is no such quantity.
        """
        if quantity not in self.quantities:
            raise KeyError(f"{quantity!r} was not recorded; there are {', '.join(self.quantities)}")
        return dataclasses.replace(self, values=self.quantities[quantity])

    def take(self, rows: NDArray[np.bool_] | NDArray[np.intp]) -> HeadScores:
        """The scores of some examples: a mask over them, or their indices."""
        return dataclasses.replace(
            self,
            values=self.values[rows],
            metadata=self.metadata.iloc[np.arange(len(self.values))[rows]],
            quantities={name: array[rows] for name, array in self.quantities.items()},
        )

    def select(self, **columns: object) -> HeadScores:
        """The examples whose metadata have these values: `scores.select(task="text", length=512)`.

        Raises:
            ValueError: There is no such example or column.
        """
        if unknown := [name for name in columns if name not in self.metadata]:
            raise ValueError(f"metadata lack {unknown}; there are {list(self.metadata)}")
        rows = np.ones(len(self.values), dtype=bool)
        for name, value in columns.items():
            rows &= (self.metadata[name] == value).to_numpy()
        if not rows.any():
            known = {name: self.metadata[name].unique().tolist() for name in columns}
            raise ValueError(f"no example has {columns}; there are {known}")
        return self.take(rows)

    def exclude(self, heads: Iterable[Head]) -> HeadScores:
        """The same scores with these heads ineligible."""
        chosen = HeadSet(tuple(heads), self.geometry)
        return dataclasses.replace(self, eligible=self.eligible & ~chosen.mask)

    def all_eligible(self) -> HeadScores:
        """The same scores with every head eligible, those of sliding-window layers too."""
        return dataclasses.replace(self, eligible=self.geometry.every)

    def top(self, fraction: float = 0.05, *, count: int | None = None) -> HeadSet:
        """The strongest eligible heads by mean score (paper A, Sec. 3).

        Equal scores are taken in the order of layer, then head.

        Args:
            fraction: Share of all heads of the model, eligible or not; `ceil(fraction * all)`
                heads are selected.
            count: Number of heads, in place of `fraction`.

        Raises:
            ValueError: The fraction lies outside (0, 1], or there are fewer eligible heads.
        """
        rule = f"top {count} by mean score"
        if count is None:
            count = head_count(fraction, self.geometry.size)
            rule = f"top {100 * fraction:g}% by mean score"
        eligible = int(self.eligible.sum())
        if not 1 <= count <= eligible:
            raise ValueError(
                f"{count} heads asked for, but {eligible} of the {self.geometry.size} heads are "
                "eligible: ask for at least 1 and at most as many as are eligible"
            )
        strongest = np.where(self.eligible, -self.mean, np.inf).ravel().argsort(stable=True)
        return self._heads(strongest[:count], rule)

    def bottom(self, count: int) -> HeadSet:
        """The weakest eligible heads by mean score, the weakest first.

        Raises:
            ValueError: There are fewer eligible heads.
        """
        ranked = self.top(count=int(self.eligible.sum()))
        if not 1 <= count <= len(ranked):
            raise ValueError(f"{count} heads asked for, expected 1 to {len(ranked)}")
        origin = dataclasses.replace(ranked.origin, rule=f"bottom {count} by mean score")
        return dataclasses.replace(ranked, heads=ranked.heads[: -count - 1 : -1], origin=origin)

    def random(self, count: int, *, draws: int, seed: int) -> list[HeadSet]:
        """Sets of `count` eligible heads, drawn uniformly without replacement."""
        if draws < 1 or not 1 <= count <= self.eligible.sum():
            raise ValueError(
                f"{draws} draws of {count} heads asked for: expected at least 1 draw, and 1 to "
                f"{self.eligible.sum()} heads (those that are eligible)"
            )
        rng = np.random.default_rng(seed)
        pool = np.flatnonzero(self.eligible)
        return [self._heads(rng.choice(pool, count, replace=False), "random") for _ in range(draws)]

    def _heads(self, flat: NDArray[np.intp], rule: str) -> HeadSet:
        heads = tuple(Head(*divmod(int(index), self.geometry.heads)) for index in flat)
        made = self.provenance
        tasks, lengths = (
            " + ".join(map(str, self.metadata[column].unique())) for column in ("task", "length")
        )
        origin = Origin(made.revision, tasks, lengths, rule, made.source)
        scores = {head: float(self.mean[head]) for head in heads}
        return HeadSet(heads, self.geometry, made.model, origin, scores)

    def cumulative_mass(self, *, eligible_only: bool = False) -> NDArray[np.float64]:
        """[head in rank order], share of the positive mean score held by the strongest heads.

        Element i belongs to the i + 1 strongest heads; the last element is 1. Negative mean
        scores count as 0. All heads of the model are on the axis, ineligible ones too: with
        `eligible_only` they count as 0.

        Raises:
            ValueError: No head has a positive mean score.
        """
        mean = np.where(self.eligible, self.mean, 0.0) if eligible_only else self.mean
        positive = np.sort(np.clip(mean, 0.0, None).ravel())[::-1]
        if positive[0] == 0.0:
            raise ValueError("no head has a positive mean score, so there is no mass to share out")
        cumulative = positive.cumsum()
        return np.asarray(cumulative / cumulative[-1])

    def sparsity(self, share: float = 0.5, *, eligible_only: bool = False) -> float:
        """Paper A's rho: the smallest fraction of all heads that hold `share` of the mass.

        Paper A's Fig. 3 counts all heads, those of sliding-window layers too; `eligible_only`
        leaves their scores out, with all heads still in the denominator.

        Raises:
            ValueError: The share lies outside (0, 1], or no mean score is positive.
        """
        if not 0 < share <= 1:
            raise ValueError(f"share of the mass is {share}, expected a number in (0, 1]")
        cumulative = self.cumulative_mass(eligible_only=eligible_only)
        float32_rounding = 1e-6
        count = int(np.searchsorted(cumulative, share - float32_rounding)) + 1
        return count / self.geometry.size

    def by_kv_group(self) -> HeadScores:
        """Scores of KV groups, [example, layer, group]: the mean over a group's eligible heads.

        A group is eligible if one of its heads is; a group without an eligible head takes the mean
        over all its heads.
        """
        return _kv_group_scores(self)

    def to_frame(self) -> pd.DataFrame:
        """One row per example and head: metadata, layer, head, score and every quantity."""
        return score_files.to_frame(self)

    def to_released_json(self) -> dict[str, Any]:
        """Mean scores as paper A's authors release them: `head_score_list`, the best first."""
        return score_files.to_released_json(self)

    def save(self, path: str | Path) -> None:
        """Write a parquet file: one row per example, with its metadata and its scores."""
        score_files.write(path, self)

    @classmethod
    def load(cls, path: str | Path, *, model: str | None = None) -> HeadScores:
        """Read one file that `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is not a file of scores of this version, it is damaged, or it holds
                scores of another model than `model`.
        """
        fields = score_files.read(path, model)
        try:
            return cls(fields.pop("values"), **fields)
        except ValueError as error:
            raise ValueError(f"{path} holds scores that do not fit together: {error}") from error


def _checked_geometry(geometry: HeadGeometry | None, layers: int, heads: int) -> HeadGeometry:
    geometry = geometry or HeadGeometry(layers, heads, heads)
    if (geometry.layers, geometry.heads) != (layers, heads):
        raise ValueError(
            f"values of {layers} layers x {heads} heads, but the model has "
            f"{geometry.layers} x {geometry.heads}"
        )
    return geometry


def _check_array(name: str, array: NDArray[np.float32], shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
    if not np.isfinite(array).all():
        heads = format_heads(np.argwhere(~np.isfinite(array).all(axis=0)))
        raise ValueError(f"{name} of {heads} are not finite")


def _checked_metadata(metadata: pd.DataFrame | None, examples: int) -> pd.DataFrame:
    if metadata is None:
        metadata = pd.DataFrame(index=range(examples), columns=list(METADATA))
    missing = [name for name in METADATA if name not in metadata]
    if len(metadata) != examples or missing:
        raise ValueError(
            f"metadata has {len(metadata)} rows for {examples} examples"
            + (f" and lacks the columns {missing}" if missing else "")
        )
    return metadata.reset_index(drop=True)


def _kv_group_scores(scores: HeadScores) -> HeadScores:
    layers, groups = scores.geometry.layers, scores.geometry.kv_groups
    eligible = scores.eligible.reshape(layers, groups, -1)
    weights = np.where(eligible.any(axis=-1, keepdims=True), eligible, True)
    values = scores.values.reshape(-1, layers, groups, weights.shape[-1]).astype(np.float64)
    return dataclasses.replace(
        scores,
        values=(values * weights).sum(axis=-1) / weights.sum(axis=-1),
        geometry=dataclasses.replace(scores.geometry, heads=groups),
        eligible=np.asarray(eligible.any(axis=-1)),
        quantities={},
    )


def concatenate(parts: Sequence[HeadScores]) -> HeadScores:
    """The examples of several sets of scores that were computed alike.

    Quantities that not all of them have are left out.

    Raises:
        ValueError: Their models, versions or settings differ; the message says which.
    """
    first = parts[0]
    for part in parts:
        different = part.provenance.differences(first.provenance)
        if different or part.geometry != first.geometry:
            raise ValueError(
                "scores that were computed differently cannot be joined: "
                + (different or f"{part.geometry}, now {first.geometry}")
            )
    return dataclasses.replace(
        first,
        values=np.concatenate([part.values for part in parts]),
        metadata=pd.concat([part.metadata for part in parts], ignore_index=True),
        quantities={
            name: np.concatenate([part.quantities[name] for part in parts])
            for name in first.quantities
            if all(name in part.quantities for part in parts)
        },
    )


def union_of_top(scores: HeadScores, fraction: float = 0.05) -> HeadSet:
    """The union of each task's strongest heads at its longest nominal context length (paper A).

    Examples without a nominal length, such as a user's own, all count.

    Args:
        scores: Scores on one task or several, from the detection split.
        fraction: Share of all heads that each task selects.
    """
    numbers, tasks = pd.factorize(scores.metadata["task"], use_na_sentinel=False)
    lengths = pd.to_numeric(scores.metadata["length"]).fillna(0).to_numpy()
    sets = []
    for number in range(len(tasks)):
        of_task = numbers == number
        longest = lengths[of_task].max()
        sets.append(scores.take(of_task & np.isin(lengths, (longest, 0))).top(fraction))
    return functools.reduce(operator.or_, sets)


class Agreement(NamedTuple):
    """How far two scorings of the same heads agree.

    Attributes:
        rho: Spearman rank correlation over eligible heads, ties averaged.
        overlap: Overlap of the two top sets; rho alone hides changes in them.
    """

    rho: float
    overlap: float


def spearman(a: HeadScores, b: HeadScores, *, fraction: float = 0.05) -> Agreement:
    """Rank correlation of two scorings, with the overlap of their top sets beside it.

    Raises:
        ValueError: The layers, heads or eligible heads differ, or all scores are equal.
    """
    same_geometry(a.geometry, b.geometry)
    if not np.array_equal(a.eligible, b.eligible):
        raise ValueError("the two scorings do not have the same eligible heads")
    first, second = a.mean[a.eligible], b.mean[b.eligible]
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        raise ValueError("rank correlation is undefined: all eligible heads have the same score")
    rho = float(scipy.stats.spearmanr(first, second).statistic)
    return Agreement(rho, overlap(a.top(fraction), b.top(fraction)))
