"""Run a context once, then ask several questions from its cache."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

from mmheads import compat
from mmheads.attention import record_keys, record_mass, stop_after
from mmheads.decoder import DecoderInputs, catch, check_words
from mmheads.decoder import on_device as on_device
from mmheads.families import PER_TOKEN, REFUSED, embed, positions
from mmheads.heads import HeadSet
from mmheads.models import VLM
from mmheads.prompts import Prompt, Question
from mmheads.streaming import cache_bytes


@dataclass(frozen=True, eq=False)
class Attention:
    """Where a question's tokens look, in every head.

    Attributes:
        mass: [layer, head, question token, span] attention to each span, float32; 0 in layers
            without heads.
        entropy: [layer, head, question token] entropy in nats of the attention among the text
            tokens that were given; 0 if none were.
        norm: [layer, head, question token] Euclidean norm of the head's output.
    """

    mass: torch.Tensor
    entropy: torch.Tensor
    norm: torch.Tensor


@dataclass(frozen=True, eq=False)
class Prefix:
    """A context in a model's cache, for the questions of a prompt and later ones.

    Attributes:
        vlm: The model.
        prompt: The prompt whose context it is.
        length: Tokens in the cache.
        cache: Keys and values of the context; not changed by what is asked. It may lie on another
            device. None where a cached context would be inexact, because context tokens see the
            question (prefix language models, images that see each other): each question then runs
            the whole prompt.
        masked: The model makes masks by itself: the tokens of an image see each other both ways.
    """

    vlm: VLM
    prompt: Prompt
    length: int
    cache: DynamicCache | None
    masked: bool
    _inputs: DecoderInputs | None = None
    """What the decoder gets for the prompt's own question; None if it is forgotten."""

    @property
    def has_states(self) -> bool:
        """Whether layers keep a state after the context's last token, which cannot be cut."""
        return self.cache is not None and compat.has_states(self.cache)

    @property
    def bytes(self) -> int:
        """Size of the cache."""
        return cache_bytes(self.cache) if self.cache else 0

    def alone(self, prompt: Prompt, device: str = "") -> Prefix:
        """The context without the prompt's own question, its cache on a device.

        Args:
            prompt: The same as `self.prompt`, perhaps `without_pixels`.
            device: By default where the model is.

        Raises:
            ValueError: The context is not cached, as the model has to see it with each question.
        """
        if self.cache is None:
            raise ValueError(
                f"in {self.vlm} ({self.vlm.family}), tokens of the context see the question, so "
                "that a context cannot be kept for later questions; use a model with causal "
                "attention to rank documents"
            )
        return Prefix(self.vlm, prompt, self.length, self._copy(self.length, device), self.masked)

    def start(self, question: Question) -> int:
        """How many tokens of the cache a question goes on from: `length`, or a few less.

        Raises:
            ValueError: The question is one to another context, or it needs fewer tokens of it than
                the states of recurrent layers have seen.
        """
        start = min(self.length, question.start)
        if start < self.length and self.has_states:
            raise ValueError(
                f"the question {question.parts!r} shares a token with what is before it, and "
                f"layers of {self.vlm} ({self.vlm.family}) keep a state that cannot be cut to the "
                "tokens before; end the context's text with a line break, or encode the question "
                "with the context"
            )
        if not torch.equal(question.ids[:start], self.prompt.ids[:start]) or (
            start < self.length and self.vlm.is_visual(self.prompt.ids[start : self.length]).any()
        ):
            raise ValueError("a prompt must begin with the context that is in the cache")
        return start

    def attention(
        self,
        question: Question,
        spans: Sequence[NDArray[np.float32]],
        *,
        text: NDArray[np.bool_] | None = None,
        pixels: bool = True,
    ) -> Attention:
        """Where the tokens of a question look.

        Args:
            question: One of the prompt's, or one that `ask` made of it.
            spans: For each span, [token] the share of each token that belongs to it.
            text: [token] the tokens among which the entropy is taken; None for no entropy.
            pixels: Feed the images of the question; without, their placeholders stay empty, as in
                the authors' code of paper A.
        """
        layers = self.vlm.geometry.layers
        first, run = self._ready(question, pixels)
        rows = torch.from_numpy(question.tokens - first)[None]
        weights = torch.from_numpy(np.stack(spans, axis=-1))[None]
        among = None if text is None else torch.from_numpy(text)[None]
        with record_mass(self.vlm, rows, weights, text=among) as recording:
            run()
        return Attention(
            recording.mass(layers)[0], recording.entropy(layers)[0], recording.norm(layers)[0]
        )

    def keys(
        self, question: Question, heads: HeadSet, *, pixels: bool = True
    ) -> NDArray[np.float32]:
        """[head, token] mean attention of a question's tokens to each token of the cache.

        Only the layers up to the deepest of the heads run.

        Args:
            question: As in `attention`.
            heads: Of this model; the result has their order.
            pixels: As in `attention`.
        """
        first, run = self._ready(question, pixels)
        rows = torch.from_numpy(question.tokens - first)
        means = record_keys(self.vlm, rows, heads, run)[:, : self.length].numpy()
        missing = self.length - means.shape[1]
        padded: NDArray[np.float32] = np.pad(means, [(0, 0), (0, max(0, missing))])
        return padded

    def context(self) -> dict[str, Any]:
        """Decoder arguments of the context, with positions."""
        assert self._inputs is not None
        return self._placed(self._inputs.call(0, self.length), 0)

    def _placed(self, arguments: dict[str, Any], first: int) -> dict[str, Any]:
        """Decoder arguments with positions, counted where the decoder counts for itself."""
        if "position_ids" in arguments:
            return arguments
        last = first + arguments["inputs_embeds"].shape[1]
        return {
            **arguments,
            "position_ids": torch.arange(first, last, device=self.vlm.device)[None],
        }

    @torch.no_grad()
    def ready(self, question: Question, pixels: bool) -> tuple[int, dict[str, Any]]:
        """The first token of the prompt that has to run, and decoder arguments from there."""
        first = self.start(question)
        if self.cache is None:
            return 0, self._whole(question, pixels)
        if question is self.prompt.own and self._inputs is not None and pixels:
            return first, self._placed(self._inputs.call(first, len(question)), first)
        if self.masked and pixels and self._visual(question)[first:].any():
            inputs = self._caught(question)
            first = first if inputs.closed_at(first) else 0
            return first, inputs.call(first, len(question))
        return first, self._other(question, first, pixels)

    def _ready(self, question: Question, pixels: bool) -> tuple[int, Callable[[], None]]:
        """The first token of the prompt that has to run, and a function that runs from there."""
        first, arguments = self.ready(question, pixels)

        def run() -> None:
            cache = self._copy(first) if first else compat.empty_cache(self.vlm.text_config)
            with torch.no_grad():
                self.vlm.decoder(**arguments, **compat.continuing(self.vlm.decoder, cache))

        return first, run

    def _visual(self, question: Question) -> torch.Tensor:
        return torch.from_numpy(self.vlm.is_visual(question.ids)).to(self.vlm.device)

    def _caught(self, question: Question) -> DecoderInputs:
        """What the model hands to its decoder for the whole prompt with a question."""
        if question is self.prompt.own and self._inputs is not None:
            return self._inputs
        lacking = question.alone is not None or self._inputs is None
        if lacking and self._visual(question).any():
            raise ValueError(
                f"images in a question to {self.vlm} need the context's images too, which were "
                "not kept; ask in words"
            )
        return catch(self.vlm, question.inputs)

    def _whole(self, question: Question, pixels: bool) -> dict[str, Any]:
        """Decoder arguments of the whole prompt with a question."""
        inputs = self._caught(question)
        if not pixels:
            first = int(question.tokens[0])
            inputs = inputs.without_pixels_from(first, self.vlm, question.ids)
        return inputs.call(0, len(question))

    def _other(self, question: Question, first: int, pixels: bool) -> dict[str, Any]:
        """Decoder arguments of what follows the cache, made here."""
        arguments: dict[str, Any] = embed(self.vlm, question.ids[first:])
        visual = self._visual(question)[first:]
        if pixels and visual.any():
            shown = self._images(question)
            arguments["inputs_embeds"][0, visual] = shown.embeddings[0, shown.visual]
            for name, value in shown.per_token.items():
                arguments[name][0, visual] = value[0, shown.visual]
            if shown.deepstack:
                arguments["visual_pos_masks"] = visual[None]
                arguments["deepstack_visual_embeds"] = list(shown.deepstack)
        if self._inputs is None or visual.any():
            arguments["position_ids"] = positions(self.vlm, question.inputs)[..., first:]
        elif (known := self._inputs.positions) is not None:
            # words are counted one by one, as `check_words` finds in the prompt's own question
            steps = torch.arange(len(question) - first, device=known.device)
            arguments["position_ids"] = known[..., first : first + 1] + steps
        return self._placed(arguments, first)

    def _images(self, question: Question) -> DecoderInputs:
        """The images of a question, embedded."""
        if question.alone is not None:
            return catch(self.vlm, question.alone.inputs)
        known = self._inputs
        if known is None:
            raise ValueError("the images of the prompt's own question were not kept")
        kept = known.call(self.length, len(known))
        return DecoderInputs(
            kept["inputs_embeds"],
            None,
            {},
            known.visual[self.length :],
            tuple(kept.get("deepstack_visual_embeds", ())),
            {name: kept[name] for name in PER_TOKEN if name in kept},
        )

    def _copy(self, length: int, device: str = "") -> DynamicCache:
        """The first tokens of the cache, by default where the model is."""
        assert self.cache is not None
        kept = copy.copy(self.cache)
        layers: list[Any] = self.cache.layers
        kept.layers = [
            compat.cut_layer(layer, length, device or self.vlm.device_of(number))
            for number, layer in enumerate(layers)
        ]
        return kept


