"""An example: interleaved text and images, a question, its answer, and where the evidence is."""

from __future__ import annotations

import hashlib
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
        frames: In order.
        fps: Frames a second.
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
        question: Text and images of the question alone, asked after the context.
        answer: The right answer.
        choices: All answers that the question allows; their number gives the chance level.
        evidence: Where the answer stands. None marks an example that has no evidence: it can be
            answered, not scored.
        candidates: Regions to rank, by kind ("page", "layout"); empty where nothing is ranked.
        instruction: Said after the question, how to answer it; no part of the question.
        task: Name of the task.
        length: Nominal context length in tokens of a grid of needles; 0 outside such grids.
        depth: Where the evidence stands (or stood, before it was removed), 0 (start of the
            context) to 1 (its end); None for a task without evidence.
        haystack: What identifies the pair of question and evidence; examples that share it differ
            only in depth. Empty: the example is a unit by itself.
        tokens: Evidence as [first, last + 1) token intervals in the prompt of the tiny models,
            written down by the task that placed it; empty where there is none.
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
    tokens: tuple[tuple[int, int], ...] = ()

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
            found = []
            for region in regions:
                part = self.context[region.part]
                count = len(part.frames) if isinstance(part, Video) else 1
                for frame in range(*(region.frames or (0, count))):
                    at = starts[region.part] + frame
                    found.append(replace(region, part=at, frames=None))
            return tuple(found)

        asked = (part.frames if isinstance(part, Video) else (part,) for part in self.question)
        return replace(
            self,
            context=tuple(parts),
            question=tuple(chain.from_iterable(asked)),
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

    def picture(self, width: int = 640, scale: int = 2) -> Image.Image:
        """Lay the example out as a page to look at: evidence outlined, the question below."""
        return _draw(self, width, scale)


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


def _draw(example: Example, width: int, scale: int) -> Image.Image:
    font = ImageFont.load_default(size=15)
    marked: dict[int, list[Region]] = {}
    for region in example.evidence or ():
        marked.setdefault(region.part, []).append(region)

    pieces: list[tuple[Image.Image | str, bool]] = []
    for index, part in enumerate(example.context):
        regions = marked.get(index, [])
        if isinstance(part, str):
            spans = [region.chars or (0, len(part)) for region in regions]
            for word in re.finditer(r"\S+", part):
                hit = any(first < word.end() and word.start() < last for first, last in spans)
                pieces.append((word.group(), hit))
        else:
            pieces += [(picture, False) for picture in _pictures(part, scale, regions)]
    rule = len(pieces)
    for part in (*example.question, f"= {example.answer}"):
        if isinstance(part, str):
            pieces += [(word, False) for word in part.split()]
        else:
            pieces += [(picture, False) for picture in _pictures(part, scale, [])]

    places, x, y, row = [], _MARGIN, _MARGIN, 0
    for index, (piece, _) in enumerate(pieces):
        size = (round(font.getlength(piece)), 18) if isinstance(piece, str) else piece.size
        if index == rule or (x > _MARGIN and x + size[0] > width - _MARGIN):
            x, y, row = _MARGIN, y + row + (2 * _MARGIN if index == rule else _MARGIN // 2), 0
        places.append((x, y))
        x, row = x + size[0] + _MARGIN // 2, max(row, size[1])

    canvas = Image.new("RGB", (width, y + row + _MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    for (piece, hit), place in zip(pieces, places, strict=True):
        if isinstance(piece, str):
            draw.text(place, piece, fill=_EVIDENCE if hit else "black", font=font)
        else:
            canvas.paste(piece, place)
    above = places[rule][1] - _MARGIN
    draw.line((_MARGIN, above, width - _MARGIN, above), fill="grey")
    return canvas


def _pictures(part: Image.Image | Video, scale: int, regions: list[Region]) -> list[Image.Image]:
    if isinstance(part, Image.Image):
        return [_enlarged(part, scale, regions)]
    return [
        _enlarged(
            frame,
            scale,
            [r for r in regions if index in range(*(r.frames or (0, len(part.frames))))],
        )
        for index, frame in enumerate(part.frames)
    ]


def _enlarged(image: Image.Image, scale: int, regions: list[Region]) -> Image.Image:
    """The image in a thin frame, the regions' boxes outlined."""
    size = (image.width * scale, image.height * scale)
    large = image.convert("RGB").resize(size, Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(large)
    draw.rectangle((0, 0, size[0] - 1, size[1] - 1), outline="lightgrey")
    for region in regions:
        left, top, right, bottom = (scale * edge for edge in region.box or (0, 0, *image.size))
        draw.rectangle((left, top, right - 1, bottom - 1), outline=_EVIDENCE, width=3)
    return large
