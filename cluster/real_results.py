"""Write the numbers of the pretrained text model, from its shipped results and without the model.

python -m cluster.real_results

They go to `data/results/real_model.csv`, one number per row. The findings of the README and the
page of the model in the documentation are written from this file.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats
from numpy.typing import NDArray

from cluster import real_documents as documents
from cluster import real_model as plan
from cluster import real_prose as prose
from cluster import real_questions as questions
from cluster import real_single as single
from cluster import real_streaming as streaming
from mmheads import answers, figures, paths, scoring, store
from mmheads.detection import strong_heads
from mmheads.effects import effects
from mmheads.heads import HeadSet
from mmheads.kept_scores import load_needle_scores
from mmheads.provenance import Provenance, code_version, library_versions
from mmheads.scores import HeadScores, concatenate
from mmheads.statistics import (
    Interval,
    bootstrap_interval,
    exact_sign_test,
    paired_difference,
)
from mmheads.tables import read_table
from mmheads.tasks.mmlongbench_docs import question_answer
from mmheads.tasks.natural_needles import score

MODEL = "qwen2.5-coder-0.5b-instruct-q4_k_m"
"""Name of the GGUF file, which identifies itself as Qwen2.5-Coder-0.5B-Instruct."""
TABLE = store.SHIPPED / "real_model.csv"
NOWHERE = paths.RUNS / "no-kept-results"
"""A folder without kept results: only what is shipped is read."""
DENSE, RANDOM = "retrieval score", "random, same layers"
"""What the dense heads are chosen by."""
Row = dict[str, Any]


def opened(
    run: figures.Run,
    model: str,
    folder: str | Path = "",
    steps: Mapping[Callable[[Sequence[str]], int], Sequence[str]] | None = None,
) -> tuple[HeadScores, figures.Run]:
    """Returns the scores of a pretrained text model, and a run whose figures name this model.

    Args:
        run: The run of a notebook.
        model: Name of the results; with the ending ".gguf", what is missing of them is computed
            first where `MMHEADS_REAL_LM` names a file of this name.
        folder: Where scores are kept; empty: `runs/scores`.
        steps: What is computed then beside the scores: commands, and the options of each.

    Raises:
        ValueError: There are no scores, or a step has failed.
    """
    file = Path(os.environ.get("MMHEADS_REAL_LM", ""))
    for command, options in ({plan.main: ["--only", "grid"]} | dict(steps or {})).items():
        if file.name == model and command([str(file), *options]):
            raise ValueError(f"{command.__module__} has failed; its message is above")
    name = model.removesuffix(".gguf")
    scores = load_needle_scores(name, tasks=[plan.TASK], folder=folder)
    of, lengths = scores.metadata, scores.metadata["length"].unique().tolist()
    print(f"{name}: {scores.geometry}")
    print(f"{len(of)} prompts: {of['haystack'].nunique()} haystacks", end=" ")
    print(f"x {of['depth'].nunique()} depths at {lengths} tokens")
    return scores, dataclasses.replace(run, models={name: scores.provenance.revision})


def shipped_scores() -> dict[str, HeadScores]:
    """Returns the shipped scores by the name of their needles.

    Raises:
        ValueError: None are shipped.
    """
    now = Provenance(code=code_version(scoring.MODULES), versions=library_versions())
    known = store.known("scores", MODEL, version=scoring.VERSION, now=now, folder=NOWHERE)
    parts: dict[str, list[HeadScores]] = {}
    for results in known:
        notes = sorted(results.notes(), key=lambda note: int(note["about"]["length"]))
        for note in notes:
            part = scoring.collect(results, note["rows"])
            parts.setdefault(note["about"]["needles"], []).append(part)
    if not parts:
        raise ValueError(f"no scores of {MODEL} are shipped; run `python -m cluster.ship`")
    return {name: concatenate(each) for name, each in parts.items()}


def _known(task: str, scores: HeadScores, folder: str | Path) -> Iterator[Row]:
    """Yields the answers to the prompts of a task, with what was done as Python values."""
    now = Provenance(code=code_version(answers.MODULES), versions=library_versions())
    model = Path(scores.provenance.model).name
    for results in store.known("answers", model, version=answers.VERSION, now=now, folder=folder):
        for row in map(results.__getitem__, sorted(results)):
            if row["task"] == task:
                heads = frozenset(map(tuple, json.loads(row["heads"])))
                whole = len(heads) == scores.geometry.size  # all dense
                how = {"heads": frozenset() if whole else heads}
                how |= {"haystack": json.loads(row["haystack"])}
                mode, when, *_ = json.loads(row["settings"])
                yield row | how | {"mode": mode, "when": when}


def _names(scores: HeadScores) -> dict[frozenset[Any], tuple[str, int]]:
    """Name and draw of each set of heads that answers were asked without."""
    names: dict[frozenset[Any], tuple[str, int]] = {frozenset(): (answers.FULL_MODEL, 0)}
    fixed = plan.selections(scores) | plan.bands(scores)
    names |= {frozenset(heads): (name, 0) for name, heads in fixed.items()}
    for fraction in plan.RANDOM_SETS:
        for draw, each in enumerate(plan.random_sets(scores.top(fraction))):
            names.setdefault(frozenset(each), (plan.random_name(fraction), draw))
    return names


def shipped_answers(
    scores: HeadScores, *, dense: bool = False, folder: str | Path = NOWHERE
) -> pd.DataFrame:
    """Returns one row per shipped answer to a needle prompt.

    Its columns: `prompt`, the number of the haystack; `depth` of the needle; `ablation` and `draw`
    of a random set; `heads`, how many were chosen; `score`, 1 for a right answer; `cpu_seconds`.

    Args:
        scores: Scores that the strongest heads are chosen by.
        dense: In place of answers without heads, those with only these heads dense.
        folder: Where answers are kept, which are returned too; empty: `runs/answers`.
    """
    names, rows = _names(scores), []
    for row in _known(plan.TASK, scores, folder):
        if row["heads"] and (row["mode"] == "stream") != dense:
            continue
        ablation, draw = names[row["heads"]]
        if row["heads"] and row["when"] in plan.WHEN:
            ablation = plan.when_name(ablation, row["when"])
        rows.append(
            {
                "prompt": row["haystack"][2],
                "depth": row["depth"],
                "ablation": ablation,
                "draw": draw,
                "heads": len(row["heads"]),
                "score": score(row["prediction"], row["answer"]),
                "cpu_seconds": row["cpu_seconds"],
            }
        )
    return pd.DataFrame(rows)


def dense_answers(scores: HeadScores, folder: str | Path = NOWHERE) -> pd.DataFrame:
    """Returns the answers with few dense heads as `mmheads.effects.effects` takes them.

    One row per answer and `share` of dense heads; the whole model's answers stand beside each
    share. `haystack` is the prompt, `inside` whether its needle is inside the window, `paired`
    whether it was asked with random dense heads too.
    """
    table = shipped_answers(scores, dense=True, folder=folder)
    table = table.assign(haystack=table["prompt"], inside=table["depth"] == 1)
    parts = []
    for share in streaming.SHARES:
        own = {plan.top_name(share): DENSE, plan.random_name(share): RANDOM}
        part = table[table["ablation"].isin([answers.FULL_MODEL, *own])].replace({"ablation": own})
        kinds = part.groupby("haystack")["ablation"].transform("nunique")
        parts.append(part[kinds > 1].assign(share=share, paired=kinds > 2))
    return pd.concat(parts, ignore_index=True)


def question_answers(scores: HeadScores, folder: str | Path = NOWHERE) -> pd.DataFrame:
    """Returns one row per shipped answer to a question about a real document.

    Its columns: `document` and `question`, their numbers; `ablation`; `draw`; `score` by
    MMLongBench's rule; `answer`, `prediction` and `cpu_seconds`.
    """
    names, rows = _names(scores), []
    for row in _known(questions.TASK, scores, folder):
        (ablation, draw), (document, question) = names[row["heads"]], row["haystack"]
        rows.append(
            {
                "document": document,
                "question": question,
                "ablation": ablation,
                "draw": draw,
                "score": question_answer(row["prediction"], row["answer"]),
                **{name: row[name] for name in ("answer", "prediction", "cpu_seconds")},
            }
        )
    return pd.DataFrame(rows)


def question_rows(table: pd.DataFrame) -> Iterator[Row]:
    """Yields the mean score of each ablation, and what it loses; documents are the units.

    Args:
        table: What `question_answers` returned.
    """
    by_question = table.pivot_table(
        index=["document", "question"], columns="ablation", values="score"
    )
    whole = by_question[answers.FULL_MODEL]
    names = [plan.top_name(share) for share in questions.SHARES]
    names.append(plan.random_name(questions.SHARE_OF_RANDOM))
    documents = table["document"].nunique()
    yield {"quantity": "documents of real questions", "about": "all", "value": documents}
    yield {"quantity": "tokens of an answer", "about": "longest", "value": questions.NEW_TOKENS}
    for name in (answers.FULL_MODEL, *names):
        yield _of_documents("score on real questions", name, by_question[name])
    for name in names:
        yield _of_documents("lost on real questions", name, whole - by_question[name])
    selected = by_question[plan.top_name(questions.SHARE_OF_RANDOM)]
    lost = by_question[names[-1]] - selected
    yield _of_documents("lost to the selected heads on real questions", names[-1], lost)


def _of_documents(quantity: str, about: str, values: pd.Series[Any]) -> Row:
    """A mean over questions, its interval over documents, and p of sign flips of differences."""
    values = values.dropna()
    sums = values.groupby("document").agg(["sum", "size"]).to_numpy(dtype=float)
    interval = bootstrap_interval(sums, lambda v: v[:, 0].sum() / v[:, 1].sum(), seed=0)
    row = {"quantity": quantity, "about": about, **interval._asdict(), "n": len(values)}
    if quantity.startswith("lost"):
        row["p"] = paired_difference(sums[:, 0], np.zeros(len(sums)), seed=0).p
    return row


def dense_rows(table: pd.DataFrame) -> Iterator[Row]:
    """Yields right answers with few dense heads, and how many more than with random ones.

    Args:
        table: What `dense_answers` returned.
    """
    for inside, part in table[table["ablation"] != RANDOM].groupby("inside"):
        where = "needle inside the window" if inside else "needle outside the window"
        for _, row in effects(part, ["share"]).iterrows():
            yield _right(row, where)
    beside = table[table["paired"] & ~table["inside"]]
    for _, row in effects(beside, ["share"], baseline=RANDOM).iterrows():
        if row["ablation"] == RANDOM:
            yield _right(row, "needle outside the window")
        elif row["ablation"] == DENSE:
            change = {"value": row["change"], "low": row["change_low"], "high": row["change_high"]}
            of = {"quantity": "points gained by dense heads", "about": f"{row['share']:.0%}"}
            yield of | change | {"n": row["n"], "p": row["p"]}


def _right(row: pd.Series[Any], where: str) -> Row:
    """A share of right answers, from a row of effects."""
    about = f"{row['share']:.0%}, {row['ablation']}, {where}"
    found: Row = {"quantity": "right answers, dense heads", "about": about, "value": row["score"]}
    return found | {name: row[name] for name in ("low", "high", "n", "p")}


def numbers() -> Iterator[Row]:
    """Yields the rows of the table: quantity, about, value, low, high, n, p."""
    by_needles = shipped_scores()
    every = min(by_needles.items(), key=lambda item: len(item[0]))[1]
    scores = plan.of_search(every)
    listed = HeadSet.load(MODEL)
    yield from _about_scores(every, listed)
    for name, others in by_needles.items():
        if others is not every:
            yield from _found_again(name, strong_heads(others), listed, others)
    table = shipped_answers(scores)
    yield from answer_rows(table)
    yield from dense_rows(dense_answers(scores))
    yield from question_rows(question_answers(scores))
    yield from single.rows(scores, NOWHERE)
    yield from prose.rows(pd.read_csv(prose.TABLE, encoding="utf-8"))
    yield from _cost_of_ranking()
    for kind in ("scores", "answers", "effects", "masses"):
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
    yield {
        "quantity": "heads of the list among the strongest",
        "about": f"{len(scores.values)} prompts",
        **_overlap(strong_heads(scores), listed, size),
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
    tops = [answers.FULL_MODEL, *map(plan.top_name, plan.FRACTIONS)]
    quantities = dict.fromkeys(tops, "right answers")
    others = dict.fromkeys((*plan.BANDS, plan.BOTTOM), "right answers, other ranks")
    for name, when in product(map(plan.top_name, plan.IN_DETAIL), plan.WHEN):
        others[plan.when_name(name, when)] = "right answers, some tokens"
    quantities |= {name: quantity for name, quantity in others.items() if name in right}
    for name in quantities:
        values = right[name].dropna()
        count, n = int(values.sum()), len(values)
        interval = scipy.stats.binomtest(count, n).proportion_ci(method="wilson")
        row = {"quantity": quantities[name], "about": name, "value": count / n, "n": n}
        row |= {"low": interval.low, "high": interval.high}
        if name != answers.FULL_MODEL:
            row["p"] = exact_sign_test(values, whole[values.index])
        yield row
    for fraction, draws in plan.RANDOM_SETS.items():
        name = plan.random_name(fraction)
        drawn = table[(table["ablation"] == name) & (table["draw"] < draws)]
        asked = zip(drawn["prompt"], drawn["draw"], strict=True)
        drawn = drawn[
            np.array([prompt in plan.part_of(draw) for prompt, draw in asked], dtype=bool)
        ]
        if len(set(drawn["prompt"])) > 1:
            selected = right[plan.top_name(fraction)]
            yield from _about_random_sets(name, drawn, whole, selected)


def _about_random_sets(
    name: str, drawn: pd.DataFrame, whole: pd.Series[Any], selected: pd.Series[Any]
) -> Iterator[Row]:
    """Rows about random sets beside as many selected heads; `selected` is by prompt.

    Each set was asked with one part of the prompts. If the selected heads were random, too, each
    of their ranks among the sets would be equally likely in any part. The rank that is given is
    that of the part in which most sets do as much harm.
    """
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
    by_set = drawn.groupby("draw")["score"].mean()
    by_part = selected[same].groupby(same // plan.PART).mean()
    beside = by_part[[plan.part_of(draw)[0] // plan.PART for draw in by_set.index]]
    harmful = int((by_set <= by_part.max()).sum())
    yield {
        "quantity": "random sets that do as much harm",
        "about": name,
        "value": harmful,
        "n": len(by_set),
        "p": (1 + harmful) / (1 + len(by_set)),
    }
    yield {
        "quantity": "random sets that do as much harm on the same prompts",
        "about": name,
        "value": int((by_set.to_numpy() <= beside.to_numpy()).sum()),
        "n": len(by_set),
    }
    yield {"quantity": "answers without random sets", "about": name, "value": len(drawn)}


def _cost_of_ranking() -> Iterator[Row]:
    """CPU seconds of an index and of a question: of the median document, and all by all pages."""
    for path in sorted((store.SHIPPED / documents.KIND).glob(f"{MODEL}-*.parquet")):
        about, scalars, _ = read_table(path)
        if about["provenance"]["settings"].get("characters") != documents.CHARACTERS:
            continue
        spent = scalars.to_pandas().groupby(["document", "question"])["cpu_seconds"]
        spent = spent.agg(["sum", "size"]).reset_index("question")
        index, asked = spent[spent["question"] < 0], spent[spent["question"] >= 0]
        for name, rows in (("index", index), ("question", asked)):
            by_page = rows["sum"].sum() / rows["size"].sum()
            for per, value in (("document", rows["sum"].median()), ("page", by_page)):
                of = {"quantity": f"CPU seconds of a ranking, {name}", "about": f"per {per}"}
                yield of | {"value": value, "n": len(rows)}


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
