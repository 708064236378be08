"""The sizes of models: of the papers' models from a table, of a folder from its files."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mmheads import paths

BYTES = 2
"""Bytes of a weight, and of a number in a key or a value, in bfloat16."""
HIDDEN_STATES = 12
"""Working memory per token, in hidden states: what paper A's logs leave beside weights and keys."""


class UsageError(ValueError):
    """The command line or a file asks for something that is not there or cannot be done."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """What the cost of a model depends on.

    Attributes:
        parameters: Number of parameters, with the vision encoder.
        layers: Layers of the language model.
        hidden: Width of its hidden states.
        heads: Query heads per layer.
        kv_groups: Key-value heads per layer.
        channels: Width of a head.
        window: Tokens that a sliding-window layer sees.
        sliding: Number of sliding-window layers.
    """

    parameters: float
    layers: int
    hidden: int
    heads: int
    kv_groups: int
    channels: int
    window: int = 0
    sliding: int = 0

    def memory(self, tokens: int) -> float:
        """Returns the bytes on the GPU at the end of a pass over a prompt of this length."""
        keys = (self.layers - self.sliding) * tokens + self.sliding * min(tokens, self.window)
        cache = 2 * keys * self.kv_groups * self.channels
        return BYTES * (self.parameters + cache + HIDDEN_STATES * self.hidden * tokens)

    def operations(self, tokens: int) -> float:
        """Returns the operations of a pass: 2 x parameters x tokens, and attention."""
        window = min(tokens, self.window)
        pairs = (self.layers - self.sliding) * tokens**2 / 2
        pairs += self.sliding * window * (tokens - window / 2)
        return 2 * self.parameters * tokens + 4 * pairs * self.heads * self.channels


def _size(billions: float, layers: int, hidden: int, heads: int, groups: int, **more: int) -> Size:
    return Size(
        parameters=1e9 * billions,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_groups=groups,
        **{"channels": 128, **more},
    )


MODELS = {
    "Qwen/Qwen2.5-VL-7B-Instruct": _size(8.29, 28, 3584, 28, 4),
    "Qwen/Qwen2.5-VL-32B-Instruct": _size(33.45, 64, 5120, 40, 8),
    "Qwen/Qwen3-VL-4B-Instruct": _size(4.44, 36, 2560, 32, 8),
    "Qwen/Qwen3-VL-8B-Instruct": _size(8.77, 36, 4096, 32, 8),
    "Qwen/Qwen3-VL-32B-Instruct": _size(33.36, 64, 5120, 64, 8),
    "google/gemma-3-12b-it": _size(12.19, 48, 3840, 16, 8, channels=256, window=1024, sliding=40),
    "google/gemma-3-27b-it": _size(27.43, 62, 5376, 32, 16, window=1024, sliding=52),
    "OpenGVLab/InternVL3_5-8B-HF": _size(8.53, 36, 4096, 32, 8),
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": _size(8.03, 28, 3584, 28, 4),
}
"""The papers' models: billions of parameters, layers, width, heads and KV groups, as in their
configurations on the hub."""


@cache
def size_of(model: str) -> Size | None:
    """Returns the size of a model of the table, or of a folder; None if it is not known.

    Raises:
        UsageError: The folder holds no configuration, or no `*.safetensors`.
    """
    folder = folder_of(model)
    if folder is None:
        return MODELS.get(model)
    from safetensors import safe_open
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} holds no config.json: expected a model's folder")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UsageError(f"{folder} holds no *.safetensors: its size is unknown")
    parameters = 0
    for path in weights:
        with safe_open(path, framework="np") as file:
            parameters += sum(math.prod(file.get_slice(k).get_shape()) for k in file.keys())  # noqa: SIM118
    text: Any = AutoConfig.from_pretrained(folder).get_text_config()
    heads = text.num_attention_heads
    return Size(
        parameters=parameters,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=heads,
        kv_groups=getattr(text, "num_key_value_heads", None) or heads,
        channels=getattr(text, "head_dim", None) or text.hidden_size // heads,
        window=getattr(text, "sliding_window", None) or 0,
        sliding=Counter(getattr(text, "layer_types", None) or [])["sliding_attention"],
    )


def folder_of(model: str) -> Path | None:
    """Returns the folder of a shipped or a local model; None for a name on the hub."""
    return next((path for path in (paths.MODELS / model, Path(model)) if path.is_dir()), None)


def name_of(model: str) -> str:
    """Returns what the files of a model are called: the last part of its name or folder."""
    return (folder_of(model) or Path(model)).resolve().name
