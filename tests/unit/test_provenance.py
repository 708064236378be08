"""What results depend on: every change of weights, template, tokenizer or code is told."""

import dataclasses
import os
import warnings

import example_prompts
import numpy as np
import pytest
import torch
from PIL import Image

from mmheads import provenance
from mmheads.attention import check_heads
from mmheads.checks import parse
from mmheads.examples import Example, Region, Video
from mmheads.heads import Head, HeadSet, Origin
from mmheads.provenance import Provenance, code_version, file_sha256, folder_revision
from mmheads.scores import HeadScores


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMHEADS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def vlm():
    return example_prompts.vlm("qwen3")


def model_folder(path):
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(bytes(4 << 20))
    return path


def test_the_revision_of_a_folder_covers_every_byte_of_its_weights(tmp_path):
    folder = model_folder(tmp_path / "model")
    before = folder_revision(folder)
    assert folder_revision(folder) == before
    weights = bytearray(4 << 20)
    weights[2 << 20] = 1  # in the middle
    (folder / "model.safetensors").write_bytes(weights)
    assert folder_revision(folder) != before
    (folder / "model.safetensors").write_bytes(bytes(4 << 20))
    assert folder_revision(folder) == before
    (folder / "config.json").write_text('{"a": 1}')
    assert folder_revision(folder) != before


def test_a_file_is_hashed_once_until_it_changes(tmp_path, cache, monkeypatch):
    path = tmp_path / "weights.bin"
    path.write_bytes(b"one")
    first = file_sha256(path)
    assert (cache / "sha256.json").is_file()
    with monkeypatch.context() as patch:
        patch.setattr(provenance.hashlib, "file_digest", None)
        assert file_sha256(path) == first
    stamp = path.stat().st_mtime_ns
    path.write_bytes(b"two")
    os.utime(path, ns=(stamp, stamp + 1))
    assert file_sha256(path) != first
    for damaged in ("{", "[]", '{"a": 1}'):
        (cache / "sha256.json").write_text(damaged)
        assert len(file_sha256(path)) == 64


