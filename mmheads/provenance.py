"""What a result depends on: the model, how it was asked, and the code that computed it."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock

from mmheads import paths
from mmheads.checks import ONLY_KNOWN_FIELDS

version = cache(metadata.version)
"""Version of an installed library, read once."""

_LIBRARIES = ("mmheads", "torch", "transformers")
_PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Provenance:
    """Everything that is needed to know how results were computed.

    Attributes:
        model: Model id.
        revision: Commit on the hub, or hash of the weights; it says so if the weights were changed
            in memory. For released files, the revision of the file.
        template: Hash of the chat template and of the processor's settings.
        tokenizer: Hash of the tokenizer.
        generation: Hash of the generation configuration, where answers are generated.
        null_question: The uninformative question that calibrates the scores.
        versions: Versions of the libraries by name.
        settings: Whatever else the results depend on, by name.
        code: Hash of the source of the modules that compute the results, see `code_version`.
        source: The module that computed the results, or the file of other authors.
    """

    _: dataclasses.KW_ONLY
    model: str = ""
    revision: str = ""
    template: str = ""
    tokenizer: str = ""
    generation: str = ""
    null_question: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    code: str = ""
    source: str = ""

    __pydantic_config__ = ONLY_KNOWN_FIELDS

    @property
    def key(self) -> str:
        """Hash of all fields."""
        return hash_json(dataclasses.asdict(self))

    def differences(self, now: Provenance, *, ignore: Iterable[str] = ()) -> str:
        """The fields that differ, "revision 'a', now 'b'; ..."; empty if none does.

        Args:
            now: What the results are compared with.
            ignore: Names of fields that may differ.
        """
        before = dict(_flat(self, ignore))
        after = dict(_flat(now, ignore))
        names = dict.fromkeys((*before, *after))
        return "; ".join(
            f"{name} {before.get(name)!r}, now {after.get(name)!r}"
            for name in names
            if before.get(name) != after.get(name)
        )


def _flat(provenance: Provenance, ignore: Iterable[str]) -> Iterator[tuple[str, object]]:
    """The fields by name, and each entry of a mapping by its own name."""
    content = json.loads(canonical(dataclasses.asdict(provenance)))  # lists for tuples
    for name in (entry.name for entry in dataclasses.fields(provenance)):
        value = content.get(name)
        if name in ignore:
            continue
        if isinstance(value, dict):
            yield from ((f"{name}[{key!r}]", entry) for key, entry in value.items())
        else:
            yield name, value


def canonical(value: object) -> str:
    """JSON text that is the same for equal values: sorted names, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def hash_json(value: object, digits: int = 32) -> str:
    """Hash of a value that JSON can hold, so many hexadecimal digits."""
    return hashlib.sha256(canonical(value).encode("utf-8", "surrogatepass")).hexdigest()[:digits]


def library_versions() -> dict[str, str]:
    """Versions of the libraries that results depend on, without local labels such as "+cpu"."""
    return {name: version(name).split("+")[0] for name in _LIBRARIES}


@cache
def code_version(modules: tuple[str, ...]) -> str:
    """Hash of the source of some modules and packages of mmheads, without comments and layout.

    Results that are kept in `runs/` carry it, so that a change to the code that computes them
    leaves the old ones behind.

    Args:
        modules: Names below `mmheads`, "prefix" or "attention". Those that do not exist are left
            out.
    """
    digest = hashlib.sha256()
    for name in modules:
        file = _PACKAGE / f"{name}.py"
        for path in [file] if file.is_file() else sorted((_PACKAGE / name).glob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            digest.update(f"{path.relative_to(_PACKAGE).as_posix()} {ast.dump(tree)}\n".encode())
    return digest.hexdigest()[:16]


def folder_revision(folder: Path) -> str:
    """Hash of a model's folder: its configuration and all bytes of every weight file."""
    files = [folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("*.bin")]
    return hash_json({path.name: file_sha256(path) for path in files})[:16]


def file_sha256(path: Path) -> str:
    """SHA-256 of a whole file.

    It is kept in the user's cache folder by path, size and time of the last change, so that weight
    files are read once.
    """
    path = path.resolve()
    about = path.stat()
    entry = [about.st_size, about.st_mtime_ns]
    listing = paths.cache() / "sha256.json"
    size, changed, known = _known_hashes(listing).get(str(path), (0, 0, ""))
    if known and [size, changed] == entry:
        return known
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with suppress(OSError):  # a cache that cannot be written costs time and nothing else
        listing.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{listing}.lock"), paths.write_whole(listing) as temporary:
            hashes = _known_hashes(listing) | {str(path): (*entry, digest)}
            temporary.write_text(json.dumps(hashes), encoding="utf-8")
    return digest


def _known_hashes(listing: Path) -> dict[str, tuple[int, int, str]]:
    try:
        hashes = json.loads(listing.read_text(encoding="utf-8"))
        return {str(path): (int(n), int(t), str(known)) for path, (n, t, known) in hashes.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def parameter_hash(model: Any, sample: int = 1 << 14) -> str:
    """Hash of the names and shapes of a model's weights and of a sample of their values.

    It shows whether weights were changed after loading: by adapters, merges or edits. Which
    adapters are active counts too. At most `sample` evenly spread values of each weight are read,
    in its own precision; weights that Accelerate keeps elsewhere have no values here and count by
    name and shape only.
    """
    import torch

    from mmheads import compat

    digest = hashlib.sha256()
    for name, weight in _plain_tensors(model.state_dict()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
        if weight.device.type == "meta":
            continue
        flat = weight.detach().reshape(-1)
        step = 1 if len(flat) <= sample else (len(flat) // sample) | 1  # odd: every column
        values = flat[::step].contiguous().cpu()
        digest.update(values.view(torch.uint8).numpy().tobytes())
    if used := compat.adapters_used(model):
        digest.update(canonical(used).encode())
    return digest.hexdigest()[:16]


def _plain_tensors(tensors: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The tensors of a state by name; of a quantised one, those that it is made of."""
    for name, tensor in tensors.items():
        if hasattr(tensor, "__tensor_flatten__"):
            parts = {part: getattr(tensor, part) for part in tensor.__tensor_flatten__()[0]}
            yield from _plain_tensors({f"{name}.{part}": inner for part, inner in parts.items()})
        elif hasattr(tensor, "device"):  # a module may keep other things as its state
            yield name, tensor
