"""Load stock Hugging Face models and processors; what the rest needs to know of a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError
from transformers import AutoConfig, AutoProcessor, ProcessorMixin

from mmheads import compat, paths
from mmheads.gguf import load_gguf
from mmheads.heads import Head, HeadGeometry, HeadSet
from mmheads.provenance import (
    Provenance,
    folder_revision,
    hash_json,
    library_versions,
    parameter_hash,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class VLM:
    """A stock model with its processor; text-only causal models too.

    Attributes:
        model: The model, in evaluation mode; of a compiled model or one with PEFT's adapters, the
            model inside of the wrapper, which shares its layers.
        processor: Its processor of images and text; the tokenizer of a text-only model.
        model_id: Folder or name on the hub.
        revision: Commit on the hub, a hash of the folder's weights, or the SHA-256 of a GGUF file;
            empty for a model that was made in memory.
        loaded: Hash of a sample of the weights when they were loaded; it shows later changes.
    """

    model: Any
    processor: Any
    model_id: str = ""
    revision: str = ""
    loaded: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", compat.bare(self.model))
        object.__setattr__(self, "loaded", self.loaded or parameter_hash(self.model))
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(
                f"{self.model_id} has the slow tokenizer {type(self.tokenizer).__name__}; evidence "
                "is found by character offsets, which only fast tokenizers give"
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

    @cached_property
    def text_config(self) -> Any:
        """Configuration of the language model."""
        return self.model.config.get_text_config()

    @property
    def is_text_only(self) -> bool:
        """Whether the model takes no images."""
        return self.text_config is self.model.config

    @property
    def positions(self) -> int:
        """Longest prompt in tokens that the model's positions allow; 0 if it names no limit."""
        return compat.setting(self.text_config, "max_position_embeddings") or 0

    def unknown(self, ids: ArrayLike) -> NDArray[np.bool_]:
        """[token] bool, which ids stand for words that the tokenizer does not know."""
        unknown = self.tokenizer.unk_token_id
        return np.isin(ids, [] if unknown is None else [unknown])

    @property
    def reads_video(self) -> bool:
        """Whether the processor takes videos: only with torchvision."""
        return callable(getattr(self.processor, "video_processor", None))

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the embedding."""
        return compat.device_of(self.model.get_input_embeddings()) or torch.device("cpu")

    def device_of(self, layer: int) -> torch.device:
        """Where a layer is computed; weights that Accelerate keeps elsewhere are on no device."""
        numbered = (m for m in self.decoder.modules() if getattr(m, "layer_idx", None) == layer)
        module = self.attentions.get(layer) or next(numbered, self.decoder)
        return compat.device_of(compat.output_projection(module) or module) or self.device

    @cached_property
    def attentions(self) -> dict[int, Any]:
        """The attention modules of the decoder by layer; layers without heads are not in it."""
        modules = {
            module.layer_idx: module
            for name, module in self.decoder.named_modules()
            if compat.output_projection(module) is not None
            and isinstance(getattr(module, "layer_idx", None), int)
            and not name.endswith("cross_attn")
        }
        if not modules or getattr(self.model.config, "is_encoder_decoder", False):
            reason = (
                "an encoder, which reads the prompt"
                if modules
                else "no attention layer with an `o_proj` (or `q_proj` and `out_proj`) and a "
                "`layer_idx`"
            )
            raise ValueError(f"{self} has {reason}; heads of such a model cannot be told apart")
        return dict(sorted(modules.items()))

    @cached_property
    def geometry(self) -> HeadGeometry:
        """Layers, heads and KV groups; layers that slide or have no heads are not global.

        Where layers have other numbers of KV groups (Gemma 4), the number is that of the global
        layers, whose heads can be selected.
        """
        config = self.text_config
        layers: int = config.num_hidden_layers
        kinds = compat.setting(config, "layer_types")
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
        every = tuple(self.attentions)
        heads = self._count("num_attention_heads", every)
        groups = self._count("num_key_value_heads", full or every) or heads
        bare = tuple(layer for layer in range(layers) if layer not in self.attentions)
        some = None if len(full) == layers else full
        return HeadGeometry(layers, heads, groups, some, bare, self.family)

    def _count(self, name: str, layers: tuple[int, ...]) -> int:
        """A number of heads that some layers have in common; 0 if the model has no such setting.

        Raises:
            ValueError: The layers have different numbers.
        """
        config = self.text_config
        common: int | None = compat.setting(config, name)
        own = compat.setting(config, "per_layer_config")
        if common is not None or own is None:
            return common or 0
        counts = {layer: int(compat.setting(own[layer], name) or 0) for layer in layers}
        if len(set(counts.values())) > 1:
            raise ValueError(
                f"layers of {self} have different numbers of heads ({name} {counts}); heads are "
                "compared across layers, which is possible only where the numbers are equal"
            )
        return counts[layers[0]]

    @cached_property
    def every_head(self) -> HeadSet:
        """All heads, in the order of layer, then head; some layers may have none."""
        heads = [Head(i, j) for i in self.attentions for j in range(self.geometry.heads)]
        return HeadSet(tuple(heads), self.geometry, self.model_id)

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
        """Hash of the chat template and of the processor's settings for images and videos."""
        settings: dict[str, Any] = {"chat_template": self.processor.chat_template}
        for name in ("image_processor", "video_processor"):
            if part := getattr(self.processor, name, None):
                settings[name] = part.to_dict() if hasattr(part, "to_dict") else vars(part)
        return hash_json(settings)[:16]

    @cached_property
    def tokenizer_hash(self) -> str:
        """Hash of the tokenizer: vocabulary, merges, normalisation, added tokens."""
        content = json.loads(self.tokenizer.backend_tokenizer.to_str())
        for changing in ("padding", "truncation"):  # set by every call
            content.pop(changing, None)
        return hash_json(content)[:16]

    @property
    def weights(self) -> str:
        """The revision of the weights as they are now: it says so if they were changed."""
        now = parameter_hash(self.model)
        if not self.revision:
            return f"in memory {now}"
        return self.revision if now == self.loaded else f"{self.revision} changed to {now}"

    def provenance(
        self, source: str, null_question: str = "", *, code: str = "", **settings: Any
    ) -> Provenance:
        """How results of this model are computed.

        Args:
            source: The module that computes them.
            null_question: The question that calibrates scores, if any.
            code: Hash of the code that computes them, see `code_version`.
            settings: Whatever else they depend on.
        """
        return Provenance(
            model=self.model_id,
            revision=self.weights,
            template=self.template,
            tokenizer=self.tokenizer_hash,
            null_question=null_question,
            versions=library_versions(),
            settings={
                **settings,
                "dtype": str(self.model.dtype).removeprefix("torch."),
                "attention": compat.attention_name(self.text_config),
            },
            code=code,
            source=source,
        )

    def generation_hash(self) -> str:
        """Hash of the generation configuration, which answers depend on."""
        settings = self.model.generation_config.to_dict()
        return hash_json({k: v for k, v in settings.items() if k != "transformers_version"})[:16]


