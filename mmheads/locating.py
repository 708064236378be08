"""Find the tokens of questions, of parts of a context, and of regions in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mmheads.examples import Example, Part, Region, Video
from mmheads.families import Boxes, box_shares, frame_shares, token_boxes
from mmheads.models import VLM
from mmheads.rendering import Rendered


@dataclass(frozen=True, eq=False)
class Span:
    """Tokens of a prompt, and how much of each belongs.

    Attributes:
        tokens: [n] indices, ascending.
        weights: [n] share of the token inside, in (0, 1]; below 1 where a box cuts a token.
    """

    tokens: NDArray[np.int64]
    weights: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, eq=False)
class Finder:
    """Finds tokens of one prompt by their characters.

    Attributes:
        vlm: The model.
        text: The prompt's text, with placeholders expanded.
        ids: [token] token ids of the prompt.
        offsets: [token, 2] characters of each token of the text.
        before: Number of tokens of the prompt in front of those of the text.
    """

    vlm: VLM
    text: Rendered
    ids: torch.Tensor
    offsets: NDArray[np.int64]
    before: int

    def tokens(self, chars: tuple[int, int]) -> NDArray[np.int64]:
        """[n] indices of the tokens that have one of these characters."""
        first, last = chars
        starts, ends = self.offsets.T
        return np.flatnonzero((starts < last) & (ends > first) & (ends > starts)) + self.before

    def question(self, example: Example) -> NDArray[np.int64]:
        """[n] indices of the question's tokens, its images included.

        Raises:
            ValueError: The question is empty, or has no token.
        """
        count = len(example.context)
        places = self.text.places[count : count + len(example.question)]
        chars = [place.chars for place in places if place.chars]
        if not chars:
            raise ValueError("the question is empty; expected text or an image")
        tokens = self.tokens((min(first for first, _ in chars), max(last for _, last in chars)))
        if not len(tokens):
            raise ValueError(f"the question {example.question!r} has no token in the prompt")
        return tokens

    def part(self, index: int, part: Part) -> Span | None:
        """The tokens of a part of the context; None if it is only white space."""
        chars = self.text.places[index].chars
        if chars is None:
            return None
        tokens = self.tokens(chars)
        if not isinstance(part, str):
            tokens = tokens[self.vlm.is_visual(self.ids[tokens])]
        return _whole(tokens)

    def boxes(
        self,
        example: Example,
        inputs: Mapping[str, torch.Tensor],
        parts: tuple[Span | None, ...],
        replacements: tuple[str, ...],
    ) -> dict[int, Boxes]:
        """Places of the tokens of each image of the context, where its family's are known."""
        boxes = {}
        for index, (place, span) in enumerate(zip(self.text.places, parts, strict=False)):
            if place.visual is None or span is None:
                continue
            replacement = replacements[place.visual]
            grid = token_boxes(self.vlm, example, inputs, index, len(span), replacement)
            if grid is not None:
                boxes[index] = grid
        return boxes

    def regions(
        self,
        example: Example,
        regions: Iterable[Region],
        parts: tuple[Span | None, ...],
        boxes: Mapping[int, Boxes],
    ) -> tuple[Span, ...]:
        """The tokens of regions of the context.

        Raises:
            ValueError: A region has no token.
        """
        return tuple(self._region(example, region, parts, boxes) for region in regions)

    def _region(
        self,
        example: Example,
        region: Region,
        parts: tuple[Span | None, ...],
        boxes: Mapping[int, Boxes],
    ) -> Span:
        span, part = parts[region.part], example.context[region.part]
        chars = self.text.places[region.part].chars
        if span is not None and chars is not None:
            if not isinstance(part, str):
                span = _visual_span(self.vlm, span, region, part, boxes.get(region.part))
            elif region.chars:
                start = chars[0] - (len(part) - len(part.lstrip()))
                span = _whole(self.tokens((start + region.chars[0], start + region.chars[1])))
        if span is None or not len(span):
            raise ValueError(f"{region} of {describe(part)} covers no token of the prompt")
        return span


def describe(part: Part) -> str:
    """A part of an example in a few words, for error messages."""
    if isinstance(part, str):
        return repr(part[:60])
    size = part.frames[0].size if isinstance(part, Video) else part.size
    return f"a {type(part).__name__.lower()} of {size[0]} x {size[1]} pixels"


def _whole(tokens: NDArray[np.int64]) -> Span:
    return Span(tokens, np.ones(len(tokens), np.float32))


def _visual_span(
    vlm: VLM, span: Span, region: Region, part: Image.Image | Video, boxes: Boxes | None
) -> Span:
    """The tokens of a box, of some frames, or of all of an image or a video."""
    if region.box is None and region.frames is None:
        return span
    if boxes is None:
        raise ValueError(
            f"where the visual tokens of a {vlm.family} model lie on an image is not known; give "
            "the whole image as evidence"
        )
    weights = np.ones(len(span))
    if region.box is not None:
        weights *= box_shares(boxes, region.box)
    if isinstance(part, Video) and region.frames is not None:
        weights *= frame_shares(vlm, part, region.frames, len(span))
    inside = weights > 0
    return Span(span.tokens[inside], weights[inside].astype(np.float32))
