"""One store for results: shipped in `data/results`, kept in `runs`, else computed and then kept.

A result is a row with a key (the fingerprint of its example, and what was done to the model) under
a provenance. Kept rows lie in a folder for each provenance, in files that are written whole and
never changed, so that several processes can add rows at once and an interrupted run loses only the
last seconds. Shipped files are read only.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import pyarrow as pa
from filelock import FileLock

from mmheads import paths
from mmheads.checks import parse
from mmheads.provenance import Provenance, canonical, hash_json
from mmheads.tables import FORMAT, read_about, read_keys, read_table, write_table

SHIPPED = paths.DATA / "results"

SAVE_EVERY = 5.0
"""Seconds between two saves of a long run: what a killed process may lose."""

_T = TypeVar("_T")

Row = dict[str, Any]
"""Values of one result by name: texts, numbers, and arrays of one shape in all rows."""


class Results:
    """Rows of one kind and provenance. Use as a context manager: leaving it saves what is new.

    Attributes:
        provenance: How the rows were computed.
        about: What else is written beside the provenance, by name.
    """

    def __init__(
        self,
        kind: str,
        provenance: Provenance,
        about: Mapping[str, Any],
        folder: Path | None,
        shipped: Sequence[Path],
    ) -> None:
        """Look through the files; `open` and `known` choose them."""
        self.provenance = provenance
        self.about = {"kind": kind, **about, "provenance": dataclasses.asdict(provenance)}
        self._folder = folder
        self._shipped = shipped
        self._rows: dict[str, Row] = {}
        self._new: list[str] = []
        self._written: list[Path] = []
        self._saved = time.monotonic()
        self._clock = time.process_time()
        self._place = self._scan()

    def _scan(self) -> dict[str, Path]:
        """The file of every key; shipped files come before kept ones."""
        kept = sorted(self._folder.glob("[!.]*.parquet")) if self._folder else []
        place: dict[str, Path] = {}
        for path in (*kept, *self._shipped):
            try:
                place |= dict.fromkeys(_unchanged(_keys, path), path)
            except FileNotFoundError:  # another process has joined it with others meanwhile
                return self._scan()
        return place

    def __contains__(self, key: str) -> bool:
        return key in self._rows or key in self._place

    def __iter__(self) -> Iterator[str]:
        return iter({**self._place, **self._rows})

    def __getitem__(self, key: str) -> Row:
        while key not in self._rows:
            try:
                self._load(self._place[key])
            except FileNotFoundError:  # another process has joined it with others meanwhile
                self._place = self._scan()
        return self._rows[key]

    def _load(self, path: Path) -> None:
        about, _, rows = _unchanged(_content, path)
        ignore = ("code", "versions") if path in self._shipped else ()
        made = _parsed(Provenance, about.get("provenance"), path)
        if different := made.differences(self.provenance, ignore=ignore):
            raise ValueError(f"{path} holds other results than its folder: {different}; delete it")
        self._rows = rows | self._rows

    def add(self, key: str, row: Row) -> None:
        """Keep one more row; rows are saved every few seconds and at the end.

        Its `cpu_seconds` are those of this process since the row before, or since the opening.
        """
        before, self._clock = self._clock, time.process_time()
        self._rows[key] = {**row, "cpu_seconds": float(f"{self._clock - before:.2g}")}
        self._new.append(key)
        if time.monotonic() - self._saved > SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Write the rows that are new into a file of their own."""
        if self._folder and self._new:
            self._write(self._new)
            self._new = []
        self._saved = time.monotonic()

    def _write(self, keys: Sequence[str]) -> None:
        assert self._folder is not None
        with paths.write_whole(self._folder / _ABOUT) as temporary:
            temporary.write_text(canonical({"format": FORMAT, **self.about}), encoding="utf-8")
        path = self._folder / f"{uuid.uuid4().hex}.parquet"
        _write_rows(path, [{"key": key, **self[key]} for key in keys], self.about, {})
        self._written.append(path)
        self._place |= dict.fromkeys(keys, path)

    def note(self, about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
        """Remember which rows a condition is made of, so that it can be found without the model.

        Args:
            about: The condition, by the names of its settings.
            rows: Metadata of its examples, each with its `key`. Those of earlier calls stay.
        """
        if self._folder is None or not rows:
            return
        path = self._folder / f"{hash_json(about)[:16]}.json"
        with FileLock(self._folder / ".lock"):
            before = _parsed(_Note, path.read_bytes(), path).rows if path.exists() else []
            merged = {canonical(row): dict(row) for row in (*before, *rows)}
            with paths.write_whole(path) as temporary:
                note = _Note(dict(about), list(merged.values()))
                temporary.write_text(json.dumps(dataclasses.asdict(note)), encoding="utf-8")

    def notes(self) -> list[dict[str, Any]]:
        """All conditions: `about`, and the metadata of the `rows`, each with its `key`.

        Rows whose results are missing are left out.
        """
        kept = sorted(self._folder.glob("[!.]*.json")) if self._folder else []
        notes = [_parsed(_Note, path.read_bytes(), path) for path in kept if path.name != _ABOUT]
        for path in self._shipped:
            about, rows, _ = _unchanged(_content, path)
            for number, condition in enumerate(about.get("conditions", [])):
                notes.append(_Note(condition, [row for row in rows if row["condition"] == number]))
        return [
            {"about": note.about, "rows": [row for row in note.rows if row["key"] in self]}
            for note in notes
        ]

    def write_shipped(self, path: Path, about: Mapping[str, Any], short: Mapping[str, str]) -> None:
        """Write all rows as one shipped file; see `ship`."""
        kept = Results(self.about["kind"], self.provenance, {}, self._folder, [])
        conditions: list[dict[str, Any]] = []
        labels: dict[str, Row] = {}
        for note in self.notes():
            if note["about"] not in conditions:
                conditions.append(note["about"])
            number = conditions.index(note["about"])
            for row in note["rows"]:
                label = {n: row[n] for n in ("key", "task", "length", "depth", "haystack")}
                labels[canonical([number, label])] = {**label, "condition": number}
        labelled = {label["key"] for label in labels.values()}
        others = [{"key": key} for key in sorted(set(self._place) - labelled)]
        rows = [
            {**(kept if label["key"] in kept else self)[label["key"]], **label}
            for label in (*labels.values(), *others)
        ]
        rows[len(labels) :] = sorted(rows[len(labels) :], key=_alike)
        content = {**self.about, **about, "conditions": conditions}
        _write_rows(path, rows, content, short)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.save()
        if len(self._written) > 1:  # one file for all that was computed here
            parts, self._written = self._written, []
            self._write([key for key, path in self._place.items() if path in parts])
            for path in parts:
                path.unlink(missing_ok=True)
        if self._folder:
            with suppress(OSError):  # nothing was computed: leave no empty folder
                self._folder.rmdir()


def _unchanged(read: Callable[[Path, int, int], _T], path: Path) -> _T:
    """What a function has read from a file, from memory while the file does not change."""
    about = path.stat()
    return read(path, about.st_size, about.st_mtime_ns)


@lru_cache(maxsize=64)
def _keys(path: Path, size: int, changed: int) -> list[str]:
    return read_keys(path)


@lru_cache(maxsize=8)
def _content(
    path: Path, size: int, changed: int
) -> tuple[dict[str, Any], list[Row], dict[str, Row]]:
    """What a file says about itself, its rows, and the first row of each key."""
    about, scalars, arrays = read_table(path)
    rows = scalars.to_pylist()
    for name, array in arrays.items():
        array.flags.writeable = False
        for row, values in zip(rows, array, strict=True):
            row[name] = values
    return about, rows, {row["key"]: row for row in reversed(rows)}


def _write_rows(
    path: Path, rows: Sequence[Row], about: Mapping[str, Any], short: Mapping[str, str]
) -> None:
    """Write rows of one kind, each with its `key`, as a table."""
    arrays = [name for name, value in rows[0].items() if isinstance(value, np.ndarray)]
    stacked = {name: np.stack([row.pop(name) for row in rows]) for name in arrays}
    write_table(path, pa.Table.from_pylist(rows), stacked, about, short=short)


def _alike(row: Row) -> list[str]:
    """An order in which like rows are neighbours: a file is then smaller by a fifth."""
    return [str(row.get(name)) for name in ("haystack", "heads", "settings")]


_ABOUT = "about.json"


def open(
    kind: str,
    provenance: Provenance,
    *,
    version: int,
    folder: str | Path | None = "",
    fresh: bool = False,
    arrays: Collection[str] = (),
    about: Mapping[str, Any] | None = None,
) -> Results:
    """The results of one kind and provenance; new ones are added to a folder.

    Args:
        kind: "scores" or "answers".
        provenance: How the results are computed now. Kept ones agree with it in every field;
            shipped ones may have been computed with other libraries and other code of the same
            `version`.
        version: Raised by hand when what is computed changes: shipped results of another version
            are left out.
        folder: Where results are kept; empty: `runs/<kind>`; None: nothing is read or kept.
        fresh: Leave out shipped results.
        arrays: Leave out shipped results without these arrays.
        about: What else is written beside the provenance, by name.

    Raises:
        OSError: The folder cannot be written.

    Warns:
        UserWarning: No shipped results of this model fit; the message says what differs.
    """
    if folder is None:
        return Results(kind, provenance, about or {}, None, [])
    place = kept_folder(kind, folder) / f"{Path(provenance.model).name}-{provenance.key[:12]}"
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=place):  # a folder that cannot be written is an error now
        pass
    shipped, unfit = [], []
    for path, made, said in [] if fresh else _shipped(kind, provenance.model):
        different = made.differences(provenance, ignore=("code", "versions"))
        number = said.get("version")
        if missing := set(arrays) - set(said["arrays"]):
            different = f"it has no {', '.join(sorted(missing))}"
        if number != version:
            different = f"version {number!r}, now {version!r}"
        if different:
            unfit.append(f"{path} is not used: {different}")
        else:
            shipped.append(path)
    if unfit and not shipped:
        warnings.warn("\n".join(unfit), stacklevel=3)
    return Results(kind, provenance, about or {}, place, shipped)


