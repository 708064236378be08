"""The ranking of a document's candidates for one question, as a table and as pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mmheads.families import Boxes
from mmheads.pdfs import PageBox


@dataclass(frozen=True, eq=False)
class Ranking:
    """Candidates in the order of their scores.

    Attributes:
        question: Its texts; "<image>" stands for an image.
        scores: [candidate].
        order: Candidates by score, the best first.
        window: Candidates that shared a forward pass; scores depend on it.
        windows: Forward passes.
        heat: By candidate with one image, the boxes of its visual tokens in its pixels, and their
            scores, which add up to the candidate's (before it is normalised).
        regions: What was ranked, if not whole candidates of the index.
    """

    question: str
    scores: NDArray[np.float32]
    order: list[int]
    window: int
    windows: int
    heat: Mapping[int, tuple[Boxes, NDArray[np.float32]]]
    regions: Sequence[PageBox] | None = None

    def table(self) -> pd.DataFrame:
        """A row a candidate or region, the best first.

        Columns: rank (from 1), candidate (from 0), box (of a region), score, window.
        """
        table = pd.DataFrame(
            {
                "rank": range(1, len(self.order) + 1),
                "candidate": self.order,
                "score": self.scores[self.order],
                "window": self.window,
            }
        )
        if self.regions is not None:
            found = [self.regions[index] for index in self.order]
            table["candidate"] = [region.page for region in found]
            table.insert(2, "box", [region.box for region in found])
        return table

    def picture(self, images: Sequence[Callable[[], Any]], top: int = 3) -> Figure:
        """The best candidates with the heat of their tokens over them.

        Args:
            images: By candidate, a function that gives its image.
            top: How many candidates to show.
        """
        table = self.table().drop_duplicates("candidate")
        shown = table[table["candidate"].isin(list(self.heat))].head(top).to_dict("records")
        if not shown:
            raise ValueError("no candidate has an image whose tokens have a place on it")
        figure = Figure(figsize=(3.2 * len(shown), 4.4), dpi=120, layout="constrained")
        figure.suptitle(f"{self.question}\n(window of {self.window} candidates)", fontsize=9)
        limit = max(self.heat[row["candidate"]][1].max() for row in shown)
        axes = figure.subplots(1, len(shown), squeeze=False)[0]
        for row, axis in zip(shown, axes, strict=True):
            image = images[row["candidate"]]()
            axis.imshow(image)
            boxes, values = self.heat[row["candidate"]]
            axis.imshow(
                _raster(boxes, values, image.size),
                extent=(0, image.width, image.height, 0),
                cmap="Reds",
                vmin=0,
                vmax=max(float(limit), 1e-9),
                alpha=0.5,
            )
            axis.set_axis_off()
            axis.set_title(f"{row['rank']}: page {row['candidate'] + 1}, {row['score']:+.4f}")
        return figure


def _raster(
    boxes: Boxes, values: NDArray[np.float32], size: tuple[int, int], cells: int = 256
) -> NDArray[np.float32]:
    """[row, column] sum of the values of the tokens that lie there."""
    scale = cells / max(size)
    canvas = np.zeros((max(1, round(size[1] * scale)), max(1, round(size[0] * scale))), np.float32)
    for box, value in zip(boxes, values, strict=True):
        if not np.isnan(box).any():
            left, top, right, bottom = np.clip(np.round(box * scale), 0, None).astype(int)
            canvas[top : max(bottom, top + 1), left : max(right, left + 1)] += value
    return canvas


def rank(scores: NDArray[np.floating[Any]]) -> list[int]:
    """Candidates by score, the best first; equal ones in their order."""
    return [int(index) for index in np.argsort(-scores, kind="stable")]
