"""Files and tables of scores: parquet files, long tables, and the authors' JSON."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa

from mmheads.checks import parse
from mmheads.heads import HeadGeometry
from mmheads.provenance import Provenance
from mmheads.tables import read_table, write_table

if TYPE_CHECKING:
    from mmheads.scores import HeadScores

_SCORES = "scores"


def write(path: str | Path, scores: HeadScores) -> None:
    """Write scores as a parquet file with one row per example."""
    about = {
        "kind": "head scores",
        "geometry": dataclasses.asdict(scores.geometry),
        "eligible": scores.eligible.tolist(),
        "provenance": dataclasses.asdict(scores.provenance),
    }
    scalars = pa.Table.from_pandas(scores.metadata, preserve_index=False)
    write_table(Path(path), scalars, {_SCORES: scores.values, **scores.quantities}, about)


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


def to_frame(scores: HeadScores) -> pd.DataFrame:
    """One row per example and head: metadata, layer, head, eligible, score, every quantity."""
    layers, heads = scores.eligible.shape
    places = pd.MultiIndex.from_product([range(layers), range(heads)], names=["layer", "head"])
    of_heads = places.to_frame(index=False).assign(eligible=scores.eligible.ravel())
    arrays = {"score": scores.values, **scores.quantities}
    columns = {name: array.ravel() for name, array in arrays.items()}
    return scores.metadata.merge(of_heads, how="cross").assign(**columns)


def to_released_json(scores: HeadScores) -> dict[str, Any]:
    """Mean scores as paper A's authors release them: `head_score_list`, the best first."""
    mean, metadata, provenance = scores.mean, scores.metadata, scores.provenance
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
