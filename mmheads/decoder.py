"""What a model hands to its language model: embedded text and images, positions and masks.

It is caught on its way in, so that vision runs once and every family is treated alike. A keyword
or a kind of mask that is not known here is refused by name: a part of it could be needed for every
later question.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from mmheads import compat
from mmheads.families import PER_TOKEN, embed, has_known_masks, positions
from mmheads.models import VLM

_INPUTS = {
    *("input_ids", "inputs_embeds", "position_ids", "attention_mask"),
    *("visual_pos_masks", "deepstack_visual_embeds", *PER_TOKEN),
}

_HARMLESS = {
    *("past_key_values", "cache", "use_cache", "return_dict"),
    *("output_attentions", "output_hidden_states", "output_router_logits", "logits_to_keep"),
}
"""Decoder keywords that do not change what a token is or sees."""


_LOCAL = ("sliding", "chunked")
"""Kinds of layers whose tokens see only some of those before them."""


class _CaughtError(Exception):
    """Ends a forward call once the decoder's inputs are known."""


PIECE = 1024
"""Tokens of a context that run at once where their mask is made row by row."""


@dataclass(frozen=True, eq=False)
class Blocks:
    """A mask in which the tokens of an image see each other, made for the rows that run.

    A whole one is [token, token]: a gigabyte at 32K tokens.

    Attributes:
        images: [token] the number of the image that a token belongs to; -1 for a word.
        window: How many tokens, itself among them, a token sees; 0 for all before it.
        added: The mask is added to scores, in this precision; None for one of bool.
    """

    images: torch.Tensor
    window: int
    added: torch.dtype | None

    def rows(self, first: int, last: int) -> torch.Tensor:
        """[1, 1, row, key] what the tokens from `first` to `last` see of those up to `last`."""
        keys = torch.arange(last, device=self.images.device)
        tokens, images = keys[first:, None], self.images[first:last, None]
        seen = (keys <= tokens) | ((images >= 0) & (images == self.images[:last]))
        if self.window:
            seen &= keys > tokens - self.window
        if self.added is not None:
            least = torch.finfo(self.added).min
            return torch.where(seen, 0.0, least).to(self.added)[None, None]
        return seen[None, None]

    def closed_at(self, length: int) -> bool:
        """As `DecoderInputs.closed_at`: no image lies on both sides."""
        before, after = self.images[:length][-1:], self.images[length:][:1]
        return not bool(((before == after) & (after >= 0)).any())


Mask = torch.Tensor | Blocks | None


