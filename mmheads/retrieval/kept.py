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

VERSION = 2
"""To be raised by hand when the same document is ranked differently: shipped ones are left out."""

CALIBRATED: Mapping[str, Mapping[str, Any]] = {"": {"calibrated": True, "null_images": "none"}}
"""The default way of ranking."""

MODULES = (*answers.MODULES, "retrieval")
"""The code that ranks; kept rankings are computed again when it changes."""


def rank_documents(
    vlm: VLM,
    documents: Iterable[Example],
    sets: Mapping[str, HeadSet | Sequence[HeadSet]],
    *,
    window: int,
    ways: Mapping[str, Mapping[str, Any]] = CALIBRATED,
    best: int = 16,
    folder: str | Path | None = "",
    fresh: bool = False,
    progress: bool = True,
) -> pd.DataFrame:
    """Rank the candidates of each document by each set of heads, for the document's question.

    A document is indexed once for all sets and ways. Rankings are kept in the results store and not
    computed again.

    Args:
        vlm: The model.
        documents: Examples whose context consists of pages, with `candidates`: regions of one page
            each.
        sets: Sets of heads that attend to the whole context, by name, or several draws under one
            name.
        window: See `DocumentIndex`.
        ways: Settings of `DocumentIndex.masses` by name, each of which gives rankings.
        best: How many candidates of a ranking are kept.
        folder: Folder of the results store; empty: `runs/rankings`; None: nothing is read or kept.
        fresh: Leave out shipped rankings.
        progress: Show a progress bar.

    Returns:
        One row per document, way, set and kind of candidates: method (the set's name), draw
        (0-based), way, document (index), level (the kind of candidates) and order (numbers of the
        best candidates, the best first).

    Raises:
        ValueError: As `DocumentIndex` and its `masses` do.
        OSError: The folder cannot be written.
    """
    made = vlm.provenance("mmheads.retrieval", NULL_QUESTION, code=code_version(MODULES))
    several = {n: [each] if isinstance(each, HeadSet) else each for n, each in sets.items()}
    table: list[dict[str, object]] = []
    with store.open("rankings", made, version=VERSION, folder=folder, fresh=fresh) as results:
        for number, example in enumerate(tqdm(documents, "documents", disable=not progress)):
            of = {n: list(map(dataclasses.asdict, each)) for n, each in example.candidates.items()}
            document = hash_json([example.fingerprint(), of])
            asked = [
                (hash_json([document, sorted(heads), how], 16), way, how, (name, draw), heads)
                for way, settings in ways.items()
                for how in [{"window": window, "best": best, **settings}]
                for name, draws in several.items()
                for draw, heads in enumerate(draws)
            ]
            missing = {row[0]: row for row in asked if row[0] not in results}
            if missing:
                index = DocumentIndex(vlm, None, list[Any](example.context), window=window)
                needed = {way: ways[way] for _, way, *_ in missing.values()}
                masses = {way: _masses(index, example, how) for way, how in needed.items()}
                place = {head: row for row, head in enumerate(index.heads)}
            for key, way, how, _, heads in missing.values():
                rows = [place[head] for head in heads]
                order = {n: rank(mass[rows].mean(axis=0))[:best] for n, mass in masses[way].items()}
                said = {"heads": json.dumps(sorted(heads)), "settings": json.dumps(how)}
                results.add(key, {**example.labels(), **said, **order})
            table += [
                {"method": name, "draw": draw, "way": way, "document": number, "level": level}
                | {"order": results[key][level]}
                for key, way, _, (name, draw), _ in asked
                for level in example.candidates
            ]
    return pd.DataFrame(table)


def _masses(
    index: DocumentIndex, example: Example, settings: Mapping[str, Any]
) -> dict[str, NDArray[np.float32]]:
    """[head, candidate] attention from the question by kind of candidates."""
    regions = [region for each in example.candidates.values() for region in each]
    question: Any = example.question
    every = index.masses(question, [_place(example, region) for region in regions], **settings)
    ends = np.cumsum([len(each) for each in example.candidates.values()])
    return dict(zip(example.candidates, np.split(every, ends[:-1], axis=1), strict=True))


def _place(example: Example, region: Region) -> Place:
    """A whole page, or a box on one."""
    if region.box is None:
        return PagePart(region.part, 0)
    return PageBox(region.part, region.box, example.images()[region.part].size)
