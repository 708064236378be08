"""Head scores and head sets: which heads fetch the evidence, how few they are, how stable.

Arrays are [example, layer, head]. A head is (layer, head), 0-based, printed L8H10.
"""

import dataclasses
import json
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
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

from mmheads.paths import write_whole

FORMAT = 2
"""Version of the score files; `HeadScores.load` refuses every other one."""

_SCORES = "scores"

METADATA = ("task", "length", "depth", "seed")
"""Columns that every example carries: task, context length in tokens, depth in [0, 1], seed."""


class Head(NamedTuple):
    """One attention head, 0-based."""

    layer: int
    head: int

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}"


def head_names(heads: Iterable[Iterable[int]]) -> str:
    """Heads as a reader sees them, "L3H2, L8H10"."""
    return ", ".join(str(Head(*map(int, head))) for head in heads)


@dataclass(frozen=True)
class HeadGeometry:
    """The attention heads of a language model.

    Attributes:
        layers: Number of layers.
        heads: Number of query heads a layer.
        kv_groups: Number of key-value heads a layer; `heads / kv_groups` query heads share one.
        global_layers: The layers that attend to the whole context; None if all do.
    """

    layers: int
    heads: int
    kv_groups: int
    global_layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if min(self.layers, self.heads, self.kv_groups) < 1 or self.heads % self.kv_groups:
            raise ValueError(
                f"{self.layers} layers of {self.heads} heads in {self.kv_groups} KV groups: "
                "expected positive numbers, and as many heads in each KV group of a layer"
            )
        outside = [layer for layer in self.global_layers or () if not 0 <= layer < self.layers]
        if outside:
            raise ValueError(f"global layers {outside} are not among the {self.layers} layers")

    @property
    def size(self) -> int:
        """Number of heads of the whole model."""
        return self.layers * self.heads

    @property
    def eligible(self) -> NDArray[np.bool_]:
        """[layer, head], True in layers that attend to the whole context."""
        mask = np.zeros((self.layers, self.heads), dtype=bool)
        mask[slice(None) if self.global_layers is None else list(self.global_layers)] = True
        return mask

    def kv_group(self, head: Head) -> tuple[int, int]:
        """The (layer, KV group) whose keys and values the head reads."""
        return head.layer, head.head // (self.heads // self.kv_groups)


