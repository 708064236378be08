"""Runs units of work on a Ray cluster."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cluster.models import UsageError
from cluster.units import Runner, Unit, first_line

RETRIES = 3
"""How often a unit is repeated whose worker was lost."""
TIMEOUT = 60
"""Seconds that a cluster may take to answer."""
PROBE = """
import logging, sys, ray
ray.init(sys.argv[1], log_to_driver=False, logging_level=logging.CRITICAL)
"""
"""Connects to a cluster and leaves; run in a process of its own, since Ray may wait for ever."""


@contextmanager
def ray_cluster(address: str, workers: int = 0) -> Iterator[Runner]:
    """Yields a runner that hands each unit to a Ray cluster; units of lost workers are run again.

    Every machine of the cluster must see the working folder and this repository at the same paths.

    Args:
        address: Address of the cluster's head, "auto", or "local" to start a cluster here.
        workers: Number of workers of a local cluster, by default one per core.

    Raises:
        UsageError: Ray is not installed, no cluster answers within `TIMEOUT` seconds, or a unit
            needs more GPUs than any of its machines has.
    """
    if not address:
        raise UsageError('--ray "": expected the address of a cluster, "auto" or "local"')
    try:
        import ray
    except ImportError as error:
        raise UsageError("--ray needs Ray: pip install 'mmheads[ray]'") from error
    own: dict[str, Any] = {}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        own = {"include_dashboard": False, "object_store_memory": 100 << 20}
        own |= {"num_cpus": workers} if workers else {}
    else:
        _check_answers(address)
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise _no_cluster(address, first_line(error)) from error
    try:
        yield _runner(ray)
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Raises UsageError unless a cluster answers at the address within `TIMEOUT` seconds."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if host and port.isdigit():  # Ray itself takes minutes to say that nobody listens
            socket.create_connection((host, int(port)), timeout=10).close()
        command = [sys.executable, "-c", PROBE, address]
        answer = subprocess.run(
            command, timeout=TIMEOUT, capture_output=True, encoding="utf-8", errors="replace"
        )
    except subprocess.TimeoutExpired as error:
        raise _no_cluster(address, f"no answer within {TIMEOUT} seconds") from error
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, first_line(error)) from error
    if answer.returncode:
        said = answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"]
        raise _no_cluster(address, said[-1])


def _no_cluster(address: str, reason: str) -> UsageError:
    return UsageError(
        f"--ray {address}: no cluster ({reason}); start one with `ray start --head`, and set "
        "RAY_AUTH_TOKEN as there if it asks for a token"
    )


def _runner(ray: Any) -> Runner:
    """Returns a runner on the cluster that this process is connected to."""
    nodes: list[dict[str, Any]] = ray.nodes()
    most = int(max(node["Resources"].get("GPU", 0) for node in nodes if node["Alive"]))
    settings: dict[str, Any] = {"num_cpus": 1, "max_retries": RETRIES}
    if most:
        settings["max_calls"] = 1  # else a worker keeps its model on the GPU
    remote: Any = ray.remote(**settings)(_work)

    def run(units: Sequence[Unit], progress: str = "") -> list[str]:
        for unit in units:
            if most and unit.gpus > most:
                raise UsageError(
                    f"{unit.name} needs {unit.gpus} GPUs on one machine; the largest has {most}"
                )
        errors = [""] * len(units)
        pending = {}
        for index, unit in enumerate(units):
            task = remote.options(name=unit.name, num_gpus=unit.gpus if most else 0)
            pending[task.remote(unit, str(Path.cwd()))] = index
        with tqdm(total=len(units), desc=progress, disable=not progress) as bar:
            while pending:
                (done,), _ = ray.wait(list(pending))
                try:
                    errors[pending[done]] = ray.get(done)
                except ray.exceptions.RayError as error:
                    errors[pending[done]] = first_line(error)
                del pending[done]
                bar.update()
        return errors

    return run


def _work(unit: Unit, folder: str) -> str:
    """Runs a unit on a worker, in the folder of the process that asked for it."""
    os.chdir(folder)
    return unit.run()
