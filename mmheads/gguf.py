"""Language models in GGUF files, read by transformers."""

from __future__ import annotations

import hashlib
import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import TOKENIZER_MAPPING, AutoConfig, AutoTokenizer, PreTrainedModel

from mmheads import compat

_DAMAGE = (ValueError, TypeError, LookupError, OverflowError, OSError, struct.error)
"""What transformers raises for files that are cut off or damaged."""


def load_gguf(
    path: Path, *, dtype: torch.dtype | str, attention: str, device_map: Any
) -> tuple[PreTrainedModel, Any, str]:
    """Load a language model from a GGUF file: the model, its tokenizer, and the file's SHA-256.

    The weights are dequantised; the tokenizer and the chat template are those of the file.

    Args:
        path: The file.
        dtype: Of the weights; "auto" is bfloat16.
        attention: See `models.load`.
        device_map: A device, or a device by module name.

    Raises:
        ValueError: The file is missing, not GGUF, cut off or damaged; transformers does not know
            its architecture, or it is not that of a causal language model; it has no chat
            template; or a package that reads GGUF files is not installed.
    """
    _check(path)
    where: dict[str, Any] = {"gguf_file": path.name}
    folder = str(path.parent)
    try:
        config = AutoConfig.from_pretrained(folder, **where)
        # With its type given, the metadata (half a minute in Python) are not read once more.
        kind = config.model_type if type(config) in TOKENIZER_MAPPING else None
        tokenizer = AutoTokenizer.from_pretrained(folder, tokenizer_type=kind, **where)
        model = compat.load_model(
            folder,
            config,
            dtype=torch.bfloat16 if dtype == "auto" else dtype,
            attn_implementation=attention,
            device_map=device_map,
            **where,
        )
    except _DAMAGE as error:
        raise ValueError(_sentence(path, error)) from error
    if not tokenizer.chat_template:
        raise ValueError(
            f"{path} has no chat template, by which a question is asked; expected the file of an "
            "instruction-tuned model"
        )
    with path.open("rb") as file:
        return model, tokenizer, hashlib.file_digest(file, "sha256").hexdigest()


def _check(path: Path) -> None:
    """Refuse early what needs no model library to be seen."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; expected a GGUF file")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ValueError(
            f"{path} is not a GGUF file: it begins with {magic!r}, expected b'GGUF'; give the "
            "folder or the hub name of a model in any other format"
        )
    missing = [name for name in ("gguf", "accelerate") if not find_spec(name)]
    if missing:
        raise ValueError(
            f"reading {path} needs the packages {', '.join(missing)}; install mmheads[gguf]"
        )


def _sentence(path: Path, error: Exception) -> str:
    reason = f"{type(error).__name__}: {error}"
    if "not supported" in reason:
        return f"{path} cannot be loaded: {error}"
    return f"{path} is cut off or damaged, or transformers cannot read its kind ({reason})"
