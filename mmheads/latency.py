"""Time and memory, measured side by side in one run.

    python -m mmheads.latency scoring                       a small model on this machine
    python -m mmheads.latency scoring --shape qwen3-vl-8b --dtype bfloat16 --lengths 8192 131072

Variants take turns, so that a noisy machine disturbs all of them alike; a table gives medians with
the fastest and slowest run, and each variant's ratio to the first.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch
from tqdm import tqdm
from transformers import Qwen3Config, Qwen3ForCausalLM

from mmheads import paths
from mmheads.attention import record_mass
from mmheads.evidence import Prompt, Span
from mmheads.examples import Example
from mmheads.models import VLM
from mmheads.scoring import score_prompt

PEAK_RUNS = 3
"""Processes whose peaks of memory are taken: their allocators differ by tens of megabytes."""
QUESTION_TOKENS = 32
NULL_TOKENS = 10
"""Tokens that a null question and what follows it take in Qwen3-VL."""


@dataclass(frozen=True)
class Shape:
    """A language model's shape, filled with random weights."""

    layers: int
    hidden: int
    heads: int
    kv_groups: int
    channels: int
    intermediate: int
    vocabulary: int

    def __str__(self) -> str:
        return (
            f"{self.layers} layers, {self.heads} heads of {self.channels} in {self.kv_groups} KV "
            f"groups, hidden {self.hidden}"
        )


SHAPES = {
    "small": Shape(4, 256, 8, 2, 32, 768, 1024),
    "qwen3-vl-8b": Shape(36, 4096, 32, 8, 128, 12288, 151936),
}


class _NoTokenizer:
    """Random token ids need no words."""

    is_fast = True
    chat_template = None


def random_model(shape: Shape, device: str, dtype: torch.dtype, seed: int = 0) -> VLM:
    """A Qwen3 decoder with random weights."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_groups,
        head_dim=shape.channels,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
        max_position_embeddings=262144,
        tie_word_embeddings=True,
    )
    with torch.device(device):
        model = Qwen3ForCausalLM._from_config(config, dtype=dtype)
    return VLM(model=model.eval(), processor=_NoTokenizer(), model_id=f"random weights, {shape}")


def random_prompts(vlm: VLM, tokens: int, seed: int = 0) -> tuple[Prompt, Prompt]:
    """A prompt of random tokens with evidence in its middle, and one with a null question."""
    rng = np.random.default_rng(seed)
    context = tokens - QUESTION_TOKENS
    ids = rng.integers(0, vlm.text_config.vocab_size, tokens + NULL_TOKENS)

    def span(first: int, last: int) -> Span:
        return Span(np.arange(first, last), np.ones(last - first, np.float32))

    def prompt(chosen: np.ndarray) -> Prompt:
        given = torch.from_numpy(chosen)[None]
        return Prompt(
            example=Example(context=(), question=()),
            inputs={"input_ids": given, "attention_mask": torch.ones_like(given)},
            question=np.arange(context, len(chosen)),
            parts=(span(0, context),),
            evidence=(span(context // 2, context // 2 + context // 4),),
            candidates={},
            boxes={},
            replacements=(),
        )

    return prompt(ids[:tokens]), prompt(np.concatenate([ids[:context], ids[tokens:]]))


def compare(
    variants: Mapping[str, Callable[[], Any]], *, repeats: int, device: str
) -> pd.DataFrame:
    """Time variants in turn, after a warm-up -> a row a variant: seconds (median, low, high)."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, run in variants.items():
            _synchronize(device)
            begin = time.perf_counter()
            run()
            _synchronize(device)
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    return pd.DataFrame(
        {
            "variant": list(seconds),
            "seconds": [statistics.median(times) for times in seconds.values()],
            "low": [min(times) for times in seconds.values()],
            "high": [max(times) for times in seconds.values()],
        }
    )


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """Memory that a call takes at its peak above what was held before: of the GPU or the process.

    A process keeps what it freed, so that on a CPU each call needs a process of its own.
    """
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run()
        return int(torch.cuda.max_memory_allocated() - held)
    process, over = psutil.Process(), threading.Event()
    held = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        over.set()
        watcher.join()
    return int(peak - held)


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


PLAIN, RECORDED, CALIBRATED, EAGER = (
    "plain forward",
    "forward with scoring",
    "calibrated example",
    "eager, output_attentions",
)


def _scoring_variants(vlm: VLM, length: int) -> dict[str, Callable[[], Any]]:
    prompt, empty = random_prompts(vlm, length)
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
        score_prompt(vlm, prompt, empty)

    return {PLAIN: plain, RECORDED: recorded, CALIBRATED: calibrated, EAGER: eager}


def _scoring_peak(shape: Shape, device: str, dtype: torch.dtype, length: int, name: str) -> int:
    vlm = random_model(shape, device, dtype)
    _scoring_variants(vlm, 4 * QUESTION_TOKENS)[name]()
    return peak_bytes(_scoring_variants(vlm, length)[name], device)


