"""Real documents ranked by the heads of a text model: what is kept, and what is made of it."""

import numpy as np
import pandas as pd
import pytest

from cluster import real_blocks, real_documents, real_ranking, real_single
from mmheads import store
from mmheads.blocks import Block
from mmheads.models import load
from mmheads.pdfs import Page, PageBox
from mmheads.retrieval import DocumentIndex, PagePart
from mmheads.tasks.mmdocir import AnnotatedDocument, Question

pytestmark = pytest.mark.filterwarnings("ignore:.*unknown to the tokenizer")

TEXTS = ("c17 v03 . c05 v11 . ", "", "c40 v29 . c08 v02 . ", "c22 v19 . c33 v07 . ") * 3
ASKED = ("which c05 ?", "which c40 ?")


def document(texts=TEXTS, asked=ASKED, gold=(0, 2)) -> AnnotatedDocument:
    pages = [Page(n, lambda text=text: text, lambda: None) for n, text in enumerate(texts, 1)]
    questions = [Question(text, "", (page,)) for text, page in zip(asked, gold, strict=True)]
    return AnnotatedDocument("one.pdf", pages, domain="Brochure", questions=tuple(questions))


def measured(one: AnnotatedDocument, kept):
    """The kept attention of a document's questions to its pages."""
    return real_ranking.measured(
        real_documents.texts_of(one), [each.text for each in one.questions], kept
    )


@pytest.fixture(scope="module")
def vlm():
    return load("tiny-qwen3-m")


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr(store.paths, "RUNS", tmp_path)
    return tmp_path


def test_the_kept_attention_is_that_of_an_index_and_is_not_computed_twice(vlm, runs, monkeypatch):
    one = document()
    with real_documents.results(vlm) as kept:
        real_documents.measure(vlm, kept, one)
    texts = real_documents.texts_of(one)
    assert texts[1] == f"{real_documents.EMPTY}\n"
    index = DocumentIndex(vlm, None, texts, window=real_documents.WINDOW)
    assert len(index.document.windows) == 2
    monkeypatch.setattr(real_documents, "DocumentIndex", None)  # nothing runs again
    with real_documents.results(vlm) as kept:
        real_documents.measure(vlm, kept, one)
        pairs = measured(one, kept)
        assert kept[real_documents.keys(texts, ASKED[1])[5]]["question"] == 1
    for text, (calibrated, raw) in zip(ASKED, pairs, strict=True):
        for found, expected in (
            (raw, index.masses(text, calibrated=False)),
            (calibrated, index.masses(text)),
        ):
            np.testing.assert_allclose(found.reshape(len(texts), -1).T, expected, atol=1e-6)


def test_whole_pages_are_read_in_smaller_windows_and_kept_beside_the_beginnings(vlm, runs):
    one = document(TEXTS[:5])
    with real_documents.results(vlm, real_documents.WHOLE) as kept:
        real_documents.measure(vlm, kept, one)
        assert not real_ranking.measured(real_documents.texts_of(one), ["which c08 ?"], kept)
        found = real_ranking.measured(real_documents.texts_of(one, 0), ASKED, kept)
    index = DocumentIndex(vlm, None, real_documents.texts_of(one, 0), window=4)
    assert len(index.document.windows) == 2
    expected = index.masses(ASKED[0])
    np.testing.assert_allclose(found[0][0].reshape(5, -1).T, expected, atol=1e-6)
    with real_documents.results(vlm) as kept:
        assert real_documents.keys(TEXTS[:5], ASKED[0])[0] not in kept


def test_what_an_interrupt_left_out_is_measured_later(vlm, runs):
    with real_documents.results(vlm) as kept:
        real_documents.measure(vlm, kept, document(asked=ASKED[:1], gold=(0,)))
    with real_documents.results(vlm) as kept:
        assert not measured(document(), kept)
        real_documents.measure(vlm, kept, document())
        assert len(measured(document(), kept)) == 2


def masses(*of_pages):
    """[page, layer, head] attention of one layer of two heads."""
    return np.array(of_pages, dtype=np.float32)[:, None, :]


def test_pages_are_ranked_by_the_mean_of_the_chosen_heads():
    one = document(TEXTS[:3], ASKED[:1], (0,))
    calibrated, raw = masses((0.1, 0.6), (0.3, 0.0), (0.2, 0.1)), masses(*[(0.5, 0.5)] * 3)
    each = real_ranking.PageRankings(one, [(calibrated, raw)])
    first, both = np.array([[True, False]]), np.array([[True, True]])
    assert each.by_heads(first) == [[1, 2, 0]]
    assert each.by_heads(both) == [[0, 1, 2]]
    assert real_documents.texts_of(one, 4)[0] == "c17 \n"
    assert each.by_heads(both, calibrated=False) == [[0, 1, 2]]
    # pages of 19, 10 and 19 characters with their line breaks
    assert each.by_heads(both, normalized=True) == [[0, 1, 2]]
    assert each.by_heads(first, normalized=True) == [[1, 2, 0]]


