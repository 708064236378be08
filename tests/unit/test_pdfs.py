"""Pages of PDF files are what a viewer shows; what cannot be read is one error with its page."""

import logging
import time

import numpy as np
import pypdfium2
import pytest
from pdf_writer import PageSpec, rectangle, text, write_pdf

from mmheads import images, pdfs
from mmheads.pdfs import PageBox, open_pdf

ROMAN_THEN_DECIMAL = (
    "/PageLabels << /Nums [0 << /S /r >> 2 << /S /D /P (A-) >> 3 << /S /D /St 4 >>] >>"
)


def dark(image, limit: int = 128) -> int:
    return int((np.asarray(image.convert("L")) < limit).sum())


def red_box(image) -> tuple[int, ...]:
    """Left, top, right, bottom of what is red, in pixels."""
    rows, columns = np.nonzero(np.asarray(image)[..., 1] < 128)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def test_pages_have_text_image_number_and_printed_label(tmp_path):
    specs = [PageSpec(text(f"page number {n}")) for n in range(4)]
    path = write_pdf(tmp_path / "a ü 文.pdf", specs, catalog=ROMAN_THEN_DECIMAL)
    document = open_pdf(path, dpi=36)
    assert document.name == "a ü 文.pdf"
    assert document.problems == ()
    assert [page.number for page in document.pages] == [1, 2, 3, 4]
    assert [page.label for page in document.pages] == ["i", "ii", "A-1", "4"]
    assert [page.title for page in document.pages] == ["i (1)", "ii (2)", "A-1 (3)", "4"]
    assert [page.text for page in document.pages] == [f"page number {n}" for n in range(4)]
    image = document.pages[0].image()
    assert (image.mode, image.size) == ("RGB", (306, 396))
    assert 20 < dark(image) < 2000
    plain = open_pdf(write_pdf(tmp_path / "b.pdf", specs[:1])).pages[0]
    assert (plain.label, plain.title) == ("", "1")


def test_filled_forms_are_drawn(tmp_path):
    filled = write_pdf(tmp_path / "filled.pdf", [PageSpec(field="signed"), PageSpec()])
    first, second = (page.image() for page in open_pdf(filled, dpi=72).pages)
    lower_left = first.crop((0, 742, 200, 792))
    assert dark(lower_left) > 100
    assert dark(first) == dark(lower_left)
    assert dark(second) == 0


@pytest.mark.parametrize(
    ("rotation", "size", "box"),
    [
        (0, (612, 792), (10, 722, 110, 772)),
        (90, (792, 612), (20, 10, 70, 110)),
        (180, (612, 792), (502, 20, 602, 70)),
        (270, (792, 612), (722, 502, 772, 602)),
    ],
)
def test_boxes_refer_to_the_page_as_it_is_displayed(tmp_path, rotation, size, box):
    spec = PageSpec(rectangle(10, 20, 110, 70), entries=f"/Rotate {rotation}")
    page = open_pdf(write_pdf(tmp_path / "turned.pdf", [spec]), dpi=144).pages[0]
    image = page.image()
    assert image.size == (2 * size[0], 2 * size[1])
    assert red_box(image) == tuple(2 * edge for edge in box)
    assert PageBox.whole(0, size).box == (0, 0, *size)


def test_only_the_cropped_part_of_a_page_is_shown(tmp_path):
    spec = PageSpec(rectangle(10, 20, 110, 70), entries="/CropBox [0 0 200 100]")
    image = open_pdf(write_pdf(tmp_path / "cropped.pdf", [spec]), dpi=72).pages[0].image()
    assert image.size == (200, 100)
    assert red_box(image) == (10, 30, 110, 80)


@pytest.mark.parametrize("box", ["0 0 0 0", "0 0 a b", "", "612 792 0 0"])
def test_pages_without_a_usable_box_are_shown_in_letter_size(tmp_path, box):
    path = write_pdf(tmp_path / "box.pdf", [PageSpec(text("hello"), box=box)])
    image = open_pdf(path, dpi=72).pages[0].image()
    assert image.size == (612, 792)
    assert dark(image) > 100


