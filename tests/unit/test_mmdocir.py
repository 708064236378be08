"""Documents are read in both layouts; what is wrong with one is said, and the others go on."""

import io
import json

import example_prompts
import pandas as pd
import pytest
from PIL import Image

from mmheads import paths
from mmheads.pdfs import PageBox
from mmheads.tasks import mmdocir

REAL = paths.real_docs()


def jpeg(color: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (60, 80), color).save(buffer, "JPEG")
    return buffer.getvalue()


def line(name: str, **changes) -> dict:
    question = {
        "Q": "What is red?",
        "A": "a fox",
        "page_id": [1],
        "type": "['Table']",
        "layout_mapping": [{"page": 1, "page_size": [612, 792], "bbox": [10, 20, 110, 220]}],
    }
    about = {"doc_name": name, "domain": "Brochure", "page_indices": [0, 1]}
    about |= {"layout_indices": [0, 1], "questions": [question | changes.pop("question", {})]}
    return about | changes


def annotate(folder, *lines: dict) -> None:
    text = "".join(json.dumps(entry) + "\n" for entry in lines)
    (folder / mmdocir.ANNOTATIONS).write_text(text)


@pytest.fixture
def hub(tmp_path):
    """Two documents of two pages, in the tables of the hub."""
    rows = [
        {"doc_name": name, "domain": "Brochure", "passage_id": str(page), "image_path": ""}
        | {"image_binary": jpeg(color), "ocr_text": f"{color} page", "vlm_text": ""}
        for name in ("a.pdf", "b.pdf")
        for page, color in enumerate(("white", "red"))
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / mmdocir.PAGES)
    rows = [
        {"doc_name": name, "domain": "Brochure", "type": "table", "layout_id": page}
        | {"page_id": page, "image_path": "", "image_binary": jpeg("red"), "text": None}
        | {"bbox": [0.0, 0.0, 30.0, 40.0], "page_size": [612.0, 792.0]}
        for name in ("a.pdf", "b.pdf")
        for page in (0, 1)
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / mmdocir.LAYOUTS)
    second = {"page_indices": [2, 3], "layout_indices": [2, 3]}
    annotate(tmp_path, line("a.pdf"), line("b.pdf", **second))
    return tmp_path


def test_tables_of_the_hub_are_read(hub):
    found = mmdocir.read_mmdocir(hub)
    assert not found.problems
    first, second = found.documents
    assert (first.name, first.domain, len(first.pages), len(first.layouts)) == (
        "a.pdf",
        "Brochure",
        2,
        2,
    )
    assert second.pages[1].text == "red page"
    assert second.pages[1].image().size == (60, 80)
    assert second.pages[1].image().getpixel((5, 5))[0] > 200
    assert first.layouts[1].where == PageBox(1, (0.0, 0.0, 30.0, 40.0), (612.0, 792.0))
    assert first.layouts[1].image().size == (60, 80)
    (question,) = first.questions
    assert (question.text, question.answer, question.pages) == ("What is red?", "a fox", (1,))
    assert question.boxes == (PageBox(1, (10, 20, 110, 220), (612, 792)),)


def test_a_changed_schema_is_one_error(hub):
    table = pd.read_parquet(hub / mmdocir.LAYOUTS).rename(columns={"bbox": "box"})
    table.to_parquet(hub / mmdocir.LAYOUTS)
    with pytest.raises(ValueError, match=r"MMDocIR_layouts.parquet lacks the columns \['bbox'\]"):
        mmdocir.read_mmdocir(hub)


