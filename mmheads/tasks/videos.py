"""The frames of videos, from files or from folders of images."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from transformers.video_utils import load_video

from mmheads.checks import expect
from mmheads.images import open_image

FRAMES = 16
"""Frames per video."""
_IMAGES = (".jpg", ".jpeg", ".png")


def spread(first: int, last: int, count: int) -> list[int]:
    """Return the middles of `count` equal parts of [first, last); every number if it has fewer."""
    expect(count >= 1, "count", count, "1 frame or more")
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
        _, count = _decoded(path, [0])
        if not count:
            raise ValueError(
                f"{path} does not say how many frames it has; give a folder of its frames"
            )
        return Clip(path, range(count), {})
    files = {
        int(number[0]) - first: file
        for file in path.iterdir()
        if file.suffix.lower() in _IMAGES and (number := re.search(r"\d+$", file.stem))
    }
    if not files:
        raise ValueError(f"{path} holds no image whose name ends with a number, such as 12.jpg")
    return Clip(path, sorted(files), files)


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
