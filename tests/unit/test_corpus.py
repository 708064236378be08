"""Reading matter of haystacks: sentences, the shipped corpus, a user's folder."""

import example_prompts
import pdf_writer
import pytest
from PIL import Image

from mmheads.tasks import corpus


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two!  Three?\nFour", ["One.", "Two!", "Three?", "Four"]),
        ("Mr. Hall met J. R. Carter. They left.", ["Mr. Hall met J. R. Carter.", "They left."]),
        ("The U.S. Congress sat. 12 left.", ["The U.S. Congress sat.", "12 left."]),
        ('He said "Go." Then he went.', ['He said "Go."', "Then he went."]),
        ("It cost 3.50 in all. ok", ["It cost 3.50 in all. ok"]),
        ("", []),
    ],
)
def test_sentences_end_where_readers_see_it(text, expected):
    assert corpus.sentences(text) == expected


def test_a_stretch_without_an_end_is_cut_at_a_space():
    pieces = corpus.sentences("word " * 300)
    assert max(map(len, pieces)) <= corpus.LONGEST_SENTENCE
    assert " ".join(pieces).split() == ["word"] * 300


def test_the_shipped_corpus_is_prose_of_its_size():
    source = corpus.shipped()
    lines = corpus.CORPUS.read_text(encoding="utf-8").strip().split("\n")
    assert 100_000 < corpus.CORPUS.stat().st_size < 300_000
    assert [" ".join(paragraph) for paragraph in source.paragraphs] == lines
    readme = (corpus.CORPUS.parent / "README.md").read_text(encoding="utf-8")
    assert f"{len(lines)} paragraphs" in readme
    assert "public domain" in readme
    assert len({*lines}) == len(lines)
    assert all(line.rstrip("\"')").endswith((".", "!", "?")) for line in lines)


def test_all_kinds_of_files_are_read_in_the_order_of_their_paths(tmp_path):
    (tmp_path / "b.txt").write_text("Second text. It ends.\n\nA new paragraph.\n")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "a.md").write_text("First text.")
    pdf_writer.write_pdf(tmp_path / "c.pdf", [pdf_writer.PageSpec(pdf_writer.text("Hello there."))])
    Image.new("RGB", (30, 20), "red").save(tmp_path / "d.png")
    (tmp_path / ".hidden.txt").write_text("Never.")
    (tmp_path / "e.docx").write_bytes(b"Never.")
    source = corpus.folder(tmp_path, dpi=72)
    assert source.paragraphs == (
        ("First text.",),
        ("Second text.", "It ends."),
        ("A new paragraph.",),
        ("Hello there.",),
    )
    assert [page().size for page in source.pages] == [(612, 792), (30, 20)]


def test_pages_without_text_are_read_beside_the_shipped_text(tmp_path):
    example_prompts.write_pdf(tmp_path / "scan.pdf", 2)
    source = corpus.folder(tmp_path)
    assert len(source.pages) == 2
    assert source.paragraphs == corpus.shipped().paragraphs


def test_files_that_cannot_be_read_are_one_warning(tmp_path):
    (tmp_path / "good.txt").write_text("Good.")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.4 nothing")
    (tmp_path / "broken.png").write_bytes(b"nothing")
    with pytest.warns(UserWarning, match="4 files or pages are left out") as caught:
        source = corpus.folder(tmp_path)
    assert len(caught) == 1
    for name in ("latin.txt", "empty.txt", "broken.pdf", "broken.png"):
        assert name in str(caught[0].message)
    assert source.paragraphs == (("Good.",),)


@pytest.mark.filterwarnings("ignore:1 files or pages")
@pytest.mark.parametrize("content", [{}, {"a.docx": b"x"}, {"a.txt": b"\xff\xfe"}])
def test_a_folder_with_nothing_usable_is_one_error(tmp_path, content):
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=r"holds nothing to fill haystacks with; .*\.txt, .*\.pdf"):
        corpus.folder(tmp_path)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        corpus.folder(tmp_path / "nowhere")
