"""Write how well a pretrained text model's heads rank the pages of real documents.

python -m cluster.real_ranking

It reads the shipped attention (`cluster.real_documents`) and the documents, and needs no model but,
for one row, a sentence-transformers model (`MMHEADS_REAL_EMBEDDER`). The recall of each question by
each method goes to `data/results/real_ranking.csv`, from which notebook 06 draws its tables.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cluster import real_documents as plan
from cluster.real_model import MAIN
from cluster.real_results import MODEL
from mmheads import paths, retrieval, store
from mmheads.controls import random_controls
from mmheads.heads import HeadSet, head_count
from mmheads.kept_scores import load_needle_scores
from mmheads.provenance import Provenance, code_version, library_versions
from mmheads.retrieval import rank
from mmheads.scores import HeadScores
from mmheads.tasks.mmdocir import AnnotatedDocument

TABLE = store.SHIPPED / "real_ranking.csv"
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 1.0)
"""Of all heads, the strongest on needles."""
DRAWS = 20
"""Random sets of heads."""
RRF = 60
"""Constant of reciprocal rank fusion, its usual value."""

Order = list[int]
Masses = NDArray[np.float32]
"""[page, layer, head], calibrated or not."""


def measured(document: AnnotatedDocument, results: store.Results) -> list[tuple[Masses, Masses]]:
    """Returns calibrated and raw attention of each question; empty if one is missing."""
    texts = plan.texts_of(document)
    asked = [retrieval.NULL_QUESTION, *(question.text for question in document.questions)]
    keys = [plan.keys(texts, text) for text in asked]
    if not all(key in results for of_question in keys for key in of_question):
        return []
    null, *own = (np.stack([results[key]["mass"] for key in row]) for row in keys)
    return [(each - null, each) for each in own]


class Rankings:
    """Orders of pages by method, for the questions of one document."""

    def __init__(
        self, document: AnnotatedDocument, masses: Sequence[tuple[Masses, Masses]]
    ) -> None:
        """Take what `measured` returned."""
        self.document = document
        self.masses = masses
        self.short = plan.beginnings(document)
        self.questions = [question.text for question in document.questions]
        self.characters = np.array([len(text) for text in plan.texts_of(document)])

    def by_heads(
        self, mask: NDArray[np.bool_], *, calibrated: bool = True, normalized: bool = False
    ) -> list[Order]:
        """Pages by the mean attention of some heads, [layer, head]."""
        divisor = self.characters if normalized else 1
        return [
            rank(pair[0 if calibrated else 1][:, mask].mean(axis=1) / divisor)
            for pair in self.masses
        ]

    def by_words(self, *, whole: bool = False) -> list[Order]:
        """Pages by BM25, on the texts that the model read or on whole pages."""
        document = self.document if whole else self.short
        return [rank(row) for row in retrieval.bm25_pages(document, self.questions)]

    def by_embedder(self, retriever: Any) -> list[Order]:
        """Pages by a dense retriever, on the texts that the model read."""
        return [rank(row) for row in retrieval.dense_pages(self.short, self.questions, retriever)]


def fused(first: Sequence[Order], second: Sequence[Order]) -> list[Order]:
    """Orders of two methods, joined by reciprocal rank fusion."""
    places = np.argsort([first, second], axis=-1)  # [method, question, page]
    return [rank(scores) for scores in (1 / (RRF + 1 + places)).sum(axis=0)]


def recalls(document: AnnotatedDocument, orders: Sequence[Order]) -> NDArray[np.float64]:
    """[question, cut] recall of the gold pages at 1, 3 and 5."""
    return retrieval.page_recall(orders, [question.pages for question in document.questions])


def methods(
    each: Rankings, scores: HeadScores, random_sets: Sequence[HeadSet], retriever: Any
) -> Iterator[tuple[dict[str, Any], NDArray[np.float64]]]:
    """Yields each method's labels and its recalls, [question, cut]."""
    document = each.document
    for share in SHARES:
        mask = scores.top(share).mask
        for calibrated in (True, False):
            for normalized in (False, True):
                kinds = {"calibrated": calibrated, "normalized": normalized}
                orders = each.by_heads(mask, **kinds)
                yield {"method": "heads", "share": share, **kinds}, recalls(document, orders)
    drawn = [recalls(document, each.by_heads(heads.mask)) for heads in random_sets]
    yield {"method": "random heads, same layers", "share": MAIN}, np.mean(drawn, axis=0)
    words, selected = each.by_words(), each.by_heads(scores.top(MAIN).mask)
    yield {"method": "BM25"}, recalls(document, words)
    yield {"method": "BM25, whole pages"}, recalls(document, each.by_words(whole=True))
    yield {"method": "heads and BM25", "share": MAIN}, recalls(document, fused(selected, words))
    if retriever:
        orders = each.by_embedder(retriever)
        yield {"method": "all-MiniLM-L6-v2"}, recalls(document, orders)
    pages = len(document.pages)
    gold = [len(question.pages) for question in document.questions]
    cuts = [min(cut, pages) / pages for cut in retrieval.PAGE_CUTS]
    yield {"method": "random ranking"}, np.array([cuts for _ in gold])


