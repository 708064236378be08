"""Head scores and head sets: which heads fetch the evidence, how few they are, how stable.

Arrays are [example, layer, head]. A head is (layer, head), 0-based, printed L8H10.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


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
        revision: Commit or hash of the weights that the heads were chosen with; empty if unknown.
            It does not count when two sets are compared.
    """

    heads: tuple[Head, ...]
    geometry: HeadGeometry
    model: str = ""
    revision: str = dataclasses.field(default="", compare=False)

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
        same_geometry(self.geometry, other.geometry)
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


def same_geometry(a: HeadGeometry, b: HeadGeometry) -> None:
    """Raise ValueError if two models differ in layers or heads."""
    if (a.layers, a.heads) != (b.layers, b.heads):
        raise ValueError(
            f"heads of different models: {a.layers} layers x {a.heads} heads and "
            f"{b.layers} x {b.heads}"
        )
