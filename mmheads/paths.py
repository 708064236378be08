"""Folders of the repository, the settings that name others, and files written whole."""

import functools
import os
import platform
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pooch
import psutil

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
FIGURES = ROOT / "figures"
IN_CLONE = (ROOT / "data" / "models").is_dir()
"""Whether the package runs in a clone of the repository; an installed one has its own data."""
DATA = ROOT / "data" if IN_CLONE else Path(__file__).parent / "data"
PAPERS = DATA / "papers"
MODELS = DATA / "models"
HEADS = DATA / "heads"
RUNS = (ROOT if IN_CLONE else Path.cwd()) / "runs"
"""Where results are kept: in the clone, or in the folder in which an installed package is run."""


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

    The first of: `folder`, the setting `MMHEADS_REAL_DOCS`, `../shared/real_docs` if it exists.
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


def writable_file(path: Path) -> None:
    """Refuse the name of a file that cannot be written.

    Raises:
        ValueError: It is a folder, or its folder takes no files.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of a file")
    writable(path.parent)


@contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """Yields a temporary path that becomes `path` when the block ends without an exception.

    Readers see the old file or the new one, never a half-written one. The temporary file keeps the
    suffix of `path`, since savers choose their format by it. A new file gets the permissions
    of the user's umask, an existing one keeps its own; behind a symbolic link, the file that it
    points to is replaced. What killed processes have left in the folder is removed.

    Args:
        path: The file; its folder is made if it does not exist.

    Raises:
        OSError: The folder or the file cannot be written.
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target.parent)
    name = f".{_writer(os.getpid())}{secrets.token_hex(4)}-{target.stem[:80]}{target.suffix}"
    temporary = target.parent / name
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        if target.exists():
            shutil.copymode(target, temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _writer(process: int) -> str:
    """Returns what the names of a process's temporary files begin with, after the dot."""
    return f"mmheads-{platform.node()}-{process}-"


@functools.cache
def _remove_leftovers(folder: Path) -> None:
    """Removes temporary files of processes of this machine that run no more; once per folder."""
    names = re.compile(rf"\.mmheads-{re.escape(platform.node())}-(\d+)-[0-9a-f]{{8}}-.*")
    for path in folder.glob(".mmheads-*"):
        match = names.fullmatch(path.name)
        if match and not psutil.pid_exists(int(match[1])):
            path.unlink(missing_ok=True)
