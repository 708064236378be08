"""Several prompts, each with several questions, in two passes of the model.

The contexts run in one batch, padded on the right, where causal attention sees no padding. The
questions of a prompt then stand one after the other in one row, and a mask lets each see only the
context and itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import pad
from transformers import DynamicCache

from mmheads import compat
from mmheads.attention import record_mass, stop_after
from mmheads.families import PER_TOKEN
from mmheads.models import VLM
from mmheads.prefix import Attention, Prefix, fill, is_causal, open_context, prefill
from mmheads.prompts import Prompt, Question


@dataclass(frozen=True, eq=False)
class Asked:
    """A question, and what is recorded of it: see `Prefix.attention`."""

    question: Question
    spans: Sequence[NDArray[np.float32]]
    text: NDArray[np.bool_] | None = None
    pixels: bool = True


@torch.no_grad()
def ask_all(
    vlm: VLM, prompts: Sequence[Prompt], asked: Sequence[Sequence[Asked]]
) -> list[list[Attention]]:
    """Where the tokens of all questions look -> attention by prompt and question.

    Each is the same as when it is asked alone, but for rounding. Families with masks of their own,
    or with layers that do not see all keys, run one prompt and one question at a time.

    Args:
        vlm: The model.
        prompts: From `encode`.
        asked: For each prompt, its questions.

    Raises:
        ValueError: As `prefill` does, and where an attention is not finite.
    """
    if not _one_mask(vlm) or not all(prompt.shared for prompt in prompts):
        return [_alone(prefill(vlm, prompt), of) for prompt, of in zip(prompts, asked, strict=True)]
    prefixes = [open_context(vlm, prompt) for prompt in prompts]
    if any(prefix.masked for prefix in prefixes):
        return [_alone(fill(prefix), of) for prefix, of in zip(prefixes, asked, strict=True)]
    cache, longest = DynamicCache(), max(prompt.shared for prompt in prompts)
    contexts = _batch([prefix.context() for prefix in prefixes], longest)

    def run() -> None:
        vlm.decoder(**contexts, **compat.continuing(vlm.decoder, cache))

    stop_after(vlm, {max(vlm.attentions): lambda call: call.query}, run)
    rows = [
        _one_row([prefix.ready(each.question, each.pixels)[1] for each in of])
        for prefix, of in zip(prefixes, asked, strict=True)
    ]
    width = max(row["inputs_embeds"].shape[1] for row in rows)
    layout = _Layout(longest, width, [prompt.shared for prompt in prompts], asked)
    questions = _batch(rows, width) | {"attention_mask": layout.mask().to(vlm.device)}
    with record_mass(vlm, layout.rows(), layout.weights(), text=layout.text()) as recording:
        vlm.decoder(**questions, **compat.continuing(vlm.decoder, cache))
    layers = vlm.geometry.layers
    recorded = recording.mass(layers), recording.entropy(layers), recording.norm(layers)
    return layout.split(*recorded)


def _one_mask(vlm: VLM) -> bool:
    """Whether all layers of a model see all earlier tokens, so that one mask serves them."""
    whole = vlm.geometry.global_layers is None and is_causal(vlm)
    return whole and compat.attention_name(vlm.text_config) == "sdpa"


def _alone(prefix: Prefix, asked: Sequence[Asked]) -> list[Attention]:
    return [
        prefix.attention(each.question, each.spans, text=each.text, pixels=each.pixels)
        for each in asked
    ]


def _one_row(calls: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Decoder arguments of several questions, one after the other."""
    row = {
        name: torch.cat([call[name] for call in calls], dim=1)
        for name in ("inputs_embeds", *PER_TOKEN)
        if name in calls[0]
    }
    row["position_ids"] = torch.cat(_positions(calls), dim=-1)
    return row | _images(calls, [call["inputs_embeds"].shape[1] for call in calls], dim=1)


def _batch(calls: Sequence[dict[str, Any]], width: int) -> dict[str, Any]:
    """Decoder arguments of several prompts as one batch, padded on the right."""

    def padded(call: dict[str, Any], name: str) -> torch.Tensor:
        value: torch.Tensor = call[name]
        return pad(value, (0, 0) * (value.ndim - 2) + (0, width - value.shape[1]))

    batch = {
        name: torch.cat([padded(call, name) for call in calls])
        for name in ("inputs_embeds", *PER_TOKEN)
        if name in calls[0]
    }
    places = [pad(each, (0, width - each.shape[-1])) for each in _positions(calls)]
    batch["position_ids"] = torch.cat(places, dim=-2)
    return batch | _images(calls, [width] * len(calls), dim=0)


