"""An example: interleaved text and images, a question, its answer, and where the evidence is."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import chain

from PIL import Image, ImageDraw, ImageFont

from mmheads.images import open_image
from mmheads.provenance import hash_json


@dataclass(frozen=True, kw_only=True, eq=False)
class Video:
    """Frames of one size.

    Attributes:
        frames: The frames, in order of time.
        fps: Frames per second.
    """

    frames: tuple[Image.Image, ...]
    fps: float = 1.0


Part = str | Image.Image | Video


@dataclass(frozen=True, kw_only=True)
class Region:
    """A place in the context of an example: a whole part, or a piece of it.

    Attributes:
        part: Index into `Example.context`.
        chars: First and last + 1 character of a piece of text, or None.
        box: Left, top, right, bottom of a piece of an image or of frames, in its pixels, or None.
        frames: First and last + 1 frame of a piece of a video, or None.
    """

    part: int
    chars: tuple[int, int] | None = None
    box: tuple[float, float, float, float] | None = None
    frames: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """A context, a question about it, and the evidence for the answer.

    Attributes:
        context: Text and images, in reading order (the haystack, or the pages of a document).
        question: Text and images of only the question, which is asked after the context.
        answer: The right answer.
        choices: All answers that the question allows; their number gives the chance level.
        evidence: Where the answer is. None marks an example that has no evidence: it can be
            answered, not scored.
        candidates: Regions to rank, by kind ("page", "layout"); empty where nothing is ranked.
        instruction: How to answer, written after the question; it is not part of the question.
        task: Name of the task.
        length: Nominal context length in tokens of a grid of needles; 0 outside such grids.
        depth: Where the evidence is (or was, before it was removed), from 0 (start of the
            context) to 1 (its end); None for a task without evidence.
        haystack: What identifies the haystack, its question and its evidence; examples that share
            it differ only in depth. Empty: the example is a unit by itself.
    """

    context: tuple[Part, ...]
    question: tuple[Part, ...]
    answer: str = ""
    choices: tuple[str, ...] = ()
    evidence: tuple[Region, ...] | None = None
    candidates: Mapping[str, tuple[Region, ...]] = field(default_factory=dict)
    instruction: str = ""
    task: str = ""
    length: int = 0
    depth: float | None = None
    haystack: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("context", "question"):
            object.__setattr__(self, name, tuple(map(_as_seen, getattr(self, name))))
        regions = [*(self.evidence or ()), *(r for c in self.candidates.values() for r in c)]
        for region in regions:
            _check(region, self.context)

    def messages(self) -> list[dict[str, object]]:
        """The example as one user message, for a processor's `apply_chat_template`."""
        return [{"role": "user", "content": [_content(part) for part in self.parts()]}]

    def parts(self) -> tuple[Part, ...]:
        """All parts in the order of the prompt: context, question, instruction."""
        return (*self.context, *self.question, *filter(None, (self.instruction,)))

    def images(self) -> list[Image.Image]:
        """Images of the context, then of the question."""
        return [part for part in self.parts() if isinstance(part, Image.Image)]

    def videos(self) -> list[Video]:
        """Videos of the context, then of the question."""
        return [part for part in self.parts() if isinstance(part, Video)]

    def without_video(self) -> Example:
        """The same with the frames of each video as images, for models that read no videos."""
        parts: list[Part] = []
        starts = []
        for part in self.context:
            starts.append(len(parts))
            parts += part.frames if isinstance(part, Video) else (part,)

        def moved(regions: tuple[Region, ...]) -> tuple[Region, ...]:
            counts = [len(p.frames) if isinstance(p, Video) else 1 for p in self.context]
            return tuple(
                replace(region, part=starts[region.part] + frame, frames=None)
                for region in regions
                for frame in range(*(region.frames or (0, counts[region.part])))
            )

        question = (part.frames if isinstance(part, Video) else (part,) for part in self.question)
        return replace(
            self,
            context=tuple(parts),
            question=tuple(chain.from_iterable(question)),
            evidence=None if self.evidence is None else moved(self.evidence),
            candidates={kind: moved(regions) for kind, regions in self.candidates.items()},
        )

    def fingerprint(self) -> str:
        """Hash of all that scores and answers of the example depend on, 32 hexadecimal digits.

        The task's name, the depth and what identifies the haystack are labels and not part of it.
        """
        regions = [asdict(region) for region in self.evidence or ()]
        content = {
            "context": [_identity(part) for part in self.context],
            "question": [_identity(part) for part in self.question],
            "instruction": self.instruction,
            "evidence": None if self.evidence is None else regions,
        }
        return hash_json(content)

    def labels(self, fingerprint: str = "") -> dict[str, object]:
        """Task, length, depth and haystack, as tables and the results store name them.

        Without a haystack, the fingerprint takes its place.
        """
        haystack = json.dumps(self.haystack) if self.haystack else fingerprint
        where = {"length": self.length, "depth": self.depth, "haystack": haystack}
        return {"task": self.task, **where}

    def picture(self, width: int = 640) -> Image.Image:
        """The example as a page to look at: the evidence in colour, the question below a line.

        Images are shown at twice their size.
        """
        regions: list[list[Region]] = [[] for _ in self.context]
        for region in self.evidence or ():
            regions[region.part].append(region)
        context = map(_drawn, self.context, regions)
        question = (_drawn(part, []) for part in (*self.question, f"= {self.answer}"))
        above, below = (
            _flow(list(chain.from_iterable(parts)), width) for parts in (context, question)
        )
        page = Image.new("RGB", (width, above.height + below.height), "white")
        page.paste(above, (0, 0))
        page.paste(below, (0, above.height))
        line = (_MARGIN, above.height, width - _MARGIN, above.height)
        ImageDraw.Draw(page).line(line, fill="grey")
        return page


