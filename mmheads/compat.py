"""Every private or version-dependent name of transformers and torch that the package uses.

A new release of either library can break only this file and `mmheads.streaming`, which still uses
some private names itself.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from huggingface_hub import model_info, try_to_load_from_cache
from PIL import Image
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, ProcessorMixin
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils.import_utils import is_torchvision_available

# --- wrappers and adapters

# By the class of a wrapper, the attribute with the model that it runs.
_INSIDE = {"OptimizedModule": "_orig_mod", "DataParallel": "module"}

# Kinds of PEFT's adapters that act inside of the model's layers, and only there.
_ADAPTERS = ("ADALORA", "BOFT", "IA3", "LN_TUNING", "LOHA", "LOKR", "LORA", "OFT", "VERA")


def bare(model: Any) -> Any:
    """The model of transformers inside of `torch.compile`, PEFT's and data parallel wrappers.

    Adapters stay in its layers, so that it computes what the wrapper computes. What cannot be
    called, such as a stand-in without weights, is returned as it is.

    Raises:
        ValueError: There is none inside, or an adapter acts elsewhere, as prompt tuning does.
    """
    name = type(model).__name__
    adapters: dict[str, Any] = getattr(model, "peft_config", None) or {}
    for adapter, config in adapters.items():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind not in _ADAPTERS or getattr(config, "alora_invocation_tokens", None):
            raise ValueError(
                f"the adapter {adapter!r} of the kind {kind} of PEFT does not act inside of layers "
                f"for all tokens alike; expected one of {', '.join(_ADAPTERS)}"
            )
    if isinstance(model, transformers.PreTrainedModel) or not callable(model):
        return model
    if name not in _INSIDE and not adapters:
        raise ValueError(f"expected a model of transformers, not one of the class {name}")
    return bare(getattr(model, _INSIDE[name]) if name in _INSIDE else model.base_model.model)


def adapters_used(model: torch.nn.Module) -> list[tuple[str, Any, bool, Any]]:
    """Modules with PEFT's adapters: name, active adapters, whether they are off, and factors."""
    return [
        (name, active, module.disable_adapters, getattr(module, "scaling", None))
        for name, module in model.named_modules()
        if isinstance(active := getattr(module, "active_adapters", None), list)
    ]


# --- attention


def register_attention(name: str, base: str, attend: Callable[..., Any]) -> None:
    """Register an attention function under a name, with the masks of a stock one.

    Without the masks, transformers would leave them out without a word.
    """
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])


def stock_attention(base: str, module: Any) -> Callable[..., Any]:
    """The stock attention function; "eager" is the one of the module's own modelling file."""
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(base, eager)
    return function


def attention_name(config: Any) -> str:
    """The name of the attention function that a language model runs on."""
    return str(config._attn_implementation)


def set_attention_name(model: Any, text_config: Any, name: str) -> None:
    """Switch only the language model to another attention function."""
    config = model.config
    if text_config is config:
        model.set_attn_implementation(name)
        return
    key = next(key for key in config.sub_configs if getattr(config, key) is text_config)
    model.set_attn_implementation({key: name})


def output_projection(module: Any) -> Any:
    """The layer that mixes the heads of an attention module; None if it is not one."""
    if hasattr(module, "q_proj") and hasattr(module, "out_proj"):  # convolutions have only the last
        return module.out_proj
    return getattr(module, "o_proj", None)


@contextmanager
def every_row(decoder: Any) -> Iterator[None]:
    """Let the layers that share keys run all tokens (Gemma 4), not only those with logits.

    A prompt of one row would be taken for a decoding step, and masks would not fit.
    """
    name = "_maybe_slice_kv_shared_inputs"
    if not hasattr(decoder, name):
        yield
        return
    count = list(inspect.signature(getattr(decoder, name)).parameters).index("logits_to_keep")
    setattr(decoder, name, lambda *given, **_: given[:count])
    try:
        yield
    finally:
        delattr(decoder, name)


ENCODED_IMAGES = "mm_encoder_outputs"
"""Model input by which `generate` hands on the images that it has encoded."""


