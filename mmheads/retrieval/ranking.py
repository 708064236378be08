"""The ranking of a document's candidates for one question, as a table and as pictures."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from mmheads.checks import expect, expect_one_of
from mmheads.families import Boxes
from mmheads.pdfs import PageBox, page_title
from mmheads.retrieval.candidates import Place

Heat = Mapping[int, tuple[Boxes, NDArray[np.float32]]]
"""By candidate with one image: [token, 4] boxes in its pixels, and [token] attention."""


HEATS = ("calibrated", "raw")


@dataclass(frozen=True, eq=False)
class Ranking:
    """Candidates in the order of their scores.

    Attributes:
        question: The question's texts; "<image>" stands for an image.
        scores: [candidate] scores, or [region].
        order: Numbers of the candidates or regions by score, the best first.
        window: Number of candidates per forward pass; scores depend on it.
        windows: Number of forward passes.
        heat: Places and scores of visual tokens; those of a candidate add up to its score before
            that is normalised.
        raw_heat: The same for the attention before calibration.
        regions: The regions that were ranked; None for candidates of the index.
        candidates: The ranking of the whole candidates where regions were ranked; else None.
    """

    question: str
    scores: NDArray[np.float32]
    order: list[int]
    window: int
    windows: int
    heat: Heat
    raw_heat: Heat
    regions: Sequence[Place] | None = None
    candidates: Ranking | None = None

    def table(self) -> pd.DataFrame:
        """One row per candidate or region, the best first.

        Columns: rank (from 1), candidate (from 0), region (its index) and box (None where it is not
        a `PageBox`) if regions were ranked, score, window.
        """
        columns: dict[str, Any] = {"rank": range(1, len(self.order) + 1), "candidate": self.order}
        if self.regions is not None:
            ranked = [self.regions[index] for index in self.order]
            columns["candidate"] = [region.page for region in ranked]
            columns["region"] = self.order
            columns["box"] = [getattr(region, "box", None) for region in ranked]
        return pd.DataFrame({**columns, "score": self.scores[self.order], "window": self.window})

    def picture(
        self,
        images: Sequence[Callable[[], Any]],
        top: int = 3,
        *,
        heat: str = "calibrated",
        labels: Sequence[str] = (),
        outlined: int = 5,
    ) -> Figure:
        """The best candidates with the heat of their tokens over them.

        If regions were ranked, these are the candidates that hold the best regions, which are
        outlined, each with its rank.

        Args:
            images: For each candidate, a function that returns its image.
            top: Number of candidates to show.
            heat: "calibrated" shows what the scores consist of, "raw" the attention from the
                question before the null question's is subtracted.
            labels: By candidate, the label printed on the page ("iv"), shown beside its number.
            outlined: Number of best regions that are outlined.

        Raises:
            ValueError: `top` is below 1, `heat` is unknown, images or labels are missing, or no
                candidate has an image whose tokens have a place on it.
        """
        expect(top >= 1, "top", top, "at least 1")
        expect_one_of("heat", heat, HEATS)
        heats = self.heat if heat == "calibrated" else self.raw_heat
        table = self.table().drop_duplicates("candidate")
        shown = table[table["candidate"].isin(list(heats))].head(top).to_dict("records")
        if not shown:
            raise ValueError("no candidate has an image whose tokens have a place on it")
        last = max(row["candidate"] for row in shown)
        if last >= len(images) or (labels and last >= len(labels)):
            raise ValueError(
                f"{len(images)} images and {len(labels)} labels are given, but candidate {last} is "
                "to be shown; give one image per candidate, and one label per candidate or none"
            )
        figure = Figure(figsize=(3.2 * len(shown), 4.4), dpi=120, layout="constrained")
        title = textwrap.wrap(self.question, 48 * len(shown), max_lines=3, placeholder=" …")
        title.append(f"(window of {self.window} candidates)")
        figure.suptitle("\n".join(title), fontsize=9, parse_math=False)
        limit = max(float(heats[row["candidate"]][1].max()) for row in shown)
        for row, axis in zip(shown, figure.subplots(1, len(shown), squeeze=False)[0], strict=True):
            image = images[row["candidate"]]()
            axis.imshow(image)
            axis.imshow(
                _raster(*heats[row["candidate"]], image.size),
                extent=(0, image.width, image.height, 0),
                cmap="Reds",
                vmin=0,
                vmax=max(limit, 1e-9),
                alpha=0.5,
            )
            for number, index in enumerate(self.order[:outlined], 1):
                region = self.regions[index] if self.regions is not None else None
                if isinstance(region, PageBox) and region.page == row["candidate"]:
                    _outline(axis, region, number, image.size)
            axis.set_axis_off()
            label = str(labels[row["candidate"]]).strip() if labels else ""
            name = page_title(row["candidate"] + 1, label)
            axis.set_title(f"{row['rank']}: page {name}, {row['score']:+.4f}", parse_math=False)
        return figure


def _outline(axis: Axes, region: PageBox, number: int, size: tuple[int, int]) -> None:
    """Draw a region on its page, and its rank at its upper left corner."""
    wide, high = np.divide(size, region.size)
    left, top, right, bottom = region.box
    corner, sides = (left * wide, top * high), ((right - left) * wide, (bottom - top) * high)
    axis.add_patch(Rectangle(corner, *sides, fill=False, color="black", linewidth=1))
    shown = {"facecolor": "black", "edgecolor": "none", "pad": 1}
    axis.text(*corner, str(number), color="white", fontsize=7, va="top", bbox=shown)


def _raster(
    boxes: Boxes, values: NDArray[np.float32], size: tuple[int, int], cells: int = 256
) -> NDArray[np.float32]:
    """[row, column] sum of the values of the tokens that lie at each place."""
    scale = cells / max(size)
    canvas = np.zeros((max(1, round(size[1] * scale)), max(1, round(size[0] * scale))), np.float32)
    for box, value in zip(boxes, values, strict=True):
        if not np.isnan(box).any():
            left, top, right, bottom = np.clip(np.round(box * scale), 0, None).astype(int)
            canvas[top : max(bottom, top + 1), left : max(right, left + 1)] += value
    return canvas


def rank(scores: NDArray[np.floating[Any]]) -> list[int]:
    """Numbers of candidates by score, the best first; candidates of equal score keep their order.

    Raises:
        ValueError: A score is not finite.
    """
    if not np.isfinite(scores).all():
        wrong = np.flatnonzero(~np.isfinite(scores))
        raise ValueError(f"the scores of candidates {wrong[:5].tolist()} are not finite")
    return [int(index) for index in np.argsort(-scores, kind="stable")]
