"""Frames are spread evenly over a video; a frame that is not there is said."""

import importlib.util

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
