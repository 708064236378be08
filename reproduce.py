"""Run the notebooks with papermill and regenerate every figure and table.

python reproduce.py                               all notebooks, default parameters
python reproduce.py --only 03 04 --jobs 1         some of them, one after the other
python reproduce.py -p fraction 0.1               another value of a parameter
python reproduce.py --params params/FILE.yaml     models, data, a section per notebook
python reproduce.py --fresh                       without the shipped results of data/results
python reproduce.py --plan --gpu H100             what would run, and what that would cost
python reproduce.py --ray ADDRESS                 on a Ray cluster; "local" starts one here
python reproduce.py --list                        notebooks and their parameters
"""

import argparse
import base64
import io
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from cluster import cost, workload
from cluster.models import UsageError, name_of
from cluster.notebooks import Job
from cluster.parameters import defaults, overrides, read_cells, read_params, select
from cluster.ray_runner import ray_cluster
from cluster.scores import check_haystacks, merged, score_runs
from cluster.units import Runner, Unit, first_line
from mmheads import paths

__all__ = ["defaults", "main", "overrides", "read_cells", "select"]

NORMALISE = [
    "--keep-output",
    "--keep-count",
    "--extra-keys",
    "metadata.papermill cell.metadata.papermill cell.metadata.execution "
    "metadata.language_info.version",
]
"""Options of nbstripout for the notebooks that are committed."""


def jobs_of(
    selected: list[Path],
    chosen: Mapping[Path, dict[str, Any]],
    models: Sequence[str],
    runs: Path,
    *,
    fresh: bool = False,
) -> list[Job]:
    """Returns the notebooks to run: those with a parameter `model` once per model, the others once.

    With models, figures go into one folder per model below `figures_folder`; by default below
    `runs`, so that the committed ones stay as they are.

    Args:
        selected: The notebooks.
        chosen: The parameters of each that differ from its defaults.
        models: The models; empty: each notebook's own.
        runs: Folder of the executed notebooks.
        fresh: Set the parameter `fresh` of every notebook that has it.

    Raises:
        UsageError: A notebook cannot say what it computes with its parameters.
    """
    known = {path: defaults(path) for path in selected}

    def job(path: Path, model: str) -> Job:
        label = name_of(model) if model else ""
        parameters = chosen[path] | ({"model": model} if model else {})
        if fresh and "fresh" in known[path]:
            parameters["fresh"] = True
        if models and "figures_folder" in known[path]:
            base = parameters.get("figures_folder")
            folder = Path(base) / label if base else runs / label / "figures"
            parameters["figures_folder"] = str(folder)
        values = known[path] | parameters
        declared = workload.read(path, values)
        return Job(
            notebook=path,
            parameters=parameters,
            values=values,
            runs=runs / label,
            model=label,
            workload=declared,
            scores=tuple(score_runs(declared, values)),
        )

    each = [path for path in selected if not models or "model" in known[path]]
    jobs = [job(path, model) for model in models or [""] for path in each]
    return jobs + [job(path, "") for path in selected if path not in each]


def on_gpus(job: Job, gpu: str | None) -> Job:
    """Returns the job with as many GPUs of this name as its longest prompt needs; else with one."""
    scores = tuple(cost.on_gpus(job.scores, gpu or ""))
    return replace(job, scores=scores, gpus=max((run.gpus for run in scores), default=1))


def commit_outputs(job: Job) -> None:
    """Writes the executed notebook over its source, without traces of the run."""
    executed = json.loads(job.output.read_text(encoding="utf-8"))
    for cell in executed["cells"]:
        for shown in (output["data"] for output in cell.get("outputs", []) if "data" in output):
            if "image/png" in shown:
                shown["image/png"] = in_few_colours(shown["image/png"])
    with paths.write_whole(job.notebook) as temporary:
        temporary.write_text(json.dumps(executed), encoding="utf-8")
        subprocess.run([sys.executable, "-m", "nbstripout", *NORMALISE, str(temporary)], check=True)


def in_few_colours(png: str) -> str:
    """Returns a picture of a notebook with at most 256 colours: a quarter of the bytes."""
    shown = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGBA")
    page = Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown).convert("RGB")
    written = io.BytesIO()
    few = page.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(written, "png", optimize=True)
    return base64.b64encode(written.getvalue()).decode("ascii")