def test_a_cache_that_cannot_be_written_does_not_matter(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MMHEADS_CACHE", str(tmp_path / "file" / "cache"))
    assert len(file_sha256(tmp_path / "file")) == 64


def test_code_version_moves_with_the_code_and_not_with_its_comments(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "_PACKAGE", tmp_path)
    (tmp_path / "attention").mkdir()
    places = (tmp_path / "prefix.py", tmp_path / "attention" / "hook.py")
    for place in places:
        place.write_text("a = 1\n")

    def version() -> str:
        code_version.cache_clear()
        return code_version(("prefix", "attention", "not_there"))

    before = version()
    places[0].write_text("a  =  1  # a comment\n")
    assert version() == before
    for place in places:
        place.write_text("a = 2\n")
        assert version() != before
        place.write_text("a = 1\n")
    code_version.cache_clear()


@pytest.mark.parametrize(
    "edit",
    [
        lambda model: model.lm_head.weight.data.mul_(-1),
        lambda model: model.model.layers[2].self_attn.q_proj.weight.data.add_(1e-3),
        lambda model: model.model.layers[2].self_attn.o_proj.weight.data[3].zero_(),
        lambda model: model.model.layers[2].self_attn.o_proj.weight.data[:, 5].zero_(),
        lambda model: model.register_parameter("adapter", torch.nn.Parameter(torch.zeros(2))),
    ],
)
def test_weights_that_were_changed_in_memory_have_another_revision(vlm, edit):
    shipped = dataclasses.replace(vlm, revision="abc")
    assert shipped.provenance("test").revision == "abc"
    before = vlm.provenance("test").revision
    assert before.startswith("in memory ")
    edit(vlm.model)
    assert shipped.provenance("test").revision.startswith("abc changed to ")
    assert dataclasses.replace(shipped, model_id="b").weights.startswith("abc changed to ")
    assert vlm.provenance("test").revision != before


def test_large_parameters_are_sampled_in_every_row_and_column():
    model = torch.nn.Linear(2048, 2048, bias=False)
    before = provenance.parameter_hash(model)
    for index in (0, 777, 2047):
        for line in (model.weight.data[index], model.weight.data[:, index]):
            kept = line.clone()
            line.zero_()
            assert provenance.parameter_hash(model) != before
            line.copy_(kept)
    assert provenance.parameter_hash(model) == before


def test_template_tokenizer_and_generation_are_told_apart(vlm):
    first = vlm.provenance("test")
    generation = vlm.generation_hash()
    vlm.model.generation_config.eos_token_id = 3
    assert vlm.generation_hash() != generation
    vlm.processor.chat_template += " "
    vlm.tokenizer.add_tokens(["newword"])
    second = dataclasses.replace(vlm).provenance("test")
    assert first.differences(second).count("now") == 2
    assert "template" in first.differences(second)
    assert "tokenizer" in first.differences(second)
    assert dataclasses.replace(vlm).tokenizer_hash == second.tokenizer
    vlm.tokenizer(["a", "a b"], padding=True, truncation=True, max_length=2)
    assert dataclasses.replace(vlm).tokenizer_hash == second.tokenizer


def test_differences_name_the_entry_and_both_values():
    first = Provenance(model="a", settings={"dtype": "float32", "seed": 0}, code="x")
    second = Provenance(model="a", settings={"dtype": "bfloat16", "seed": 0}, code="y")
    text = "settings['dtype'] 'float32', now 'bfloat16'; code 'x', now 'y'"
    assert first.differences(second) == text
    assert first.differences(second, ignore=["settings", "code"]) == ""
    assert first.differences(dataclasses.replace(first, settings={})).count("now None") == 2
    assert first.key != second.key
    assert parse(Provenance, dataclasses.asdict(first)) == first


def used(vlm, revision: str) -> HeadSet:
    return HeadSet((Head(0, 1),), vlm.geometry, vlm.model_id, Origin(revision))


def test_heads_of_other_weights_are_used_with_one_warning_that_names_both(vlm):
    vlm = dataclasses.replace(vlm, revision="new")
    sets = [used(vlm, "old"), used(vlm, "old"), used(vlm, "new"), used(vlm, "")]
    with pytest.warns(UserWarning, match="are used with its weights") as caught:
        [check_heads(vlm, sets, "ablated") for _ in range(3)]
    (message,) = (str(warning.message) for warning in caught)
    assert "weights old of qwen3 are used with its weights new" in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_heads(vlm, sets[2:], "ablated")
        made = dataclasses.replace(vlm, revision="")
        check_heads(made, [used(made, made.weights)], "ablated")


def test_heads_of_a_model_of_another_name_are_used_with_one_note(vlm):
    vlm = dataclasses.replace(vlm, model_id="my-copy", revision="new")
    hub = dataclasses.replace(used(vlm, "old"), model="maker/Qwen3")
    with pytest.warns(UserWarning, match=r"scored in maker/Qwen3 are used in my-copy") as caught:
        [check_heads(vlm, [hub], "ablated") for _ in range(3)]
    assert len(caught) == 1
    copied = dataclasses.replace(vlm, model_id="Qwen3", revision="")
    geometry = dataclasses.replace(vlm.geometry, architecture="")
    with pytest.warns(UserWarning, match="if it is not a copy of that model"):
        check_heads(copied, [dataclasses.replace(hub, geometry=geometry)], "ablated")
    with pytest.raises(ValueError, match=r"heads of maker/Qwen3 .* cannot be ablated in my-copy"):
        check_heads(vlm, [dataclasses.replace(hub, geometry=geometry)], "ablated")


def test_selected_heads_carry_the_revision_of_their_scores(vlm):
    shape = (1, vlm.geometry.layers, vlm.geometry.heads)
    scores = HeadScores(
        np.zeros(shape), geometry=vlm.geometry, provenance=Provenance(revision="some")
    )
    assert scores.top(count=1).origin.revision == "some"


def picture(value: int = 0) -> Image.Image:
    return Image.fromarray(np.full((4, 6, 3), value, np.uint8))


BASE = Example(
    context=("one two", picture()),
    question=("? B7",),
    evidence=(Region(part=0, chars=(0, 3)),),
    instruction="In a word.",
)
FRAMES = Video(frames=(picture(), picture(1)), fps=1.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"question": ("? B7", "In a word."), "instruction": ""},
        {"question": ("? B7\0",)},
        {"question": ("?", " B7")},
        {"context": ("one", " two", picture())},
        {"context": ("one two",), "question": (picture(), "? B7")},
        {"context": ("one two", picture(1))},
        {"context": ("one two", picture().resize((4, 6)))},
        {"context": ("one two", FRAMES)},
        {"evidence": (Region(part=0),)},
        {"evidence": None},
        {"evidence": ()},
        {"instruction": ""},
    ],
)
def test_different_examples_have_different_fingerprints(changes):
    assert dataclasses.replace(BASE, **changes).fingerprint() != BASE.fingerprint()


def test_labels_are_no_part_of_a_fingerprint_and_frame_rates_are():
    labels = {"task": "text", "depth": 0.5, "haystack": (1, 2), "length": 128, "answer": "K"}
    assert dataclasses.replace(BASE, **labels).fingerprint() == BASE.fingerprint()
    video = dataclasses.replace(BASE, context=("one two", FRAMES))
    slower = dataclasses.replace(BASE, context=("one two", Video(frames=FRAMES.frames, fps=0.5)))
    assert slower.fingerprint() != video.fingerprint()
    palettes = [picture(value).convert("P", palette=Image.Palette.ADAPTIVE) for value in (1, 2)]
    prints = {dataclasses.replace(BASE, context=("one two", p)).fingerprint() for p in palettes}
    assert len(prints) == 2
