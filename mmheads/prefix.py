"""Run a context once, then several questions from its cache.

The language model's own inputs are caught on their way in (embedded text and images, positions,
masks), so that vision runs once and every family is treated alike.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from mmheads.attention import up_to
from mmheads.examples import Example
from mmheads.models import VLM
from mmheads.prompts import GRIDS, Prompt, common_prefix, encode
from mmheads.streaming import cache_bytes

_KNOWN = {
    *("input_ids", "inputs_embeds", "position_ids", "attention_mask", "past_key_values"),
    *("use_cache", "return_dict", "visual_pos_masks", "deepstack_visual_embeds"),
}


class _CaughtError(Exception):
    """Ends a forward call once its inputs are known."""


@dataclass(eq=False)
class _Inputs:
    """What the decoder gets: a batch of one.

    Attributes:
        embeddings: [1, token, channel].
        positions: [..., 1, token]; None where the decoder counts for itself.
        masks: By kind of layer, [1, 1, token, token]; empty where the decoder makes them.
        visual: [token] bool.
        deepstack: [visual token, channel] for each of the first layers.
    """

    embeddings: torch.Tensor
    positions: torch.Tensor | None
    masks: dict[str, torch.Tensor]
    visual: torch.Tensor
    deepstack: list[torch.Tensor]

    def call(self, first: int, last: int) -> dict[str, Any]:
        """Arguments for the tokens from `first` to `last`, after those before them."""
        arguments: dict[str, Any] = {"inputs_embeds": self.embeddings[:, first:last]}
        if self.positions is not None:
            arguments["position_ids"] = self.positions[..., first:last]
        if self.masks:
            arguments["attention_mask"] = {
                kind: mask[..., first:last, :last] for kind, mask in self.masks.items()
            }
        if self.deepstack and self.visual[first:last].any():
            arguments["visual_pos_masks"] = self.visual[None, first:last]
            rows = slice(int(self.visual[:first].sum()), int(self.visual[:last].sum()))
            arguments["deepstack_visual_embeds"] = [layer[rows] for layer in self.deepstack]
        return arguments


@dataclass(eq=False)
class Prefix:
    """A context in the cache of a model, for prompts that begin alike.

    Attributes:
        vlm: The model.
        prompt: The prompt that was run first.
        length: Tokens in the cache.
        cache: Keys and values; not changed by what is asked. It may lie on another device.
        masked: The model makes masks by itself: the tokens of an image see each other both ways.
    """

    vlm: VLM
    prompt: Prompt
    length: int
    cache: DynamicCache
    masked: bool
    _tail: Mapping[str, Any] = field(default_factory=dict)
    """Decoder arguments of the first prompt behind the context; empty if they are forgotten."""

    @property
    def bytes(self) -> int:
        """Size of the cache."""
        return cache_bytes(self.cache)

    def alone(self, prompt: Prompt, device: str = "") -> Prefix:
        """The context without the first prompt's question, its cache on a device.

        Args:
            prompt: The same as `self.prompt`, perhaps `without_pixels`.
            device: By default where the model is.
        """
        return Prefix(self.vlm, prompt, self.length, self._copy(self.length, device), self.masked)

    def start(self, prompt: Prompt) -> int:
        """How many tokens of the cache a prompt begins with: `length`, or a few less.

        Raises:
            ValueError: It does not begin with the context.
        """
        shared = min(self.length, common_prefix(self.prompt.ids, prompt.ids))
        if self.vlm.is_visual(self.prompt.ids[shared:]).any() and shared < self.length:
            raise ValueError("a prompt must begin with the context that is in the cache")
        return shared

    def ask(self, prompt: Prompt, *, pixels: bool = True) -> None:
        """Run what follows the context, inside of `record_mass` or `record_keys`.

        Rows of the call are counted from `start(prompt)`.

        Args:
            prompt: Begins with the context; see `prefill`.
            pixels: Feed the images of another question than the prompt's own; without, their
                placeholders stay empty, as in the authors' code of paper A.
        """
        first = self.start(prompt)
        with torch.no_grad():
            if prompt is self.prompt and self._tail:
                arguments = self._tail
            else:
                arguments = self._other(prompt, first, pixels)
            self.vlm.decoder(**arguments, past_key_values=self._copy(first), use_cache=True)

    def _copy(self, length: int, device: str = "") -> DynamicCache:
        """The first tokens of the cache, by default where the model is."""
        held = copy.copy(self.cache)
        held.layers = [copy.copy(layer) for layer in self.cache.layers]
        layers: list[Any] = held.layers
        for number, layer in enumerate(layers):
            place = device or self.vlm.device_of(number)
            layer.keys = layer.keys[..., :length, :].to(place)
            layer.values = layer.values[..., :length, :].to(place)
        return held

    def _other(self, prompt: Prompt, first: int, pixels: bool) -> dict[str, Any]:
        """Decoder arguments of another question, its images embedded already."""
        visual = _visual(self.vlm, prompt)[first:]
        if self.masked and pixels and visual.any():
            if "pixel_values" not in prompt.inputs:
                raise ValueError(
                    f"images in a question to {self.vlm} need the context's images too, which were "
                    "not kept; ask in words"
                )
            return _catch(self.vlm, prompt).call(first, len(prompt))
        ids = prompt.ids[first:].to(self.vlm.device)
        table = self.vlm.model.get_input_embeddings()
        embeddings = table(torch.where(ids < table.num_embeddings, ids, 0)[None])
        arguments: dict[str, Any] = {"inputs_embeds": embeddings}
        if pixels and visual.any():
            seen, deepstack = self._images(prompt)
            embeddings[0, visual] = seen
            if deepstack:
                arguments["visual_pos_masks"] = visual[None]
                arguments["deepstack_visual_embeds"] = deepstack
        arguments["position_ids"] = _positions(self.vlm, prompt)[..., first:]
        return arguments

    def _images(self, prompt: Prompt) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Embeddings of a question's images [visual token, channel], and those of deeper layers."""
        if self._tail and prompt.example.images() == self.prompt.example.images():
            shown = _visual(self.vlm, self.prompt)[self.length :]
            known = self._tail
            return known["inputs_embeds"][0, shown], known.get("deepstack_visual_embeds", [])
        alone = encode(self.vlm, Example(context=(), question=prompt.example.question))
        inputs = _catch(self.vlm, alone)
        return inputs.embeddings[0, inputs.visual], inputs.deepstack


