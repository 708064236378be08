"""The file of an index: the same scores when it is read again, and one error for anything else."""

import copy
import dataclasses
import json
import resource
import struct
import weakref

import example_prompts
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_index import QUESTION, candidates, some_heads

from mmheads.pdfs import PageBox
from mmheads.retrieval import DocumentIndex, saved


@pytest.fixture
def vlm():
    return dataclasses.replace(example_prompts.vlm("qwen3_vl"), revision="first weights")


@pytest.fixture
def path(vlm, tmp_path):
    path = tmp_path / "d.safetensors"
    index = DocumentIndex(vlm, some_heads(vlm), candidates("qwen3_vl"), window=2, overlap=1)
    index.save(path)
    return path


def rewritten(path, change, *, sign: bool) -> None:
    """Change the description and the tensors of a file; `sign` makes its checksum fit again."""
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["mmheads"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(about, tensors)
    if sign:
        about["checksum"] = saved._checksum(about, tensors)
    save_file(tensors, path, metadata={"mmheads": json.dumps(about)})


@pytest.mark.parametrize("keep", ["device", "cpu"])
def test_saved_and_loaded_the_scores_are_the_same(tmp_path, keep):
    vlm = example_prompts.vlm("qwen3_vl")
    index = DocumentIndex(vlm, some_heads(vlm), candidates("qwen3_vl"), window=2, keep=keep)
    index.save(tmp_path / "d.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["d.safetensors"]
    again = DocumentIndex.load(tmp_path / "d.safetensors", vlm, keep=keep)
    region = [PageBox(1, (0, 0, 20, 20), (40, 60))]
    for asked in (QUESTION, (QUESTION, example_prompts.picture(32, 32, 5))):
        for settings in ({}, {"null_images": "none"}, {"null": "x y"}, {"normalize": True}):
            for regions in (None, region):
                np.testing.assert_array_equal(
                    index.masses(asked, regions, **settings),
                    again.masses(asked, regions, **settings),
                )
    np.testing.assert_array_equal(again.rank(QUESTION).heat[0][1], index.rank(QUESTION).heat[0][1])
    assert (again.window, again.count, again.bytes) == (2, 3, index.bytes)
    again.save(tmp_path / "again.safetensors")
    first, second = (tmp_path / f"{name}.safetensors" for name in ("d", "again"))
    with safe_open(first, "pt") as one, safe_open(second, "pt") as other:
        assert json.loads(one.metadata()["mmheads"]) == json.loads(other.metadata()["mmheads"])


@pytest.mark.parametrize("family", ["gemma3", "smolvlm", "internvl", "qwen3_5"])
def test_families_with_masks_tiles_and_states_are_saved_too(family, tmp_path):
    vlm = example_prompts.vlm(family)
    index = DocumentIndex(vlm, some_heads(vlm), candidates(family), window=2, overlap=1)
    index.save(tmp_path / "10-K.2023")
    again = DocumentIndex.load(tmp_path / "10-K.2023", vlm)
    np.testing.assert_array_equal(index.masses(QUESTION), again.masses(QUESTION))
    assert (again.window, again.overlap) == (2, 1)


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "internvl", "qwen3_5"])
def test_on_disk_one_window_is_in_memory_at_a_time_and_scores_are_the_same(
    family, tmp_path, monkeypatch
):
    vlm = example_prompts.vlm(family)
    heads, given = some_heads(vlm), candidates(family)
    index = DocumentIndex(vlm, heads, given, window=1)
    folder, prefixes, most = tmp_path / "d", [], []
    read = saved._document

    def counted(*arguments):
        document = read(*arguments)
        prefixes.extend(weakref.ref(window.prefix.cache) for window in document.windows)
        most.append(sum(each() is not None for each in prefixes))
        return document

    monkeypatch.setattr(saved, "_document", counted)
    made = DocumentIndex(vlm, heads, given, window=1, keep="disk", path=folder)
    again = DocumentIndex.load(folder, vlm, keep="disk")
    picture = () if family in ("qwen3", "gemma3") else (example_prompts.picture(32, 32, 5),)
    for each in (made, again):
        for asked in ((QUESTION,), (QUESTION, *picture)):
            np.testing.assert_array_equal(index.masses(asked), each.masses(asked))
        np.testing.assert_array_equal(index.rank(QUESTION).scores, each.rank(QUESTION).scores)
        assert each.bytes == sum(w.null_attention.nbytes for w in index.document.windows)
        with pytest.raises(ValueError, match="this index is kept on disk"):
            each.save(tmp_path / "other")
    assert len(list(folder.iterdir())) == 3
    assert len(most) > 3 * 4
    assert max(most) <= 2, "a window is let go when the next one has been read"


