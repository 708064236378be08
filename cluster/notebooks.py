"""A notebook with its parameters, as a piece of work that any process can do."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import papermill

from cluster.models import folder_of
from cluster.parameters import read_cells
from cluster.scores import ScoreRun
from cluster.units import first_line
from cluster.workload import NOTHING, Workload
from mmheads import paths


@dataclass(frozen=True)
class Job:
    """One notebook to run, with the parameters that differ from its defaults.

    Attributes:
        notebook: Its file.
        parameters: Values by name.
        values: Values of all its parameters, with the defaults of the others.
        runs: Folder of the executed copy.
        model: Name of the model, if the notebook is run once per model.
        line: Line of the screen for its progress bar; None shows none.
        workload: What the notebook computes.
        scores: Scores that it reads.
        gpus: GPUs that it takes, where there are any.
    """

    notebook: Path
    parameters: dict[str, Any]
    values: dict[str, Any]
    runs: Path
    model: str = ""
    line: int | None = None
    workload: Workload = NOTHING
    scores: tuple[ScoreRun, ...] = ()
    gpus: int = 1

    @property
    def name(self) -> str:
        """Its name on the screen."""
        return f"{self.model}/{self.notebook.stem}" if self.model else self.notebook.stem

    @property
    def output(self) -> Path:
        """The executed notebook."""
        return self.runs / self.notebook.name

    @property
    def marker(self) -> Path:
        """The file that says what the last finished run was, and which figures it left."""
        return self.runs / f"{self.notebook.stem}.done"

    @property
    def finished(self) -> bool:
        """Whether this very job was run to its end, and all that it left is still there."""
        try:
            done = json.loads(self.marker.read_text(encoding="utf-8"))
            read_cells(self.output)
            same: bool = done == {"digest": self.digest, "figures": self._hashes(done["figures"])}
        except (OSError, ValueError, TypeError, KeyError):
            return False
        return same

    @property
    def folder(self) -> Path:
        """The folder of its figures."""
        return Path(self.parameters.get("figures_folder") or paths.FIGURES)

    def _made(self) -> dict[str, str]:
        """Returns the SHA-256 of each figure that the manifest says this notebook made, by name."""
        from mmheads.figures import manifest

        entries = [e for e in manifest(self.folder) if e["notebook"] == self.notebook.stem]
        return {entry["file"]: entry["sha256"] for entry in entries}

    def _hashes(self, files: Iterable[str]) -> dict[str, str]:
        """Returns the SHA-256 of those of these figures that are there, by name."""
        present = [name for name in files if (self.folder / name).is_file()]
        return {name: _sha256(self.folder / name) for name in present}

    @property
    def digest(self) -> str:
        """Hash of all that the result depends on.

        These are the notebook's source, its parameters, the code, the printed numbers, and size
        and time of every file of the models and data that it reads.
        """
        cells = [cell.source for cell in read_cells(self.notebook)]
        code = [p for name in ("mmheads", "benchmarks") for p in (paths.ROOT / name).rglob("*.py")]
        sources = [path.read_text(encoding="utf-8") for path in sorted(code)]
        sources += [path.read_text("utf-8") for path in sorted(paths.PAPERS.glob("*.csv"))]
        content = json.dumps([cells, self.parameters, sources, list(self._inputs())])
        return hashlib.sha256(content.encode()).hexdigest()

    def _inputs(self) -> Iterator[tuple[str, int, int]]:
        """Yields path, size and time of each file of the models and data that are read."""
        folders = []
        for name, value in self.values.items():
            if name == "published_folder":
                folders.append(paths.published(value))
            elif name == "real_docs_folder":
                folders.append(paths.real_docs(value))
            elif not name.endswith("_folder"):
                texts = value if isinstance(value, list) else [value]
                folders += [folder_of(text) for text in texts if isinstance(text, str) and text]
        for folder in sorted({folder for folder in folders if folder}):
            for path in sorted(folder.rglob("*")):
                if path.is_file():
                    about = path.stat()
                    yield str(path), about.st_size, about.st_mtime_ns

    @property
    def skipped(self) -> list[str]:
        """What the executed notebook says it had to skip: its printed lines "Skipped: ..."."""
        outputs = [output for cell in read_cells(self.output) for output in cell.get("outputs", [])]
        lines = [line for output in outputs for line in output.get("text", "").splitlines()]
        return [line for line in lines if line.startswith("Skipped: ")]

    def run(self) -> str:
        """Execute the notebook; returns the error in one line, or nothing."""
        digest = self.digest
        self.marker.unlink(missing_ok=True)
        self.runs.mkdir(parents=True, exist_ok=True)
        bar = self.line is not None and {"desc": self.name, "position": self.line}
        try:
            papermill.execute_notebook(
                self.notebook,
                self.output,
                parameters=self.parameters,
                kernel_name="python3",
                extra_arguments=["--IPKernelApp.log_level=ERROR"],
                progress_bar=bar,
            )
            if not self.skipped:
                done = json.dumps({"digest": digest, "figures": self._made()})
                with paths.write_whole(self.marker) as path:
                    path.write_text(done, encoding="utf-8")
        except papermill.PapermillExecutionError as error:
            return f"{f'{error.ename}: {error.evalue}'.splitlines()[0]} (see {self.output})"
        except Exception as error:
            return f"{first_line(error)} (see {self.output})"
        return ""


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
