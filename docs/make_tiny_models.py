"""Write the comparison of the tiny models in `docs/tiny_models.md` from the tables of their cards.

python docs/make_tiny_models.py
"""

import json
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pages
import pandas as pd

from mmheads import figures, paths
from tiny_models.recipes import RECIPES

PAGE = Path(__file__).with_name("tiny_models.md")
START = "<!-- comparison: written by docs/make_tiny_models.py -->"
END = "<!-- end of the comparison -->"
TASKS = figures.TASK_NAMES
FRACTION = 0.05
"""Share of heads in the top sets that are compared."""

Tables = dict[str, pd.DataFrame]


def tables(kind: str) -> Tables:
    """Returns one table of every card ("accuracy" or "structure") by model, text models first."""
    found = {}
    for path in paths.MODELS.glob(f"*/{kind}.csv"):
        config = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
        key = ("vision_config" in config, path.parent.name)
        found[key] = pd.read_csv(path, encoding="utf-8")
    return {name: found[vision, name] for vision, name in sorted(found)}


def answers(accuracy: Tables) -> Iterator[str]:
    """Yields a table of right answers with the needle, by model, task and length."""
    lengths = sorted({int(n) for table in accuracy.values() for n in table["length"]})
    yield f"| model | task | {' | '.join(map(str, lengths))} | n |"
    yield "|" + "---|" * (len(lengths) + 3)
    for model, table in accuracy.items():
        present = table[table["needle"] == "present"]
        for task, name in TASKS.items():
            cells = present[present["task"] == task].groupby("length")[["right", "n"]].sum()
            if len(cells):
                shares = [f"{100 * cells.right[n] / cells.n[n]:.0f}" for n in lengths]
                yield f"| {model} | {name} | {' | '.join(shares)} | {cells.n.min()} |"


def sparsity(structure: Tables) -> Iterator[str]:
    """Yields a table with the share of heads that hold half of the score."""
    yield f"| model | {' | '.join(TASKS.values())} |"
    yield "|" + "---|" * (len(TASKS) + 1)
    for model, table in structure.items():
        rho = table[table["measure"] == "rho"].set_index("a")["value"]
        shares = [f"{100 * rho[task]:.1f}" if task in rho else "-" for task in TASKS]
        yield f"| {model} | {' | '.join(shares)} |"


def compared(table: pd.DataFrame, measure: str, a: str, b: str) -> pd.Series:
    """Returns the row of a structure table that compares two top sets."""
    right = (table["measure"] == measure) & (table["a"] == a) & (table["b"] == b)
    (index,) = table.index[right & (table["fraction"] == FRACTION)]
    return table.loc[index]


def sharing(structure: Tables) -> Iterator[str]:
    """Yields a table of overlaps between tasks, and with the text model, by model."""
    pairs = [("overlap", a, b) for a, b in combinations(TASKS, 2)]
    pairs += [("kept", task, "predecessor") for task in TASKS]
    yield f"| top {FRACTION:.0%} of the heads | {' | '.join(structure)} |"
    yield "|" + "---|" * (len(structure) + 1)
    for measure, a, b in pairs:
        rows = [compared(table, measure, a, b) for table in structure.values()]
        cells = [f"{row['value']:.2f} ({row['ceiling']:.2f})" for row in rows]
        beside = "text of the text model" if measure == "kept" else TASKS[b]
        yield f"| {TASKS[a]}, {beside} | {' | '.join(cells)} |"


def ablated(ablation: Tables, fraction: float) -> pd.DataFrame:
    """Returns right answers by model and task, as shares, without heads that make up a fraction.

    The column "random" is the mean over the random sets of the same layers.
    """
    rows = pd.concat([table.assign(model=model) for model, table in ablation.items()])
    rows = rows.assign(share=rows["right"] / rows["n"])[rows["fraction"] == fraction]
    by = rows.groupby(["model", "task", "ablation"], sort=False)["share"]
    return by.mean().unstack("ablation")