def test_an_index_on_disk_goes_on_and_is_refused_if_it_is_not_whole(vlm, tmp_path):
    heads, given = some_heads(vlm), candidates("qwen3_vl")
    settings = {"window": 1, "keep": "disk", "path": tmp_path / "d"}
    index = DocumentIndex(vlm, heads, given, **settings)
    files = sorted((tmp_path / "d").iterdir())
    files[2].unlink()
    with pytest.raises(ValueError, match="holds only the first 2 of 3 candidates"):
        DocumentIndex.load(tmp_path / "d", vlm, keep="disk")
    before = [file.stat().st_mtime_ns for file in files[:2]]
    again = DocumentIndex(vlm, heads, given, **settings)
    np.testing.assert_array_equal(index.masses(QUESTION), again.masses(QUESTION))
    assert [file.stat().st_mtime_ns for file in files[:2]] == before
    files[1].unlink()
    with pytest.raises(ValueError, match=r"is not a whole index \(its windows do not cover"):
        DocumentIndex.load(tmp_path / "d", vlm, keep="disk")
    DocumentIndex(vlm, heads, given[:1], window=1).save(files[1])
    with pytest.raises(ValueError, match=r"is not a whole index \(its files are of several"):
        DocumentIndex.load(tmp_path / "d", vlm, keep="disk")
    files[0].write_bytes(b"no index")
    with pytest.raises(ValueError, match=r"0000\.safetensors is not a whole index"):
        DocumentIndex.load(tmp_path / "d", vlm, keep="disk")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no index"):
        DocumentIndex.load(tmp_path / "empty", vlm, keep="disk")


@pytest.mark.parametrize(
    ("keep", "name", "message"),
    [
        ("disk", "", "path is ''; expected a folder, in which to keep the index"),
        ("disk", "d.safetensors", "d.safetensors'; expected a folder, in which to keep the index"),
        ("cpu", ".", 'is not a file; keep="disk" keeps an index in a folder'),
    ],
)
def test_a_path_of_the_other_kind_is_refused(vlm, path, keep, name, message):
    given = path.parent / name if name else ""
    with pytest.raises(ValueError, match=message):
        DocumentIndex(vlm, some_heads(vlm), candidates("qwen3_vl"), keep=keep, path=given)
    with pytest.raises(ValueError, match=message):
        DocumentIndex.load(given, vlm, keep=keep)


def test_a_window_of_more_than_ten_images_is_read_again(vlm, tmp_path):
    pages = [example_prompts.picture(32, 32, number) for number in range(12)]
    index = DocumentIndex(vlm, some_heads(vlm), pages)
    index.save(tmp_path / "d")
    again = DocumentIndex.load(tmp_path / "d", vlm)
    np.testing.assert_array_equal(index.masses(QUESTION), again.masses(QUESTION))


def test_texts_instructions_and_limits_are_saved_too(tmp_path):
    vlm = example_prompts.vlm("qwen3")
    given = ["Straße 😀", "First the rain falls."]
    index = DocumentIndex(vlm, some_heads(vlm), given, instruction="In a word.", max_tokens=60)
    index.save(tmp_path / "d")
    again = DocumentIndex.load(tmp_path / "d", vlm)
    np.testing.assert_array_equal(index.masses(QUESTION), again.masses(QUESTION))
    for either in (index, again):
        with pytest.raises(ValueError, match=r"the prompt has \d+ tokens, qwen3 takes 60"):
            either.rank("rain " * 60)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"revision": "other weights"}, "revision 'first weights', now 'other weights'"),
        ({"model_id": "qwen3_vl_2"}, "model 'qwen3_vl', now 'qwen3_vl_2'"),
    ],
)
def test_an_index_of_another_model_or_of_other_weights_is_refused(vlm, path, changed, message):
    with pytest.raises(ValueError, match=f"d.safetensors was indexed differently: {message}"):
        DocumentIndex.load(path, dataclasses.replace(vlm, **changed))


def test_an_index_of_another_version_or_template_is_refused(vlm, path, monkeypatch):
    monkeypatch.setattr(saved, "FORMAT", saved.FORMAT + 1)
    with pytest.raises(ValueError, match="indexed differently: settings"):
        DocumentIndex.load(path, vlm)
    monkeypatch.undo()
    processor = copy.deepcopy(vlm.processor)
    processor.chat_template += " "
    with pytest.raises(ValueError, match="indexed differently: template"):
        DocumentIndex.load(path, dataclasses.replace(vlm, processor=processor))


def window(**fields):
    return lambda about, tensors: about["windows"][0].update(fields)


def field(**fields):
    return lambda about, tensors: about.update(fields)


def without(name):
    return lambda about, tensors: about.pop(name)


def provenance(**fields):
    return lambda about, tensors: about["provenance"].update(fields)


def tensor(name, change):
    return lambda about, tensors: tensors.update({name: change(tensors[name]).contiguous()})


def spoiled(states, value=torch.nan):
    states = states.clone()
    states.view(-1)[3] = value
    return states


