"""GGUF files: a small one is read as it was written, and every wrong one is one sentence."""

import hashlib

import numpy as np
import pytest

from mmheads import gguf as reader
from mmheads.models import load

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LAYERS, HEADS, GROUPS, WIDTH = 2, 4, 2, 32


def write(path, architecture: str = "qwen2", template: str = TEMPLATE):
    """A random Qwen2 of two layers -> its tensors by name."""
    gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(4096)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    letters = map(chr, range(33, 127))
    tokens = [*letters, "Ġ", "Ċ", "th", "the", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 3) + [3] * 3)
    writer.add_token_merges(["t h", "th e"])
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_pad_token_id(len(tokens) - 3)
    if template:
        writer.add_chat_template(template)
    rng = np.random.default_rng(0)
    narrow = WIDTH * GROUPS // HEADS
    shapes = {
        "token_embd.weight": (len(tokens), WIDTH),
        "output_norm.weight": (WIDTH,),
        "output.weight": (len(tokens), WIDTH),
    }
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.{name}": shape
            for name, shape in {
                "attn_norm.weight": (WIDTH,),
                "attn_q.weight": (WIDTH, WIDTH),
                "attn_q.bias": (WIDTH,),
                "attn_k.weight": (narrow, WIDTH),
                "attn_k.bias": (narrow,),
                "attn_v.weight": (narrow, WIDTH),
                "attn_v.bias": (narrow,),
                "attn_output.weight": (WIDTH, WIDTH),
                "ffn_norm.weight": (WIDTH,),
                "ffn_gate.weight": (2 * WIDTH, WIDTH),
                "ffn_up.weight": (2 * WIDTH, WIDTH),
                "ffn_down.weight": (WIDTH, 2 * WIDTH),
            }.items()
        }
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_a_file_is_loaded_as_it_was_written(tmp_path):
    path = tmp_path / "small-model.gguf"
    tensors = write(path)
    vlm = load(path, device="cpu")
    assert vlm.model_id == "small-model"
    assert vlm.revision == hashlib.sha256(path.read_bytes()).hexdigest()
    assert vlm.processor.chat_template == TEMPLATE
    assert (vlm.geometry.layers, vlm.geometry.heads, vlm.geometry.kv_groups) == (2, 4, 2)
    layer = vlm.model.model.layers[1]
    np.testing.assert_array_equal(
        layer.mlp.up_proj.weight.detach().numpy(), tensors["blk.1.ffn_up.weight"]
    )
    np.testing.assert_array_equal(
        layer.self_attn.o_proj.weight.detach().numpy(), tensors["blk.1.attn_output.weight"]
    )
    ids = vlm.tokenizer("the<|im_end|>").input_ids
    assert vlm.tokenizer.convert_ids_to_tokens(ids) == ["the", "<|im_end|>"]
    assert vlm.is_text_only
    assert not vlm.model.training


def test_an_unknown_architecture_is_named(tmp_path):
    write(tmp_path / "a.gguf", architecture="clip")
    with pytest.raises(ValueError, match=r"a\.gguf cannot be loaded: .*clip is not supported"):
        load(tmp_path / "a.gguf", device="cpu")


@pytest.mark.parametrize("share", [0.0, 0.02, 0.2, 0.6, 0.99])
def test_a_truncated_file_is_one_sentence(tmp_path, share):
    write(tmp_path / "a.gguf")
    content = (tmp_path / "a.gguf").read_bytes()
    (tmp_path / "a.gguf").write_bytes(content[: max(8, int(share * len(content)))])
    with pytest.raises(ValueError, match=r"a\.gguf is cut off or damaged"):
        load(tmp_path / "a.gguf", device="cpu")


def test_a_file_without_chat_template_is_named(tmp_path):
    write(tmp_path / "a.gguf", template="")
    with pytest.raises(ValueError, match="has no chat template"):
        load(tmp_path / "a.gguf", device="cpu")


def test_a_missing_file_and_other_formats_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.gguf does not exist; expected a GGUF file"):
        load(tmp_path / "none.gguf")
    (tmp_path / "a.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match=r"a\.gguf is not a GGUF file: it begins with b'PK"):
        load(tmp_path / "a.gguf")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(reader, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"needs the packages gguf, accelerate; install mmheads\[gguf\]"
    ):
        load(tmp_path / "a.gguf")
