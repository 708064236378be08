"""Drawing that several notebooks share: intervals, maps of heads, numbers in cells, titles."""

import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.image import AxesImage
from numpy.typing import NDArray

from mmheads.heads import Head


def heat_map(
    axis: Axes,
    values: NDArray[np.floating[Any]],
    *,
    limit: float | None = None,
    marked: Iterable[Head] = (),
) -> AxesImage:
    """Draw [layer, head] values, layer 0 at the bottom; a map centred on 0 if any is negative.

    Args:
        axis: Where to draw.
        values: [layer, head]; heads without a value (NaN) are grey.
        limit: Value of the strongest colour, by default the largest absolute value.
        marked: Heads to mark with a dot.
    """
    limit = limit or float(np.nanmax(np.abs(values)))
    signed = bool((values < 0).any())
    axis.set(xlabel="head", ylabel="layer", facecolor="0.85")
    image = axis.imshow(
        values,
        cmap="RdBu_r" if signed else "Blues",
        vmin=-limit if signed else 0,
        vmax=limit,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
    )
    for layer, head in marked:
        axis.plot(head, layer, "o", ms=2.2, mfc="white", mec="black", mew=0.6)
    return image


def intervals(
    axis: Axes,
    table: pd.DataFrame,
    x: str,
    y: str = "value",
    *,
    ends: tuple[str, str] = ("low", "high"),
    by: str = "",
    order: Mapping[Any, Any] | Sequence[Any] = (),
    colors: Mapping[Any, Any] | None = None,
    labels: Mapping[Any, str] | None = None,
    across: bool = False,
    dodge: float | None = None,
    **style: Any,
) -> None:
    """Draw points with their intervals, one series per value of a column, side by side.

    Args:
        axis: Where to draw.
        table: One point per row.
        x: Column of the positions.
        y: Column of the values.
        ends: Columns of the lower and the upper end of the interval, in the unit of the values;
            a missing end (NaN) draws only the point.
        by: Column whose values are the series; empty: all rows are one.
        order: Values of `x` in the order of their ticks, or a mapping from them to the labels of
            the ticks. Empty: `x` holds numbers, which are the positions.
        colors: Colour by series; the series are drawn in this order. By default the palette.
        labels: Name of each series in a legend, by default its value in `by`.
        across: Values run from left to right, positions from top to bottom.
        dodge: Distance between neighbouring series; by default 0.08 with `order`, else 0.
        style: Further arguments of `Axes.errorbar`.
    """
    groups = dict[Any, pd.DataFrame](iter(table.groupby(by, sort=False))) if by else {"": table}
    names = [name for name in colors if name in groups] if colors and by else list(groups)
    step = (0.08 if order else 0.0) if dodge is None else dodge
    ticks = order if isinstance(order, Mapping) else {value: value for value in order}
    for number, name in enumerate(names):
        rows, shift = groups[name], step * (number - (len(names) - 1) / 2)
        position = (rows[x].map(list(ticks).index) if order else rows[x]) + shift
        error = [(rows[y] - rows[ends[0]]).clip(0), (rows[ends[1]] - rows[y]).clip(0)]
        drawn: dict[str, Any] = {"marker": "o", "ms": 3, "elinewidth": 0.9}
        if by:
            drawn["label"] = (labels or {}).get(name, str(name))
        if colors and by:
            drawn["color"] = colors[name]
        if across:
            axis.errorbar(rows[y], position, xerr=error, **drawn | style)
        else:
            axis.errorbar(position, rows[y], yerr=error, **drawn | style)
    if order:
        set_ticks = axis.set_yticks if across else axis.set_xticks
        set_ticks(range(len(ticks)), [f"{text}" for text in ticks.values()])
    if across:
        axis.yaxis.set_inverted(True)


def number_matrix(
    axis: Axes,
    table: pd.DataFrame,
    *,
    text: str = "{:.2f}",
    limits: tuple[float, float] = (0, 1),
    **style: Any,
) -> AxesImage:
    """Draw a table as coloured cells with their numbers, in white where the cell is dark.

    Args:
        axis: Where to draw.
        table: Numbers; rows and columns are named as in the figure. A missing number (NaN) leaves
            its cell empty.
        text: Format of a number.
        limits: Numbers of the lightest and the darkest colour.
        style: Properties of the numbers, such as `fontsize`.
    """
    image = axis.imshow(table, cmap="Blues", vmin=limits[0], vmax=limits[1], aspect="auto")
    for (row, column), value in np.ndenumerate(table.to_numpy(dtype=float)):
        if np.isfinite(value):
            red, green, blue, _ = image.to_rgba(value)
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            drawn: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7}
            drawn["color"] = "white" if dark else "black"
            axis.text(column, row, text.format(value), **drawn | style)
    axis.set_xticks(range(table.shape[1]), [f"{name}" for name in table.columns])
    axis.set_yticks(range(table.shape[0]), [f"{name}" for name in table.index])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    return image


def interval_texts(
    table: pd.DataFrame,
    name: str = "value",
    *,
    ends: tuple[str, str] = ("low", "high"),
    digits: int,
) -> "pd.Series[str]":
    """Returns each value with its interval as text, "0.42 [0.40, 0.45]".

    Args:
        table: One value per row.
        name: Column of the values.
        ends: Columns of the lower and the upper end.
        digits: Digits after the point.
    """
    value, low, high = (table[each].map(f"{{:.{digits}f}}".format) for each in (name, *ends))
    return value + " [" + low + ", " + high + "]"


def set_title(target: Axes | Figure, text: str, *, width: int = 60, **style: Any) -> None:
    """Gives axes or a figure a title that a user wrote: as it is, wrapped, never read as formulas.

    Characters that the font lacks become boxes, with one warning.

    Args:
        target: Axes or a figure.
        text: The title.
        width: Longest line, in characters.
        style: Properties of the text, such as `fontsize`.
    """
    known = get_font(findfont(FontProperties())).get_charmap()
    lacking = {sign for sign in text if not sign.isspace() and ord(sign) not in known}
    if lacking:
        shown = "".join(sorted(lacking)[:10])
        warnings.warn(f"the font of the figures lacks {shown!r}: boxes are drawn", stacklevel=2)
        text = "".join("\u25a1" if sign in lacking else sign for sign in text)
    lines = [line for part in text.splitlines() for line in textwrap.wrap(part, width) or [""]]
    give = target.suptitle if isinstance(target, Figure) else target.set_title
    give("\n".join(lines), parse_math=False, **style)
