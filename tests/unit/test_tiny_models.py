"""The tiny models: their samples, every stage of their recipes, resume, and their checkpoints."""

import dataclasses
import functools
import json
import shutil
from itertools import product

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
import transformers
from PIL import Image
from tiny_tokens import evidence_tokens

from mmheads import paths
from mmheads.examples import Example
from mmheads.families import TOKEN_TYPES
from mmheads.models import VLM, load
from mmheads.prompts import encode
from mmheads.tasks import line_pages
from mmheads.tasks.grids import DEPTHS, TASKS
from mmheads.tasks.needles import CONTROL, LENGTHS, Needles
from tiny_models import architectures, card, losses, measure, processors, samples, train, windows
from tiny_models.__main__ import main
from tiny_models.recipes import NOT_TRAINED, RECIPES, Recipe, Source, Stage

SHIPPED = [name for name in RECIPES if name not in NOT_TRAINED]
NAMES = {index: word for word, index in processors.VOCABULARY.items()}
MIX = dict.fromkeys((*TASKS, "icon", CONTROL, "nothing"), 1.0)
FAMILIES = ("qwen3_vl", "internvl", "llava_onevision", "gemma3")
IMAGE = processors.VOCABULARY["<|image_pad|>"]
STAGES = {
    id(stage): (name, index)
    for name, recipe in reversed(RECIPES.items())
    for index, stage in enumerate(recipe.stages)
}
"""A recipe's name and the index of each stage; several recipes go through the same one."""


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def some_samples(count: int = 3, units: int = 4, **settings) -> list[samples.Sample]:
    sampler = samples.ask(units, (0.3, 0.8), 8, MIX, **settings)
    return [sampler(np.random.default_rng((1, index))) for index in range(count)]


def answers(sample: samples.Sample) -> list[tuple[str, list[str], str]]:
    """Kind, words of the question, and answer of each question of a sample."""
    spoken = [NAMES[token] for token in sample.ids]
    asked = []
    ends = [index for index, kind in enumerate(sample.kinds) if kind >= 0]
    for index in ends:
        kind = samples.KINDS[sample.kinds[index]]
        if kind not in ("end", "option"):
            asked.append((kind, spoken[: index + 1], NAMES[sample.labels[index]]))
    return asked


# --- samples


