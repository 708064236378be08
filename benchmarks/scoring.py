"""Measures what scoring adds to a plain forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from benchmarks.random_models import QUESTION_TOKENS, Size, random_model, random_prompt
from benchmarks.timing import (
    compare,
    conditions,
    fresh_processes,
    peak_bytes,
    show_megabytes,
    show_seconds,
)
from mmheads.attention import record_mass
from mmheads.models import VLM
from mmheads.scoring import score_prompt

PLAIN, RECORDED, CALIBRATED, EAGER = (
    "plain forward",
    "forward with scoring",
    "calibrated example",
    "eager, output_attentions",
)
WARM_UP_TOKENS = 4 * QUESTION_TOKENS
"""Length of the prompt that warms up a fresh process."""


def _variants(vlm: VLM, length: int) -> dict[str, Callable[[], Any]]:
    prompt = random_prompt(vlm, length)
    inputs = {name: value.to(vlm.device) for name, value in prompt.inputs.items()}
    rows = torch.from_numpy(prompt.question)[None]
    weights = torch.from_numpy(prompt.weights(prompt.evidence))[None, :, None]

    @torch.no_grad()
    def plain(**settings: Any) -> None:
        vlm.model(**inputs, use_cache=True, logits_to_keep=1, **settings)

    def recorded() -> None:
        with record_mass(vlm, rows, weights, text=weights[..., 0] > 0):
            plain()

    def eager() -> None:
        vlm.model.set_attn_implementation("eager")
        try:
            plain(output_attentions=True)
        finally:
            vlm.model.set_attn_implementation("sdpa")

    def calibrated() -> None:
        score_prompt(vlm, prompt)

    return {PLAIN: plain, RECORDED: recorded, CALIBRATED: calibrated, EAGER: eager}


def _peak(size: Size, device: str, dtype: torch.dtype, length: int, variant: str) -> int:
    vlm = random_model(size, device, dtype)
    _variants(vlm, WARM_UP_TOKENS)[variant]()
    return peak_bytes(_variants(vlm, length)[variant], device)


def measure_scoring(
    size: Size,
    lengths: Sequence[int],
    *,
    device: str,
    dtype: torch.dtype,
    repeats: int = 5,
    eager_up_to: int = 4096,
) -> pd.DataFrame:
    """Returns time and peak memory of a pass with and without scoring, per length and variant.

    The variants are the plain pass on the stock fast attention; the same pass while masses, entropy
    and norms of 32 question tokens are recorded; a calibrated example (the context once, then the
    question and the null question from its cache); and eager attention with `output_attentions`.
    Times are taken in turn in this process, memory as the median of three fresh processes.

    Args:
        size: The model's size.
        lengths: Prompt lengths in tokens.
        device: Where the model runs.
        dtype: Precision of its weights.
        repeats: Number of timed turns.
        eager_up_to: Longest prompt for eager attention, in tokens; beyond it, only the memory that
            its attention maps would need is computed.
    """
    vlm = random_model(size, device, dtype)
    tables = []
    with (
        fresh_processes(_peak, size, device, dtype) as peak,
        tqdm(total=len(lengths), desc="scoring", leave=False) as progress,
    ):
        for length in lengths:
            variants = _variants(vlm, length)
            if length > eager_up_to:
                del variants[EAGER]
            table = compare(variants, repeats=repeats, device=device)
            peaks = np.array([peak(length, name) for name in variants])
            table["peak_bytes"] = np.median(peaks, axis=1)
            table["peak_low"], table["peak_high"] = peaks.min(axis=1), peaks.max(axis=1)
            if length > eager_up_to:
                maps = size.layers * size.heads * length**2 * torch.finfo(dtype).bits // 8
                computed = {"variant": f"{EAGER} (computed)", "peak_bytes": maps}
                table = pd.concat([table, pd.DataFrame([computed])], ignore_index=True)
            table["time_ratio"] = table["seconds"] / table["seconds"][0]
            table["memory_ratio"] = table["peak_bytes"] / table["peak_bytes"][0]
            table.insert(0, "tokens", length)
            tables.append(table)
            progress.update()
    result = pd.concat(tables, ignore_index=True)
    return result.assign(**conditions(vlm, repeats, question_tokens=QUESTION_TOKENS))


def show_scoring(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the table of `measure_scoring` with rounded numbers and their units."""
    lowest, highest = show_megabytes(table["peak_low"]), show_megabytes(table["peak_high"])
    spread = " [" + lowest + ", " + highest + "]"
    return pd.DataFrame(
        {
            "tokens": table["tokens"],
            "variant": table["variant"],
            "time, s": show_seconds(table),
            "x plain": table["time_ratio"].map("{:.2f}".format).replace("nan", ""),
            "peak, MB": show_megabytes(table["peak_bytes"])
            + spread.where(table["peak_low"].notna(), ""),
            "x plain memory": table["memory_ratio"].map("{:.2f}".format),
        }
    )
