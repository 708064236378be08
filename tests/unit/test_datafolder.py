"""The published data sets in one folder are read, as far as they are there, and models take them.

The folder holds stand-ins of them all: small records in the published layouts.
"""

import json
import shutil

import example_prompts
import fake_datasets
import numpy as np
import pytest
import random_models
from PIL import Image

from mmheads import metrics, prompts
from mmheads.examples import Region
from mmheads.models import load
from mmheads.scoring import score_heads
from mmheads.tasks import data_root, mm_niah, mmdocir, mmlongbench_docs
from mmheads.tasks.grids import DEPTHS, SPLITS, TASKS
from mmheads.tasks.needles import Needles

FAMILIES = ("qwen3_vl", "qwen2_5_vl", "gemma3", "internvl", "llava_onevision")
PROBES = {"refcocog": 5, "vidstg": 2, "mmdocir": 4, "mmlongdoc": 3, "slidevqa": 3}
READERS = {
    "haystacks": data_root.haystacks,
    "probes": data_root.probes,
    "documents": lambda data: data_root.document_questions(data, 8192),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return fake_datasets.write_data(tmp_path_factory.mktemp("standins") / "data")


@pytest.fixture
def some(data, tmp_path):
    """Copy some of the data sets into another folder."""

    def copy(*names):
        for name in names:
            shutil.copytree(data / name, tmp_path / name)
        return tmp_path

    return copy


def listed(found):
    return {name: list(examples) for name, examples in found.items()}


def counts(found):
    return {name: len(examples) for name, examples in found.items()}


def test_stand_ins_hold_every_data_set_and_are_small(data):
    assert {path.name for path in data.iterdir()} == set(data_root.FOLDERS.values())
    files = [path for path in data.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 10_000_000
    assert len(files) < 120


@pytest.mark.parametrize("task", TASKS)
def test_needles_of_every_length_depth_and_split_are_there(data, task):
    opened = data_root.haystacks(data)
    assert (opened.lengths, opened.depths) == (mm_niah.LENGTHS, DEPTHS)
    for length in opened.lengths:
        found = [opened.count(task, length, split) for split in SPLITS]
        assert found == [20, 20, 3]
    made = [opened.make(task, 131072, depth, split="test", haystack=2) for depth in opened.depths]
    assert len({example.fingerprint() for example in made}) == len(made)
    assert {example.question[0] for example in made} == {made[0].question[0]}
    places = [example.evidence[0].part for example in made]
    assert places == sorted(places)
    score = data_root.needle_metric(data)
    for example in made:
        (region,) = example.evidence
        part = example.context[region.part]
        if task == "text":
            sentence = part[slice(*region.chars)]
            assert sentence.endswith(f" is {example.answer}.")
        else:
            assert isinstance(part, Image.Image)
            assert region.box is None
        assert score(f"Answer: {example.answer}", example.answer) == 1
        assert score("", example.answer) == 0


def test_the_image_with_the_needle_shows_the_right_option(data):
    example = data_root.haystacks(data).make("image", 8192, 0.6, haystack=5)
    shown = np.asarray(example.context[example.evidence[0].part])[24:40, 20:36]
    same = [np.array_equal(shown, option) for option in example.question[1::2]]
    assert [letter for letter, is_it in zip("ABCD", same, strict=True) if is_it] == [example.answer]


def test_without_a_folder_needles_are_generated():
    assert data_root.haystacks() == Needles(image_ratio=0.5)
    assert data_root.needle_metric() is metrics.same


@pytest.mark.parametrize("task", TASKS)
def test_prompts_of_published_needles_ask_a_haystack_at_every_depth(data, task):
    opened = data_root.haystacks(data)
    asked = list(data_root.prompts(opened, task, 8192, 12))
    assert [example.depth for example in asked] == [*DEPTHS] * 2
    assert [example.haystack[-1] for example in asked] == [40] * 6 + [41] * 6
    if task == "identical_image":
        assert [example.answer for example in asked] == ["no", "yes"] * 3 + ["yes", "no"] * 3
        assert [example.evidence is None for example in asked] == [True, False] * 3 + [
            False,
            True,
        ] * 3
    with pytest.raises(
        ValueError, match="has 3 haystacks in the split test at depth 0: expected 0"
    ):
        list(data_root.prompts(opened, task, 8192, 19))


def test_every_probing_set_gives_examples_with_evidence(data):
    found = listed(data_root.probes(data))
    assert counts(found) == PROBES
    assert all(example.evidence for examples in found.values() for example in examples)
    first = {name: examples[0] for name, examples in found.items()}
    assert first["refcocog"].evidence == (Region(part=0, box=(0, 6, 24, 36)),)
    assert first["vidstg"].evidence == tuple(
        Region(part=0, frames=(at, at + 1), box=(8 * at, 8, 8 * at + 24, 32)) for at in (1, 2, 3)
    )
    assert [example.evidence[0].part for example in found["mmdocir"]] == [1, 3, 1, 3]
    assert len(first["mmdocir"].images()) == 4
    for subset in mmlongbench_docs.SUBSETS:
        for example in found[subset]:
            (region,) = example.evidence
            page = region.part // 2
            assert f"on page {page + 1}?" in example.question[0]
            assert example.length == 8192


def test_probes_are_limited_in_number_pages_and_frames(data):
    found = listed(data_root.probes(data, limit=2, pages=3, frames=2))
    assert counts(found) == dict.fromkeys(PROBES, 2)
    assert [len(example.images()) for example in found["mmdocir"]] == [3, 3]
    assert [len(example.videos()[0].frames) for example in found["vidstg"]] == [2, 2]


@pytest.mark.parametrize("length", fake_datasets.DOCUMENT_LENGTHS)
def test_document_questions_of_a_length(data, length):
    found = listed(data_root.document_questions(data, length))
    assert counts(found) == {"mmlongdoc": 4, "slidevqa": 4}
    kinds = {name: sorted(e.answer.split(":")[0] for e in asked) for name, asked in found.items()}
    assert kinds["mmlongdoc"] == ["Integer", "List", "None", "String"]
    assert kinds["slidevqa"] == ["Float", "Integer", "None", "String"]
    for example in (example for asked in found.values() for example in asked):
        kind, _, gold = example.answer.partition(": ")
        assert (example.evidence is None) == (kind == "None")
        assert (example.length, len(example.images())) == (length, 3)
        assert mmlongbench_docs.question_answer(gold, example.answer) == 1
    limited = listed(data_root.document_questions(data, length, limit=1))
    assert counts(limited) == {"mmlongdoc": 1, "slidevqa": 1}


def test_length_without_document_questions_has_none(data):
    assert data_root.document_questions(data, 16384) == {}


@pytest.mark.parametrize("missing", sorted({*data_root.FOLDERS.values()}))
def test_data_set_that_is_not_there_is_left_out(data, tmp_path, missing):
    for path in data.iterdir():
        if path.name != missing:
            (tmp_path / path.name).symlink_to(path)
    gone = {name for name, folder in data_root.FOLDERS.items() if folder == missing}
    gone |= set(mmlongbench_docs.SUBSETS) if missing == "MMLongBench" else set()
    assert set(data_root.probes(tmp_path, limit=1)) == set(PROBES) - gone
    asked = data_root.document_questions(tmp_path, 8192, limit=1)
    assert set(asked) == set(mmlongbench_docs.SUBSETS) - gone


def test_no_published_needles_are_an_error(some):
    with pytest.raises(ValueError, match="holds no folder MMLongBench; expected the published"):
        data_root.haystacks(some("MMDocIR"))


@pytest.mark.parametrize("reader", READERS)
def test_data_that_is_no_folder_is_one_error(data, reader):
    for wrong in (data / "nothing", data / "VidSTG" / "annotations" / "test_annotations.json"):
        with pytest.raises(ValueError, match=rf"data is '{wrong}'.*not a folder; expected one"):
            READERS[reader](wrong)


def test_needles_without_document_questions_and_the_other_way_round(some):
    folder = some("MMLongBench") / "MMLongBench" / "mmlb_data"
    (folder / "documentQA").rename(folder / "elsewhere")
    assert data_root.haystacks(folder.parents[1]).lengths == mm_niah.LENGTHS
    assert data_root.probes(folder.parents[1]) == {}
    assert data_root.document_questions(folder.parents[1], 8192) == {}
    (folder / "elsewhere").rename(folder / "documentQA")
    shutil.rmtree(folder / "NIAH")
    assert len(data_root.probes(folder.parents[1])) == 2
    with pytest.raises(ValueError, match=r"holds no file such as retrieval-text_test_K8_dep6"):
        data_root.haystacks(folder.parents[1])


def test_subsets_of_other_lengths_are_probed_at_their_own_shortest(some):
    folder = some("MMLongBench")
    (folder / "MMLongBench" / "mmlb_data" / "documentQA" / "mmlongdoc_K8.jsonl").unlink()
    found = data_root.probes(folder, limit=1)
    lengths = {name: example.length for name, (example,) in found.items()}
    assert lengths == {"mmlongdoc": 131072, "slidevqa": 8192}


def test_probes_go_on_past_questions_without_evidence(some):
    folder = some("MMLongBench")
    path = folder / "MMLongBench" / "mmlb_data" / "documentQA" / "mmlongdoc_K8.jsonl"
    answered, *_, unanswerable = path.read_text().splitlines(keepends=True)
    path.write_text(unanswerable * mmlongbench_docs.QUESTIONS + answered * 3)
    assert len(list(data_root.probes(folder, limit=3)["mmlongdoc"])) == 3


def test_documents_of_which_none_can_be_read_are_an_error(some):
    folder = some("MMDocIR")
    path = folder / "MMDocIR" / mmdocir.ANNOTATIONS
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for wrong in lines:
        wrong["page_indices"] = [0, 99]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:1]))
    with pytest.raises(ValueError, match=r"no document that can be read: .* line 1: report.pdf"):
        listed(data_root.probes(folder))
    right = lines[1] | {"page_indices": [4, 7]}
    path.write_text("".join(json.dumps(line) + "\n" for line in (lines[0], right)))
    with pytest.warns(UserWarning, match=r"1 of 2 documents in .* left out; the first: .* line 1"):
        kept = listed(data_root.probes(folder))
    assert len(kept["mmdocir"]) == 2
    path.write_text("")
    with pytest.raises(ValueError, match="it has no line of annotations"):
        listed(data_root.probes(folder))