def _as_seen(part: Part) -> Part:
    """The part with its images upright, on white, in RGB (see `images.open_image`)."""

    def seen(image: Image.Image) -> Image.Image:
        return image if image.mode == "RGB" and not image.info else open_image(image)

    if isinstance(part, Video):
        return replace(part, frames=tuple(map(seen, part.frames)))
    return part if isinstance(part, str) else seen(part)


def _identity(part: Part) -> dict[str, object]:
    """What a part is, for a hash: kind and content, with sizes and rates."""
    if isinstance(part, str):
        return {"text": part}
    if isinstance(part, Video):
        return {"fps": part.fps, "frames": [_identity(frame) for frame in part.frames]}
    return {"size": part.size, "pixels": hashlib.sha256(part.tobytes()).hexdigest()}


def _check(region: Region, context: tuple[Part, ...]) -> None:
    if not 0 <= region.part < len(context):
        raise ValueError(f"{region} is not in the context, which has parts 0 to {len(context) - 1}")
    part = context[region.part]
    if isinstance(part, str):
        first, last = region.chars or (0, len(part))
        if region.box or region.frames or not 0 <= first < last <= len(part):
            raise ValueError(f"{region} does not lie in its text of {len(part)} characters")
        return
    frames = part.frames if isinstance(part, Video) else (part,)
    first, last = region.frames or (0, len(frames))
    if not 0 <= first < last <= len(frames) or (region.frames and isinstance(part, Image.Image)):
        raise ValueError(f"{region} does not lie in its {len(frames)} frames")
    width, height = frames[0].size
    left, top, right, bottom = region.box or (0, 0, width, height)
    if region.chars or not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise ValueError(f"{region} does not lie in its image of {(width, height)} pixels")


def _content(part: Part) -> dict[str, object]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if isinstance(part, Video):
        return {"type": "video", "video": part}
    return {"type": "image", "image": part}


_EVIDENCE = (213, 94, 0)
_MARGIN = 12


def _drawn(part: Part, regions: list[Region]) -> list[Image.Image]:
    """The words of a text, or an image or its frames, with these regions in colour."""
    if isinstance(part, str):
        spans = [region.chars or (0, len(part)) for region in regions]
        return [
            _word(
                word.group(),
                any(first < word.end() and word.start() < last for first, last in spans),
            )
            for word in re.finditer(r"\S+", part)
        ]
    frames = part.frames if isinstance(part, Video) else (part,)
    return [
        _enlarged(frame, [r for r in regions if index in range(*(r.frames or (0, len(frames))))])
        for index, frame in enumerate(frames)
    ]


def _word(text: str, is_evidence: bool) -> Image.Image:
    font = ImageFont.load_default(size=15)
    word = Image.new("RGB", (round(font.getlength(text)), 20), "white")
    color = _EVIDENCE if is_evidence else "black"
    ImageDraw.Draw(word).text((0, 0), text, fill=color, font=font)
    return word


def _flow(pieces: list[Image.Image], width: int) -> Image.Image:
    """Pieces from left to right, in as many rows as they need."""
    places, x, y, height, gap = [], _MARGIN, _MARGIN, 0, _MARGIN // 2
    for piece in pieces:
        if x > _MARGIN and x + piece.width > width - _MARGIN:
            x, y, height = _MARGIN, y + height + gap, 0
        places.append((x, y))
        x, height = x + piece.width + gap, max(height, piece.height)
    page = Image.new("RGB", (width, y + height + _MARGIN), "white")
    for piece, place in zip(pieces, places, strict=True):
        page.paste(piece, place)
    return page


def _enlarged(image: Image.Image, regions: list[Region]) -> Image.Image:
    """The image at twice its size in a thin frame, with the boxes of regions outlined."""
    size = (2 * image.width, 2 * image.height)
    large = image.convert("RGB").resize(size, Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(large)
    draw.rectangle((0, 0, size[0] - 1, size[1] - 1), outline="lightgrey")
    for region in regions:
        left, top, right, bottom = (2 * edge for edge in region.box or (0, 0, *image.size))
        draw.rectangle((left, top, right - 1, bottom - 1), outline=_EVIDENCE, width=3)
    return large
