"""The tiny models: their parts, their training, and what the shipped ones can do."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from page_reader import cells
from PIL import Image
from transformers import AutoModelForImageTextToText

from mmheads import paths
from mmheads.models import load_processor
from mmheads.tasks import needles, pages
from mmheads.tasks.generated_needles import CONTROL, LENGTHS, OPTIONS, count_tokens
from mmheads.tasks.grids import DEPTHS, TASKS
from mmheads.tasks.line_pages import CODES, ICONS, NOUNS, UNIT_TOKENS, VALUES
from mmheads.tasks.needles import GENERATED, Needles
from mmheads.zoo import architectures, card, measure, samples, train
from mmheads.zoo.__main__ import main
from mmheads.zoo.recipes import RECIPES, Recipe, Source, Stage

ALL = (*TASKS, CONTROL)
SHIPPED = sorted(path.parent for path in paths.MODELS.glob("*/config.json"))
VISION = [p for p in SHIPPED if "vision_config" in json.loads((p / "config.json").read_text())]
IMAGE = architectures.VOCABULARY["<|image_pad|>"]


@pytest.fixture(scope="module")
def processor():
    return architectures.processor()


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def spoken(sample: samples.Sample) -> list[str]:
    names = {index: word for word, index in architectures.VOCABULARY.items()}
    return [names[token] for token in sample.ids]


def labelled(sample: samples.Sample, kind: str) -> list[tuple[int, str]]:
    """Position and expected word of each label of a kind."""
    names = {index: word for word, index in architectures.VOCABULARY.items()}
    which = samples.KINDS.index(kind)
    return [
        (i, names[label])
        for i, (label, k) in enumerate(zip(sample.labels, sample.kinds, strict=True))
        if k == which
    ]


# --- parts


def test_patches_are_those_of_the_stock_image_processor():
    rng = np.random.default_rng(0)
    unit = needles.fill([True], CODES, ICONS, rng)[0]
    stock = architectures.image_processor()
    for image in (pages.page(unit.records, rng), pages.option("red-disc", rng)):
        expected = stock(images=[Image.fromarray(image)], return_tensors="np")
        np.testing.assert_allclose(samples.patches(image), expected["pixel_values"], atol=1e-6)


@pytest.mark.parametrize("task", ALL)
@pytest.mark.parametrize("length", [128, 512])
def test_task_counts_tokens_as_the_stock_processor_does(processor, task, length):
    example = GENERATED.make(task, length, 0.6, haystack=4)
    encoded = measure.inputs(processor, example)
    ids = encoded["input_ids"][0].tolist()
    assert length <= len(ids) < length + UNIT_TOKENS
    assert len(ids) == 1 + count_tokens((*example.context, *example.question))
    covered = [token for first, last in example.tokens for token in range(first, last)]
    if task == "text":
        words = processor.tokenizer.convert_ids_to_tokens([ids[token] for token in covered])
        first, last = example.evidence[0].chars
        assert " ".join(words) == example.context[example.evidence[0].part][first:last]
    elif example.evidence:
        images = [i for i, part in enumerate(example.context) if not isinstance(part, str)]
        which = images.index(example.evidence[0].part)
        visual = np.flatnonzero(np.array(ids) == IMAGE).reshape(-1)[16 * which : 16 * which + 16]
        left, top, right, bottom = (edge // pages.CELL for edge in example.evidence[0].box)
        grid = visual.reshape(4, 4)[top:bottom, left:right]
        assert covered == grid.ravel().tolist()


def test_processor_survives_saving_without_torchvision(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    example = GENERATED.make("image", 128, 0.4)
    a, b = (measure.inputs(p, example) for p in (processor, load_processor(tmp_path)))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_text_part_keeps_its_words_apart_from_the_next(processor):
    example = Needles(0.0).make("text", 128, 0.4)
    text = processor.apply_chat_template(example.messages(), tokenize=False)
    assert text == "<bos>" + " ".join((*example.context, *example.question))


def test_evidence_mass_of_uniform_attention_is_a_share_of_the_tokens_seen(processor):
    model = architectures.qwen3_vl(2, heads=4, kv_heads=2, width=64).eval()
    model.set_attn_implementation("eager")
    for layer in model.model.language_model.layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
    example = GENERATED.make("image", 128, 0.4)
    length = measure.inputs(processor, example)["input_ids"].shape[1]
    rows = np.arange(length - count_tokens(example.question), length)
    with torch.no_grad():
        mass = measure.mass(model, processor, example)
    np.testing.assert_allclose(mass, np.full((2, 4), np.mean(4 / (rows + 1))), rtol=1e-5)


def test_growing_and_adapting_change_no_output():
    torch.manual_seed(0)
    small = architectures.qwen3(2, heads=4, kv_heads=2, width=64).eval()
    ids = torch.randint(8, 100, (2, 30))
    grown = architectures.grow(small, [0, 1]).eval()
    assert grown.config.num_hidden_layers == 4
    assert torch.equal(small(ids).logits, grown(ids).logits)
    wide = architectures.widen(grown).eval()
    assert wide.config.vocab_size == len(architectures.VOCABULARY) > grown.config.vocab_size
    assert torch.equal(wide(ids).logits[..., : grown.config.vocab_size], grown(ids).logits)
    stretched = architectures.stretch(wide, 5e6).eval()
    assert_same(weights_of(wide), weights_of(stretched))
    assert not torch.allclose(wide(ids).logits, stretched(ids).logits, atol=1e-5)
    vision = architectures.adapt(stretched).eval()
    torch.testing.assert_close(vision(ids).logits, stretched(ids).logits, rtol=0, atol=1e-6)


# --- samples


def test_recall_asks_for_what_was_said():
    sample = samples.recall(8, 64, 3, 2)(np.random.default_rng(0))
    words = spoken(sample)
    said = {words[i]: words[i + 1] for i in range(1, 25, 3)}
    asked = [*labelled(sample, "text"), *labelled(sample, "repeated")]
    assert len(asked) == 5
    assert len(labelled(sample, "text")) == 3
    for position, word in asked:
        assert words[position - 1] == "?"
        assert said[words[position]] == word == words[position + 1]


def test_visual_tokens_are_asked_for_what_they_show():
    rng = np.random.default_rng(0)
    sample = samples.look(0.0)(rng)
    words = [word for _, word in labelled(sample, "cell")]
    assert [i for i, _ in labelled(sample, "cell")] == list(range(2, 18))
    assert words == [cell or "blank" for cell in cells(sample.images[0])]
    for i, word in labelled(samples.look(1.0)(np.random.default_rng(0)), "bind"):
        row, column = divmod(i - 2, 4)
        corner = 8 * (row // 2) + 2 * (column // 2)
        assert word in (words[corner], words[corner + 5])


def test_questions_are_about_needles_that_stand_once():
    mix = {"text": 1, "rendered": 1, "image": 1, "identical": 1, "icon": 1, "successor": 0.2}
    seen = set()
    for seed in range(12):
        sample = samples.ask(6, (0.3, 0.7), 8, mix)(np.random.default_rng(seed))
        words, images = spoken(sample), [cells(image) for image in sample.images]
        start = 1 + 6 * UNIT_TOKENS
        assert set(words[:start]) & set(NOUNS)
        on_pages = [cell for image in images if len(image) == 16 for cell in image]
        values = {
            image[corner]: image[corner + 5]
            for image in images
            if len(image) == 16
            for corner in (0, 2, 8, 10)
        }
        options = iter([image[0] for image in images if len(image) == 1])
        at_option = {
            i: next(options)
            for i, word in enumerate(words)
            if i >= start and word == "<|image_pad|>"
        }
        for kind in ("text", "rendered", "icon", "option", "identical", "image", "successor"):
            for position, word in labelled(sample, kind):
                seen.add((kind, word if kind in ("option", "identical") else ""))
                said = words[position]
                match kind:
                    case "text":
                        assert words[:start].count(said) == 1
                        assert said not in on_pages
                        assert words[words.index(said) + 1] == word
                    case "rendered":
                        assert said not in words[:start]
                        assert on_pages.count(said) == 1
                        assert values[said] == word
                    case "icon":
                        icon = at_option[position - 1]
                        assert on_pages.count(icon) == 1
                        assert values[icon] == word
                    case "option":
                        expected = {"yes": 1, "no": 0}[word]
                        assert on_pages.count(at_option[position - 1]) == expected
                    case "identical":
                        expected = {"yes": 1, "no": 0}[word]
                        assert on_pages.count(at_option[position - 2]) == expected
                    case "image":
                        icons = [at_option[position - 15 + 4 * i] for i in range(4)]
                        assert [on_pages.count(i) for i in icons] == [
                            int(letter == word) for letter in OPTIONS
                        ]
                    case "successor":
                        after = VALUES.index(said)
                        assert word == VALUES[(after + 1) % 16]
    assert len(seen) == 9


def test_padding_changes_no_loss():
    torch.manual_seed(0)
    model = architectures.qwen3_vl(2, heads=4, kv_heads=2, width=64)
    draw = samples.ask(2, 1.0, 3, {"rendered": 1, "image": 1})
    drawn = [draw(np.random.default_rng(seed)) for seed in range(3)]
    together = [samples.batch(drawn, None)]
    apart = [samples.batch([sample], None) for sample in drawn]

    def losses(batches):
        found = []
        for inputs, labels, _ in batches:
            hidden = model.model(**inputs).last_hidden_state[labels != samples.NO_LABEL]
            found.append(model.lm_head(hidden))
        return torch.cat(found)

    torch.testing.assert_close(losses(together), losses(apart), rtol=0, atol=1e-5)


# --- training


@pytest.fixture
def recipes(monkeypatch):
    def stages(*names):
        first = Source(1, 4, samples.recall(2, 4, 2))
        more = Source(1, 2, samples.ask(2, 0.0, 3, {"text": 1}, prose=0.0))
        return tuple(
            Stage(
                name=n,
                sources=(first, more),
                steps=4,
                goals={"text": 0.9},
                grow=(0,) if n == "two" else (),
                widen=n == "two",
            )
            for n in names
        )

    monkeypatch.setitem(RECIPES, "nano", Recipe(layers=1, stages=stages("one", "two")))
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    monkeypatch.setattr(train, "SAVE_EVERY", 2)


def interrupt(monkeypatch, *at: int) -> None:
    """Stop training when the loss is computed for the n-th time."""
    loss, calls = train._loss, []

    def interrupted(*inputs):
        calls.append(1)
        if len(calls) in at:
            raise KeyboardInterrupt
        return loss(*inputs)

    monkeypatch.setattr(train, "_loss", interrupted)


def test_interrupted_training_ends_with_the_same_weights_and_log(recipes, tmp_path, monkeypatch):
    whole = train.train("nano", work=tmp_path / "whole")
    interrupt(monkeypatch, 4, 9)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train.train("nano", work=tmp_path / "parts")
    parts = train.train("nano", work=tmp_path / "parts")
    a, b = (measure.load(folder)[0] for folder in (whole, parts))
    assert a.config.num_hidden_layers == 2
    assert_same(weights_of(a), weights_of(b))
    logs = [pd.read_csv(f / "training.csv").drop(columns="seconds") for f in (whole, parts)]
    assert len(logs[0]) == 8
    pd.testing.assert_frame_equal(*logs)
    facts = json.loads((parts / "training.json").read_text())
    assert (facts["steps"], facts["seed"], facts["stages"]) == (8, 0, ["one", "two"])
    assert facts["missed"][0].startswith("one: text 0.")


def test_a_run_goes_on_only_as_what_it_was(recipes, tmp_path, monkeypatch):
    train.train("nano", work=tmp_path, stop_after="one")
    other = dataclasses.replace(RECIPES["nano"], seed=1)
    for name, recipe in (("nano", other), ("micro", RECIPES["nano"])):
        monkeypatch.setitem(RECIPES, name, recipe)
        with pytest.raises(ValueError, match=r"holds the run .*name another --work folder"):
            train.train(name, work=tmp_path)


def test_a_shipped_checkpoint_goes_on_as_the_run_itself_would(recipes, tmp_path, monkeypatch):
    one, two = RECIPES["nano"].stages
    more = (one, dataclasses.replace(one, name="more", restart=True))
    monkeypatch.setitem(RECIPES, "nano", Recipe(layers=1, stages=more))
    whole = train.train("nano", work=tmp_path / "whole")
    shipped = train.train("nano", work=tmp_path / "a", stop_after="one")
    on = train.train("nano", work=tmp_path / "b", shipped=shipped)
    assert_same(*(weights_of(measure.load(folder)[0]) for folder in (whole, on)))
    logs = [pd.read_csv(f / "training.csv").drop(columns="seconds") for f in (whole, on)]
    pd.testing.assert_frame_equal(*logs)
    facts = [json.loads((f / "training.json").read_text()) for f in (whole, on)]
    assert facts[0]["missed"] == facts[1]["missed"]
    assert facts[0]["stages"] == facts[1]["stages"] == ["one", "more"]
    monkeypatch.setitem(RECIPES, "nano", Recipe(layers=1, stages=(one, two)))
    with pytest.raises(ValueError, match=r"after the stages \['one'\]; expected nano, seed 0"):
        train.train("nano", work=tmp_path / "c", shipped=shipped)


def test_a_model_needs_the_one_it_starts_from(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "MODELS", tmp_path / "none")
    with pytest.raises(ValueError, match=r"python -m mmheads\.zoo train tiny-qwen3-m --out"):
        train.train("tiny-qwen3-vl-m", work=tmp_path / "work")


class Code:
    """Runs a command when it is unpickled."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_save_never_runs_code(recipes, tmp_path):
    (tmp_path / "work").mkdir()
    torch.save({"run": Code(tmp_path / "ran")}, tmp_path / "work" / "state.pt")
    with pytest.raises(ValueError, match=r"state.pt is damaged, or holds more than tensors"):
        train.train("nano", work=tmp_path / "work")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 cut"])