def losses(ablation: Tables) -> Iterator[str]:
    """Yields a table of right answers without the strongest and without random heads."""
    fractions = sorted({f for table in ablation.values() for f in table["fraction"]})
    names = [f"{kind} {f:.0%}" for f in fractions for kind in ("strongest", "random")]
    yield f"| model | task | whole model | {' | '.join(names)} |"
    yield "|" + "---|" * (len(names) + 3)
    columns = {f: ablated(ablation, f) for f in fractions}
    for model, table in ablation.items():
        for task in table["task"].unique():
            rows = [columns[f].loc[model, task] for f in fractions]
            shares = [
                rows[0]["full model"],
                *(row[kind] for row in rows for kind in ("top", "random")),
            ]
            cells = " | ".join(f"{100 * share:.0f}" for share in shares)
            yield f"| {model} | {TASKS[task]} | {cells} |"


def again(structure: Tables) -> Iterator[str]:
    """Yields, for each model that was trained with another seed, what it shares with the first."""
    for model, table in structure.items():
        if not (table["measure"] == "seeds").any():
            continue
        rows = {name: compared(table, "seeds", task, "seed 0") for task, name in TASKS.items()}
        shares = [f"{r['value']:.2f} ({name}; {r['ceiling']:.2f})" for name, r in rows.items()]
        yield ""
        yield (
            f"`{model}` went through the same stages with another seed. It shares these parts of "
            f"its top {FRACTION:.0%} with the first run (after each task, what random halves "
            f"share): {', '.join(shares)}. The text model, from which both start, was trained once."
        )


def text() -> str:
    """Returns the comparison as the page shows it."""
    accuracy, structure = tables("accuracy"), tables("structure")
    seeing = {n: t for n, t in structure.items() if (t["measure"] == "overlap").any()}
    shared = {
        b: [compared(table, "overlap", "text", b)["value"] for table in seeing.values()]
        for b in ("rendered_text", "image")
    }
    more = sum(a > b for a, b in zip(shared["rendered_text"], shared["image"], strict=True))
    equal = sum(a == b for a, b in zip(shared["rendered_text"], shared["image"], strict=True))
    chance = {n: compared(t, "overlap", "text", "image")["chance"] for n, t in seeing.items()}
    usual = min(chance.values())
    others = [f", and {each:.2f} for `{n}`" for n, each in chance.items() if each > usual + 0.01]
    (start, count), *_ = Counter(RECIPES[name].start for name in seeing).most_common(1)
    lines = [
        "Right answers in percent, by length of the prompt in tokens (the cards have intervals):",
        "",
        *answers(accuracy),
        "",
        "Percent of the heads that hold half of the positive retrieval score at 512 tokens:",
        "",
        *sparsity(structure),
        "",
        "Share of the strongest 5% of the heads that two tasks have in common, or that a task has "
        "in common with text in the text model; in brackets, what random halves of the "
        f"haystacks have in common, a rough ceiling. Chance is {usual:.2f}{''.join(others)}.",
        "",
        *sharing(seeing),
        "",
        "Right answers in percent without the strongest heads of the task, and without as many "
        "random heads of the same layers, at 512 tokens (30 prompts per task; for random heads, "
        "the mean of 20 sets, each with one prompt per depth; where the global layers of Gemma 3 "
        "have too few heads left, the nearest layers give the rest):",
        "",
        *losses(tables("ablation")),
        "",
        f"Text shares more of its top 5% with rendered text than with images in {more} of the "
        f"{len(seeing)} models, and as many in {equal}. Of these models, {count} "
        f"start from `{start}`, so "
        "these are not independent of each other.",
        *again(structure),
    ]
    return "\n".join(lines)


def with_comparison(page: str) -> str:
    """Returns the text of the page with the comparison of today.

    Raises:
        ValueError: The page does not have both marks, each once.
    """
    what = f"comparisons in {PAGE.name}"
    return pages.with_part(page, START, END, f"\n{text()}\n", what)


def write() -> None:
    """Write the comparison into the page, unless it is there already."""
    pages.write(PAGE, with_comparison(PAGE.read_text(encoding="utf-8")))


if __name__ == "__main__":
    write()
