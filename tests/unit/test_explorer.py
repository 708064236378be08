"""The explorer's page: its values are those of the scores, it stays small, and it works."""

import base64
import dataclasses
import io
import json
import re
import zlib

import example_prompts
import numpy as np
import pytest
import random_models
from PIL import Image

from mmheads import causal, cli, explorer, paths, prompts, scoring
from mmheads.examples import Example, Video
from mmheads.models import VLM, load
from mmheads.tasks.needles import GENERATED


def content(page: explorer.Explorer) -> dict:
    """What the page's script reads."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.html)
    return json.loads(text)


def floats(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4")


def attention(block: str, rows: int) -> np.ndarray:
    """[row, token] of one head, as the page's script decodes it."""
    data = zlib.decompress(base64.b64decode(block))
    scales = np.frombuffer(data[: 4 * rows], "<f4")[:, None]
    codes = np.frombuffer(data[4 * rows :], np.uint8).reshape(rows, -1)
    return scales * (codes / 255.0) ** explorer.POWER


def rounding(exact: np.ndarray) -> np.ndarray:
    """The largest error that 8 bits allow at each value: the step between codes there."""
    scale = np.maximum(exact.max(axis=-1, keepdims=True), 1e-12)
    codes = 255 * (exact / scale) ** (1 / explorer.POWER)
    return (
        scale * (((codes + 0.51) / 255) ** explorer.POWER - (codes / 255) ** explorer.POWER) + 1e-6
    )


@pytest.fixture(scope="module")
def tiny() -> VLM:
    return load(paths.MODELS / "tiny-qwen3-vl-m", device="cpu")


@pytest.mark.parametrize("family", random_models.FAMILIES)
def test_the_page_holds_the_scores_and_the_attention_of_full_passes(family):
    vlm, example = example_prompts.vlm(family), example_prompts.example(family)
    page = content(explorer.explore(vlm, example, progress=False))
    (shown,) = page["examples"]
    expected = scoring.score_heads(vlm, [example], progress=False)
    planes = {**expected.quantities, "calibrated": expected.values}
    for name in ("raw", "null", "share", "context", "calibrated"):
        of_heads = planes[name][0][vlm.every_head.mask]
        np.testing.assert_allclose(floats(shown["scores"][name]), of_heads, atol=1e-5, rtol=0)

    prompt = prompts.encode(vlm, example)
    exact = example_prompts.eager_attention(vlm, prompt.own)[vlm.every_head.mask].numpy()
    for head, (means, tokens) in enumerate(zip(shown["means"], shown["tokens"], strict=True)):
        mean = attention(means, 2)
        ours = exact[head][:, : mean.shape[1]]
        assert (abs(mean[0] - ours.mean(0)) <= rounding(ours.mean(0))).all()
        single = attention(tokens, len(ours))
        assert (abs(single - ours) <= rounding(ours)).all()
        weights = prompt.weights(prompt.evidence)[: mean.shape[1]]
        assert mean[0] @ weights == pytest.approx(
            float(floats(shown["scores"]["raw"])[head]),
            abs=float(rounding(ours.mean(0)) @ weights) + 1e-5,
        )


def test_context_that_is_not_in_the_cache_keeps_its_attention(tiny, monkeypatch):
    example = GENERATED.make("text", 128, 1.0)
    (usual,) = content(explorer.explore(tiny, example, progress=False))["examples"]

    def encode(*args, **options):
        prompt = prompts.encode(*args, **options)
        return dataclasses.replace(prompt, shared=prompt.shared - 3)

    monkeypatch.setattr(explorer, "encode", encode)
    (shown,) = content(explorer.explore(tiny, example, progress=False))["examples"]
    assert shown["parts"] == usual["parts"]
    for name in usual["scores"]:
        np.testing.assert_allclose(
            floats(shown["scores"][name]), floats(usual["scores"][name]), atol=1e-5
        )
    for name, rows in (("means", 2), ("tokens", len(usual["question"]))):
        for ours, theirs in zip(shown[name], usual[name], strict=True):
            exact = attention(theirs, rows)
            assert (abs(attention(ours, rows) - exact) <= 2 * rounding(exact)).all()


