"""Run the notebooks with papermill and regenerate every figure and table.

python reproduce.py                               all notebooks, default parameters
python reproduce.py --only 03 04 --jobs 2         some of them, two at a time
python reproduce.py -p fraction 0.1               another value of a parameter
python reproduce.py --params params/FILE.yaml     a section of parameters a notebook
python reproduce.py --list                        notebooks and their parameters
"""

import argparse
import ast
import contextlib
import hashlib
import json
import multiprocessing
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import papermill
import yaml
from tqdm import tqdm

from mmheads import paths

NORMALISE = [
    "--keep-output",
    "--keep-count",
    "--extra-keys",
    "metadata.papermill cell.metadata.papermill cell.metadata.execution "
    "metadata.language_info.version",
]
"""Options of nbstripout for the notebooks that are committed."""


class UsageError(ValueError):
    """The command line asks for what the notebooks do not have."""


@dataclass(frozen=True)
class Job:
    """One notebook to run, with the parameters that differ from its defaults."""

    notebook: Path
    parameters: dict[str, Any]
    runs: Path

    @property
    def output(self) -> Path:
        """The executed notebook."""
        return self.runs / self.notebook.name

    @property
    def marker(self) -> Path:
        """Holds the digest of the last run that finished."""
        return self.runs / f"{self.notebook.stem}.done"

    @property
    def finished(self) -> bool:
        """Whether this very job has been run to its end, with nothing skipped."""
        kept = self.output.exists() and self.marker.exists()
        return kept and self.marker.read_text() == self.digest

    @property
    def digest(self) -> str:
        """Of the notebook's source, its parameters, the package and the printed numbers."""
        cells = [cell.source for cell in read_cells(self.notebook)]
        sources = sorted([*(paths.ROOT / "mmheads").rglob("*.py"), *paths.PAPERS.glob("*.csv")])
        texts = [path.read_text() for path in sources]
        content = json.dumps([cells, self.parameters, texts], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def skipped(self) -> list[str]:
        """What the executed notebook says it had to skip: its printed lines "Skipped: ..."."""
        outputs = [output for cell in read_cells(self.output) for output in cell.get("outputs", [])]
        lines = [line for output in outputs for line in output.get("text", "").splitlines()]
        return [line for line in lines if line.startswith("Skipped: ")]

    def run(self, line: int) -> str:
        """Execute with a progress bar on this line of the screen; the error, or nothing."""
        digest = self.digest
        self.marker.unlink(missing_ok=True)
        try:
            papermill.execute_notebook(
                self.notebook,
                self.output,
                parameters=self.parameters,
                kernel_name="python3",
                extra_arguments=["--IPKernelApp.log_level=ERROR"],
                progress_bar={"desc": self.notebook.stem, "position": line},
            )
        except papermill.PapermillExecutionError as error:
            return f"{error.ename}: {error.evalue}".splitlines()[0]
        except Exception as error:
            return f"{type(error).__name__}: {error}".splitlines()[0]
        if not self.skipped:
            self.marker.write_text(digest)
        return ""


def read_cells(notebook: Path) -> list[Any]:
    """The notebook's cells."""
    return list(nbformat.read(notebook, as_version=4).cells)  # type: ignore[no-untyped-call]


def defaults(notebook: Path) -> dict[str, Any]:
    """The notebook's parameters and their default values."""
    inferred = papermill.inspect_notebook(str(notebook))
    return {name: ast.literal_eval(about["default"]) for name, about in inferred.items()}


def select(notebooks: Path, only: Sequence[str]) -> list[Path]:
    """The numbered notebooks, or those whose number or name is in `only`."""
    found = sorted(notebooks.glob("[0-9][0-9]_*.ipynb"))
    names = [name for path in found for name in (path.stem, path.stem[:2])]
    if unknown := [name for name in only if name not in names]:
        raise UsageError(f"no notebook {', '.join(unknown)}; there are {', '.join(names[::2])}")
    return [path for path in found if not only or {path.stem, path.stem[:2]} & set(only)]


def check(value: Any, default: Any, name: str) -> Any:
    """The value of a parameter, refused if its type is not that of the default."""
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        raise UsageError(
            f"parameter {name} is {value!r}, expected {type(default).__name__} "
            f"as its default {default!r}"
        )
    return value


def parse(text: str, default: Any) -> Any:
    """The value that a word of the command line gives to a parameter with this default."""
    if isinstance(default, float):
        with contextlib.suppress(ValueError):
            return float(text)
    return text if isinstance(default, str) else yaml.safe_load(text)


def overrides(
    notebooks: list[Path],
    selected: list[Path],
    pairs: Sequence[Sequence[str]],
    file: Path | None,
) -> dict[Path, dict[str, Any]]:
    """Parameters of each notebook that differ from its defaults; unknown ones are refused.

    Args:
        notebooks: All notebooks: a section of one that is not run is checked too.
        selected: Those that are run.
        pairs: Name and value, for every selected notebook that has a parameter of that name.
        file: YAML with a section a notebook, named by its number or its name.
    """
    known = {path: defaults(path) for path in notebooks}
    chosen: dict[Path, dict[str, Any]] = {path: {} for path in notebooks}
    sections = yaml.safe_load(file.read_text()) if file else {}
    if not isinstance(sections, dict):
        raise UsageError(f"{file}: expected a section of parameters a notebook")
    for section, values in sections.items():
        label = f"{section:02d}" if isinstance(section, int) else section
        path = next((p for p in notebooks if label in (p.stem, p.stem[:2])), None)
        if path is None:
            raise UsageError(f"{file}: no notebook {section!r}")
        if not isinstance(values, dict):
            raise UsageError(f"{file}: section {section} is {values!r}, expected name: value")
        for name, value in values.items():
            if name not in known[path]:
                raise UsageError(f"{file}: {path.stem} has no parameter {name!r}")
            chosen[path][name] = check(value, known[path][name], name)
    for name, text in pairs:
        takers = [path for path in selected if name in known[path]]
        if not takers:
            every = sorted({name for path in selected for name in known[path]})
            raise UsageError(f"no notebook has a parameter {name!r}; there are {', '.join(every)}")
        for path in takers:
            default = known[path][name]
            chosen[path][name] = check(parse(text, default), default, name)
    return chosen


def commit_outputs(job: Job) -> None:
    """Write the executed notebook over its source, normalised."""
    with paths.write_whole(job.notebook) as temporary:
        shutil.copy(job.output, temporary)
        subprocess.run([sys.executable, "-m", "nbstripout", *NORMALISE, str(temporary)], check=True)


def execute(jobs: list[Job], workers: int) -> dict[str, str]:
    """Run the jobs; the error of each by name, empty where it succeeded."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, mp_context=spawn, initializer=tqdm.set_lock, initargs=(spawn.RLock(),)
    ) as pool:
        futures: dict[Future[str], Job] = {
            pool.submit(job.run, line if workers > 1 else 0): job for line, job in enumerate(jobs)
        }
        return {futures[done].notebook.stem: done.result() for done in as_completed(futures)}


def main(
    arguments: Sequence[str] | None = None,
    *,
    notebooks: Path = paths.NOTEBOOKS,
    runs: Path = paths.RUNS,
) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="NOTEBOOK", help="03, or its name")
    parser.add_argument("--params", type=Path, metavar="FILE", help="YAML, a section a notebook")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="notebooks at a time")
    parser.add_argument("--list", action="store_true", help="list notebooks and parameters")
    parser.add_argument("--resume", action="store_true", help="do not run finished ones again")
    parser.add_argument(
        "--in-place",
        action="store_true",
        help="write the outputs back into notebooks/, for committing",
    )
    options = parser.parse_args(arguments)
    try:
        if options.jobs < 1:
            raise UsageError(f"--jobs is {options.jobs}, expected at least 1")
        if options.in_place and (options.p or options.params):
            raise UsageError("--in-place takes the default parameters: leave out -p and --params")
        if options.params and not options.params.is_file():
            raise UsageError(f"--params {options.params}: no such file")
        selected = select(notebooks, options.only)
        if options.list:
            for path in selected:
                print(path.stem)
                for name, value in defaults(path).items():
                    print(f"    {name} = {value!r}")
            return 0
        chosen = overrides(select(notebooks, []), selected, options.p, options.params)
    except (UsageError, yaml.YAMLError) as error:
        print(f"reproduce.py: {error}", file=sys.stderr)
        return 2

    runs.mkdir(parents=True, exist_ok=True)
    jobs = [Job(path, chosen[path], runs) for path in selected]
    done = [job for job in jobs if options.resume and job.finished]
    for job in done:
        print(f"{job.notebook.stem}: finished before, not run again")
    started = time.monotonic()
    errors = execute([job for job in jobs if job not in done], options.jobs)
    for job in jobs:
        if failure := errors.get(job.notebook.stem):
            print(f"FAILED {job.notebook.stem}: {failure} (see {job.output})")
        elif job.skipped:
            print(f"{job.notebook.stem}: {' '.join(job.skipped)}")
        elif options.in_place:
            commit_outputs(job)
    failed = sum(map(bool, errors.values()))
    seconds = time.monotonic() - started
    print(f"{len(errors) - failed} notebooks run, {failed} failed, in {seconds:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