def _positions(calls: Sequence[dict[str, Any]]) -> list[torch.Tensor]:
    """Positions of several calls; those of only words become as many as images have."""
    places: list[torch.Tensor] = [call["position_ids"] for call in calls]
    most = max(places, key=torch.Tensor.dim)
    return [each if each.ndim == most.ndim else each.expand(len(most), -1, -1) for each in places]


def _images(calls: Sequence[dict[str, Any]], widths: Sequence[int], dim: int) -> dict[str, Any]:
    """Image features of several calls that the first layers add, if there are any."""
    given = [call["deepstack_visual_embeds"] for call in calls if "visual_pos_masks" in call]
    if not given:
        return {}
    device = calls[0]["inputs_embeds"].device
    none = torch.zeros(1, 0, dtype=torch.bool, device=device)
    masks = [call.get("visual_pos_masks", none) for call in calls]
    masks = [pad(mask, (0, n - mask.shape[1])) for mask, n in zip(masks, widths, strict=True)]
    return {
        "visual_pos_masks": torch.cat(masks, dim=dim),
        "deepstack_visual_embeds": [torch.cat(layer) for layer in zip(*given, strict=True)],
    }


@dataclass(frozen=True, eq=False)
class _Layout:
    """Where the tokens of contexts and questions lie among the keys of a batch.

    Attributes:
        longest: Keys of the longest context; shorter ones are padded behind.
        width: Tokens of the longest row of questions.
        shared: By prompt, the number of tokens of its context.
        asked: By prompt, its questions.
    """

    longest: int
    width: int
    shared: Sequence[int]
    asked: Sequence[Sequence[Asked]]

    def _questions(self, prompt: int) -> list[tuple[Asked, slice]]:
        """The questions of a prompt, and their places in its row."""
        of, at = [], 0
        for each in self.asked[prompt]:
            end = at + len(each.question) - self.shared[prompt]
            of.append((each, slice(at, end)))
            at = end
        return of

    def mask(self) -> torch.Tensor:
        """[prompt, 1, token, key] bool, what each token of a row of questions sees."""
        seen = torch.zeros(len(self.asked), 1, self.width, self.longest + self.width).bool()
        seen[..., 0] = True  # padding sees something, else it would not be finite
        for prompt, shared in enumerate(self.shared):
            for _, at in self._questions(prompt):
                count = at.stop - at.start
                seen[prompt, 0, at, :shared] = True
                itself = torch.ones(count, count, dtype=torch.bool).tril()
                seen[prompt, 0, at, self.longest + at.start : self.longest + at.stop] = itself
        return seen

    def rows(self) -> torch.Tensor:
        """[prompt, row] the tokens of questions that are recorded; -1 is padding."""
        rows = [
            torch.cat(
                [
                    torch.from_numpy(each.question.tokens) - shared + at.start
                    for each, at in self._questions(prompt)
                ]
            )
            for prompt, shared in enumerate(self.shared)
        ]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)

    def _keys(self, prompt: int, at: slice, values: NDArray[Any]) -> NDArray[Any]:
        """[key, ...] values of the tokens of a question, whose place is `at`."""
        keys = np.zeros((self.longest + self.width, *values.shape[1:]), values.dtype)
        shared = self.shared[prompt]
        keys[:shared] = values[:shared]
        keys[self.longest + at.start : self.longest + at.stop] = values[shared:]
        return keys

    def weights(self) -> torch.Tensor:
        """[prompt, key, span] shares of keys, the spans of all questions."""
        weights = [
            [
                self._keys(prompt, at, np.stack(each.spans, axis=-1))
                for each, at in self._questions(prompt)
            ]
            for prompt in range(len(self.asked))
        ]
        return torch.from_numpy(np.stack([np.concatenate(each, axis=-1) for each in weights]))

    def text(self) -> torch.Tensor:
        """[prompt, key] the keys of the entropy, those of the question that asks for it."""
        text = np.zeros((len(self.asked), self.longest + self.width), dtype=bool)
        for prompt in range(len(self.asked)):
            for each, at in self._questions(prompt):
                if each.text is not None:
                    text[prompt] |= self._keys(prompt, at, each.text)
        return torch.from_numpy(text)

    def split(
        self, mass: torch.Tensor, entropy: torch.Tensor, norm: torch.Tensor
    ) -> list[list[Attention]]:
        """What was recorded, by prompt and question."""
        attention: list[list[Attention]] = []
        for prompt, asked in enumerate(self.asked):
            row, span = 0, 0
            attention.append([])
            for each in asked:
                of = slice(row, row + len(each.question.tokens))
                spans = slice(span, span + len(each.spans))
                row, span = of.stop, spans.stop
                attention[-1].append(
                    Attention(
                        mass[prompt, :, :, of, spans],
                        entropy[prompt, :, :, of],
                        norm[prompt, :, :, of],
                    )
                )
        return attention
