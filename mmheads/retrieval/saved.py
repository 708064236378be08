"""The file of an index: written whole, checked when it is read, refused if anything differs.

It is a safetensors file, so reading it runs no code. Its metadata hold a JSON text with the
provenance, the heads, what each window needs besides tensors, and a checksum of everything.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import DynamicCache

from mmheads import paths
from mmheads.examples import Example
from mmheads.heads import Head, HeadSet, Origin
from mmheads.models import VLM
from mmheads.prefix import Prefix
from mmheads.prompts import Prompt, restore
from mmheads.retrieval.windows import NULL_QUESTION, IndexedDocument, Window
from mmheads.scores import Provenance

FORMAT = 2
"""Version of the file; raised when its content or what an index computes changes."""


_KEY = "mmheads"
"""Key of our text in the metadata."""


_BROKEN = (
    *(AttributeError, IndexError, KeyError, OverflowError, RecursionError, RuntimeError),
    *(SafetensorError, TypeError, ValueError),
)
"""What Python and its libraries raise when a file does not hold what it should."""


def write_index(path: Path, vlm: VLM, document: IndexedDocument) -> None:
    """Write an index to a file, whole or not at all.

    Raises:
        OSError: The file cannot be written, for example because the disk is full.
    """
    tensors = {
        f"{number}.{name}": tensor.detach().cpu().contiguous()
        for number, window in enumerate(document.windows)
        for name, tensor in _tensors(window)
    }
    about = {
        "provenance": asdict(_provenance(vlm)),
        "heads": list(document.heads),
        "heads_revision": document.heads.origin.revision,
        "overlap": document.overlap,
        "instruction": document.instruction,
        "max_tokens": document.max_tokens,
        "windows": [_described(window) for window in document.windows],
    }
    about["checksum"] = _checksum(about, tensors)
    try:
        with paths.write_whole(path) as temporary:
            save_file(tensors, temporary, metadata={_KEY: json.dumps(about)})
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error


def read_index(path: Path, vlm: VLM, *, keep: str) -> IndexedDocument:
    """Read an index that `write_index` wrote.

    Args:
        path: The file.
        vlm: The model that made it.
        keep: Where the cache is kept, "device" or "cpu".

    Raises:
        ValueError: There is no such file, it is damaged or of another kind, or it was made with
            another model, other weights, another version or other settings.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file; expected one that DocumentIndex.save wrote")
    try:
        about, tensors = _load(path)
        made = Provenance(**about["provenance"])
        now = Provenance(**json.loads(json.dumps(asdict(_provenance(vlm)))))
        different = made.differences(now)
    except (*_BROKEN, OSError) as error:
        raise _refusal(path, error) from error
    if different:
        raise ValueError(f"{path} was indexed differently: {different}; index the document again")
    try:
        checksum = about.pop("checksum")
        _expect(checksum == _checksum(about, tensors), "its content does not fit its checksum")
        document = _document(vlm, about, tensors)
    except _BROKEN as error:
        raise _refusal(path, error) from error
    return document if keep == "cpu" else _on_device(document)


def _on_device(document: IndexedDocument) -> IndexedDocument:
    windows = [
        replace(window, prefix=window.prefix.alone(window.prompt)) for window in document.windows
    ]
    return replace(document, windows=tuple(windows))


def _refusal(path: Path, error: BaseException) -> ValueError:
    return ValueError(
        f"{path} is not a whole index that DocumentIndex.save wrote "
        f"({type(error).__name__}: {error}); index the document again"
    )


def _provenance(vlm: VLM) -> Provenance:
    return vlm.provenance("mmheads.retrieval", NULL_QUESTION, format=FORMAT)


