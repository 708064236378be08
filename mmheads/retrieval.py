"""Rank the pages and layout elements of a document: metrics and text baselines.

MMDocIR (arXiv 2501.08828): the candidates are the pages (layout elements) of the question's own
document.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import bm25s
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mmheads.tasks.documents import Document, PageBox

PAGE_CUTS = (1, 3, 5)
LAYOUT_CUTS = (1, 5, 10)


def page_recall(ranking: Sequence[int], gold: Iterable[int], k: int) -> float:
    """Share of the gold pages that are among the first `k` of a ranking.

    Raises:
        ValueError: There is no gold page, or `k` is less than 1.
    """
    wanted = set(gold)
    if not wanted or k < 1:
        raise ValueError(f"recall at {k} of {len(wanted)} gold pages: expected at least one each")
    return len(wanted & set(ranking[:k])) / len(wanted)


def layout_recall(ranking: Sequence[PageBox], gold: Sequence[PageBox], k: int) -> float:
    """Share of the area of the gold boxes that the first `k` boxes of a ranking cover.

    There is no penalty for size: the box of a whole page covers all gold on it. Look at `box_area`
    beside it. Where boxes overlap each other, their common area counts once.

    Raises:
        ValueError: The gold boxes have no area, or `k` is less than 1.
    """
    found = list(ranking[:k])
    covered = total = 0.0
    for page in {box.page for box in gold}:
        wanted = [_points(box) for box in gold if box.page == page]
        shown = [_points(box) for box in found if box.page == page]
        total += _area(wanted)
        covered += _area(wanted, shown)
    if not total or k < 1:
        raise ValueError(f"recall at {k} of gold boxes of area {total}: expected both above 0")
    return covered / total


def box_area(ranking: Sequence[PageBox], k: int) -> float:
    """Area of the first `k` boxes in pages: 1.0 is as much as one whole page."""
    return sum(_area([_points(box)]) / (box.size[0] * box.size[1]) for box in ranking[:k])


def _points(box: PageBox) -> tuple[float, float, float, float]:
    """A box with its corners in order and inside its page."""
    (left, top, right, bottom), (width, height) = box.box, box.size
    across, down = (
        np.clip(sorted((left, right)), 0, width),
        np.clip(sorted((top, bottom)), 0, height),
    )
    return float(across[0]), float(down[0]), float(across[1]), float(down[1])


def _area(
    boxes: Sequence[tuple[float, ...]], inside: Sequence[tuple[float, ...]] | None = None
) -> float:
    """Area that boxes cover, once; with `inside`, that of it which these cover too."""
    if not boxes or inside == []:
        return 0.0
    corners = np.array([*boxes, *(inside or [])])
    x, y = np.unique(corners[:, [0, 2]]), np.unique(corners[:, [1, 3]])
    cells = np.outer(np.diff(y), np.diff(x))

    def covered(some: Sequence[tuple[float, ...]]) -> NDArray[np.bool_]:
        mask = np.zeros(cells.shape, dtype=bool)
        for left, top, right, bottom in some:
            mask[
                np.ix_((y[:-1] >= top) & (y[1:] <= bottom), (x[:-1] >= left) & (x[1:] <= right))
            ] = True
        return mask

    mask = covered(boxes) if inside is None else covered(boxes) & covered(inside)
    return float(cells[mask].sum())


def bm25_pages(document: Document, questions: Sequence[str]) -> NDArray[np.float32]:
    """BM25 scores of a document's pages by their text -> [question, page].

    Lucene's variant with its usual k1 = 1.5, b = 0.75, English stop words, no stemming; a page
    without text scores 0.
    """
    tokens = bm25s.tokenize(
        [page.text for page in document.pages], stopwords="en", show_progress=False
    )
    scores = np.zeros((len(questions), len(document.pages)), np.float32)
    if not tokens.vocab or not any(len(ids) for ids in tokens.ids):
        return scores
    index = bm25s.BM25()
    index.index(tokens, show_progress=False)
    asked: Any = bm25s.tokenize(
        list(questions), stopwords="en", return_ids=False, show_progress=False
    )
    for row, words in enumerate(asked):
        known = [word for word in words if word in tokens.vocab]
        if known:
            scores[row] = index.get_scores(known)
    return scores


def rank(scores: NDArray[np.floating[Any]]) -> list[int]:
    """Candidates by score, the best first; equal ones in their order."""
    return [int(index) for index in np.argsort(-scores, kind="stable")]


def summarise(table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Means of metric columns, a row a domain, then "macro" and "micro" with n each.

    Micro is the mean over questions, macro the mean of the domains' means (MMDocIR).
    """
    domains = table.groupby("domain")[list(columns)].mean()
    domains["n"] = table.groupby("domain").size()
    summary = pd.DataFrame(
        [domains[list(columns)].mean(), table[list(columns)].mean()], index=["macro", "micro"]
    )
    summary["n"] = [len(domains), len(table)]
    return pd.concat([domains, summary]).rename_axis("domain").reset_index()
