"""Referred objects are the evidence: a box of an image, boxes in the sampled frames of a video."""

import io
import json

import pandas as pd
import pytest
from PIL import Image

from mmheads.examples import Region
from mmheads.tasks import probes

SIZE = (640, 480)


def jpeg():
    buffer = io.BytesIO()
    Image.new("RGB", SIZE, "white").save(buffer, "JPEG")
    return buffer.getvalue()


def referred(**changes):
    return {
        "question_id": "1",
        "image": {"bytes": jpeg(), "path": "COCO_train2014_1.jpg"},
        "question": "Describe the region.",
        "answer": ["the red car", "a car on the left "],
        "segmentation": [64.0, 48.0, 320.0, 48.0, 320.0, 432.0],
        "bbox": [64.0, 48.0, 256.0, 384.0],
        "iscrowd": 0,
        "file_name": "COCO_train2014_1.jpg",
    } | changes


def refcocog(folder, *records, **settings):
    (folder / "data").mkdir(exist_ok=True)
    pd.DataFrame(records).to_parquet(folder / "data" / "val-00000-of-00001.parquet")
    return list(probes.refcocog(folder, **settings))


def test_expressions_of_one_object_become_examples_with_its_box(tmp_path):
    first, second = refcocog(tmp_path, referred())
    assert first.images()[0].size == SIZE
    assert first.evidence == (Region(part=0, box=(64, 48, 320, 432)),)
    assert first.question == ("Where in the image is this: the red car",)
    assert second.question == ("Where in the image is this: a car on the left",)
    assert first.answer == "[100.0, 100.0, 500.0, 900.0]"
    assert "0 to 1000" in first.instruction


def test_lines_with_paths_of_images_are_read_as_well(tmp_path):
    (tmp_path / "1.jpg").write_bytes(jpeg())
    line = {name: referred()[name] for name in ("answer", "bbox")} | {"image": "1.jpg"}
    (tmp_path / "test.jsonl").write_text(json.dumps(line))
    (tmp_path / "val.jsonl").write_text(json.dumps(line | {"image": "2.jpg"}))
    assert len(list(probes.refcocog(tmp_path, split="test"))) == 2
    with pytest.raises(ValueError, match=r"val.jsonl, row 0: image .*2\.jpg\) does not exist"):
        list(probes.refcocog(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bbox": [320.0, 240.0, 500.0, 400.0]}, r"\(left, top, width, height\), which does not"),
        ({"bbox": [64.0, 48.0, 0.0, 384.0]}, "does not lie in its image"),
        ({"bbox": [64.0, 48.0]}, r"bbox is \[64.0, 48.0\]: List should have at least 4 items"),
        ({"answer": ["the red car", " "]}, "answer.1 is  : expected a text that is not empty"),
        ({"answer": "the red car"}, "answer is the red car: Input should be a valid list"),
        ({"image": {"bytes": b"no image", "path": ""}}, "image is damaged, or not an image"),
    ],
)
def test_wrong_expressions_are_refused_with_their_place(tmp_path, changes, message):
    with pytest.raises(ValueError, match=rf"val-0.*parquet, row 0: .*{message}"):
        refcocog(tmp_path, referred(**changes))


def test_another_schema_of_expressions_is_one_error(tmp_path):
    changed = referred()
    changed["box"] = changed.pop("bbox")
    with pytest.raises(ValueError, match="the field 'bbox' is missing; there are"):
        refcocog(tmp_path, changed)


def annotated(**changes):
    return {
        "vid": "5159741010",
        "frame_count": 40,
        "fps": 20,
        "width": 640,
        "height": 480,
        "subject/objects": [{"tid": 0, "category": "dog"}, {"tid": 7, "category": "adult"}],
        "used_segment": {"begin_fid": 8, "end_fid": 40},
        "used_relation": {"subject_tid": 0, "object_tid": 7, "predicate": "watch"},
        "temporal_gt": {"begin_fid": 14, "end_fid": 30},
        "questions": [{"description": "what watches a man?", "type": "object", "target_id": 0}],
        "captions": [{"description": "a man is watched.", "type": "person", "target_id": 7}],
    } | changes


def vidor(**changes):
    """A dog that walks to the right and is gone in frame 26, a man half outside the frame."""
    dog = [
        {"tid": 0, "bbox": {"xmin": 10 * n, "ymin": 100, "xmax": 10 * n + 99, "ymax": 199}}
        for n in range(40)
    ]
    man = {"tid": 7, "bbox": {"xmin": 600, "ymin": -20, "xmax": 700, "ymax": 239}}
    about = {"video_id": "5159741010", "video_path": "1025/5159741010.mp4", "fps": 20}
    about |= {"width": 640, "height": 480, "frame_count": 40}
    return about | {"trajectories": [[*([dog[n]] * (n != 26)), man] for n in range(40)]} | changes


@pytest.fixture
def data(tmp_path):
    """Annotations of one video, and its frames at half its size, in the red of their number."""
    folder = tmp_path / "frames" / "5159741010"
    folder.mkdir(parents=True)
    for number in range(40):
        Image.new("RGB", (320, 240), (number, 0, 0)).save(folder / f"{number:06d}.png")
    write(tmp_path, annotated(), vidor())
    return tmp_path


def write(folder, annotation, tracks):
    (folder / "test_annotations.json").write_text(json.dumps([annotation]))
    place = folder / "vidor" / "validation" / "1025"
    place.mkdir(parents=True, exist_ok=True)
    (place / "5159741010.json").write_text(json.dumps(tracks))


def vidstg(folder, **settings):
    return list(
        probes.vidstg(folder, folder / "vidor", folder / "frames", **{"count": 8} | settings)
    )