def test_a_page_without_area_is_an_error_with_its_number(tmp_path):
    outside = PageSpec(box="0 0 600 800", entries="/CropBox [600 800 1000 1000]")
    path = write_pdf(tmp_path / "outside.pdf", [PageSpec(), outside])
    with pytest.raises(ValueError, match=r"^Page 2 of \S+outside.pdf has no area \(0 x 0 points"):
        open_pdf(path)
    assert len(open_pdf(path, skip_broken=True).pages) == 1


def test_a_tiny_page_is_one_pixel(tmp_path):
    path = write_pdf(tmp_path / "tiny.pdf", [PageSpec(box="0 0 0.1 0.1")])
    assert open_pdf(path).pages[0].image().size == (1, 1)


def test_pages_are_bounded_before_they_are_drawn(tmp_path):
    large = write_pdf(tmp_path / "large.pdf", [PageSpec(), PageSpec(box="0 0 14400 14400")])
    message = (
        r"^Page 2 of \S+large.pdf has 14,400 x 14,400 points, and thereby 207,360,000 pixels at "
        r"72 dpi; expected at most 178,956,970 pixels: 66 dpi or less would fit; skip_broken=True"
    )
    with pytest.raises(ValueError, match=message):
        open_pdf(large, dpi=72)
    with pytest.raises(ValueError, match="66 dpi or less would fit"):
        open_pdf(large, dpi=67)
    assert len(open_pdf(large, dpi=66).pages) == 2
    kept = open_pdf(large, dpi=72, skip_broken=True)
    assert [page.number for page in kept.pages] == [1]
    assert len(kept.problems) == 1
    huge = write_pdf(tmp_path / "huge.pdf", [PageSpec(box="0 0 612 2147483647")])
    with pytest.raises(ValueError, match=r"Page 1 of \S+huge.pdf .*: no resolution would fit"):
        open_pdf(huge, dpi=72)
    with pytest.raises(ValueError, match=r"^\S+huge.pdf has no page that can be read: Page 1 of"):
        open_pdf(huge, skip_broken=True)


def test_the_limit_itself_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(pdfs, "MAX_PIXELS", 200 * 100)
    path = write_pdf(tmp_path / "a.pdf", [PageSpec(box="0 0 100 50")])
    assert open_pdf(path, dpi=144).pages[0].image().size == (200, 100)
    with pytest.raises(ValueError, match=r"at 145 dpi; .* 144 dpi or less would fit"):
        open_pdf(path, dpi=145)
    assert images.MAX_PIXELS == 178_956_970


def test_a_broken_page_is_named_and_the_others_are_read_on_request(tmp_path):
    specs = [PageSpec(text("one")), PageSpec(broken=True), PageSpec(text("three"))]
    path = write_pdf(tmp_path / "broken.pdf", specs, catalog=ROMAN_THEN_DECIMAL)
    with pytest.raises(ValueError, match=r"^Page ii \(2\) of \S+broken.pdf is broken; skip_"):
        open_pdf(path)
    document = open_pdf(path, dpi=72, skip_broken=True)
    assert [page.title for page in document.pages] == ["i (1)", "A-1 (3)"]
    assert [page.text for page in document.pages] == ["one", "three"]
    assert dark(document.pages[1].image()) > 100
    (problem,) = document.problems
    assert problem == f"Page ii (2) of {path} is broken"


def test_a_wrong_number_of_pages_does_no_harm(tmp_path):
    specs = [PageSpec(text("one")), PageSpec(text("two"))]
    path = write_pdf(tmp_path / "more.pdf", specs, count=4)
    with pytest.raises(ValueError, match=r"^Page 3 of \S+more.pdf is broken"):
        open_pdf(path)
    document = open_pdf(path, skip_broken=True)
    assert [page.text for page in document.pages] == ["one", "two"]
    assert len(document.problems) == 2
    forged = write_pdf(tmp_path / "forged.pdf", specs, count=900_000)
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"forged.pdf has over 1,000 broken pages: Page 3 of"):
        open_pdf(forged, skip_broken=True)
    assert time.monotonic() - start < 5
    for count in (0, -5, 2**31 - 1):
        path = write_pdf(tmp_path / "count.pdf", specs, count=count)
        assert open_pdf(path).pages[0].text == "one"


