"""Attention heads, the geometry of a model's heads, and sets of heads with their files.

A head is (layer, head), 0-based, printed L8H10.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmheads import paths
from mmheads.checks import ONLY_KNOWN_FIELDS, parse


class Head(NamedTuple):
    """One attention head, 0-based."""

    layer: int
    head: int

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}"


def format_heads(heads: Iterable[Iterable[int]]) -> str:
    """Heads as a reader sees them, "L3H2, L8H10"."""
    return ", ".join(str(Head(*map(int, head))) for head in heads)


@dataclass(frozen=True)
class HeadGeometry:
    """The attention heads of a language model.

    Attributes:
        layers: Number of layers.
        heads: Number of query heads per layer.
        kv_groups: Number of key-value heads per layer; `heads / kv_groups` query heads share one.
        global_layers: The layers that attend to the whole context; None if all do.
        without_heads: The layers that have no heads, but a recurrence or a convolution.
        architecture: The stock model type, "qwen3_vl"; empty if unknown. Geometries are equal
            without it; `fits` compares it.
    """

    layers: int
    heads: int
    kv_groups: int
    global_layers: tuple[int, ...] | None = None
    without_heads: tuple[int, ...] = ()
    architecture: str = field(default="", compare=False)

    __pydantic_config__ = ONLY_KNOWN_FIELDS

    def __post_init__(self) -> None:
        if min(self.layers, self.heads, self.kv_groups) < 1 or self.heads % self.kv_groups:
            raise ValueError(
                f"{self.layers} layers of {self.heads} heads in {self.kv_groups} KV groups: "
                "expected positive numbers, and as many heads in each KV group of a layer"
            )
        named = (*(self.global_layers or ()), *self.without_heads)
        if beyond := [layer for layer in named if not 0 <= layer < self.layers]:
            raise ValueError(f"global layers {beyond} are not among the {self.layers} layers")

    def __str__(self) -> str:
        named = {"global": self.global_layers, "without heads": self.without_heads}
        layers = [f"layers {which} {name}" for name, which in named.items() if which]
        text = f"{self.layers} layers of {self.heads} heads in {self.kv_groups} KV groups"
        return ", ".join([text, *layers, f"architecture {self.architecture or 'unknown'}"])

    @property
    def size(self) -> int:
        """Number of heads of the whole model."""
        return (self.layers - len(self.without_heads)) * self.heads

    @property
    def every(self) -> NDArray[np.bool_]:
        """[layer, head], True in layers that have heads."""
        mask = np.ones((self.layers, self.heads), dtype=bool)
        mask[list(self.without_heads)] = False
        return mask

    @property
    def eligible(self) -> NDArray[np.bool_]:
        """[layer, head], True in layers that attend to the whole context."""
        mask = np.zeros((self.layers, self.heads), dtype=bool)
        mask[slice(None) if self.global_layers is None else list(self.global_layers)] = True
        return mask

    def fits(self, other: HeadGeometry) -> bool:
        """Whether heads can be used in each other's model: equal geometries of one architecture.

        An unknown architecture fits any other.
        """
        return self == other and len({self.architecture, other.architecture} - {""}) < 2

    def kv_group(self, head: Head) -> tuple[int, int]:
        """The (layer, KV group) whose keys and values the head reads."""
        return head.layer, head.head // (self.heads // self.kv_groups)


@dataclass(frozen=True)
class Origin:
    """Where a head set comes from.

    Attributes:
        revision: Revision of the weights that the heads were scored with.
        task: Task or tasks that chose them.
        length: Nominal context length or lengths in tokens.
        rule: How they were chosen, "top 5% by mean score".
        source: The module that computed their scores, or the file of other authors.
    """

    revision: str = ""
    task: str = ""
    length: str = ""
    rule: str = ""
    source: str = ""

    def __or__(self, other: Origin) -> Origin:
        """The origin of heads of two sets: what differs is joined, "text + image"."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Origin(*(" + ".join(dict.fromkeys(filter(None, pair))) for pair in pairs))