def here(workers: int) -> Runner:
    """Returns a runner on this machine that runs this many units at a time, each in a process.

    What runs alone runs in this process.
    """

    def runner(units: Sequence[Unit], progress: str = "") -> list[str]:
        spawn = multiprocessing.get_context("spawn")
        processes = min(workers, usable_cores(), len(units))
        if processes <= 1:
            limit_threads(1)
            return [unit.run() for unit in tqdm(units, progress, disable=not progress)]
        with ProcessPoolExecutor(
            processes,
            mp_context=spawn,
            initializer=_start,
            initargs=(spawn.RLock(), processes),
        ) as pool:
            futures = [pool.submit(unit.run) for unit in units]
            bar = tqdm(as_completed(futures), progress, len(units), disable=not progress)
            for _ in bar:
                pass
        raised = [future.exception() for future in futures]
        return [
            first_line(error) if error else future.result()
            for future, error in zip(futures, raised, strict=True)
        ]

    return runner


def _start(lock: Any, processes: int) -> None:
    """Initialises a worker: shares the lock of the progress bars, and limits its threads."""
    tqdm.set_lock(lock)
    limit_threads(processes)


def limit_threads(processes: int) -> None:
    """Gives this process, and the kernels that it starts, its share of the cores."""
    threads = threads_of(processes)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for kernels, and for torch when it is imported
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(threads)


