"""A context with its questions as a model's prompt, and the tokens of questions and evidence.

Text is found by character offsets, images by what the processor put in their place, and boxes by
the place of every visual token on its image.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mmheads.examples import Example, Part, Video
from mmheads.families import GRIDS, TOKEN_TYPES, Boxes, token_types, tokens_depend_on_neighbours
from mmheads.locating import Finder
from mmheads.locating import Span as Span
from mmheads.models import VLM
from mmheads.processing import keep_as_text, process
from mmheads.rendering import Rendered, expand, render, tokenize

NULL_QUESTION = " ".join(["N/A"] * 5)
"""Says nothing (paper A, detection)."""


LITTLE = 0.05
"""Evidence of less than so many tokens is warned about."""


WITHOUT_PIXELS = ("input_ids", "attention_mask", *TOKEN_TYPES, *GRIDS)
"""Model inputs that do not hold pixels."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """A question after the context of a prompt, as a model reads it.

    Attributes:
        parts: Its text and images.
        inputs: Model inputs of the whole prompt with this question, a batch of one, on the CPU.
            Pixels are left out where the question's images are not those of the prompt.
        tokens: [n] indices of the question's tokens in the whole prompt, its images included.
        start: Number of first tokens that it shares with the prompt's own question.
        context: A span per part of the context; None for a part that is only white space.
        evidence: A span per region of evidence.
        alone: A prompt of only this question, which has the pixels that `inputs` lacks; None where
            it lacks none.
    """

    parts: tuple[Part, ...]
    inputs: Mapping[str, torch.Tensor]
    tokens: NDArray[np.int64]
    start: int
    context: tuple[Span | None, ...]
    evidence: tuple[Span, ...]
    alone: Prompt | None = None

    @property
    def ids(self) -> torch.Tensor:
        """[token] token ids of the whole prompt."""
        return self.inputs["input_ids"][0]

    def __len__(self) -> int:
        return len(self.ids)

    def weights(self, spans: Iterable[Span | None]) -> NDArray[np.float32]:
        """[token] share of each token that lies in any of the spans."""
        weights = np.zeros(len(self), dtype=np.float32)
        for span in spans:
            if span is not None:
                weights[span.tokens] = np.maximum(weights[span.tokens], span.weights)
        return weights


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """A context and the questions to it, as a model reads them.

    Attributes:
        example: What was encoded.
        questions: The example's own question, then the others that were asked for.
        shared: Number of first tokens that all questions share: the context that runs once.
        candidates: Spans to rank, by kind.
        boxes: By image of the context (index of the part), [token, (left, top, right, bottom)] in
            its pixels, of the tokens of its span; nan for a token without a place.
        replacements: What the processor put for each image and video, in order.
    """

    example: Example
    questions: tuple[Question, ...]
    shared: int
    candidates: Mapping[str, tuple[Span, ...]]
    boxes: Mapping[int, Boxes]
    replacements: tuple[str, ...]
    _layout: _Layout | None = None
    """Its text; None for a prompt that was made of tokens, which cannot be asked further."""

    @property
    def own(self) -> Question:
        """The example's own question."""
        return self.questions[0]

    @property
    def inputs(self) -> Mapping[str, torch.Tensor]:
        """Model inputs with the example's own question, a batch of one, on the CPU."""
        return self.own.inputs

    @property
    def ids(self) -> torch.Tensor:
        """[token] token ids with the example's own question."""
        return self.own.ids

    @property
    def question(self) -> NDArray[np.int64]:
        """[n] indices of the tokens of the example's own question, its images included."""
        return self.own.tokens

    @property
    def parts(self) -> tuple[Span | None, ...]:
        """A span per part of the context; None for a part that is only white space."""
        return self.own.context

    @property
    def evidence(self) -> tuple[Span, ...]:
        """A span per region of evidence; empty where the example has no evidence."""
        return self.own.evidence

    def __len__(self) -> int:
        return len(self.own)

    def weights(self, spans: Iterable[Span | None]) -> NDArray[np.float32]:
        """[token] share of each token that lies in any of the spans, with the own question."""
        return self.own.weights(spans)


@dataclass(frozen=True, eq=False)
class _Layout:
    """What is known of a prompt's text, so that another question is only a new ending.

    Attributes:
        rendered: As the template writes it, with placeholders.
        text: The same with placeholders expanded.
        ids: [token] ids of `text`.
        offsets: [token, 2] characters of each token of `text`.
        before: Number of tokens that the processor puts in front of `text`.
        anchor: A token at which the end of the text can be tokenised by itself.
        max_tokens: Longest prompt allowed; 0 for what the model's positions allow.
    """

    rendered: Rendered
    text: Rendered
    ids: NDArray[np.int64]
    offsets: NDArray[np.int64]
    before: int
    anchor: int
    max_tokens: int


