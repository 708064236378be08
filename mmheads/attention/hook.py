"""The attention function that is registered beside the stock ones, and how work is attached to it.

It is registered once under a neutral name and switched on only for the language model. It gives
what the stock attention gives, so that logits do not change by one bit, and hands each layer's
queries, keys and values to whatever is attached to that layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch

from mmheads import compat
from mmheads.heads import HeadSet, format_heads
from mmheads.models import VLM

_NAMES = {"sdpa": "mmheads", "eager": "mmheads_eager"}
"""By stock attention, the name of ours on top of it: masks are made by name."""


_HARMLESS = {
    *("position_ids", "sliding_window", "use_cache", "return_dict", "logits_to_keep"),
    *("output_attentions", "output_hidden_states", "output_router_logits", "image_sizes"),
}
"""Keywords of an attention function that change nothing, or that the mask says too."""


_USED = {"softcap", "s_aux"}
"""Keywords of an attention function that are taken into account."""


_REGISTERED = "the attention function that is registered with transformers"


_STATE = "_mmheads"
"""Attribute of an attention module that says what to do there."""


WORKING_SET = 64 << 20
"""Bytes that the scores of a layer may take at a time."""


@dataclass(eq=False)
class Call:
    """One layer's attention in one forward call.

    Attributes:
        layer: Its number.
        query: [example, head, row, channel].
        key: [example, KV group, key, channel].
        value: Like `key`.
        mask: [example, 1 or head, row, key] bool or a number to add; None where every row sees
            the keys up to its own, or `causal` is False and it sees all.
        causal: See `mask`.
        scaling: Factor on the scores.
        softcap: Bound of the scores, if any.
        sinks: [head] score of a key that takes attention and gives nothing, if any.
        stock: Runs the stock attention -> its output, and its weights where it gives them; of
            other queries, keys, values and mask if they are given.
    """

    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    causal: bool
    scaling: float
    softcap: float | None
    sinks: torch.Tensor | None
    stock: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
    weights: torch.Tensor | None = None

    @cached_property
    def output(self) -> torch.Tensor:
        """[example, row, head, channel] what the stock attention gives."""
        output, self.weights = self.stock()
        return output

    def allowed(self, rows: torch.Tensor) -> torch.Tensor | None:
        """[example, 1 or head, row, key] for rows by index; None where all is allowed."""
        keys, device = self.key.shape[2], self.query.device
        rows = rows.to(device)
        if self.mask is not None:
            mask = self.mask[..., :keys].expand(len(self.query), -1, -1, -1)
            index = rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[-1])
            return mask.gather(2, index)
        if self.causal and self.query.shape[2] > 1:
            return torch.arange(keys, device=device) <= rows[:, None, :, None]
        return None


def seen(mask: torch.Tensor) -> torch.Tensor:
    """[...] bool, what a mask allows that is bool or numbers to add."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


_State = Callable[[Call], torch.Tensor]
"""What is done in a layer -> [example, row, head, channel], the heads' output."""


def stop_after(vlm: VLM, states: Mapping[int, _State], run: Callable[[], object]) -> None:
    """Run a forward call with something to do in some layers, and stop it after the deepest.

    A cache is then filled up to that layer. The model is as before at exit.

    Args:
        vlm: The model.
        states: What to do, by layer.
        run: Makes the forward call.
    """
    deepest = max(states)

    def last(call: Call) -> torch.Tensor:
        states[deepest](call)
        raise EnoughError

    with suppress(EnoughError), attached(vlm, {**states, deepest: last}):
        run()


class EnoughError(Exception):
    """Ends a forward call that has given what was wanted."""