def scoring(
    shape: Shape,
    lengths: Sequence[int],
    *,
    device: str,
    dtype: torch.dtype,
    repeats: int = 5,
    eager_up_to: int = 4096,
) -> pd.DataFrame:
    """What scoring adds to a plain forward pass -> a row a prompt length and variant.

    The plain pass on the stock fast attention; the same with masses, entropy and norms of 32
    question tokens recorded; a calibrated example (context once, question and null question from
    its cache); eager attention with `output_attentions`, up to `eager_up_to` tokens, and beyond
    that only the memory that its maps alone would need. Times are taken in turn in this process,
    memory as the median of three fresh processes.
    """
    vlm = random_model(shape, device, dtype)
    tables = []
    fresh = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1)
    with fresh, tqdm(total=len(lengths), desc="scoring", leave=False) as progress:
        for length in lengths:
            variants = _scoring_variants(vlm, length)
            if length > eager_up_to:
                del variants[EAGER]
            table = compare(variants, repeats=repeats, device=device)
            peaks = pd.DataFrame(
                {
                    name: [
                        fresh.submit(_scoring_peak, shape, device, dtype, length, name).result()
                        for _ in range(PEAK_RUNS)
                    ]
                    for name in variants
                }
            )
            table["peak_bytes"] = peaks.median().to_numpy()
            table["peak_low"] = peaks.min().to_numpy()
            table["peak_high"] = peaks.max().to_numpy()
            if length > eager_up_to:
                maps = shape.layers * shape.heads * length**2 * torch.finfo(dtype).bits // 8
                computed = {"variant": f"{EAGER} (computed)", "peak_bytes": maps}
                table = pd.concat([table, pd.DataFrame([computed])], ignore_index=True)
            table["time_ratio"] = table["seconds"] / table["seconds"][0]
            table["memory_ratio"] = table["peak_bytes"] / table["peak_bytes"][0]
            table.insert(0, "tokens", length)
            tables.append(table)
            progress.update()
    result = pd.concat(tables, ignore_index=True)
    return result.assign(
        runs=repeats,
        question_tokens=QUESTION_TOKENS,
        model=vlm.model_id,
        dtype=str(dtype).removeprefix("torch."),
        machine=machine(device),
    )


def machine(device: str) -> str:
    """What the times were measured on."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} CPU threads"


def _megabytes(bytes_: pd.Series) -> pd.Series:
    return (bytes_ / 1e6).map("{:,.0f}".format)


def _show(table: pd.DataFrame) -> str:
    spread = (
        "[" + table["low"].map("{:.3f}".format) + ", " + table["high"].map("{:.3f}".format) + "]"
    )
    shown = pd.DataFrame(
        {
            "tokens": table["tokens"],
            "variant": table["variant"],
            "time, s": (table["seconds"].map("{:.3f} ".format) + spread).where(
                table["seconds"].notna(), "not run"
            ),
            "x plain": table["time_ratio"].map("{:.2f}".format).replace("nan", ""),
            "peak, MB": _megabytes(table["peak_bytes"])
            + (
                " [" + _megabytes(table["peak_low"]) + ", " + _megabytes(table["peak_high"]) + "]"
            ).where(table["peak_low"].notna(), ""),
            "x plain memory": table["memory_ratio"].map("{:.2f}".format),
        }
    )
    return str(shown.to_markdown(index=False, disable_numparse=True))


def main(arguments: list[str] | None = None) -> int:
    """`python -m mmheads.latency`."""
    parser = argparse.ArgumentParser(prog="python -m mmheads.latency", description=__doc__)
    parser.add_argument("what", choices=["scoring"])
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--eager-up-to", type=int, default=4096, metavar="TOKENS")
    parser.add_argument("--out", default="", help="also write the table to this CSV file")
    args = parser.parse_args(arguments)
    if min(args.lengths) < 4 * QUESTION_TOKENS or args.repeats < 1:
        print(
            f"lengths {args.lengths}, repeats {args.repeats}: expected lengths of at least "
            f"{4 * QUESTION_TOKENS} tokens and one repeat",
            file=sys.stderr,
        )
        return 1
    table = scoring(
        SHAPES[args.shape],
        args.lengths,
        device=args.device,
        dtype=getattr(torch, args.dtype),
        repeats=args.repeats,
        eager_up_to=args.eager_up_to,
    )
    first = table.iloc[0]
    print(
        f"{first['model']}; {first['dtype']}; {first['question_tokens']} question tokens; "
        f"{first['machine']}; median [low, high] of {args.repeats} runs taken in turn"
    )
    print(_show(table))
    if args.out:
        with paths.write_whole(Path(args.out)) as path:
            table.to_csv(path, index=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