def test_a_damaged_save_is_named(recipes, tmp_path, content):
    (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"state.pt is damaged"):
        train.train("nano", work=tmp_path)


def test_a_save_of_something_else_is_named(recipes, tmp_path):
    torch.save({"weights": torch.ones(1)}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"state.pt does not hold a run"):
        train.train("nano", work=tmp_path)


@pytest.mark.parametrize("facts", [None, "[]", "cut", '{"name": "another"}'])
def test_only_models_that_were_trained_here_are_reported(tmp_path, monkeypatch, facts):
    monkeypatch.setattr(measure, "accuracy", None)  # measures nothing
    for name in ("config.json", "model.safetensors"):
        shutil.copy(SHIPPED[0] / name, tmp_path)
    (tmp_path / "README.md").write_text("a stranger's card")
    if facts is not None:
        (tmp_path / "training.json").write_text(facts)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"holds no model that .* has made"):
        card.write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (tmp_path / "README.md").read_text() == "a stranger's card"


def test_a_stage_ends_when_its_goals_are_reached():
    state = train.State(None, None, step=100)
    stage = Stage(name="", sources=(), goals={"text": 0.9, "image": 0.8})
    for means, done in (
        ({"text": 0.95}, False),
        ({"text": 0.95, "image": 0.79}, False),
        ({"text": 0.95, "image": 0.8}, True),
    ):
        assert train._reached(stage, dataclasses.replace(state, means=means)) == done
    early = dataclasses.replace(state, step=10, means={"text": 1.0, "image": 1.0})
    assert not train._reached(stage, early)
    decaying = Stage(name="", sources=(), steps=100, decay=True, warm_up=10)
    assert not train._reached(decaying, state), "without goals a stage takes all its steps"
    assert train._rate(decaying, 0) == pytest.approx(2e-4)
    assert train._rate(decaying, 50) == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "tiny-gpt"], "no model is named 'tiny-gpt'; there are tiny-qwen3-m"),
        (["train", "tiny-qwen3-m", "--stop-after", "x"], "no stage is named 'x'"),
        (["train", "tiny-qwen3-m", "--threads", "0"], "threads is 0"),
        (["train", "tiny-qwen3-m", "--shipped", "/nowhere"], "/nowhere holds no training.json"),
        (["report", "/nowhere"], "/nowhere holds no model"),
        (["report", "/nowhere", "--haystacks", "0"], "haystacks is 0"),
    ],
)
def test_bad_commands_are_answered_in_one_line(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["zoo", *arguments])
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    assert main() == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