@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_are_those_of_the_stock_image_processor(family):
    rng = np.random.default_rng(0)
    page = line_pages.draw(("B7", "K", ".", "blank") * 4, 4, rng)
    icon = line_pages.option("red-disc", rng)
    stock = processors.image_processor(family)
    pair = [Image.fromarray(page), Image.fromarray(icon)]
    expected = stock(images=[pair], return_tensors="np")["pixel_values"]
    drawn = np.concatenate([samples.pixels(image, family) for image in (page, icon)])
    np.testing.assert_allclose(drawn, expected, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_what_the_stock_processor_makes_of_the_same_prompt(family):
    page = line_pages.cells([line_pages.Record("B7", "K"), line_pages.Record("red-disc", "L")])
    sample = samples.Sample(family=family).say("rain", "falls", ".").show(page, 4)
    sample.say("?").show(("red-disc",)).say("?")
    rng = np.random.default_rng(0)
    batch = samples.batch([sample], rng, "pixels", family)
    images = [line_pages.draw(page, 4, rng), line_pages.draw(("red-disc",), 1, rng)]
    first, second = map(Image.fromarray, images)
    context = ("rain falls .", first)
    example = Example(context=context, question=("?", second, "?"), answer="L")
    processor = processors.processor(family)
    text = processor.apply_chat_template(example.messages(), tokenize=False)
    made = processor(text=[text], images=[[first, second]], return_tensors="pt")
    assert made["input_ids"].tolist() == batch.places.tolist()
    assert batch.pictures["pixel_values"].shape == made["pixel_values"].shape
    for name in batch.pictures.keys() - {"pixel_values"}:
        assert batch.pictures[name].tolist() == made[name].tolist(), name


def test_questions_are_answered_by_their_context():
    kinds = set()
    for sample in some_samples(20, icon_sentences=0.3):
        context = [NAMES[token] for token in sample.ids]
        context = context[
            : min(context.index(w) for w in ("?", "which", "seen", "after") if w in context)
        ]
        for kind, words, right in answers(sample):
            kinds.add(kind)
            if kind in ("text", "rendered_text"):
                key = words[-1]
                assert context.count(key) == 1
                assert context[context.index(key) + 1] == right
                before = context[: context.index(key)]
                on_page = before.count("<|vision_start|>") > before.count("<|vision_end|>")
                assert on_page == (kind == "rendered_text")
            elif kind == "icon":
                assert context.count(words[-2]) == 1
                assert context[context.index(words[-2]) + 1] == right
            elif kind == "identical_image":
                assert right == ("yes" if words[-3] in context else "no")
            elif kind == "image":
                options = words[-16::4]
                shown = {words[-2 - 4 * (3 - i)]: words[-4 - 4 * (3 - i)] for i in range(4)}
                assert len(options) == 4
                assert [letter for letter, icon in shown.items() if icon in context] == [right]
    assert kinds >= {*TASKS, "icon", CONTROL}


@pytest.mark.parametrize("family", FAMILIES)
def test_words_places_and_pixels_show_the_same_sample(family):
    drawn = some_samples(family=family)
    words, places, pixels = (
        samples.batch(drawn, np.random.default_rng(0), show, family)
        for show in ("words", "places", "pixels")
    )
    assert torch.equal(words.words, places.words)
    assert torch.equal(words.labels, pixels.labels)
    assert torch.equal(places.places, pixels.places)
    assert torch.equal(places.places == IMAGE, places.types == 1)
    assert torch.equal(places.places[places.types == 0], words.words[places.types == 0])
    if family == "qwen3_vl":
        patches = len(pixels.pictures["pixel_values"])
        assert patches == 4 * int(pixels.types.sum())
        assert patches == int(pixels.pictures["image_grid_thw"].prod(-1).sum())


@pytest.mark.parametrize("task", [*TASKS, CONTROL])
def test_the_stock_processor_counts_tokens_as_the_task_does(task):
    example = Needles().make(task, 128, 0.6, haystack=4)
    processor = processors.processor()
    text = processor.apply_chat_template(example.messages(), tokenize=False)
    given = {"images": [example.images()]} if example.images() else {}
    ids = processor(text=[text], return_tensors="pt", **given)["input_ids"][0].tolist()
    assert 128 <= len(ids) < 128 + line_pages.UNIT_TOKENS
    covered = [ids[token] for token in evidence_tokens(example)]
    if task == "text":
        assert processor.tokenizer.convert_ids_to_tokens(covered)[1] == example.answer
    elif task != CONTROL:
        assert covered == [IMAGE] * 4


# --- parts of the architectures


def small_one(family: str, layers: int) -> architectures.TextModel:
    """A small text model of a vision-language model's family, with random weights and norms."""
    torch.manual_seed(0)
    build = architectures.gemma3 if family == "gemma3" else architectures.qwen3
    model = build(layers, 4, 2, 32).eval()
    for weight in model.parameters():
        if weight.ndim == 1:
            torch.nn.init.normal_(weight, mean=weight[0].item(), std=0.2)
    return model


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_growing_changes_nothing_yet(family):
    small = small_one(family, 2)
    grown = architectures.grow(small, (0, 1)).eval()
    ids = torch.arange(20)[None]
    assert grown.config.num_hidden_layers == 4
    torch.testing.assert_close(grown(ids).logits, small(ids).logits)
    grown(ids).logits.square().mean().backward()
    learned = {
        int(name.split(".")[2])
        for name, weight in grown.named_parameters()
        if ".layers." in name and weight.grad is not None and weight.grad.any()
    }
    assert learned == {0, 1, 2, 3}


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_more_words_and_another_base_change_nothing_else(family):
    small = small_one(family, 4)
    ids = torch.arange(20)[None]
    widened = architectures.widen(small).eval()
    known = small(ids).logits
    torch.testing.assert_close(widened(ids).logits[..., : known.shape[-1]], known)
    same = architectures.stretch(small, 10_000.0, window=16).eval()
    torch.testing.assert_close(same(ids).logits, known)
    for rope_theta, window in ((5e6, 16), (10_000.0, 17)):
        other = architectures.stretch(small, rope_theta, window).eval()
        changed = not torch.allclose(other(ids).logits, known)
        assert changed == (family == "gemma3" or rope_theta > 10_000)


def test_the_layers_of_gemma_3_have_its_own_pattern():
    recipe = RECIPES["tiny-gemma3-text-m"]
    model = architectures.gemma3(recipe.layers, recipe.heads, recipe.kv_heads, recipe.width)
    for stage in recipe.stages:
        model = architectures.grow(model, stage.grow) if stage.grow else model
    stock = transformers.Gemma3TextConfig(num_hidden_layers=model.config.num_hidden_layers)
    assert model.config.layer_types == stock.layer_types


@pytest.mark.parametrize(("show", "window"), [("words", 16), ("places", 24), ("pixels", 24)])
def test_blocks_of_windows_are_the_stock_attention_with_its_gradients(show, window):
    """For texts, and where the tokens of an image see each other across the end of a window."""
    text = architectures.widen(architectures.stretch(small_one("gemma3", 4), 10_000.0, window))
    model = text if show == "words" else architectures.adapt(text, "gemma3")
    given = some_samples(2, units=8, family="gemma3")
    shown = samples.batch(given, np.random.default_rng(0), show, "gemma3")
    assert shown.words.shape[1] % window
    assert shown.words.shape[1] > 4 * window

    def once():
        model.zero_grad()
        loss, _ = losses.loss_and_accuracy(model, shown)
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in model.named_parameters()}

    stock, expected = once()
    windows.use(model)
    assert "blocks" in model.config.get_text_config()._attn_implementation
    loss, gradients = once()
    torch.testing.assert_close(loss, stock)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_icons_like_codes_changes_only_the_embeddings_of_icons():
    torch.manual_seed(0)
    model = architectures.widen(architectures.qwen3(1, 4, 2, 32))
    table = model.get_input_embeddings().weight
    codes = [processors.VOCABULARY[code] for code in line_pages.CODES]
    icons = [processors.VOCABULARY[icon] for icon in line_pages.ICONS]
    torch.nn.init.normal_(table[codes[0] : codes[-1] + 1].data, mean=1.0, std=2.0)
    before = weights_of(model)
    architectures.icons_like_codes(model)
    after = weights_of(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"model.embed_tokens.weight"}
    rows = (before["model.embed_tokens.weight"] != after["model.embed_tokens.weight"]).any(-1)
    assert rows.nonzero()[:, 0].tolist() == icons
    assert abs(table[icons].mean() - table[codes].mean()) < 0.3
    assert abs(table[icons].std() - table[codes].std()) < 0.5


