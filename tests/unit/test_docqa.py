"""Gold pages are found among the context's, by document and number; answers keep their kind."""

import json

import numpy as np
import pytest
from PIL import Image

from mmheads.tasks import mmlongbench_docs


def page(subset: str, name: str, number: int) -> str:
    if subset == "slidevqa":
        return f"slideVQA/{name}/{name}-{number + 1}-1024.jpg"
    return f"mmlongbench-doc/{name}/{name}_page{number}.jpg"


def record(subset: str = "mmlongdoc", **changes) -> dict:
    """Pages 2 and 3 of the own document, then two of another one."""
    pages = [page(subset, "own", 2), page(subset, "own", 3)]
    pages += [page(subset, "other", 2), page(subset, "other", 3)]
    return {
        "id": f"{subset}_0",
        "doc_name": "own",
        "question": "How many?",
        "answer": "7",
        "ans_page_list": [3],
        "answer_sources": ["Table"],
        "answer_format": "Integer",
        "page_list": pages,
        "length": 7900,
    } | changes


def write(folder, records, subset="mmlongdoc", length=8192):
    """The records and all images that they name; the folder, opened."""
    path = folder / "mmlb_data" / "documentQA" / f"{subset}_K{length // 1024}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    for each in records:
        for place, name in enumerate(each["page_list"]):
            if name:
                image = folder / "mmlb_image" / name
                image.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (30, 40), (40 * place, 0, 0)).save(image)
    return mmlongbench_docs.read_document_questions(folder)


@pytest.mark.parametrize("subset", mmlongbench_docs.SUBSETS)
def test_the_gold_page_is_that_of_the_own_document(tmp_path, subset):
    example = write(tmp_path, [record(subset)], subset).make(subset, 8192)
    shift = int(subset == "slidevqa")
    assert [part for part in example.context if isinstance(part, str)] == [
        f"Document own (page {2 + shift}): ",
        f"\n\nDocument own (page {3 + shift}): ",
        f"\n\nDocument other (page {2 + shift}): ",
        f"\n\nDocument other (page {3 + shift}): ",
        "\n\nQuestion: ",
    ]
    (region,) = example.evidence
    assert (region.part, region.box) == (3, None)
    assert abs(example.context[3].getpixel((5, 5))[0] - 40) < 5
    assert [each.part for each in example.candidates["page"]] == [1, 3, 5, 7]
    asked = "Based on Document own, answer the following question. How many?"
    assert example.question == (asked,)
    assert (example.answer, example.task, example.length) == ("Integer: 7", subset, 8192)
    assert example.depth == pytest.approx(1 / 3)


def test_all_gold_pages_in_the_context_are_evidence(tmp_path):
    opened = write(tmp_path, [record(ans_page_list=[3, 2, 0])])
    assert [region.part for region in opened.make("mmlongdoc", 8192).evidence] == [1, 3]


def test_documents_are_told_apart_by_the_start_of_their_names(tmp_path):
    pages = [f"x/a-document-name{end}/p_page0.jpg" for end in ("", "-and-more")]
    opened = write(
        tmp_path,
        [record(doc_name="a-document-name.pdf", page_list=pages[:1], ans_page_list=[0])],
    )
    assert len(opened.make("mmlongdoc", 8192).evidence) == 1
    opened = write(
        tmp_path, [record(doc_name="a-document-name.pdf", page_list=pages, ans_page_list=[0])]
    )
    with pytest.raises(ValueError, match="expected one of them to be the document"):
        opened.make("mmlongdoc", 8192)


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({"answer": "Not answerable", "answer_format": "None"}, "None: Not answerable"),
        ({"answer": "Not answerable.", "answer_format": "String"}, "None: Not answerable."),
        ({"ans_page_list": []}, "Integer: 7"),
        ({"ans_page_list": None}, "Integer: 7"),
        ({"ans_page_list": [0]}, "Integer: 7"),
        ({"ans_page_list": [9], "page_list": [page("mmlongdoc", "own", 2)]}, "Integer: 7"),
    ],
)
def test_no_evidence_without_answer_or_gold_page(tmp_path, changes, answer):
    example = write(tmp_path, [record(**changes)]).make("mmlongdoc", 8192)
    assert (example.evidence, example.depth, example.answer) == (None, None, answer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ans_page_list": [4]}, r"names the pages \[4\], but the document, .* has 0 to 3"),
        (
            {"ans_page_list": [-1]},
            r"ans_page_list.0 is -1: Input should be greater than or equal to 0",
        ),
        (
            {"ans_page_list": ["3"]},
            r"ans_page_list.0 is 3: Input should be a valid integer",
        ),
        ({"doc_name": "third"}, r"pages of \['other', 'own'\]; .* document 'third'"),
        ({"page_list": ["own/own-3.jpg"]}, "expected a path that ends like _page0.jpg"),
        ({"page_list": [None]}, r"page_list.0 is None: Input should be a valid string"),
        (
            {"answer": "seven"},
            "answer_format or answer: the gold answer 'seven' is not of the kind Integer",
        ),
        ({"answer_format": "Number"}, "answer_format or answer: kind is 'Number'"),
        ({"question": " "}, "question is  : expected a text that is not empty"),
        ({"length": "8K"}, "length is 8K: Input should be a valid number"),
        ({"page_list": []}, r"page_list has pages of \[\]"),
    ],
)
def test_records_that_do_not_fit_name_their_place(tmp_path, changes, message):
    opened = write(tmp_path, [record(), record(**changes)])
    with pytest.raises(ValueError, match=message) as raised:
        list(opened.generate())
    assert "mmlongdoc_K8.jsonl, row 1: " in str(raised.value)


