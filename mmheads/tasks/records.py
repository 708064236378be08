"""Records of published data sets, read from a folder with the hub's files or streamed from the hub.

Files are read with their own values. `datasets` gives the columns of a JSON file one type instead:
it turns the answer "2013-05-01" into a date and 5 beside 5.5 into 5.0.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import GenericAlias
from typing import Any, get_args, get_origin

import datasets
import pyarrow.parquet as pq
from PIL import Image

from mmheads.images import open_image

Kind = type | GenericAlias | tuple[type | GenericAlias, ...]
"""A type, a list of a type such as `list[str]`, or several of both."""


@dataclass(frozen=True, eq=False)
class Record:
    """A row of a data set.

    Attributes:
        values: The values by column.
        where: File and row, for error messages.
        folder: The folder that paths in the record are relative to; None on the hub.
    """

    values: Mapping[str, Any]
    where: str
    folder: Path | None = None

    def error(self, message: str) -> ValueError:
        """Return the error to raise, with file and row before the message."""
        return ValueError(f"{self.where}: {message}")

    def expect(self, columns: Mapping[str, Kind]) -> None:
        """Check that the record has these columns, with values of these types.

        True and False do not count as numbers.

        Raises:
            ValueError: A column is missing, or a value has another type.
        """
        if missing := [name for name in columns if name not in self.values]:
            raise self.error(
                f"no column {', '.join(missing)}; it has {', '.join(self.values)}. The data set's "
                "schema has changed, or this is another data set"
            )
        for name, kind in columns.items():
            value, kinds = self.values[name], kind if isinstance(kind, tuple) else (kind,)
            if not any(_is(value, each) for each in kinds):
                expected = " or ".join(
                    str(each) if isinstance(each, GenericAlias) else each.__name__ for each in kinds
                )
                raise self.error(
                    f"{name} is {value!r:.200}, a {type(value).__name__}; expected {expected}"
                )

    def text(self, name: str) -> str:
        """Return a column's text, which must not be empty.

        Raises:
            ValueError: The value is not a text, or is empty.
        """
        value = self.values[name]
        if not isinstance(value, str) or not value.strip():
            raise self.error(f"{name} is {value!r:.200}; expected a text")
        return value

    def image(self, value: Any, name: str = "image") -> Image.Image:
        """Return the image that a column holds, in RGB.

        Args:
            value: An image, its bytes, a path relative to `folder`, or the hub's dict of bytes and
                path.
            name: What error messages call the image.

        Raises:
            ValueError: The image is missing or cannot be read.
        """
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str) and value and self.folder is not None:
            value = self.folder / value
            name = f"{name} ({value})"
        if not isinstance(value, bytes | Path | Image.Image):
            raise self.error(f"{name} is {value!r:.200}; expected an image, its bytes, or a path")
        try:
            return open_image(value, name)
        except ValueError as error:
            raise self.error(str(error)) from error


def read_records(
    source: str | Path,
    columns: Mapping[str, Kind],
    *,
    files: str = "*",
    config: str = "",
    split: str = "",
) -> Iterator[Record]:
    """Yield the records of a data set in order, each read when it is asked for.

    Args:
        source: A folder, or the name of a data set on the hub, which is streamed.
        columns: Names that every record must have, and the types of their values; `object` stands
            for any. None is accepted as a value where `type(None)` is among the types.
        files: Which files of the folder are read, as a pattern; they are .parquet, .jsonl or
            .json (a list of records).
        config: Configuration on the hub.
        split: Split on the hub.

    Raises:
        ValueError: There is no record, a file cannot be read, or a record lacks a column or holds
            a value of another type.
    """
    records = (
        _folder(Path(source), files) if Path(source).is_dir() else _hub(str(source), config, split)
    )
    record = None
    for record in records:
        record.expect(columns)
        yield record
    if record is None:
        raise ValueError(f"{source} holds no record in files {files!r}")


def parse_line(line: bytes) -> Any:
    """Return the value in a line of a JSON Lines file, which is UTF-8 with or without a BOM.

    Raises:
        ValueError: The line is not UTF-8, not JSON (NaN and Infinity are not), or is nested too
            deeply.
    """
    try:
        return json.loads(line.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which is not a number in JSON")


def _is(value: Any, kind: Any) -> bool:
    if get_origin(kind) is list:
        (of,) = get_args(kind)
        return isinstance(value, list) and all(_is(item, of) for item in value)
    kind = get_origin(kind) or kind
    return isinstance(value, kind) and not (isinstance(value, bool) and kind in (int, float))


def _folder(folder: Path, files: str) -> Iterator[Record]:
    kinds = (".parquet", ".jsonl", ".json")
    paths = [path for path in sorted(folder.glob(files)) if path.suffix in kinds]
    if not paths:
        raise ValueError(f"{folder} holds no file {files!r} ending in {', '.join(kinds)}")
    for path in paths:
        yield from _numbered(_rows(path), str(path), folder)


def _rows(path: Path) -> Iterator[Any]:
    if path.suffix == ".parquet":
        for batch in pq.ParquetFile(path).iter_batches(batch_size=64):
            yield from batch.to_pylist()
    elif path.suffix == ".jsonl":
        with path.open("rb") as lines:
            yield from (parse_line(line) for line in lines if line.strip())
    else:
        content = parse_line(path.read_bytes())
        yield from content if isinstance(content, list) else [content]


def _hub(name: str, config: str, split: str) -> Iterator[Record]:
    try:
        rows = datasets.load_dataset(name, config or None, split=split or None, streaming=True)
        if rows.features:  # Images stay bytes, so that they are opened in one place.
            rows = rows.decode(False)
    except Exception as error:  # The hub's libraries raise a dozen kinds of exceptions.
        raise ValueError(
            f"{name} is not a folder here and cannot be read from the hub ({error}); give a folder "
            "with its files"
        ) from error
    yield from _numbered(rows, " ".join(filter(None, (name, config, split))))


def _numbered(rows: Iterable[Any], place: str, folder: Path | None = None) -> Iterator[Record]:
    """Yield the records in rows; whatever goes wrong in reading a row is an error that names it."""
    left = iter(rows)
    for number in count():
        where = f"{place}, row {number}"
        try:
            values = next(left)
        except StopIteration:
            return
        except Exception as error:  # pyarrow and the hub's libraries raise a dozen kinds.
            raise ValueError(f"{where}, cannot be read: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{where} is {values!r:.100}; expected a record with named columns")
        yield Record(values, where, folder)
