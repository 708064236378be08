"""Render an example as a model's prompt and find the tokens of its question and evidence.

Text is found by character offsets, images by the processor's own record of what it replaced, and
boxes by the place of every visual token on its image.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mmheads.examples import Example, Part, Region, Video
from mmheads.families import Boxes, box_shares, frame_shares, token_boxes
from mmheads.models import VLM

OPEN, CLOSE = "\ue0f0", "\ue0f1"
"""Private-use characters around each text while the chat template is rendered."""


NULL_QUESTION = " ".join(["N/A"] * 5)
"""Says nothing (paper A, detection)."""


GRIDS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
"""Inputs that tell a model how many tokens each image has, from which it counts positions."""


_TYPES = ("mm_token_type_ids", "token_type_ids")


_WITHOUT_PIXELS = ("input_ids", "attention_mask", *_TYPES, *GRIDS)


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


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """An example as a model reads it.

    Attributes:
        example: What was encoded.
        inputs: Model inputs, a batch of one, on the CPU.
        question: [n] indices of the question's tokens, its images included.
        parts: A span a part of the context; a part of white space alone has none.
        evidence: A span a region; empty where the example has no evidence.
        candidates: Spans to rank, by kind.
        boxes: By image of the context (index of the part), [token, (left, top, right, bottom)] in
            its pixels, of the tokens of its span; nan for a token without a place.
        replacements: What the processor put for each image and video, in order.
    """

    example: Example
    inputs: Mapping[str, torch.Tensor]
    question: NDArray[np.int64]
    parts: tuple[Span | None, ...]
    evidence: tuple[Span, ...]
    candidates: Mapping[str, tuple[Span, ...]]
    boxes: Mapping[int, Boxes]
    replacements: tuple[str, ...]

    @property
    def ids(self) -> torch.Tensor:
        """[token] token ids."""
        return self.inputs["input_ids"][0]

    def __len__(self) -> int:
        return len(self.ids)

    def weights(self, spans: Iterable[Span]) -> NDArray[np.float32]:
        """[token] share of each token that lies in any of the spans."""
        weights = np.zeros(len(self), dtype=np.float32)
        for span in spans:
            weights[span.tokens] = np.maximum(weights[span.tokens], span.weights)
        return weights


def encode(vlm: VLM, example: Example, *, max_tokens: int = 0) -> Prompt:
    """Render an example with the model's chat template and find its question and evidence.

    Args:
        vlm: The model.
        example: One without evidence can be encoded too.
        max_tokens: Longest prompt allowed; by default what the model's positions allow.

    Raises:
        ValueError: The template does not keep the parts in order, a text holds a placeholder of
            the model, a region has no token, or the prompt is too long.
    """
    text, places = _render(vlm, example)
    images, videos = example.images(), example.videos()
    encoding = _tokenize(vlm, text, images, videos)
    offsets = encoding.pop("offset_mapping")[0].numpy()
    found = encoding.pop("text_replacement_offsets", [[]])[0]
    if len(found) != len(images) + len(videos):
        raise ValueError(
            f"the processor replaced {len(found)} placeholders for {len(images)} images and "
            f"{len(videos)} videos"
        )
    prompt = Prompt(
        example=example,
        inputs={name: value for name, value in encoding.items() if torch.is_tensor(value)},
        question=np.empty(0, np.int64),
        parts=(),
        evidence=(),
        candidates={},
        boxes={},
        replacements=tuple(entry["replacement"] for entry in found),
    )
    _check_length(vlm, prompt, max_tokens)
    return _locate(vlm, prompt, offsets, _expand(places, found), found)


def with_question(vlm: VLM, prompt: Prompt, question: Sequence[Part]) -> Prompt:
    """The same prompt with another question, without processing the context's images again.

    If the question's images are others than the prompt's, the new prompt's inputs lack the pixels:
    it can be asked of a `Prefix` alone.

    Raises:
        ValueError: The images are others, and those of the prompt's own question would have to go,
            or an image's tokens depend on the others (LLaVA-OneVision).
    """
    example = dataclasses.replace(prompt.example, question=tuple(question))
    inputs, replacements = dict(prompt.inputs), prompt.replacements
    if example.images() != prompt.example.images() or example.videos() != prompt.example.videos():
        if any(not isinstance(part, str) for part in prompt.example.question):
            raise ValueError(
                "another question must hold the same images in the same order, or the prompt's own "
                "question none"
            )
        if vlm.family == "llava_onevision":
            raise ValueError(
                f"an image has other tokens alone than beside others in {vlm}; encode the whole "
                "example"
            )
        alone = encode(vlm, Example(context=(), question=example.question))
        inputs = {name: inputs[name] for name in inputs if name in _WITHOUT_PIXELS}
        for name in GRIDS:
            if name in alone.inputs:
                grids = [held.inputs[name] for held in (prompt, alone) if name in held.inputs]
                inputs[name] = torch.cat(grids)
        replacements += alone.replacements
    text, places = _render(vlm, example)
    found = list(_replaced(vlm, text, replacements))
    expanded = _expand(places, found)
    pieces, at = [], 0
    for entry in found:
        pieces += [text[at : entry["span"][0]], entry["replacement"]]
        at = entry["span"][1]
    encoding = vlm.tokenizer(
        ["".join([*pieces, text[at:]])],
        return_tensors="pt",
        return_offsets_mapping=True,
        add_special_tokens=_adds_special_tokens(vlm, text),
    )
    ids = encoding["input_ids"]
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name in _TYPES:
        if name in inputs:
            kinds = _token_types(vlm, ids)
            shared = common_prefix(ids[0], prompt.ids)
            kinds[:, :shared] = prompt.inputs[name][:, :shared]
            inputs[name] = kinds
    changed = dataclasses.replace(prompt, example=example, inputs=inputs, replacements=replacements)
    return _locate(vlm, changed, encoding["offset_mapping"][0].numpy(), expanded, found)


def without_pixels(prompt: Prompt) -> Prompt:
    """The prompt with blank images of one pixel: all that `with_question` needs, and small.

    Its evidence and candidates are gone.
    """
    blank = Image.new("L", (1, 1))

    def light(part: Part) -> Part:
        if isinstance(part, str):
            return part
        return Video(frames=(blank,), fps=part.fps) if isinstance(part, Video) else blank

    example = Example(
        context=tuple(map(light, prompt.example.context)),
        question=tuple(map(light, prompt.example.question)),
        instruction=prompt.example.instruction,
    )
    inputs = {name: prompt.inputs[name] for name in prompt.inputs if name in _WITHOUT_PIXELS}
    return dataclasses.replace(prompt, example=example, inputs=inputs, evidence=(), candidates={})


def null_question(question: Sequence[Part], text: str = NULL_QUESTION) -> tuple[Part, ...]:
    """A question that says nothing, with the images of `question` in its place (paper A)."""
    images = [part for part in question if not isinstance(part, str)]
    first = next((i for i, part in enumerate(question) if isinstance(part, str)), len(images))
    return (*images[:first], text, *images[first:])


def shuffled_question(question: Sequence[Part], seed: int) -> tuple[Part, ...]:
    """The question with its words in another order, its images where they are."""
    texts = [part.split() for part in question if isinstance(part, str)]
    words = [word for text in texts for word in text]
    rng = np.random.default_rng(seed)
    order = np.arange(len(words))
    while len(set(words)) > 1 and [words[i] for i in order] == words:
        order = rng.permutation(len(words))
    shuffled = iter([words[i] for i in order])
    counts = iter([len(text) for text in texts])
    return tuple(
        " ".join(next(shuffled) for _ in range(next(counts))) if isinstance(part, str) else part
        for part in question
    )


def common_prefix(a: torch.Tensor, b: torch.Tensor) -> int:
    """Number of leading tokens that two prompts share."""
    shortest = min(len(a), len(b))
    different = (a[:shortest] != b[:shortest]).nonzero()
    return int(different[0]) if len(different) else shortest


def _token_types(vlm: VLM, ids: torch.Tensor) -> torch.Tensor:
    """0 for text, 1 for an image, 2 for a video."""
    config = vlm.model.config
    kinds = torch.zeros_like(ids)
    kinds[ids == config.image_token_id] = 1
    kinds[ids == getattr(config, "video_token_id", -1)] = 2
    return kinds


@dataclass(frozen=True)
class _Place:
    """Characters of a text part, or the index of an image or a video; None for white space."""

    chars: tuple[int, int] | None = None
    visual: int | None = None


def _render(vlm: VLM, example: Example) -> tuple[str, list[_Place]]:
    """The prompt as text, with placeholders for images, and where each part stands in it."""
    parts = example.parts()
    tokens = _placeholders(vlm)
    for part in parts:
        if isinstance(part, str):
            if held := [mark for mark in (*tokens.values(), OPEN, CLOSE) if mark in part]:
                raise ValueError(f"the text {part[:80]!r} holds {held[0]!r}, which marks images")
        elif not tokens:
            raise ValueError(f"{vlm} reads text alone, not images")
    expected = [
        OPEN if isinstance(part, str) else "visual"
        for part in parts
        if not isinstance(part, str) or part.strip()
    ]
    pattern = re.compile("|".join([OPEN, *(re.escape(token) for token in tokens.values())]))
    for messages in _contents(parts, tokens, vlm.is_text_only):
        try:
            marked = _apply(vlm, messages(True))
            plain = _apply(vlm, messages(False))
        except (TypeError, ValueError, jinja2.TemplateError):
            continue
        order = [m.group() if m.group() == OPEN else "visual" for m in pattern.finditer(marked)]
        if order == expected and marked.replace(OPEN, "").replace(CLOSE, "") == plain:
            return plain, list(_places(parts, marked))
    raise ValueError(
        f"the chat template of {vlm} does not keep the parts of a message whole and in order"
    )


def _contents(parts: Sequence[Part], tokens: Mapping[type, str], text_only: bool) -> Iterator[Any]:
    """Ways to give the parts to a template: as a list, or as one text with placeholders."""

    def piece(part: Part, marked: bool) -> str:
        if not isinstance(part, str):
            return tokens[type(part) if isinstance(part, Video) else Image.Image]
        core = part.strip()
        return part.replace(core, OPEN + core + CLOSE) if marked and core else part

    def listed(marked: bool) -> list[dict[str, Any]]:
        return [
            {"type": "text", "text": piece(part, marked)}
            if isinstance(part, str)
            else {"type": "video" if isinstance(part, Video) else "image"}
            for part in parts
        ]

    def joined(marked: bool) -> str:
        texts = [isinstance(part, str) for part in parts]
        apart = ["\n" if a and b else "" for a, b in zip(texts, [*texts[1:], False], strict=True)]
        return "".join(piece(p, marked) + end for p, end in zip(parts, apart, strict=True))

    yield listed
    if text_only:
        yield joined
    else:
        yield lambda marked: [{"type": "text", "text": joined(marked)}]


def _apply(vlm: VLM, content: Any) -> str:
    text: str = vlm.processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return text


def _places(parts: Sequence[Part], marked: str) -> Iterator[_Place]:
    opened = [m.start() - 2 * i for i, m in enumerate(re.finditer(OPEN, marked))]
    closed = [m.start() - 2 * i - 1 for i, m in enumerate(re.finditer(CLOSE, marked))]
    texts, visuals = zip(opened, closed, strict=True), iter(range(len(parts)))
    for part in parts:
        if not isinstance(part, str):
            yield _Place(visual=next(visuals))
        elif part.strip():
            yield _Place(chars=next(texts))
        else:
            yield _Place()


def _placeholders(vlm: VLM) -> dict[type, str]:
    """What stands for an image and for a video in the rendered text."""
    named = {Image.Image: "image_token", Video: "video_token"}
    found = {kind: getattr(vlm.processor, name, None) for kind, name in named.items()}
    return {kind: str(token) for kind, token in found.items() if token and not vlm.is_text_only}


def _replaced(vlm: VLM, text: str, replacements: Sequence[str]) -> Iterator[dict[str, Any]]:
    """As the processor records it: each placeholder's characters before and after expansion."""
    pattern = re.compile("|".join(map(re.escape, _placeholders(vlm).values())) or "$^")
    grown = 0
    for match, replacement in zip(pattern.finditer(text), replacements, strict=True):
        first, last = match.span()
        new = (first + grown, first + grown + len(replacement))
        grown += len(replacement) - (last - first)
        yield {"span": (first, last), "new_span": new, "replacement": replacement}


