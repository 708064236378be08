"""One style, one way to save a figure or a table, and the manifest of all of them.

Files are byte-stable: the same data on the same versions give the same bytes, so provenance
stands in `figures/manifest.json` and not in the files.
"""

import hashlib
import json
import platform
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from filelock import FileLock
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import NDArray

from mmheads import paths

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

_NAME = re.compile(r"[ABX](_[a-z0-9]+)+_(released|live|gpu|paper)")
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
    models: Mapping[str, str] = field(default_factory=dict)
    folder: str | Path = ""

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
            data: One observation a row.
            name: `<paper>_<id>_<slug>_<source>`.
            layout: What a reader sees in Markdown and LaTeX; by default `data`.
        """
        shown = data if layout is None else layout
        writers = {
            "csv": lambda path: _write_csv(data, path),
            "md": lambda path: path.write_text(shown.to_markdown(index=False) + "\n"),
            "tex": lambda path: path.write_text(_latex(shown)),
        }
        self._write(name, writers)

    def _write(self, name: str, writers: Mapping[str, Any]) -> None:
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"figure name {name!r}: expected <paper>_<id>_<slug>_<source>, paper A, B or X, "
                "source released, live, gpu or paper"
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
            listing.write_text(json.dumps(ordered, indent=1) + "\n")

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
    """The entries of `manifest.json`, one a file, sorted by file name; none if there is none."""
    path = folder / "manifest.json"
    entries: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
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
            "figure.dpi": 85,
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


def heat_map(
    axis: Axes, values: NDArray[np.floating[Any]], *, limit: float | None = None
) -> AxesImage:
    """Draw [layer, head] values, layer 0 at the bottom; a map centred on 0 if any is negative.

    Args:
        axis: Where to draw.
        values: [layer, head].
        limit: Value of the strongest colour, by default the largest absolute value.
    """
    limit = limit or float(np.abs(values).max())
    signed = bool((values < 0).any())
    axis.set(xlabel="head", ylabel="layer")
    return axis.imshow(
        values,
        cmap="RdBu_r" if signed else "Blues",
        vmin=-limit if signed else 0,
        vmax=limit,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
    )


def _latex(table: pd.DataFrame) -> str:
    return table.to_latex(index=False, escape=True, float_format=lambda x: f"{x:g}")


def _write_csv(data: pd.DataFrame, path: Path) -> None:
    data.to_csv(path, index=False, lineterminator="\n")
