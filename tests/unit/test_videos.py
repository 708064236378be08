"""MLVU's questions come with evenly sampled frames; a frame that is not there is said."""

import importlib.util
import json

import pytest
from PIL import Image

from mmheads.examples import Example, Region, Video
from mmheads.tasks import videos


def write_frames(folder, numbers, name="{}.png", size=(32, 16)):
    """Frames whose red is their number."""
    folder.mkdir(parents=True)
    for number in numbers:
        Image.new("RGB", size, (number, 0, 0)).save(folder / name.format(number))


def reds(pictures):
    return [picture.getpixel((0, 0))[0] for picture in pictures]


def record(**changes):
    return {
        "video": "needle_32.mp4",
        "duration": 20,
        "question": "What does the hand do?",
        "candidates": ["Waves", "Points", "Writes", "Knocks"],
        "answer": "Points",
        "question_type": "findNeedle",
    } | changes


@pytest.fixture
def hub(tmp_path):
    """Two of MLVU's files and a file of another task, with the frames of one video in its task."""
    (tmp_path / "json").mkdir()
    write(tmp_path, record())
    count = record(video="count_1.mp4", candidates=["2", "1"], answer=1, question_type="count")
    (tmp_path / "json" / "4_count.json").write_text(json.dumps([count]))
    (tmp_path / "json" / "9_summary.json").write_text(json.dumps([{"video": "s.mp4"}]))
    write_frames(tmp_path / "video" / "2_needle" / "needle_32", range(1, 11), "frame_{:05d}.png")
    write_frames(tmp_path / "video" / "count_1", range(3))
    return tmp_path


def write(folder, *records):
    (folder / "json" / "2_needle.json").write_text(json.dumps(records))


def read(folder, **settings):
    return list(videos.mlvu(folder / "json", folder / "video", **settings))


def test_question_is_asked_in_the_published_words(hub):
    needle, count = read(hub, count=5)
    (video,) = needle.context
    assert reds(video.frames) == [2, 4, 6, 8, 10]
    assert video.fps == 5 / 20
    assert needle.question == (
        "Question: What does the hand do?\nOptions:\n(A) Waves\n(B) Points\n(C) Writes\n(D) Knocks",
    )
    assert needle.instruction.endswith("Only give the best option.")
    assert (needle.answer, needle.choices) == ("B", ("A", "B", "C", "D"))
    assert (needle.task, needle.evidence) == ("mlvu-findNeedle", None)
    assert reds(count.videos()[0].frames) == [0, 1, 2]
    assert (count.answer, count.choices) == ("B", ("A", "B"))


def test_examples_are_made_only_as_they_are_asked_for(hub):
    write(hub, record(), record(video="lost.mp4"))
    examples = videos.mlvu(hub / "json", hub / "video")
    assert next(examples).answer == "B"
    with pytest.raises(ValueError, match=r"2_needle.json, row 1: no frames: none of .*lost"):
        next(examples)
    assert len(read(hub, limit=1)) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": "Sings"}, r"the answer 'Sings' is not one of \['Waves'"),
        (
            {"candidates": ["Points"]},
            r"candidates is \['Points'\]: List should have at least 2 items",
        ),
        ({"duration": 0}, "duration is 0: Input should be greater than 0"),
        ({"duration": True}, "duration is True: Input should be a valid number"),
        ({"question": " "}, "question is  : expected a text that is not empty"),
        ({"candidates": "A) Waves"}, r"candidates is A\) Waves: Input should be a valid list"),
    ],
)
def test_wrong_records_are_refused_with_their_place(hub, changes, message):
    write(hub, record(**changes))
    with pytest.raises(ValueError, match=rf"2_needle.json, row 0: {message}"):
        read(hub)


def test_another_schema_is_one_error(hub):
    changed = record()
    changed["video_name"] = changed.pop("video")
    write(hub, changed)
    with pytest.raises(ValueError, match="the field 'video' is missing; there are duration"):
        read(hub)


