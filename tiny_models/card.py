"""Measure a tiny model and write its card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from scipy.stats import binom, binomtest

from mmheads import paths
from mmheads.models import load
from mmheads.tasks.needles import LENGTHS
from tiny_models import measure
from tiny_models.train import training_facts

AIM, IDENTICAL_AIM = 0.95, 0.90
"""Least accuracy at every length that a model is trained for."""
TABLES = ("accuracy", "structure", "ablation")


def report(
    folder: str | Path,
    predecessor: str | Path = "",
    twin: str | Path = "",
    haystacks: int = 20,
    threads: int = 2,
    lengths: Sequence[int] = LENGTHS,
    length: int = 512,
) -> Path:
    """Measure accuracy, structure and ablation, and write three tables and the card `README.md`.

    Args:
        folder: A checkpoint that `tiny_models` trained.
        predecessor: Checkpoint of the text model that it was trained from, to see which heads are
            kept.
        twin: Checkpoint of the model that was trained in the same way with seed 0, if any.
        haystacks: Examples per depth.
        threads: Threads of PyTorch.
        lengths: Lengths in tokens at which accuracy is measured.
        length: Length in tokens at which heads are scored and ablated.

    Returns:
        The path of the card.

    Raises:
        ValueError: The folder holds a model that this code did not train, so that its card must
            not be written over; or `haystacks` is less than 2.
    """
    folder = Path(folder)
    facts = training_facts(folder)
    if haystacks < 2:
        raise ValueError(f"haystacks is {haystacks}; expected 2 or more")
    torch.set_num_threads(threads)
    vlm = load(folder, dtype=torch.float32)
    by_task = measure.scores(vlm, length, haystacks)
    before, same = (
        measure.scores(load(other, dtype=torch.float32), length, haystacks) if other else {}
        for other in (predecessor, twin)
    )
    tables = {
        "structure": measure.structure(by_task, before.get("text"), same),
        "ablation": measure.ablation(vlm, by_task, length=length, haystacks=max(2, haystacks // 4)),
        "accuracy": measure.accuracy(vlm, haystacks, lengths),
    }
    for name, table in tables.items():
        with paths.write_whole(folder / f"{name}.csv") as path:
            table.to_csv(path, index=False, float_format="%.4f")
    with paths.write_whole(folder / "README.md") as path:
        path.write_text(text(folder, facts, length), encoding="utf-8")
    return folder / "README.md"


def text(folder: Path, facts: dict[str, Any], length: int = 512) -> str:
    """The card of a model, from the files beside it."""
    accuracy, structure, ablation = (pd.read_csv(folder / f"{name}.csv") for name in TABLES)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    language = config.get("text_config", config)
    layers, heads = language["num_hidden_layers"], language["num_attention_heads"]
    vision = "vision_config" in config
    name = facts["name"]
    start = f"the weights of {facts['start']}" if facts["start"] else "random weights"
    seeds = (structure["measure"] == "seeds").any()
    other = '; "seeds" compares with the same task of the model of seed 0' if seeds else ""
    left = f"\n\n**Not finished.** These stages are left: {'; '.join(facts['left'])}."
    loader = "AutoModelForImageTextToText" if vision else "AutoModelForCausalLM"
    sliding = language.get("layer_types", []).count("sliding_attention")
    window = f"""
- **Layers**: {sliding} of the {layers} layers see only the last
  {language.get("sliding_window")} tokens. Their heads count in "rho", but are never selected. The
  random sets hold some of them where the other layers have too few left."""
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: {"image-text-to-text" if vision else "text-generation"}
tags: [mmheads, interpretability, retrieval-heads]
---

# {name}

A tiny {config["architectures"][0]} (a stock class that loads without our code) for finding a needle
in {"interleaved text and pages" if vision else "text"} of up to 2,048 tokens. It stands in for
large models where attention heads are studied on a laptop; it knows nothing else.{
        left if facts["left"] else ""
    }

- **Size**: {layers} layers with {heads} heads each ({layers * heads} heads) in
  {language["num_key_value_heads"]} KV groups per layer;
  {(folder / "model.safetensors").stat().st_size / 1e6:.1f} MB of float16 weights.{
        window if sliding else ""
    }
- **Data**: documents drawn by `tiny_models/samples.py` during training, each seen once.
- **Training**: from {start}, {facts["steps"]:,} steps in {facts["minutes"]:.0f} minutes; the last
  sitting on {facts["machine"]} with {facts["threads"]} threads, torch {facts["torch"]},
  transformers {facts["transformers"]}, seed {facts["seed"]}. Stages of `tiny_models/recipes.py`:
  {"; ".join(facts["stages"])}. `training.csv` has every 25th step.

Training follows the order in which large models are trained: the language model has its skills
first, with pages written as the words that they show; then the vision tower learns to give these
words' embeddings; then everything is trained together. **This order probably produces much of the
sharing of heads between text and pages that is measured below.** The model illustrates the finding
of the papers and explains one cause of it; it does not replicate it.

```sh
python -m tiny_models train {name}
python -m tiny_models report {name}
```

The first command trains the model again by the same stages and seed; a checkpoint that was made in
several sittings is rounded to 16 bits where a stage restarts, as the recipe does too. The second
command wrote this card.

```python
import torch
from transformers import {loader}

folder = "data/models/{name}"
model = {loader}.from_pretrained(folder, dtype=torch.float32)
```

## Accuracy on unseen examples

Percent of right greedy answers by length of the prompt in tokens, in float32 over
{accuracy.depth.nunique()} depths; brackets are 95% Wilson intervals, n is the number of examples
per cell. "Removed" counts the answer that was right with the needle, so it should be at chance; in
identical_image it counts "no". "Changed" counts answers that follow another needle.

{_accuracy_table(accuracy).to_markdown(index=False)}

{_aims(accuracy)}

## Which heads do it

Calibrated retrieval scores of paper A at {
        length
    } tokens, on the detection split. "rho" is the share of
heads that hold half of the positive score. Overlaps are shares of top sets in common, beside their
chance level and the ceiling that random halves of the haystacks reach ("halves"); "kept" compares
with the text heads of the model that this one was trained from{other}.

{_structure_table(structure).to_markdown(index=False)}

## Without these heads

Percent of right answers at {
        length
    } tokens with heads set to zero; identical_image has as many examples
with the answer "yes" as with "no". "Top" are the task's own heads; "bootstrap" are top sets by
resampled haystacks, and the column shows the median and how many of them take away at least half of
what the whole model has above chance; "random" are sets with as many heads in each layer and none
of the selected ones (median, and the share of sets that leave at least 90%).

{_ablation_table(ablation, accuracy).to_markdown(index=False)}
"""


