"""Where something is, in an image or a video: RefCOCOg and VidSTG (probing data of paper B).

RefCOCOg (arXiv 1511.02283, images of COCO) as the hub's lmms-lab/RefCOCOg holds it: `image`,
`answer` (all expressions of one object), `bbox`: left, top, width, height in pixels, as its data
card and the evaluation in lmms-eval have them; splits `val` and `test`. A .jsonl file with the
same columns and a path as `image` is read as well.

VidSTG (arXiv 2001.06891) as in Guaranteer/VidSTG-Dataset: `<split>_annotations.json`. Its boxes are
those of VidOR, in `<training or validation>/<group>/<video>.json`, one list per frame. There, frame
numbers count from 0, an interval excludes its end, and a box includes its right and bottom pixels
(xdshang/VidVRD-helper). The columns of both are as in these repositories; the records of RefCOCOg
and the boxes of VidOR were not checked against the published files.
"""

from __future__ import annotations

from collections.abc import Iterator
from glob import escape
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

from pydantic import Field, FiniteFloat

from mmheads.examples import Example, Region, Video
from mmheads.tasks import videos
from mmheads.tasks.records import Columns, Record, Text, read_records

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, in pixels."""
SLACK = 1.0
"""Pixels by which a published box may reach over its image because of rounding; it is then cut."""
ASPECT_SLACK = 0.02
"""Share by which the aspect ratio of stored frames may differ from the video's: rounding."""


class _RefCocog(Columns):
    image: Any
    answer: list[Text]
    bbox: Annotated[list[FiniteFloat], Field(min_length=4, max_length=4)]


class _Segment(Columns):
    begin_fid: Annotated[int, Field(ge=0)]
    end_fid: int


class _Thing(Columns):
    tid: int
    category: str


class _Sentence(Columns):
    target_id: int
    description: Text


class _VidStg(Columns):
    vid: Text
    fps: Annotated[float, Field(gt=0)]
    frame_count: int
    width: Annotated[int, Field(gt=0)]
    height: Annotated[int, Field(gt=0)]
    things: list[_Thing] = Field(alias="subject/objects")
    used_segment: _Segment
    temporal_gt: _Segment
    questions: list[_Sentence]


class _Edges(Columns):
    xmin: float
    ymin: float
    xmax: float
    ymax: float


class _Track(Columns):
    tid: int
    bbox: _Edges


class _Vidor(Columns):
    width: int
    height: int
    trajectories: list[list[_Track]]
    video_path: str


def refcocog(folder: str | Path, *, split: str = "val") -> Iterator[Example]:
    """Yield one example per referring expression of RefCOCOg, each made when it is asked for.

    The context is the image and the evidence is the box of the object. The answer is this box as
    text, in thousandths of the image's width and height, as Qwen3-VL and InternVL print boxes.

    Args:
        folder: Where its files are.
        split: "val" or "test": what the names of the files begin with.

    Raises:
        ValueError: A record lacks a column, its image cannot be read, an expression is empty, or a
            box does not lie in its image.
    """
    for record in read_records(folder, _RefCocog, files=f"**/{split}*"):
        yield from _expressions(record)


def vidstg(
    annotations: str | Path,
    vidor: str | Path,
    frames: str | Path,
    *,
    split: str = "test",
    count: int = videos.FRAMES,
    first: int = 0,
) -> Iterator[Example]:
    """Yield one example per question of VidSTG, each made when it is asked for.

    The context is one video, whose frames are sampled from the segment that the question was
    written for. The evidence is the target's box, cut to the frame, in each sampled frame that
    lies in the annotated interval and shows the target; None if there is no such frame. The answer
    to a question is the target's category.

    Args:
        annotations: Folder of `<split>_annotations.json`.
        vidor: Folder of VidOR's annotations.
        frames: Folder of `<video>/<number>.jpg`, or of video files; either may lie in VidOR's
            groups. The frames may be of another size than the video.
        split: `train`, `val` or `test`.
        count: Frames per segment, spread evenly over it; all frames if it has fewer.
        first: Number of a video's first frame in the names of the images.

    Raises:
        ValueError: A setting is unknown, a record is not as described, VidOR lacks its video or
            has it in another size, or a frame is missing, unreadable, or turned or cropped.
    """
    records = read_records(annotations, _VidStg, files=f"{split}_annotations.json")
    for record, tracks in _with_tracks(records, Path(vidor)):
        yield from _questions(record, tracks, Path(frames), count, first)