@pytest.mark.parametrize(
    ("answer", "gold", "worth"),
    [
        ("B", "B", 1),
        (" b\n", "B", 1),
        ("(B) Points", "B", 1),
        ("B) Points", "B", 1),
        ("The best option is B.", "B", 1),
        ("A dog: (C)", "C", 1),
        ("A", "B", 0),
        ("A or B", "B", 0),
        ("Because I say so", "B", 0),
        ("B's dog", "B", 0),
        ("", "A", 0),
    ],
)
def test_first_letter_of_an_answer_counts(answer, gold, worth):
    assert videos.choice_answer(answer, gold) == worth


def test_gold_answer_must_be_a_letter():
    with pytest.raises(ValueError, match="gold answer is 'Points'; expected one letter"):
        videos.choice_answer("B", "Points")


def test_sampled_frames_lie_in_the_middle_of_equal_stretches():
    assert videos.spread(0, 100, 4) == [12, 37, 62, 87]
    assert videos.spread(10, 13, 16) == [10, 11, 12]
    assert videos.spread(479, 1804, 1) == [1141]
    with pytest.raises(ValueError, match="count is 0; expected 1 frame or more"):
        videos.spread(0, 10, 0)


def test_frames_that_cannot_be_read_are_named(tmp_path):
    write_frames(tmp_path / "a", range(1, 5))
    assert reds(videos.clip(tmp_path, "a.mp4", first=1).read([0, 3])) == [1, 4]
    with pytest.raises(ValueError, match=r"lacks the frames \[0\]; it has 4, from 1 to 4.*first=1"):
        videos.clip(tmp_path, "a.mp4").read([0, 3])
    (tmp_path / "a" / "2.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"2\.png is damaged, or not an image"):
        videos.clip(tmp_path, "a.mp4").read([2])
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "3.png")
    with pytest.raises(ValueError, match=r"differ in size: \[\(8, 8\), \(32, 16\)\]"):
        videos.clip(tmp_path, "a.mp4").read([1, 3])
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match="holds no image whose name ends with a number"):
        videos.clip(tmp_path, "b.mp4")


@pytest.mark.skipif(importlib.util.find_spec("av") is not None, reason="PyAV is installed")
def test_video_file_without_a_decoder_says_what_to_do(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pip install av, or put its frames .* folder .*a$"):
        videos.clip(tmp_path, "a.mp4")


def test_video_file_gives_the_frames_of_its_numbers(tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for number in range(12):
            picture = Image.new("RGB", (64, 32), (20 * number, 0, 0))
            file.mux(stream.encode(av.VideoFrame.from_image(picture)))
        file.mux(stream.encode(None))
    clip = videos.clip(tmp_path, "a.mp4")
    assert list(clip.numbers) == list(range(12))
    assert [round(red / 20) for red in reds(clip.read([3, 5, 11]))] == [3, 5, 11]
    with pytest.raises(ValueError, match=r"lacks the frames \[12\]"):
        clip.read([12])
    (tmp_path / "b.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match="cannot be opened as a video"):
        videos.clip(tmp_path, "b.mp4")


def test_frames_of_a_video_become_images_with_their_regions():
    frames = tuple(Image.new("RGB", (8, 6), (level, 0, 0)) for level in range(3))
    example = Example(
        context=("before", Video(frames=frames), frames[0]),
        question=("where?", Video(frames=frames[:2])),
        evidence=(
            Region(part=1, frames=(1, 3), box=(1, 2, 3, 4)),
            Region(part=2),
            Region(part=0, chars=(0, 3)),
        ),
        candidates={"page": (Region(part=1),)},
    ).without_video()
    assert example.context == ("before", *frames, frames[0])
    assert example.question == ("where?", *frames[:2])
    assert example.evidence == (
        Region(part=2, box=(1, 2, 3, 4)),
        Region(part=3, box=(1, 2, 3, 4)),
        Region(part=4),
        Region(part=0, chars=(0, 3)),
    )
    assert example.candidates["page"] == tuple(Region(part=part) for part in (1, 2, 3))