@contextmanager
def deepstack_of_rows(decoder: Any) -> Iterator[None]:
    """Add the image features of Qwen3-VL's first layers to every row of a batch."""
    stock = getattr(decoder, "_deepstack_process", None)
    if stock is None:
        yield
        return

    def process(hidden: torch.Tensor, visual: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        rows = len(hidden) // len(visual)
        added: torch.Tensor = stock(hidden, visual.repeat(rows, 1), features.repeat(rows, 1))
        return added

    decoder._deepstack_process = process
    try:
        yield
    finally:
        del decoder._deepstack_process


# --- caches

_STATES = ("conv_states", "recurrent_states")
"""Numbered tensors of a cache's layer that depend on all tokens so far and cannot be cut."""

_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer")
"""Classes of a cache's layers that hold only keys and values; transformers 5.17 lacks the last."""

CACHE_TENSORS = ("keys", "values", *_STATES)
"""Names of what a layer of a cache may hold."""


def continuing(decoder: Any, cache: Cache | None) -> dict[str, Any]:
    """Arguments by which a decoder goes on from a cache; transformers 5.24 renames it."""
    named = "cache" in inspect.signature(decoder.forward).parameters
    return {"cache" if named else "past_key_values": cache, "use_cache": True}


def empty_cache(config: Any) -> DynamicCache:
    """A cache of all keys and values, which can be cut, and of the states of recurrent layers.

    Sliding layers keep all keys too, so that questions may go on from an earlier token.

    Args:
        config: Of the language model.
    """
    cache = DynamicCache(config=config)
    layers: list[Any] = cache.layers
    for layer in layers:
        if type(layer).__name__ not in _LAYERS and not hasattr(layer, _STATES[0]):
            raise ValueError(
                f"layers of {config.model_type} keep their keys as {type(layer).__name__}, which "
                "is not known here; a context of this family cannot be run once for its questions"
            )
    sliding = DynamicSlidingWindowLayer
    cache.layers = [DynamicLayer() if type(layer) is sliding else layer for layer in layers]
    return cache


def shares_keys(config: Any) -> bool:
    """Whether some layers attend to the keys of earlier layers (Gemma 3n, small Gemma 4)."""
    modes = setting(config, "kv_sharing_modes") or ()
    return "reuse" in modes or bool(setting(config, "num_kv_shared_layers"))


def has_states(cache: Cache) -> bool:
    """Whether a cache holds states that cannot be cut to fewer tokens."""
    return any(hasattr(layer, _STATES[0]) for layer in cache.layers)


def cut_layer(layer: Any, length: int, place: torch.device | str) -> Any:
    """A copy of a cache's layer with the keys of the first tokens, and with states as they are."""
    cut = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):  # a call changes the states of a layer in place
            states = {
                i: s.to(place, copy=True) if torch.is_tensor(s) else s for i, s in value.items()
            }
            setattr(cut, name, states)
        elif name in ("keys", "values") and value is not None:
            setattr(cut, name, value[..., :length, :].to(place))
    return cut


def layer_tensors(layer: Any) -> dict[str, torch.Tensor]:
    """What a layer of a cache holds, by name: "keys", "values", "conv_states.0", ..."""
    held = {name: getattr(layer, name, None) for name in ("keys", "values")}
    for name in _STATES:
        held |= {f"{name}.{i}": state for i, state in getattr(layer, name, {}).items()}
    return {name: tensor for name, tensor in held.items() if tensor is not None}


