"""Run a context once, then several questions from its cache.

The language model's own inputs are caught on their way in (embedded text and images, positions,
masks), so that vision runs once and every family is treated alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from mmheads.evidence import Prompt, common_prefix
from mmheads.models import VLM

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
        prompt: The prompt whose images were embedded.
        length: Tokens in the cache.
    """

    vlm: VLM
    prompt: Prompt
    length: int
    _inputs: _Inputs
    _cache: DynamicCache

    def ask(
        self,
        prompt: Prompt,
        recording: AbstractContextManager[Any] | None = None,
        *,
        pixels: bool = True,
    ) -> torch.Tensor:
        """Run what follows the context -> [token, channel], last hidden states of these tokens.

        Args:
            prompt: Begins with the context; see `prefill`.
            recording: Entered around the call, for example `record_mass` with rows counted from
                the end of the context.
            pixels: Feed the images of another question than the prompt's own; without, their
                placeholders stay empty, as in the authors' code of paper A.
        """
        with torch.no_grad():
            if prompt is self.prompt:
                arguments = self._inputs.call(self.length, len(prompt))
            else:
                arguments = self._other(prompt, pixels)
            with recording or nullcontext():
                hidden: torch.Tensor = self.vlm.decoder(
                    **arguments, past_key_values=self._cache, use_cache=True
                ).last_hidden_state[0]
        _crop(self._cache, self.length)
        return hidden

    def _other(self, prompt: Prompt, pixels: bool) -> dict[str, Any]:
        """Decoder arguments of another question, its images embedded already."""
        known, first = self._inputs, self.length
        visual = _visual(self.vlm, prompt)[first:]
        if known.masks and pixels and visual.any():
            return _catch(self.vlm, prompt).call(first, len(prompt))
        ids = prompt.ids[first:].to(self.vlm.device)
        table = self.vlm.model.get_input_embeddings()
        embeddings = table(torch.where(ids < table.num_embeddings, ids, 0)[None])
        arguments: dict[str, Any] = {"inputs_embeds": embeddings}
        if pixels and visual.any():
            embeddings[0, visual] = known.embeddings[0, first:][known.visual[first:]]
            if known.deepstack:
                seen = int(known.visual[:first].sum())
                arguments["visual_pos_masks"] = visual[None]
                arguments["deepstack_visual_embeds"] = [layer[seen:] for layer in known.deepstack]
        positions = _positions(self.vlm, prompt, known.positions)
        if positions is not None:
            arguments["position_ids"] = positions[..., first:]
        return arguments


def prefill(vlm: VLM, prompts: Sequence[Prompt]) -> Prefix:
    """Run the context that prompts share, once.

    Args:
        vlm: The model.
        prompts: The first one's images are embedded; the others are `with_question` of it.

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
    with torch.no_grad():
        inputs = _catch(vlm, first)
        cache = DynamicCache()
        vlm.decoder(**inputs.call(0, length), past_key_values=cache, use_cache=True)
    return Prefix(vlm, first, length, inputs, cache)


def _crop(cache: DynamicCache, length: int) -> None:
    """Forget all but the first tokens; `DynamicCache.crop` changed its meaning in version 5.18."""
    layers: list[Any] = cache.layers
    for layer in layers:
        layer.keys = layer.keys[..., :length, :]
        layer.values = layer.values[..., :length, :]


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


def _positions(vlm: VLM, prompt: Prompt, known: torch.Tensor | None) -> torch.Tensor | None:
    """Positions of another prompt: those that count images are asked of the model."""
    if known is None:
        return None
    if known.ndim == 2:
        return torch.arange(len(prompt), device=vlm.device)[None]
    inputs = on_device(vlm, prompt.inputs)
    names = ("mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    given = {name: inputs[name] for name in names if name in inputs}
    positions: torch.Tensor = vlm.model.model.get_rope_index(inputs["input_ids"], **given)[0]
    return positions