def encode(
    vlm: VLM,
    example: Example,
    *,
    questions: Iterable[Sequence[Part]] = (),
    max_tokens: int = 0,
) -> Prompt:
    """A context with its questions as the model reads them, with their evidence.

    Args:
        vlm: The model.
        example: One without evidence can be encoded too.
        questions: Further questions to the same context; see `null_question` and
            `shuffled_question`.
        max_tokens: Longest prompt allowed; by default what the model's positions allow.

    Raises:
        ValueError: The template does not keep the parts in order, the processor changes the text,
            a text holds a control token that cannot be kept as text, a region has no token, or a
            prompt is too long.
    """
    rendered = render(vlm, example.parts())
    encoding, replacements = process(vlm, rendered, example)
    inputs = {name: value for name, value in encoding.items() if torch.is_tensor(value)}
    prompt = _located(vlm, example, rendered, inputs, replacements, {}, max_tokens)
    _warn(vlm, prompt)
    others = [ask(vlm, prompt, question) for question in questions]
    if not others:
        return prompt
    shared = min(prompt.shared, *(other.start for other in others))
    return dataclasses.replace(prompt, questions=(prompt.own, *others), shared=shared)


def restore(
    vlm: VLM,
    example: Example,
    inputs: Mapping[str, torch.Tensor],
    replacements: Sequence[str],
    boxes: Mapping[int, Boxes],
    max_tokens: int = 0,
) -> Prompt:
    """A prompt whose images were processed before and are not here any more.

    Args:
        vlm: The model.
        example: The same example, with any images in place of the original ones.
        inputs: Model inputs without pixels.
        replacements: See `Prompt`.
        boxes: See `Prompt`.
        max_tokens: See `encode`.

    Raises:
        ValueError: The text gives other tokens than those in `inputs`.
    """
    rendered = render(vlm, example.parts())
    return _located(vlm, example, rendered, dict(inputs), tuple(replacements), boxes, max_tokens)


def ask(vlm: VLM, prompt: Prompt, question: Sequence[Part]) -> Question:
    """Another question to the context of a prompt; only its own tokens and images are processed.

    Raises:
        ValueError: Its images are others, and those of the prompt's own question would have to go,
            or an image's tokens depend on the others (LLaVA-OneVision), the template writes the
            context differently, or the prompt becomes too long.
    """
    example = dataclasses.replace(prompt.example, question=tuple(question))
    layout, inputs = prompt._layout, dict(prompt.inputs)
    if layout is None:
        raise ValueError("the prompt was made of tokens, not of an example; encode one")
    alone = None
    replacements = prompt.replacements
    if example.images() != prompt.example.images() or example.videos() != prompt.example.videos():
        alone = _alone(vlm, prompt, example)
        inputs = {name: inputs[name] for name in inputs if name in WITHOUT_PIXELS}
        for name in GRIDS:
            if name in alone.inputs:
                grids = [each.inputs[name] for each in (prompt, alone) if name in each.inputs]
                inputs[name] = torch.cat(grids)
        replacements += alone.replacements
    rendered = render(vlm, example.parts())
    count = len(example.context)
    end = max((p.chars[1] for p in rendered.places[:count] if p.chars), default=0)
    if (
        rendered.places[:count] != layout.rendered.places[:count]
        or rendered.text[:end] != layout.rendered.text[:end]
    ):
        raise ValueError(
            f"the chat template of {vlm} writes the context differently for another question; "
            "encode the whole example"
        )
    text = expand(rendered, replacements)
    first = int(layout.offsets[layout.anchor, 0]) if layout.anchor else 0
    tail, chars = tokenize(vlm, text, first)
    ids = np.concatenate([layout.ids[: layout.anchor], tail])
    offsets = np.concatenate([layout.offsets[: layout.anchor], chars])
    known = prompt.inputs["input_ids"]
    made = torch.from_numpy(np.concatenate([known[0, : layout.before].numpy(), ids]))[None]
    inputs |= {"input_ids": made, "attention_mask": torch.ones_like(made)}
    start = layout.before + layout.anchor
    start += _common(tail, layout.ids[layout.anchor :])
    for name in TOKEN_TYPES:
        if name in inputs:
            kinds = token_types(vlm, made[:, start:])
            inputs[name] = torch.cat([prompt.inputs[name][:, :start], kinds], dim=1)
    _check_length(vlm, made.shape[1], layout.max_tokens)
    find = Finder(vlm, text, made[0], offsets, layout.before)
    tokens = find.question(example)
    context, evidence = prompt.parts, prompt.evidence
    if any(span is not None and span.tokens[-1] >= start for span in (*context, *evidence)):
        context = tuple(find.part(i, part) for i, part in enumerate(example.context))
        evidence = find.regions(example, example.evidence or (), context, prompt.boxes)
    return Question(
        parts=example.question,
        inputs=inputs,
        tokens=tokens,
        start=min(start, int(tokens[0])),
        context=context,
        evidence=evidence,
        alone=alone,
    )


