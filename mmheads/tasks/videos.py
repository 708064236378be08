"""Questions about long videos: MLVU (arXiv 2406.04264). And the frames of videos, for any task.

MLVU has one JSON file per task (`json/1_plotQA.json` to `7_topic_reasoning.json`; 8 and 9 are not
multiple choice) and videos (`video/1_plotQA/...`). A record has the columns `video`, `duration` (in
seconds), `question`, `candidates`, `answer` (one of the candidates) and `question_type`: as in the
authors' repository (JUNJIE99/MLVU) and its files, not checked against the hub (MLVU/MVLU) here.
The records do not say when a needle is shown, so no example has evidence: paper B (arXiv
2606.05843) uses MLVU only for answers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from PIL import Image
from pydantic import Field, FiniteFloat
from transformers.video_utils import load_video

from mmheads.checks import expect
from mmheads.examples import Example, Video
from mmheads.images import open_image
from mmheads.tasks.records import Columns, Record, Text, read_records

FRAMES = 16
"""Frames per video, as in MLVU's own evaluation."""
LETTERS = "ABCDEF"
"""Names of the answers. MLVU's questions have four of them, those of its test set six."""
INSTRUCTION = (
    "Carefully watch this video and pay attention to every detail. Based on your observations, "
    "select the best option that accurately addresses the question.\nOnly give the best option."
)
"""MLVU's own words. There the first sentences are the system prompt, and the reply is begun with
"Best Option: ("."""
FOLDERS = {
    "plotQA": "1_plotQA",
    "findNeedle": "2_needle",
    "ego": "3_ego",
    "count": "4_count",
    "order": "5_order",
    "anomaly_reco": "6_anomaly_reco",
    "topic_reasoning": "7_topic_reasoning",
}
"""Folder of the videos of each question type."""
_IMAGES = (".jpg", ".jpeg", ".png")


class _Columns(Columns):
    video: Text
    duration: Annotated[FiniteFloat, Field(gt=0)]
    question: Text
    candidates: Annotated[list[Any], Field(min_length=2, max_length=len(LETTERS))]
    answer: str | int
    question_type: Text


def mlvu(
    source: str | Path,
    frames: str | Path,
    *,
    count: int = FRAMES,
    limit: int | None = None,
) -> Iterator[Example]:
    """Multiple-choice questions of MLVU, made as they are asked for.

    The context is one video, the answer a letter, the evidence None. The task is the question
    type.

    Args:
        source: Folder of the JSON files.
        frames: Folder of the videos, or of folders of their frames, directly or in `FOLDERS`. The
            frames may be thinned out; they must be spread evenly over the video.
        count: Frames per video, spread evenly over it; all frames if it has fewer.
        limit: Largest number of examples; None for all.

    Raises:
        ValueError: The count is not positive, a record is not as described, its answer is none of
            its candidates, or a video cannot be read.
    """
    check_count(count)
    records = read_records(source, _Columns, files="[1-7]_*.json")
    return islice((_question(record, Path(frames), count) for record in records), limit)


def choice_answer(answer: str, gold: str) -> float:
    """Return 1 if the first letter in the answer is the gold letter, else 0.

    A letter is a capital of `LETTERS` that is not part of a word; a letter before ")" takes
    precedence, so that "A dog: (B)" means B. A lower-case letter counts only if it is the whole
    answer.

    Raises:
        ValueError: The gold answer is not a letter.
    """
    if gold not in tuple(LETTERS):
        raise ValueError(f"the gold answer is {gold!r}; expected one letter of {LETTERS}")
    text = answer.strip()
    text = text.upper() if len(text) == 1 else text
    letter = rf"(?<!\w)([{LETTERS}])"
    match = re.search(rf"{letter}\)", text) or re.search(rf"{letter}(?![\w'])", text)
    return float(match is not None and match[1] == gold)


