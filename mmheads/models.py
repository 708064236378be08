"""Load stock Hugging Face models and processors; what the rest needs to know of a model.

Every difference between model families lives here and in `evidence`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils.import_utils import is_torchvision_available

from mmheads import paths
from mmheads.gguf import load_gguf
from mmheads.heads import Head, HeadGeometry, HeadSet
from mmheads.scores import Provenance

_LIBRARIES = ("mmheads", "torch", "transformers")


@dataclass(frozen=True, kw_only=True, eq=False)
class VLM:
    """A stock model with its processor; text-only causal models too.

    Attributes:
        model: In evaluation mode.
        processor: Of images and text; a text-only model has its tokenizer here.
        model_id: Folder or name on the hub.
        revision: Commit on the hub, a hash of the folder's weights, or the SHA-256 of a GGUF file.
    """

    model: Any
    processor: Any
    model_id: str = ""
    revision: str = ""

    def __post_init__(self) -> None:
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(
                f"{self.model_id} has the slow tokenizer {type(self.tokenizer).__name__}; evidence "
                "is found by character offsets, which fast tokenizers alone give"
            )

    def __str__(self) -> str:
        return self.model_id or self.family

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the processor."""
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def family(self) -> str:
        """The stock model type, "qwen3_vl"."""
        return str(self.model.config.model_type)

    @property
    def decoder(self) -> Any:
        """The language model's decoder, without its head."""
        return self.model.get_decoder()

    @property
    def text_config(self) -> Any:
        """Configuration of the language model."""
        return self.model.config.get_text_config()

    @property
    def is_text_only(self) -> bool:
        """Whether the model takes no images."""
        return self.text_config is self.model.config

    @property
    def reads_video(self) -> bool:
        """Whether the processor takes videos: only with torchvision."""
        return callable(getattr(self.processor, "video_processor", None))

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the embedding."""
        return self.model.get_input_embeddings().weight.device  # type: ignore[no-any-return]

    def device_of(self, layer: int) -> torch.device:
        """Where a layer is computed; weights that Accelerate keeps elsewhere are on no device."""
        module = self.attentions[layer].o_proj
        there = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        return module.weight.device if there is None else torch.device(there)

    @cached_property
    def attentions(self) -> dict[int, Any]:
        """The attention modules of the decoder by layer; layers without heads are not in it."""
        found = {
            module.layer_idx: module
            for name, module in self.decoder.named_modules()
            if hasattr(module, "o_proj")
            and isinstance(getattr(module, "layer_idx", None), int)
            and not name.endswith("cross_attn")
        }
        if not found:
            raise ValueError(
                f"{self} has no attention layer with an `o_proj` and a "
                "`layer_idx`; heads of such a model cannot be told apart"
            )
        return dict(sorted(found.items()))

    @cached_property
    def geometry(self) -> HeadGeometry:
        """Layers, heads and KV groups; layers that slide or have no heads are not global."""
        config = self.text_config
        layers: int = config.num_hidden_layers
        heads: int = config.num_attention_heads
        groups = getattr(config, "num_key_value_heads", None) or heads
        kinds = getattr(config, "layer_types", None)
        if kinds is None:
            windows = {i: getattr(m, "sliding_window", None) for i, m in self.attentions.items()}
            kinds = [
                "full_attention" if windows.get(layer, 1) is None else "other"
                for layer in range(layers)
            ]
        full = tuple(
            layer
            for layer, kind in enumerate(kinds)
            if kind == "full_attention" and layer in self.attentions
        )
        return HeadGeometry(layers, heads, groups, None if len(full) == layers else full)

    @cached_property
    def every_head(self) -> HeadSet:
        """All heads, in the order of layer, then head."""
        shape = self.geometry
        heads = [Head(i, j) for i in range(shape.layers) for j in range(shape.heads)]
        return HeadSet(tuple(heads), shape, self.model_id)

    @cached_property
    def visual_ids(self) -> frozenset[int]:
        """Token ids that stand for a piece of an image or of a video."""
        config = self.model.config
        ids = (getattr(config, name, None) for name in ("image_token_id", "video_token_id"))
        return frozenset(i for i in ids if i is not None) if not self.is_text_only else frozenset()

    def is_visual(self, ids: torch.Tensor | list[int]) -> NDArray[np.bool_]:
        """[token] whether each token id stands for a piece of an image or of a video."""
        return np.isin(ids, list(self.visual_ids))

    @cached_property
    def template(self) -> str:
        """Hash of the chat template and of the image processor's settings."""
        settings: dict[str, Any] = {"chat_template": self.processor.chat_template}
        if hasattr(self.processor, "image_processor"):
            settings["image_processor"] = self.processor.image_processor.to_dict()
        text = json.dumps(settings, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def provenance(self, source: str, null_question: str = "", **settings: Any) -> Provenance:
        """How results of this model are made: weights, template, versions and settings."""
        return Provenance(
            model=self.model_id,
            revision=self.revision,
            template=self.template,
            null_question=null_question,
            versions={name: version(name).split("+")[0] for name in _LIBRARIES},
            settings={
                **settings,
                "dtype": str(self.model.dtype).removeprefix("torch."),
                "attention": self.text_config._attn_implementation,
            },
            source=source,
        )


def load(
    model_id: str | Path,
    *,
    device: str | torch.device | Mapping[str, int | str] = "",
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    attention: str = "sdpa",
) -> VLM:
    """Load a stock model and its processor from a folder, a GGUF file or the hub.

    Any image-text-to-text model whose decoder layers have an `o_proj` works (Qwen3-VL, Qwen2.5-VL,
    InternVL, LLaVA-OneVision, Gemma 3, SmolVLM, Idefics3, ...), and text-only causal models.

    Args:
        model_id: Folder, name of a shipped model ("tiny-qwen3-vl-m"), file of a language model that
            ends in ".gguf" (needs the extra `gguf`), or name on the hub.
        device: "cpu", "cuda:0", "auto" for all GPUs together, or a device by module name as
            Accelerate's device maps have it; by default "auto" if there are several GPUs and
            Accelerate is installed, a GPU if there is one, else the CPU.
        dtype: By default float32 on a CPU, else that of the checkpoint (for GGUF, bfloat16).
        revision: Branch, tag or commit on the hub.
        attention: The stock attention that the model runs on, "sdpa" or "eager".

    Raises:
        ValueError: There is no such model, it is of a kind that is not supported, or its file is
            damaged.
    """
    spread: Any = dict(device) if isinstance(device, Mapping) else None
    if spread is None:
        device = str(device) or _best_device()
        spread = "auto" if device == "auto" else None
    if dtype is None:
        dtype = torch.float32 if device == "cpu" else "auto"
    if (file := Path(model_id)).suffix.lower() == ".gguf":
        language_model, tokenizer, digest = load_gguf(
            file, dtype=dtype, attention=attention, device_map=spread or device
        )
        return VLM(model=language_model, processor=tokenizer, model_id=file.stem, revision=digest)
    shipped = paths.MODELS / model_id
    source = str(shipped if shipped.is_dir() else model_id)
    try:
        config = AutoConfig.from_pretrained(source, revision=revision)
        vision = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        auto = AutoModelForImageTextToText if vision else AutoModelForCausalLM
        model: PreTrainedModel = auto.from_pretrained(
            source,
            revision=revision,
            dtype=dtype,
            attn_implementation=attention,
            device_map=spread,
        )
        processor = load_processor(source, revision=revision)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"{source} could not be loaded: {error}; expected a folder that `save_pretrained` "
            "wrote, or the name of a model on the hub"
        ) from error
    if spread is None:
        model.to(device)  # type: ignore[arg-type]
    folder = Path(source)
    commit = _weights_hash(folder) if folder.is_dir() else getattr(config, "_commit_hash", "") or ""
    return VLM(model=model.eval(), processor=processor, model_id=_name(folder), revision=commit)


