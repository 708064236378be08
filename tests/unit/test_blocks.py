"""Blocks of a PDF page: lines that belong together, and pictures, where a reader sees them."""

import io

import numpy as np
import pypdfium2
import pytest
from pdf_writer import PageSpec, text, write_pdf
from PIL import Image

from mmheads import paths
from mmheads.blocks import Block, grid
from mmheads.pdfs import Page, open_pdf


def blocks(path, content, **settings):
    (page,) = open_pdf(write_pdf(path, [PageSpec(content, **settings)]), dpi=72).pages
    return page


def dark_box(image) -> tuple[int, ...]:
    """Left, top, right, bottom of what is drawn, in pixels, which are points at 72 dpi."""
    rows, columns = np.nonzero(np.asarray(image.convert("L")) < 200)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def test_lines_below_each_other_are_a_block_and_a_gap_a_size_or_a_column_begins_another(tmp_path):
    lines = [
        ("A title", 72, 720, 24),
        ("First line of text", 72, 690, 12),
        ("second line", 72, 676, 12),
        ("a paragraph further down", 72, 640, 12),
        ("another column", 400, 690, 12),
    ]
    page = blocks(tmp_path / "a.pdf", " ".join(text(*line) for line in lines))
    assert [block.text for block in page.blocks] == [
        "A title\n",
        "First line of text\nsecond line\n",
        "a paragraph further down\n",
        "another column\n",
    ]
    assert page.paragraphs == list(page.blocks)
    assert {block.kind for block in page.blocks} == {"text"}


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
@pytest.mark.parametrize("crop", ["", "/CropBox [50 100 600 700]"])
def test_a_block_lies_where_the_page_shows_it(rotation, crop, tmp_path):
    entries = f"/Rotate {rotation} {crop}"
    page = blocks(tmp_path / "a.pdf", text("HHHHHH xxxx", 100, 500, 30), entries=entries)
    (block,) = page.blocks
    assert block.text == "HHHHHH xxxx\n"
    drawn = dark_box(page.image())
    for side, ink, outward in zip(block.box, drawn, (-1, -1, 1, 1), strict=True):
        assert -1.5 <= (side - ink) * outward <= 12  # the height of the font around its letters
    assert block.area == pytest.approx(
        (block.box[2] - block.box[0]) * (block.box[3] - block.box[1])
    )


def test_text_outside_of_the_page_is_no_block(tmp_path):
    content = text("far away", 3000, 300) + " " + text("here", 72, 500)
    assert [each.text for each in blocks(tmp_path / "a.pdf", content).blocks] == ["here\n"]


def test_a_picture_is_a_block_unless_it_is_tiny_or_the_whole_page(tmp_path):
    file = pypdfium2.PdfDocument.new()
    page = file.new_page(600, 800)
    data = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(data, "jpeg")
    places = [(100, 300, 200, 100), (10, 10, 20, 20), (0, 0, 600, 800)]
    for left, bottom, wide, high in [*places, places[0]]:
        image = pypdfium2.PdfImage.new(file)
        image.load_jpeg(io.BytesIO(data.getvalue()))
        image.set_matrix(pypdfium2.PdfMatrix().scale(wide, high).translate(left, bottom))
        page.insert_obj(image)
    page.gen_content()
    file.save(tmp_path / "a.pdf")
    (page,) = open_pdf(tmp_path / "a.pdf").pages
    assert page.blocks == (Block((100, 400, 300, 500), kind="picture"),)
    assert page.paragraphs == []


def test_a_grid_covers_a_page_without_overlap():
    cells = grid((600, 800), 3, 4)
    assert len(cells) == 12
    assert (cells[0].box, cells[-1].box) == ((0, 0, 200, 200), (400, 600, 600, 800))
    assert sum(cell.area for cell in cells) == 600 * 800
    assert {(cell.kind, cell.text) for cell in cells} == {("cell", "")}


def test_a_page_of_another_source_has_no_blocks():
    assert Page(1, lambda: "text", lambda: Image.new("RGB", (1, 1))).blocks == ()


@pytest.mark.skipif(paths.real_docs() is None, reason="no real documents; see MMHEADS_REAL_DOCS")
def test_words_that_a_line_break_divides_are_whole_in_a_real_document():
    page = open_pdf(paths.real_docs() / "pdfs" / "2310.07609v1.pdf").pages[3]
    texts = [block.text for block in page.blocks]
    caption = "Figure 3: Illustrations of the three different implementations of the Question"
    assert any(text.startswith(caption) for text in texts)
    assert "3.4 QA Validator\n" in texts
    assert len(texts) < 40
    (picture,) = [block for block in page.blocks if block.kind == "picture"]
    assert picture.box[3] < 440  # the figure is in the upper half
