"""Write how well a pretrained text model's heads rank pages of real documents, and text blocks.

python -m cluster.real_ranking

It reads the shipped attention (`cluster.real_documents`, `cluster.real_blocks`) and the documents,
and needs no model but, for one row, a sentence-transformers model (`MMHEADS_REAL_EMBEDDER`). The
recall of each question by each method goes to `data/results/real_ranking.parquet` for pages and
`real_blocks.parquet` for blocks, from which notebook 06 draws its tables.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cluster import real_blocks as blocks
from cluster import real_documents as plan
from cluster.real_model import MAIN, of_search
from cluster.real_results import MODEL
from mmheads import paths, retrieval, store
from mmheads.controls import random_controls
from mmheads.heads import HeadSet, head_count
from mmheads.kept_scores import load_needle_scores
from mmheads.pdfs import Document, Page
from mmheads.provenance import Provenance, code_version, library_versions
from mmheads.retrieval import rank
from mmheads.scores import HeadScores
from mmheads.tasks.mmdocir import AnnotatedDocument

TABLE = store.SHIPPED / "real_ranking.parquet"
BLOCKS = store.SHIPPED / "real_blocks.parquet"
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 1.0)
"""Of all heads, the strongest on needles."""
DRAWS = 20
"""Random sets of heads."""
RANDOM = "random ranking"
RRF = 60
"""Constant of reciprocal rank fusion, its usual value."""

SHUFFLES = 50
"""Random orders of the blocks of a page, whose recall is the chance."""

Order = list[int]
Masses = NDArray[np.float32]
"""[candidate, layer, head], calibrated or not."""
Found = tuple[dict[str, Any], NDArray[np.float64]]
"""Labels of a method and its values, [question, value]."""


def measured(
    texts: Sequence[str], questions: Sequence[str], results: store.Results
) -> list[tuple[Masses, Masses]]:
    """Returns calibrated and raw attention of each question; empty if one is missing."""
    keys = [plan.keys(texts, text) for text in (retrieval.NULL_QUESTION, *questions)]
    if not all(key in results for of_question in keys for key in of_question):
        return []
    null, *own = (np.stack([results[key]["mass"] for key in row]) for row in keys)
    return [(each - null, each) for each in own]


class Rankings:
    """Orders of candidates by method, for the questions that share them.

    Attributes:
        read: The candidates as the model reads them, as pages of a document.
        questions: What is asked.
        masses: What `measured` returned.
        characters: Length of each candidate in the prompt.
    """

    def __init__(
        self,
        read: Document,
        texts: Sequence[str],
        questions: Sequence[str],
        masses: Sequence[tuple[Masses, Masses]],
    ) -> None:
        """Take the candidates, their texts in the prompt, and what `measured` returned."""
        self.read = read
        self.questions = list(questions)
        self.masses = masses
        self.characters = np.array([len(text) for text in texts])

    def by_heads(
        self, mask: NDArray[np.bool_], *, calibrated: bool = True, normalized: bool = False
    ) -> list[Order]:
        """Candidates by the mean attention of some heads, [layer, head]."""
        divisor = self.characters if normalized else 1
        return [
            rank(pair[0 if calibrated else 1][:, mask].mean(axis=1) / divisor)
            for pair in self.masses
        ]

    def by_words(self) -> list[Order]:
        """Candidates by BM25."""
        return [rank(row) for row in retrieval.bm25_pages(self.read, self.questions)]

    def by_embedder(self, retriever: Any) -> list[Order]:
        """Candidates by a dense retriever."""
        return [rank(row) for row in retrieval.dense_pages(self.read, self.questions, retriever)]

    def values(self, orders: Sequence[Order]) -> NDArray[np.float64]:
        """[question, value] of rankings, one of each question."""
        raise NotImplementedError

    def others(self) -> Iterator[Found]:
        """Yields what only candidates of this kind are compared with."""
        raise NotImplementedError


class PageRankings(Rankings):
    """Orders of the pages of a document: recall of the gold pages at 1, 3 and 5."""

    def __init__(
        self,
        document: AnnotatedDocument,
        masses: Sequence[tuple[Masses, Masses]],
        characters: int = plan.CHARACTERS,
    ) -> None:
        """Take the document, what `measured` returned, and how much of a page was read."""
        self.document = document
        asked = [question.text for question in document.questions]
        read, texts = plan.beginnings(document, characters), plan.texts_of(document, characters)
        super().__init__(read, texts, asked, masses)

    def values(self, orders: Sequence[Order]) -> NDArray[np.float64]:
        """[question, cut] recall of the gold pages."""
        return retrieval.page_recall(orders, [each.pages for each in self.document.questions])

    def others(self) -> Iterator[Found]:
        """Yields BM25 on whole pages, and what a random ranking has on average."""
        whole = retrieval.bm25_pages(self.document, self.questions)
        yield {"method": "BM25, whole pages"}, self.values([rank(row) for row in whole])
        count = len(self.document.pages)
        chance = [min(cut, count) / count for cut in retrieval.PAGE_CUTS]
        yield {"method": RANDOM}, np.array([chance for _ in self.questions])


class BlockRankings(Rankings):
    """Orders of the text blocks of a page: covered share of the gold boxes, and area of blocks."""

    def __init__(self, page: blocks.BlockPage, masses: Sequence[tuple[Masses, Masses]]) -> None:
        """Take the page, and what `measured` returned."""
        self.page = page
        read = [Page(n, partial(str, text), _no_image) for n, text in enumerate(page.texts, 1)]
        asked = [question.text for question in page.questions.values()]
        super().__init__(Document(page.document.name, read), page.texts, asked, masses)

    def values(self, orders: Sequence[Order]) -> NDArray[np.float64]:
        """[question, value]: recall of the gold boxes' area at each cut, then area in pages."""
        rows = []
        for question, order in zip(self.page.questions.values(), orders, strict=True):
            boxes, gold = [self.page.boxes[block] for block in order], self.page.gold(question)
            recall = [retrieval.layout_recall(boxes, gold, cut) for cut in retrieval.PAGE_CUTS]
            rows.append(recall + [retrieval.box_area(boxes, cut) for cut in retrieval.PAGE_CUTS])
        return np.array(rows)

    def others(self) -> Iterator[Found]:
        """Yields the largest blocks first, random orders, and all blocks at every cut."""
        count = len(self.page.boxes)
        areas = np.array([retrieval.box_area([box], 1) for box in self.page.boxes])
        yield {"method": "largest block first"}, self.values([rank(areas) for _ in self.questions])
        rng = np.random.default_rng(0)
        shuffled = [rng.permutation(count).tolist() for _ in range(SHUFFLES)]
        orders = [self.values([order for _ in self.questions]) for order in shuffled]
        yield {"method": RANDOM}, np.mean(orders, axis=0)
        cuts = len(retrieval.PAGE_CUTS)
        area = retrieval.box_area(self.page.boxes, count)
        covered = [self.page.covered(each) for each in self.page.questions.values()]
        yield {"method": "all blocks"}, np.array([[x] * cuts + [area] * cuts for x in covered])