def _expand(places: Iterable[_Place], found: Sequence[Mapping[str, Any]]) -> list[_Place]:
    """Places in the rendered text -> characters in the text after expansion."""

    def moved(at: int) -> int:
        grown = 0
        for entry in found:
            if entry["span"][1] <= at:
                grown = entry["new_span"][1] - entry["span"][1]
        return at + grown

    return [
        _Place(chars=tuple(found[place.visual]["new_span"]), visual=place.visual)
        if place.visual is not None
        else _Place(chars=place.chars and (moved(place.chars[0]), moved(place.chars[1])))
        for place in places
    ]


def _adds_special_tokens(vlm: VLM, text: str) -> bool:
    begin = vlm.tokenizer.bos_token
    return not (begin and text.startswith(begin))


def _tokenize(
    vlm: VLM, text: str, images: Sequence[Image.Image], videos: Sequence[Video]
) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "return_tensors": "pt",
        "return_offsets_mapping": True,
        "add_special_tokens": _adds_special_tokens(vlm, text),
    }
    if vlm.is_text_only:
        return dict(vlm.tokenizer([text], **settings))
    if images:
        settings["images"] = [list(images)]
    if videos:
        if not vlm.reads_video:
            raise ValueError(
                f"the processor of {vlm} has no video part here: install "
                "torchvision, or give the frames as images"
            )
        settings["videos"] = [[np.stack([np.asarray(f) for f in v.frames]) for v in videos]]
        settings["video_metadata"] = [
            [
                {
                    "fps": video.fps,
                    "total_num_frames": len(video.frames),
                    "frames_indices": list(range(len(video.frames))),
                }
                for video in videos
            ]
        ]
        settings["do_sample_frames"] = False
    return dict(vlm.processor(text=[text], return_text_replacement_offsets=True, **settings))