def prefill(vlm: VLM, prompts: Sequence[Prompt], *, layers: int = 0) -> Prefix:
    """Run the context that prompts share, once.

    Args:
        vlm: The model.
        prompts: The first one's images are embedded; the others are `with_question` of it.
        layers: Run the first ones alone; by default all.

    Raises:
        ValueError: A family whose decoder takes inputs that are not known here, or whose layers
            keep a state that cannot be cut.
    """
    if "linear_attention" in (getattr(vlm.text_config, "layer_types", None) or ()):
        raise ValueError(f"layers of {vlm.family} keep a state that cannot be cut to the context")
    first, *others = prompts
    length = int(first.question[0])
    for other in others:
        length = min(length, common_prefix(first.ids, other.ids))
    count = layers or vlm.geometry.layers
    cache = DynamicCache()
    with torch.no_grad():
        inputs = _catch(vlm, first)
        context = inputs.call(0, length)
        with up_to(vlm, count - 1) if count < vlm.geometry.layers else nullcontext():
            vlm.decoder(**context, past_key_values=cache, use_cache=True)
    tail = inputs.call(length, len(first))
    return Prefix(vlm, first, length, cache, bool(inputs.masks), tail)


def _visual(vlm: VLM, prompt: Prompt) -> torch.Tensor:
    return torch.from_numpy(vlm.is_visual(prompt.ids)).to(vlm.device)


def _catch(vlm: VLM, prompt: Prompt) -> _Inputs:
    """Start a forward call and keep what it hands to the decoder."""
    caught: dict[str, Any] = {}

    def stop(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.update(kwargs)
        raise _CaughtError

    handle = vlm.decoder.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad():
            vlm.model(**on_device(vlm, prompt.inputs), use_cache=False)
    except _CaughtError:
        pass
    finally:
        handle.remove()
    unknown = [n for n, value in caught.items() if n not in _KNOWN and torch.is_tensor(value)]
    if unknown:
        raise ValueError(f"the decoder of {vlm.family} takes {unknown}, which is not known here")
    embeddings = caught.get("inputs_embeds")
    if embeddings is None:
        embeddings = vlm.model.get_input_embeddings()(caught["input_ids"])
    masks = caught.get("attention_mask")
    masks = masks if isinstance(masks, dict) else {}
    return _Inputs(
        embeddings,
        caught.get("position_ids"),
        {kind: mask for kind, mask in masks.items() if mask is not None},
        _visual(vlm, prompt),
        list(caught.get("deepstack_visual_embeds") or ()),
    )


def on_device(vlm: VLM, inputs: Any) -> dict[str, torch.Tensor]:
    """Model inputs where the model is, images in its precision."""
    return {
        name: value.to(vlm.device, vlm.model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }


def _positions(vlm: VLM, prompt: Prompt) -> torch.Tensor:
    """Positions of a prompt: those that count images are asked of the model."""
    count = getattr(getattr(vlm.model, "model", None), "get_rope_index", None)
    if count is None:
        return torch.arange(len(prompt), device=vlm.device)[None]
    inputs = prompt.inputs
    given = {name: inputs[name] for name in ("mm_token_type_ids", *GRIDS) if name in inputs}
    positions: torch.Tensor = count(inputs["input_ids"], **given)[0]
    return positions.to(vlm.device)
