"""Files and tables of scores: parquet files, long tables, and the authors' JSON.

Functions take and give the fields of `HeadScores`, so that this module lies below it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from mmheads.checks import parse
from mmheads.heads import HeadGeometry
from mmheads.provenance import Provenance
from mmheads.tables import read_table, write_table

_SCORES = "scores"

Arrays = Mapping[str, NDArray[np.floating[Any]]]
"""[example, layer, head] by name."""


def write(
    path: str | Path,
    values: NDArray[np.floating[Any]],
    quantities: Arrays,
    metadata: pd.DataFrame,
    geometry: HeadGeometry,
    eligible: NDArray[np.bool_],
    provenance: Provenance,
) -> None:
    """Write the fields of one `HeadScores` as a parquet file with one row per example."""
    about = {
        "kind": "head scores",
        "geometry": dataclasses.asdict(geometry),
        "eligible": eligible.tolist(),
        "provenance": dataclasses.asdict(provenance),
    }
    scalars = pa.Table.from_pandas(metadata, preserve_index=False)
    write_table(Path(path), scalars, {_SCORES: values, **quantities}, about)


def read(path: str | Path, model: str | None = None) -> dict[str, Any]:
    """The fields of the `HeadScores` that `write` wrote, by name.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a file of scores of this version, it is damaged, or it holds scores of
            another model than `model`.
    """
    path = Path(path)
    about, scalars, arrays = read_table(path)
    try:
        described = parse(_About, about)
        values = arrays.pop(_SCORES)
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is not a file of head scores ({error}); expected what `HeadScores.save` writes"
        ) from error
    if model not in (None, described.provenance.model):
        raise ValueError(f"{path} holds scores of {described.provenance.model!r}, not of {model!r}")
    return {
        "values": values,
        "geometry": described.geometry,
        "eligible": np.array(described.eligible),
        "metadata": scalars.to_pandas(),
        "quantities": arrays,
        "provenance": described.provenance,
    }


@dataclasses.dataclass(frozen=True)
class _About:
    """What a file of scores says about itself."""

    kind: Literal["head scores"]
    geometry: HeadGeometry
    eligible: list[list[bool]]
    provenance: Provenance


def to_frame(
    values: NDArray[np.floating[Any]],
    quantities: Arrays,
    metadata: pd.DataFrame,
    eligible: NDArray[np.bool_],
) -> pd.DataFrame:
    """One row per example and head: metadata, layer, head, eligible, score, every quantity."""
    examples, layers, heads = values.shape
    size = layers * heads
    table = metadata.loc[metadata.index.repeat(size)].reset_index(drop=True)
    table["layer"] = np.tile(np.repeat(np.arange(layers), heads), examples)
    table["head"] = np.tile(np.arange(heads), examples * layers)
    table["eligible"] = np.tile(eligible.ravel(), examples)
    table["score"] = values.ravel()
    for name, array in quantities.items():
        table[name] = array.ravel()
    return table


def to_released_json(
    mean: NDArray[np.floating[Any]], metadata: pd.DataFrame, provenance: Provenance
) -> dict[str, Any]:
    """Mean scores as paper A's authors release them: `head_score_list`, the best first."""
    order = np.argsort(-mean, axis=None, kind="stable")
    tokens = metadata.get("tokens", metadata["length"]).tolist()
    return {
        "args": {
            "model_name_or_path": provenance.model,
            "seed": provenance.settings.get("shuffle_seed", 0),
            **provenance.settings,
        },
        "head_score_list": [
            [f"{layer}-{head}", float(mean[layer, head])]
            for layer, head in (divmod(int(index), mean.shape[1]) for index in order)
        ],
        "metrics": {"input_len": tokens},
        "averaged_metrics": {"input_len": float(np.mean(tokens))},
    }