def _accuracy_table(accuracy: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for (task, needle), group in accuracy.groupby(["task", "needle"], sort=False):
        sizes = sorted(set(group.groupby("length").n.sum()))
        row: dict[str, Any] = {"task": task, "needle": needle}
        row |= {"n": "/".join(map(str, sizes)), "chance": f"{100 * group.chance.iloc[0]:.0f}"}
        for length, cell in group.groupby("length"):
            right, n = int(cell.right.sum()), int(cell.n.sum())
            interval = binomtest(right, n).proportion_ci(method="wilson")
            ends = f"[{100 * interval.low:.0f}, {100 * interval.high:.0f}]"
            row[str(length)] = f"{100 * right / n:.1f} {ends}"
        rows.append(row)
    return pd.DataFrame(rows)


def shortfalls(accuracy: pd.DataFrame) -> list[str]:
    """Tasks and lengths that miss their aim.

    With the needle, with a changed one, and for "no" without it: 95% (90% in identical_image).
    For other answers without it: no more right answers than chance gives in all but one of a
    thousand cases.
    """
    missed = []
    for (task, needle, length), cell in accuracy.groupby(["task", "needle", "length"], sort=False):
        right, n = int(cell.right.sum()), int(cell.n.sum())
        if needle != "removed" or task == "identical_image":
            short = right / n < (IDENTICAL_AIM if task == "identical_image" else AIM)
        else:
            short = right > binom.isf(1e-3, n, cell.chance.iloc[0])
        if short:
            missed.append(f"{task}, needle {needle}, {length} tokens ({100 * right / n:.0f}%)")
    return missed


def _aims(accuracy: pd.DataFrame) -> str:
    short = shortfalls(accuracy)
    aim = f"The aim is {AIM:.0%} ({IDENTICAL_AIM:.0%} in identical_image) at every length."
    return f"{aim} **It is missed here**: {'; '.join(short)}." if short else f"{aim} It is reached."


def _structure_table(structure: pd.DataFrame) -> pd.DataFrame:
    table = structure.astype(object).where(structure.notna(), "")
    for column in ("value", "chance", "ceiling"):
        table[column] = [f"{v:.2f}" if v != "" else "" for v in table[column]]
    return table


def _ablation_table(ablation: pd.DataFrame, accuracy: pd.DataFrame) -> pd.DataFrame:
    chances = accuracy.groupby("task").chance.first()
    rows = []
    conditions = ablation[["task", "fraction"]].drop_duplicates()
    for task, fraction in conditions.itertuples(index=False):
        group = ablation[(ablation.task == task) & (ablation.fraction == fraction)]
        share = (group.right / group.n).groupby(group.ablation)
        whole = share.get_group("full model").iloc[0]
        half = chances[task] + (whole - chances[task]) / 2
        bootstrap, random = share.get_group("bootstrap"), share.get_group("random")
        rows.append(
            {
                "task": task,
                "heads": f"{fraction:.0%} ({group.heads.iloc[0]})",
                "whole model": f"{whole:.0%}",
                "top": f"{share.get_group('top').iloc[0]:.0%}",
                "bootstrap": f"{bootstrap.median():.0%}, {(bootstrap <= half).mean():.0%} broken",
                "random": f"{random.median():.0%}, {(random >= 0.9 * whole).mean():.0%} intact",
                "n": int(group.n.iloc[0]),
            }
        )
    return pd.DataFrame(rows)
