"""Recall of pages and layout elements as MMDocIR defines it (arXiv 2501.08828)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import ir_measures
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mmheads.pdfs import PageBox

PAGE_CUTS = (1, 3, 5)


LAYOUT_CUTS = (1, 5, 10)


def page_recall(
    rankings: Sequence[Sequence[int]],
    gold: Sequence[Iterable[int]],
    cuts: Sequence[int] = PAGE_CUTS,
) -> NDArray[np.float64]:
    """Share of each question's gold pages among the first pages of its ranking -> [question, cut].

    Computed by `ir_measures`, as R@k.

    Raises:
        ValueError: A question has no gold page, or a cut is less than 1.
    """
    gold_pages = [set(pages) for pages in gold]
    if len(rankings) != len(gold_pages) or any(len(set(r)) < len(r) for r in rankings):
        raise ValueError(
            f"{len(rankings)} rankings of {len(gold_pages)} questions: expected one ranking per "
            "question, with every page once"
        )
    if not all(gold_pages) or min(cuts) < 1:
        raise ValueError(
            f"recall at {tuple(cuts)}, gold pages {gold_pages}: expected cuts of 1 or more, and "
            "a page for every question"
        )
    relevant = {str(n): {str(page): 1 for page in pages} for n, pages in enumerate(gold_pages)}
    ranked = {
        str(n): {str(page): -float(place) for place, page in enumerate(ranking)}
        for n, ranking in enumerate(rankings)
    }
    measures = {ir_measures.R @ cut: column for column, cut in enumerate(cuts)}
    recall = np.zeros((len(gold_pages), len(cuts)))
    for metric in ir_measures.iter_calc(list(measures), relevant, ranked):
        recall[int(metric.query_id), measures[metric.measure]] = metric.value
    return recall


def layout_recall(ranking: Sequence[PageBox], gold: Sequence[PageBox], k: int) -> float:
    """Share of the area of the gold boxes that the first `k` boxes of a ranking cover.

    There is no penalty for size: the box of a whole page covers all gold on it. Look at `box_area`
    beside it. Where boxes overlap each other, their common area counts once.

    Raises:
        ValueError: The gold boxes have no area, or `k` is less than 1.
    """
    first = list(ranking[:k])
    covered = total = 0.0
    for page in {box.page for box in gold}:
        on_page = [box for box in gold if box.page == page]
        gold_boxes = [_points(box) for box in on_page]
        covering = [_points(box, on_page[0].size) for box in first if box.page == page]
        total += _area(gold_boxes)
        covered += _area(gold_boxes, covering)
    if not total or k < 1:
        raise ValueError(f"recall at {k} of gold boxes of area {total}: expected both above 0")
    return covered / total


def box_area(ranking: Sequence[PageBox], k: int) -> float:
    """Area of the first `k` boxes in pages: 1.0 is as much as one whole page."""
    return sum(_area([_points(box)]) / (box.size[0] * box.size[1]) for box in ranking[:k])


def _points(box: PageBox, size: tuple[float, float] | None = None) -> NDArray[np.float64]:
    """A box with its corners in order and inside its page, in units of a page of `size`."""
    corners = np.sort(np.reshape(box.box, (2, 2)), axis=0)  # left and top, right and bottom
    return np.ravel(np.clip(corners, 0, box.size) * np.divide(size or box.size, box.size))


def _area(
    boxes: Sequence[NDArray[np.float64]], inside: Sequence[NDArray[np.float64]] | None = None
) -> float:
    """Area that boxes cover, once; with `inside`, that of it which these cover too."""
    corners = np.array([*boxes, *(inside or [])])
    x, y = np.unique(corners[:, [0, 2]]), np.unique(corners[:, [1, 3]])
    cells = np.outer(np.diff(y), np.diff(x))

    def covered(some: Sequence[NDArray[np.float64]]) -> NDArray[np.bool_]:
        mask = np.zeros(cells.shape, dtype=bool)
        for left, top, right, bottom in some:
            rows, columns = np.searchsorted(y, (top, bottom)), np.searchsorted(x, (left, right))
            mask[slice(*rows), slice(*columns)] = True
        return mask

    mask = covered(boxes) if inside is None else covered(boxes) & covered(inside)
    return float(cells[mask].sum())


def summarise(table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Means of metric columns: one row per domain, then "macro" and "micro", each with its n.

    Micro is the mean over questions, macro the mean of the domains' means (MMDocIR).
    """
    names = list(columns)
    domains = table.groupby("domain")[names].mean()
    means = {"macro": domains.mean(), "micro": table[names].mean()}
    summary = pd.concat([domains, pd.DataFrame(means).T])
    summary["n"] = [*table.groupby("domain").size(), len(domains), len(table)]
    return summary.rename_axis("domain").reset_index()