def known(
    kind: str,
    model: str,
    *,
    version: int,
    now: Provenance,
    folder: str | Path = "",
    fresh: bool = False,
) -> list[Results]:
    """Results of a model by its name, read without the model: one entry for each provenance.

    Args:
        kind: "scores" or "answers".
        model: Name of the model, without its folder.
        version: See `open`.
        now: Kept results must agree with its `code` and `versions`.
        folder: See `open`.
        fresh: Leave out shipped results.
    """
    results: dict[str, tuple[dict[str, Any], Provenance, Path | None, list[Path]]] = {}
    for path in sorted(kept_folder(kind, folder).glob(f"*/{_ABOUT}")):
        about = _parsed(dict[str, Any], path.read_bytes(), path)
        made = _parsed(Provenance, about.get("provenance"), path)
        current = made.code == now.code and dict(made.versions) == dict(now.versions)
        if Path(made.model).name == model and current and about.get("format") == FORMAT:
            stable = dataclasses.replace(made, code="", versions={})
            results[stable.key] = (about, made, path.parent, [])
    for path, made, about in [] if fresh else _shipped(kind, model):
        if about.get("version") == version:
            stable = dataclasses.replace(made, code="", versions={})
            results.setdefault(stable.key, (about, made, None, []))[3].append(path)
    return [
        Results(kind, made, {"geometry": about.get("geometry")}, place, shipped)
        for about, made, place, shipped in results.values()
    ]


