"""Parquet files of rows with arrays: whole or absent, with checksums over all that they hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mmheads import paths
from mmheads.provenance import canonical

FORMAT = 3
"""Version of the layout; files of another version are refused."""

STEPS = 65535
"""Steps between 0 and 1 of an array that is written as "uint16": 1.6e-5 each."""

LIMITS = {"uint16": (0, 1), "float16": (-65504, 65504)}
"""What values an array may have that is written in 16 bits of this type."""

LEFT_OUT = "left out"
"""Type of an array that is not written."""

_ABOUT = b"mmheads"


def write_table(
    path: Path,
    scalars: pa.Table,
    arrays: Mapping[str, NDArray[Any]],
    about: Mapping[str, Any],
    *,
    short: Mapping[str, str] | None = None,
) -> None:
    """Write rows as a parquet file, whole or not at all.

    Args:
        path: The file.
        scalars: One row per result: texts and numbers.
        arrays: [row, ...] by name.
        about: What the file says about itself, as JSON.
        short: Types of `LIMITS`, or `LEFT_OUT`, by name of array; others are written as float32.

    Raises:
        ValueError: A value to be written in 16 bits lies outside the limits of the type.
    """
    stored: dict[str, NDArray[Any]] = {}
    for name, array in arrays.items():
        kind = (short or {}).get(name, "float32")
        if kind in LIMITS and not ((array >= LIMITS[kind][0]) & (array <= LIMITS[kind][1])).all():
            expected = f"expected values in {list(LIMITS[kind])}"
            raise ValueError(f"{name} cannot be written in 16 bits: {expected}")
        if kind != LEFT_OUT:
            rounded = np.rint(array.astype(float) * STEPS) if kind == "uint16" else array
            stored[name] = rounded.astype(kind)
    shapes = {name: list(array.shape[1:]) for name, array in stored.items()}
    content = {**about, "format": FORMAT, "arrays": shapes}
    content["sha256"] = _digest(content, scalars, stored)
    table = scalars
    for name, array in stored.items():
        column = pa.FixedSizeListArray.from_arrays(array.ravel(), int(np.prod(shapes[name])))
        table = table.append_column(name, column)
    table = table.replace_schema_metadata({_ABOUT: canonical(content)})
    split = {f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in stored}  # a third less
    repeated = [name for name in scalars.column_names if name != "key"]
    how: dict[str, Any] = {"use_dictionary": repeated, "column_encoding": split}
    with paths.write_whole(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True, **how)


def read_table(path: Path) -> tuple[dict[str, Any], pa.Table, dict[str, NDArray[np.float32]]]:
    """What `write_table` wrote: what the file says about itself, its scalars and its arrays.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, of another program, or has another format.
    """
    about = read_about(path)
    with _readable(path):
        table = pq.read_table(path, page_checksum_verification=True, partitioning=None)
        stored: dict[str, NDArray[Any]] = {
            name: table.column(name).combine_chunks().flatten().to_numpy().reshape(-1, *shape)
            for name, shape in about["arrays"].items()
        }
        scalars = table.drop_columns(list(stored)).replace_schema_metadata(None)
        if _digest(about, scalars, stored) != about.pop("sha256"):
            raise ValueError("its content does not have the checksum that was written")
    arrays: dict[str, NDArray[np.float32]] = {
        name: array.astype(np.float32) / np.float32(STEPS if array.dtype == np.uint16 else 1)
        for name, array in stored.items()
    }
    return about, scalars, arrays


def read_about(path: Path) -> dict[str, Any]:
    """What a file of `write_table` says about itself. Raises as `read_table` does."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; expected a parquet file of results")
    with _readable(path):
        about: dict[str, Any] = json.loads(pq.read_metadata(path).metadata[_ABOUT])
        number = about.get("format")
    if number != FORMAT:
        raise ValueError(
            f"{path} has format {number!r}, this version reads {FORMAT}: compute its results again"
        )
    return about


def read_keys(path: Path) -> list[str]:
    """The column `key` of a file, without the rest. Raises as `read_table` does."""
    read_about(path)
    with _readable(path):
        column = pq.read_table(path, columns=["key"], partitioning=None)["key"]
        return [str(key) for key in column.to_pylist()]


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn every error of reading a file that exists into one ValueError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:  # pyarrow raises many kinds of errors for damaged files
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"{path} is not a readable parquet file of results ({reason}); it is damaged or was "
            "written by another program: delete it and compute its results again"
        ) from error


def _digest(about: Mapping[str, Any], table: pa.Table, arrays: Mapping[str, NDArray[Any]]) -> str:
    """Checksum of all content; it does not depend on how parquet encodes it."""
    digest = hashlib.sha256(canonical({**about, "sha256": ""}).encode())
    digest.update(json.dumps(table.to_pydict(), default=str).encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()
