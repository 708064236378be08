"""Drawn pages: where text and pictures are, and that they are readable apart."""

import numpy as np
import pytest
from PIL import Image

from mmheads.tasks import rendered_pages
from mmheads.tasks.rendered_pages import PICTURES, PageStyle

STYLE = PageStyle()
TEXTS = ["The first paragraph, which is long enough for two lines of the page.", "Short.", "g j p"]


def test_ink_is_only_inside_the_boxes():
    picture = rendered_pages.draw_picture(PICTURES[5], STYLE.picture)
    page = rendered_pages.draw_page(TEXTS, STYLE, picture, (0.5, 0.25))
    dark = np.asarray(page.image).min(axis=2) < 250
    for box in (*page.paragraphs, page.picture):
        left, top, right, bottom = box
        assert dark[top:bottom, left:right].any()
        dark[top:bottom, left:right] = False
    assert not dark.any()
    assert page.image.crop(page.picture).tobytes() == picture.tobytes()
    assert page.paragraphs[1][3] <= page.picture[1] < page.picture[3] <= page.paragraphs[2][1]
    assert page.paragraphs[0][3] - page.paragraphs[0][1] == 2 * STYLE.line_height


def test_lines_keep_every_word_and_the_margins():
    room = STYLE.width - 2 * STYLE.margin
    font = rendered_pages._font(STYLE.font_size)
    lines = rendered_pages.wrap("several words on some lines " * 20, STYLE)
    assert " ".join(lines).split() == ["several", "words", "on", "some", "lines"] * 20
    cut = rendered_pages.wrap("x" * 200, STYLE)
    assert "".join(cut) == "x" * 200
    assert max(font.getlength(line) for line in (*lines, *cut)) <= room + 1
    assert min(font.getlength(line) for line in lines[:-1]) > 0.7 * room


def test_a_page_that_is_too_full_is_refused():
    picture = rendered_pages.draw_picture(PICTURES[0], STYLE.picture)
    with pytest.raises(ValueError, match="expected fewer"):
        rendered_pages.draw_page(["A line."] * 60, STYLE, picture, (0, 0))


def test_a_piece_is_pasted_whole_on_any_page():
    piece = Image.new("RGB", (40, 30), "red")
    for size, place in (((200, 100), (0, 0)), ((200, 100), (1, 1)), ((20, 20), (0.5, 0.5))):
        page = Image.new("RGB", size, "blue")
        pasted, box = rendered_pages.paste_on(page, piece, place)
        assert pasted.crop(box).tobytes() == piece.tobytes()
        assert page.getcolors() == [(size[0] * size[1], (0, 0, 255))]


def test_small_pictures_can_be_told_apart():
    drawn = [np.asarray(rendered_pages.draw_picture(name, 24), float) for name in PICTURES]
    flat = np.stack([image.ravel() for image in drawn])
    assert len({image.tobytes() for image in flat}) == len(PICTURES)
    near = np.abs(flat[::160, None] - flat[None]).max(axis=-1)
    near[near == 0] = 255
    assert near.min() > 40


def test_a_style_that_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="cannot be drawn"):
        PageStyle(width=80, margin=20, picture=56)
