"""Candidates in a model's cache, window by window, and the attention that questions give them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from mmheads.examples import Example, Part
from mmheads.families import box_shares
from mmheads.heads import HeadSet
from mmheads.models import VLM
from mmheads.prefix import Prefix, prefill
from mmheads.prompts import Prompt, Question, Span, ask, encode, without_pixels
from mmheads.retrieval.candidates import Candidate, PagePart, Place, candidate_parts

SAVE_EVERY = 30.0
"""Seconds between two saves of an index: what a killed process may lose."""

NULL_QUESTION = "N/A"
"""The question that asks nothing, whose attention calibrates scores (paper A, retrieval)."""


@dataclass(frozen=True, eq=False)
class Window:
    """Candidates that share a forward pass.

    Attributes:
        first: Number of the first candidate.
        parts: By candidate, the indices of its parts in the context.
        sizes: By part of the context that is an image, its width and height in pixels.
        prefix: The candidates in the cache.
        null_attention: [head, key] attention from `NULL_QUESTION` to the cached tokens.
        opened: Reads `prefix` with its cache, where the cache is kept on disk.
    """

    first: int
    parts: tuple[tuple[int, ...], ...]
    sizes: Mapping[int, tuple[int, int]]
    prefix: Prefix
    null_attention: NDArray[np.float32]
    opened: Callable[[], Prefix] | None = None

    @property
    def prompt(self) -> Prompt:
        """The candidates with `NULL_QUESTION`."""
        return self.prefix.prompt

    def spans(self) -> Iterator[tuple[int, Span]]:
        """Candidates by number, each with its tokens."""
        for number, parts in enumerate(self.parts, self.first):
            spans = [span for part in parts if (span := self.prompt.parts[part]) is not None]
            tokens = np.concatenate([span.tokens for span in spans])
            yield number, Span(tokens, np.concatenate([span.weights for span in spans]))

    def region_spans(self, regions: Sequence[Place]) -> Iterator[tuple[int, Span]]:
        """Regions by number, each with the shares of the tokens that it covers in this window."""
        for number, region in enumerate(regions):
            if 0 <= region.page - self.first < len(self.parts):
                span = self._region_span(region)
                if span is not None:
                    yield number, span

    def _region_span(self, region: Place) -> Span | None:
        """The shares of the tokens that a region of this window covers; None if it covers none."""
        if isinstance(region, PagePart):
            parts = self.parts[region.page - self.first]
            return self.prompt.parts[parts[region.part]] if 0 <= region.part < len(parts) else None
        images = self.image_parts(region.page)
        if len(images) > 1:
            raise ValueError(
                f"candidate {region.page} has {len(images)} images; regions need one each"
            )
        span = self.prompt.parts[images[0]] if images else None
        if span is None:
            return None
        wide, high = np.divide(self.sizes[images[0]], region.size)
        left, top, right, bottom = region.box
        box = (left * wide, top * high, right * wide, bottom * high)
        weights = box_shares(self.prompt.boxes[images[0]], box).astype(np.float32)
        inside = weights > 0
        return Span(span.tokens[inside], weights[inside]) if inside.any() else None

    def image_parts(self, candidate: int) -> list[int]:
        """Parts of a candidate that are images whose tokens have a place on them."""
        return [part for part in self.parts[candidate - self.first] if part in self.prompt.boxes]


@dataclass(frozen=True, eq=False)
class IndexedDocument:
    """The candidates of a document after they have run through a model.

    Attributes:
        heads: The heads whose attention ranks.
        windows: In the order of their candidates; neighbours may share some.
        overlap: Least number of candidates that two neighbouring windows share.
        instruction: Text after each question.
        max_tokens: Longest prompt allowed; 0 for as many tokens as the model has positions.
        count: Number of candidates.
        about: What the candidates are, in the caller's words; compared when a file is continued.
    """

    heads: HeadSet
    windows: tuple[Window, ...]
    overlap: int
    instruction: str
    max_tokens: int
    count: int
    about: str = ""

    @property
    def done(self) -> int:
        """Number of candidates that have run; less than `count` after an interrupt."""
        return self.windows[-1].first + len(self.windows[-1].parts) if self.windows else 0

    @property
    def settings(self) -> dict[str, Any]:
        """All fields but the heads and the windows, by name."""
        names = (field.name for field in dataclasses.fields(self))
        return {name: getattr(self, name) for name in names if name not in ("heads", "windows")}


def index_candidates(
    vlm: VLM,
    document: IndexedDocument,
    candidates: Sequence[Candidate],
    ranges: Sequence[range],
    *,
    keep: str,
    progress: bool,
    save: Callable[[IndexedDocument], None] | None = None,
    put: Callable[[IndexedDocument, Window], Window] | None = None,
) -> IndexedDocument:
    """Run the windows that a document lacks through the model; see `DocumentIndex`.

    Args:
        vlm: The model.
        document: Its settings, and the windows that have run before.
        candidates: All candidates.
        ranges: The candidates of each window.
        keep: Where the cache is kept; see `DocumentIndex`.
        progress: Show a progress bar.
        save: Called with what is done every `SAVE_EVERY` seconds, at the end, and at an interrupt.
        put: Writes each window to disk and returns it without its cache.
    """
    done = saved = len(document.windows)
    last = time.monotonic()
    bar = tqdm(ranges, "index", unit="window", initial=done, disable=not progress, leave=False)
    try:
        for numbers in ranges[done:]:
            window = _run_window(vlm, document, candidates, numbers, keep)
            window = put(document, window) if put else window
            document = dataclasses.replace(document, windows=(*document.windows, window))
            bar.update()
            if save and time.monotonic() - last > SAVE_EVERY:
                save(document)
                saved, last = len(document.windows), time.monotonic()
    finally:
        bar.close()
        if save and len(document.windows) > saved:
            save(document)
    return document


def _run_window(
    vlm: VLM,
    document: IndexedDocument,
    candidates: Sequence[Candidate],
    numbers: range,
    keep: str,
) -> Window:
    """Run a window's candidates up to the deepest head, then the null question."""
    made = [candidate_parts(candidates[number], number) for number in numbers]
    example = Example(
        context=tuple(part for parts in made for part in parts),
        question=(NULL_QUESTION,),
        instruction=document.instruction,
    )
    ends = np.cumsum([0, *map(len, made)]).tolist()
    parts = tuple(tuple(range(first, stop)) for first, stop in pairwise(ends))
    prompt = encode(vlm, example, max_tokens=document.max_tokens)
    for number, of_candidate in zip(numbers, parts, strict=True):
        if all(prompt.parts[part] is None for part in of_candidate):
            raise ValueError(f"candidate {number} has no token: it is blank")
    prefix = prefill(vlm, prompt, layers=document.heads.layers[-1] + 1)
    null_attention = _attention(document.heads, prefix, prompt.own)
    context = enumerate(prompt.example.context)
    sizes = {number: part.size for number, part in context if isinstance(part, Image.Image)}
    light = prefix.alone(without_pixels(prompt), device="" if keep == "device" else "cpu")
    return Window(numbers[0], parts, sizes, light, null_attention)


def question_attention(
    document: IndexedDocument, window: Window, question: Sequence[Part], *, pixels: bool = True
) -> NDArray[np.float32]:
    """[head, key] attention from a question to the cached tokens, mean over the question's tokens.

    Args:
        document: Holds the window.
        window: The candidates that are asked about.
        question: Texts and images.
        pixels: Show the question's images; otherwise their positions stay empty.

    Raises:
        ValueError: The question is too long, cannot be asked of a cached context in this family, or
            gives attention that is not finite.
    """
    prefix = window.opened() if window.opened else window.prefix
    encoded = ask(prefix.vlm, prefix.prompt, question)
    return _attention(document.heads, prefix, encoded, pixels=pixels)


def _attention(
    heads: HeadSet, prefix: Prefix, question: Question, *, pixels: bool = True
) -> NDArray[np.float32]:
    """[head, key] finite attention from a question to the cached tokens."""
    last = max((int(part.tokens[-1]) for part in question.context if part), default=0)
    if last >= prefix.start(question):
        raise ValueError(
            f"the question {question.parts!r} and the last candidate share a token; end the "
            "candidate's text with a line break"
        )
    return prefix.keys(question, heads, pixels=pixels)