@pytest.fixture(scope="module", params=FAMILIES)
def vlm(request):
    return example_prompts.vlm(request.param)


def test_every_family_finds_the_evidence_of_every_set(vlm, data):
    opened, found = data_root.haystacks(data), listed(data_root.probes(data, limit=1))
    asked = {task: opened.make(task, 8192, 0.4) for task in TASKS}
    asked |= {name: found[name][0] for name in ("refcocog", "mmdocir", "mmlongdoc")}
    for name, example in asked.items():
        prompt = prompts.encode(vlm, example)
        (span,) = prompt.evidence
        (region,) = example.evidence
        assert 0 < len(span) < len(prompt)
        assert set(span.tokens) <= set(prompt.parts[region.part].tokens)
        assert span.tokens.max() < prompt.question.min()
        if name == "text":
            said = vlm.tokenizer.decode(prompt.ids[span.tokens]).strip()
            assert said == example.context[region.part][slice(*region.chars)]
        else:
            assert vlm.is_visual(prompt.ids[span.tokens]).all()
            whole = len(prompt.parts[region.part])
            assert (len(span) < whole) if region.box else (len(span) == whole)


@pytest.mark.parametrize("null_images", ["pixels", "placeholders"])
def test_every_family_scores_needles_with_images_in_the_question(vlm, data, null_images):
    opened = data_root.haystacks(data)
    asked = [opened.make(task, 8192, 0.4) for task in ("image", "identical_image")]
    scores = score_heads(vlm, asked, null_images=null_images, progress=False)
    for name in ("raw", "null", "shuffled"):
        mass = scores.quantities[name][:, vlm.geometry.eligible]
        assert (mass > 0).all()
        assert (mass < 1).all()
    assert (scores.quantities["raw"] != scores.quantities["null"]).any()


