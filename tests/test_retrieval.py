"""Ranking metrics against `ir_measures` and worked cases; BM25 on real documents."""

import ir_measures
import numpy as np
import pandas as pd
import pytest
from ir_measures import R

from mmheads import paths, retrieval
from mmheads.tasks import documents
from mmheads.tasks.documents import Document, Page, PageBox

REAL = paths.real_docs()
SIZE = (100.0, 200.0)


def box(page: int, *corners: float) -> PageBox:
    return PageBox(page, corners, SIZE)


def test_page_recall_equals_ir_measures():
    rng = np.random.default_rng(0)
    for _ in range(50):
        count = int(rng.integers(5, 30))
        gold = rng.choice(count, int(rng.integers(1, 5)), replace=False).tolist()
        scores = rng.random(count)
        ranking = retrieval.rank(scores)
        relevant = {"q": {str(page): 1 for page in gold}}
        run = {"q": {str(page): float(score) for page, score in enumerate(scores)}}
        wanted = ir_measures.calc_aggregate([R @ k for k in retrieval.PAGE_CUTS], relevant, run)
        for k in retrieval.PAGE_CUTS:
            assert retrieval.page_recall(ranking, gold, k) == pytest.approx(wanted[R @ k])
    with pytest.raises(ValueError, match="recall at 0 of 1 gold pages"):
        retrieval.page_recall([0], [0], 0)
    with pytest.raises(ValueError, match="of 0 gold pages"):
        retrieval.page_recall([0], [], 1)


def test_layout_recall_on_worked_cases():
    gold = [box(0, 0, 0, 10, 10), box(1, 20, 20, 40, 30)]
    half, other = box(1, 30, 0, 100, 200), box(0, 50, 50, 60, 60)
    assert retrieval.layout_recall([half, other], gold, 1) == pytest.approx(100 / 300)
    assert retrieval.layout_recall([other, half], gold, 1) == 0
    assert retrieval.layout_recall([half, half, gold[0]], gold, 3) == pytest.approx(200 / 300)
    whole = PageBox.whole(1, SIZE)
    assert retrieval.layout_recall([whole], gold, 1) == pytest.approx(200 / 300)
    assert retrieval.box_area([whole], 1) == 1
    assert retrieval.box_area([box(0, 0, 0, 10, 10), whole], 2) == pytest.approx(1.005)
    assert retrieval.layout_recall([whole, PageBox.whole(0, SIZE)], gold, 2) == 1
    with pytest.raises(ValueError, match=r"gold boxes of area 0\.0"):
        retrieval.layout_recall([whole], [box(0, 5, 5, 5, 9)], 1)


def test_boxes_are_put_in_order_and_inside_their_page():
    outside = box(0, 120, -10, 50, 300)
    assert retrieval.box_area([outside], 1) == pytest.approx(0.5)
    assert retrieval.layout_recall([box(0, 50, 0, 100, 200)], [outside], 1) == 1


def pages(*texts: str) -> Document:
    return Document("d", "x", [Page(lambda text=text: text, None) for text in texts])


def test_bm25_finds_words():
    document = pages("the red fox runs", "a hen sleeps; the hen wakes", "", "fox and hen")
    scores = retrieval.bm25_pages(document, ["where is the hen?", "unknown words", "the"])
    assert scores.shape == (3, 4)
    assert retrieval.rank(scores[0])[:2] == [1, 3]
    assert scores[0, 2] == 0
    assert not scores[1:].any()
    assert not retrieval.bm25_pages(pages("", ""), ["hen"]).any()


def test_bm25_score_by_hand():
    document = pages("fox fox hen", "hen", "cow cow")
    lengths, counts = np.array([3, 1, 2]), np.array([2, 0, 0])
    idf = np.log(1 + (3 - 1 + 0.5) / (1 + 0.5))
    expected = idf * counts / (counts + 1.5 * (1 - 0.75 + 0.75 * lengths / lengths.mean()))
    np.testing.assert_allclose(retrieval.bm25_pages(document, ["fox"])[0], expected, rtol=1e-5)


def test_macro_is_the_mean_of_domains_and_micro_that_of_questions():
    table = pd.DataFrame({"domain": ["a", "a", "a", "b"], "R@1": [1.0, 1.0, 1.0, 0.0]})
    summary = retrieval.summarise(table, ["R@1"]).set_index("domain")
    assert summary.loc["macro", "R@1"] == 0.5
    assert summary.loc["micro", "R@1"] == 0.75
    assert summary["n"].tolist() == [3, 1, 2, 4]


@pytest.mark.skipif(REAL is None, reason="no folder of real documents: set MMHEADS_REAL_DOCS")
def test_bm25_on_real_documents_reaches_what_is_known():
    rows = []
    for document in documents.read(REAL).documents:
        scores = retrieval.bm25_pages(document, [q.text for q in document.questions])
        for question, row in zip(document.questions, scores, strict=True):
            recall = retrieval.page_recall(retrieval.rank(row), question.pages, 1)
            rows.append({"domain": document.domain, "R@1": recall})
    summary = retrieval.summarise(pd.DataFrame(rows), ["R@1"]).set_index("domain")["R@1"]
    print(f"BM25, page Recall@1: micro {summary['micro']:.3f}, macro {summary['macro']:.3f}")
    assert summary["micro"] == pytest.approx(0.28, abs=0.03)