def fill_layer(layer: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Let an empty layer of a cache hold what `layer_tensors` gave.

    Raises:
        KeyError: The tensors are those of another kind of layer.
    """
    if isinstance(layer, DynamicLayer):
        layer.update(tensors["keys"], tensors["values"])
    for name in _STATES:
        for i in getattr(layer, name, {}):
            if (state := tensors.get(f"{name}.{i}")) is not None:
                size = {"conv_kernel_size": state.shape[-1]} if name == _STATES[0] else {}
                layer.lazy_initialization(**{name: state}, state_idx=i, **size)
                getattr(layer, name)[i].copy_(state)
                layer.has_previous_state[i] = True


# --- configurations and devices


def setting(config: Any, name: str) -> Any:
    """A setting of a configuration; None where there is none, or where each layer has its own.

    A configuration with settings per layer raises RuntimeError for such a name.
    """
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return None


def device_of(module: torch.nn.Module) -> torch.device | None:
    """Where a module computes: where Accelerate sends its inputs, or where its tensors are.

    Quantised layers have no `weight`, so any parameter or buffer counts.
    """
    place = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if place is not None:
        return torch.device(place)
    tensors = (*module.parameters(), *module.buffers())
    return next((tensor.device for tensor in tensors), None)


def commit(config: Any) -> str:
    """The commit of the hub that a configuration was read from; empty for a folder."""
    return str(getattr(config, "_commit_hash", None) or "")


def expect_hub(name: str, revision: str | None) -> None:
    """Ask once for a model that is neither a folder nor in the cache of the hub.

    transformers would ask six times, in half a minute. What the hub answers is left to it.

    Raises:
        OSError: The hub cannot be reached.
    """
    try:
        if not Path(name).is_dir() and not try_to_load_from_cache(name, "config.json"):
            model_info(name, revision=revision, timeout=10)
    except (OSError, ValueError):  # an answer, no name of the hub, or a hub that is not to be asked
        pass
    except Exception as error:  # of the library that the hub's library takes, httpx or httpx2
        raise OSError(f"the Hugging Face hub cannot be reached ({error})") from error


has_torchvision = is_torchvision_available
"""Says whether torchvision is installed beside this torch, as video processors need it."""


def load_model(source: str, config: Any, **settings: Any) -> Any:
    """A stock model of a folder, a file or the hub, in evaluation mode, with all its weights.

    transformers leaves weights random that it does not find, with no more than a warning.

    Args:
        source: Folder, or name on the hub.
        config: Its configuration.
        settings: Further arguments of `from_pretrained`.

    Raises:
        ValueError: The model neither reads images with text nor writes text, its weights are
            quantised by an unknown method, or its files lack some.
    """
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        kind: Any = transformers.AutoModelForImageTextToText
    elif type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = transformers.AutoModelForCausalLM
    else:
        raise ValueError(
            f"models of the type {config.model_type!r} are not supported, as they neither read "
            "images with text nor continue text from left to right"
        )
    for part in (config, config.get_text_config()):
        how = (setting(part, "quantization_config") or {}).get("quant_method", "bitsandbytes")
        if how not in ("bitsandbytes", *AUTO_QUANTIZATION_CONFIG_MAPPING):
            raise ValueError(f"its weights are quantised by an unknown method, {how!r}")
    safe = {"trust_remote_code": False, "weights_only": True, "output_loading_info": True}
    model, report = kind.from_pretrained(source, config=config, **safe, **settings)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"its files lack {len(missing)} of its weights, first {missing[0]}")
    return model.eval()


def processor_class(config: Any, name: str = "") -> type[ProcessorMixin] | None:
    """The processor class of a name, else that of a configuration; None for a text-only model.

    Raises:
        ValueError: transformers has no processor of that name.
    """
    if not name:
        kind: Any = PROCESSOR_MAPPING.get(type(config), None)
        return kind  # type: ignore[no-any-return]
    found = getattr(transformers, name, None)
    if not isinstance(found, type) or not issubclass(found, ProcessorMixin):
        raise ValueError(
            f"the processor class {name!r} is unknown to transformers {transformers.__version__}"
        )
    return found


# --- processors and tokenizers


class _ImagesAndText(ProcessorMixin):
    """Stands between a processor class and `ProcessorMixin`, and hands on the parts that exist."""

    def __init__(self, *parts: Any, video_processor: None = None, **settings: Any) -> None:
        super().__init__(*filter(None, parts), **settings)  # type: ignore[no-untyped-call]


def without_video(base: type[ProcessorMixin]) -> type[Any]:
    """A processor class that takes only images and text: video processors need torchvision.

    It keeps the name of `base`, which is what a saved processor is known by.
    """
    every = base.get_attributes()
    parts = [name for name in every if name != "video_processor"]
    stock: Any = base._get_arguments_from_pretrained

    def arguments(cls: type[ProcessorMixin], *args: Any, **kwargs: Any) -> list[Any]:
        given = iter(stock.__func__(cls, *args, **kwargs))
        return [next(given) if name in parts else None for name in every]

    members: dict[str, Any] = {
        "get_attributes": classmethod(lambda cls: parts),
        "_get_arguments_from_pretrained": classmethod(arguments),
        "__module__": __name__,
    }
    module = vars(sys.modules[base.__module__])
    if "num2words" in module:  # SmolVLM asks for these even where there is no video
        module["num2words"] = module["num2words"] or str
        members["video_processor"] = SimpleNamespace(num_frames=None, fps=None)
    return type(base.__name__, (base, _ImagesAndText), members)


@contextmanager
def text_as_written(processor: Any) -> Iterator[None]:
    """Keep a processor from adding to the text that a template writes (PaliGemma)."""
    processor.prepare_inputs_layout = partial(ProcessorMixin.prepare_inputs_layout, processor)
    try:
        yield
    finally:
        del processor.prepare_inputs_layout


def tokens_as_text(tokenizer: Any, text: str) -> list[int] | None:
    """Ids of a text in which no added token is recognised; None where that is not possible."""
    encode = getattr(tokenizer, "_encode_without_added_tokens", None)
    return None if encode is None else list(encode(text))


def token_types(processor: Any, ids: torch.Tensor) -> torch.Tensor | None:
    """[1, token] kinds of tokens as the processor marks them; None where it does not mark any."""
    mark = getattr(processor, "create_mm_token_type_ids", None)
    return None if mark is None else torch.as_tensor(mark(ids.tolist()), dtype=ids.dtype)


def tokens_per_image(processor: Any, image: Image.Image) -> dict[str, list[int]]:
    """What a processor tells of an image by its size: numbers of tokens and of patches."""
    counts = processor._get_num_multimodal_tokens(image_sizes=[(image.height, image.width)])
    return {name: counts[name] for name in ("num_image_tokens", "num_image_patches")}


def internvl_tiles(settings: Any, image: Image.Image) -> tuple[int, int]:
    """Columns and rows of the tiles that InternVL's image processor cuts an image into."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    columns, rows = get_optimal_tiled_canvas(
        (image.height, image.width),
        (settings.size["height"], settings.size["width"]),
        settings.min_patches,
        settings.max_patches,
    )
    return int(columns), int(rows)


def llava_grid(processor: Any, image: Image.Image, side: int) -> tuple[int, int]:
    """Rows and columns of the fine grid that LLaVA-OneVision lays over a single image."""
    from transformers.image_processing_utils import select_best_resolution

    size = processor.image_processor.size
    tile = size.get("height") or size["shortest_edge"]
    best = select_best_resolution(
        (image.height, image.width), processor.image_processor.image_grid_pinpoints
    )
    tokens, rows = processor._get_unpadded_features(
        image.height, image.width, side, side, best[0] // tile, best[1] // tile
    )
    return int(rows), int(tokens // rows)
