"""Measures time and peak memory of variants, and the conditions under which they were measured."""

from __future__ import annotations

import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmheads.models import VLM

PEAK_PROCESSES = 3
"""Processes whose peak memory is measured: their allocators differ by tens of megabytes."""
MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes per unit of `ru_maxrss`."""

Peak = Callable[..., list[int]]
"""Returns the peak memory in bytes of a length and variant, one value per fresh process."""


def compare(
    variants: Mapping[str, Callable[[], Any]], *, repeats: int, device: str
) -> pd.DataFrame:
    """Returns the seconds of each variant (median, lowest, highest), one row per variant.

    The variants take turns, so that a noisy machine disturbs all of them alike. The first turn is
    a warm-up and is not counted.

    Args:
        variants: What to run, by name.
        repeats: Number of counted turns.
        device: Where the variants compute.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, run in variants.items():
            elapsed, _ = seconds_of(run, device)
            if turn:
                seconds[name].append(elapsed)
    return summary(seconds)


class _Operators(TorchDispatchMode):
    """Calls a function with the name of each operator that is run."""

    seen: Callable[[str], None]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen(str(func.name()))
        return func(*args, **(kwargs or {}))


def kernel_of(run: Callable[[], Any]) -> str:
    """Returns the operator of attention that a call runs most often, as PyTorch dispatches it.

    What `torch.compile` makes of an operator is not seen by its name.
    """
    names: list[str] = []
    operators: Any = _Operators()  # type: ignore[no-untyped-call]
    operators.seen = names.append
    with torch.no_grad(), operators:
        run()
    found = Counter(name for name in names if "attention" in name)
    if not found:
        return "other operators"
    ((most, _),) = found.most_common(1)
    return most.removeprefix("aten::").lstrip("_")


def summary(seconds: Mapping[str, Sequence[float]]) -> pd.DataFrame:
    """Returns the median, lowest and highest of each variant's seconds, one row per variant."""
    return pd.DataFrame(
        {
            "variant": list(seconds),
            "seconds": [statistics.median(times) for times in seconds.values()],
            "low": [min(times) for times in seconds.values()],
            "high": [max(times) for times in seconds.values()],
        }
    )


def seconds_of(run: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Returns the seconds that a call takes on the device, and what the call returns."""
    _synchronize(device)
    begin = time.perf_counter()
    result = run()
    _synchronize(device)
    return time.perf_counter() - begin, result


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """Returns the peak memory of a call in bytes, above what was used before it.

    On a GPU this is its allocated memory. On a CPU it is the memory of the process, which keeps
    what it has freed: each call needs a fresh process, see `fresh_processes`.

    Args:
        run: The call.
        device: Where it computes.
    """
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return int(torch.cuda.max_memory_allocated() - before)
    _reset_peak()
    before = _peak_of_process()
    run()
    return _peak_of_process() - before


def _reset_peak() -> None:
    """Lowers the peak to the present memory where the system can (Linux); else it stays."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak_of_process() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT


@contextmanager
def fresh_processes(run: Callable[..., int], *settings: Any) -> Iterator[Peak]:
    """Yields a function that measures peak memory in fresh processes, one value per process.

    The processes are forked from a small server that has imported the benchmarks, so that their
    peak begins at what they use. (A spawned process would inherit the peak of its parent.)

    Args:
        run: A module-level function of `settings`, a length and a variant; returns bytes.
        settings: Its first arguments.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["benchmarks.retrieval", "benchmarks.scoring", "benchmarks.streaming"]
    )
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:

        def peak(*case: Any) -> list[int]:
            job = (run, *settings, *case)
            return [pool.submit(*job).result() for _ in range(PEAK_PROCESSES)]

        yield peak


def conditions(vlm: VLM, repeats: int, **settings: Any) -> dict[str, Any]:
    """Returns the columns that say how a table was measured: settings, runs, model, machine."""
    return {
        **settings,
        "runs": repeats,
        "model": vlm.model_id,
        "dtype": str(vlm.model.dtype).removeprefix("torch."),
        "machine": machine(str(vlm.device)),
    }


def machine(device: str) -> str:
    """Returns the name of the GPU, or the processor with the number of threads used."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} CPU threads"


def show_seconds(table: pd.DataFrame) -> pd.Series:
    """Returns "median [lowest, highest]" of each row, in seconds."""
    shown = table[["seconds", "low", "high"]].map("{:.3f}".format)
    text = shown["seconds"] + " [" + shown["low"] + ", " + shown["high"] + "]"
    return text.where(table["seconds"].notna(), "not run")


def show_megabytes(number_of_bytes: pd.Series) -> pd.Series:
    """Returns bytes as whole megabytes; nothing where a value is missing."""
    return (number_of_bytes / 1e6).map("{:,.0f}".format).replace("nan", "")
