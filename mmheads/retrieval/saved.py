"""The file of an index: written whole, checked when it is read, refused if anything differs.

It is a safetensors file, so reading it runs no code. Its metadata hold a JSON text with the
provenance, the heads, what each window needs besides tensors, and a checksum of everything. An
index that is kept on disk is a folder with such a file for each window.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import DynamicCache

from mmheads import compat, paths
from mmheads.checks import parse
from mmheads.examples import Example
from mmheads.heads import Head, HeadSet, Origin
from mmheads.models import VLM
from mmheads.prefix import Prefix
from mmheads.prompts import restore
from mmheads.provenance import Provenance
from mmheads.retrieval.windows import NULL_QUESTION, IndexedDocument, Window

FORMAT = 5
"""Version of the file; raised when its content or what an index computes changes."""

_KEY = "mmheads"
"""Key of our text in the metadata."""

_BROKEN = (
    *(AttributeError, LookupError, OSError, OverflowError, RuntimeError),
    *(SafetensorError, TypeError, ValueError),
)
"""What Python and its libraries raise when a file does not hold what it should."""

_Count = Annotated[int, Field(ge=0, lt=2**31)]
_Size = Annotated[int, Field(ge=1, lt=2**31)]
_Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class _Window:
    """What a window needs besides tensors; see `Window`, `Prompt` and `Prefix` for the fields.

    In `context`, None stands for an image.
    """

    first: _Count
    parts: list[Annotated[tuple[_Count, ...], Field(min_length=1)]]
    sizes: dict[_Count, tuple[_Size, _Size]]
    context: list[str | None]
    replacements: list[str]
    length: _Size
    masked: bool


@dataclass(frozen=True)
class _About:
    """What a file says about itself; see `IndexedDocument` for the fields."""

    provenance: Provenance
    heads: Annotated[list[tuple[int, int]], Field(min_length=1)]
    heads_revision: str
    overlap: _Count
    instruction: str
    max_tokens: _Count
    count: _Size
    about: str
    windows: Annotated[list[_Window], Field(min_length=1)]
    checksum: str = ""


def write_index(path: Path, vlm: VLM, document: IndexedDocument) -> None:
    """Write an index to a file, whole or not at all.

    Raises:
        ValueError: The index is kept on disk already.
        OSError: The file cannot be written, for example because the disk is full.
    """
    if any(window.opened for window in document.windows):
        raise ValueError("this index is kept on disk: its folder is all that there is to save")
    tensors = {
        f"{number}.{name}": tensor.detach().cpu().contiguous()
        for number, window in enumerate(document.windows)
        for name, tensor in _tensors(window)
    }
    about = _About(
        provenance=_provenance(vlm),
        heads=list(document.heads),
        heads_revision=document.heads.origin.revision,
        **document.settings,
        windows=[_described(window) for window in document.windows],
    )
    content = json.loads(json.dumps(asdict(about)))  # names of images sort as they do when read
    text = json.dumps(content | {"checksum": _checksum(content, tensors)})
    try:
        with paths.write_whole(path) as temporary:
            save_file(tensors, temporary, metadata={_KEY: text})
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error


def read_index(path: Path, vlm: VLM, *, keep: str, alone: bool = False) -> IndexedDocument:
    """Read an index that `write_index` wrote, or one on disk that `put_window` wrote.

    Args:
        path: The file, or the folder on disk.
        vlm: The model that made it.
        keep: Where the cache is kept, "device", "cpu" or "disk".
        alone: It holds any one window of the index.

    Raises:
        ValueError: There is no such file, it is damaged or of another kind, or it was made with
            another model, other weights, another version or other settings.
    """
    if keep == "disk":
        return _read_folder(path, vlm)
    if not path.is_file():
        raise ValueError(f"{path} is not a file; expected one that DocumentIndex.save wrote")
    try:
        with safe_open(path, framework="pt") as file:
            content = json.loads((file.metadata() or {})[_KEY])
            names = list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
        different = parse(Provenance, content["provenance"]).differences(_provenance(vlm))
        document = None if different else _document(vlm, content, tensors)
        if document is not None and not alone:
            _check_windows(document)
    except _BROKEN as error:
        raise ValueError(
            f"{path} is not a whole index that DocumentIndex.save wrote "
            f"({type(error).__name__}: {error}); index the document again"
        ) from error
    if document is None:
        raise ValueError(f"{path} was indexed differently: {different}; index the document again")
    if keep == "cpu":
        return document
    windows = [replace(each, prefix=each.prefix.alone(each.prompt)) for each in document.windows]
    return replace(document, windows=tuple(windows))


def put_window(folder: Path, vlm: VLM, document: IndexedDocument, window: Window) -> Window:
    """Write the next window of a document to its folder, and return it without its cache.

    Raises:
        OSError: The file cannot be written.
    """
    path = folder / f"{len(document.windows):04d}.safetensors"
    write_index(path, vlm, replace(document, windows=(window,)))
    return _on_disk(path, vlm, window)


def _read_folder(folder: Path, vlm: VLM) -> IndexedDocument:
    """An index that `put_window` wrote, read window by window, without the caches.

    Raises:
        ValueError: As `read_index` does for each file; or the files are not of one index.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f'{folder} holds no index; expected one of DocumentIndex(keep="disk")')
    documents = []
    for path in files:
        document = read_index(path, vlm, keep="cpu", alone=True)
        windows = tuple(_on_disk(path, vlm, window) for window in document.windows)
        documents.append(replace(document, windows=windows))
    whole = replace(documents[0], windows=tuple(w for each in documents for w in each.windows))
    try:
        kinds = [(each.heads, each.settings) for each in documents]
        _expect(kinds.count(kinds[0]) == len(kinds), "its files are of several indexes")
        _check_windows(whole)
    except ValueError as error:
        raise ValueError(f"{folder} is not a whole index ({error}); delete it") from error
    return whole