def test_encrypted_files_open_with_their_password(tmp_path):
    path = write_pdf(tmp_path / "secret.pdf", [PageSpec(text("secret words"))], password="käse")
    with pytest.raises(ValueError, match=r"^\S+secret.pdf is encrypted; give its password"):
        open_pdf(path)
    with pytest.raises(ValueError, match=r"encrypted with another password than the given") as bad:
        open_pdf(path, password="guess")
    assert "guess" not in str(bad.value)
    page = open_pdf(path, dpi=72, password="käse").pages[0]
    assert page.text == "secret words"
    assert dark(page.image()) > 100
    path = write_pdf(tmp_path / "open.pdf", [PageSpec(text("no user password"))], password="")
    assert open_pdf(path).pages[0].text == "no user password"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"a.pdf cannot be opened as a PDF \(it begins with b''\)"),
        (b"<html>not found", r"a.pdf cannot be opened as a PDF \(it begins with b'<html>not foun"),
        (b"%PDF-1.7\n%%EOF", "a.pdf cannot be opened as a PDF"),
    ],
)
def test_files_that_are_not_whole_pdfs_are_one_error(tmp_path, content, message):
    (tmp_path / "a.pdf").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_pdf(tmp_path / "a.pdf")


def test_no_page_is_not_taken_for_a_wrong_password(tmp_path):
    with pytest.raises(ValueError, match="is encrypted"):
        open_pdf(write_pdf(tmp_path / "secret.pdf", [PageSpec()], password="x"))
    with pytest.raises(ValueError, match=r"none.pdf cannot be opened .* has no page"):
        open_pdf(write_pdf(tmp_path / "none.pdf", []))


def test_missing_files_folders_and_resolutions_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "missing.pdf"):
        with pytest.raises(ValueError, match="does not exist; expected a PDF file"):
            open_pdf(path)
    path = write_pdf(tmp_path / "a.pdf", [PageSpec()])
    for dpi in (0, 2401):
        with pytest.raises(ValueError, match=rf"dpi is {dpi}; expected 1 to 2400"):
            open_pdf(path, dpi=dpi)


def test_dynamic_xfa_forms_are_refused_and_static_ones_read_quietly(tmp_path, caplog):
    waiting = [PageSpec(text("Please wait"))]
    form = "/AcroForm << /Fields [] /XFA (x) >>"
    dynamic = write_pdf(tmp_path / "d.pdf", waiting, catalog=f"/NeedsRendering true {form}")
    with pytest.raises(ValueError, match=r"d.pdf is a dynamic XFA form, .* print it to a new PDF"):
        open_pdf(dynamic)
    static = write_pdf(tmp_path / "s.pdf", waiting, catalog=form)
    with caplog.at_level(logging.WARNING):
        assert dark(open_pdf(static, dpi=72).pages[0].image()) > 100
    assert not caplog.records


def test_texts_of_all_pages_are_read_in_one_opening(tmp_path, monkeypatch):
    path = write_pdf(tmp_path / "a.pdf", [PageSpec(text(str(n))) for n in range(5)])
    document = open_pdf(path)
    openings = []

    class Counted(pypdfium2.PdfDocument):
        def __init__(self, *arguments, **options):
            openings.append(arguments)
            super().__init__(*arguments, **options)

    monkeypatch.setattr(pypdfium2, "PdfDocument", Counted)
    assert [page.text for page in document.pages] == list("01234")
    assert len(openings) == 1


def test_a_file_that_is_gone_or_changed_is_one_error(tmp_path):
    path = write_pdf(tmp_path / "a.pdf", [PageSpec(text("one")), PageSpec(text("two"))])
    first, second = open_pdf(path).pages
    write_pdf(path, [PageSpec(text("another"))])
    with pytest.raises(ValueError, match=r"^Page 2 of \S+a.pdf cannot be drawn at 144 dpi"):
        second.image()
    with pytest.raises(ValueError, match=r"^Page 2 of \S+a.pdf holds text that cannot"):
        second.read_text()
    path.unlink()
    with pytest.raises(ValueError, match=r"a.pdf does not exist"):
        first.image()
