"""An example: interleaved text and images, a question, its answer, and where the evidence is."""

import re
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

Part = str | Image.Image


@dataclass(frozen=True, kw_only=True)
class Region:
    """A place in the context of an example: a whole part, or a piece of it.

    Attributes:
        part: Index into `Example.context`.
        chars: First and last + 1 character of a piece of text, or None.
        box: Left, top, right, bottom of a piece of an image, in its pixels, or None.
    """

    part: int
    chars: tuple[int, int] | None = None
    box: tuple[float, float, float, float] | None = None


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
        task: Name of the task.
        length: Nominal length of the prompt in tokens.
        depth: Where the evidence stands (or stood, before it was removed), 0 (start of the
            context) to 1 (its end); None for a task without evidence.
        seed: What the example was drawn from.
        tokens: Evidence as [first, last + 1) token intervals in the prompt of the tiny models,
            written down by the task that placed it; empty where there is none.
    """

    context: tuple[Part, ...]
    question: tuple[Part, ...]
    answer: str
    choices: tuple[str, ...]
    evidence: tuple[Region, ...] | None
    candidates: dict[str, tuple[Region, ...]]
    task: str
    length: int
    depth: float | None
    seed: tuple[int, ...]
    tokens: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        regions = [*(self.evidence or ()), *(r for c in self.candidates.values() for r in c)]
        for region in regions:
            _check(region, self.context)

    def messages(self) -> list[dict[str, object]]:
        """The example as one user message, for a processor's `apply_chat_template`."""
        content = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image", "image": part}
            for part in (*self.context, *self.question)
        ]
        return [{"role": "user", "content": content}]

    def images(self) -> list[Image.Image]:
        """Images of the context, then of the question."""
        return [p for p in (*self.context, *self.question) if isinstance(p, Image.Image)]

    def picture(self, width: int = 640, scale: int = 2) -> Image.Image:
        """Lay the example out as a page to look at: evidence outlined, the question below."""
        return _draw(self, width, scale)


def _check(region: Region, context: tuple[Part, ...]) -> None:
    if not 0 <= region.part < len(context):
        raise ValueError(f"{region} is not in the context, which has parts 0 to {len(context) - 1}")
    part = context[region.part]
    if isinstance(part, str):
        first, last = region.chars or (0, len(part))
        if region.box or not 0 <= first < last <= len(part):
            raise ValueError(f"{region} does not lie in its text of {len(part)} characters")
    else:
        left, top, right, bottom = region.box or (0, 0, *part.size)
        inside = 0 <= left < right <= part.width and 0 <= top < bottom <= part.height
        if region.chars or not inside:
            raise ValueError(f"{region} does not lie in its image of {part.size} pixels")


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
            pieces.append((_enlarged(part, scale, regions), False))
    rule = len(pieces)
    for part in (*example.question, f"= {example.answer}"):
        if isinstance(part, str):
            pieces += [(word, False) for word in part.split()]
        else:
            pieces.append((_enlarged(part, scale, []), False))

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
