"""Numbers of the committed figures and tables, for the sentences that quote them."""

from collections.abc import Iterable
from functools import cache
from typing import Any

import pandas as pd

from mmheads import figures, paths
from mmheads.statistics import holm

TASKS = figures.TASK_NAMES
_COUNTS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@cache
def data(name: str) -> pd.DataFrame:
    """Returns the data of a figure or table. Labels are read as they are written."""
    path = paths.FIGURES / f"{name}.csv"
    return pd.read_csv(path, encoding="utf-8", keep_default_na=False, na_values=[""])


@cache
def real_model() -> dict[str, pd.DataFrame]:
    """Returns the numbers of the pretrained text model by quantity, each row under its `about`."""
    path = paths.DATA / "results" / "real_model.csv"
    table = pd.read_csv(path, encoding="utf-8", dtype={"about": str})
    return {str(name): part.set_index("about") for name, part in table.groupby("quantity")}


def settings(name: str) -> dict[str, Any]:
    """Returns the parameters with which a figure or table was made, from the manifest."""
    return _parameters()[f"{name}.csv"]


@cache
def _parameters() -> dict[str, dict[str, Any]]:
    return {entry["file"]: entry["parameters"] for entry in figures.manifest(paths.FIGURES)}


def rows(name: str, **where: object) -> pd.DataFrame:
    """Returns the rows of a figure or table in which the named columns have these values.

    Raises:
        ValueError: There is no such column, or no such row.
    """
    table = data(name)
    for column, value in where.items():
        if column not in table:
            raise ValueError(f"{name}.csv has no column {column!r}, only {[*table]}")
        table = table[table[column] == value]
    if table.empty:
        raise ValueError(f"{name}.csv has no row where {where}; change the sentence that quotes it")
    return table


def row(name: str, **where: object) -> pd.Series:
    """Returns the one row of a figure or table in which the named columns have these values.

    Raises:
        ValueError: There is no such column, no such row, or more than one.
    """
    found = rows(name, **where)
    if len(found) > 1:
        raise ValueError(f"{name}.csv has {len(found)} rows where {where}, expected one")
    return found.iloc[0]


def by_task(name: str, column: str, **where: object) -> pd.Series:
    """Returns the numbers of the four tasks, in their order.

    Raises:
        ValueError: A task has no row or several.
    """
    return pd.Series({task: row(name, task=task, **where)[column] for task in TASKS})


def fixed_share() -> float:
    """Returns the share of heads that was fixed on the held-out split of notebook 05."""
    lost, fall = lost_to_chance(), settings("X_fraction_live")["fall"]
    enough = [share for share in sorted(lost.index) if lost[share] >= fall]
    expect(enough, f"some share of heads takes the accuracy {fall:.0%} of the way to chance")
    return float(enough[0])


def lost_to_chance() -> pd.Series:
    """Returns which part of the way from the accuracy to chance each share of heads takes."""
    table = data("X_fraction_live").pivot(index="task", columns="ablation", values="accuracy")
    whole, chance = table.pop("full model"), chance_levels()
    lost = table.rsub(whole, axis=0).div(whole - chance, axis=0).clip(0, 1).mean()
    return lost.rename(float)


def rank_p_values() -> pd.Series:
    """Returns p of the selected heads' rank among random sets of the same layers, by task.

    The largest p of the turns, after Holm's correction over the tasks.
    """
    turns = rows("X_rank_among_random_live", ablation="random, same layers")
    largest = turns.groupby("task")["p"].max()
    return pd.Series(holm(largest), largest.index)[[*TASKS]]


def other_models(name: str) -> pd.DataFrame:
    """Returns the rows of the models that a table shows beside the notebook's own."""
    table = data(name)
    return table[table["model"] != settings(name)["model"]]


def repeated() -> str:
    """Returns in how many other models and tasks the primary comparison comes out the same."""
    table = other_models("X_models_live")
    fewer = (table["change"] < 0) & (table["p_holm_change"] < 0.05)
    ranked = (table["p_holm"] < 0.05).sum()
    many = "all" if fewer.all() else f"{fewer.sum()} of the"
    return (
        f"in {many} {len(table)} combinations of a task and one of "
        f"{count(table['model'].nunique())} other tiny models, significantly fewer answers are "
        "right without the heads that the model's own scores name than without other heads of the "
        f"same layers; the rank of these heads among random sets is significant in {count(ranked)}"
    )


def chance_levels() -> pd.Series:
    """Returns the accuracy of guessing among the possible answers of each task."""
    cards = pd.concat(map(pd.read_csv, sorted(paths.MODELS.glob("*/accuracy.csv"))))
    return cards.groupby("task")["chance"].max()[[*TASKS]]


def expect(holds: object, statement: str) -> None:
    """Check a comparison that a sentence makes.

    Raises:
        ValueError: The data do not agree.
    """
    if not holds:
        raise ValueError(f"The data no longer say this, so change the sentence: {statement}")


def count(number: float) -> str:
    """Returns a whole number, in words up to ten."""
    number = round(number)
    return _COUNTS[number] if 0 <= number < len(_COUNTS) else f"{number:,}"


def span(values: Iterable[float], form: str = ".0%") -> str:
    """Returns the range of some numbers: "4.4 to 10.2%", or one number if both ends are equal."""
    values = list(values)
    low, high = (format(end, form) for end in (min(values), max(values)))
    return high if low == high else f"{low.removesuffix('%')} to {high}"


def with_interval(row: pd.Series | dict[str, Any]) -> str:
    """Returns a number with its interval, two decimals each: "0.13 [0.00, 0.22]"."""
    value, low, high = (f"{row[name]:.2f}" for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def listed(parts: Iterable[str]) -> str:
    """Returns an enumeration: "a, b and c"."""
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def of_tasks(texts: Iterable[str]) -> str:
    """Returns texts of the four tasks with their names: "12% (text), 20% (image) and ..."."""
    names = TASKS.values()
    return listed(f"{text} ({name})" for text, name in zip(texts, names, strict=True))