def from_text(family: str):
    torch.manual_seed(0)
    build = architectures.gemma3 if family == "gemma3" else architectures.qwen3
    text = architectures.widen(build(2, 16, 4, 128)).eval()
    return text, architectures.adapt(text, family).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_vision_language_model_starts_as_its_text_model(family):
    text, model = from_text(family)
    batch = samples.batch(some_samples(1), np.random.default_rng(0))
    torch.testing.assert_close(model(input_ids=batch.words).logits, text(batch.words).logits)


def test_words_at_places_use_the_positions_of_the_drawn_page():
    """With a vision tower that gave the words' embeddings, pixels and places would agree."""
    _, model = from_text("qwen3_vl")
    drawn = samples.batch(some_samples(2), np.random.default_rng(0), "pixels")
    pictures = {"image_grid_thw": drawn.pictures["image_grid_thw"]}
    places = dataclasses.replace(drawn, pictures=pictures)
    embeddings = model.get_input_embeddings()(drawn.words)[drawn.places == IMAGE]
    visual = model.model.visual
    stock = visual.forward

    def spoken(*args, **kwargs):
        output = stock(*args, **kwargs)
        output.pooler_output = embeddings
        return output

    visual.forward = spoken
    with torch.no_grad():
        torch.testing.assert_close(
            losses.loss_and_accuracy(model, drawn)[0], losses.loss_and_accuracy(model, places)[0]
        )