def _alone(vlm: VLM, prompt: Prompt, example: Example) -> Prompt:
    """A prompt of only the question of an example, for images that the prompt does not have."""
    if any(not isinstance(part, str) for part in prompt.example.question):
        raise ValueError(
            "another question must hold the same images in the same order, or the prompt's own "
            "question none"
        )
    if tokens_depend_on_neighbours(vlm):
        raise ValueError(
            f"an image has other tokens alone than beside others in {vlm}; encode the whole example"
        )
    return encode(vlm, Example(context=(), question=example.question))


def without_pixels(prompt: Prompt) -> Prompt:
    """The prompt with blank images of one pixel: all that `ask` needs, and small.

    It has only its own question, and neither evidence nor candidates.
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
    inputs = {name: prompt.inputs[name] for name in prompt.inputs if name in WITHOUT_PIXELS}
    own = dataclasses.replace(prompt.own, parts=example.question, inputs=inputs, evidence=())
    return dataclasses.replace(prompt, example=example, questions=(own,), candidates={})


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


def _located(
    vlm: VLM,
    example: Example,
    rendered: Rendered,
    inputs: dict[str, torch.Tensor],
    replacements: tuple[str, ...],
    boxes: Mapping[int, Boxes],
    max_tokens: int,
) -> Prompt:
    """A prompt with only its own question, everything in it found."""
    text = expand(rendered, replacements)
    ids, offsets = tokenize(vlm, text)
    _check_length(vlm, inputs["input_ids"].shape[1], max_tokens)
    inputs, before = keep_as_text(vlm, text, ids, inputs)
    made = inputs["input_ids"][0]
    find = Finder(vlm, text, made, offsets, before)
    tokens = find.question(example)
    parts = tuple(find.part(i, part) for i, part in enumerate(example.context))
    boxes = dict(boxes) or find.boxes(example, inputs, parts, replacements)
    regions = {"": example.evidence or (), **example.candidates}
    spans = {kind: find.regions(example, of, parts, boxes) for kind, of in regions.items()}
    own = Question(
        parts=example.question,
        inputs=inputs,
        tokens=tokens,
        start=int(tokens[0]),
        context=parts,
        evidence=spans.pop(""),
    )
    end = max((p.chars[1] for p in text.places[: len(parts)] if p.chars), default=0)
    anchor = _anchor(vlm, text, ids, offsets, end)
    return Prompt(
        example=example,
        questions=(own,),
        shared=own.start,
        candidates=spans,
        boxes=boxes,
        replacements=replacements,
        _layout=_Layout(rendered, text, ids, offsets, before, anchor, max_tokens),
    )


def _anchor(
    vlm: VLM, text: Rendered, ids: NDArray[np.int64], offsets: NDArray[np.int64], end: int
) -> int:
    """The last special token that ends at a character or before; 0 if there is none.

    From there on, the text must give the same tokens as in the whole.
    """
    special = np.isin(ids, vlm.tokenizer.all_special_ids) & (offsets[:, 1] <= end)
    token = int(np.flatnonzero(special)[-1]) if special.any() else 0
    if token and np.array_equal(tokenize(vlm, text, int(offsets[token, 0]))[0], ids[token:]):
        return token
    return 0


def _common(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    """Number of first tokens that two arrays share."""
    shortest = min(len(a), len(b))
    different = np.flatnonzero(a[:shortest] != b[:shortest])
    return int(different[0]) if len(different) else shortest


def _check_length(vlm: VLM, tokens: int, max_tokens: int) -> None:
    allowed = max_tokens or vlm.positions
    if allowed and tokens > allowed:
        raise ValueError(
            f"the prompt has {tokens} tokens, {vlm} takes {allowed}; a "
            "cut-off context could lack its evidence: give a shorter one, or set max_tokens"
        )


def _warn(vlm: VLM, prompt: Prompt) -> None:
    """Warn of regions that cover almost nothing, and of words that the model does not know."""
    kinds = {"evidence": prompt.evidence, **prompt.candidates}
    for kind, spans in kinds.items():
        covered = [float(span.weights.sum()) for span in spans]
        if covered and min(covered) < LITTLE:
            which = covered.index(min(covered))
            warnings.warn(
                f"region {which} of the {kind} covers only {covered[which]:.2g} tokens; boxes are "
                "in pixels of the image, not in shares of its size",
                stacklevel=3,
            )
    texts = [span.tokens for span in prompt.parts if span is not None]
    ids = prompt.ids[np.concatenate([*texts, prompt.question])]
    unknown = vlm.unknown(ids[~vlm.is_visual(ids)])
    if len(unknown) and unknown.mean() > 0.5:
        warnings.warn(
            f"{unknown.sum()} of the {len(unknown)} words of a prompt are unknown to the "
            f"tokenizer of {vlm}; its answers and scores say little about this text",
            stacklevel=3,
        )