def load(
    model_id: str | Path,
    *,
    device: str | torch.device | Mapping[str, int | str] = "",
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    attention: str = "sdpa",
    chat_template: str | Path = "",
) -> VLM:
    """Load a stock model and its processor from a folder, a GGUF file or the hub.

    Any image-text-to-text model works whose decoder layers have an `o_proj`, or `q_proj` and
    `out_proj` (Qwen3.5, Qwen3-VL, InternVL, LLaVA-OneVision, Gemma 3 and 4, ...), and text-only
    causal models; `docs/adding_a_family.md` lists the families. No code from the
    model's folder is run.

    Args:
        model_id: Folder, name of a shipped model ("tiny-qwen3-vl-m"), file of a language model that
            ends in ".gguf" (needs the extra `gguf`), or name on the hub.
        device: "cpu", "cuda:0", "auto" for all GPUs together, or a device by module name as
            Accelerate's device maps have it; by default "auto" if there are several GPUs and
            Accelerate is installed, a GPU if there is one, else the CPU.
        dtype: By default float32 on a CPU, else that of the checkpoint (for GGUF, bfloat16).
        revision: Branch, tag or commit on the hub.
        attention: The stock attention that the model runs on, "sdpa" or "eager".
        chat_template: The text of a Jinja template, or a file with it, for a model without one, or
            in place of its own.

    Raises:
        ValueError: There is no such model or device, files are damaged, or the model is of a kind
            that is not supported.
    """
    spread: Any = dict(device) if isinstance(device, Mapping) else None
    if spread is None:
        name = _device(str(device))
        spread = "auto" if name == "auto" else None
        on_cpu = name.startswith("cpu")
    else:
        on_cpu = not any(str(place) not in ("cpu", "disk") for place in spread.values())
    if dtype is None:
        dtype = torch.float32 if on_cpu else "auto"
    if (file := Path(model_id)).suffix.lower() == ".gguf":
        language_model, tokenizer, digest = load_gguf(
            file, dtype=dtype, attention=attention, device_map=spread or name
        )
        return VLM(model=language_model, processor=tokenizer, model_id=file.stem, revision=digest)
    shipped = paths.MODELS / model_id
    source = str(shipped if shipped.is_dir() else model_id)
    try:
        compat.expect_hub(source, revision)
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        model = compat.load_model(
            source,
            config,
            revision=revision,
            dtype=dtype,
            attn_implementation=attention,
            device_map=spread,
        )
        processor = load_processor(source, revision=revision)
    except (OSError, ValueError, ImportError, SafetensorError, RuntimeError) as error:
        raise ValueError(_why(source, error)) from error
    if chat_template:
        processor.chat_template = _template(chat_template)
    if spread is None:
        try:
            model.to(name)
        except RuntimeError as error:
            raise ValueError(f"{source} does not fit on {name}: {_first_line(error)}") from error
    folder = Path(source)
    commit = folder_revision(folder) if folder.is_dir() else compat.commit(config)
    vlm = VLM(model=model, processor=processor, model_id=_name(folder), revision=commit)
    _ = vlm.geometry  # a model whose heads cannot be told apart is refused here
    return vlm