def spread(first: int, last: int, count: int) -> list[int]:
    """Return the middles of `count` equal parts of [first, last); every number if it has fewer."""
    check_count(count)
    size = last - first
    count = min(count, size)
    return [first + (2 * i + 1) * size // (2 * count) for i in range(count)]


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames of a video, read when asked for.

    Attributes:
        path: A folder with one image per frame, or a video file.
        numbers: Numbers of the frames that can be read, from 0, in order.
        files: Image of each number; empty for a video file.
    """

    path: Path
    numbers: Sequence[int]
    files: Mapping[int, Path]

    def read(self, numbers: Sequence[int]) -> tuple[Image.Image, ...]:
        """Return the frames with these numbers, all of one size.

        Raises:
            ValueError: One is missing, cannot be read, or has another size.
        """
        known = self.files or self.numbers
        if missing := [number for number in numbers if number not in known]:
            raise ValueError(
                f"{self.path} lacks the frames {missing[:5]}; it has {len(known)}, from "
                f"{self.numbers[0]} to {self.numbers[-1]}. Where the names of images count from 1, "
                "set first=1"
            )
        pictures = (
            tuple(open_image(self.files[number]) for number in numbers)
            if self.files
            else _decoded(self.path, numbers)[0]
        )
        if len(sizes := {picture.size for picture in pictures}) > 1:
            raise ValueError(f"the frames of {self.path} differ in size: {sorted(sizes)}")
        return pictures


def clip(frames: Path, *names: str, first: int = 0) -> Clip:
    """Find the frames of a video.

    Args:
        frames: Folder of videos.
        names: Its possible paths there, such as `1025/5159741010.mp4`: the file, or a folder of
            this name without the ending, with one image per frame whose name ends with its number.
        first: Number of the video's first frame in the names of the images.

    Raises:
        ValueError: None of the paths exists, a folder holds no frame, or a file cannot be opened.
    """
    tried = [path for name in names for path in ((frames / name).with_suffix(""), frames / name)]
    path = next((path for path in tried if path.exists()), None)
    if path is None:
        raise ValueError(
            f"no frames: none of {', '.join(map(str, tried))} exists; expected a folder of images "
            "or a video file"
        )
    if path.is_file():
        return Clip(path, range(_frame_count(path)), {})
    files = {
        int(number[0]) - first: file
        for file in path.iterdir()
        if file.suffix.lower() in _IMAGES and (number := re.search(r"\d+$", file.stem))
    }
    if not files:
        raise ValueError(f"{path} holds no image whose name ends with a number, such as 12.jpg")
    return Clip(path, sorted(files), files)


def check_count(count: int) -> None:
    """Raise a ValueError unless it is a number of frames."""
    expect(count >= 1, "count", count, "1 frame or more")


def _question(record: Record[_Columns], frames: Path, count: int) -> Example:
    values = record.values
    options = [str(option) for option in values.candidates]
    if options.count(str(values.answer)) != 1:
        raise record.error(f"the answer {values.answer!r} is not one of {options}")
    folders = (FOLDERS.get(values.question_type, "."), ".")
    try:
        video = clip(frames, *(f"{folder}/{values.video}" for folder in folders))
        numbers = [video.numbers[i] for i in spread(0, len(video.numbers), count)]
        pictures = video.read(numbers)
    except ValueError as error:
        raise record.error(str(error)) from error
    listed = [f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return Example(
        context=(Video(frames=pictures, fps=len(pictures) / values.duration),),
        question=("\n".join([f"Question: {values.question}", "Options:", *listed]),),
        answer=LETTERS[options.index(str(values.answer))],
        choices=tuple(LETTERS[: len(options)]),
        instruction=INSTRUCTION,
        task=f"mlvu-{values.question_type}",
    )


def _frame_count(path: Path) -> int:
    _, count = _decoded(path, [0])
    if not count:
        raise ValueError(f"{path} does not say how many frames it has; give a folder of its frames")
    return count


def _decoded(path: Path, numbers: Sequence[int]) -> tuple[tuple[Image.Image, ...], int]:
    """Frames of a video file, decoded from its start, and how many frames it says it has."""
    ordered = sorted(numbers)
    source: Any = str(path)
    try:
        loaded: Any = load_video(source, backend="pyav", sample_indices_fn=lambda **_: ordered)
    except ImportError as error:
        raise ValueError(
            f"{path} is a video file, which only PyAV can read here: pip install av, or put its "
            f"frames as images into the folder {path.with_suffix('')}"
        ) from error
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be opened as a video: {error}") from error
    pictures = dict(zip(ordered, map(Image.fromarray, loaded[0]), strict=False))
    if len(pictures) < len(ordered):
        raise ValueError(f"{path} ends before its frame {ordered[-1]}; is the file whole?")
    return tuple(pictures[number] for number in numbers), loaded[1].total_num_frames