def _load(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as file:
        about = json.loads((file.metadata() or {})[_KEY])
        names = list(file.keys())
        return about, {name: file.get_tensor(name) for name in names}


def _checksum(about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of the description and of the names, types, shapes and bytes of all tensors."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _tensors(window: Window) -> Iterable[tuple[str, torch.Tensor]]:
    prompt = window.prompt
    yield "null", torch.from_numpy(window.null_attention)
    for name, value in prompt.inputs.items():
        yield f"inputs.{name}", value
    for part, boxes in prompt.boxes.items():
        yield f"boxes.{part}", torch.from_numpy(boxes)
    assert window.prefix.cache is not None, "Prefix.alone refuses a context that is not cached"
    layers: list[Any] = window.prefix.cache.layers
    for number, layer in enumerate(layers):
        yield f"keys.{number}", layer.keys
        yield f"values.{number}", layer.values


def _described(window: Window) -> dict[str, Any]:
    """What a window needs besides tensors."""
    context = window.prompt.example.context
    return {
        "first": window.first,
        "parts": [list(parts) for parts in window.parts],
        "sizes": {str(part): list(size) for part, size in window.sizes.items()},
        "context": [part if isinstance(part, str) else None for part in context],
        "replacements": list(window.prompt.replacements),
        "length": window.prefix.length,
        "masked": window.prefix.masked,
    }


def _document(
    vlm: VLM, about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> IndexedDocument:
    """The index that a file describes, on the CPU; the schema of the file is read only here.

    Raises one of `_BROKEN` if anything has another type, shape or value than `write_index` writes.
    """
    heads = HeadSet(
        tuple(Head(*map(_whole, head)) for head in about["heads"]),
        vlm.geometry,
        vlm.model_id,
        origin=Origin(revision=_text(about["heads_revision"])),
    )
    _expect(len(heads) > 0, "it has no heads")
    instruction, described = _text(about["instruction"]), about["windows"]
    max_tokens = _whole(about["max_tokens"])
    _expect(isinstance(described, list) and len(described) > 0, "it has no windows")
    pieces: list[dict[str, torch.Tensor]] = [{} for _ in described]
    for name, tensor in tensors.items():
        number, _, rest = name.partition(".")
        pieces[int(number)][rest] = tensor
    windows = [
        _window(vlm, heads, instruction, max_tokens, window, piece)
        for window, piece in zip(described, pieces, strict=True)
    ]
    overlap = _whole(about["overlap"])
    document = IndexedDocument(heads, tuple(windows), overlap, instruction, max_tokens)
    sizes = {len(window.parts) for window in windows}
    steps = [second.first - first.first for first, second in pairwise(windows)]
    (size,) = sizes
    _expect(
        windows[0].first == 0 and all(0 < step <= size - document.overlap for step in steps),
        "its windows do not cover its candidates",
    )
    return document


def _window(
    vlm: VLM,
    heads: HeadSet,
    instruction: str,
    max_tokens: int,
    about: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
) -> Window:
    length, masked = _whole(about["length"]), about["masked"]
    _expect(isinstance(masked, bool), f"{masked!r:.40} is given where true or false is expected")
    parts = tuple(tuple(map(_whole, each)) for each in about["parts"])
    prompt = _prompt(vlm, instruction, max_tokens, about, tensors)
    flat = [part for each in parts for part in each]
    _expect(
        flat == list(range(len(prompt.parts))) and all(parts), "its candidates are not in order"
    )
    _expect(0 < length <= int(prompt.question[0]), "its context ends elsewhere")
    sizes = {
        int(part): (_whole(width), _whole(height))
        for part, (width, height) in about["sizes"].items()
    }
    visuals = [number for number, part in enumerate(about["context"]) if part is None]
    _expect(sorted(sizes) == visuals, "its images have no sizes")
    _expect(all(min(size) > 0 for size in sizes.values()), "an image is empty")
    null = tensors["null"]
    _expect(
        null.shape == (len(heads), length) and bool(null.isfinite().all()),
        "the null question's attention has another shape, or is not finite",
    )
    prefix = Prefix(vlm, prompt, length, _cache(heads, length, tensors), masked=masked)
    return Window(_whole(about["first"]), parts, sizes, prefix, null.float().numpy())


def _prompt(
    vlm: VLM,
    instruction: str,
    max_tokens: int,
    about: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
) -> Prompt:
    """The window's candidates with the null question, as the model reads them now."""
    blank = Image.new("L", (1, 1))
    boxes = {int(part): tensor.numpy() for part, tensor in _under(tensors, "boxes.").items()}
    inputs = _under(tensors, "inputs.")
    example = Example(
        context=tuple(blank if part is None else _text(part) for part in about["context"]),
        question=(NULL_QUESTION,),
        instruction=instruction,
    )
    replacements = tuple(map(_text, about["replacements"]))
    prompt = restore(vlm, example, inputs, replacements, boxes, max_tokens)
    for part, grid in boxes.items():
        span = prompt.parts[part]
        _expect(
            span is not None and grid.shape == (len(span), 4) and grid.dtype == np.float64,
            "the places of an image's tokens have another shape",
        )
    return prompt


def _cache(heads: HeadSet, length: int, tensors: Mapping[str, torch.Tensor]) -> DynamicCache:
    """The cache up to the deepest head."""
    keys, values = _under(tensors, "keys."), _under(tensors, "values.")
    layers = [str(layer) for layer in range(heads.layers[-1] + 1)]
    _expect(sorted(keys) == sorted(layers) == sorted(values), "its cache has other layers")
    cache = DynamicCache()
    for layer in layers:
        for states in (keys[layer], values[layer]):
            _expect(
                states.ndim == 4
                and (states.shape[0], states.shape[2]) == (1, length)
                and states.shape[1] == keys[layer].shape[1]
                and states.is_floating_point()
                and bool(states.isfinite().all()),
                f"the cache of layer {layer} has another shape or type, or is not finite",
            )
        cache.update(keys[layer], values[layer], int(layer))
    return cache


def _under(tensors: Mapping[str, torch.Tensor], start: str) -> dict[str, torch.Tensor]:
    """Tensors whose names begin with `start`, by the rest of their names."""
    return {
        name.removeprefix(start): tensor
        for name, tensor in tensors.items()
        if name.startswith(start)
    }


def _expect(holds: object, problem: str) -> None:
    if not holds:
        raise ValueError(problem)


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
        raise ValueError(f"{value!r:.40} is given where a whole number is expected")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.40} is given where a text is expected")
    return value