def test_target_is_the_evidence_in_the_sampled_frames_that_show_it(data):
    (example,) = vidstg(data)
    (video,) = example.context
    assert [frame.getpixel((0, 0))[0] for frame in video.frames] == list(range(10, 40, 4))
    assert video.fps == 5
    # Of the frames 10, 14, ..., 38, the interval [14, 30) has 14 to 26, and the dog is gone in 26.
    assert example.evidence == tuple(
        Region(part=0, frames=(at, at + 1), box=(5.0 * number, 50, 5.0 * number + 50, 100))
        for at, number in ((1, 14), (2, 18), (3, 22))
    )
    assert example.depth == 2 / 7
    assert (example.question, example.answer) == (("what watches a man?",), "dog")


def test_boxes_are_cut_to_the_frame(data):
    write(data, annotated(questions=[{"description": "who is it?", "target_id": 7}]), vidor())
    (example,) = vidstg(data)
    assert (example.question, example.answer) == (("who is it?",), "adult")
    assert [region.frames for region in example.evidence] == [(1, 2), (2, 3), (3, 4), (4, 5)]
    assert {region.box for region in example.evidence} == {(300, 0, 320, 120)}


def test_target_in_no_sampled_frame_is_no_evidence(data):
    (example,) = vidstg(data, count=1)
    assert example.evidence is not None
    write(data, annotated(temporal_gt={"begin_fid": 25, "end_fid": 28}), vidor())
    (example,) = vidstg(data, count=1)
    assert (example.evidence, example.depth) == (None, None)
    outside = {"tid": 0, "bbox": {"xmin": 640, "ymin": 0, "xmax": 700, "ymax": 9}}
    write(data, annotated(), vidor(trajectories=[[outside]] * 40))
    (example,) = vidstg(data)
    assert example.evidence is None


def test_segment_without_sentences_needs_no_frames(data):
    write(data, annotated(questions=[]), vidor())
    (data / "frames").rename(data / "elsewhere")
    assert vidstg(data) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vid": "1"}, r"holds no annotation 1\.json"),
        ({"width": 480, "height": 640}, r"the video has \(480, 640\) pixels, in .* \(640, 480\)"),
        ({"used_segment": {"begin_fid": 8, "end_fid": 41}}, "used_segment is .* 40 frames"),
        ({"temporal_gt": {"begin_fid": 30, "end_fid": 14}}, "temporal_gt is .*expected begin_fid"),
        ({"temporal_gt": {"begin_fid": 1}}, "'temporal_gt.end_fid' is missing"),
        ({"questions": [{"description": "who?"}]}, "'questions.0.target_id' is missing"),
        (
            {"questions": [{"description": "", "target_id": 0}]},
            "questions.0.description is : expected a text",
        ),
        (
            {"questions": [{"description": "who?", "target_id": 9}]},
            "target_id 9, which no thing has",
        ),
        ({"fps": 0}, "fps is 0: Input should be greater than 0"),
        ({"fps": "20"}, "fps is 20: Input should be a valid number"),
    ],
)
def test_wrong_annotations_are_refused_with_their_place(data, changes, message):
    write(data, annotated(**changes), vidor())
    with pytest.raises(ValueError, match=rf"test_annotations.json, row 0: .*{message}"):
        vidstg(data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trajectories": [[]] * 39}, "VidOR has 39 frames, the segment ends at 40"),
        (
            {"trajectories": [[{"tid": 0, "bbox": [1, 2, 3, 4]}]] * 40},
            r"trajectories.0.0.bbox is \[1, 2, 3, 4\]: Input should be",
        ),
        (
            {"trajectories": [[{"tid": 0, "bbox": {"left": 1}}]] * 40},
            "'trajectories.0.0.bbox.xmin' is missing",
        ),
    ],
)
def test_boxes_that_do_not_fit_are_refused(data, changes, message):
    write(data, annotated(), vidor(**changes))
    with pytest.raises(ValueError, match=rf"row 0: .*{message}"):
        vidstg(data)


def test_file_that_is_no_annotation_of_boxes_is_named(data):
    write(data, annotated(), {"width": 640})
    with pytest.raises(
        ValueError, match=r"5159741010.json, row 0: the field 'height' is missing; there are width"
    ):
        vidstg(data)


def test_missing_or_turned_frames_are_said(data):
    folder = data / "frames" / "5159741010"
    (folder / "000014.png").unlink()
    with pytest.raises(ValueError, match=r"row 0: .* lacks the frames \[14\]; it has 39"):
        vidstg(data)
    for path in folder.iterdir():
        Image.new("RGB", (240, 320)).save(path)
    with pytest.raises(ValueError, match=r"frames of \(240, 320\) pixels, .*turned or cropped"):
        vidstg(data, count=1)
    folder.rename(data / "frames" / "other")
    with pytest.raises(ValueError, match="row 0: no frames: none of"):
        vidstg(data)


def test_frames_may_lie_in_groups_and_count_from_one(data):
    group = data / "frames" / "1025"
    group.mkdir()
    folder = (data / "frames" / "5159741010").rename(group / "5159741010")
    for number in reversed(range(40)):
        (folder / f"{number:06d}.png").rename(folder / f"frame_{number + 1:06d}.png")
    (example,) = vidstg(data, first=1)
    assert example.videos()[0].frames[0].getpixel((0, 0))[0] == 10


def test_unknown_settings_are_refused_at_once(data):
    with pytest.raises(ValueError, match="count is 0; expected 1 frame or more"):
        vidstg(data, count=0)
    with pytest.raises(ValueError, match=r"holds no file 'train_annotations.json'"):
        vidstg(data, split="train")