def ship(
    kind: str,
    model: str,
    *,
    version: int,
    now: Provenance,
    machine: str,
    date: str,
    short: Mapping[str, str],
    folder: str | Path = "",
) -> list[Path]:
    """Write all known results of a model as shipped files, one for each provenance.

    Kept rows replace shipped ones of the same key, and the new files the model's old ones.

    Args:
        kind: See `known`, like `model`, `version`, `now` and `folder`.
        model: Name of the model.
        version: Number of the shipped results.
        now: Current code and libraries.
        machine: Where they were computed: "2 CPU cores" or "1 x H100".
        date: The day: "2026-11-25".
        short: See `write_table`.
        folder: Folder of the kept results.

    Raises:
        ValueError: See `write_table`.
    """
    old = {path for path, _, _ in _shipped(kind, model)}
    written = []
    for results in known(kind, model, version=version, now=now, folder=folder):
        made = dataclasses.replace(results.provenance, code="", versions={})
        path = SHIPPED / kind / f"{Path(model).name}-{made.key[:8]}.parquet"
        results.write_shipped(path, {"version": version, "machine": machine, "date": date}, short)
        written.append(path)
    for path in old - set(written):
        path.unlink()
    return written


def kept_folder(kind: str, folder: str | Path = "") -> Path:
    """Where results of a kind are kept, by default `runs/<kind>`."""
    return Path(folder) if folder else paths.RUNS / kind


def _shipped(kind: str, model: str) -> Iterator[tuple[Path, Provenance, dict[str, Any]]]:
    """Shipped files of a model: path, provenance and what else they say about themselves."""
    for path in sorted((SHIPPED / kind).glob("*.parquet")):
        about = read_about(path)
        if about.get("kind") == kind:
            made = _parsed(Provenance, about.get("provenance"), path)
            if Path(made.model).name == Path(model).name:
                yield path, made, about


def _parsed(kind: type[_T], content: object, path: Path) -> _T:
    """What JSON from a file of results describes; an error names the file."""
    try:
        return parse(kind, content)
    except ValueError as error:
        raise ValueError(
            f"{path} cannot be read ({error}); delete it and compute its results again"
        ) from error


@dataclass(frozen=True)
class _Note:
    """A condition by the names of its settings, and metadata of its rows, each with its `key`."""

    about: dict[str, Any]
    rows: list[dict[str, Any]]

    def __post_init__(self) -> None:
        if not all("key" in row for row in self.rows):
            raise ValueError("a row has no key")
