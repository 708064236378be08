"""Measure time and memory of variants side by side in one run.

    python -m benchmarks scoring                       a small model on this machine
    python -m benchmarks scoring --size qwen3-vl-8b --dtype bfloat16 --lengths 8192 131072
    python -m benchmarks retrieval --lengths 2048 8192
    python -m benchmarks prefill                       dense heads and windows against stock
    python -m benchmarks decode --dense 0.125
    python -m benchmarks batches                       examples and ablations of a tiny model
    python -m benchmarks                               all of them briefly, in about eleven minutes

Variants take turns, so that a noisy machine disturbs all of them alike. A table gives medians with
the fastest and the slowest run, and the ratio of each variant to the first.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks import batches, random_models, retrieval, scoring, streaming
from benchmarks.random_models import QUESTION_TOKENS, SIZES, random_model, random_reader
from benchmarks.timing import Peak, fresh_processes
from mmheads import paths
from mmheads.models import load

LENGTHS = {
    "scoring": [1024, 4096, 16384],
    "retrieval": [2048, 8192],
    "prefill": [1024, 2048, 4096, 8192, 16384],
    "decode": [1024, 4096, 16384],
    "batches": [128, 256, 512, 2048],
}
BRIEF = {
    "scoring": [1024, 4096],
    "retrieval": [2048, 8192, 32768],
    "prefill": [512, 1024, 2048, 8192, 16384],
    "decode": [4096, 16384],
    "batches": [128, 256, 512, 2048],
}
"""Lengths of all benchmarks in one run, which measures the memory of scoring alone."""
STREAMING = ("prefill", "decode")
SHORTEST = 4 * QUESTION_TOKENS


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options of the command line, with defaults that depend on the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", nargs="?", choices=list(LENGTHS), help="by default all, briefly")
    parser.add_argument("--size", choices=list(SIZES), help="of the model; default small, or wide")
    parser.add_argument("--lengths", type=int, nargs="+", default=[], help="in tokens")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--repeats", type=int, help="timed runs per variant; default 5, or 2")
    parser.add_argument("--flex", action="store_true", help="prefill: compile FlexAttention too")
    parser.add_argument("--eager-up-to", type=int, default=4096, metavar="TOKENS")
    parser.add_argument("--dense", type=float, default=0.1, help="share of dense KV groups")
    parser.add_argument("--by", choices=["group", "head"], default="group", help="dense choice")
    parser.add_argument("--sinks", type=int, default=64, help="first tokens that all heads see")
    parser.add_argument("--window", type=int, default=512, help="last tokens that all heads see")
    parser.add_argument("--out", default="", help="also write the table to this CSV file")
    options = parser.parse_args(arguments)
    options.brief = options.what is None
    if options.brief and (options.lengths or options.out):
        parser.error("--lengths and --out belong to one benchmark; name it")
    if options.repeats is None:
        options.repeats = 2 if options.brief else 5
    options.dtype = getattr(torch, options.dtype)
    return options


def chosen(options: argparse.Namespace) -> Iterator[argparse.Namespace]:
    """Yields the options of each benchmark that is to run."""
    for what in LENGTHS if options.brief else [options.what]:
        one = argparse.Namespace(**vars(options))
        one.what = what
        one.lengths = options.lengths or (BRIEF if options.brief else LENGTHS)[what]
        one.size = SIZES[options.size or ("wide" if what in STREAMING else "small")]
        yield one


def check(options: argparse.Namespace) -> None:
    """Refuses options that no measurement can use, before anything is measured.

    Raises:
        ValueError: A number is out of its range, or the device is not there.
        OSError: The table cannot be written where `--out` says.
    """
    shortest, longest = min(options.lengths), max(options.lengths)
    if shortest < SHORTEST or longest > random_models.POSITIONS:
        raise ValueError(
            f"--lengths {' '.join(map(str, options.lengths))}: expected lengths of at least "
            f"{SHORTEST} tokens and at most {random_models.POSITIONS:,}"
        )
    if options.repeats < 1:
        raise ValueError(f"--repeats {options.repeats}: expected at least 1")
    if options.what in STREAMING:
        if options.window < 1:
            raise ValueError(f"--window {options.window}: expected at least 1 token")
        if not 0 <= options.sinks <= shortest:
            raise ValueError(
                f"--sinks {options.sinks}: expected at least 0, and at most the {shortest} tokens "
                "of the shortest prompt"
            )
        if not 0 < options.dense <= 1:
            raise ValueError(f"--dense {options.dense:g}: expected a share in (0, 1]")
    try:
        torch.empty(1, device=options.device)
    except (RuntimeError, AssertionError) as error:
        reason = textwrap.shorten(str(error), 100)
        raise ValueError(
            f"--device {options.device}: it cannot be used ({reason}); expected cpu or cuda:0"
        ) from error
    if options.out:
        _check_writable(Path(options.out))


def _check_writable(path: Path) -> None:
    if path.is_dir():
        raise OSError(f"--out {path}: this is a folder; expected the name of a CSV file")
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"--out {path}: {folder} is not a folder that can be written to") from error


def measure(options: argparse.Namespace) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Returns the table of the benchmark in full precision, and as a reader sees it."""
    size, device, dtype = options.size, options.device, options.dtype
    if options.what == "scoring":
        settings = {"repeats": options.repeats, "eager_up_to": options.eager_up_to}
        table = scoring.measure_scoring(
            size, options.lengths, device=device, dtype=dtype, **settings
        )
        return table, scoring.show_scoring(table)
    if options.what == "batches":
        table = batches.measure_batches(
            load(batches.MODEL), options.lengths, repeats=options.repeats
        )
        return table, batches.show_batches(table)
    if options.what == "retrieval":
        vlm = random_reader(size, device, dtype)
        with _memory(options, retrieval.retrieval_peak, size, device, dtype) as peak:
            table = retrieval.measure_retrieval(
                vlm, options.lengths, repeats=options.repeats, peak=peak
            )
        return table, retrieval.show_retrieval(table)
    vlm = random_model(size, device, dtype)
    dense = streaming.dense_heads(vlm, options.dense, by=options.by)
    settings = {name: getattr(options, name) for name in ("sinks", "window", "repeats")}
    if options.what == "decode":
        table = streaming.measure_decoding(vlm, options.lengths, dense, **settings)
        return table, streaming.show_decoding(table)
    given = (size, device, dtype, options.dense, options.by, options.sinks, options.window)
    settings["compiled"] = options.flex
    with _memory(options, streaming.prefill_peak, *given) as peak:
        table = streaming.measure_prefill(vlm, options.lengths, dense, **settings, peak=peak)
    return table, streaming.show_prefill(table)