def _no_image() -> Any:
    raise ValueError("a text block has no image")


def fused(first: Sequence[Order], second: Sequence[Order]) -> list[Order]:
    """Orders of two methods, joined by reciprocal rank fusion."""
    places = np.argsort([first, second], axis=-1)  # [method, question, candidate]
    return [rank(scores) for scores in (1 / (RRF + 1 + places)).sum(axis=0)]


def methods(
    each: Rankings, scores: HeadScores, random_sets: Sequence[HeadSet], retriever: Any
) -> Iterator[Found]:
    """Yields each method's labels and its values, [question, value]."""
    for share in SHARES:
        mask = scores.top(share).mask
        for calibrated in (True, False):
            for normalized in (False, True):
                kinds = {"calibrated": calibrated, "normalized": normalized}
                orders = each.by_heads(mask, **kinds)
                yield {"method": "heads", "share": share, **kinds}, each.values(orders)
    drawn = [each.values(each.by_heads(heads.mask)) for heads in random_sets]
    yield {"method": "random heads, same layers", "share": MAIN}, np.mean(drawn, axis=0)
    words, selected = each.by_words(), each.by_heads(scores.top(MAIN).mask)
    yield {"method": "BM25"}, each.values(words)
    yield {"method": "heads and BM25", "share": MAIN}, each.values(fused(selected, words))
    if retriever:
        yield {"method": "all-MiniLM-L6-v2"}, each.values(each.by_embedder(retriever))
    yield from each.others()


def _attention(settings: Mapping[str, Any]) -> store.Results:
    """The shipped or kept attention to candidates of one kind."""
    now = Provenance(code=code_version(plan.MODULES), versions=library_versions())
    known = [
        results
        for results in store.known(plan.KIND, MODEL, version=plan.VERSION, now=now)
        if all(results.provenance.settings.get(key) == value for key, value in settings.items())
    ]
    if len(known) != 1:
        raise ValueError(
            f"{len(known)} sets of attention of {MODEL} with {dict(settings)} are shipped or kept, "
            "expected one; run `python -m cluster.real_documents`, the same with `--whole --pages "
            "17`, and `python -m cluster.real_blocks`, or delete those that are not wanted"
        )
    return known[0]


