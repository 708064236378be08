"""Benchmarks of lmms-eval are answered by the model itself, with heads ablated."""

import importlib.util
import socket
from types import SimpleNamespace

import example_prompts
import pandas as pd
import pytest
import yaml
from PIL import Image, ImageDraw

from mmheads.answers import answer, answer_streaming
from mmheads.evaluation import evaluate, responses, to_example
from mmheads.examples import Example
from mmheads.heads import HeadSet

KEPT = {"folder": None, "progress": False}
RED, BLUE = (Image.new("RGB", (56, 56), color) for color in ("white", "gainsboro"))
for picture, color in ((RED, "red"), (BLUE, "blue")):
    ImageDraw.Draw(picture).rectangle((8, 8, 40, 30), fill=color)
QUESTIONS = [
    {"before": "Which colour is it?", "image": RED, "after": "A. red\nB. blue\nAnswer:"},
    {"before": "", "image": BLUE, "after": "Name the colour."},
]


@pytest.fixture(scope="module")
def vlm():
    return example_prompts.vlm("qwen3_vl")


@pytest.fixture(scope="module")
def ablations(vlm):
    layers = [
        HeadSet(tuple(h for h in vlm.every_head if h.layer == i), vlm.geometry) for i in (0, 1)
    ]
    return {"first layer": layers[0], "draws": layers}


def examples():
    return [Example(context=(), question=tuple(filter(None, each.values()))) for each in QUESTIONS]


def messages(document):
    texts = [{"type": "text", "text": document[name]} for name in ("before", "after")]
    content = [texts[0], {"type": "image", "url": document["image"]}, texts[1]]
    return [{"role": "user", "content": [c for c in content if c.get("text", "image")]}]


def request(number, to_messages=messages, **settings):
    settings = {"until": ["\n\n"], "max_new_tokens": 6} | settings
    return SimpleNamespace(args=("", to_messages, settings, number, "colours", "test"))


DOCUMENTS = {"colours": {"test": QUESTIONS}}


def test_requests_get_the_answers_of_the_same_prompts(vlm, ablations):
    found = responses(vlm, [request(1), request(0)], DOCUMENTS, ablations, **KEPT)
    direct = answer(vlm, examples(), ablations, max_new_tokens=6, **KEPT)
    for key, said in direct.groupby(["ablation", "draw"]):
        expected = said.sort_values("example")["prediction"].tolist()
        assert found.loc[key, "prediction"].tolist() == expected[::-1]
    said = {key: tuple(found.loc[key, "prediction"]) for key in found.index.unique()}
    assert said["first layer", 0] == said["draws", 0]
    assert len(set(said.values())) == 3, "heads make no difference to these answers"


def test_heads_can_stream_in_place_of_being_ablated(vlm, ablations):
    settings = {"sinks": 2, "window": 4, **KEPT}
    dense = {"dense": ablations["first layer"]}
    found = responses(vlm, [request(0)], DOCUMENTS, dense, answers=answer_streaming, **settings)
    direct = answer_streaming(vlm, examples()[:1], dense, max_new_tokens=6, **settings)
    assert found["prediction"].tolist() == direct["prediction"].tolist()[::-1]


def test_each_request_has_its_own_length_and_stops(vlm):
    asked_for = []

    def answers(vlm, examples, ablations, *, max_new_tokens):
        asked_for.append(max_new_tokens)
        predictions = [f"{example.question[0][:5]}Q: {max_new_tokens}\n\n." for example in examples]
        rows = {"example": range(len(predictions)), "prediction": predictions}
        return pd.DataFrame(rows | {"ablation": "full model", "draw": 0})

    requests = [
        request(0),
        request(0, max_new_tokens=1),
        request(0, until="Q:"),
        request(0, until=["3", "Q"], max_new_tokens=None),
        request(0, max_new_tokens=999),
    ]
    found = responses(vlm, requests, DOCUMENTS, answers=answers, max_new_tokens=32)
    whole = ["WhichQ: 6\n\n.", "WhichQ: 1\n\n.", "Which", "Which", "WhichQ: 32\n\n."]
    assert found["prediction"].tolist() == whole
    assert asked_for == [6, 1, 32]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (request(0, do_sample=True), "the task colours samples its answers"),
        (request(0, temperature=0.2), "the task colours samples its answers"),
        (request(0, lambda d: [{"role": "system"}, *messages(d)]), "system.*expected one of the u"),
        (
            request(0, lambda d: [{"role": "user", "content": [{"type": "audio"}]}]),
            "colours, question 0 has a part of the type audio",
        ),
    ],
)
def test_requests_that_cannot_be_answered_are_refused(vlm, wrong, message):
    with pytest.raises(ValueError, match=message):
        responses(vlm, [wrong], DOCUMENTS, **KEPT)


