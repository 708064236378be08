"""One start for every notebook, one style, one way to save, and the manifest of all files.

Files are byte-stable: the same data with the same versions give the same bytes. Provenance is
therefore in `figures/manifest.json` and not in the files.
"""

import ast
import hashlib
import json
import platform
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import seaborn as sns
from filelock import FileLock
from matplotlib.figure import Figure

from mmheads import paths
from mmheads.provenance import version

if TYPE_CHECKING:
    from mmheads.models import VLM

PAGE = 5.5
"""Width of a figure across the page, in inches."""
COLUMN = 3.25
"""Width of a figure in one column, in inches."""

_PALETTE = sns.color_palette("colorblind")
TASK_NAMES = {
    "text": "text",
    "image": "image",
    "rendered_text": "rendered text",
    "identical_image": "identical image",
}
TASK_COLORS = dict(zip(TASK_NAMES, _PALETTE, strict=False))
MODEL_COLORS = sns.color_palette("Dark2", 6)
SET_COLORS = (_PALETTE[0], _PALETTE[3], "0.6")
"""Heads of the first set only, of the second only, of both."""

_NAME = re.compile(r"[ABX](_[a-z0-9]+)+_(released|live|real|gpu|paper)")
_LIBRARIES = ("matplotlib", "mmheads", "numpy", "pandas", "scipy", "seaborn")


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the manifest says of every file that one notebook makes.

    Attributes:
        notebook: Name without suffix, "03_sparsity_curves".
        parameters: The notebook's parameters, by name.
        seed: Seed of everything drawn at random.
        models: Revision of each model shown, by model id.
        folder: Where the files go; empty: `figures/` of the repository.
    """

    notebook: str
    parameters: Mapping[str, Any]
    seed: int
    models: dict[str, str] = field(default_factory=dict)
    folder: str | Path = ""

    def load(self, name: str, **settings: Any) -> "VLM":
        """Returns a loaded model, and lists it in the manifest from here on.

        Args:
            name: See `mmheads.models.load`, as for `settings` and for what is raised.
            settings: Further arguments of `mmheads.models.load`.
        """
        from mmheads.models import load

        vlm = load(name, **settings)
        self.models[vlm.model_id] = vlm.revision
        return vlm

    def savefig(self, figure: Figure, name: str, data: pd.DataFrame) -> None:
        """Write `<name>.pdf`, `.png`, and the data that the figure shows as `.csv`."""
        writers = {
            "pdf": lambda path: figure.savefig(path, metadata={"CreationDate": None}),
            "png": figure.savefig,
            "csv": lambda path: _write_csv(data, path),
        }
        self._write(name, writers)

    def save_table(
        self, data: pd.DataFrame, name: str, *, layout: pd.DataFrame | None = None
    ) -> None:
        """Write `<name>.csv` in full precision, and `.md` and `.tex` (booktabs).

        Args:
            data: One observation per row.
            name: `<paper>_<id>_<slug>_<source>`.
            layout: What a reader sees in Markdown and LaTeX; by default `data`.
        """
        shown = data if layout is None else layout
        writers = {
            "csv": lambda path: _write_csv(data, path),
            "md": lambda path: _write_text(_markdown(shown), path),
            "tex": lambda path: _write_text(_latex(shown), path),
        }
        self._write(name, writers)

    def _write(self, name: str, writers: Mapping[str, Any]) -> None:
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"figure name {name!r}: expected <paper>_<id>_<slug>_<source>, paper A, B or X, "
                "source released, live, real, gpu or paper"
            )
        folder = Path(self.folder or paths.FIGURES)
        paths.RUNS.mkdir(exist_ok=True)
        with FileLock(paths.RUNS / "manifest.lock"), ExitStack() as all_or_none:
            entries = {entry["file"]: entry for entry in manifest(folder)}
            for suffix, write in writers.items():
                path = folder / f"{name}.{suffix}"
                temporary = all_or_none.enter_context(paths.write_whole(path))
                write(temporary)
                entries[path.name] = self._entry(path.name, temporary.read_bytes())
            listing = all_or_none.enter_context(paths.write_whole(folder / "manifest.json"))
            ordered = [entries[file] for file in sorted(entries)]
            _write_text(json.dumps(ordered, indent=1) + "\n", listing)

    def _entry(self, file: str, content: bytes) -> dict[str, Any]:
        return {
            "file": file,
            "sha256": hashlib.sha256(content).hexdigest(),
            "notebook": self.notebook,
            "parameters": dict(self.parameters),
            "seed": self.seed,
            "models": dict(self.models),
            "versions": {"python": platform.python_version()}
            | {library: version(library) for library in _LIBRARIES},
        }


def manifest(folder: Path = paths.FIGURES) -> list[dict[str, Any]]:
    """Returns the entries of `manifest.json`, one per file, sorted by file name.

    Without a manifest there are none.

    Raises:
        ValueError: The manifest is damaged.
    """
    path = folder / "manifest.json"
    if not path.exists():
        return []
    try:
        entries: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        complete = ({"file", "sha256", "notebook"} <= entry.keys() for entry in entries)
        wrong = not isinstance(entries, list) or not all(complete)
    except (ValueError, TypeError, AttributeError):
        wrong = True
    if wrong:
        raise ValueError(
            f"{path} is damaged: expected a list of figures with file, sha256 and notebook; "
            "restore it (git checkout), or delete it and make the figures again"
        )
    return entries


def set_style() -> None:
    """The style of every figure: 8 to 9 pt text at final width, colour-blind palette."""
    sns.set_theme(
        context="paper",
        style="ticks",
        palette="colorblind",
        rc={
            "axes.labelsize": 8.5,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlesize": 9,
            "figure.constrained_layout.use": True,
            "figure.dpi": 110,
            "font.size": 8.5,
            "legend.fontsize": 8,
            "legend.frameon": False,
            "legend.title_fontsize": 8,
            "lines.linewidth": 1.2,
            "pdf.fonttype": 42,
            "savefig.dpi": 200,
            "xtick.labelsize": 8,
            "ytick.labelsize": 8,
        },
    )


def start(
    notebook: str, namespace: Mapping[str, Any], *, models: Mapping[str, str] | None = None
) -> Run:
    """Returns the run of a notebook, after setting the style and silencing progress bars.

    The names of the parameters are read from the cell tagged `parameters` of the notebook's file,
    and their values from the namespace, so that the manifest tells what was run. Parameters whose
    names end in `_folder` say where files are and are left out.

    Args:
        notebook: Name without suffix, "03_sparsity_curves"; the file is in `notebooks/`.
        namespace: `globals()` of the notebook.
        models: Revision of each model whose results are only read, by model id; `Run.load` adds
            those that are run.

    Raises:
        OSError: There is no such notebook.
        ValueError: The notebook has no parameters cell with a seed, or the cell was not run.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    set_style()
    names = _parameter_names(paths.NOTEBOOKS / f"{notebook}.ipynb")
    if missing := [name for name in names if name not in namespace]:
        raise ValueError(f"{', '.join(missing)} not set; run the parameters cell of {notebook}")
    return Run(
        notebook=notebook,
        parameters={n: namespace[n] for n in names if not n.endswith("_folder")},
        seed=namespace["seed"],
        models=dict(models or {}),
        folder=namespace.get("figures_folder", ""),
    )