def test_every_family_takes_the_frames_of_videos_as_images(vlm, data):
    (video,) = data_root.probes(data, limit=1)["vidstg"]
    (images,) = data_root.probes(data, limit=1, video=False)["vidstg"]
    assert images.images() == list(video.videos()[0].frames)
    assert [(region.part, region.box) for region in images.evidence] == [
        (region.frames[0], region.box) for region in video.evidence
    ]
    prompt = prompts.encode(vlm, images)
    for region, span in zip(images.evidence, prompt.evidence, strict=True):
        assert set(span.tokens) < set(prompt.parts[region.part].tokens)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_boxes_in_frames_of_videos_are_found(data, family):
    vlm = example_prompts.vlm(family)
    random_models.add_video(vlm.processor, family)
    for example in data_root.probes(data)["vidstg"]:
        spans = prompts.encode(vlm, example).evidence
        assert [len(span) for span in spans] == [9, 9, 9]  # 24 x 24 pixels, 8 x 8 a token
        assert {weight for span in spans for weight in span.weights} == {0.5}  # of two frames


def test_saved_models_encode_any_text(tmp_path):
    (path,) = fake_datasets.write_models(tmp_path, ["gemma3"])
    assert path.name == "tiny-random-gemma3"
    tokenizer = load(path, device="cpu").tokenizer
    text = "".join(chr(code) for code in range(32, 600)) + " \u4e2d \U0001f98a"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