class Selected(NamedTuple):
    """What is compared: scores of all heads, random sets as large as the list, an embedder."""

    scores: HeadScores
    random_sets: list[HeadSet]
    retriever: Any


def page_rows(documents: Sequence[AnnotatedDocument], chosen: Selected) -> Iterator[dict[str, Any]]:
    """Yields one row per question and method: recall of pages at 1, 3 and 5.

    The strongest heads also rank whole pages, in those documents that were read whole.
    """
    results, whole = _attention(plan.SETTINGS), _attention(plan.WHOLE)
    for document in documents:
        asked = [question.text for question in document.questions]
        if not (masses := measured(plan.texts_of(document), asked, results)):
            continue
        found = list(methods(PageRankings(document, masses), *chosen))
        if masses := measured(plan.texts_of(document, 0), asked, whole):
            each = PageRankings(document, masses, 0)
            orders = each.by_heads(chosen.scores.top(MAIN).mask)
            found.append(({"method": "heads, whole pages", "share": MAIN}, each.values(orders)))
        about: dict[str, Any] = {"document": document.name, "domain": document.domain}
        about |= {"pages": len(document.pages)}
        yield from _rows(found, about, range(len(asked)), "k")


def block_rows(
    documents: Sequence[AnnotatedDocument], chosen: Selected
) -> Iterator[dict[str, Any]]:
    """Yields one row per question and method: recall of gold boxes, and area, at 1, 3 and 5."""
    results = _attention(blocks.SETTINGS)
    for page in (page for document in documents for page in blocks.block_pages(document)):
        asked = [question.text for question in page.questions.values()]
        if masses := measured(page.texts, asked, results):
            found = methods(BlockRankings(page, masses), *chosen)
            about: dict[str, Any] = {"document": page.document.name, "domain": page.document.domain}
            about |= {"page": page.page, "blocks": len(page.boxes)}
            yield from _rows(found, about, list(page.questions), "k", "area")


def _rows(
    found: Iterable[Found], about: Mapping[str, Any], numbers: Sequence[int], *names: str
) -> Iterator[dict[str, Any]]:
    columns = [f"{name}{cut}" for name in names for cut in retrieval.PAGE_CUTS]
    for labels, values in found:
        for number, row in zip(numbers, values.tolist(), strict=True):
            named = dict(zip(columns, row, strict=True))
            yield {**about, **labels, "question": number, **named}


def tables(
    documents: Sequence[AnnotatedDocument], retriever: Any
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Returns the table of pages and that of blocks.

    Raises:
        ValueError: No attention is shipped.
    """
    scores = of_search(load_needle_scores(MODEL, tasks=["text"]))
    listed = HeadSet.load(MODEL)
    eligible = listed.geometry.eligible
    random_sets = random_controls(
        listed, eligible, draws=DRAWS, seed=0, match="layer", disjoint=False
    )
    if len(listed) != head_count(MAIN, listed.geometry.size):
        raise ValueError(f"the head list of {MODEL} has {len(listed)} heads, not {MAIN:.0%}")
    chosen = Selected(scores, random_sets, retriever)
    of_pages, of_blocks = (
        with_choice(pd.DataFrame(rows(documents, chosen))) for rows in (page_rows, block_rows)
    )
    return of_pages, of_blocks


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
    """Write the tables and return the exit code."""
    embedder = os.environ.get("MMHEADS_REAL_EMBEDDER", "")
    retriever = None
    if embedder:
        from sentence_transformers import SentenceTransformer

        retriever = SentenceTransformer(embedder)
    try:
        written = dict(zip((TABLE, BLOCKS), tables(plan.documents(), retriever), strict=True))
        for path, table in written.items():
            with paths.write_whole(path) as temporary:
                table.to_parquet(temporary, index=False, compression="zstd")
    except (ValueError, OSError) as error:
        print(f"cluster.real_ranking: {error}", file=sys.stderr)
        return 1
    for table in written.values():
        shown = table.groupby(["method", "share", "calibrated", "normalized"], dropna=False)
        print(shown[["k1", "k3", "k5"]].mean().join(shown.size().rename("n")).round(3).to_string())
    return 0


if __name__ == "__main__":
    sys.exit(main())