def _expressions(record: Record[_RefCocog]) -> Iterator[Example]:
    image = record.image(record.values.image)
    box = _box(record, image.size)
    answer = [round(1000 * e / s, 2) for e, s in zip(box, image.size * 2, strict=True)]
    for expression in record.values.answer:
        yield Example(
            context=(image,),
            question=(f"Where in the image is this: {expression.strip()}",),
            answer=str(answer),
            evidence=(Region(part=0, box=box),),
            instruction="Give its box as [left, top, right, bottom], from 0 to 1000 across the "
            "image and down it.",
            task="refcocog",
        )


def _box(record: Record[_RefCocog], size: tuple[int, int]) -> Box:
    """The box of a record, cut to the image where rounding has put it over the edge."""
    (left, top, wide, high), (width, height) = record.values.bbox, size
    right, bottom = left + wide, top + high
    inside = -SLACK <= left < right <= width + SLACK and -SLACK <= top < bottom <= height + SLACK
    box = (max(0.0, left), max(0.0, top), min(right, width), min(bottom, height))
    if not inside or box[0] >= box[2] or box[1] >= box[3]:
        raise record.error(
            f"bbox is {record.values.bbox} (left, top, width, height), which does not lie in its "
            f"image of {size} pixels"
        )
    return box


def _with_tracks(
    records: Iterator[Record[_VidStg]], vidor: Path
) -> Iterator[tuple[Record[_VidStg], _Vidor]]:
    """Yield records with VidOR's annotations of their videos, each read once per run of records."""
    paths = {path.stem: path for path in vidor.rglob("*.json")}
    current: tuple[str, _Vidor] | None = None
    for record in records:
        values = record.values
        if values.vid not in paths:
            raise record.error(
                f"{vidor} holds no annotation {values.vid}.json; expected VidOR's folders"
            )
        path = paths[values.vid]
        if current is None or current[0] != values.vid:
            tracks = next(read_records(path.parent, _Vidor, files=escape(path.name))).values
            current = values.vid, tracks
        size, other = [(of.width, of.height) for of in (values, current[1])]
        if size != other:
            raise record.error(f"the video has {size} pixels, in {path} it has {other}")
        yield record, current[1]


def _questions(
    record: Record[_VidStg], tracks: _Vidor, frames: Path, count: int, first: int
) -> Iterator[Example]:
    values = record.values
    if not values.questions:
        return
    begin, end = _interval(record, "used_segment")
    shown = range(*_interval(record, "temporal_gt"))
    numbers = videos.spread(begin, end, count)
    if end > len(tracks.trajectories):
        raise record.error(
            f"VidOR has {len(tracks.trajectories)} frames, the segment ends at {end}"
        )
    try:
        names = (f"{values.vid}.mp4", tracks.video_path)
        pictures = videos.clip(frames, *names, first=first).read(numbers)
    except ValueError as error:
        raise record.error(str(error)) from error
    size, video_size = pictures[0].size, (values.width, values.height)
    if abs(size[0] * video_size[1] / (size[1] * video_size[0]) - 1) > ASPECT_SLACK:
        raise record.error(f"frames of {size} pixels, a video of {video_size}: turned or cropped?")
    video = Video(frames=pictures, fps=len(numbers) * values.fps / (end - begin))
    categories = {thing.tid: thing.category for thing in values.things}
    for question in values.questions:
        if question.target_id not in categories:
            raise record.error(
                f"a question has the target_id {question.target_id}, which no thing has"
            )
        boxes = [
            (index, box)
            for index, number in enumerate(numbers)
            if number in shown
            for track in tracks.trajectories[number]
            if track.tid == question.target_id and (box := _cut(track.bbox, video_size, size))
        ]
        regions = tuple(Region(part=0, frames=(at, at + 1), box=box) for at, box in boxes)
        yield Example(
            context=(video,),
            question=(question.description.strip(),),
            answer=categories[question.target_id],
            evidence=regions or None,
            depth=mean(at for at, _ in boxes) / max(1, len(numbers) - 1) if boxes else None,
            task="vidstg-questions",
        )


def _interval(record: Record[_VidStg], name: str) -> tuple[int, int]:
    """First and last + 1 frame."""
    segment: _Segment = getattr(record.values, name)
    if not segment.begin_fid < segment.end_fid <= record.values.frame_count:
        raise record.error(
            f"{name} is {segment}; expected begin_fid before end_fid in the video's "
            f"{record.values.frame_count} frames"
        )
    return segment.begin_fid, segment.end_fid


def _cut(edges: _Edges, video_size: tuple[int, int], size: tuple[int, int]) -> Box | None:
    """A box of the video, in pixels of its stored frames; None where it lies outside them."""
    x, y = size[0] / video_size[0], size[1] / video_size[1]
    left, right = max(0.0, edges.xmin * x), min(size[0], (edges.xmax + 1) * x)
    top, bottom = max(0.0, edges.ymin * y), min(size[1], (edges.ymax + 1) * y)
    return (left, top, right, bottom) if left < right and top < bottom else None
