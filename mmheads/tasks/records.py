"""Records of published data sets: from a folder with the hub's files, or streamed from the hub."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, in pixels."""
SLACK = 1.0
"""Pixels by which a published box may reach over its image: rounding; it is then cut."""


@dataclass(frozen=True, eq=False)
class Record:
    """A row of a data set.

    Attributes:
        values: By column.
        where: File and row, for messages.
        folder: What paths in it are relative to; None on the hub.
    """

    values: Mapping[str, Any]
    where: str
    folder: Path | None = None

    def error(self, message: str) -> ValueError:
        """The error to raise, with the place."""
        return ValueError(f"{self.where}: {message}")

    def expect(self, columns: Mapping[str, type | tuple[type, ...]]) -> None:
        """Check that the record has these columns, with values of these types.

        Raises:
            ValueError: It has not.
        """
        if missing := [name for name in columns if name not in self.values]:
            raise self.error(
                f"no column {', '.join(missing)}; it has {', '.join(self.values)}. The data set's "
                "schema has changed, or this is another one"
            )
        for name, kind in columns.items():
            if not isinstance(self.values[name], kind):
                kinds = kind if isinstance(kind, tuple) else (kind,)
                raise self.error(
                    f"{name} is a {type(self.values[name]).__name__}; expected "
                    f"{' or '.join(each.__name__ for each in kinds)}"
                )

    def text(self, name: str) -> str:
        """A text that is not empty.

        Raises:
            ValueError: It is.
        """
        value = self.values[name]
        if not isinstance(value, str) or not value.strip():
            raise self.error(f"{name} is {value!r}; expected a text")
        return value

    def image(self, value: Any, name: str = "image") -> Image.Image:
        """An image, from what a column holds: an image, its bytes, or a path in the folder.

        Raises:
            ValueError: It is missing or cannot be read.
        """
        if isinstance(value, Image.Image):
            return value.convert("RGB")
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        try:
            if isinstance(value, bytes):
                return Image.open(io.BytesIO(value)).convert("RGB")
            if isinstance(value, str) and value and self.folder is not None:
                return Image.open(self.folder / value).convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise self.error(f"{name} cannot be read: {error}") from error
        raise self.error(f"{name} is {value!r}; expected an image, its bytes, or a path")

    def box(self, edges: Any, size: tuple[int, int], *, corners: bool) -> Box:
        """A box of an image, cut to it where rounding has put it over the edge.

        Args:
            edges: Four numbers in pixels from the top left.
            size: Width and height of the image.
            corners: Whether the last two are right and bottom, not width and height.

        Raises:
            ValueError: It is no box, is empty, or reaches out of the image.
        """
        try:
            left, top, right, bottom = map(float, edges)
        except (TypeError, ValueError) as error:
            raise self.error(f"box {edges!r}; expected four numbers") from error
        if not corners:
            right, bottom = left + right, top + bottom
        width, height = size
        inside = (
            -SLACK <= left < right <= width + SLACK and -SLACK <= top < bottom <= height + SLACK
        )
        box = (max(0.0, left), max(0.0, top), min(right, width), min(bottom, height))
        if not inside or box[0] >= box[2] or box[1] >= box[3]:
            kind = "left, top, right, bottom" if corners else "left, top, width, height"
            raise self.error(f"box {edges!r} ({kind}) does not lie in its image of {size} pixels")
        return box


def read(
    source: str | Path,
    columns: Mapping[str, type | tuple[type, ...]],
    *,
    files: str = "*",
    config: str = "",
    split: str = "",
) -> Iterator[Record]:
    """Records of a data set, in order, read as they are asked for.

    Args:
        source: A folder, or the name of a data set on the hub, which is streamed.
        columns: Names that every record must have, and the types of their values; `object` for
            any. None as a value is let through where a type is `type(None)`.
        files: Which files of the folder: .parquet, .jsonl, .json (a list of records).
        config: Configuration on the hub.
        split: Split on the hub.

    Raises:
        ValueError: Nothing is there, or a record lacks a column or holds another type: the schema
            has changed, or the data are another set's.
    """
    found = False
    for record in (
        _folder(Path(source), files) if Path(source).is_dir() else _hub(str(source), config, split)
    ):
        found = True
        record.expect(columns)
        yield record
    if not found:
        raise ValueError(f"{source} holds no record in files {files!r}")


def _folder(folder: Path, files: str) -> Iterator[Record]:
    kinds = (".parquet", ".jsonl", ".json")
    paths = [path for path in sorted(folder.glob(files)) if path.suffix in kinds]
    if not paths:
        raise ValueError(f"{folder} holds no file {files!r} ending in {', '.join(kinds)}")
    for path in paths:
        try:
            for number, values in enumerate(_rows(path)):
                if not isinstance(values, dict):
                    raise ValueError(f"row {number} is a {type(values).__name__}, not a record")
                yield Record(values, f"{path}, row {number}", folder)
        except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error


def _rows(path: Path) -> Iterator[Any]:
    if path.suffix == ".parquet":
        for batch in pq.ParquetFile(path).iter_batches(batch_size=64):
            yield from batch.to_pylist()
    elif path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            yield from (json.loads(line) for line in lines if line.strip())
    else:
        content = json.loads(path.read_text(encoding="utf-8"))
        yield from content if isinstance(content, list) else [content]


def _hub(name: str, config: str, split: str) -> Iterator[Record]:
    try:
        rows = datasets.load_dataset(name, config or None, split=split or None, streaming=True)
    except Exception as error:  # the hub's libraries raise a dozen kinds
        raise ValueError(
            f"{name} is no folder here and cannot be read from the hub ({error}); give a folder "
            "with its files"
        ) from error
    for number, values in enumerate(rows):
        yield Record(values, f"{name} {config} {split}, row {number}")