# --- the shipped models


@pytest.fixture(scope="module", params=SHIPPED, ids=lambda path: path.name)
def shipped(request):
    return request.param, *measure.load(request.param)


def fresh(task: str, model, **settings) -> list:
    """20 examples that nothing else uses: another length, every depth."""
    source = Needles(measure.image_ratio(model))
    return [
        source.make(
            task,
            700,
            DEPTHS[number % len(DEPTHS)],
            haystack=number,
            split="test",
            **{name: values[number] for name, values in settings.items()},
        )
        for number in range(20)
    ]


def count_right(model, processor, examples) -> int:
    given = measure.answers(model, processor, examples)
    return sum(a == e.answer for a, e in zip(given, examples, strict=True))


def test_models_are_shipped():
    assert {path.name for path in SHIPPED} == RECIPES.keys()
    assert sum(f.stat().st_size for f in paths.MODELS.rglob("*") if f.is_file()) < 40e6


def test_shipped_model_answers_fresh_examples(shipped):
    _, model, processor = shipped
    for task in measure.tasks(model):
        assert count_right(model, processor, fresh(task, model)) >= 18, task


def test_answers_of_shipped_model_follow_the_needle(shipped):
    _, model, processor = shipped
    for task in set(measure.tasks(model)) - {CONTROL}:
        others = [
            next(c for c in e.choices[3 * i % len(e.choices) :] + e.choices if c != e.answer)
            for i, e in enumerate(fresh(task, model))
        ]
        changed = fresh(task, model, answer=others)
        assert [e.answer for e in changed] == others
        assert count_right(model, processor, changed) >= 18, task