def test_texts_tokens_and_places_are_those_of_the_prompt():
    vlm, example = example_prompts.vlm("qwen3_vl"), example_prompts.example("qwen3_vl")
    (shown,) = content(explorer.explore(vlm, example, progress=False))["examples"]
    prompt = prompts.encode(vlm, example)
    for index, (part, about) in enumerate(zip(example.context, shown["parts"], strict=True)):
        tokens = np.frombuffer(zlib.decompress(base64.b64decode(about["at"])), "<i4")
        assert tokens.tolist() == prompt.parts[index].tokens.tolist()
        if isinstance(part, str):
            assert "".join(about["pieces"]) == part
            assert len(about["pieces"]) == len(tokens)
        else:
            boxes = np.frombuffer(zlib.decompress(base64.b64decode(about["boxes"])), "<f4")
            np.testing.assert_allclose(boxes.reshape(-1, 4), prompt.boxes[index], rtol=1e-6)
            assert about["size"] == list(part.size)
    inside = "".join(shown["parts"][2]["pieces"][i] for i in shown["parts"][2]["evidence"])
    assert inside.strip() == "needle"
    assert shown["parts"][1]["outlines"] == [[10, 5, 33, 28]]
    assert "".join(shown["question"]).strip().startswith("which rain falls")
    assert len(shown["question"]) == len(prompt.question)


def test_letters_of_several_tokens_are_shown_whole():
    vlm = example_prompts.vlm("qwen3")
    text = "Ein Löwe 🦁 läuft. 狮子在跑。 <|im_end|> stays text."
    example = Example(context=(text,), question=("狮子?",))
    (shown,) = content(explorer.explore(vlm, example, progress=False))["examples"]
    assert "".join(shown["parts"][0]["pieces"]) == text
    assert "".join(shown["question"]).strip() == "狮子?"


def test_the_set_of_one_click_is_the_top_of_the_scores(tiny):
    examples = [GENERATED.make(task, 128, 0.4) for task in ("text", "image")]
    page = content(explorer.explore(tiny, examples, progress=False))
    expected = scoring.score_heads(tiny, examples, progress=False).top(explorer.FRACTION)
    assert [tuple(page["heads"][index]) for index in page["top"]] == list(expected)


def test_gate_gradients_are_shown_where_they_are_asked_for(tiny):
    example = GENERATED.make("text", 128, 0.4)
    page = content(explorer.explore(tiny, example, gradients=True, progress=False))
    (shown,) = page["examples"]
    expected = causal.gate_gradients(tiny, [example], progress=False)[0]
    np.testing.assert_allclose(floats(shown["scores"]["gate"]), expected.ravel(), atol=1e-6)


def test_the_null_question_gets_the_questions_images_only_where_they_are_asked_for():
    vlm, example = example_prompts.vlm("qwen3_vl"), example_prompts.example("qwen3_vl")
    pages = {
        images: content(explorer.explore(vlm, example, null_images=images, progress=False))
        for images in scoring.NULL_IMAGES
    }
    for images, page in pages.items():
        expected = scoring.score_heads(vlm, [example], null_images=images, progress=False)
        found = floats(page["examples"][0]["scores"]["null"])
        np.testing.assert_allclose(found, expected.quantities["null"].ravel(), atol=1e-5)
    null = [page["examples"][0]["scores"]["null"] for page in pages.values()]
    assert null[0] != null[1]


def test_an_example_without_evidence_has_attention_and_no_score(tiny):
    example = dataclasses.replace(GENERATED.make("text", 128, 0.4), evidence=None)
    (shown,) = content(explorer.explore(tiny, example, progress=False))["examples"]
    assert list(shown["scores"]) == ["context"]
    assert len(shown["means"]) == tiny.geometry.size
    assert not any(part.get("evidence") or part.get("outlines") for part in shown["parts"])