def _best_device() -> str:
    if torch.cuda.device_count() > 1 and find_spec("accelerate"):
        return "auto"
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_processor(model_id: str | Path, *, revision: str | None = None) -> Any:
    """Load a model's stock processor; without its video part where torchvision is not installed.

    A text-only model has a tokenizer alone.

    Raises:
        OSError: There is neither at `model_id`.
    """
    settings, _ = ProcessorMixin.get_processor_dict(model_id, revision=revision)
    if "processor_class" in settings:
        base = getattr(transformers, settings["processor_class"])
    else:  # an older checkpoint, or a text-only one
        config = AutoConfig.from_pretrained(model_id, revision=revision)
        base = PROCESSOR_MAPPING.get(type(config), None)
    if is_torchvision_available() or base is None:
        return AutoProcessor.from_pretrained(model_id, revision=revision)
    return without_video(base).from_pretrained(model_id, revision=revision)


def without_video(base: type[ProcessorMixin]) -> type[Any]:
    """A processor class that takes images and text alone: video processors need torchvision.

    It keeps the name of `base`, which is what a saved processor is known by.
    """
    every = base.get_attributes()
    parts = [name for name in every if name != "video_processor"]
    stock: Any = base._get_arguments_from_pretrained

    def arguments(cls: type[ProcessorMixin], *args: Any, **kwargs: Any) -> list[Any]:
        found = iter(stock.__func__(cls, *args, **kwargs))
        return [next(found) if name in parts else None for name in every]

    members: dict[str, Any] = {
        "get_attributes": classmethod(lambda cls: parts),
        "_get_arguments_from_pretrained": classmethod(arguments),
        "__module__": __name__,
    }
    module = vars(sys.modules[base.__module__])
    if "num2words" in module:  # SmolVLM asks for these even where there is no video
        module["num2words"] = module["num2words"] or str
        members["video_processor"] = SimpleNamespace(num_frames=None, fps=None)
    return type(base.__name__, (base,), members)


def _name(folder: Path) -> str:
    """A folder's model by its name alone, wherever it lies: a path says nothing on its weights."""
    return folder.resolve().name if folder.is_dir() else str(folder)


def _weights_hash(folder: Path, edge: int = 1 << 20) -> str:
    """Hash of a folder's configuration and of the first and last MiB of each weight file."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        with path.open("rb") as file:
            digest.update(f"{path.name}{path.stat().st_size}".encode() + file.read(edge))
            file.seek(-min(edge, path.stat().st_size), 2)
            digest.update(file.read())
    return digest.hexdigest()[:16]
