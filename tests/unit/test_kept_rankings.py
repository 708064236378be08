"""Rankings by several sets of heads: those of an index, kept in the results store."""

import json

import pytest

from mmheads.controls import random_controls
from mmheads.heads import HeadSet
from mmheads.models import load
from mmheads.pdfs import PageBox
from mmheads.retrieval import DocumentIndex, kept, rank_documents
from mmheads.tasks import needles

WINDOW = 3


@pytest.fixture(scope="module")
def tiny():
    return load("tiny-qwen3-vl-m", device="cpu")


@pytest.fixture(scope="module")
def sets(tiny):
    chosen = HeadSet.load("tiny-qwen3-vl-m")
    others = random_controls(chosen, tiny.geometry.eligible, draws=2, seed=0)
    return {"chosen": chosen, "random": others, "the same": chosen}


@pytest.fixture(scope="module")
def documents():
    return [needles.document(4, question=question) for question in ("rendered_text", "icon")]


WAYS = {
    "calibrated": {"null_images": "none"},
    "with images": {"null_images": "pixels"},
    "not calibrated": {"calibrated": False},
}


def test_rankings_are_those_of_an_index_of_these_heads(tiny, sets, documents):
    table = rank_documents(tiny, documents, sets, window=WINDOW, ways=WAYS, best=6, folder=None)
    table = table.set_index(["method", "draw", "way", "document", "level"])["order"].sort_index()
    assert len(table) == 4 * len(WAYS) * len(documents) * 2
    cases = [("chosen", 0, sets["chosen"]), ("random", 1, sets["random"][1])]
    for name, draw, heads in cases:
        for number, example in enumerate(documents):
            index = DocumentIndex(tiny, heads, list(example.context), window=WINDOW)
            lines = [PageBox(r.part, r.box, (64, 64)) for r in example.candidates["layout"]]
            for way, how in WAYS.items():
                expected = index.rank(example.question, lines, **how)
                at = table[name, draw, way, number]
                assert at["layout"] == expected.order[:6]
                assert at["page"] == expected.candidates.order
    assert table["chosen"].tolist() == table["the same"].tolist()


def test_kept_rankings_need_no_index_and_others_do(tiny, sets, documents, tmp_path, monkeypatch):
    settings = {"folder": tmp_path, "progress": False}
    first = rank_documents(tiny, documents, sets, window=WINDOW, **settings)
    monkeypatch.setattr(kept, "DocumentIndex", None)
    assert rank_documents(tiny, documents, sets, window=WINDOW, **settings).equals(first)
    some = {"random": sets["random"][1]}
    again = rank_documents(tiny, documents[1:], some, window=WINDOW, **settings)
    second = first[(first["draw"] == 1) & (first["document"] == 1)]
    assert again["order"].tolist() == second["order"].tolist()
    for other in ({"window": 2}, {"window": WINDOW, "ways": WAYS}, {"window": WINDOW, "best": 1}):
        with pytest.raises(TypeError, match="not callable"):
            rank_documents(tiny, documents, sets, **settings, **other)
    with pytest.raises(TypeError, match="not callable"):
        rank_documents(tiny, [needles.document(4, index=1)], sets, window=WINDOW, **settings)


def test_a_ranking_says_how_it_was_made(tiny, sets, documents, tmp_path):
    rank_documents(tiny, documents[:1], {"a": sets["chosen"]}, window=4, folder=tmp_path)
    made = tiny.provenance("mmheads.retrieval", "N/A", code=kept.code_version(kept.MODULES))
    with kept.store.open("rankings", made, version=kept.VERSION, folder=tmp_path) as results:
        (key,) = results._place
        row = results[key]
    assert json.loads(row["heads"]) == sorted(map(list, sets["chosen"]))
    assert json.loads(row["settings"]) == {
        "window": 4,
        "best": 16,
        "calibrated": True,
        "null_images": "none",
    }
    assert (row["task"], row["haystack"]) == (
        "document-rendered_text",
        json.dumps(documents[0].haystack),
    )
    assert sorted(row["page"]) == list(range(4))
    assert sorted(row["layout"]) == list(range(8))