@pytest.mark.parametrize(
    ("family", "tokens", "show"),
    [("internvl", 1, "words"), ("llava_onevision", 16, "words"), ("gemma3", 16, "places")],
)
def test_words_are_where_the_tokens_of_drawn_pages_are(family, tokens, show):
    """With a vision tower that gave the words' embeddings, pixels and words would agree."""
    _, model = from_text(family)
    drawn = some_samples(2, family=family)
    words, pixels = (
        samples.batch(drawn, np.random.default_rng(0), each, family) for each in (show, "pixels")
    )
    shown = words.words[pixels.places == IMAGE]
    shown = shown[shown != processors.VOCABULARY["<|vision_end|>"]]  # LLaVA-OneVision's own
    embeddings = model.get_input_embeddings()(shown)
    embeddings = embeddings.reshape(-1, tokens, embeddings.shape[-1])
    model.model.multi_modal_projector.forward = lambda _: embeddings
    with torch.no_grad():
        torch.testing.assert_close(
            losses.loss_and_accuracy(model, pixels), losses.loss_and_accuracy(model, words)
        )


# --- training


def short(recipe: Recipe, stage: Stage, steps: int = 4) -> Recipe:
    """A recipe with one stage like `stage`: few steps, one sample for each way to show pages."""
    by_show = {source.show: dataclasses.replace(source, batch=1) for source in stage.sources[::-1]}
    sources = tuple(by_show.values())
    small = dataclasses.replace(stage, sources=sources, steps=steps, warm_up=2, goals={})
    if stage.grow:
        small = dataclasses.replace(small, grow=(0,))
    return dataclasses.replace(recipe, layers=1, stages=(small,))


def small_text(monkeypatch, tmp_path, widened: bool) -> None:
    """Make models small, and give those that start from a text model one to start from."""
    monkeypatch.setattr(train, "CHECKPOINTS", tmp_path / "checkpoints")
    starts = {
        recipe.start: "gemma3" if recipe.family == "gemma3" else "qwen3"
        for recipe in RECIPES.values()
        if recipe.start
    }
    for name, family in starts.items():
        torch.manual_seed(0)
        model = architectures.widen(getattr(architectures, family)(1, 4, 2, 32))
        model.save_pretrained(tmp_path / "checkpoints" / name)
    for family in set(starts.values()):
        build = getattr(architectures, family)

        def small(layers: int, *_: int, build=build) -> architectures.TextModel:
            model = build(layers, 4, 2, 32)
            return architectures.widen(model) if widened else model

        monkeypatch.setattr(architectures, family, small)


@pytest.mark.parametrize(("name", "index"), [*STAGES.values()])
def test_every_stage_runs_and_a_resumed_run_is_the_same(name, index, monkeypatch, tmp_path):
    stage = RECIPES[name].stages[index]
    names = [s.name for s in RECIPES[name].stages]
    widened = any(s.widen for s in RECIPES[name].stages[:index])
    small_text(monkeypatch, tmp_path, widened)
    recipe = short(RECIPES[name], stage)
    monkeypatch.setitem(RECIPES, name, recipe)
    monkeypatch.setattr(train, "SAVE_EVERY", 2)
    whole = train.train(name, tmp_path / "whole", tmp_path / "work-a", threads=1)

    stopped = train.loss_and_accuracy
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return stopped(*args, **kwargs)

    monkeypatch.setattr(train, "loss_and_accuracy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.train(name, tmp_path / "parts", tmp_path / "work-b", threads=1)
    monkeypatch.setattr(train, "loss_and_accuracy", stopped)
    parts = train.train(name, tmp_path / "parts", tmp_path / "work-b", threads=1)
    states = [torch.load(tmp_path / f"work-{x}/state.pt", weights_only=True) for x in "ab"]
    assert_same(*(state["model"] for state in states))
    assert states[0]["means"] == states[1]["means"]
    assert states[0]["stage"] == 1
    facts = json.loads((parts / "training.json").read_text())
    assert facts["stages"] == [stage.name]
    assert facts["steps"] == 4
    assert stage.name in names
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["tiny-qwen3-vl-m", "tiny-llava-onevision-m", "tiny-gemma3-m"])
@pytest.mark.parametrize("index", [0, 1], ids=["language", "vision"])
def test_only_the_part_that_a_stage_trains_changes(name, index, monkeypatch, tmp_path):
    small_text(monkeypatch, tmp_path, widened=True)
    recipe = short(RECIPES[name], RECIPES[name].stages[index])
    monkeypatch.setitem(RECIPES, name, recipe)
    state = train._start(recipe)
    train._begin(state, recipe.stages[0], 0)
    before = weights_of(state.model)
    train._run_stage(state, name, tmp_path)
    changed = {n for n, w in state.model.state_dict().items() if not torch.equal(w, before[n])}
    assert recipe.stages[0].trains == ("language", "vision")[index]
    assert changed
    assert all(architectures.is_vision(weight) == bool(index) for weight in changed)
    parts = (
        ("language_model", "lm_head")
        if index == 0
        else ("visual", "vision_tower", "projector", "newline")
    )
    assert all(any(part in weight for part in parts) for weight in changed)