@dataclass(frozen=True, eq=False)
class DecoderInputs:
    """What a decoder gets for one prompt.

    Attributes:
        embeddings: [1, token, channel].
        positions: [..., 1, token]; None where the decoder counts for itself.
        masks: By kind of layer ("" where there is one mask for all), [1, 1 or head, token, token]
            as bool or numbers to add, or what makes their rows, or None for a causal one; empty
            where the decoder makes its masks.
        visual: [token] whether it is a piece of an image or of a video.
        deepstack: [visual token, channel] for each of the first layers.
        per_token: Further inputs [1, token, ...] by name.
    """

    embeddings: torch.Tensor
    positions: torch.Tensor | None
    masks: Mapping[str, Mask]
    visual: torch.Tensor
    deepstack: tuple[torch.Tensor, ...]
    per_token: Mapping[str, torch.Tensor]

    def __len__(self) -> int:
        return len(self.visual)

    @property
    def masked(self) -> bool:
        """Whether the model makes masks itself: image tokens may see later ones."""
        return any(mask is not None for mask in self.masks.values())

    def call(self, first: int, last: int) -> dict[str, Any]:
        """Decoder arguments for the tokens from `first` to `last`, after those before them."""
        arguments: dict[str, Any] = {"inputs_embeds": self.embeddings[:, first:last]}
        if self.positions is not None:
            arguments["position_ids"] = self.positions[..., first:last]
        if self.masked:
            masks = {kind: self._mask(mask, first, last) for kind, mask in self.masks.items()}
            arguments["attention_mask"] = masks.get("", masks)
        if self.deepstack and self.visual[first:last].any():
            arguments["visual_pos_masks"] = self.visual[None, first:last]
            rows = slice(int(self.visual[:first].sum()), int(self.visual[:last].sum()))
            arguments["deepstack_visual_embeds"] = [layer[rows] for layer in self.deepstack]
        for name, value in self.per_token.items():
            arguments[name] = value[:, first:last]
        return arguments

    def pieces(self, length: int) -> Iterator[tuple[int, int]]:
        """Tokens of a context that run at once, as (first, last).

        They are all of them, but where masks are made row by row. No image is cut.
        """
        blocks = next((mask for mask in self.masks.values() if isinstance(mask, Blocks)), None)
        first, step = 0, PIECE if blocks else length
        while first < length:
            last = min(first + step, length)
            while blocks and last < length and not blocks.closed_at(last):
                last += 1
            yield first, last
            first = last

    def _mask(self, mask: Mask, first: int, last: int) -> torch.Tensor | None:
        if isinstance(mask, Blocks):
            return mask.rows(first, last)
        if mask is not None:
            return mask[..., first:last, :last]
        if not first:
            return None
        causal = torch.ones(last - first, last, dtype=torch.bool, device=self.visual.device)
        return causal.tril(first)[None, None]

    def closed_at(self, length: int) -> bool:
        """Whether the first tokens see none of the others, and later words all that is before.

        Only then does a cache of the first tokens serve other questions.
        """
        keys = torch.arange(len(self), device=self.visual.device)
        words = keys[length:][~self.visual[length:]]
        for kind, mask in self.masks.items():
            if mask is None:
                continue
            if isinstance(mask, Blocks):
                if not mask.closed_at(length):
                    return False
                continue
            seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            rows = seen[..., words, :]
            if seen[..., :length, length:].any() or (rows & (keys > words[:, None])).any():
                return False
            if not kind.startswith(_LOCAL) and (rows.sum(-1) != words + 1).any():
                return False
        return True

    def without_pixels_from(self, first: int, vlm: VLM, ids: torch.Tensor) -> DecoderInputs:
        """The same with images from a token on left out, their placeholders embedded as words."""
        later = torch.arange(len(self), device=self.visual.device) >= first
        words = embed(vlm, ids)["inputs_embeds"].to(self.embeddings)
        blank = (later & self.visual)[None, :, None]
        kept = int(self.visual[:first].sum())
        return replace(
            self,
            embeddings=torch.where(blank, words, self.embeddings),
            visual=self.visual & ~later,
            deepstack=tuple(layer[:kept] for layer in self.deepstack),
        )