def test_the_same_input_gives_the_same_bytes(tiny, tmp_path):
    example = GENERATED.make("rendered_text", 128, 0.4)
    for name in ("a.html", "b.html"):
        explorer.explore(tiny, example, tmp_path / name, progress=False)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_an_image_of_several_examples_is_stored_once(tiny):
    page = example_prompts.picture(64, 64)
    examples = [Example(context=(page,), question=(word,)) for word in ("red", "blue")]
    assert len(content(explorer.explore(tiny, examples, progress=False))["images"]) == 1


HOSTILE = "</script><script>window.hit = 1</script><b>\"bold\"</b> & 'one' \u2028 {{data}} <!--"


def test_text_that_looks_like_html_stays_text(tiny):
    example = Example(context=(HOSTILE,), question=(HOSTILE,), answer=HOSTILE, task=HOSTILE)
    page = explorer.explore(tiny, example, title=HOSTILE, progress=False)
    assert page.html.count("<script") == 2
    assert "<b>" not in page.html
    assert "\u2028" not in page.html.split("<body>")[1]
    shown = content(page)
    assert shown["title"] == shown["examples"][0]["answer"] == HOSTILE
    assert "".join(shown["examples"][0]["parts"][0]["pieces"]) == HOSTILE


def test_a_notebook_shows_the_page_in_a_frame(tiny):
    page = explorer.explore(tiny, GENERATED.make("text", 128, 0.4), progress=False)
    frame = page._repr_html_()
    assert frame.startswith("<iframe")
    assert frame.count("<") == 2
    assert "srcdoc=" in frame
    assert len(repr(page)) < 200


def size_of(page: dict, name: str) -> int:
    return sum(len(block) for example in page["examples"] for block in example[name])


def limited(vlm, example, limit):
    page = explorer.explore(vlm, example, max_bytes=limit, progress=False)
    assert len(page.html.encode()) <= limit
    shown = content(page)
    assert shown["notes"] == list(page.notes)
    assert shown["examples"][0]["tokens"] is None
    return page.notes, shown


