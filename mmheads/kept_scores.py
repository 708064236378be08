"""Scores of needles read from the results store without the model, and a check of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mmheads import store
from mmheads.examples import Example
from mmheads.models import VLM
from mmheads.provenance import Provenance, code_version, library_versions
from mmheads.scores import HeadScores, concatenate
from mmheads.scoring import MODULES, VERSION, collect, needle_condition, score_heads
from mmheads.tasks.grids import TASKS, Grid
from mmheads.tasks.needles import GENERATED


def load_needle_scores(
    model: str,
    lengths: Sequence[int] = (),
    *,
    tasks: Sequence[str] = TASKS,
    split: str = "detection",
    null_images: str = "placeholders",
    folder: str | Path = "",
) -> HeadScores:
    """Needle scores that are shipped, or that `score_needles` has kept, read without the model.

    Scores on published haystacks are preferred to those on generated ones.

    Args:
        model: Name of the model.
        lengths: Context lengths; by default all that the first task was scored at.
        tasks: Needle tasks.
        split: See `score_needles`.
        null_images: See `score_heads`.
        folder: See `score_needles`.

    Raises:
        ValueError: A task and length was not scored, or scores of several revisions or settings
            are there; the message names the difference.
    """
    name, place = Path(model).name, store.kept_folder("scores", folder)
    stored = [
        (results, conditions)
        for results in _stored(name, null_images, folder)
        if (conditions := _needle_conditions(results, split))
    ]
    if not stored:
        raise ValueError(f"{place} holds no needle scores of {name}; run notebook 02 first")
    (results, conditions), *others = stored
    if others:
        different = others[0][0].provenance.differences(results.provenance)
        raise ValueError(
            f"{place} holds needle scores of {name} that were computed in several ways "
            f"({different}); delete those that you do not want"
        )
    kinds = {kind for kind, _, _ in conditions}
    kind = min(kinds, key=lambda kind: (kind == GENERATED.name, kind))
    known = sorted(length for of, task, length in conditions if (of, task) == (kind, tasks[0]))
    parts = []
    for task, length in product(tasks, lengths or known):
        rows = conditions.get((kind, task, length))
        if rows is None:
            raise ValueError(
                f"{place} holds no scores of {name} on {task} at length {length} ({kind} needles, "
                f"split {split}); run notebook 02 with this model and these lengths"
            )
        parts.append(collect(results, rows))
    return concatenate(parts)


def count_scored(
    model: str,
    task: str,
    length: int,
    *,
    split: str = "detection",
    null_images: str = "placeholders",
    folder: str | Path = "",
    fresh: bool = False,
    source: Grid = GENERATED,
) -> int:
    """Number of examples of a condition that are scored already, found without the model.

    Code, libraries and the null question are compared; weights, template and precision are when
    the run starts.

    Args:
        model: Name of the model.
        task: As in `score_needles`, like all that follow.
        length: Context length.
        split: Which examples.
        null_images: See `score_heads`.
        folder: Folder of the store.
        fresh: Leave out shipped results.
        source: What makes the examples.
    """
    condition = needle_condition(task, length, split, source)
    counts = [
        len(note["rows"])
        for results in _stored(Path(model).name, null_images, folder, fresh)
        for note in results.notes()
        if note["about"] == condition
    ]
    return max(counts, default=0)


def recompute_needles(
    vlm: VLM,
    scores: HeadScores,
    *,
    per_task: int = 2,
    split: str = "detection",
    null_images: str = "placeholders",
    seed: int = 0,
    source: Grid = GENERATED,
) -> pd.DataFrame:
    """Compute some needle scores again: a check of those that were shipped or kept.

    Args:
        vlm: The model.
        scores: What `score_needles` returned.
        per_task: Examples of each task, drawn by the seed.
        split: As `score_needles` was given.
        null_images: See `score_heads`.
        seed: Seed of the draw.
        source: What made the examples.

    Returns:
        One row per example: task, length, depth, haystack, example, and the largest `difference`
        of a head's score.

    Raises:
        ValueError: The source does not make the examples that were scored.
    """
    drawn = scores.metadata.groupby("task", sort=False).sample(per_task, random_state=seed)
    count = scores.metadata["haystack"].nunique()
    examples = [_remade(source, row, count, split) for row in drawn.to_dict("records")]
    again = score_heads(vlm, examples, null_images=null_images, progress=False)
    difference = np.abs(again.values - scores.values[drawn.index]).max(axis=(1, 2))
    columns = ["task", "length", "depth", "haystack", "example"]
    return drawn[columns].assign(difference=difference).reset_index(drop=True)


def _remade(source: Grid, row: Mapping[Any, Any], count: int, split: str) -> Example:
    """The example of a row of metadata, made again among the first haystacks of the source."""
    where = [row["task"]], [row["length"]], [row["depth"]]
    for example in source.generate(*where, count, split=split):
        if example.fingerprint() == row["example"]:
            return example
    raise ValueError(
        f"none of the first {count} haystacks of {row['task']!r} at length {row['length']} and "
        f"depth {row['depth']:g} is the example that was scored; give the source and the split "
        "that the scores were made with"
    )


def _needle_conditions(
    results: store.Results, split: str
) -> dict[tuple[str, str, int], list[dict[str, Any]]]:
    """Rows of each condition by kind of needles, task and length; haystacks are half pages."""
    return {
        (about["needles"], about["task"], about["length"]): note["rows"]
        for note in results.notes()
        if "needles" in (about := note["about"])
        and about["split"] == split
        and about.get("image_ratio", 0.5) == 0.5
    }


def _stored(
    model: str, null_images: str, folder: str | Path, fresh: bool = False
) -> list[store.Results]:
    """Results of a model by its name that the present code would give."""
    now = Provenance(code=code_version(MODULES), versions=library_versions())
    known = store.known("scores", model, version=VERSION, now=now, folder=folder, fresh=fresh)
    return [each for each in known if each.provenance.settings.get("null_images") == null_images]