def test_slides_are_numbered_from_one(tmp_path):
    opened = write(tmp_path, [record("slidevqa", page_list=["own/own-0-1024.jpg"])], "slidevqa")
    with pytest.raises(ValueError, match=r"ends like -1-1024.jpg, numbered from 1"):
        opened.make("slidevqa", 8192)


def test_a_missing_page_image_is_named(tmp_path):
    opened = write(tmp_path, [record()])
    (tmp_path / "mmlb_image" / page("mmlongdoc", "other", 3)).unlink()
    with pytest.raises(ValueError, match=r"image .*other_page3.jpg\) does not exist"):
        opened.make("mmlongdoc", 8192)


def test_changed_columns_are_one_error(tmp_path):
    values = record()
    values["evidence_pages"] = values.pop("ans_page_list")
    with pytest.raises(ValueError, match="the field 'ans_page_list' is missing; there are"):
        write(tmp_path, [values]).count("mmlongdoc", 8192)


def test_the_first_questions_are_those_that_mmlongbench_draws(tmp_path):
    records = [record(question=f"Question {row}?") for row in range(6)]
    opened = write(tmp_path, records)
    write(tmp_path, [record("slidevqa")], "slidevqa", 131072)
    opened = mmlongbench_docs.read_document_questions(tmp_path)
    assert (opened.subsets, opened.lengths) == (("mmlongdoc", "slidevqa"), (8192, 131072))
    assert [path.name for path in opened.opened.values()] == [
        "mmlongdoc_K8.jsonl",
        "slidevqa_K128.jsonl",
    ]
    made = list(opened.generate(["mmlongdoc"], [8192], questions=4))
    rows = np.random.default_rng(42).permutation(6)[:4].tolist()
    assert [example.haystack for example in made] == [(0, 8192, row) for row in rows]
    assert [example.question[0][-11:] for example in made] == [f"Question {r}?" for r in rows]
    assert len(list(opened.generate(lengths=[8192], subsets=["mmlongdoc"]))) == 6
    with pytest.raises(ValueError, match="index is 6; mmlongdoc has 6 questions"):
        opened.make("mmlongdoc", 8192, index=6)
    with pytest.raises(ValueError, match="no questions of 'slidevqa' at length 8192"):
        opened.make("slidevqa", 8192)


def test_folders_of_something_else_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no folder mmlb_image"):
        mmlongbench_docs.read_document_questions(tmp_path)
    (tmp_path / "mmlb_image").mkdir()
    with pytest.raises(ValueError, match=r"holds no file such as mmlongdoc_K128.jsonl"):
        mmlongbench_docs.read_document_questions(tmp_path)


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("Answer: about 7 of them", "Integer: 7", 1),
        ("17", "Integer: 7", 0),
        ("I think: answer: Answer: 0.5", "Float: 50%", 1),
        ("Not answerable.", "None: Not answerable", 1),
        ("a red fox", "String: red: fox", 1),
        ("red and 3", 'List: ["red", 3]', (2 / 4 + 1) / 2),
    ],
)
def test_answers_are_scored_by_their_kind(answer, gold, expected):
    assert mmlongbench_docs.question_answer(answer, gold) == pytest.approx(expected)


def test_a_list_is_carried_as_json(tmp_path):
    example = write(tmp_path, [record(answer=["red", 3], answer_format="List")]).make(
        "mmlongdoc", 8192
    )
    assert example.answer == 'List: ["red", 3]'
