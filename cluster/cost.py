"""What a run will compute and what that costs: prompts x tokens x passes, and what a GPU needs.

Costs are estimates, from the model's size and from the logs that paper A's authors published.
"""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cluster.models import HIDDEN_STATES, MODELS, Size, name_of, size_of
from cluster.notebooks import Job
from cluster.scores import ScoreRun, merged

SCORING = (1.07, 1.42)
"""Time of scoring with the null question to that of a plain pass, least and most, as
`python -m benchmarks scoring` measured it on two CPU cores."""
USABLE = 0.9
"""Share of a GPU's memory that a run may take."""


@dataclass(frozen=True)
class GPU:
    """A GPU as its maker states it.

    Attributes:
        memory: Bytes.
        peak: Dense bfloat16 operations per second.
    """

    memory: float
    peak: float


GPUS = {
    "A100-80GB": GPU(80e9, 312e12),
    "H100": GPU(80e9, 989e12),
    "H200": GPU(141e9, 989e12),
    "L40S": GPU(48e9, 362e12),
}
LOGGED = "Qwen/Qwen3-VL-8B-Instruct"
LOGS = {8192: (0.15, 0.08), 131072: (0.021, 0.012)}
"""Prompts per second, fastest and slowest, by context length: paper A's own logs of `LOGGED`, null
question included. They do not name their GPU."""
TAKEN_FOR = "A100-80GB"
"""The GPU that the logs are taken for: their 47 to 53 GB did not fit a smaller one."""


@dataclass(frozen=True)
class Speed:
    """How fast prompts are scored.

    Attributes:
        overhead: Seconds that every prompt takes beside its pass.
        utilisation: Share of the GPU's peak that a pass reaches.
    """

    overhead: float
    utilisation: float

    def seconds(self, size: Size, tokens: int, gpu: GPU) -> float:
        """Returns the estimated seconds to score one prompt."""
        return self.overhead + size.operations(tokens) / (gpu.peak * self.utilisation)


def speeds() -> tuple[Speed, Speed]:
    """Returns the fastest and the slowest that the logs allow: a line through their two lengths."""
    short, long = LOGS
    work = MODELS[LOGGED].operations(long) - MODELS[LOGGED].operations(short)
    fitted = []
    for fewest, most in zip(LOGS[short], LOGS[long], strict=True):
        rate = work / (1 / most - 1 / fewest)
        overhead = 1 / fewest - MODELS[LOGGED].operations(short) / rate
        fitted.append(Speed(overhead, rate / GPUS[TAKEN_FOR].peak))
    return fitted[0], fitted[1]


def gpus_needed(model: str, length: int, gpu: GPU) -> int | None:
    """Returns the GPUs that hold a model and a prompt; None if the model's size is not known."""
    size = size_of(model)
    return math.ceil(size.memory(length) / (USABLE * gpu.memory)) if size else None