def test_single_question_tokens_are_left_out_first_then_pages_are_reduced():
    vlm, pages = example_prompts.vlm("qwen3_vl"), [example_prompts.picture(400, 320, 0)]
    example = Example(context=("First the rain falls.", *pages), question=("which rain",))
    whole = explorer.explore(vlm, example, progress=False)
    assert whole.notes == ()
    tokens = size_of(content(whole), "tokens")
    picture = len(content(whole)["images"][0])
    notes, shown = limited(vlm, example, len(whole.html) - tokens // 2)
    assert notes == (explorer.NO_TOKENS,)
    assert shown["images"] == content(whole)["images"]
    notes, shown = limited(vlm, example, len(whole.html) - tokens - picture // 10)
    assert notes == (explorer.NO_TOKENS, explorer.SMALL_PAGES.format(side=360))
    image = Image.open(io.BytesIO(base64.b64decode(shown["images"][0].split(",")[1])))
    assert image.size == (360, 288)


def test_then_the_heads_with_the_lowest_scores_lose_their_attention(tiny):
    example = GENERATED.make("text", 512, 0.4)
    whole = explorer.explore(tiny, example, progress=False)
    tokens, means = (size_of(content(whole), name) for name in ("tokens", "means"))
    notes, shown = limited(tiny, example, len(whole.html) - tokens - means // 2)
    kept = [index for index, block in enumerate(shown["examples"][0]["means"]) if block]
    assert 30 < len(kept) < 128
    assert notes == (explorer.NO_TOKENS, explorer.FEWER_HEADS.format(kept=len(kept), all=128))
    scores = floats(shown["examples"][0]["scores"]["calibrated"])
    assert set(kept) == set(np.argsort(-scores, kind="stable")[: len(kept)])
    with pytest.raises(ValueError, match="has no room for what 1 examples need at least"):
        explorer.explore(tiny, example, max_bytes=30_000, progress=False)


VIDEO = Video(frames=(Image.new("RGB", (32, 32)),) * 2)


@pytest.mark.parametrize(
    ("examples", "options", "message"),
    [
        ([], {}, "there is no example"),
        ([Example(context=(VIDEO,), question=("?",))], {}, "example 0 .from 0.: it holds a video"),
        ([Example(context=("a",), question=(" ",))], {}, "the question is empty"),
        ([Example(context=("a",), question=("?",))], {"gradients": True}, "the answer ''"),
        ([], {"null_images": "none"}, "null_images is 'none'; expected one of"),
    ],
)
def test_bad_input_is_refused_and_an_older_file_stays(tiny, tmp_path, examples, options, message):
    path = tmp_path / "out.html"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        explorer.explore(tiny, examples, path, progress=False, **options)
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_path_in_place_of_examples_is_refused(tiny):
    with pytest.raises(TypeError, match="an example is 'm'; expected an Example, see read_ex"):
        explorer.explore(tiny, "mine.jsonl", progress=False)


LINE = {"context": ["rain falls . B7 K ."], "question": "? B7", "evidence": [{"part": 0}]}


def test_the_command_writes_one_page(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [LINE, {"context": ["rain falls ."], "question": "? B7"}]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert cli.main(["explore", "tiny-qwen3-vl-m", "mine.jsonl"]) == 0
    assert "mine.html: 2 examples, " in capsys.readouterr().out
    assert b"<!doctype html>" in (tmp_path / "mine.html").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny-qwen3-vl-m", "missing.jsonl"], "missing.jsonl does not exist"),
        (
            ["tiny-qwen3-vl-m", "mine.jsonl", "-o", "out.pdf"],
            "out.pdf; expected the name of a file",
        ),
        (["tiny-qwen3-vl-m", "mine.jsonl", "-o", "folder.html"], "folder.html is a folder"),
        (["tiny-qwen3-vl-m", "mine.jsonl", "-o", "blocked/out.html"], "cannot be written to"),
        (["tiny-qwen3-vl-m", "mine.jsonl", "--gradients"], "the answer '' of an example"),
        (["tiny-qwen3-vl-m", "mine.jsonl", "--device", "nonsense"], "nonsense"),
    ],
)
def test_the_command_refuses_bad_input_in_one_sentence(
    arguments, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jsonl").write_text(json.dumps(LINE), encoding="utf-8")
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "blocked").write_text("a file where a folder is expected", encoding="utf-8")
    assert cli.main(["explore", *arguments]) == 1
    error = capsys.readouterr().err
    sentence = error.split("\r")[-1]  # After the progress bars.
    assert message in sentence
    assert len(sentence.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"mine.jsonl", "folder.html", "blocked"}


EXAMPLES = [
    GENERATED.make("rendered_text", 128, 0.4, split="test"),
    GENERATED.make("text", 128, 0.4, split="test"),
    Example(context=(HOSTILE,), question=(HOSTILE,)),
]


@pytest.fixture(scope="module")
def written(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "out.html"
    explorer.explore(tiny, EXAMPLES, path, title=HOSTILE, progress=False)
    return path


@pytest.fixture
def opened(browser, written):
    """The page at a desktop's width, with nothing chosen yet."""
    browser.resize(1280)
    browser.get(written.as_uri())
    ready(browser)
    yield browser
    said = [entry for entry in browser.get_log("browser") if entry["source"] != "rendering"]
    assert said == []


def wait(browser, script):
    from selenium.webdriver.support.wait import WebDriverWait

    WebDriverWait(browser, 30).until(lambda driver: driver.execute_script(script))


def ready(browser):
    wait(browser, "return document.body.dataset.ready === '1'")


def click(browser, selector):
    browser.execute_script("document.querySelector(arguments[0]).click()", selector)
    ready(browser)


def test_the_page_opens_without_errors_or_network(opened):
    entries = opened.execute_script(
        "return performance.getEntriesByType('resource').map(entry => entry.name)"
    )
    assert all(name.startswith("data:") for name in entries)
    title = opened.execute_script("return document.getElementById('title').textContent")
    assert title == HOSTILE
    assert opened.execute_script("return window.hit") is None
    assert len(opened.find_elements("css selector", "#map [role=gridcell]")) == 128


def test_a_click_shows_the_values_that_score_heads_gives(tiny, opened):
    scores = scoring.score_heads(tiny, EXAMPLES[:2], progress=False)
    for number, example in enumerate(EXAMPLES[:2]):
        opened.execute_script(
            "const select = document.getElementById('example'); select.value = arguments[0];"
            "document.body.dataset.ready = ''; select.dispatchEvent(new Event('change'))",
            number,
        )
        ready(opened)
        prompt = prompts.encode(tiny, example)
        weights = prompt.weights(prompt.evidence)
        for head in (scores.top(0.05).heads[0], scores.top(0.05).heads[-1], (0, 3)):
            index = head[0] * tiny.geometry.heads + head[1]
            click(opened, f"#map td[data-index='{index}']")
            cell = opened.find_element("css selector", f"#map td[data-index='{index}']")
            assert float(cell.get_attribute("data-value")) == pytest.approx(
                float(scores.values[(number, *head)]), abs=1e-6
            )
            for kind, expected in (
                ("raw", scores.quantities["raw"][(number, *head)]),
                ("calibrated", scores.values[(number, *head)]),
            ):
                click(opened, f"#{kind}")
                shown = np.array(opened.execute_script("return explorer.values()"))
                assert shown @ weights[: len(shown)] == pytest.approx(float(expected), abs=0.003)
                pieces = opened.execute_script(
                    "return [...document.querySelectorAll('.words span')].map(span =>"
                    " [Number(span.dataset.value), span.style.backgroundColor])"
                )
                tokens = [
                    token
                    for part, span in zip(example.context, prompt.parts, strict=True)
                    if isinstance(part, str)
                    for token in span.tokens
                ]
                np.testing.assert_allclose([value for value, _ in pieces], shown[tokens], atol=1e-9)
                assert all(colour.startswith("rgba") for _, colour in pieces)


def test_the_overlay_of_an_image_has_the_colour_of_each_tokens_attention(tiny, opened):
    index = explore_index(tiny, EXAMPLES[0])
    click(opened, f"#map td[data-index='{index}']")
    click(opened, "#raw")
    opened.find_element("id", "to-evidence").click()
    prompt = prompts.encode(tiny, EXAMPLES[0])
    (region,) = EXAMPLES[0].evidence
    wait(opened, f"return explorer.parts()[{region.part}].painted")
    values = np.array(opened.execute_script("return explorer.values()"))
    seen = np.concatenate([span.tokens for span in prompt.parts])
    strongest = values[seen].max()
    boxes, tokens = prompt.boxes[region.part], prompt.parts[region.part].tokens
    width, height = EXAMPLES[0].context[region.part].size
    alphas = []
    for box in boxes:
        x, y = (box[0] + box[2]) / 2 / width, (box[1] + box[3]) / 2 / height
        script = (
            "const canvas = explorer.parts()[arguments[0]].canvas;"
            "return canvas.getContext('2d').getImageData(Math.floor(arguments[1] * canvas.width),"
            " Math.floor(arguments[2] * canvas.height), 1, 1).data[3]"
        )
        alphas.append(opened.execute_script(script, region.part, x, y))
    np.testing.assert_allclose(alphas, 255 * 0.7 * values[tokens] / strongest, atol=1)
    assert max(alphas) > 50
    outline = opened.execute_script("return document.querySelector('.outline').style.width")
    left, _, right, _ = region.box or (0, 0, width, height)
    assert float(outline.removesuffix("%")) == pytest.approx(100 * (right - left) / width, abs=0.01)


def explore_index(vlm, example) -> int:
    """The number of the best head of an example in the page."""
    best = scoring.score_heads(vlm, [example], progress=False).top(count=1).heads[0]
    return best.layer * vlm.geometry.heads + best.head


def test_a_set_of_heads_and_one_question_token_are_shown(tiny, opened):
    opened.find_element("id", "top").click()
    ready(opened)
    click(opened, "#raw")
    click(opened, "#tokens input[value='1']")
    page = content(explorer.explore(tiny, EXAMPLES, progress=False))
    rows = len(page["examples"][0]["question"])
    tokens = page["examples"][0]["tokens"]
    expected = np.mean([attention(tokens[index], rows)[1] for index in page["top"]], axis=0)
    shown = opened.execute_script("return explorer.values()")
    np.testing.assert_allclose(shown, expected, atol=1e-7)
    selected = opened.find_elements("css selector", "#map [aria-selected=true]")
    assert len(selected) == len(page["top"])
    assert "Mean of 7 heads" in opened.find_element("id", "about").text


def test_the_map_works_by_keyboard(opened):
    from selenium.webdriver.common.keys import Keys

    active = opened.switch_to.active_element
    ids = []
    for _ in range(8):  # Tab reaches the example, the quantity, the mean, and one cell of the map.
        active.send_keys(Keys.TAB)
        active = opened.switch_to.active_element
        ids.append(active.get_attribute("id") or active.get_attribute("data-index"))
        if active.get_attribute("data-index"):
            break
    assert ids[:3] == ["example", "quantity", "mean"]
    click(opened, "#map td[data-index='0']")
    opened.execute_script("document.querySelector(\"#map td[data-index='0']\").focus()")
    for key, index in (
        (Keys.ARROW_RIGHT, 1),
        (Keys.ARROW_DOWN, 17),
        (Keys.ARROW_LEFT, 16),
        (Keys.ARROW_LEFT, 16),
        (Keys.ARROW_UP, 0),
        (Keys.ARROW_DOWN, 16),
        (Keys.END, 31),
    ):
        opened.switch_to.active_element.send_keys(key)
        assert opened.switch_to.active_element.get_attribute("data-index") == str(index)
    assert "layer 1, head 15" in opened.switch_to.active_element.get_attribute("aria-label")
    assert opened.execute_script("return explorer.state.heads") == [0]
    opened.switch_to.active_element.send_keys(Keys.ENTER)
    ready(opened)
    assert opened.execute_script("return explorer.state.heads") == [31]
    assert "L1H15 is layer 1, head 15, counted from 0" in opened.find_element("id", "about").text
    opened.switch_to.active_element.send_keys(Keys.ARROW_LEFT)
    opened.switch_to.active_element.send_keys(Keys.SPACE)
    ready(opened)
    assert opened.execute_script("return explorer.state.heads") == [31, 30]


@pytest.mark.parametrize("width", [1280, 390])
def test_a_screenshot_is_not_blank_and_nothing_overflows(opened, width):
    opened.resize(width)
    opened.refresh()
    ready(opened)
    assert opened.execute_script("return document.documentElement.scrollWidth") <= width
    picture = np.asarray(Image.open(io.BytesIO(opened.get_screenshot_as_png())).convert("RGB"))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
    assert picture.std() > 10


def test_the_page_works_in_the_frame_of_a_notebook(tiny, browser, tmp_path):
    page = explorer.explore(tiny, EXAMPLES[0], progress=False)
    path = tmp_path / "notebook.html"
    path.write_text(f"<!doctype html><meta charset=utf-8>{page._repr_html_()}", encoding="utf-8")
    browser.get(path.as_uri())
    browser.switch_to.frame(0)
    ready(browser)
    assert len(browser.find_elements("css selector", "#map [role=gridcell]")) == 128
    browser.switch_to.default_content()
    assert [entry for entry in browser.get_log("browser") if entry["source"] != "rendering"] == []