def _parameter_names(path: Path) -> list[str]:
    """Returns the names that the parameters cell of a notebook assigns, in order."""
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if "parameters" in cell["metadata"].get("tags", []):
            lines = ast.parse("".join(cell["source"])).body
            targets = [line.targets[0] for line in lines if isinstance(line, ast.Assign)]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            if "seed" in names:
                return names
    raise ValueError(f"{path} has no cell tagged parameters that sets seed; add one")


def _markdown(table: pd.DataFrame) -> str:
    """Returns a table in Markdown; bars, line breaks and HTML in texts stay what they are."""

    def escape(text: str) -> str:
        text = re.sub(r"&(?=#?\w+;)", "&amp;", text)
        text = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)
        return re.sub(r"\r\n|[\n\r\v\f\x85\u2028\u2029]", "<br>", text.replace("|", "\\|"))

    return _mapped(table, escape).to_markdown(index=False) + "\n"


def _latex(table: pd.DataFrame) -> str:
    """Returns a table in LaTeX (booktabs); line breaks in texts become spaces."""
    plain = _mapped(table, lambda text: " ".join(text.splitlines()))
    return plain.to_latex(index=False, escape=True, float_format=lambda x: f"{x:g}")


def _mapped(table: pd.DataFrame, change: Callable[[str], str]) -> pd.DataFrame:
    """Returns the table with its texts and the names of its columns changed."""

    def changed(value: Any) -> Any:
        new = change(value) if isinstance(value, str) else value
        return value if new == value else new

    if not isinstance(table.columns, pd.MultiIndex):
        table = table.rename(columns=changed)
    columns = [
        values.astype(object).map(changed) if any(changed(v) is not v for v in values) else values
        for _, values in table.items()
    ]
    return pd.concat(columns, axis=1) if columns else table


def _write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _write_csv(data: pd.DataFrame, path: Path) -> None:
    data.to_csv(path, index=False, lineterminator="\n", encoding="utf-8")