def is_causal(vlm: VLM) -> bool:
    """Whether no token sees a later one, but for what masks of the model say."""
    return all(getattr(module, "is_causal", True) for module in vlm.attentions.values())


@torch.no_grad()
def open_context(vlm: VLM, prompt: Prompt) -> Prefix:
    """A context whose cache is empty until `fill` runs it, or None where it would be inexact.

    Args:
        vlm: The model.
        prompt: From `encode`, with all questions whose context should be the same.

    Raises:
        ValueError: A family of `REFUSED`, or whose decoder takes inputs that are not known here.
    """
    if reason := REFUSED.get(vlm.family):
        raise ValueError(f"models of the family {vlm.family} are refused: {reason}")
    length = prompt.shared
    inputs = catch(vlm, prompt.inputs)
    if not is_causal(vlm) or not inputs.closed_at(length):
        return Prefix(vlm, prompt, length, None, inputs.masked, inputs)
    check_words(vlm, prompt.inputs, inputs, length)
    cache = compat.empty_cache(vlm.text_config)
    return Prefix(vlm, prompt, length, cache, inputs.masked, inputs)


def prefill(vlm: VLM, prompt: Prompt, *, layers: int = 0) -> Prefix:
    """Run the context of a prompt once.

    Args:
        vlm: The model.
        prompt: From `encode`, with all questions whose context should be the same.
        layers: Run only the first ones, and those up to the next with heads; by default all.

    Raises:
        ValueError: As `open_context` does.
    """
    return fill(open_context(vlm, prompt), layers=layers)


def fill(prefix: Prefix, *, layers: int = 0) -> Prefix:
    """Run the context of a prefix that `open_context` made; see `prefill`."""
    vlm, length = prefix.vlm, prefix.length
    if prefix.cache is None or not length:
        return prefix
    assert prefix._inputs is not None
    deepest = next((layer for layer in vlm.attentions if layer >= layers - 1), vlm.geometry.layers)

    def run(arguments: dict[str, Any]) -> None:
        with torch.no_grad():
            vlm.decoder(**arguments, **compat.continuing(vlm.decoder, prefix.cache))

    for first, last in prefix._inputs.pieces(length):
        piece = partial(run, prefix._inputs.call(first, last))
        if layers and deepest < vlm.geometry.layers - 1:
            stop_after(vlm, {deepest: lambda call: call.query}, piece)
        else:
            piece()
    return prefix