SIZE = (100.0, 50.0)


def page_of_blocks() -> AnnotatedDocument:
    """A page with three paragraphs above each other and a picture, after an empty one."""
    blocks = [Block((0, 10 * n, 50, 10 * n + 10), text) for n, text in enumerate(TEXTS[::2][:3])]
    blocks.append(Block((50, 0, 100, 50), kind="picture"))
    pages = [
        Page(1, str, lambda: None, size=SIZE),
        Page(2, str, lambda: None, size=SIZE, read_blocks=lambda: tuple(blocks)),
    ]

    def asked(*box: float, pages: tuple[int, ...] = (1,)) -> Question:
        return Question(ASKED[0], "", pages, (PageBox(1, box, SIZE),))

    questions = (
        asked(0, 0, 50, 20),  # two blocks
        asked(50, 0, 100, 50),  # only in the picture
        asked(0, 0, 60, 10),  # 5 of 6 parts are text
        asked(0, 0, 50, 10, pages=(0, 1)),
    )
    return AnnotatedDocument("one.pdf", pages, domain="Brochure", questions=questions)


def test_questions_about_blocks_have_one_page_and_gold_that_text_covers():
    (page,) = real_blocks.block_pages(page_of_blocks())
    assert (page.page, len(page.boxes), list(page.questions)) == (1, 3, [0, 2])
    assert [page.covered(each) for each in page.questions.values()] == pytest.approx([1, 5 / 6])


def test_blocks_are_ranked_by_the_attention_that_an_index_gives_them(vlm, runs, monkeypatch):
    (page,) = real_blocks.block_pages(page_of_blocks())
    with real_documents.results(vlm, real_blocks.SETTINGS) as kept:
        real_blocks.measure(vlm, kept, page)
    index = DocumentIndex(vlm, None, [page.texts])
    expected = index.masses(ASKED[0], [PagePart(0, part) for part in range(3)])
    monkeypatch.setattr(real_blocks, "DocumentIndex", None)  # nothing runs again
    with real_documents.results(vlm, real_blocks.SETTINGS) as kept:
        real_blocks.measure(vlm, kept, page)
        found = real_ranking.measured(page.texts, [ASKED[0]], kept)
    np.testing.assert_allclose(found[0][0].reshape(3, -1).T, expected, atol=1e-6)


def test_blocks_have_the_covered_share_of_gold_and_their_area():
    (page,) = real_blocks.block_pages(page_of_blocks())
    calibrated = masses((0.1, 0.6), (0.3, 0.0), (0.2, 0.1))
    each = real_ranking.BlockRankings(page, [(calibrated, calibrated)] * 2)
    orders = each.by_heads(np.array([[True, False]]))
    assert orders == [[1, 2, 0]] * 2
    first, second = each.values(orders)
    np.testing.assert_allclose(first, [0.5, 1, 1, 0.1, 0.3, 0.3])
    np.testing.assert_allclose(second, [0, 5 / 6, 5 / 6, 0.1, 0.3, 0.3])
    others = {labels["method"]: values for labels, values in each.others()}
    np.testing.assert_allclose(others["all blocks"], [[1] * 3 + [0.3] * 3, [5 / 6] * 3 + [0.3] * 3])
    np.testing.assert_allclose(others["random ranking"][0, 0], 1 / 3, atol=0.06)


def test_joined_orders_prefer_what_both_methods_rank_high():
    assert real_ranking.fused([[0, 1, 2]], [[1, 2, 0]]) == [[1, 0, 2]]


def test_a_document_is_ranked_with_what_is_best_on_the_others():
    rows = []
    for name, better in (("a", 0.01), ("b", 0.05), ("c", 0.05)):
        for share in (0.01, 0.05):
            labels = {"method": "heads", "share": share, "calibrated": True, "normalized": False}
            rows.append(labels | {"document": name, "question": 0, "k1": float(share == better)})
    table = real_ranking.with_choice(pd.DataFrame(rows))
    chosen = table[table["method"] != "heads"].set_index("document")
    assert chosen["share"].to_dict() == {"a": 0.05, "b": 0.01, "c": 0.01}
    assert chosen["k1"].to_dict() == {"a": 0.0, "b": 0.0, "c": 0.0}


def test_correlations_of_single_heads_are_those_of_means_over_prompts():
    effects = np.array([[0.0, 2, 1], [4, 2, 1]])
    scores = np.array([3.0, 2, 1])
    assert real_single._correlation(scores, [effects[1:]]) == pytest.approx(1)
    assert real_single._correlation(scores, [effects[:1]]) == pytest.approx(-0.5)
    gradients = np.array([[1.0, 5, 3], [-1, -1, 3]])  # means 0, 2, 3
    assert real_single._correlation(scores, [effects[:1], gradients]) == pytest.approx(0.5)
