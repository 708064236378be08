"""Models load, or are refused in one sentence that says what was expected."""

import json
import re
import warnings

import example_prompts
import pytest
import random_models
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel

from mmheads import compat
from mmheads.models import load
from mmheads.prompts import encode
from mmheads.scoring import score_heads


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_models.save("qwen3", tmp_path_factory.mktemp("models") / "small")


@pytest.fixture
def changed(folder, tmp_path):
    """A copy of a model's folder that a test may damage."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def refused(model_id, match: str, **settings) -> None:
    """Loading fails with one short sentence."""
    with pytest.raises(ValueError, match=match) as error:
        load(model_id, **settings)
    assert len(str(error.value)) < 500
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("device", ["", "auto", "cpu", "cpu:0"])
def test_a_model_on_a_cpu_runs_in_float32(folder, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "float32"
    vlm = load(folder, device=device)
    assert vlm.model.dtype == torch.float32
    assert vlm.device.type == "cpu"


def test_a_half_precision_checkpoint_is_float32_on_a_cpu(changed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    load(changed, device="cpu").model.half().save_pretrained(changed)
    assert json.loads((changed / "config.json").read_text())["dtype"] == "float16"
    for device in ("auto", "cpu:0", "cpu", {"": "cpu"}):
        assert load(changed, device=device).model.dtype == torch.float32


@pytest.mark.parametrize("device", ["nonsense", "cuda:0", "cuda:99", "mps", "meta-device"])
def test_a_device_that_is_not_here_is_refused(folder, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(
        folder, f"the device '{device}' cannot be used: .* this machine has 'cpu'", device=device
    )


def test_a_model_that_is_not_there_is_refused(tmp_path):
    refused(tmp_path / "nothing", "nothing could not be loaded: .*expected a folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "empty could not be loaded: .*expected a folder")


def test_a_cut_weight_file_is_named(changed):
    path = changed / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(changed, "a weight file of .* is damaged or cut")


@pytest.mark.parametrize("inside", [True, False])
def test_weights_that_an_unknown_method_quantised_are_refused_by_its_name(inside, changed):
    """transformers reads whole numbers as weights, and leaves random what it does not find."""
    config = json.loads((changed / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "own-4bit"}
    if inside:
        config = {"model_type": "llava", "text_config": config, "vision_config": {}}
    (changed / "config.json").write_text(json.dumps(config))
    refused(changed, "its weights are quantised by an unknown method, 'own-4bit'")


@pytest.mark.parametrize("lost", ["model.layers.1.self_attn.q_proj.weight", "lm_head.weight"])
def test_a_file_that_lacks_weights_is_refused_with_the_name_of_one(lost, changed):
    weights = load_file(changed / "model.safetensors")
    del weights[lost]
    save_file(weights, changed / "model.safetensors", {"format": "pt"})
    refused(changed, f"its files lack 1 of its weights, first {re.escape(lost)}")


def test_a_processor_class_that_is_unknown_is_named(changed):
    (changed / "processor_config.json").write_text('{"processor_class": "OvisProcessor"}')
    refused(changed, "the processor class 'OvisProcessor' is unknown to transformers")


def test_a_model_type_that_is_unknown_is_refused_without_a_list(changed):
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"model_type": "ovis"}))
    refused(changed, "could not be loaded: .*ovis")


def test_code_from_a_folder_is_never_run(changed):
    config = json.loads((changed / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (changed / "config.json").write_text(json.dumps(config))
    (changed / "own.py").write_text(f"open({str(changed / 'ran')!r}, 'w')\nclass Own: pass")
    refused(changed, "could not be loaded")
    assert not (changed / "ran").exists()


@pytest.mark.parametrize("kind", ["t5", "vit", "mamba"])
def test_models_of_another_kind_are_refused(kind, changed):
    settings = {
        "t5": {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2},
        "vit": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        "mamba": {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 64, "state_size": 4},
    }[kind]
    (changed / "model.safetensors").unlink()
    auto = random_models.AutoModelForCausalLM if kind == "mamba" else AutoModel
    auto.from_config(CONFIG_MAPPING[kind](**settings)).save_pretrained(changed)
    if kind == "mamba":
        refused(changed, 'MambaForCausalLM does not run on .*load it with attention="eager"')
        refused(changed, "no attention layer with an `o_proj`", attention="eager")
    else:
        refused(changed, f"models of the type '{kind}' are not supported, as they neither read")
    assert AutoConfig.from_pretrained(changed).model_type == kind


def test_a_model_without_a_chat_template_takes_one(changed, tmp_path):
    template = (changed / "chat_template.jinja").read_text()
    (changed / "chat_template.jinja").unlink()
    example = example_prompts.example("qwen3")
    with pytest.raises(ValueError, match=r"has no chat template.*load\(..., chat_template=...\)"):
        encode(load(changed), example)
    file = tmp_path / "mine.jinja"
    file.write_text(template)
    given = [load(changed, chat_template=text) for text in (template, file, str(file))]
    assert len({len(encode(vlm, example)) for vlm in given}) == 1
    refused(changed, "'no such file' is neither a file nor", chat_template="no such file")


def test_layers_without_a_weight_are_scored_and_placed():
    """As AWQ, GPTQ and HQQ have them: packed buffers in place of a weight."""

    class Packed(torch.nn.Module):
        def __init__(self, linear: torch.nn.Linear) -> None:
            super().__init__()
            self.register_buffer("qweight", linear.weight.detach().clone())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.qweight)

    plain, packed = example_prompts.vlm("qwen3"), example_prompts.vlm("qwen3")
    for module in packed.attentions.values():
        module.o_proj = Packed(module.o_proj)
    del packed.__dict__["attentions"]
    assert packed.device_of(0) == torch.device("cpu")
    examples = [example_prompts.example("qwen3")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = [score_heads(vlm, examples, progress=False).values for vlm in (plain, packed)]
    assert (scores[0] == scores[1]).all()
    assert compat.device_of(torch.nn.Identity()) is None


@pytest.mark.parametrize("setting", ["num_attention_heads", "num_key_value_heads"])
def test_layers_with_other_numbers_of_heads_are_refused_by_name(setting, changed):
    config = CONFIG_MAPPING["qwen3"](
        **{k: v for k, v in random_models.SMALL.items() if k != "layer_types"}
    )
    config.per_layer_config = {0: {setting: 1}}
    vlm = example_prompts.vlm("qwen3")
    vlm.__dict__.pop("geometry", None)
    object.__setattr__(vlm, "model", _With(vlm.model, config))
    with pytest.raises(ValueError, match=f"different numbers of heads \\({setting}"):
        _ = vlm.geometry


class _With:
    """A model with another configuration."""

    def __init__(self, model, config) -> None:
        self.model, self.config = model, config

    def __getattr__(self, name):
        return getattr(self.model, name)
