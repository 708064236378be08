"""Rankings of documents' candidates by sets of heads, kept in the results store."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from mmheads import answers, store
from mmheads.examples import Example, Region
from mmheads.heads import HeadSet
from mmheads.models import VLM
from mmheads.pdfs import PageBox
from mmheads.provenance import code_version, hash_json
from mmheads.retrieval.candidates import PagePart, Place
from mmheads.retrieval.index import DocumentIndex
from mmheads.retrieval.ranking import rank
from mmheads.retrieval.windows import NULL_QUESTION

VERSION = 1
"""To be raised by hand when the same document is ranked differently: shipped ones are left out."""

MODULES = (*answers.MODULES, "retrieval")
"""The code that ranks; kept rankings are computed again when it changes."""


def rank_documents(
    vlm: VLM,
    documents: Iterable[Example],
    sets: Mapping[str, HeadSet | Sequence[HeadSet]],
    *,
    window: int,
    calibrated: bool = True,
    null_images: str = "none",
    folder: str | Path | None = "",
    fresh: bool = False,
    progress: bool = True,
) -> pd.DataFrame:
    """Rank the candidates of each document by each set of heads, for the document's question.

    A document is indexed once for all sets. Rankings are kept in the results store and not computed
    again.

    Args:
        vlm: The model.
        documents: Examples whose context consists of pages, with `candidates`: regions of one page
            each.
        sets: Sets of heads that attend to the whole context, by name, or several draws under one
            name.
        window: See `DocumentIndex`.
        calibrated: See `DocumentIndex.masses`.
        null_images: See `DocumentIndex.masses`.
        folder: Folder of the results store; empty: `runs/rankings`; None: nothing is read or kept.
        fresh: Leave out shipped rankings.
        progress: Show a progress bar.

    Returns:
        One row per document, set and kind of candidates: method (the set's name), draw (0-based),
        document (index), level (the kind of candidates) and order (numbers of the candidates, the
        best first).

    Raises:
        ValueError: As `DocumentIndex` and its `masses` do.
        OSError: The folder cannot be written.
    """
    settings = (window, calibrated, null_images)
    made = vlm.provenance("mmheads.retrieval", NULL_QUESTION, code=code_version(MODULES))
    several = {n: [each] if isinstance(each, HeadSet) else each for n, each in sets.items()}
    table: list[dict[str, object]] = []
    with store.open("rankings", made, version=VERSION, folder=folder, fresh=fresh) as results:
        for number, example in enumerate(tqdm(documents, "documents", disable=not progress)):
            of = {n: list(map(dataclasses.asdict, each)) for n, each in example.candidates.items()}
            document = example.fingerprint(), of
            asked = [
                (hash_json([*document, sorted(heads), settings]), name, draw, heads)
                for name, draws in several.items()
                for draw, heads in enumerate(draws)
            ]
            missing = {key: heads for key, _, _, heads in asked if key not in results}
            if missing:
                index = DocumentIndex(vlm, None, list[Any](example.context), window=window)
                masses = _masses(index, example, calibrated, null_images)
                row = {head: place for place, head in enumerate(index.heads)}
            for key, heads in missing.items():
                rows = [row[head] for head in heads]
                order = {level: rank(each[rows].mean(axis=0)) for level, each in masses.items()}
                how = {"heads": json.dumps(sorted(heads)), "settings": json.dumps(settings)}
                results.add(key, {**example.labels(), **how, **order})
            table += [
                {"method": name, "draw": draw, "document": number, "level": level}
                | {"order": results[key][level]}
                for key, name, draw, _ in asked
                for level in example.candidates
            ]
    return pd.DataFrame(table)


def _masses(
    index: DocumentIndex, example: Example, calibrated: bool, null_images: str
) -> dict[str, NDArray[np.float32]]:
    """[head, candidate] attention from the question by kind of candidates."""
    question: Any = example.question
    return {
        level: index.masses(
            question,
            [_place(example, region) for region in regions],
            calibrated=calibrated,
            null_images=null_images,
        )
        for level, regions in example.candidates.items()
    }


def _place(example: Example, region: Region) -> Place:
    """A whole page, or a box on one."""
    if region.box is None:
        return PagePart(region.part, 0)
    return PageBox(region.part, region.box, example.images()[region.part].size)