def test_shipped_model_cannot_answer_without_the_needle(shipped):
    _, model, processor = shipped
    for task in set(measure.tasks(model)) - {CONTROL}:
        examples = fresh(task, model, needle=[False] * 20)
        right = count_right(model, processor, examples)
        if task == "identical_image":
            assert right >= 18, "the image is not there"
        else:
            chance = 1 / len(examples[0].choices)
            assert right <= scipy.stats.binom.isf(1e-3, 20, chance), task


SHORT = {
    "tiny-qwen3-m": ["text, needle present, 2048 tokens"],
    "tiny-qwen3-vl-m": [],
}
"""Where a model is known not to reach what it should; its card says so too."""


def test_accuracy_on_record_is_what_was_promised(shipped):
    folder, *_ = shipped
    table = pd.read_csv(folder / "accuracy.csv")
    assert set(table.length) == set(LENGTHS)
    found = card.shortfalls(table)
    assert [entry.rsplit(" (", 1)[0] for entry in found] == SHORT[folder.name]


def test_shortfalls_are_found():
    rows = [
        ("text", "present", 94, 1 / 16),
        ("identical_image", "present", 90, 1 / 2),
        ("rendered_text", "removed", 12, 1 / 16),
        ("image", "removed", 45, 1 / 4),
        ("identical_image", "removed", 89, 1 / 2),
    ]
    table = pd.DataFrame(rows, columns=["task", "needle", "right", "chance"])
    assert card.shortfalls(table.assign(length=128, n=100)) == [
        "text, needle present, 128 tokens (94%)",
        "image, needle removed, 128 tokens (45%)",
        "identical_image, needle removed, 128 tokens (89%)",
    ]


@pytest.mark.parametrize("folder", VISION, ids=lambda path: path.name)
def test_shipped_vision_model_generates_with_the_stock_class(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = load_processor(folder)
    example = GENERATED.make("rendered_text", 128, 0.4, split="test")
    encoded = measure.inputs(processor, example)
    new = model.generate(**encoded, max_new_tokens=4, do_sample=False)
    answer = new[0, encoded["input_ids"].shape[1] :]
    assert processor.tokenizer.decode(answer, skip_special_tokens=True) == example.answer


@pytest.mark.parametrize("folder", VISION, ids=lambda path: path.name)
def test_saved_processor_has_the_video_part_that_stock_loading_wants(folder):
    settings = json.loads((folder / "processor_config.json").read_text())
    assert settings["processor_class"] == "Qwen3VLProcessor"
    assert settings["video_processor"]["video_processor_type"] == "Qwen3VLVideoProcessor"
    assert settings["video_processor"]["patch_size"] == settings["image_processor"]["patch_size"]


def test_card_says_what_the_tables_beside_it_say(shipped):
    folder, *_ = shipped
    assert (folder / "README.md").read_text() == card.text(folder)