@dataclass(frozen=True)
class HeadSet:
    """Heads of one model, in the order they were given (the strongest first, if selected).

    Set operations keep the order of the left operand.

    Attributes:
        heads: The heads, each once.
        geometry: The model's heads.
        model: Model id; empty if unknown.
    """

    heads: tuple[Head, ...]
    geometry: HeadGeometry
    model: str = ""

    def __post_init__(self) -> None:
        heads = tuple(Head(*head) for head in self.heads)
        object.__setattr__(self, "heads", heads)
        if len(set(heads)) < len(heads):
            raise ValueError(f"a head set holds each head once, got {head_names(heads)}")
        layers, width = self.geometry.layers, self.geometry.heads
        outside = [h for h in heads if not (0 <= h.layer < layers and 0 <= h.head < width)]
        if outside:
            raise ValueError(
                f"{head_names(outside)} not among the {layers} layers x {width} heads of "
                f"{self.model or 'the model'} (heads are (layer, head), 0-based)"
            )

    def __len__(self) -> int:
        return len(self.heads)

    def __iter__(self) -> Iterator[Head]:
        return iter(self.heads)

    def __contains__(self, head: object) -> bool:
        return head in self._members

    @cached_property
    def _members(self) -> frozenset[Head]:
        return frozenset(self.heads)

    def __str__(self) -> str:
        return " ".join(map(str, self.heads))

    def __and__(self, other: "HeadSet") -> "HeadSet":
        return self._combine(other, (head for head in self if head in other))

    def __sub__(self, other: "HeadSet") -> "HeadSet":
        return self._combine(other, (head for head in self if head not in other))

    def __or__(self, other: "HeadSet") -> "HeadSet":
        return self._combine(other, dict.fromkeys((*self, *other)))

    def _combine(self, other: "HeadSet", heads: Iterable[Head]) -> "HeadSet":
        _same_geometry(self.geometry, other.geometry)
        return dataclasses.replace(self, heads=tuple(heads))

    @property
    def mask(self) -> NDArray[np.bool_]:
        """[layer, head], True for the heads of the set."""
        mask = np.zeros((self.geometry.layers, self.geometry.heads), dtype=bool)
        for head in self:
            mask[head] = True
        return mask

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that hold a head of the set, ascending."""
        return tuple(sorted({head.layer for head in self}))

    @property
    def kv_groups(self) -> frozenset[tuple[int, int]]:
        """The (layer, KV group) pairs that hold a head of the set."""
        return frozenset(self.geometry.kv_group(head) for head in self)

    @property
    def mean_layer(self) -> float:
        """Mean layer of the heads (paper A, Fig. 6)."""
        if not self.heads:
            raise ValueError("an empty head set has no mean layer")
        return float(np.mean([head.layer for head in self]))


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
        return HeadSet(heads, self.geometry, self.provenance.model)

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


MATCHES = ("", "layer", "kv_group")


def random_controls(
    selected: HeadSet,
    eligible: NDArray[np.bool_],
    *,
    draws: int = 5,
    seed: int,
    match: str = "",
) -> list[HeadSet]:
    """Random sets as large as a selection, without any of its heads.

    Where a match cannot be kept, the missing heads come from the nearest layers that have some,
    whatever their KV group, and a warning says so.

    Args:
        selected: The selection.
        eligible: [layer, head] bool, the heads that may be drawn.
        draws: Number of sets.
        seed: Seed of the draws.
        match: "layer" keeps the number of heads a layer. "kv_group" keeps how many heads share
            a KV group: for each group with n selected heads, n heads of one group without any, of
            the same layer if there is such a group left. "" matches nothing.

    Raises:
        ValueError: An unknown match, no draw, an empty selection, or fewer heads left than it has.
    """
    pool = eligible & ~selected.mask
    if match not in MATCHES:
        raise ValueError(f"match is {match!r}; expected one of {MATCHES}")
    if draws < 1 or not 1 <= len(selected) <= pool.sum():
        raise ValueError(
            f"{draws} draws beside {len(selected)} selected heads: expected at least one draw and "
            f"one head, and no more heads than the {int(pool.sum())} that are left"
        )
    rng = np.random.default_rng(seed)
    draw = {"": _draw_any, "layer": _draw_by_layer, "kv_group": _draw_by_group}[match]
    found = [draw(selected, pool.copy(), rng) for _ in range(draws)]
    displaced = max(count for _, count in found)
    if displaced:
        warnings.warn(
            f"{displaced} of {len(selected)} control heads do not match by {match}: the heads that "
            "are left do not suffice, and the nearest ones were drawn",
            stacklevel=2,
        )
    return [dataclasses.replace(selected, heads=heads) for heads, _ in found]


_Drawn = tuple[tuple[Head, ...], int]
"""Heads, and how many of them do not match."""


def _draw_any(selected: HeadSet, pool: NDArray[np.bool_], rng: np.random.Generator) -> _Drawn:
    chosen = rng.choice(np.argwhere(pool), len(selected), replace=False)
    return tuple(Head(*map(int, head)) for head in chosen), 0


def _draw_by_layer(selected: HeadSet, pool: NDArray[np.bool_], rng: np.random.Generator) -> _Drawn:
    layers = rng.permutation([head.layer for head in selected])
    heads = tuple(_draw_nearest(int(layer), pool, rng) for layer in layers)
    return heads, sum(h.layer != layer for h, layer in zip(heads, layers, strict=True))


def _draw_by_group(selected: HeadSet, pool: NDArray[np.bool_], rng: np.random.Generator) -> _Drawn:
    geometry = selected.geometry
    shared = geometry.heads // geometry.kv_groups
    by_group = pool.reshape(geometry.layers, geometry.kv_groups, shared)
    free = np.ones(by_group.shape[:2], dtype=bool)
    for group in selected.kv_groups:
        free[group] = False
    heads: list[Head] = []
    displaced = 0
    wanted = list(Counter(geometry.kv_group(head) for head in selected).items())
    shuffled = [wanted[at] for at in rng.permutation(len(wanted))]
    for (layer, _), count in sorted(shuffled, key=lambda entry: -entry[1]):
        layers, groups = np.nonzero(free & (by_group.sum(axis=-1) >= count))
        if not len(layers):
            heads += [_draw_nearest(layer, pool, rng) for _ in range(count)]
            displaced += count
            continue
        distance = abs(layers - layer)
        pick = rng.choice(np.flatnonzero(distance == distance.min()))
        there, control = int(layers[pick]), int(groups[pick])
        inside = rng.choice(np.flatnonzero(by_group[there, control]), count, replace=False)
        heads += [Head(there, control * shared + int(index)) for index in inside]
        free[there, control] = False
        by_group[there, control, inside] = False
        displaced += count * (there != layer)
    return tuple(heads), displaced


def _draw_nearest(layer: int, pool: NDArray[np.bool_], rng: np.random.Generator) -> Head:
    """Take a head out of the nearest layer that has any."""
    distance = np.where(pool.any(axis=1), abs(np.arange(len(pool)) - layer), len(pool))
    nearest = int(distance.argmin())
    head = Head(nearest, int(rng.choice(np.flatnonzero(pool[nearest]))))
    pool[head] = False
    return head


def ceil_share(fraction: float, size: int) -> int:
    """`ceil(fraction * size)`, not misled by binary fractions (0.07 of 100 is 7, not 8).

    Raises:
        ValueError: a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}, expected a number in (0, 1]")
    return math.ceil(round(fraction * size, 9))


def overlap(a: HeadSet, b: HeadSet) -> float:
    """Share of heads that two sets of equal size have in common, |a and b| / |a|.

    Raises:
        ValueError: empty sets, sets of unequal size, or of models with other layers and heads.
    """
    if len(a) != len(b) or not len(a):
        raise ValueError(f"overlap compares sets of one size, got {len(a)} and {len(b)} heads")
    return len(a & b) / len(a)


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
    _same_geometry(a.geometry, b.geometry)
    if not np.array_equal(a.eligible, b.eligible):
        raise ValueError("the two scorings do not have the same eligible heads")
    first, second = a.mean[a.eligible], b.mean[b.eligible]
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        raise ValueError("rank correlation is undefined: all eligible heads have the same score")
    rho = float(scipy.stats.spearmanr(first, second).statistic)
    return Agreement(rho, overlap(a.top(fraction), b.top(fraction)))


def _same_geometry(a: HeadGeometry, b: HeadGeometry) -> None:
    if (a.layers, a.heads) != (b.layers, b.heads):
        raise ValueError(
            f"heads of different models: {a.layers} layers x {a.heads} heads and "
            f"{b.layers} x {b.heads}"
        )