def catch(vlm: VLM, inputs: Mapping[str, torch.Tensor]) -> DecoderInputs:
    """Start a forward call of the model and keep what it hands to its decoder.

    Args:
        vlm: The model.
        inputs: Model inputs of one prompt.

    Raises:
        ValueError: The decoder takes a keyword, or a kind of mask, that is not known here.
    """
    caught: dict[str, Any] = {}

    def stop(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.update(kwargs, **({"positional arguments": args} if args else {}))
        raise _CaughtError

    visual = torch.from_numpy(vlm.is_visual(inputs["input_ids"][0])).to(vlm.device)
    given: dict[str, Any] = on_device(vlm, inputs)
    if known := has_known_masks(vlm):
        given["attention_mask"] = _known_masks(vlm, visual)
    handle = vlm.decoder.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            vlm.model(**given, use_cache=False)
    except _CaughtError:
        pass
    finally:
        handle.remove()
    named = {name for name, value in caught.items() if value is not None and value is not False}
    if unknown := sorted(named - _INPUTS - _HARMLESS):
        raise ValueError(
            f"the decoder of {vlm.family} takes {', '.join(unknown)}, which is not known here; "
            "prompts of this family cannot be cut into a context and its questions"
        )
    if caught.get("inputs_embeds") is None:
        caught |= embed(vlm, caught["input_ids"][0])
    embeddings = caught["inputs_embeds"]
    mask: Any = caught.get("attention_mask")
    return DecoderInputs(
        embeddings,
        caught.get("position_ids"),
        mask if known else _masks(vlm, mask, len(visual)),
        visual.to(embeddings.device),
        tuple(caught.get("deepstack_visual_embeds") or ()),
        {name: caught[name] for name in PER_TOKEN if caught.get(name) is not None},
    )


def _known_masks(vlm: VLM, visual: torch.Tensor) -> dict[str, Mask]:
    """Masks by kind of layer, for a family that `has_known_masks`.

    Args:
        vlm: The model.
        visual: [token] as in `DecoderInputs`.
    """
    starts = visual & ~torch.cat([visual.new_zeros(1), visual[:-1]])
    images = torch.where(visual, starts.cumsum(0), -1)
    eager = compat.attention_name(vlm.text_config) == "eager"
    added = vlm.model.dtype if eager else None
    window = vlm.text_config.sliding_window
    plain = not eager and not visual.any()
    return {
        "full_attention": None if plain else Blocks(images, 0, added),
        "sliding_attention": (
            None if plain and len(visual) <= window else Blocks(images, window, added)
        ),
    }


def _masks(vlm: VLM, mask: Any, tokens: int) -> dict[str, Mask]:
    """Masks by kind of layer; a mask of padding that hides nothing is left to the decoder."""
    masks: dict[str, Any] = dict(mask) if isinstance(mask, Mapping) else {"": mask}
    for kind, each in masks.items():
        name = f"mask of {kind.replace('_', ' ')}" if kind else "mask"
        if each is None:
            continue
        if not torch.is_tensor(each):
            raise ValueError(
                f"the decoder of {vlm.family} gets a {name} of the kind {type(each).__name__}; "
                "expected a tensor [1, 1, token, token]: run the model on the attention 'sdpa' or "
                "'eager'"
            )
        if each.ndim == 2 and bool(each.all()):
            masks[kind] = None
        elif each.ndim != 4 or each.shape[-2:] != (tokens, tokens):
            raise ValueError(
                f"the decoder of {vlm.family} gets a {name} of shape {tuple(each.shape)} for "
                f"{tokens} tokens; expected [1, 1, {tokens}, {tokens}]"
            )
    return masks


def check_words(
    vlm: VLM, prompt: Mapping[str, torch.Tensor], inputs: DecoderInputs, first: int
) -> None:
    """Raise ValueError if what is made here of a question's words is not what the model makes.

    Args:
        vlm: The model.
        prompt: The model inputs that `inputs` were caught from.
        inputs: What the model itself gives to its decoder.
        first: The question's first token.
    """
    words = ~inputs.visual[first:]
    made = embed(vlm, prompt["input_ids"][0, first:])
    caught = {"inputs_embeds": inputs.embeddings, **inputs.per_token}
    wrong = [
        name
        for name in caught.keys() | made.keys()
        if name not in caught
        or name not in made
        or not torch.equal(caught[name][:, first:][:, words], made[name][:, words])
    ]
    if inputs.positions is not None:
        counted = positions(vlm, prompt)
        if not torch.equal(inputs.positions[..., first:], counted[..., first:]):
            wrong.append("position_ids")
    if wrong:
        raise ValueError(
            f"the model {vlm.family} makes {', '.join(sorted(wrong))} in a way that is not known "
            "here; other questions to the same context would be wrong"
        )


def on_device(vlm: VLM, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Model inputs on the model's device, images in its precision."""
    return {
        name: value.to(vlm.device, vlm.model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }
