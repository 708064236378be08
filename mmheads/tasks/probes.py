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

from collections.abc import Iterator, Mapping
from glob import escape
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

from mmheads.examples import Example, Region, Video
from mmheads.tasks import videos
from mmheads.tasks.records import Kind, Record, read_records

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, in pixels."""
SLACK = 1.0
"""Pixels by which a published box may reach over its image because of rounding; it is then cut."""
SENTENCES = {"questions": "{}", "captions": "Where in the video is this: {}"}
"""Kinds of sentences of VidSTG, and how they are asked."""
ASPECT_SLACK = 0.02
"""Share by which the aspect ratio of stored frames may differ from the video's: rounding."""

_REFCOCOG: Mapping[str, Kind] = {"image": object, "answer": list[str], "bbox": list}
_VIDSTG: Mapping[str, Kind] = {
    "vid": str,
    "fps": (int, float),
    "frame_count": int,
    "width": int,
    "height": int,
    "subject/objects": list[dict[str, Any]],
    "used_segment": dict,
    "temporal_gt": dict,
}
_VIDOR: Mapping[str, Kind] = {
    "width": int,
    "height": int,
    "trajectories": list[list[dict[str, Any]]],
    "video_path": str,
}


def refcocog(
    source: str | Path = "lmms-lab/RefCOCOg", *, split: str = "val", limit: int | None = None
) -> Iterator[Example]:
    """Yield one example per referring expression of RefCOCOg, each made when it is asked for.

    The context is the image and the evidence is the box of the object. The answer is this box as
    text, in thousandths of the image's width and height, as Qwen3-VL and InternVL print boxes.

    Args:
        source: Name on the hub, or a folder with its files.
        split: "val" or "test"; in a folder, what the names of the files begin with.
        limit: Largest number of examples; None for all.

    Raises:
        ValueError: A record lacks a column, its image cannot be read, an expression is empty, or a
            box does not lie in its image.
    """
    records = read_records(source, _REFCOCOG, files=f"**/{split}*", split=split)
    return islice((example for record in records for example in _expressions(record)), limit)


def vidstg(
    annotations: str | Path,
    vidor: str | Path,
    frames: str | Path,
    *,
    split: str = "test",
    sentences: str = "questions",
    count: int = videos.FRAMES,
    first: int = 0,
    limit: int | None = None,
) -> Iterator[Example]:
    """Yield one example per sentence of VidSTG, each made when it is asked for.

    The context is one video, whose frames are sampled from the segment that the sentence was
    written for. The evidence is the target's box, cut to the frame, in each sampled frame that
    lies in the annotated interval and shows the target; None if there is no such frame. The answer
    to a question is the target's category.

    Args:
        annotations: Folder of `<split>_annotations.json`.
        vidor: Folder of VidOR's annotations.
        frames: Folder of `<video>/<number>.jpg`, or of video files; either may lie in VidOR's
            groups. The frames may be of another size than the video.
        split: `train`, `val` or `test`.
        sentences: `questions`, or `captions`.
        count: Frames per segment, spread evenly over it; all frames if it has fewer.
        first: Number of a video's first frame in the names of the images.
        limit: Largest number of examples; None for all.

    Raises:
        ValueError: A setting is unknown, a record is not as described, VidOR lacks its video or
            has it in another size, or a frame is missing, unreadable, or turned or cropped.
    """
    if sentences not in SENTENCES:
        raise ValueError(f"sentences is {sentences!r}; expected one of {tuple(SENTENCES)}")
    videos.check_count(count)
    records = read_records(
        annotations, {**_VIDSTG, sentences: list[dict[str, Any]]}, files=f"{split}_annotations.json"
    )
    examples = (
        example
        for record, tracks in _with_tracks(records, Path(vidor))
        for example in _sentences(record, tracks, Path(frames), sentences, count, first)
    )
    return islice(examples, limit)


def _expressions(record: Record) -> Iterator[Example]:
    image = record.image(record.values["image"])
    box = _box(record, image.size)
    answer = [round(1000 * e / s, 2) for e, s in zip(box, image.size * 2, strict=True)]
    for expression in record.values["answer"]:
        yield Example(
            context=(image,),
            question=(f"Where in the image is this: {_text(record, expression)}",),
            answer=str(answer),
            evidence=(Region(part=0, box=box),),
            instruction="Give its box as [left, top, right, bottom], from 0 to 1000 across the "
            "image and down it.",
            task="refcocog",
        )


def _box(record: Record, size: tuple[int, int]) -> Box:
    """The box of a record, cut to the image where rounding has put it over the edge."""
    edges, (width, height) = record.values["bbox"], size
    try:
        left, top, wide, high = map(float, edges)
    except (TypeError, ValueError) as error:
        raise record.error(f"bbox is {edges!r:.200}; expected four numbers") from error
    right, bottom = left + wide, top + high
    inside = -SLACK <= left < right <= width + SLACK and -SLACK <= top < bottom <= height + SLACK
    box = (max(0.0, left), max(0.0, top), min(right, width), min(bottom, height))
    if not inside or box[0] >= box[2] or box[1] >= box[3]:
        raise record.error(
            f"bbox is {edges!r} (left, top, width, height), which does not lie in its image of "
            f"{size} pixels"
        )
    return box


def _text(record: Record, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise record.error(f"a sentence is {value!r}; expected a text")
    return value.strip()


def _with_tracks(
    records: Iterator[Record], vidor: Path
) -> Iterator[tuple[Record, Mapping[str, Any]]]:
    """Yield records with VidOR's annotations of their videos, each read once per run of records."""
    paths = {path.stem: path for path in vidor.rglob("*.json")}
    current: str = ""
    tracks: Mapping[str, Any] = {}
    for record in records:
        name = record.text("vid")
        if name not in paths:
            raise record.error(f"{vidor} holds no annotation {name}.json; expected VidOR's folders")
        if name != current:
            annotation = paths[name]
            about = next(read_records(annotation.parent, _VIDOR, files=escape(annotation.name)))
            current, tracks = name, about.values
        size, other = [(of["width"], of["height"]) for of in (record.values, tracks)]
        if size != other:
            raise record.error(f"the video has {size} pixels, in {paths[name]} it has {other}")
        if min(*size, record.values["fps"]) <= 0:
            raise record.error(
                f"width, height and fps are {(*size, record.values['fps'])}; expected all above 0"
            )
        yield record, tracks


def _sentences(
    record: Record,
    tracks: Mapping[str, Any],
    frames: Path,
    kind: str,
    count: int,
    first: int,
) -> Iterator[Example]:
    values = record.values
    if not values[kind]:
        return
    begin, end = _interval(record, "used_segment")
    shown = range(*_interval(record, "temporal_gt"))
    numbers = videos.spread(begin, end, count)
    if end > len(tracks["trajectories"]):
        raise record.error(
            f"VidOR has {len(tracks['trajectories'])} frames, the segment ends at {end}"
        )
    try:
        names = (f"{values['vid']}.mp4", tracks["video_path"])
        pictures = videos.clip(frames, *names, first=first).read(numbers)
    except ValueError as error:
        raise record.error(str(error)) from error
    size, whole = pictures[0].size, (values["width"], values["height"])
    if abs(size[0] * whole[1] / (size[1] * whole[0]) - 1) > ASPECT_SLACK:
        raise record.error(f"frames of {size} pixels, a video of {whole}: turned or cropped?")
    video = Video(frames=pictures, fps=len(numbers) * values["fps"] / (end - begin))
    try:
        names_of = {thing["tid"]: str(thing["category"]) for thing in values["subject/objects"]}
        for sentence in values[kind]:
            target, text = sentence["target_id"], _text(record, sentence["description"])
            found = [
                (at, box)
                for at, number in enumerate(numbers)
                if number in shown
                for track in tracks["trajectories"][number]
                if track["tid"] == target and (box := _cut(track["bbox"], whole, size))
            ]
            yield Example(
                context=(video,),
                question=(SENTENCES[kind].format(text),),
                answer=names_of[target] if kind == "questions" else "",
                evidence=tuple(Region(part=0, frames=(at, at + 1), box=box) for at, box in found)
                or None,
                depth=mean(at for at, _ in found) / max(1, len(numbers) - 1) if found else None,
                task=f"vidstg-{kind}",
            )
    except (KeyError, TypeError) as error:
        raise record.error(
            f"{type(error).__name__}: {error}; expected sentences with description and target_id, "
            "things with tid and category, boxes with xmin, ymin, xmax and ymax"
        ) from error


def _interval(record: Record, name: str) -> tuple[int, int]:
    """First and last + 1 frame."""
    about, count = record.values[name], record.values["frame_count"]
    first, last = about.get("begin_fid"), about.get("end_fid")
    if not (isinstance(first, int) and isinstance(last, int) and 0 <= first < last <= count):
        raise record.error(
            f"{name} is {about}; expected begin_fid and end_fid in the video's {count} frames"
        )
    return first, last


def _cut(edges: Mapping[str, float], whole: tuple[int, int], size: tuple[int, int]) -> Box | None:
    """A box of the video, in pixels of its stored frames; None where it lies outside them."""
    x, y = size[0] / whole[0], size[1] / whole[1]
    left, right = max(0.0, edges["xmin"] * x), min(size[0], (edges["xmax"] + 1) * x)
    top, bottom = max(0.0, edges["ymin"] * y), min(size[1], (edges["ymax"] + 1) * y)
    return (left, top, right, bottom) if left < right and top < bottom else None
