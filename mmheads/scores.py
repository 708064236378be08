"""Scores of every head on every example: selection, statistics, tables and files."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.stats
from numpy.typing import NDArray

from mmheads.heads import (
    Head,
    HeadGeometry,
    HeadSet,
    ceil_share,
    head_names,
    overlap,
    same_geometry,
)
from mmheads.paths import write_whole

FORMAT = 2
"""Version of the score files; `HeadScores.load` refuses every other one."""


_SCORES = "scores"


METADATA = ("task", "length", "depth", "seed")
"""Columns that every example carries: task, context length in tokens, depth in [0, 1], seed."""


@dataclass(frozen=True)
class Provenance:
    """Everything needed to know how scores were made.

    Attributes:
        model: Model id.
        revision: Commit or hash of the weights, or of the released file.
        template: Chat template, or its hash.
        null_question: The uninformative question that calibrates the scores.
        versions: Library versions.
        settings: Whatever else the scores depend on.
        source: Where the scores come from: this code, or a file of other authors.
    """

    _: KW_ONLY
    model: str = ""
    revision: str = ""
    template: str = ""
    null_question: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""

    def differences(self, now: "Provenance") -> str:
        """What was made otherwise, "revision 'a', now 'b'"; empty if nothing."""
        held, wanted = dataclasses.asdict(self), dataclasses.asdict(now)
        return "; ".join(
            f"{name} {held[name]!r}, now {wanted[name]!r}"
            for name in wanted
            if held[name] != wanted[name]
        )


@dataclass(frozen=True, eq=False)
class HeadScores:
    """Scores of every head on every example.

    Attributes:
        values: [example, layer, head], float32, finite. Larger is more retrieval.
        geometry: The model's heads; by default those of `values`, one KV group a head.
        eligible: [layer, head] bool, the heads that may be selected; by default those of the
            geometry's global layers.
        metadata: One row an example, with the columns of `METADATA`.
        quantities: Further quantities of the same heads and examples, [example, layer, head] by
            name; `scores["raw"]` gives one of them as scores.
        provenance: How the scores were made.

    Raises:
        ValueError: shapes that disagree, no example, or a value that is not finite.
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
        examples, layers, width = values.shape
        geometry = self.geometry or HeadGeometry(layers, width, width)
        if (geometry.layers, geometry.heads) != (layers, width):
            raise ValueError(
                f"values of {layers} layers x {width} heads, but the model has "
                f"{geometry.layers} x {geometry.heads}"
            )
        quantities = {n: np.array(q, dtype=np.float32) for n, q in self.quantities.items()}
        for name, array in {"scores": values, **quantities}.items():
            if array.shape != values.shape:
                raise ValueError(f"{name} has shape {array.shape}, expected {values.shape}")
            if not np.isfinite(array).all():
                heads = [Head(*where) for where in np.argwhere(~np.isfinite(array).all(axis=0))]
                raise ValueError(f"{name} of {head_names(heads)} are not finite")
            array.flags.writeable = False
        eligible = geometry.eligible if self.eligible is None else np.array(self.eligible, bool)
        if eligible.shape != (layers, width):
            raise ValueError(f"eligible has shape {eligible.shape}, expected {(layers, width)}")
        metadata = self.metadata
        if metadata is None:
            metadata = pd.DataFrame(index=range(examples), columns=list(METADATA))
        missing = [name for name in METADATA if name not in metadata]
        if len(metadata) != examples or missing:
            raise ValueError(
                f"metadata has {len(metadata)} rows for {examples} examples"
                + (f" and lacks the columns {missing}" if missing else "")
            )
        eligible.flags.writeable = False
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "quantities", quantities)
        object.__setattr__(self, "geometry", geometry)
        object.__setattr__(self, "eligible", eligible)
        object.__setattr__(self, "metadata", metadata.reset_index(drop=True))

    def by_unit(self, column: str = "seed") -> NDArray[np.float32]:
        """[unit, example, layer, head]: the values of examples that share a value of `column`.

        The six depths of a needle's haystack share their seed: they are not independent.

        Raises:
            ValueError: Units have unequal numbers of examples.
        """
        number, names = pd.factorize(self.metadata[column])
        counts = np.bincount(number)
        if len(set(counts)) > 1:
            raise ValueError(f"units of {sorted(set(counts))} examples: expected equal numbers")
        order = number.argsort(stable=True)
        return self.values[order].reshape(len(names), -1, *self.values.shape[1:])

    @cached_property
    def mean(self) -> NDArray[np.float64]:
        """[layer, head], mean over examples."""
        mean = np.asarray(self.values.mean(axis=0, dtype=np.float64))
        mean.flags.writeable = False
        return mean

    def outside(self, low: float, high: float) -> tuple[Head, ...]:
        """Heads with a score below `low` or above `high` on some example.

        A calibrated score is a difference of two attention masses, so it lies in [-1, 1].
        """
        wrong = ((self.values < low) | (self.values > high)).any(axis=0)
        return tuple(Head(int(layer), int(head)) for layer, head in np.argwhere(wrong))

    def __getitem__(self, quantity: str) -> "HeadScores":
        """Another quantity of the same heads and examples as scores.

        Raises:
            KeyError: There is no such quantity.
        """
        if quantity not in self.quantities:
            raise KeyError(f"{quantity!r} was not recorded; there are {', '.join(self.quantities)}")
        return dataclasses.replace(self, values=self.quantities[quantity])

    def take(self, rows: NDArray[np.bool_] | NDArray[np.intp]) -> "HeadScores":
        """The scores of some examples: a mask over them, or their indices."""
        return dataclasses.replace(
            self,
            values=self.values[rows],
            metadata=self.metadata.iloc[np.arange(len(self.values))[rows]],
            quantities={name: array[rows] for name, array in self.quantities.items()},
        )

    def where(self, **columns: object) -> "HeadScores":
        """The examples whose metadata have these values: `scores.where(task="text", length=512)`.

        Raises:
            ValueError: There is no such example.
        """
        rows = np.ones(len(self.values), dtype=bool)
        for name, value in columns.items():
            rows &= (self.metadata[name] == value).to_numpy()
        if not rows.any():
            held = {name: sorted(set(self.metadata[name])) for name in columns}
            raise ValueError(f"no example has {columns}; there are {held}")
        return self.take(rows)

    @classmethod
    def concatenate(cls, parts: Sequence["HeadScores"]) -> "HeadScores":
        """The examples of several score sets of one model, made alike.

        Raises:
            ValueError: Their models, versions or settings differ.
        """
        first = parts[0]
        if any(part.provenance != first.provenance for part in parts):
            raise ValueError("scores that were made otherwise cannot be joined")
        return dataclasses.replace(
            first,
            values=np.concatenate([part.values for part in parts]),
            metadata=pd.concat([part.metadata for part in parts], ignore_index=True),
            quantities={
                name: np.concatenate([part.quantities[name] for part in parts])
                for name in first.quantities
            },
        )

    def exclude(self, heads: Iterable[Head]) -> "HeadScores":
        """The same scores with these heads ineligible."""
        chosen = HeadSet(tuple(heads), self.geometry, self.provenance.model)
        return dataclasses.replace(self, eligible=self.eligible & ~chosen.mask)

    def all_eligible(self) -> "HeadScores":
        """The same scores with every head eligible, those of sliding-window layers too."""
        return dataclasses.replace(self, eligible=np.ones_like(self.eligible))

    def top(self, fraction: float = 0.05, *, count: int | None = None) -> HeadSet:
        """The strongest eligible heads by mean score (paper A, Sec. 3).

        Equal scores are taken in the order of layer, then head.

        Args:
            fraction: Share of all heads of the model, eligible or not; `ceil(fraction * all)`
                heads are selected.
            count: Number of heads, in place of `fraction`.

        Raises:
            ValueError: a fraction outside (0, 1], or more heads than are eligible.
        """
        if count is None:
            count = ceil_share(fraction, self.geometry.size)
        eligible = int(self.eligible.sum())
        if not 1 <= count <= eligible:
            raise ValueError(
                f"{count} heads asked for, but {eligible} of the {self.geometry.size} heads are "
                "eligible: ask for at least 1 and at most as many as are eligible"
            )
        strongest = np.where(self.eligible, -self.mean, np.inf).ravel().argsort(stable=True)
        return self._heads(strongest[:count])

    def bottom(self, count: int) -> HeadSet:
        """The weakest eligible heads by mean score, the weakest first.

        Raises:
            ValueError: more heads than are eligible.
        """
        ranked = self.top(count=int(self.eligible.sum()))
        if not 1 <= count <= len(ranked):
            raise ValueError(f"{count} heads asked for, expected 1 to {len(ranked)}")
        return dataclasses.replace(ranked, heads=ranked.heads[: -count - 1 : -1])

    def random(self, count: int, *, draws: int, seed: int) -> list[HeadSet]:
        """Sets of `count` eligible heads, drawn uniformly without replacement."""
        if draws < 1 or not 1 <= count <= self.eligible.sum():
            raise ValueError(
                f"{draws} draws of {count} heads asked for: expected at least 1 draw, and 1 to "
                f"{self.eligible.sum()} heads (those that are eligible)"
            )
        rng = np.random.default_rng(seed)
        pool = np.flatnonzero(self.eligible)
        return [self._heads(rng.choice(pool, count, replace=False)) for _ in range(draws)]

    def _heads(self, flat: NDArray[np.intp]) -> HeadSet:
        heads = tuple(Head(*divmod(int(index), self.geometry.heads)) for index in flat)
        made = self.provenance
        return HeadSet(heads, self.geometry, made.model, revision=made.revision)

    def cumulative_mass(self, *, eligible_only: bool = False) -> NDArray[np.float64]:
        """[head in rank order], share of the positive mean score held by the strongest heads.

        Element i belongs to the i + 1 strongest heads; the last element is 1. Negative mean
        scores count as 0. All heads of the model are on the axis, ineligible ones too: with
        `eligible_only` they count as 0.

        Raises:
            ValueError: no head has a positive mean score.
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
            ValueError: a share outside (0, 1], or no positive mean score.
        """
        if not 0 < share <= 1:
            raise ValueError(f"share of the mass is {share}, expected a number in (0, 1]")
        cumulative = self.cumulative_mass(eligible_only=eligible_only)
        float32_rounding = 1e-6
        count = int(np.searchsorted(cumulative, share - float32_rounding)) + 1
        return count / self.geometry.size

    def by_kv_group(self) -> "HeadScores":
        """Scores of KV groups, [example, layer, group]: the mean over a group's eligible heads.

        A group is eligible if one of its heads is; a group without any takes the mean over all.
        """
        examples, (layers, groups) = (
            len(self.values),
            (self.geometry.layers, self.geometry.kv_groups),
        )
        eligible = self.eligible.reshape(layers, groups, -1)
        weights = np.where(eligible.any(axis=-1, keepdims=True), eligible, True)
        values = self.values.reshape(examples, layers, groups, -1).astype(np.float64)
        return dataclasses.replace(
            self,
            values=(values * weights).sum(axis=-1) / weights.sum(axis=-1),
            geometry=dataclasses.replace(self.geometry, heads=groups),
            eligible=np.asarray(eligible.any(axis=-1)),
            quantities={},
        )

    def table(self) -> pd.DataFrame:
        """One row an example and head: metadata, layer, head, score and every quantity."""
        examples, layers, heads = self.values.shape
        each = layers * heads
        table = self.metadata.loc[self.metadata.index.repeat(each)].reset_index(drop=True)
        table["layer"] = np.tile(np.repeat(np.arange(layers), heads), examples)
        table["head"] = np.tile(np.arange(heads), examples * layers)
        table["eligible"] = np.tile(self.eligible.ravel(), examples)
        table["score"] = self.values.ravel()
        for name, array in self.quantities.items():
            table[name] = array.ravel()
        return table

    def released_format(self) -> dict[str, Any]:
        """Mean scores as paper A's authors release them: `head_score_list`, best first."""
        order = np.argsort(-self.mean, axis=None, kind="stable")
        tokens = self.metadata.get("tokens", self.metadata["length"]).tolist()
        return {
            "args": {
                "model_name_or_path": self.provenance.model,
                "seed": self.provenance.settings.get("shuffle_seed", 0),
                **self.provenance.settings,
            },
            "head_score_list": [
                [f"{layer}-{head}", float(self.mean[layer, head])]
                for layer, head in (divmod(int(i), self.geometry.heads) for i in order)
            ],
            "metrics": {"input_len": tokens},
            "averaged_metrics": {"input_len": float(np.mean(tokens))},
        }

    def save(self, path: str | Path) -> None:
        """Write a parquet file: a row an example, with its metadata and its scores."""
        about = {
            "format": FORMAT,
            "geometry": dataclasses.asdict(self.geometry),
            "eligible": self.eligible.astype(int).tolist(),
            "quantities": list(self.quantities),
            "provenance": dataclasses.asdict(self.provenance),
        }
        table = pa.Table.from_pandas(self.metadata, preserve_index=False)
        for name, array in {_SCORES: self.values, **self.quantities}.items():
            flat = pa.array(array.ravel())
            table = table.append_column(
                name, pa.FixedSizeListArray.from_arrays(flat, self.geometry.size)
            )
        table = table.replace_schema_metadata({"mmheads": json.dumps(about)})
        with write_whole(Path(path)) as temporary:
            pq.write_table(table, temporary)

    @classmethod
    def load(cls, path: str | Path, *, model: str | None = None) -> "HeadScores":
        """Read what `save` wrote.

        Raises:
            ValueError: not a score file of this version, or one of another model than `model`.
        """
        try:
            table = pq.read_table(path)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path} is no parquet file of head scores: {error}") from error
        about: dict[str, Any] = json.loads((table.schema.metadata or {}).get(b"mmheads", b"{}"))
        if about.get("format") != FORMAT:
            raise ValueError(
                f"{path} has score format {about.get('format')}, this version reads {FORMAT}: "
                "score the heads again"
            )
        provenance = Provenance(**about["provenance"])
        if model is not None and provenance.model != model:
            raise ValueError(f"{path} holds scores of {provenance.model!r}, not of {model!r}")
        heads = about["geometry"]
        if heads["global_layers"] is not None:
            heads["global_layers"] = tuple(heads["global_layers"])
        geometry = HeadGeometry(**heads)
        shape = (len(table), geometry.layers, geometry.heads)
        arrays = {
            name: table.column(name).combine_chunks().flatten().to_numpy().reshape(shape)
            for name in (_SCORES, *about["quantities"])
        }
        return cls(
            arrays.pop(_SCORES),
            geometry=geometry,
            eligible=np.array(about["eligible"], dtype=bool),
            metadata=table.drop_columns([_SCORES, *arrays]).to_pandas(),
            quantities=arrays,
            provenance=provenance,
        )


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
        ValueError: other layers, heads or eligible heads; or scores that are all equal.
    """
    same_geometry(a.geometry, b.geometry)
    if not np.array_equal(a.eligible, b.eligible):
        raise ValueError("the two scorings do not have the same eligible heads")
    first, second = a.mean[a.eligible], b.mean[b.eligible]
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        raise ValueError("rank correlation is undefined: all eligible heads have the same score")
    rho = float(scipy.stats.spearmanr(first, second).statistic)
    return Agreement(rho, overlap(a.top(fraction), b.top(fraction)))