def table(documents: Sequence[AnnotatedDocument], retriever: Any) -> pd.DataFrame:
    """Returns one row per question and method: recall at 1, 3 and 5.

    Raises:
        ValueError: No attention is shipped.
    """
    scores = load_needle_scores(MODEL, tasks=["text"])
    selected = HeadSet.load(MODEL)
    eligible = selected.geometry.eligible
    random_sets = random_controls(
        selected, eligible, draws=DRAWS, seed=0, match="layer", disjoint=False
    )
    if len(selected) != head_count(MAIN, selected.geometry.size):
        raise ValueError(f"the head list of {MODEL} has {len(selected)} heads, not {MAIN:.0%}")
    now = Provenance(code=code_version(plan.MODULES), versions=library_versions())
    known = store.known(plan.KIND, MODEL, version=plan.VERSION, now=now)
    if len(known) != 1:
        raise ValueError(
            f"{len(known)} sets of attention of {MODEL} are shipped or kept, expected one; run "
            "`python -m cluster.real_documents`, or delete those that are not wanted"
        )
    (results,) = known
    rows = []
    for document in documents:
        masses = measured(document, results)
        if not masses:
            continue
        each = Rankings(document, masses)
        about = {"document": document.name, "domain": document.domain, "pages": len(document.pages)}
        for labels, recall in methods(each, scores, random_sets, retriever):
            rows += [
                about | labels | {"question": number, "k1": first, "k3": third, "k5": fifth}
                for number, (first, third, fifth) in enumerate(recall.tolist())
            ]
    return with_choice(pd.DataFrame(rows))


def with_choice(rows: pd.DataFrame) -> pd.DataFrame:
    """Adds the method that chooses share, calibration and normalisation on the other documents."""
    tried = rows[rows["method"] == "heads"]
    settings = ["share", "calibrated", "normalized"]
    chosen = []
    for name in tried["document"].unique():
        others = tried[tried["document"] != name].groupby(settings)["k1"].mean()
        best = dict(zip(settings, others.idxmax(), strict=True))
        own = tried[tried["document"] == name].merge(pd.DataFrame([best]))
        chosen.append(own.assign(method="heads, chosen on other documents"))
    together: pd.DataFrame = pd.concat([rows, *chosen], ignore_index=True)
    return together


def main() -> int:
    """Write the table and return the exit code."""
    embedder = os.environ.get("MMHEADS_REAL_EMBEDDER", "")
    retriever = None
    if embedder:
        from sentence_transformers import SentenceTransformer

        retriever = SentenceTransformer(embedder)
    try:
        found = table(plan.documents(), retriever)
        with paths.write_whole(TABLE) as temporary:
            found.to_csv(temporary, index=False, lineterminator="\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"cluster.real_ranking: {error}", file=sys.stderr)
        return 1
    shown = found.groupby(["method", "share", "calibrated", "normalized"], dropna=False)
    print(shown[["k1", "k3", "k5"]].mean().join(shown.size().rename("n")).round(3).to_string())
    return 0


if __name__ == "__main__":
    sys.exit(main())