def check_heads(vlm: VLM, sets: Sequence[HeadSet], what: str) -> None:
    """Raise ValueError if heads do not fit a model; warn once if they may be of another one.

    Heads fit a model of their architecture and geometry. If the architecture is unknown, the names
    have to agree in their last part, so that a folder's copy of a model on the hub is accepted.

    Args:
        vlm: The model that the heads are used in.
        sets: The heads.
        what: What is done with them, "ablated".

    Warns:
        UserWarning: The heads were scored in a model of another name, or with other weights; the
            message names both.
    """
    for chosen in sets:
        same = Path(chosen.model).name == Path(vlm.model_id).name or not _other_name(vlm, chosen)
        known = chosen.geometry.architecture and vlm.geometry.architecture
        if not chosen.geometry.fits(vlm.geometry) or not (known or same):
            raise ValueError(
                f"heads of {chosen.model or 'a model'} ({chosen.geometry}) cannot be {what} in "
                f"{vlm} ({vlm.geometry}); find the heads of {vlm} with `mmheads detect`"
            )
        if missing := [head for head in chosen if head.layer in vlm.geometry.without_heads]:
            raise ValueError(
                f"{format_heads(missing[:4])} cannot be {what} in {vlm}: of its layers, only "
                f"{list(vlm.attentions)} have attention heads"
            )
        if _other_name(vlm, chosen):
            _warn_once(
                f"heads that were scored in {chosen.model} are used in {vlm}, which has the same "
                "architecture and as many heads; score them again if it is not a copy of that model"
            )
    if any(chosen.origin.revision not in ("", vlm.revision) for chosen in sets):
        check_revision(vlm, sets, vlm.weights)


def check_revision(vlm: VLM, sets: Iterable[HeadSet], now: str) -> None:
    """Warn once if heads were scored with other weights than those of the revision `now`.

    Heads of a model of another name are not compared: `check_heads` warns of them.
    """
    same = [chosen for chosen in sets if not _other_name(vlm, chosen)]
    for revision in dict.fromkeys(chosen.origin.revision for chosen in same):
        if revision not in ("", now):
            _warn_once(
                f"heads that were scored with the weights {revision} of {vlm} are used with its "
                f"weights {now}; score the heads again if the weights differ in more than precision"
            )


def _other_name(vlm: VLM, heads: HeadSet) -> bool:
    return bool(heads.model and vlm.model_id and heads.model != vlm.model_id)


@cache
def _warn_once(text: str) -> None:
    """Warn once of each pair of models or weights, although heads are checked for every batch."""
    warnings.warn(text, stacklevel=5)


@contextmanager
def attached(vlm: VLM, states: Mapping[int, _State]) -> Iterator[None]:
    """Switch the language model to our attention, with something to do in some layers."""
    config = vlm.text_config
    stock = compat.attention_name(config)
    if stock not in _NAMES:
        why = f"runs on the attention {stock!r}; load it with one of {str([*_NAMES])[1:-1]}"
        if stock in _NAMES.values():
            why = "is inside another `record_mass`, `ablate` or `gate`; leave that one first"
        raise ValueError(f"{vlm} {why}")
    compat.set_attention_name(vlm.model, config, _NAMES[stock])
    try:
        rows = compat.every_row(vlm.decoder) if states else nullcontext()  # else no bit changes
        with _reached(vlm, states, _REGISTERED) as called, rows:

            def noted(state: _State, call: Call) -> torch.Tensor:
                called.add(call.layer)
                return state(call)

            for layer, state in states.items():
                setattr(vlm.attentions[layer], _STATE, partial(noted, state))
            yield
    finally:
        for module in vlm.attentions.values():
            module.__dict__.pop(_STATE, None)
        compat.set_attention_name(vlm.model, config, stock)


@contextmanager
def _reached(vlm: VLM, layers: Iterable[int], what: str) -> Iterator[set[int]]:
    """Refuse calls of attention modules that do not add their layer to the set that this gives.

    Nothing inside runs compiled: such code passes hooks by.
    """
    reached: set[int] = set()

    def check(layer: int, module: Any, *_: Any) -> None:
        if layer not in reached:
            raise ValueError(
                f"the attention of layer {layer} of {vlm} ({type(module).__name__}) does not call "
                f"{what}, so that its heads can be neither recorded nor ablated; if another "
                "library has replaced its code, load the model without that"
            )
        reached.remove(layer)

    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for layer in layers:
            handle = vlm.attentions[layer].register_forward_hook(partial(check, layer))
            stack.callback(handle.remove)
        yield reached