def test_an_unreadable_page_image_names_its_row(hub):
    table = pd.read_parquet(hub / mmdocir.PAGES)
    table.loc[1, "image_binary"] = b"no image"
    table.to_parquet(hub / mmdocir.PAGES)
    page = mmdocir.read_mmdocir(hub).documents[0].pages[1]
    with pytest.raises(ValueError, match=r"row 1 of .*MMDocIR_pages.parquet \(a.pdf\) is damaged"):
        page.image()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question": {"Q": " "}}, "questions.0.Q is  : expected a text that is not empty"),
        (
            {"question": {"page_id": [2]}},
            r"points to the pages \[2\]; the document has the pages 0 to 1",
        ),
        ({"question": {"page_id": []}}, r"page_id is \[\]: List should have at least 1 item"),
        ({"page_indices": [0, 9]}, "0 to 9 are no rows of"),
        ({"page_indices": [1, 2]}, r"rows 1 to 2 of .*MMDocIR_pages.parquet are of \['b.pdf'\]"),
        ({"page_indices": 5}, "page_indices is 5: Input should be a valid"),
        ({"page_indices": [0]}, "page_indices.1' is missing"),
        ({"question": {"page_id": "12"}}, "page_id is 12: Input should be a valid array"),
        ({"question": {"page_id": [0.5]}}, r"page_id.0 is 0.5: Input should be a valid integer"),
        (
            {"question": {"layout_mapping": [{"page": 1}]}},
            r"'questions.0.layout_mapping.0.bbox' is missing",
        ),
        (
            {"question": {"layout_mapping": [{"page": 1, "bbox": [1, 2], "page_size": [3, 4]}]}},
            r"layout_mapping.0.bbox.2' is missing",
        ),
        ({"questions": ["What?"]}, "questions.0 is What.: Input should be"),
        ({"questions": None}, "questions is None: Input should be a valid array"),
    ],
)
def test_wrong_annotations_are_said_and_the_others_go_on(hub, changes, message):
    second = {"page_indices": [2, 3], "layout_indices": [2, 3]}
    annotate(hub, line("a.pdf", **changes), line("b.pdf", **second))
    found = mmdocir.read_mmdocir(hub)
    assert [document.name for document in found.documents] == ["b.pdf"]
    (problem,) = found.problems
    assert problem.startswith("MMDocIR_annotations.jsonl, line 1: ")
    with pytest.raises(ValueError, match=message):
        raise ValueError(problem)


def test_annotations_are_split_at_line_feeds_only_and_read_as_utf_8(hub):
    second = {"page_indices": [2, 3], "layout_indices": [2, 3]}
    separators = "\u2028, \u2029 and \x85 in Köln?"
    lines = [line("a.pdf", question={"Q": separators}), line("b.pdf", **second)]
    text = "\r\n\n".join(json.dumps(entry, ensure_ascii=False) for entry in lines)
    (hub / mmdocir.ANNOTATIONS).write_bytes(b"\xef\xbb\xbf" + text.encode())
    collection = mmdocir.read_mmdocir(hub)
    assert not collection.problems
    assert [document.questions[0].text for document in collection.documents] == [
        separators,
        "What is red?",
    ]
    (hub / mmdocir.ANNOTATIONS).write_bytes("Köln".encode("latin-1"))
    with pytest.raises(ValueError, match=r"MMDocIR_annotations.jsonl is not encoded in UTF-8"):
        mmdocir.read_mmdocir(hub)


def test_lines_that_are_no_documents_become_problems(hub):
    second = json.dumps(line("b.pdf", page_indices=[2, 3], layout_indices=[2, 3]))
    lines = ["5", "null", "{", "[" * 100_000, "{}", second]
    (hub / mmdocir.ANNOTATIONS).write_text("\n".join(lines))
    collection = mmdocir.read_mmdocir(hub)
    assert [document.name for document in collection.documents] == ["b.pdf"]
    assert len(collection.problems) == 5
    for number, problem in enumerate(collection.problems, 1):
        assert problem.startswith(f"MMDocIR_annotations.jsonl, line {number}: ")


def test_pages_of_tables_are_numbered_from_1_within_their_document(hub):
    for document in mmdocir.read_mmdocir(hub).documents:
        assert [page.title for page in document.pages] == ["1", "2"]


