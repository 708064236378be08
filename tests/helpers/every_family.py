"""A small random model of every image-text type that transformers has, from its own defaults.

Prompts are given as token ids: no pixels are fed, so that no processor is needed. Run as a script,
it writes the table of families in `docs/adding_a_family.md`.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import exactness
import random_models
import torch
import transformers
from tqdm import tqdm
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from mmheads import families, paths
from mmheads.models import VLM
from mmheads.prompts import Prompt

TYPES = tuple(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)

LAYERS = 4

_TEXT = {
    **random_models.SMALL,
    "sliding_window": 6,
    "attention_chunk_size": 6,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "v_head_dim"), 16),
    "qk_rope_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "query_pre_attn_scalar": 16,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 2,
    "global_head_dim": 32,
}
"""Settings of language models; each configuration takes those that it has."""


def _rope(*sections: int) -> dict[str, Any]:
    return {"rope_parameters": {**_ROPE, "mrope_section": list(sections)}}


_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_LATENT = {"num_key_value_heads": 4, "head_dim": 8}
_FOUR = ["full_attention"] * LAYERS
_OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("glm4v", "glm46v", "glmga", "glm_ocr"), _rope(2, 3, 3)),
    "glm4v_moe": _rope(1, 1, 2),
    **dict.fromkeys(
        ("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "paddleocr_vl"), _rope(4, 2, 2)
    ),
    **dict.fromkeys(("kimi_k25", "mistral_large4", "mistral4", "glm5_next"), _LATENT),
    "hunyuan_vl": {**_rope(2, 2, 2, 2), "head_dim": 16},
    "ernie4_5_vl_moe": {**_rope(3, 3, 2), "moe_intermediate_size": [32, 32]},
    "deepseek_ocr2": {"mlp_layer_types": ["dense", "sparse"] * 2, "num_experts_per_tok": 2},
    "cohere_compass": {
        "rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _ROPE)
    },
    "step3p7": {"sliding_window": 6},
}
"""Further settings of the language models of some types."""

_DEPTHS = ("num_hidden_layers", "depth", "num_layers", "encoder_layers", "vision_layers")


_WIDTHS = ("out_hidden_size", "text_hidden_size")
_PARTS: dict[tuple[str, str], dict[str, Any]] = {
    ("molmo2", "adapter_config"): {"vision_feature_layer": [1, 0]},
    ("perception_lm", "vision_config"): {"model_args": {"embed_dim": 32}},
    ("fast_vlm", "vision_config"): {"hidden_size": 32},
    ("nemotron_h_omni", "vision_config"): {"video_temporal_patch_size": 2},
}
"""Further settings of other parts of some types."""

_ON_CPU = ("idefics3", "granite_docling")
"""Types that send their inputs to where their vision tower is."""

_SMALL = 500_000
"""Weights of a layer up to which it is filled."""


def build(kind: str, seed: int = 0) -> PreTrainedModel:
    """A small random model of a type."""
    default = CONFIG_MAPPING[kind]()
    text = default.get_text_config()
    parts = {name: getattr(default, name) for name in default.sub_configs}
    given: dict[str, Any] = {}
    for name, part in parts.items():
        if part is None:
            continue
        if part is text:
            given[name] = {"model_type": part.model_type, **_small(part), **_OWN.get(kind, {})}
        else:
            given[name] = {
                "model_type": part.model_type,
                **{depth: 2 for depth in _DEPTHS if isinstance(_get(part, depth), int)},
                **{width: 64 for width in _WIDTHS if isinstance(_get(part, width), int)},
                **_PARTS.get((kind, name), {}),
            }
    if text is default:
        given |= {**_small(text), **_OWN.get(kind, {})}
    config = CONFIG_MAPPING[kind](**given)
    for name in ("image_token_id", "image_token_index", "image_patch_id"):
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, random_models.IMAGE_ID)
    config.vision_start_token_id = config.audio_token_id = LAYERS
    with torch.device("cpu" if kind in _ON_CPU else "meta"), _without_timm():
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _fill(model)
    return model


def _fill(model: PreTrainedModel) -> None:
    """Give the language model weights, and all else that is small; the rest stays without."""
    decoder = model.get_decoder()
    name = next(name for name, module in model.named_modules() if module is decoder)
    attention = {"attn_implementation": decoder.config._attn_implementation}
    made = type(decoder)._from_config(decoder.config, dtype=torch.float32, **attention).eval()
    for weight in made.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.25)
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, made)
    for module in model.modules():
        if sum(weight.numel() for weight in module.parameters(recurse=False)) < _SMALL:
            for part, weight in module.named_parameters(recurse=False):
                if weight.is_meta:
                    filled = torch.nn.init.normal_(torch.empty(weight.shape), std=0.25)
                    setattr(module, part, torch.nn.Parameter(filled))


@contextmanager
def _without_timm() -> Iterator[None]:
    """Vision towers that need a package that is not here are left out."""
    stock = AutoModel.from_config

    def made(config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        try:
            return stock(config, *args, **kwargs)
        except ImportError:
            return torch.nn.Identity()

    with mock.patch.object(AutoModel, "from_config", made):
        yield


def _small(text: Any) -> dict[str, Any]:
    layers = text.num_hidden_layers
    small = {name: value for name, value in _TEXT.items() if _has(text, name)}
    for name, value in text.to_dict().items():
        if isinstance(value, list) and len(value) == layers and name != "layer_types":
            small[name] = value[:LAYERS]
    if kinds := _get(text, "layer_types"):
        of_each = list(dict.fromkeys(kinds))
        small["layer_types"] = (of_each * LAYERS)[:LAYERS]
    rope = _get(text, "rope_parameters") or {}
    if "mrope_section" in rope:
        small["rope_parameters"] = {
            **rope,
            "mrope_section": [4, 2, 2],
            "partial_rotary_factor": 1.0,
        }
    return small


def _get(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return None


def _has(config: Any, name: str) -> bool:
    return _get(config, name) is not None


# --- what comes of a type

WORKS, IN_WHOLE = "works", "works, each question in a full pass"
TEXT_ONLY, REFUSED, UNKNOWN = "text only", "refused", "not checked"

_TEXT_ONLY = {"mllama": "images come by cross attention; a prompt with images is refused"}


@cache
def _tokenizer() -> Any:
    return random_models.build("qwen3")[1]


def outcome(kind: str) -> tuple[str, str]:
    """Whether a type works, and why not.

    Raises:
        AssertionError: It gives other numbers than full passes of the model.
    """
    try:
        model = build(kind)
    except Exception as error:  # whatever a configuration does not like
        return UNKNOWN, f"no small model of it could be made ({type(error).__name__})"
    if kind in families.REFUSED:
        return REFUSED, families.REFUSED[kind]
    try:
        vlm = VLM(model=model, processor=_tokenizer(), model_id=kind)
        _ = vlm.geometry
        prompt = exactness.token_prompt(vlm)
        if error := _fails(vlm.model.double(), prompt) and _fails(vlm.model.float(), prompt):
            return UNKNOWN, f"the model does not run on tokens alone ({error})"
        cached = exactness.check(vlm, prompt, rtol=1e-4)
    except ValueError as error:
        return REFUSED, str(error).removeprefix(f"{kind} ").split(";")[0]
    if kind in _TEXT_ONLY:
        return TEXT_ONLY, _TEXT_ONLY[kind]
    return (WORKS, "") if cached else (IN_WHOLE, "tokens of the context see the question")


@torch.no_grad()
def _fails(model: PreTrainedModel, prompt: Prompt) -> str:
    """What a model raises, some in one precision, some without pixels; empty if nothing."""
    try:
        model(**prompt.own.inputs, use_cache=False)
    except Exception as error:
        return type(error).__name__
    return ""


PAGE = paths.ROOT / "docs" / "adding_a_family.md"
_BEGIN, _END = "<!-- families: begin -->\n", "<!-- families: end -->\n"


def listed() -> dict[str, tuple[str, str]]:
    """The table of the page: by type, what comes of it and why."""
    table = PAGE.read_text(encoding="utf-8").split(_BEGIN)[1].split(_END)[0]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| `")]
    return {kind.strip(" `"): (status.strip(), why.strip()) for kind, status, why in rows}


def write() -> None:
    """Write the table anew."""
    found = {kind: outcome(kind) for kind in tqdm(TYPES)}
    counts = Counter(status for status, _ in found.values())
    text = f"transformers {transformers.__version__}, {len(found)} types: "
    lines = [
        text + ", ".join(f"{count} {status}" for status, count in counts.most_common()) + ".",
        "",
        "| type | | why |",
        "|---|---|---|",
        *(f"| `{kind}` | {status} | {why} |" for kind, (status, why) in found.items()),
    ]
    before, rest = PAGE.read_text(encoding="utf-8").split(_BEGIN)
    after = rest.split(_END)[1]
    table = "\n".join(lines) + "\n"
    PAGE.write_text(before + _BEGIN + table + _END + after, encoding="utf-8")


if __name__ == "__main__":
    write()
