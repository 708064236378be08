"""`mmheads rank`: documents, questions, what it chooses, and the index that it keeps."""

import dataclasses
import io
import json
import math
import sys

import example_prompts
import pytest
from pdf_writer import PageSpec, text, write_pdf
from PIL import Image

from mmheads import cli
from mmheads.examples import Example
from mmheads.heads import Head, HeadSet
from mmheads.models import load
from mmheads.pdfs import PageBox, open_pdf
from mmheads.prompts import encode
from mmheads.retrieval import DocumentIndex, fitting, windows
from mmheads.retrieval.fitting import fit_pages, fit_texts

A4 = (595.0, 842.0)


@pytest.fixture(scope="session")
def tiny():
    """The shipped tiny model, loaded once."""
    return load("tiny-qwen3-vl-m", device="cpu")


@pytest.fixture
def here(tiny, tmp_path, monkeypatch):
    """A folder with two documents of three and two pages, where commands use the loaded model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mmheads.models.load", lambda name, **_: {tiny.model_id: tiny}[name])
    example_prompts.write_pdf(tmp_path / "a.pdf", 3)
    example_prompts.write_pdf(tmp_path / "b.pdf", 2)
    return tmp_path


def rank(*words):
    return cli.main(["rank", "--model", "tiny-qwen3-vl-m", "--dpi", "48", *words])


def test_several_documents_are_ranked_together_for_several_questions(here, tiny, capsys):
    (here / "questions.txt").write_text("? B7\n\n? C3\r\n", encoding="utf-8")
    words = ["a.pdf", "b.pdf", "--question", "? D1", "--question-file", "questions.txt"]
    assert rank(*words, "--json", "--window", "2", "--top", "9", "--heat", "raw") == 0
    printed = capsys.readouterr()
    data = json.loads(printed.out)
    assert "10 heads of tiny-qwen3-vl-m; 5 pages at 48 dpi in windows of 2, at most" in printed.err
    assert "of 8192 tokens; the index takes about" in printed.err
    assert [each["question"] for each in data["questions"]] == ["? D1", "? B7", "? C3"]
    assert (data["window"], data["dpi"], data["pages"]) == (2, 48, 5)
    pages = [page for name in ("a", "b") for page in open_pdf(f"{name}.pdf", dpi=48).pages]
    index = DocumentIndex(
        tiny, HeadSet.load("tiny-qwen3-vl-m"), [page.image for page in pages], window=2
    )
    for each in data["questions"]:
        expected = index.rank(each["question"])
        places = [(row["document"], row["page"]) for row in each["pages"]]
        names = ["a.pdf"] * 3 + ["b.pdf"] * 2
        assert places == [(names[i], pages[i].number) for i in expected.order]
        assert [row["score"] for row in each["pages"]] == pytest.approx(
            expected.scores[expected.order].tolist()
        )
        with Image.open(each["picture"]) as picture:
            assert picture.size[0] > 300
    assert sorted(path.name for path in here.glob("*.png")) == [
        f"a.rank-{number}.png" for number in (1, 2, 3)
    ]


def test_questions_come_from_a_pipe_too(here, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"? B7\n? C3\n")))
    assert rank("b.pdf", "--question-file", "-", "--top", "1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [lines[0], lines[3]] == ["? B7", "? C3"]
    assert lines[1].split()[:2] == ["1", "page"]


@pytest.fixture
def calls(monkeypatch):
    """The windows that are run; the third is interrupted, and the first one measures."""
    run, made = windows._run_window, []

    def interrupted(*given):
        made.append(given)
        if len(made) == 3:
            raise KeyboardInterrupt
        return run(*given)

    monkeypatch.setattr(windows, "_run_window", interrupted)
    return made


def test_an_index_is_kept_goes_on_after_an_interrupt_and_is_read_again(here, tiny, capsys, calls):
    words = ["a.pdf", "--question", "? B7", "--window", "1", "--index", "a.index"]
    assert rank(*words) == 130
    with pytest.raises(ValueError, match=r"a\.index holds only the first 1 of 3 candidates"):
        DocumentIndex.load("a.index", tiny)
    assert rank(*words[:-4], "--index", "a.index") == 0  # resolution and window are the kept ones
    assert len(calls) == 3 + 2
    printed = capsys.readouterr()
    assert "going on with a.index" in printed.err
    assert cli.main(["rank", "--model", "tiny-qwen3-vl-m", *words[:-4], *words[-2:]]) == 0
    assert capsys.readouterr().out == printed.out
    assert len(calls) == 3 + 2
    assert DocumentIndex.load("a.index", tiny).count == 3


def regions_pdf(path):
    """Two pages: two paragraphs, and nothing."""
    content = f"{text('B7 K')} {text('rain falls', 300, 200)} {text('1', 5, 5, 4)}"
    write_pdf(path, [PageSpec(content), PageSpec()])


def test_an_index_on_disk_goes_on_and_answers_as_one_in_memory(here, tiny, capsys, calls):
    words = ["a.pdf", "--question", "? B7", "--window", "1"]
    assert rank(*words, "--on-disk") == 1
    assert "--on-disk needs a folder to keep the index in" in capsys.readouterr().err
    assert rank(*words, "--index", "a.index", "--on-disk") == 130
    assert len(list((here / "a.index").iterdir())) == 1
    assert rank(*words[:-2], "--index", "a.index", "--on-disk", "--json") == 0
    printed = capsys.readouterr()
    assert "going on with a.index" in printed.err
    assert "MB are in memory" in printed.err
    assert rank(*words, "--json") == 0
    assert json.loads(printed.out) == json.loads(capsys.readouterr().out)
    assert rank(*words, "--index", "a.index") == 1
    assert "a.index is a folder; give the name of a file, or add --on-disk" in (
        capsys.readouterr().err
    )


def test_regions_are_paragraphs_pictures_and_cells_ranked_from_the_same_index(here, tiny, capsys):
    regions_pdf(here / "r.pdf")
    asked = ["r.pdf", "--question", "? B7", "--index", "r.index"]
    assert rank(*asked, "--json") == 0
    pages = json.loads(capsys.readouterr().out)["questions"][0]["pages"]
    kept = (here / "r.index").read_bytes()
    assert rank(*asked, "--regions", "--json", "--top", "20") == 0
    printed = capsys.readouterr()
    assert "14 regions, 12 of them cells of pages that hold neither paragraphs" in printed.err
    assert "going on with r.index" in printed.err
    assert (here / "r.index").read_bytes() == kept
    (result,) = json.loads(printed.out)["questions"]
    assert result["pages"] == pages
    index = DocumentIndex.load("r.index", tiny)
    for row in result["regions"]:
        box = PageBox(row["page"] - 1, tuple(row["box"]), tuple(row["size"]))
        assert row["score"] == pytest.approx(float(index.rank("? B7", [box]).scores[0]), abs=1e-6)
    assert [row["rank"] for row in result["regions"]] == list(range(1, 15))
    scores = [row["score"] for row in result["regions"]]
    assert scores == sorted(scores, reverse=True)
    texts = {row["text"] for row in result["regions"] if row["page"] == 1}
    assert texts == {"B7 K\n", "rain falls\n"}  # not the page number, which is too small
    assert {row["kind"] for row in result["regions"] if row["page"] == 2} == {"cell"}
    with Image.open(result["picture"]) as picture:
        assert picture.size[0] > 300

    assert rank(*asked, "--regions", "--top", "1") == 0
    page, heading, region, picture = capsys.readouterr().out.splitlines()
    assert page.split()[:2] == region.split()[:2] == ["1", "page"]
    assert heading == "regions (left, top, right and bottom in points):"
    assert picture == "r.rank.png"


def test_an_index_that_began_with_regions_goes_on_without_them(here, capsys, calls):
    regions_pdf(here / "r.pdf")
    asked = ["r.pdf", "--question", "? B7", "--window", "1", "--index", "r.index"]
    assert rank(*asked, "--regions") == 130
    assert rank(*asked) == 0
    assert len(calls) == 3 + 1
    assert rank(*asked, "--regions") == 0
    assert len(calls) == 3 + 1
    assert "cell" in capsys.readouterr().out


def test_regions_of_a_broken_page_are_refused_or_left_out_with_it(here, capsys):
    specs = [PageSpec(text("B7 K")), PageSpec(broken=True)]
    write_pdf(here / "r.pdf", specs)
    asked = ["r.pdf", "--question", "? B7", "--regions"]
    assert rank(*asked) == 1
    assert "Page 2 of r.pdf is broken; " in capsys.readouterr().err
    assert rank(*asked, "--skip-broken") == 0
    printed = capsys.readouterr()
    assert "Page 2 of r.pdf is broken" in printed.err
    assert "B7 K" in printed.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["b.pdf"], "a.index is an index of other documents ("),
        (["a.pdf", "--window", "2"], "a.index is an index of other things (windows [range(0, 1)"),
        (["a.pdf", "--dpi", "60"], "a.index is an index of other things (about "),
        (["a.pdf", "--heads", "other.json"], "a.index is an index of other things (heads "),
        (["a.pdf", "--index", "b.pdf"], "b.pdf is not an index that this version can read"),
    ],
)
def test_an_index_of_other_things_is_refused(here, tiny, words, message, capsys):
    HeadSet((Head(1, 13),), tiny.geometry, tiny.model_id).save("other.json")
    asked = ["--question", "? B7"]
    assert rank("a.pdf", *asked, "--window", "1", "--index", "a.index") == 0
    capsys.readouterr()
    assert rank("--index", "a.index", *words, *asked) == 1
    assert message in capsys.readouterr().err


def test_a_model_of_text_ranks_the_texts_of_pages(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vlm = example_prompts.vlm("qwen3")
    monkeypatch.setattr("mmheads.models.load", lambda *_, **__: vlm)
    two = f"{text('the rain falls')} {text('here the needle is hidden', 72, 300)}"
    pages = [PageSpec(two), PageSpec(), PageSpec(text("which rain falls in the needle"))]
    write_pdf(tmp_path / "t.pdf", pages)
    HeadSet((Head(1, 0),), vlm.geometry, "qwen3").save("heads.json")
    words = ["rank", "t.pdf", "--model", "m", "--question", "which rain falls"]
    assert cli.main([*words, "--heads", "heads.json", "--json"]) == 0
    printed = capsys.readouterr()
    assert "without text, and left out: page 2 of t.pdf" in printed.err
    assert "2 pages as texts in windows of 2" in printed.err
    (result,) = json.loads(printed.out)["questions"]
    assert {row["page"] for row in result["pages"]} == {1, 3}
    assert result["picture"] is None
    assert not list(tmp_path.glob("*.png"))

    assert cli.main([*words, "--heads", "heads.json", "--json", "--regions"]) == 0
    printed = capsys.readouterr()
    assert "mmheads: 3 regions\n" in printed.err
    (ranked,) = json.loads(printed.out)["questions"]
    assert ranked["pages"] == result["pages"]
    assert {row["text"]: row["page"] for row in ranked["regions"]} == {
        "the rain falls\n": 1,
        "here the needle is hidden\n": 1,
        "which rain falls in the needle\n": 3,
    }
    totals = dict.fromkeys((1, 3), 0.0)
    for row in ranked["regions"]:
        totals[row["page"]] += row["score"]
    assert totals == pytest.approx({row["page"]: row["score"] for row in ranked["pages"]}, abs=1e-6)

    assert cli.main(words) == 1
    assert "no heads of qwen3 are shipped or released; find them with `mmheads detect" in (
        capsys.readouterr().err
    )
    example_prompts.write_pdf(tmp_path / "blank.pdf", 2)
    both = ["rank", "blank.pdf", *words[1:], "--heads", "heads.json"]
    assert cli.main(both) == 0
    assert "page 1 of blank.pdf, page 2 of blank.pdf, page 2 of t.pdf" in capsys.readouterr().err
    (tmp_path / "t.pdf").unlink()
    (tmp_path / "blank.pdf").rename("t.pdf")
    assert cli.main([*words, "--heads", "heads.json"]) == 1
    assert "no page holds text, and the model reads only text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--question", "What was sold?"], "does not know the words What, was, sold? of the"),
        (["--question-file", "none.txt"], "none.txt"),
        (["--question-file", "latin.txt"], "latin.txt is not a text in UTF-8"),
        (["--question-file", "empty.txt"], "no question is given; give --question, or a"),
        (["here", "--question", "? B7"], "here is a folder; expected the name of a PDF file"),
        (["--question", "? B7", "--index", "here"], "here is a folder; give the name of a file"),
        (["a.pdf", "--question", "? B7"], "two of the documents have one name"),
        (
            ["--question", "? B7", "--heads", "none.json"],
            "none.json holds no head; if",
        ),
        (["--question", "? B7", "--memory", "0.001"], "beside its forward passes, of 0.001 GB; gi"),
    ],
)
def test_questions_and_limits_that_do_not_fit_are_refused_in_one_sentence(
    here, words, message, capsys
):
    (here / "latin.txt").write_bytes("Größe?".encode("latin-1"))
    (here / "empty.txt").write_text("\n\n")
    (here / "here").mkdir()
    dataclasses.replace(HeadSet.load("tiny-qwen3-vl-m"), heads=(), scores={}).save("none.json")
    assert rank("a.pdf", *words) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert message in error


def test_the_largest_window_fits_the_positions_and_a_larger_one_does_not(tiny):
    heads = HeadSet.load("tiny-qwen3-vl-m")
    fit = fit_pages(tiny, heads, [A4] * 40, ["? B7"], dpi=48)
    page = Image.new("RGB", (416, 576))  # 397 x 562 pixels, rounded up

    def tokens(count):
        example = Example(context=(page,) * count, question=("? B7",))
        return len(encode(tiny, example, max_tokens=10**6))

    assert fit.windows == math.ceil(40 / (8192 // (tokens(2) - tokens(1))))
    assert tokens(fit.window) <= fit.tokens <= tokens(fit.window) + 2 <= 8192
    assert tokens(math.ceil(40 / (fit.windows - 1))) > 8192
    assert fit.share == pytest.approx(1 / 40)
    per_token = 2 * (heads.layers[-1] + 1) * 4 * tiny.text_config.head_dim * 4
    assert fit.bytes == 40 * (tokens(2) - tokens(1)) * per_token
    assert fit_pages(tiny, heads, [A4] * 40, ["? B7"], dpi=48, window=7).window == 7


def test_the_resolution_is_the_highest_that_fits_window_and_memory(tiny, monkeypatch):
    """A token is 32 x 32 pixels here: A4 has 2014 at 144 dpi, 1364 at 120, and 513 at 72."""
    monkeypatch.setattr(fitting, "_image_tokens", lambda vlm, size: size[0] * size[1] // 32**2)
    heads = HeadSet.load("tiny-qwen3-vl-m")
    settings = {window: {"window": window} for window in (0, 3, 8, 12)}  # 8: two windows of 6
    fitted = {
        window: fit_pages(tiny, heads, [A4] * 12, ["? B7"], **given)
        for window, given in settings.items()
    }
    assert {window: fit.dpi for window, fit in fitted.items()} == {0: 144, 3: 144, 8: 120, 12: 72}
    assert fitted[0].window == 4
    cache = fitted[0].bytes
    less = fit_pages(tiny, heads, [A4] * 12, ["? B7"], memory=cache)
    assert less.dpi in fitting.DPIS[1:]
    assert less.bytes < cache
    with pytest.raises(ValueError, match="12 pages do not fit at 144 dpi in windows of 12: "):
        fit_pages(tiny, heads, [A4] * 12, ["? B7"], window=12, dpi=144)
    with pytest.raises(
        ValueError, match=r"12 pages do not fit at 48 dpi in windows of 1: .*memory"
    ):
        fit_pages(tiny, heads, [A4] * 12, ["? B7"], memory=1000)


def test_windows_of_texts_fit_the_longest_of_them():
    vlm = example_prompts.vlm("qwen3")
    heads = HeadSet((Head(1, 0),), vlm.geometry)
    texts = ["rain falls " * 4] * 6 + ["rain falls " * 40] * 2
    limit = vlm.positions
    fit = fit_texts(vlm, heads, texts, ["which rain"])
    assert fit.window == len(texts)
    assert fit.tokens <= limit
    with pytest.raises(ValueError, match="8 pages do not fit in windows of 1: the longest page"):
        fit_texts(vlm, heads, ["rain falls " * limit, *texts[1:]], ["which rain"])