def _device(name: str) -> str:
    """A device that is here, "auto" for several GPUs; by default the best."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    several = gpus > 1 and find_spec("accelerate")
    if not name:
        return "auto" if several else "cuda" if gpus else "cpu"
    if name == "auto":
        return "auto" if gpus else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        here = f"this machine has 'cpu' and {gpus} CUDA devices"
        raise ValueError(
            f"the device {name!r} cannot be used: {_first_line(error)}; {here}"
        ) from error
    return name


def _template(given: str | Path) -> str:
    """The text of a chat template, from a file if the name is that of one."""
    text = str(given)
    if isinstance(given, Path) or ("{" not in text and Path(text).is_file()):
        return Path(given).read_text(encoding="utf-8")
    if "{" not in text:
        raise ValueError(
            f"the chat template {text[:80]!r} is neither a file nor a Jinja template, which would "
            "hold braces"
        )
    return text


def _first_line(error: BaseException) -> str:
    """The first sentence of an error: some list every configuration that exists."""
    text = " ".join(str(error).split("\n\n")[0].split())
    for end in (" one of ", ": [", "Model type should be", ". "):
        text = text.split(end)[0]
    return text[:300].rstrip(".:,; ") or type(error).__name__


def _why(source: str, error: BaseException) -> str:
    """Why a model could not be loaded, in one sentence."""
    shipped = ", ".join(sorted(path.name for path in paths.MODELS.glob("*-[a-z]")))  # one seed
    expected = (
        f"expected a folder that `save_pretrained` wrote, a shipped model ({shipped}), or the name "
        "of a model on the hub whose class is a part of transformers"
    )
    if isinstance(error, SafetensorError):
        return f"a weight file of {source} is damaged or cut: {_first_line(error)}; copy it again"
    if isinstance(error, ImportError):
        return f"{source} needs a package that is not installed: {_first_line(error)}"
    if "does not support an attention implementation" in str(error):
        model = str(error).split()[0]
        return (
            f"{model} does not run on the attention that was asked for; load it with "
            'attention="eager", if it has attention heads at all'
        )
    return f"{source} could not be loaded: {_first_line(error)}; {expected}"


def load_processor(model_id: str | Path, *, revision: str | None = None) -> Any:
    """Load a model's stock processor; without its video part where torchvision is not installed.

    A text-only model has only a tokenizer.

    Raises:
        OSError: There is neither at `model_id`.
        ValueError: The processor's class is not a part of transformers.
    """
    settings, _ = ProcessorMixin.get_processor_dict(model_id, revision=revision)
    # Without a name it is an older checkpoint, or a text-only one.
    safe = {"revision": revision, "trust_remote_code": False}
    name = settings.get("processor_class", "")
    config = None if name else AutoConfig.from_pretrained(model_id, **safe)
    base = compat.processor_class(config, name)
    if base is not None and not compat.has_torchvision():
        return compat.without_video(base).from_pretrained(model_id, revision=revision)
    return AutoProcessor.from_pretrained(model_id, **safe)


def _name(folder: Path) -> str:
    """The name of a folder's model without the path, which says nothing about its weights."""
    return folder.resolve().name if folder.is_dir() else str(folder)
