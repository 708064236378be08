"""Folders of the repository, the settings that name others, and files written whole."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pooch

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
FIGURES = ROOT / "figures"
PAPERS = ROOT / "data" / "papers"
MODELS = ROOT / "data" / "models"
RUNS = ROOT / "runs"


def cache(folder: str | Path = "") -> Path:
    """Folder for downloads and results.

    The first of: `folder`, the setting `MMHEADS_CACHE`, the user's cache folder.
    """
    named = folder or os.environ.get("MMHEADS_CACHE") or pooch.os_cache("mmheads")
    return Path(named).expanduser().resolve()


def published(folder: str | Path = "") -> Path | None:
    """Folder that holds `MMRetHead/results/detection/`, or None where it must be downloaded.

    The first of: `folder`, the setting `MMHEADS_PUBLISHED`, `../shared/published` if it holds any.
    """
    return _given_or_beside(folder, "MMHEADS_PUBLISHED", "published", "MMRetHead")


def real_docs(folder: str | Path = "") -> Path | None:
    """Folder that holds `pdfs/` and `MMDocIR_annotations.jsonl`, or None if there is none.

    The first of: `folder`, the setting `MMHEADS_REAL_DOCS`, `../shared/real_docs` if it is there.
    """
    return _given_or_beside(folder, "MMHEADS_REAL_DOCS", "real_docs", "pdfs")


def _given_or_beside(folder: str | Path, setting: str, name: str, content: str) -> Path | None:
    named = folder or os.environ.get(setting)
    if named:
        return Path(named).expanduser().resolve()
    beside = ROOT.parent / "shared" / name
    return beside if (beside / content).is_dir() else None


def writable(folder: Path) -> Path:
    """The folder, made if it does not exist, after a file was written there as a trial.

    Raises:
        ValueError: The folder cannot be made, or takes no files.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise ValueError(f"{folder} cannot be written to ({error}); name another folder") from error


@contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path that becomes `path` when the block ends without an exception.

    Readers see the old file or the new one, never a half-written one. The temporary file keeps
    the suffix of `path`, since savers choose their format by it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