def _check_length(vlm: VLM, prompt: Prompt, max_tokens: int) -> None:
    allowed = max_tokens or getattr(vlm.text_config, "max_position_embeddings", None)
    if allowed and len(prompt) > allowed:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens, {vlm} takes {allowed}; a "
            "cut-off context could lack its evidence: give a shorter one, or set max_tokens"
        )


def _locate(
    vlm: VLM,
    prompt: Prompt,
    offsets: NDArray[np.int64],
    places: Sequence[_Place],
    found: Sequence[Mapping[str, Any]],
) -> Prompt:
    """Fill in question, parts, evidence, candidates and boxes."""
    example = prompt.example
    visual = vlm.is_visual(prompt.ids)

    def tokens(chars: tuple[int, int]) -> NDArray[np.int64]:
        first, last = chars
        return np.flatnonzero(
            (offsets[:, 0] < last) & (offsets[:, 1] > first) & (offsets[:, 1] > offsets[:, 0])
        )

    parts: list[Span | None] = []
    boxes: dict[int, Boxes] = {}
    starts: list[int] = []
    """Character of the expanded text at which a text part begins."""
    for index, (part, place) in enumerate(zip(example.context, places, strict=False)):
        starts.append(0)
        if place.chars is None:
            parts.append(None)
            continue
        span = tokens(place.chars)
        if isinstance(part, str):
            starts[-1] = place.chars[0] - (len(part) - len(part.lstrip()))
        else:
            span = span[visual[span]]
            grid = prompt.boxes.get(index)
            if grid is None:
                replacement = str(found[place.visual or 0]["replacement"])
                grid = token_boxes(vlm, example, prompt.inputs, index, len(span), replacement)
            if grid is not None:
                boxes[index] = grid
        parts.append(Span(span, np.ones(len(span), np.float32)))

    def region_span(region: Region) -> Span:
        whole, part = parts[region.part], example.context[region.part]
        if whole is not None and isinstance(part, str) and region.chars:
            first, last = region.chars
            span = tokens((starts[region.part] + first, starts[region.part] + last))
            whole = Span(span, np.ones(len(span), np.float32))
        elif whole is not None and not isinstance(part, str):
            whole = _visual_span(vlm, whole, region, part, boxes.get(region.part))
        if whole is None or not len(whole):
            raise ValueError(f"{region} of {describe(part)} covers no token of the prompt")
        return whole

    asked = [p.chars for p in places[len(example.context) :][: len(example.question)] if p.chars]
    if not asked:
        raise ValueError("the question is empty; expected text or an image")
    question = tokens((min(first for first, _ in asked), max(last for _, last in asked)))
    if not len(question):
        raise ValueError(f"the question {example.question!r} has no token in the prompt")
    return dataclasses.replace(
        prompt,
        question=question,
        parts=tuple(parts),
        evidence=tuple(region_span(region) for region in example.evidence or ()),
        candidates={
            kind: tuple(region_span(region) for region in regions)
            for kind, regions in example.candidates.items()
        },
        boxes=boxes,
    )


def describe(part: Part) -> str:
    """A part of an example in a few words, for error messages."""
    if isinstance(part, str):
        return repr(part[:60])
    size = part.frames[0].size if isinstance(part, Video) else part.size
    return f"a {type(part).__name__.lower()} of {size[0]} x {size[1]} pixels"


def _visual_span(
    vlm: VLM, whole: Span, region: Region, part: Image.Image | Video, boxes: Boxes | None
) -> Span:
    """The tokens of a box, of some frames, or of all of an image or a video."""
    if region.box is None and region.frames is None:
        return whole
    if boxes is None:
        raise ValueError(
            f"where the visual tokens of a {vlm.family} model lie on an image is not known; give "
            "the whole image as evidence"
        )
    weights = np.ones(len(whole))
    if region.box is not None:
        weights *= box_shares(boxes, region.box)
    if isinstance(part, Video) and region.frames is not None:
        weights *= frame_shares(vlm, part, region.frames, len(whole))
    inside = weights > 0
    return Span(whole.tokens[inside], weights[inside].astype(np.float32))