def threads_of(workers: int) -> int:
    """Returns the threads of each of so many processes: together no more than the usable cores.

    A smaller number in `OMP_NUM_THREADS` is kept.
    """
    given = os.environ.get("OMP_NUM_THREADS", "")
    threads = max(1, usable_cores() // workers)
    return min(threads, int(given)) if given.isdecimal() and int(given) else threads


def usable_cores(cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Returns the cores that this process may use: its affinity, and its container's limit.

    Args:
        cgroups: Where Linux says the limit, as version 2 (`cpu.max`) or 1 (`cpu.cfs_quota_us`).
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    version_1 = (cgroups / "cpu" / f"cpu.cfs_{name}_us" for name in ("quota", "period"))
    for files in ([cgroups / "cpu.max"], version_1):
        with suppress(OSError, ValueError):
            said = " ".join(file.read_text(encoding="ascii") for file in files)
            quota, period = map(int, said.split())  # "max", or -1, is no limit
            if quota > 0:
                cores = min(cores, max(1, quota // period))
    return cores


def execute(jobs: list[Job], runner: Runner, *, workers: int = 0) -> dict[str, str]:
    """Runs the scores that the notebooks read, then the notebooks; returns each error by name.

    Scores that are shipped or kept are not run. A notebook whose scores failed is not run either,
    and those that record times run last, one after the other.

    Args:
        jobs: The notebooks.
        runner: What runs them.
        workers: Number of progress bars on this screen, one per notebook that runs at the same
            time; 0 shows one bar for all.
    """
    scores = [run for run in merged(run for job in jobs for run in job.scores) if not run.finished]
    errors = dict(zip(scores, runner(scores, "scores"), strict=True)) if scores else {}
    failed = {replace(run, haystacks=0): error for run, error in errors.items() if error}
    for run, error in errors.items():
        if error:
            print(f"FAILED scores of {run.name}: {error}")
    results = {}
    for job in jobs:
        missing = [run for run in job.scores if replace(run, haystacks=0) in failed]
        if missing:
            results[job.name] = f"not run, the scores of {missing[0].name} failed"
    ready = [job for job in jobs if job.name not in results]
    if workers:
        ready = [replace(job, line=line if workers > 1 else 0) for line, job in enumerate(ready)]
    timed = [job for job in ready if job.values.get("record_timings")]
    for together in ([job for job in ready if job not in timed], *([job] for job in timed)):
        if together:
            said = runner(together, "" if workers else "notebooks")
            results |= dict(zip((job.name for job in together), said, strict=True))
    return results


def main(
    arguments: Sequence[str] | None = None,
    *,
    notebooks: Path = paths.NOTEBOOKS,
    runs: Path = paths.RUNS,
) -> int:
    """Runs the command line and returns its exit code; 2 means that nothing was run."""
    options = parse_arguments(arguments)
    try:
        check_options(options)
        selected = select(notebooks, options.only)
        if options.list:
            for path in selected:
                print(path.stem)
                for name, value in defaults(path).items():
                    print(f"    {name} = {value!r}")
            return 0
        chosen = overrides(select(notebooks, []), selected, options.p, options.params)
        params = read_params(options.params)
        made = jobs_of(selected, chosen, params.models, runs, fresh=options.fresh)
        jobs = [on_gpus(job, options.gpu) for job in made]
        if options.plan:
            print(cost.describe(jobs, options.gpu or ""))
            return 0
        given = {str(job.parameters.get("data", "")) for job in jobs} - {""}
        for folder in given or {params.data} - {""}:
            if not Path(folder).is_dir():
                raise UsageError(f"data {folder}: no such folder; another: -p data FOLDER")
        for job in jobs:
            check_haystacks(job.workload, job.values.get("data", ""))
        return run(jobs, options)
    except (ValueError, OSError) as error:
        print(f"reproduce.py: {error}", file=sys.stderr)
        return 2


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="NOTEBOOK", help="03, or its name")
    parser.add_argument(
        "--params", type=Path, metavar="FILE", help="YAML: models, data, a section per notebook"
    )
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="runs at a time on this machine; default: one per core, and 1 with other parameters, "
        "--fresh or --in-place",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="compute again what is shipped in data/results"
    )
    parser.add_argument("--plan", action="store_true", help="show what would run, and its cost")
    parser.add_argument("--gpu", metavar="NAME", help=", ".join(cost.GPUS))
    parser.add_argument("--ray", metavar="ADDRESS", help='of a Ray cluster, or "local"')
    parser.add_argument("--list", action="store_true", help="list notebooks and parameters")
    parser.add_argument("--resume", action="store_true", help="do not run finished ones again")
    parser.add_argument(
        "--in-place",
        action="store_true",
        help="write the outputs back into notebooks/, for committing",
    )
    return parser.parse_args(arguments)


def check_options(options: argparse.Namespace) -> None:
    """Refuses options that cannot be used.

    Raises:
        UsageError: An option is out of its range, names something unknown, or excludes another.
    """
    if options.jobs is not None and options.jobs < 1:
        raise UsageError(f"--jobs is {options.jobs}, expected at least 1")
    if options.in_place and (options.p or options.params):
        raise UsageError("--in-place takes the default parameters: leave out -p and --params")
    if options.params and not options.params.is_file():
        raise UsageError(f"--params {options.params}: no such file")
    if options.gpu is not None and options.gpu not in cost.GPUS:
        raise UsageError(f"--gpu {options.gpu}: unknown; there are {', '.join(cost.GPUS)}")
    if options.ray is not None and not options.ray.strip():
        raise UsageError('--ray "": expected the address of a cluster, "auto" or "local"')


def run(jobs: list[Job], options: argparse.Namespace) -> int:
    """Runs the jobs and says how it went; returns the exit code."""
    done = [job for job in jobs if options.resume and job.finished]
    for job in done:
        print(f"{job.name}: finished before, not run again")
    todo = [job for job in jobs if job not in done]
    started = time.monotonic()
    if options.ray:
        with ray_cluster(options.ray, options.jobs or 0) as runner:
            errors = execute(todo, runner)
    else:
        alone = options.fresh or options.in_place or options.p or options.params
        workers = options.jobs or (1 if alone else usable_cores())
        if workers > 1:
            todo = todo[::-1]  # the last ones take longest
        errors = execute(todo, here(workers), workers=workers)
    for job in jobs:
        if failure := errors.get(job.name):
            print(f"FAILED {job.name}: {failure}")
        elif job.skipped:
            print(f"{job.name}: {' '.join(job.skipped)}")
        elif options.in_place:
            commit_outputs(job)
    failed = sum(map(bool, errors.values()))
    seconds = time.monotonic() - started
    print(f"{len(errors) - failed} notebooks run, {failed} failed, in {seconds:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