@dataclass(frozen=True)
class HeadSet:
    """Heads of one model, in the order in which they were given (selected ones: strongest first).

    Set operations keep the order of the left operand.

    Attributes:
        heads: The heads, each once.
        geometry: The model's heads.
        model: Model id; empty if unknown.
        origin: Where the heads come from; two sets of the same heads are equal without it.
        scores: The score of each head, where it is known.
    """

    heads: tuple[Head, ...]
    geometry: HeadGeometry
    model: str = ""
    origin: Origin = field(default=Origin(), compare=False, repr=False)
    scores: Mapping[Head, float] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        heads = tuple(Head(*head) for head in self.heads)
        object.__setattr__(self, "heads", heads)
        if len(set(heads)) < len(heads):
            raise ValueError(f"a head set holds each head once, got {format_heads(heads)}")
        layers, width = self.geometry.layers, self.geometry.heads
        beyond = [h for h in heads if not (0 <= h.layer < layers and 0 <= h.head < width)]
        if beyond:
            raise ValueError(
                f"{format_heads(beyond)} not among the {layers} layers x {width} heads of "
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

    def __and__(self, other: HeadSet) -> HeadSet:
        return self._combine(other, (head for head in self if head in other))

    def __sub__(self, other: HeadSet) -> HeadSet:
        return self._combine(other, (head for head in self if head not in other))

    def __or__(self, other: HeadSet) -> HeadSet:
        joined = self._combine(other, dict.fromkeys((*self, *other)))
        scores = {**other.scores, **self.scores}
        return dataclasses.replace(joined, origin=self.origin | other.origin, scores=scores)

    def _combine(self, other: HeadSet, heads: Iterable[Head]) -> HeadSet:
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

    def save(self, path: str | Path) -> None:
        """Write a JSON file: model, origin, geometry, and a list of [layer, head, score].

        The score is null where it is not known.
        """
        content = {
            "format": 1,
            "model": self.model,
            **dataclasses.asdict(self.origin),
            "geometry": dataclasses.asdict(self.geometry),
            "heads": [[*head, self.scores.get(head)] for head in self],
        }
        with paths.write_whole(Path(path)) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> HeadSet:
        """Read what `save` wrote, or a list that is shipped in `data/heads`.

        Args:
            path: A file, or the name of a model ("tiny-qwen3-vl-m", "Qwen/Qwen3-VL-8B-Instruct");
                of a name or folder with slashes, the last part counts.

        Raises:
            FileNotFoundError: There is no such file, and no list is shipped for such a model.
            ValueError: It is not a file of heads of this version; the message names the file.
        """
        path = Path(path)
        shipped = paths.HEADS / f"{path.name}.json"
        if not path.is_file() and shipped.is_file():
            path = shipped
        if not path.is_file():
            known = ", ".join(sorted(each.stem for each in paths.HEADS.glob("*.json"))) or "none"
            raise FileNotFoundError(
                f"{path} is not a file; expected a JSON file of heads, or the name of a model "
                f"whose heads are shipped ({known})"
            )
        try:
            file = parse(_File, path.read_bytes())
            origin = Origin(file.revision, file.task, file.length, file.rule, file.source)
            heads = tuple(Head(layer, head) for layer, head, _ in file.heads)
            scores = {Head(i, j): score for i, j, score in file.heads if score is not None}
            return cls(heads, file.geometry, file.model, origin, scores)
        except ValueError as error:
            raise ValueError(
                f"{path} is not a file of heads ({error}); expected what `HeadSet.save` writes"
            ) from error

    @classmethod
    def released(cls, model: str | HeadGeometry, **settings: Any) -> HeadSet:
        """The heads of a model of paper A, from the scores that its authors released.

        The scores are downloaded once and checked.

        Args:
            model: "Qwen3-VL-8B", a name on the hub, a folder of that name, or `vlm.geometry`,
                which is recognised by its architecture and its numbers of heads.
            **settings: `tasks`, `length`, `fraction`, `folder` or `cache` of `published.heads`.

        Raises:
            ValueError: No scores of such a model were released, or a file is damaged.
            FileNotFoundError: A file is not here and cannot be downloaded.
        """
        from mmheads import published

        return published.heads(model, **settings)


@dataclass(frozen=True)
class _File:
    """The content of a file of heads; `heads` holds layer, head, and score where it is known."""

    format: Literal[1]
    model: str
    revision: str
    task: str
    length: str
    rule: str
    source: str
    geometry: HeadGeometry
    heads: list[tuple[int, int, float | None]]


def head_count(fraction: float, size: int) -> int:
    """Number of heads in a share of `size` heads, rounded up.

    Binary fractions do not mislead it: 0.07 of 100 is 7, not 8.

    Raises:
        ValueError: The fraction lies outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}, expected a number in (0, 1]")
    return math.ceil(round(fraction * size, 9))


def overlap(a: HeadSet, b: HeadSet) -> float:
    """Share of heads that two sets of equal size have in common, |a and b| / |a|.

    Raises:
        ValueError: Empty sets, sets of unequal size, or sets of models with different heads.
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