FORGED = {
    "no window": field(windows=[]),
    "windows are a text": field(windows="abc"),
    "windows are missing": without("windows"),
    "one window is missing": lambda about, tensors: about["windows"].pop(),
    "no provenance": without("provenance"),
    "provenance is a text": field(provenance="qwen3_vl"),
    "provenance has another field": provenance(host="there"),
    "no head": field(heads=[]),
    "heads are missing": without("heads"),
    "heads outside the model": field(heads=[[0, 99]]),
    "heads of deeper layers": field(heads=[[2, 0]]),
    "fewer heads": lambda about, tensors: about["heads"].pop(),
    "heads are words": field(heads=["L0H1"]),
    "no overlap": without("overlap"),
    "an overlap of 2": field(overlap=2),
    "a huge overlap": field(overlap=10**10),
    "an instruction that is a number": field(instruction=5),
    "another instruction": field(instruction="Answer."),
    "negative max_tokens": field(max_tokens=-1),
    "a huge first candidate": window(first=10**10),
    "a later first candidate": window(first=1),
    "a negative first candidate": window(first=-1),
    "no candidates": window(parts=[]),
    "candidates without parts": window(parts=[[], [0, 1, 2]]),
    "candidates in another order": window(parts=[[1, 0], [2]]),
    "a candidate beyond the context": window(parts=[[0], [1, 2, 9]]),
    "no sizes": window(sizes={}),
    "an empty image": window(sizes={"0": [0, 40], "1": [40, 60]}),
    "a size of one number": window(sizes={"0": [60], "1": [40, 60]}),
    "another text": window(context=[None, None, "Here."]),
    "a cut context": window(context=[None]),
    "no replacements": window(replacements=[]),
    "a context of no token": window(length=0),
    "a context of many tokens": window(length=10**10),
    "a shorter context": window(length=20),
    "masked is a word": window(masked="no"),
    "null attention that is not finite": tensor("0.null", spoiled),
    "null attention of other heads": tensor("0.null", lambda states: states[1:]),
    "keys that are not finite": tensor("1.keys.0", spoiled),
    "keys of fewer tokens": tensor("0.keys.0", lambda states: states[:, :, 1:]),
    "keys without the batch": tensor("0.values.0", lambda states: states[0]),
    "values of other groups": tensor("0.values.0", lambda states: states[:, :1]),
    "whole numbers as keys": tensor("0.keys.0", lambda states: states.long()),
    "no keys in a layer": lambda about, tensors: tensors.pop("0.keys.0"),
    "one layer more": lambda about, tensors: tensors.update({"0.keys.9": tensors["0.keys.0"] + 0}),
    "a tensor of no window": lambda about, tensors: tensors.update({"x": torch.zeros(1)}),
    "a tensor of a window behind": lambda about, tensors: tensors.update({"7.x": torch.zeros(1)}),
    "other tokens": tensor("0.inputs.input_ids", lambda ids: spoiled(ids, 7)),
    "places of fewer tokens": tensor("0.boxes.0", lambda boxes: boxes[1:]),
}


@pytest.mark.parametrize("sign", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("forged", FORGED)
def test_a_forged_file_is_refused_by_name(vlm, path, forged, sign):
    rewritten(path, FORGED[forged], sign=sign)
    with pytest.raises(ValueError, match=r"d\.safetensors is not a whole index .*again$"):
        DocumentIndex.load(path, vlm)


def test_a_file_that_is_rewritten_without_a_change_is_read(vlm, path):
    expected = DocumentIndex.load(path, vlm).masses(QUESTION)
    rewritten(path, lambda about, tensors: None, sign=True)
    np.testing.assert_array_equal(DocumentIndex.load(path, vlm).masses(QUESTION), expected)


def test_flipped_bits_are_refused_wherever_they_are(vlm, path):
    content, generator = path.read_bytes(), np.random.default_rng(0)
    header = 8 + struct.unpack("<Q", content[:8])[0]
    places = [*generator.integers(8, header, 30), *generator.integers(header, len(content), 30)]
    for place in map(int, places):
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"d\.safetensors (is not a whole index|was indexed)"):
            DocumentIndex.load(path, vlm)


def test_files_of_other_kinds_are_refused_by_name(vlm, path):
    content = path.read_bytes()
    deep = json.dumps({"__metadata__": {"mmheads": "[" * 100_000}}).encode()
    others = {
        "empty": b"",
        "text": b"not an index\n",
        "cut in the header": content[:200],
        "cut in the tensors": content[:-100],
        "longer": content + b"0",
        "a header of 2^62 bytes": struct.pack("<Q", 1 << 62) + content[8:],
        "no metadata": struct.pack("<Q", 2) + b"{}",
        "deeply nested": struct.pack("<Q", len(deep)) + deep,
        "a pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    }
    for number, text in enumerate(("[1]", "5", "null", "no JSON", "{}")):
        save_file({"x": torch.zeros(1)}, path, metadata={"mmheads": text})
        others[str(number)] = path.read_bytes()
    for other in others.values():
        path.write_bytes(other)
        with pytest.raises(ValueError, match=r"d\.safetensors is not a whole index"):
            DocumentIndex.load(path, vlm)
    for missing in (path.parent, path.parent / "none"):
        with pytest.raises(ValueError, match=f"{missing} is not a file"):
            DocumentIndex.load(missing, vlm)


def test_a_full_disk_is_one_error_and_leaves_the_earlier_file(vlm, path):
    content = path.read_bytes()
    index = DocumentIndex.load(path, vlm)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match=r"d\.safetensors could not be written"):
            index.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert path.read_bytes() == content