@pytest.mark.parametrize("family", FAMILIES)
def test_alignment_moves_the_vision_tower_towards_the_words(family):
    model = architectures.adapt(architectures.widen(small_one(family, 2)), family)
    sampler = samples.look(4, 8, family)
    rng = np.random.default_rng(0)
    batch = samples.batch([sampler(rng)], rng, "pixels", family)
    tower = [w for name, w in model.named_parameters() if architectures.is_vision(name)]
    optimizer = torch.optim.AdamW(tower, lr=3e-3)
    measured = []
    for _ in range(30):
        loss, right = losses.loss_and_accuracy(model, batch, align=True)
        measured.append((loss.item(), right["cell"]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert measured[-1][0] < 0.7 * measured[0][0]
    assert measured[-1][1] > measured[0][1]
    words = samples.batch([sampler(rng)], rng, "words")
    with pytest.raises(ValueError, match="not drawn"):
        losses.loss_and_accuracy(model, words, align=True)


def test_a_save_that_runs_code_is_refused(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (print, ("code of a stranger ran",))

    torch.save({"run": Harmful()}, tmp_path / "state.pt")
    with pytest.raises(Exception, match=r"[Ww]eights.only|Unsupported"):
        train.train("tiny-qwen3-m", tmp_path / "out", tmp_path)


def test_a_run_of_another_model_is_refused(tmp_path, monkeypatch):
    small_text(monkeypatch, tmp_path, widened=False)
    recipe = RECIPES["tiny-qwen3-m"]
    monkeypatch.setitem(RECIPES, "tiny-qwen3-m", short(recipe, recipe.stages[0], 2))
    train.train("tiny-qwen3-m", tmp_path / "out", tmp_path / "work", threads=1)
    monkeypatch.setitem(RECIPES, "other", RECIPES["tiny-qwen3-m"])
    with pytest.raises(ValueError, match="name another folder with --work"):
        train.train("other", tmp_path / "out2", tmp_path / "work", threads=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny-x"], "no model is named 'tiny-x'"),
        (["tiny-qwen3-m", "--threads", "0"], "threads is 0"),
        (["tiny-qwen3-m", "--stop-after", "now"], "no stage is named 'now'"),
        (["tiny-qwen3-m", "--go-on-from", "nowhere"], "holds no training.json"),
    ],
)
def test_bad_settings_are_reported_in_one_line(arguments, message, tmp_path, capsys):
    assert main(["train", *arguments, "--work", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_checkpoint_that_the_next_stage_cannot_go_on_from_is_refused(tmp_path):
    facts = {"name": "tiny-qwen3-m", "seed": 0, "stages": ["4 of 8 codes"]}
    (tmp_path / "training.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="before a stage that restarts"):
        train.train("tiny-qwen3-m", tmp_path / "out", tmp_path / "work", go_on_from=tmp_path)


def test_stages_have_unique_names_and_sources():
    for recipe in RECIPES.values():
        names = [stage.name for stage in recipe.stages]
        assert len(set(names)) == len(names)
        assert all(isinstance(s, Source) for stage in recipe.stages for s in stage.sources)


# --- cards


def test_a_card_reports_what_was_measured(monkeypatch, tmp_path):
    small_text(monkeypatch, tmp_path, widened=True)
    recipe = RECIPES["tiny-qwen3-vl-m"]
    monkeypatch.setitem(RECIPES, "tiny-qwen3-vl-m", short(recipe, recipe.stages[-1], 2))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    few = functools.partial(measure.ablation, random_sets=3, selections=2)
    monkeypatch.setattr(measure, "ablation", few)
    folder = train.train("tiny-qwen3-vl-m", tmp_path / "model", tmp_path / "work", threads=1)
    path = card.report(folder, "", folder, haystacks=2, threads=1, lengths=(128,), length=128)
    accuracy, structure, ablation = (pd.read_csv(folder / f"{name}.csv") for name in card.TABLES)
    conditions = accuracy.groupby(["task", "needle"]).n.sum()
    assert conditions["text", "present"] == conditions["image", "removed"] == 12
    assert ("identical_image", "changed") not in conditions
    assert accuracy.right.le(accuracy.n).all()
    rows = structure.measure.value_counts().to_dict()
    assert rows == {"overlap": 12, "halves": 8, "seeds": 8, "spearman": 6, "rho": 4}
    assert structure.value[structure.measure == "seeds"].eq(1).all(), "the model is its own twin"
    assert structure.value[structure.measure == "overlap"].between(0, 1).all()
    counts = ablation.groupby("ablation").size() / (4 * 2)
    assert counts.to_dict() == {"full model": 1, "top": 1, "bootstrap": 2, "random": 3}
    assert set(ablation.n[ablation.task == "identical_image"]) == {24}
    text = path.read_text()
    assert "**It is missed here**" in text
    assert "does not replicate" in text
    assert '"seeds" compares with' in " ".join(text.split())


def test_random_sets_take_sliding_heads_where_too_few_global_ones_are_left(tmp_path):
    vlm = load("tiny-gemma3-text-m", dtype=torch.float32)
    by_task = measure.scores(vlm, 128, haystacks=2)
    assert by_task["text"].eligible.sum() == 24
    settings = {"haystacks": 1, "random_sets": 2, "selections": 1, "folder": tmp_path}
    with pytest.warns(UserWarning, match="of 15 control heads do not match by layer"):
        table = measure.ablation(vlm, by_task, length=128, **settings)
    assert table.groupby("fraction")["heads"].first().tolist() == [8, 15]
    assert (table.ablation == "random").sum() == 4


def test_a_folder_that_this_code_did_not_train_is_left_alone(tmp_path):
    strange = tmp_path / "strange"
    shutil.copytree(train.CHECKPOINTS / "tiny-qwen3-m", strange)
    (strange / "training.json").write_text('{"name": "another"}')
    before = {path.name: path.read_bytes() for path in strange.iterdir()}
    with pytest.raises(ValueError, match="did not make"):
        card.report(strange)
    with pytest.raises(ValueError, match="did not make"):
        train.train("tiny-qwen3-m", strange, tmp_path)
    assert {path.name: path.read_bytes() for path in strange.iterdir()} == before
    with pytest.raises(ValueError, match="did not make, or none"):
        card.report(tmp_path)


def test_shortfalls_name_what_misses_its_aim():
    row = {"length": 128, "n": 100, "chance": 0.25}
    table = pd.DataFrame(
        [
            {"task": "image", "needle": "present", "right": 94, **row},
            {"task": "text", "needle": "present", "right": 95, **row},
            {"task": "identical_image", "needle": "removed", "right": 89, **row},
            {"task": "image", "needle": "removed", "right": 60, **row},
            {"task": "text", "needle": "removed", "right": 25, **row},
        ]
    )
    assert card.shortfalls(table) == [
        "image, needle present, 128 tokens (94%)",
        "identical_image, needle removed, 128 tokens (89%)",
        "image, needle removed, 128 tokens (60%)",
    ]


# --- the shipped models


@pytest.fixture(scope="module", params=SHIPPED)
def shipped(request):
    """A shipped model, and its folder."""
    return train.CHECKPOINTS / request.param, load(request.param, dtype=torch.float32)


def unseen(vlm: VLM, task: str, needle: str) -> list[Example]:
    """12 examples that nothing else uses: another length, every depth."""
    return [
        measure._example(measure.needles(vlm), task, needle, 300, DEPTHS[number % 6], number)
        for number in range(12)
    ]


def count_right(vlm: VLM, examples: list[Example]) -> int:
    given = measure.answers(vlm, examples)
    return sum(a == e.answer for a, e in zip(given, examples, strict=True))


def test_every_recipe_has_its_model_whose_stages_are_done():
    trained = {path.parent.name for path in paths.MODELS.glob("*/config.json")}
    assert trained == set(RECIPES) - set(NOT_TRAINED)
    for name in trained:
        recipe = RECIPES[name]
        facts = train.training_facts(train.CHECKPOINTS / name)
        assert facts["stages"] == [stage.name for stage in recipe.stages]
        with pytest.raises(ValueError, match="before a stage that restarts"):
            train._from_checkpoint(name, train.CHECKPOINTS / name)


def test_a_shipped_model_answers_from_the_needle(shipped):
    _, vlm = shipped
    for task in measure.tasks(vlm):
        present = unseen(vlm, task, "present")
        assert count_right(vlm, present) >= 10, task
        if task == "identical_image":
            assert count_right(vlm, unseen(vlm, task, "removed")) >= 10
            continue
        chance = 1 / len(present[0].choices)
        removed = count_right(vlm, unseen(vlm, task, "removed"))
        assert removed <= scipy.stats.binom.isf(1e-3, 12, chance), task
        changed = unseen(vlm, task, "changed")
        assert all(a.answer != b.answer for a, b in zip(present, changed, strict=True))
        assert count_right(vlm, changed) >= 10, task


MISSED: dict[str, list[str]] = {
    "tiny-gemma3-m": ["image, needle present, 256 tokens"],
    "tiny-gemma3-text-m": [],
    "tiny-qwen3-m": [
        "text, needle present, 1024 tokens",
        "text, needle present, 2048 tokens",
        "text, needle changed, 512 tokens",
        "text, needle changed, 1024 tokens",
        "text, needle changed, 2048 tokens",
    ],
    "tiny-internvl-m": [
        *(f"text, needle present, {length} tokens" for length in (1024, 2048)),
        *(f"text, needle changed, {length} tokens" for length in (1024, 2048)),
        *(f"rendered_text, needle present, {length} tokens" for length in (1024, 2048)),
        "rendered_text, needle changed, 2048 tokens",
    ],
    "tiny-llava-onevision-m": [
        "text, needle present, 2048 tokens",
        *(f"text, needle changed, {length} tokens" for length in (128, 512, 2048)),
        *(f"rendered_text, needle present, {length} tokens" for length in (1024, 2048)),
        *(f"rendered_text, needle changed, {length} tokens" for length in (1024, 2048)),
    ],
    "tiny-qwen3-vl-m": [
        *(f"text, needle present, {length} tokens" for length in (512, 1024, 2048)),
        *(f"text, needle changed, {length} tokens" for length in (512, 1024, 2048)),
        "rendered_text, needle present, 2048 tokens",
        "rendered_text, needle changed, 2048 tokens",
    ],
    "tiny-qwen3-vl-m-seed1": [
        "text, needle present, 2048 tokens",
        "text, needle changed, 512 tokens",
        "text, needle changed, 1024 tokens",
        "rendered_text, needle present, 1024 tokens",
        "rendered_text, needle present, 2048 tokens",
        "rendered_text, needle changed, 1024 tokens",
        "rendered_text, needle changed, 2048 tokens",
    ],
    "tiny-qwen3-vl-m-seed2": [
        "text, needle present, 1024 tokens",
        "text, needle present, 2048 tokens",
        "text, needle changed, 512 tokens",
        "text, needle changed, 1024 tokens",
        "text, needle changed, 2048 tokens",
        "rendered_text, needle present, 1024 tokens",
        "rendered_text, needle present, 2048 tokens",
        "rendered_text, needle changed, 2048 tokens",
    ],
}
"""Where a model does not reach its aim; its card says so too."""


def test_accuracy_on_record_is_what_is_promised(shipped):
    folder, _ = shipped
    table = pd.read_csv(folder / "accuracy.csv")
    assert set(table.length) == set(LENGTHS)
    assert table[table.needle == "present"].groupby(["task", "length"]).n.sum().eq(120).all()
    assert [row.rsplit(" (", 1)[0] for row in card.shortfalls(table)] == MISSED[folder.name]


def test_a_card_says_what_the_tables_beside_it_say(shipped):
    folder, _ = shipped
    facts = train.training_facts(folder)
    assert (folder / "README.md").read_text(encoding="utf-8") == card.text(folder, facts)


def test_no_configuration_names_the_place_where_the_model_was_trained(shipped):
    folder, _ = shipped
    for path in folder.glob("*.json"):
        assert "_name_or_path" not in path.read_text(encoding="utf-8"), path


def test_a_shipped_model_generates_with_the_stock_class(shipped):
    folder, vlm = shipped
    config = json.loads((folder / "config.json").read_text())
    model = getattr(transformers, config["architectures"][0]).from_pretrained(folder)
    task = "text" if vlm.is_text_only else "rendered_text"
    example = measure.needles(vlm).make(task, 128, 0.4, split="test")
    inputs = encode(vlm, example).inputs
    new = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    answer = new[0, inputs["input_ids"].shape[1] :]
    assert vlm.tokenizer.decode(answer, skip_special_tokens=True) == example.answer


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("tiny-qwen3-vl-m", "Qwen3VL"),
        ("tiny-internvl-m", "InternVL"),
        ("tiny-llava-onevision-m", "LlavaOnevision"),
    ],
)
def test_a_saved_processor_has_the_video_part_that_stock_loading_wants(name, kind):
    path = train.CHECKPOINTS / name / "processor_config.json"
    settings = json.loads(path.read_text())
    assert settings["processor_class"] == f"{kind}Processor"
    assert settings["video_processor"]["video_processor_type"] == f"{kind}VideoProcessor"
    assert getattr(transformers, f"{kind}VideoProcessor")
    for setting in ("size", "image_mean"):
        assert settings["video_processor"][setting] == settings["image_processor"][setting]


@pytest.mark.parametrize("name", [name for name in SHIPPED if RECIPES[name].start])
def test_the_evidence_is_where_the_vision_tower_sees_the_needle(name):
    """What the tower gives for the tokens of the evidence is nearest to the needle's words."""
    vlm = load(name, dtype=torch.float32)
    table = vlm.model.get_input_embeddings()
    with torch.no_grad():
        embeddings = table(torch.arange(table.num_embeddings))  # Gemma 3 scales its weights
    for task, depth in product(("rendered_text", "image"), DEPTHS[1::2]):
        example = measure.needles(vlm).make(task, 256, depth, split="test")
        prompt = encode(vlm, example)
        (span,) = prompt.evidence
        inputs = {k: v for k, v in prompt.inputs.items() if k not in ("input_ids", *TOKEN_TYPES)}
        inputs.pop("attention_mask")
        with torch.no_grad():
            given = vlm.model.get_image_features(**inputs).pooler_output
        features = torch.cat([part.flatten(0, -2) for part in given])
        nearest = torch.full_like(prompt.ids, -1)
        nearest[prompt.ids == IMAGE] = torch.cdist(features, embeddings).argmin(-1)
        shown = [NAMES[nearest[token].item()] for token in span.tokens[span.weights == 1]]
        if task == "rendered_text":
            assert shown[:3] == [example.question[0].split()[1], example.answer, "."]
        assert shown[0] in (line_pages.CODES if task == "rendered_text" else line_pages.ICONS)
        assert len(shown) == 4
        assert shown[3] == "blank"
        extra = span.weights[span.weights < 1]
        assert extra.tolist() == ([0.25] if vlm.family == "internvl" else [])  # its thumbnail