def _memory(
    options: argparse.Namespace, run: Callable[..., int], *settings: Any
) -> AbstractContextManager[Peak | None]:
    """What measures peak memory, see `fresh_processes`; nothing where all are measured briefly."""
    return nullcontext() if options.brief else fresh_processes(run, *settings)


def heading(table: pd.DataFrame) -> str:
    """Returns the line above a table: model, settings, machine and number of runs."""
    first = table.iloc[0]
    about = [first["model"], first["dtype"]]
    if "dense_heads" in table:
        about.append(
            f"{first['dense_heads']:.1%} of the heads in {first['dense_groups']:.1%} of the KV "
            f"groups dense, the others see {first['sinks']} sinks and a window of {first['window']}"
        )
    if "question_tokens" in table:
        about.append(f"{first['question_tokens']} question tokens")
    if "heads" in table:
        about.append(f"{first['heads']} heads in {first['layers']} layers")
    about.append(first["machine"])
    return "; ".join(about) + f"; median [low, high] of {first['runs']} runs taken in turn"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code; an error is printed in one line."""
    options = parse(arguments)
    try:
        for one in chosen(options):
            check(one)
        for one in chosen(options):
            table, shown = measure(one)
            if one.out:
                with paths.write_whole(Path(one.out)) as path:
                    table.to_csv(path, index=False)
            print(f"{one.what}: {heading(table)}")
            print(shown.to_markdown(index=False, disable_numparse=True), end="\n\n", flush=True)
    except (ValueError, TypeError, OSError, MemoryError, RuntimeError) as error:
        message = str(error) or type(error).__name__
        print(f"python -m benchmarks: {message.splitlines()[0]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
