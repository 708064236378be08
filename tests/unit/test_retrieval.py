"""Ranking metrics against worked cases; BM25 on real documents."""

import example_prompts
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import BoW, Normalize

from mmheads import paths, retrieval
from mmheads.pdfs import Document, Page, PageBox
from mmheads.tasks import mmdocir

REAL = paths.real_docs()
SIZE = (100.0, 200.0)


def box(page: int, *corners: float) -> PageBox:
    return PageBox(page, corners, SIZE)


def test_page_recall_on_worked_cases():
    rankings, gold = [[2, 0, 1, 3, 4, 5], [0, 1, 2], [5, 4, 3, 2]], [[0, 5], [1], [0]]
    found = retrieval.page_recall(rankings, gold)
    assert found.tolist() == [[0, 0.5, 0.5], [0, 1, 1], [0, 0, 0]]
    with pytest.raises(ValueError, match=r"recall at \(0,\)"):
        retrieval.page_recall([[0]], [[0]], [0])
    with pytest.raises(ValueError, match="1 rankings of 2 questions"):
        retrieval.page_recall([[0]], [[0], [0]])
    with pytest.raises(ValueError, match="every page once"):
        retrieval.page_recall([[0, 0]], [[0]])
    with pytest.raises(ValueError, match="a page for every question"):
        retrieval.page_recall([[0], [0]], [[0], []])


def test_page_recall_is_the_share_of_gold_pages():
    rng = np.random.default_rng(0)
    gold = [rng.choice(12, int(rng.integers(1, 5)), replace=False).tolist() for _ in range(50)]
    rankings = [rng.permutation(12).tolist() for _ in gold]
    expected = [
        [len(set(pages) & set(ranking[:k])) / len(pages) for k in retrieval.PAGE_CUTS]
        for pages, ranking in zip(gold, rankings, strict=True)
    ]
    np.testing.assert_allclose(retrieval.page_recall(rankings, gold), expected, rtol=1e-12)


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


def test_boxes_of_another_unit_are_scaled_to_their_page():
    gold = [box(0, 0, 0, 10, 10)]
    pixels = PageBox(0, (0, 0, 10, 20), (200.0, 400.0))
    assert retrieval.layout_recall([pixels], gold, 1) == pytest.approx(0.5)


def test_boxes_are_put_in_order_and_inside_their_page():
    outside = box(0, 120, -10, 50, 300)
    assert retrieval.box_area([outside], 1) == pytest.approx(0.5)
    assert retrieval.layout_recall([box(0, 50, 0, 100, 200)], [outside], 1) == 1


def pages(*texts: str) -> Document:
    return Document("d", [Page(n, lambda text=text: text, None) for n, text in enumerate(texts, 1)])


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


def test_a_dense_retriever_ranks_texts():
    retriever = SentenceTransformer(
        modules=[BoW(["fox", "hen", "cow", "runs"]), Normalize()], device="cpu"
    )
    scores = retrieval.dense_pages(
        pages("fox fox runs", "hen", "cow cow"), ["hen", "fox"], retriever
    )
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, [[0, 1, 0], [2 / 5**0.5, 0, 0]], atol=1e-6)


def some_ranking(question: str, pages: int = 3) -> retrieval.Ranking:
    boxes = np.array([[0.0, 0, 20, 30], [20, 0, 40, 30]])
    heat = {page: (boxes, np.float32([0.1 * page, 0.2])) for page in range(pages)}
    raw = {page: (boxes, values + 1) for page, (boxes, values) in heat.items()}
    scores = np.arange(pages, dtype=np.float32)
    return retrieval.Ranking(question, scores, retrieval.rank(scores), 3, 1, heat, raw)


def drawn(tmp_path, ranking: retrieval.Ranking, **settings) -> Figure:
    image = example_prompts.picture(40, 30)
    figure = ranking.picture([lambda: image] * 3, **settings)
    figure.savefig(tmp_path / "d.png")
    return figure


@pytest.mark.parametrize(
    "question", ["is $5 more than 3% of $100 ?", r"$\frac{1}{0$ # \\ _^", "from $5 to $6"]
)
def test_a_question_is_drawn_as_it_was_asked(tmp_path, question):
    figure = drawn(tmp_path, some_ranking(question), labels=["$a", "b$", "$c$"])
    assert figure.get_suptitle().split("\n")[0] == question
    assert not figure._suptitle.get_parse_math()
    assert figure.axes[0].get_title() == "1: page $c$ (3), +2.0000"


def test_a_long_question_is_broken_into_lines_and_cut(tmp_path):
    figure = drawn(tmp_path, some_ranking("which rain falls " * 100), top=1)
    lines = figure.get_suptitle().split("\n")
    assert len(lines) == 4
    assert max(map(len, lines)) <= 48
    assert lines[2].endswith(" …")


def test_pictures_show_page_labels_and_calibrated_or_raw_heat(tmp_path):
    ranking = some_ranking("?")
    figure = drawn(tmp_path, ranking, labels=["i", "2", ""])
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["1: page 3, +2.0000", "2: page 2, +1.0000", "3: page i (1), +0.0000"]
    for heat, largest in (("calibrated", 0.2), ("raw", 1.2)):
        figure = drawn(tmp_path, ranking, heat=heat)
        assert float(figure.axes[0].images[1].get_array().max()) == pytest.approx(largest)
    image = example_prompts.picture(40, 30)
    for images, settings, message in (
        (3, {"top": 0}, "top is 0"),
        (3, {"heat": "both"}, "heat is 'both'"),
        (2, {}, "2 images and 0 labels are given, but candidate 2"),
        (3, {"labels": ["i"]}, "3 images and 1 labels"),
    ):
        with pytest.raises(ValueError, match=message):
            ranking.picture([lambda: image] * images, **settings)


def test_macro_is_the_mean_of_domains_and_micro_that_of_questions():
    table = pd.DataFrame({"domain": ["a", "a", "a", "b"], "R@1": [1.0, 1.0, 1.0, 0.0]})
    summary = retrieval.summarise(table, ["R@1"]).set_index("domain")
    assert summary.loc["macro", "R@1"] == 0.5
    assert summary.loc["micro", "R@1"] == 0.75
    assert summary["n"].tolist() == [3, 1, 2, 4]


@pytest.mark.skipif(REAL is None, reason="no folder of real documents: set MMHEADS_REAL_DOCS")
def test_bm25_on_real_documents_reaches_what_is_known():
    rankings, questions, domains = [], [], []
    for document in mmdocir.read_mmdocir(REAL).documents:
        scores = retrieval.bm25_pages(document, [q.text for q in document.questions])
        rankings += map(retrieval.rank, scores)
        questions += document.questions
        domains += [document.domain] * len(scores)
    recall = retrieval.page_recall(rankings, [question.pages for question in questions], [1])
    rows = pd.DataFrame({"domain": domains, "R@1": recall[:, 0]})
    summary = retrieval.summarise(rows, ["R@1"]).set_index("domain")["R@1"]
    print(f"BM25, page Recall@1: micro {summary['micro']:.3f}, macro {summary['macro']:.3f}")
    assert summary["micro"] == pytest.approx(0.28, abs=0.03)