def on_gpus(runs: Iterable[ScoreRun], gpu: str) -> list[ScoreRun]:
    """Returns the runs with the number of GPUs of this name that each needs; without a name, 1."""
    if not gpu:
        return list(runs)
    return [replace(run, gpus=gpus_needed(run.model, run.length, GPUS[gpu]) or 1) for run in runs]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the printed plan.

    Attributes:
        model: The model.
        work: What is computed: a needle task, or the passes of a notebook.
        length: Tokens of a prompt.
        passes: Passes over prompts of this length: prompts x passes of each.
        scored: Prompts that are scored already; None if the row is not one of scores.
    """

    model: str
    work: str
    length: int
    passes: int
    scored: int | None = None

    @property
    def done(self) -> str:
        """Whether the scores are there already."""
        if self.scored is None:
            return ""
        return {0: "no", self.passes: "yes"}.get(self.scored, f"{self.scored} prompts")


def plan_rows(runs: Iterable[ScoreRun], jobs: Iterable[Job]) -> list[Row]:
    """Returns the rows of the plan: one per score run, then one per notebook and prompt length."""
    rows = []
    for run in runs:
        numbers: dict[str, Any] = {"length": run.length, "passes": run.prompts}
        rows.append(Row(model=run.model, work=run.task + run.share, scored=run.scored(), **numbers))
    for job in jobs:
        if not job.workload.passes:
            continue
        model = job.values["model"]
        size = size_of(model)
        heads = size.layers * size.heads if size else 0
        counts: Counter[int] = Counter()
        for each in job.workload.passes:
            counts[each.length] += each.prompts * (each.passes + each.passes_per_head * heads)
        rows += [
            Row(model=model, work=f"notebook {job.notebook.stem[:2]}", length=length, passes=count)
            for length, count in sorted(counts.items())
            if count
        ]
    return rows


def describe(jobs: Sequence[Job], gpu: str = "") -> str:
    """Returns the plan as text: what runs, totals per model, the notebooks, and the sources.

    Args:
        jobs: All notebooks that run.
        gpu: One of `GPUS`; empty leaves out hours and the number of GPUs.

    Raises:
        UsageError: A model's folder or a kept score file cannot be read.
    """
    import pandas as pd

    runs = merged(run for job in jobs for run in job.scores)
    rows = plan_rows(runs, jobs)
    parts = [_counts(runs)]
    if rows:
        table = pd.DataFrame([_numbers(row, gpu) for row in rows])
        shown = table.drop(columns="left").to_string(index=False, float_format="{:.1f}".format)
        parts += [shown, _totals(table)]
        if unknown := sorted({name_of(row.model) for row in rows if not size_of(row.model)}):
            parts.append(f"Neither a folder nor a known model, not estimated: {', '.join(unknown)}")
        parts.append(_sources(gpu))
    return "\n\n".join([*parts, "Notebooks that run:\n" + "\n".join(job.name for job in jobs)])


def _numbers(row: Row, gpu: str) -> dict[str, Any]:
    """Returns a row of the plan with its tokens, memory, GPUs and hours."""
    size = size_of(row.model)
    numbers: dict[str, Any] = {
        "model": name_of(row.model),
        "work": row.work,
        "length": row.length,
        "passes": row.passes,
        "tokens": row.passes * row.length,
        "GB": size.memory(row.length) / 1e9 if size else math.nan,
    }
    if gpu:
        count = gpus_needed(row.model, row.length, GPUS[gpu])
        numbers["GPUs"] = "?" if count is None else f"{count}"
        fast, slow = speeds()
        for name, speed, ratio in (("h fast", fast, max(SCORING)), ("h slow", slow, min(SCORING))):
            seconds = speed.seconds(size, row.length, GPUS[gpu]) if size else math.nan
            numbers[name] = row.passes * seconds / (1 if row.scored is not None else ratio) / 3600
    return numbers | {"scored": row.done, "left": row.passes - (row.scored or 0)}


def _counts(runs: Sequence[ScoreRun]) -> str:
    """Returns how many prompts are scored, as models x tasks x lengths x prompts for a grid."""
    grid = [run for run in runs if not run.share]
    others = [run for run in runs if run.share]
    lines = []
    if grid:
        sides = [len({getattr(r, side) for r in grid}) for side in ("model", "task", "length")]
        sizes = {run.prompts for run in grid}
        total = f"{sum(run.prompts for run in grid):,} prompts"
        if len(grid) == math.prod(sides) and len(sizes) == 1:
            names = ("model", "task", "length", "prompt")
            factors = zip([*sides, *sizes], names, strict=True)
            product = " x ".join(f"{n} {name}{'s' if n > 1 else ''}" for n, name in factors)
            total = f"{product} = {total}"
        lines.append(f"Needles: {total}")
    if others:
        total = f"{len(others)} runs, {sum(run.prompts for run in others):,} prompts"
        lines.append(f"Shares of images and predecessors: {total}")
    return "\n".join(lines or ["No scores are needed."])


def _totals(table: Any) -> str:
    """Returns totals per model: passes, those still to do, tokens, largest memory, GPU hours."""
    rules = {"passes": "sum", "left": "sum", "tokens": "sum", "GB": "max"}
    if "GPUs" in table:
        for name in ("h fast", "h slow"):
            count = table["GPUs"].where(table["GPUs"] != "?").astype(float)
            table[f"GPU {name}"] = table[name] * count * table["left"] / table["passes"]
            rules[f"GPU {name}"] = "sum"
    totals = table.groupby("model", sort=False).agg(rules)
    totals = totals.rename(columns={"left": "still to do"})
    return "Totals per model:\n" + str(totals.to_string(float_format="{:,.1f}".format))


def _sources(gpu: str) -> str:
    """Returns where the estimates come from."""
    text = (
        "GB and hours are estimates, not measurements. GB: weights and KV cache in bfloat16 and "
        f"{HIDDEN_STATES} hidden states per token; that fits paper A's logs of {name_of(LOGGED)}, "
        "19 to 20 GB at 8,192 tokens and 47 to 53 GB at 131,072."
    )
    if gpu:
        fast, slow = speeds()
        text += (
            f" Hours on one {gpu} after the other: a pass takes 2 x parameters x tokens operations "
            f"and attention, at {fast.utilisation:.0%} to {slow.utilisation:.0%} of the peak, and "
            f"each prompt {fast.overhead:.0f} to {slow.overhead:.0f} s more. Paper A's logs give "
            f"this if their unnamed GPU was an {TAKEN_FOR}; small models are far faster. A pass "
            f"without scoring takes {1 / SCORING[1]:.2f} to {1 / SCORING[0]:.2f} of a scored "
            "prompt, as measured on two CPU cores. Where GPUs is more than 1, the layers are "
            "spread over as many GPUs, which work in turn; GPU hours count them all. Generated "
            "tokens are not counted."
        )
    else:
        text += f" Name a GPU for hours: --gpu {' | '.join(GPUS)}."
    return textwrap.fill(text, 100, break_on_hyphens=False)