def test_videos_become_frames(vlm, tmp_path):
    av = pytest.importorskip("av", reason="PyAV is not installed")
    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for number in range(40):
            picture = Image.new("RGB", (64, 32), (6 * number, 0, 0))
            file.mux(stream.encode(av.VideoFrame.from_image(picture)))
        file.mux(stream.encode(None))
    clip = {"type": "video", "url": str(tmp_path / "a.mp4")}
    asked = request(0, lambda _: [{"role": "user", "content": [clip]}])
    example = to_example(vlm, asked, DOCUMENTS)
    frames = example.videos()[0].frames if example.videos() else example.images()
    reds = [frame.getpixel((0, 0))[0] for frame in frames]
    assert len(reds) == 16
    assert reds == sorted(reds)


@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is not None, reason="it is installed")
def test_missing_lmms_eval_is_one_error_that_names_the_extra(vlm):
    with pytest.raises(ImportError, match=r"install the extra `benchmarks`: pip install"):
        evaluate(vlm, ["mmmu_val"])


UTILS = """
def messages(doc, lmms_eval_specific_kwargs=None):
    content = [{"type": "text", "text": doc["before"]}] if doc["before"] else []
    content.append({"type": "image", "url": doc["image"]})
    content.append({"type": "text", "text": doc["after"]})
    return [{"role": "user", "content": content}]

def process(doc, results):
    return {name: float(results[0] == doc[name]) for name in ("full_model", "first_layer")}
"""


def test_task_of_lmms_eval_runs_to_its_metrics_without_a_network(
    vlm, ablations, tmp_path, monkeypatch
):
    pytest.importorskip("lmms_eval", reason="the extra `benchmarks` is not installed")
    datasets = pytest.importorskip("datasets")
    ablations = {"first layer": ablations["first layer"]}
    direct = answer(vlm, examples(), ablations, max_new_tokens=6, **KEPT)
    rows = [dict(each) for each in QUESTIONS]
    for name, said in direct.groupby("ablation"):
        for row, text in zip(rows, said["prediction"], strict=True):
            row[name.replace(" ", "_")] = text
    expected = sum(row["full_model"] == row["first_layer"] for row in rows) / len(rows)
    assert expected < 1
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    metrics = [
        {"metric": name, "aggregation": "mean", "higher_is_better": True}
        for name in ("full_model", "first_layer")
    ]
    task = {
        "task": "local_colours",
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.parquet")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{after}}",
        "doc_to_target": "full_model",
        "generation_kwargs": {"max_new_tokens": 6},
        "metric_list": metrics,
    }
    functions = (
        "doc_to_messages: !function utils.messages\nprocess_results: !function utils.process\n"
    )
    (tmp_path / "colours.yaml").write_text(yaml.safe_dump(task) + functions)
    (tmp_path / "utils.py").write_text(UTILS)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(socket, "getaddrinfo", None)
    monkeypatch.setattr(socket.socket, "connect", None)

    table = evaluate(vlm, ["local_colours"], ablations, task_folder=tmp_path, **KEPT)

    values = table.set_index(["ablation", "metric"])["value"].to_dict()
    assert values == {
        ("full model", "full_model"): 1,
        ("full model", "first_layer"): expected,
        ("first layer", "full_model"): expected,
        ("first layer", "first_layer"): 1,
    }
    assert table["heads"].tolist() == [0, 0, *[len(ablations["first layer"])] * 2]
    assert set(table["task"]) == {"local_colours"}
    assert set(table["questions"]) == {2}