def test_tables_that_cannot_be_read_or_hold_no_bytes_are_one_error(hub):
    table = pd.read_parquet(hub / mmdocir.PAGES)
    table["image_binary"] = "page.jpg"
    table.to_parquet(hub / mmdocir.PAGES)
    with pytest.raises(
        ValueError, match=r"MMDocIR_pages.parquet holds .*string in image_binary; expected"
    ):
        mmdocir.read_mmdocir(hub)
    (hub / mmdocir.PAGES).write_bytes(b"no table")
    with pytest.raises(ValueError, match=r"MMDocIR_pages.parquet .*[Pp]arquet"):
        mmdocir.read_mmdocir(hub)


def test_folder_of_pdfs_is_read_and_broken_ones_are_named(tmp_path):
    (tmp_path / "pdfs").mkdir()
    example_prompts.write_pdf(tmp_path / "pdfs" / "good.pdf", 2)
    example_prompts.write_pdf(tmp_path / "pdfs" / "none.pdf", 0)
    (tmp_path / "pdfs" / "empty.pdf").write_bytes(b"")
    whole = (tmp_path / "pdfs" / "good.pdf").read_bytes()
    (tmp_path / "pdfs" / "broken.pdf").write_bytes(whole[: len(whole) // 3])
    names = ("empty.pdf", "broken.pdf", "none.pdf", "missing.pdf", "good.pdf")
    annotate(tmp_path, *(line(name) for name in names))
    found = mmdocir.read_mmdocir(tmp_path, dpi=36)
    assert [document.name for document in found.documents] == ["good.pdf"]
    assert found.documents[0].pages[0].image().size == (306, 396)
    assert found.documents[0].pages[0].text == ""
    assert len(found.problems) == 4
    for name, problem in zip(names, found.problems, strict=False):
        assert name in problem
        assert any(word in problem for word in ("cannot be opened", "no page", "does not exist"))


def test_folders_of_something_else_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no MMDocIR_annotations\.jsonl"):
        mmdocir.read_mmdocir(tmp_path)
    annotate(tmp_path, line("a.pdf"))
    with pytest.raises(ValueError, match=r"holds neither MMDocIR_pages.parquet nor pdfs/"):
        mmdocir.read_mmdocir(tmp_path)


@pytest.mark.skipif(REAL is None, reason="no folder of real documents: set MMHEADS_REAL_DOCS")
def test_real_documents_are_read():
    found = mmdocir.read_mmdocir(REAL)
    assert not found.problems
    assert (len(found.documents), sum(len(d.questions) for d in found.documents)) == (45, 300)
    assert not any(document.layouts for document in found.documents)
    first = found.documents[0]
    assert "LIBERTARIAN PARTY OF GEORGIA" in first.pages[0].text
    lines = (REAL / mmdocir.ANNOTATIONS).read_text().splitlines()
    for document, entry in zip(found.documents, map(json.loads, lines), strict=True):
        begin, end = entry["page_indices"]
        assert len(document.pages) == end - begin + 1


@pytest.mark.skipif(REAL is None, reason="no folder of real documents: set MMHEADS_REAL_DOCS")
def test_questions_on_real_documents_become_prompts():
    checked = 0
    for document in mmdocir.read_mmdocir(REAL, dpi=10).documents[:4]:
        for question in document.questions[:2]:
            example = mmdocir.to_example(document, question, pages=3)
            shown = len(example.images())
            assert shown == min(3, len(document.pages))
            assert len(example.candidates["page"]) == shown
            assert example.evidence
            first = question.pages[0] - example.evidence[0].part
            expected = [page - first for page in question.pages if 0 <= page - first < shown]
            assert [region.part for region in example.evidence] == expected
            gold = document.pages[question.pages[0]].image()
            assert gold == example.context[example.evidence[0].part]
            checked += 1
    assert checked == 8
    with pytest.raises(ValueError, match="pages is 0"):
        mmdocir.to_example(document, question, pages=0)