def _on_disk(path: Path, vlm: VLM, window: Window) -> Window:
    """A window whose cache is read from a file for each question."""

    def opened() -> Prefix:
        (found,) = read_index(path, vlm, keep="device", alone=True).windows
        return found.prefix

    return replace(window, prefix=replace(window.prefix, cache=None), opened=opened)


def what_is_indexed(path: Path) -> tuple[str, int]:
    """What a file says of its candidates, and their number per window, read without the model.

    Raises:
        ValueError: There is no such file, or it is damaged or of another kind or version.
    """
    try:
        path = min(path.glob("*.safetensors")) if path.is_dir() else path
        with safe_open(path, framework="pt") as file:
            about = parse(_About, json.loads((file.metadata() or {})[_KEY]))
        return about.about, len(about.windows[0].parts)
    except _BROKEN as error:
        raise ValueError(
            f"{path} is not an index that this version can read ({type(error).__name__}); name "
            "another file, or delete it"
        ) from error


def _provenance(vlm: VLM) -> Provenance:
    return vlm.provenance("mmheads.retrieval", NULL_QUESTION, format=FORMAT)


def _checksum(about: Mapping[str, Any], tensors: _Tensors) -> str:
    """SHA-256 of the description and of the names, types, shapes and bytes of all tensors."""
    content = json.dumps({**about, "checksum": ""}, sort_keys=True)
    digest = hashlib.sha256(content.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _tensors(window: Window) -> Iterator[tuple[str, torch.Tensor]]:
    prompt = window.prompt
    yield "null", torch.from_numpy(window.null_attention)
    for name, value in prompt.inputs.items():
        yield f"inputs.{name}", value
    for part, boxes in prompt.boxes.items():
        yield f"boxes.{part}", torch.from_numpy(boxes)
    assert window.prefix.cache is not None, "Prefix.alone refuses a context that is not cached"
    for number, layer in enumerate(window.prefix.cache.layers):
        for name, tensor in compat.layer_tensors(layer).items():
            kind, *state = name.split(".")
            yield ".".join([kind, str(number), *state]), tensor


def _described(window: Window) -> _Window:
    context = window.prompt.example.context
    return _Window(
        first=window.first,
        parts=list(window.parts),
        sizes=dict(window.sizes),
        context=[part if isinstance(part, str) else None for part in context],
        replacements=list(window.prompt.replacements),
        length=window.prefix.length,
        masked=window.prefix.masked,
    )


def _document(vlm: VLM, content: Mapping[str, Any], tensors: _Tensors) -> IndexedDocument:
    """The index that a file describes, on the CPU.

    Raises one of `_BROKEN` if anything has another type, shape or value than `write_index` writes.
    """
    about = parse(_About, content)
    _expect(about.checksum == _checksum(content, tensors), "its content does not fit its checksum")
    heads = HeadSet(
        tuple(Head(*head) for head in about.heads),
        vlm.geometry,
        vlm.model_id,
        origin=Origin(revision=about.heads_revision),
    )
    pieces = [_under(tensors, f"{number}.") for number in range(len(about.windows))]
    _expect(sum(map(len, pieces)) == len(tensors), "it holds tensors of no window")
    windows = [
        _window(vlm, heads, about, window, piece)
        for window, piece in zip(about.windows, pieces, strict=True)
    ]
    return IndexedDocument(
        *(heads, tuple(windows), about.overlap, about.instruction, about.max_tokens, about.count),
        about.about,
    )


def _check_windows(document: IndexedDocument) -> None:
    (size,) = {len(window.parts) for window in document.windows}
    steps = [second.first - first.first for first, second in pairwise(document.windows)]
    _expect(
        document.windows[0].first == 0
        and all(0 < step <= size - document.overlap for step in steps),
        "its windows do not cover its candidates",
    )
    _expect(document.done <= document.count, "it has more windows than candidates")


def _window(vlm: VLM, heads: HeadSet, about: _About, window: _Window, tensors: _Tensors) -> Window:
    """A window's candidates with the null question, as the model reads them now."""
    blank = Image.new("L", (1, 1))
    example = Example(
        context=tuple(blank if part is None else part for part in window.context),
        question=(NULL_QUESTION,),
        instruction=about.instruction,
    )
    boxes = {int(part): tensor.numpy() for part, tensor in _under(tensors, "boxes.").items()}
    inputs = _under(tensors, "inputs.")
    prompt = restore(vlm, example, inputs, window.replacements, boxes, about.max_tokens)
    for part, grid in boxes.items():
        span = prompt.parts[part]
        _expect(
            span is not None and grid.shape == (len(span), 4) and grid.dtype == np.float64,
            "the places of an image's tokens have another shape",
        )
    flat = [part for parts in window.parts for part in parts]
    images = [number for number, part in enumerate(window.context) if part is None]
    _expect(flat == list(range(len(prompt.parts))), "its candidates are not in order")
    _expect(sorted(window.sizes) == images, "its images have no sizes")
    _expect(window.length <= int(prompt.question[0]), "its context ends elsewhere")
    null = tensors["null"]
    _expect(
        null.shape == (len(heads), window.length) and null.isfinite().all(),
        "the null question's attention has another shape, or is not finite",
    )
    cache = _cache(vlm, heads.layers[-1] + 1, window.length, tensors)
    prefix = Prefix(vlm, prompt, window.length, cache, masked=window.masked)
    return Window(window.first, tuple(window.parts), window.sizes, prefix, null.float().numpy())


def _cache(vlm: VLM, depth: int, length: int, tensors: _Tensors) -> DynamicCache:
    """The cache of the first layers."""
    by_layer: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        kind, *rest = name.split(".")
        if kind in compat.CACHE_TENSORS:
            by_layer.setdefault(int(rest[0]), {})[".".join([kind, *rest[1:]])] = tensor
    cache = compat.empty_cache(vlm.text_config)
    _expect(by_layer.keys() <= set(range(depth)), "its cache has other layers")
    for number, empty in enumerate(cache.layers[:depth]):
        states = by_layer.get(number, {})
        keys = states.get("keys")
        shape = () if keys is None else (1, keys.shape[1], length)
        _expect(
            all(
                each.shape[: len(shape)] == shape
                and each.is_floating_point()
                and each.isfinite().all()
                for each in states.values()
            ),
            f"the cache of layer {number} has another shape or type, or is not finite",
        )
        compat.fill_layer(empty, states)
    return cache


def _under(tensors: _Tensors, start: str) -> dict[str, torch.Tensor]:
    """Tensors whose names begin with `start`, by the rest of their names."""
    return {
        name.removeprefix(start): tensor
        for name, tensor in tensors.items()
        if name.startswith(start)
    }


def _expect(holds: object, problem: str) -> None:
    if not holds:
        raise ValueError(problem)
