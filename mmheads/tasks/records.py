"""Records of published data sets, read from a folder with the hub's files.

Files are read with their own values. Libraries for tables give the columns of a JSON file one type
instead: they turn the answer "2013-05-01" into a date and 5 beside 5.5 into 5.0.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import pyarrow.parquet as pq
from PIL import Image
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError

from mmheads.checks import first_problem
from mmheads.images import open_image


class Columns(BaseModel):
    """The columns that a record must have, with their types; further columns are left out."""

    model_config = ConfigDict(strict=True, frozen=True, protected_namespaces=())


C = TypeVar("C", bound=Columns)


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("expected a text that is not empty")
    return text


def _only(value: object) -> object:
    return value[0] if isinstance(value, list) and len(value) == 1 else value


Text = Annotated[str, AfterValidator(_not_blank)]
"""A text that holds more than white space."""
OneText = Annotated[Text, BeforeValidator(_only)]
"""A text, or a list of one text."""


@dataclass(frozen=True, eq=False)
class Record(Generic[C]):
    """A row of a data set.

    Attributes:
        values: The values by column.
        where: File and row, for error messages.
        folder: The folder that paths in the record are relative to.
    """

    values: C
    where: str
    folder: Path

    def error(self, message: str) -> ValueError:
        """Return the error to raise, with file and row before the message."""
        return ValueError(f"{self.where}: {message}")

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
        if isinstance(value, str) and value:
            value = self.folder / value
            name = f"{name} ({value})"
        if not isinstance(value, bytes | Path | Image.Image):
            raise self.error(f"{name} is {value!r:.200}; expected an image, its bytes, or a path")
        try:
            return open_image(value, name)
        except ValueError as error:
            raise self.error(str(error)) from error


def check_record(columns: type[C], values: object, where: str, folder: Path) -> Record[C]:
    """Return a record after its columns are checked.

    Args:
        columns: The columns that it must have.
        values: The row as it was read.
        where: File and row, for error messages.
        folder: The folder that paths in the record are relative to.

    Raises:
        ValueError: The row is not a record, lacks a column, or holds a value of another type.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where} is {values!r:.100}; expected a record with named columns")
    try:
        return Record(columns.model_validate(values), where, folder)
    except ValidationError as error:
        raise ValueError(f"{where}: {first_problem(error, columns)}") from error


def read_records(folder: str | Path, columns: type[C], *, files: str = "*") -> Iterator[Record[C]]:
    """Yield the records of a data set in order, each read when it is asked for.

    Args:
        folder: Where the files are.
        columns: The columns that every record must have.
        files: Which files of the folder are read, as a pattern; they are .parquet, .jsonl or
            .json (a list of records).

    Raises:
        ValueError: There is no record, a file cannot be read, or a record lacks a column or holds
            a value of another type.
    """
    folder, kinds = Path(folder), (".parquet", ".jsonl", ".json")
    paths = [path for path in sorted(folder.glob(files)) if path.suffix in kinds]
    if not paths:
        raise ValueError(f"{folder} holds no file {files!r} ending in {', '.join(kinds)}")
    record = None
    for path in paths:
        rows = _rows(path)
        for number in count():
            where = f"{path}, row {number}"
            try:
                values = next(rows)
            except StopIteration:
                break
            except Exception as error:  # pyarrow raises a dozen kinds of exceptions.
                raise ValueError(f"{where}, cannot be read: {error}") from error
            record = check_record(columns, values, where, folder)
            yield record
    if record is None:
        raise ValueError(f"{folder} holds no record in files {files!r}")


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
