"""Write the numbers of the pretrained text model, from its shipped results and without the model.

python -m cluster.real_results

They go to `data/results/real_model.csv`, one number per row. The findings of the README and the
page of the model in the documentation are written from this file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats
from numpy.typing import NDArray

from cluster import real_model as plan
from mmheads import answers, paths, scoring, store
from mmheads.detection import strong_heads
from mmheads.heads import HeadSet
from mmheads.provenance import Provenance, code_version, library_versions
from mmheads.scores import HeadScores, concatenate
from mmheads.statistics import Interval, bootstrap_interval, exact_sign_test
from mmheads.tables import read_table
from mmheads.tasks.natural_needles import score

MODEL = "qwen2.5-coder-0.5b-instruct-q4_k_m"
"""Name of the GGUF file, which identifies itself as Qwen2.5-Coder-0.5B-Instruct."""
TABLE = store.SHIPPED / "real_model.csv"
Row = dict[str, Any]


def shipped_scores() -> dict[str, HeadScores]:
    """Returns the shipped scores by the name of their needles.

    Raises:
        ValueError: None are shipped.
    """
    now = Provenance(code=code_version(scoring.MODULES), versions=library_versions())
    nowhere = paths.RUNS / "no-kept-results"
    known = store.known("scores", MODEL, version=scoring.VERSION, now=now, folder=nowhere)
    parts: dict[str, list[HeadScores]] = {}
    for results in known:
        notes = sorted(results.notes(), key=lambda note: int(note["about"]["length"]))
        for note in notes:
            part = scoring.collect(results, note["rows"])
            parts.setdefault(note["about"]["needles"], []).append(part)
    if not parts:
        raise ValueError(f"no scores of {MODEL} are shipped; run `python -m cluster.ship`")
    return {name: concatenate(each) for name, each in parts.items()}


def shipped_answers(scores: HeadScores) -> pd.DataFrame:
    """Returns one row per shipped answer.

    Its columns: `prompt`, the number of the haystack; `ablation` and `draw` of a random set;
    `heads`, how many are ablated; `score`, 1 for a right answer; `cpu_seconds`.

    Args:
        scores: Scores that the strongest heads are chosen by.
    """
    names: dict[frozenset[Any], tuple[str, int]] = {frozenset(): (answers.FULL_MODEL, 0)}
    names |= {frozenset(s): (name, 0) for name, s in plan.selections(scores).items()}
    for fraction in plan.CONTROLLED:
        for draw, each in enumerate(plan.random_sets(scores.top(fraction))):
            names.setdefault(frozenset(each), (plan.random_name(fraction), draw))
    rows = []
    for path in sorted((store.SHIPPED / "answers").glob(f"{MODEL}-*.parquet")):
        for row in read_table(path)[1].to_pylist():
            ablated = frozenset(map(tuple, json.loads(row["heads"])))
            ablation, draw = names[ablated]
            rows.append(
                {
                    "prompt": json.loads(row["haystack"])[2],
                    "ablation": ablation,
                    "draw": draw,
                    "heads": len(ablated),
                    "score": score(row["prediction"], row["answer"]),
                    "cpu_seconds": row["cpu_seconds"],
                }
            )
    return pd.DataFrame(rows)


def numbers() -> Iterator[Row]:
    """Yields the rows of the table: quantity, about, value, low, high, n, p."""
    by_needles = shipped_scores()
    scores = min(by_needles.items(), key=lambda item: len(item[0]))[1]
    listed = HeadSet.load(MODEL)
    yield from _about_scores(scores, listed)
    for name, others in by_needles.items():
        if others is not scores:
            yield from _found_again(name, strong_heads(others), listed, others)
    table = shipped_answers(scores)
    yield from answer_rows(table)
    for kind in ("scores", "answers", "masses"):
        yield {"quantity": "CPU minutes", "about": kind, "value": _seconds(kind) / 60}


def _about_scores(scores: HeadScores, listed: HeadSet) -> Iterator[Row]:
    size = listed.geometry.size
    lengths = sorted(set(scores.metadata["length"]))
    for length in (*lengths, "all"):
        part = scores if length == "all" else scores.select(length=length)
        value = _sparsity(part)
        yield {
            "quantity": "share of heads with half of the score",
            "about": str(length),
            **value._asdict(),
        }
    by_haystack = scores.by_haystack().mean(axis=1)
    for head in listed:
        value = bootstrap_interval(by_haystack[:, head.layer, head.head], seed=0)
        yield {"quantity": "score", "about": str(head), **value._asdict()}
    for length in lengths[1:]:
        short, long = (scores.select(length=n).top(plan.MAIN) for n in (lengths[0], length))
        yield {
            "quantity": "heads shared by two lengths",
            "about": f"{lengths[0]} and {length}",
            "value": len(short & long),
            "n": len(short),
        }
    numbers = scores.metadata["haystack"].map(lambda text: json.loads(text)[2]).to_numpy()
    even, odd = (strong_heads(scores.take(numbers % 2 == half)) for half in (0, 1))
    yield {
        "quantity": "heads shared by the halves",
        "about": f"{len(scores.values)} prompts",
        **_overlap(even, odd, size),
    }


def _found_again(
    name: str, repeated: HeadSet, listed: HeadSet, scores: HeadScores
) -> Iterator[Row]:
    yield {
        "quantity": "heads found again",
        "about": f"{name}, {len(scores.values)} prompts of {scores.metadata['length'].max()}",
        **_overlap(repeated, listed, listed.geometry.size),
    }


def _overlap(first: HeadSet, second: HeadSet, size: int) -> Row:
    """Heads that two sets share, how many random sets would share, and a one-sided p-value."""
    shared = len(first & second)
    p = scipy.stats.hypergeom.sf(shared - 1, size, len(first), len(second))
    return {
        "value": shared,
        "chance": len(first) * len(second) / size,
        "n": len(second),
        "p": float(p),
    }


def _sparsity(scores: HeadScores) -> Interval:
    """Share of heads that hold half of the positive mean score, haystacks being resampled."""
    _, of = np.unique(scores.metadata["haystack"], return_inverse=True)
    rows = [np.flatnonzero(of == number) for number in range(of.max() + 1)]

    def share(chosen: NDArray[Any]) -> float:
        return scores.take(np.concatenate([rows[int(number)] for number in chosen])).sparsity(0.5)

    return bootstrap_interval(np.arange(len(rows)), share, seed=0)


def answer_rows(table: pd.DataFrame) -> Iterator[Row]:
    """Yields the rows about answers: of the whole model, without top heads, without random sets.

    Args:
        table: What `shipped_answers` returned.
    """
    right = table.pivot_table(index="prompt", columns="ablation", values="score")
    whole = right[answers.FULL_MODEL]
    for name in (answers.FULL_MODEL, *map(plan.top_name, plan.FRACTIONS)):
        values = right[name].dropna()
        count, n = int(values.sum()), len(values)
        interval = scipy.stats.binomtest(count, n).proportion_ci(method="wilson")
        row = {"quantity": "right answers", "about": name, "value": count / n, "n": n}
        row |= {"low": interval.low, "high": interval.high}
        if name != answers.FULL_MODEL:
            row["p"] = exact_sign_test(values, whole[values.index])
        yield row
    for fraction in plan.CONTROLLED:
        name = plan.random_name(fraction)
        drawn = table[table["ablation"] == name]
        if len(set(drawn["prompt"])) > 1:
            selected = right[plan.top_name(fraction)]
            yield from _about_random_sets(name, drawn, whole, selected)


def _about_random_sets(
    name: str, drawn: pd.DataFrame, whole: pd.Series[Any], selected: pd.Series[Any]
) -> Iterator[Row]:
    """Rows about random sets beside as many selected heads; `selected` is by prompt."""
    by_prompt = drawn.groupby("prompt")["score"].mean()
    same = by_prompt.index
    yield {
        "quantity": "right answers",
        "about": name,
        **bootstrap_interval(by_prompt, seed=0)._asdict(),
        "p": exact_sign_test(by_prompt, whole[same]),
    }
    yield {
        "quantity": "points lost to the selected heads",
        "about": name,
        **bootstrap_interval(by_prompt - selected[same], seed=0)._asdict(),
        "p": exact_sign_test(by_prompt, selected[same]),
    }
    yield {"quantity": "random sets", "about": name, "value": drawn["draw"].nunique()}
    yield {"quantity": "answers without random sets", "about": name, "value": len(drawn)}


def _seconds(kind: str) -> float:
    files = (store.SHIPPED / kind).glob(f"{MODEL}-*.parquet")
    return sum(sum(read_table(path)[1]["cpu_seconds"].to_pylist()) for path in files)


def table() -> pd.DataFrame:
    """Returns the numbers as they are written."""
    columns = ["quantity", "about", "value", "low", "high", "n", "chance", "p"]
    return pd.DataFrame(list(numbers()), columns=columns)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the table; returns the exit code."""
    try:
        written = table()
    except (ValueError, OSError) as error:
        print(f"cluster.real_results: {error}", file=sys.stderr)
        return 1
    with paths.write_whole(TABLE) as path:
        written.to_csv(path, index=False, lineterminator="\n")
    print(written.to_string())
    return 0


if __name__ == "__main__":
    sys.exit(main())