@contextmanager
def on_projections(
    vlm: VLM, layers: Iterable[int], see: Callable[[int, torch.Tensor], torch.Tensor | None]
) -> Iterator[None]:
    """Show what heads give to the output projection, after the gate of families that have one.

    Args:
        vlm: The model.
        layers: Of the model, with heads.
        see: Is called with the layer and with [example, row, head, channel]; a tensor that it
            returns is used instead.
    """

    def enter(layer: int, module: Any, args: tuple[torch.Tensor, ...]) -> Any:
        reached.add(layer)
        changed = see(layer, args[0].unflatten(-1, (vlm.geometry.heads, -1)))
        return None if changed is None else (changed.flatten(-2), *args[1:])

    layers = list(layers)
    with _reached(vlm, layers, "its output projection") as reached, ExitStack() as hooks:
        for layer in layers:
            projection = compat.output_projection(vlm.attentions[layer])
            handle = projection.register_forward_pre_hook(partial(enter, layer))
            hooks.callback(handle.remove)
        yield


def check_finite(values: torch.Tensor, layer: int, heads: slice | list[int], what: str) -> None:
    """Raise ValueError if a number of [example, head, ...] is not finite, with its heads' names."""
    if all(end.isfinite() for end in values.aminmax()):  # one pass, and nothing as large is made
        return
    wrong = ~values.isfinite().transpose(0, 1).flatten(1).all(1)
    if wrong.any():
        numbers = heads if isinstance(heads, list) else range(heads.start or 0, 1 << 20)
        bad = [(layer, numbers[head]) for head in wrong.nonzero()[:, 0].tolist()]
        names = format_heads(bad[:4]) + (f" and {len(bad) - 4} more" if len(bad) > 4 else "")
        raise ValueError(
            f"the {what} of {names} are not finite; the weights are damaged, or float16 is too "
            "narrow for this model: load it in bfloat16 or float32"
        )


def _check_call(layer: int, query: torch.Tensor, key: torch.Tensor) -> None:
    """Raise ValueError if queries, or the keys of the call's own tokens, are not finite."""
    check_finite(query, layer, slice(None), "queries")
    keys = key[:, :, -query.shape[2] :]
    if not all(end.isfinite() for end in keys.aminmax()):
        every_head = keys.repeat_interleave(query.shape[1] // key.shape[1], 1)
        check_finite(every_head, layer, slice(None), "keys")


def _attention(base: str) -> Any:
    def attend(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        stock = compat.stock_attention(base, module)
        settings = dict(kwargs) if is_causal is None else {**kwargs, "is_causal": is_causal}

        states = (query, key, value, attention_mask)

        def attended(*other: torch.Tensor | None) -> Any:
            return stock(module, *(other or states), scaling=scaling, dropout=dropout, **settings)

        layer = getattr(module, "layer_idx", -1)
        _check_call(layer, query, key)
        state: _State | None = getattr(module, _STATE, None)
        if state is None:
            return attended()
        given = {name for name, value in kwargs.items() if value is not None and value is not False}
        if unknown := sorted(given - _USED - _HARMLESS):
            raise ValueError(
                f"the attention of layer {layer} ({type(module).__name__}) takes "
                f"{', '.join(unknown)}, which is not known here; what it attends to cannot be told"
            )
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        scale = scaling or query.shape[-1] ** -0.5
        softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
        call = Call(layer, *states, causal, scale, softcap, sinks, attended)
        return state(call), call.weights

    return attend


for _base, _name in _NAMES.items():
    compat.register_attention(_name, _base, _attention(_base))
