"""Random sets of heads that serve as controls for a selected set."""

import dataclasses
import warnings
from collections import Counter

import numpy as np
from numpy.typing import NDArray

from mmheads.checks import expect_one_of
from mmheads.heads import Head, HeadSet

MATCHES = ("", "layer", "kv_group")


def random_controls(
    selected: HeadSet,
    eligible: NDArray[np.bool_],
    *,
    draws: int = 5,
    seed: int,
    match: str = "",
    disjoint: bool = True,
) -> list[HeadSet]:
    """Random sets of the size of a selection that hold none of its heads, or may hold some.

    Where a match cannot be kept, the missing heads come from the nearest layers that have some,
    whatever their KV group, and a warning says so.

    Args:
        selected: The selection.
        eligible: [layer, head] bool, the heads that may be drawn.
        draws: Number of sets.
        seed: Seed of the draws.
        match: "layer" keeps the number of heads per layer. "kv_group" keeps how many heads share
            a KV group: for each group with n selected heads, n heads of one group without any, of
            the same layer if there is such a group left. "" matches nothing.
        disjoint: Leave out the selected heads, and the KV groups that hold one. For a test of the
            selection's rank among random sets, draw from all eligible heads.

    Raises:
        ValueError: An unknown match, no draw, an empty selection, or fewer heads left than it has.
    """
    pool = eligible & ~selected.mask if disjoint else eligible
    expect_one_of("match", match, MATCHES)
    if draws < 1 or not 1 <= len(selected) <= pool.sum():
        raise ValueError(
            f"{draws} draws beside {len(selected)} selected heads: expected at least one draw and "
            f"one head, and no more heads than the {int(pool.sum())} that are left"
        )
    rng = np.random.default_rng(seed)
    draw = {"": _draw_any, "layer": _draw_by_layer, "kv_group": _draw_by_group}[match]
    drawn = [draw(selected, pool.copy(), rng, disjoint) for _ in range(draws)]
    displaced = max(count for _, count in drawn)
    if displaced:
        warnings.warn(
            f"{displaced} of {len(selected)} control heads do not match by {match}: the heads that "
            "are left do not suffice, and the nearest ones were drawn",
            stacklevel=2,
        )
    rule = f"random, matched by {match}" if match else "random"
    origin = dataclasses.replace(selected.origin, rule=f"{rule}, beside {selected.origin.rule}")
    return [
        dataclasses.replace(selected, heads=heads, origin=origin, scores={}) for heads, _ in drawn
    ]


_Drawn = tuple[tuple[Head, ...], int]
"""Heads, and how many of them do not match."""
_Mask = NDArray[np.bool_]
"""[layer, head], the heads that are left."""


def _draw_any(selected: HeadSet, pool: _Mask, rng: np.random.Generator, _: bool) -> _Drawn:
    chosen = rng.choice(np.argwhere(pool), len(selected), replace=False)
    return tuple(Head(*map(int, head)) for head in chosen), 0


def _draw_by_layer(selected: HeadSet, pool: _Mask, rng: np.random.Generator, _: bool) -> _Drawn:
    layers = rng.permutation([head.layer for head in selected])
    heads = tuple(_draw_nearest(int(layer), pool, rng) for layer in layers)
    return heads, sum(h.layer != layer for h, layer in zip(heads, layers, strict=True))


def _draw_by_group(
    selected: HeadSet, pool: _Mask, rng: np.random.Generator, disjoint: bool
) -> _Drawn:
    geometry = selected.geometry
    shared = geometry.heads // geometry.kv_groups
    by_group = pool.reshape(geometry.layers, geometry.kv_groups, shared)
    free = np.ones(by_group.shape[:2], dtype=bool)
    for group in selected.kv_groups if disjoint else ():
        free[group] = False
    heads: list[Head] = []
    displaced = 0
    sizes = list(Counter(geometry.kv_group(head) for head in selected).items())
    shuffled = [sizes[index] for index in rng.permutation(len(sizes))]
    for (layer, _), count in sorted(shuffled, key=lambda entry: -entry[1]):
        layers, groups = np.nonzero(free & (by_group.sum(axis=-1) >= count))
        if not len(layers):
            heads += [_draw_nearest(layer, pool, rng) for _ in range(count)]
            displaced += count
            continue
        distance = abs(layers - layer)
        pick = rng.choice(np.flatnonzero(distance == distance.min()))
        control_layer, control = int(layers[pick]), int(groups[pick])
        members = np.flatnonzero(by_group[control_layer, control])
        chosen = rng.choice(members, count, replace=False)
        heads += [Head(control_layer, control * shared + int(index)) for index in chosen]
        free[control_layer, control] = False
        by_group[control_layer, control, chosen] = False
        displaced += count * (control_layer != layer)
    return tuple(heads), displaced


def _draw_nearest(layer: int, pool: _Mask, rng: np.random.Generator) -> Head:
    """Take a head out of the nearest layer that has one left."""
    distance = np.where(pool.any(axis=1), abs(np.arange(len(pool)) - layer), len(pool))
    nearest = int(distance.argmin())
    head = Head(nearest, int(rng.choice(np.flatnonzero(pool[nearest]))))
    pool[head] = False
    return head
