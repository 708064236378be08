"""One style, one way to save a figure or a table, and the manifest of all of them.

Files are byte-stable: the same data with the same versions give the same bytes. Provenance is
therefore in `figures/manifest.json` and not in the files.
"""

import hashlib
import json
import platform
import re
import textwrap
import warnings
from collections.abc import Callable, Mapping
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
from matplotlib.font_manager import FontProperties, findfont, get_font
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


def set_title(target: Axes | Figure, text: str, *, width: int = 60, **style: Any) -> None:
    """Gives axes or a figure a title that a user wrote: as it is, wrapped, never read as formulas.

    Characters that the font lacks become boxes, with one warning.

    Args:
        target: Axes or a figure.
        text: The title.
        width: Longest line, in characters.
        style: Properties of the text, such as `fontsize`.
    """
    known = get_font(findfont(FontProperties())).get_charmap()
    lacking = {sign for sign in text if not sign.isspace() and ord(sign) not in known}
    if lacking:
        shown = "".join(sorted(lacking)[:10])
        warnings.warn(f"the font of the figures lacks {shown!r}: boxes are drawn", stacklevel=2)
        text = "".join("\u25a1" if sign in lacking else sign for sign in text)
    lines = [line for part in text.splitlines() for line in textwrap.wrap(part, width) or [""]]
    give = target.suptitle if isinstance(target, Figure) else target.set_title
    give("\n".join(lines), parse_math=False, **style)


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
