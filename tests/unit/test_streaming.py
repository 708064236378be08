"""Sink and window heads against a mask a head, in prefill and decoding, in every family."""

import copy

import example_prompts
import numpy as np
import pytest
import random_models
import torch
from transformers import DynamicCache

from mmheads.attention.hook import attached
from mmheads.heads import Head, HeadSet
from mmheads.prompts import encode
from mmheads.streaming import kernels, stream

SINKS, WINDOW = 3, 7


def chosen(vlm, *, whole_groups: bool = False) -> HeadSet:
    """Some dense heads: in some layers none, in others some of a group, or whole groups."""
    geometry = vlm.geometry
    shared = geometry.heads // geometry.kv_groups
    layers = sorted({int(layer) for layer in np.argwhere(geometry.eligible)[:, 0]})[1:]
    heads = [(layer, 0) for layer in layers]
    heads += [(layers[0], geometry.heads - 1)]
    if whole_groups:
        heads = [(layer, head) for layer in layers for head in range(shared)]
    return HeadSet(tuple(dict.fromkeys(Head(*h) for h in heads)), geometry, vlm.model_id)


def masked(vlm, dense: HeadSet, sinks: int = SINKS, window: int = WINDOW):
    """A context in which heads attend under a mask each, by plain matrix products."""

    def attend(call):
        query, shared = call.query, call.query.shape[1] // call.key.shape[1]
        key, value = (t.repeat_interleave(shared, 1) for t in (call.key, call.value))
        rows, keys = query.shape[2], key.shape[2]
        if call.mask is None:
            own = torch.arange(keys - rows if rows == 1 else 0, keys)[:rows]
            allowed = (torch.arange(keys) <= own[:, None])[None, None]
            starts = torch.zeros(len(query), dtype=int)
        else:
            allowed = call.mask
            last = int(allowed.any(2).any(0)[0].nonzero()[-1]) if keys != rows else keys - 1
            own = torch.arange(last + 1 - rows, last + 1)
            starts = allowed[:, 0, -1].int().argmax(-1)
        at = torch.arange(keys)
        near = own[:, None] - at < window
        early = at < starts[:, None, None, None] + sinks
        band = allowed & (near | early)
        is_dense = torch.from_numpy(dense.mask[call.layer])[None, :, None, None]
        seen = torch.where(is_dense, allowed, band)
        scores = (query @ key.transpose(2, 3)) * call.scaling
        attention = scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num()
        return (attention @ value).transpose(1, 2)

    whole = np.flatnonzero(vlm.geometry.eligible.any(axis=1))
    return attached(vlm, dict.fromkeys(map(int, whole), attend))


def inputs(family: str, vlm) -> dict:
    return dict(encode(vlm, example_prompts.without_images(example_prompts.example(family))).inputs)


@torch.no_grad()
def logits(vlm, given, **settings) -> torch.Tensor:
    return vlm.model(**given, **settings).logits


@pytest.mark.parametrize("family", random_models.FAMILIES)
@pytest.mark.parametrize("whole_groups", [False, True])
def test_prefill_equals_a_mask_a_head(family, whole_groups, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", 5)
    vlm = example_prompts.vlm(family)
    given, dense = inputs(family, vlm), chosen(vlm, whole_groups=whole_groups)
    stock = logits(vlm, given)
    with masked(vlm, dense):
        expected = logits(vlm, given)
    with stream(vlm, dense, SINKS, WINDOW):
        found = logits(vlm, given)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found - stock).abs().max() > 1e-3
    assert torch.equal(logits(vlm, given), stock)


@pytest.mark.parametrize("family", random_models.FAMILIES)
@pytest.mark.parametrize("kept", ["dynamic", "static", "compact"])
def test_decoding_equals_a_mask_a_head(family, kept, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", 5)
    vlm = example_prompts.vlm(family)
    given, dense = inputs(family, vlm), chosen(vlm)
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    settings |= {"output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
    if kept == "static":
        settings["cache_implementation"] = "static"
        settings["disable_compile"] = True
    with masked(vlm, dense):
        expected = vlm.model.generate(**given, **settings)
    with stream(vlm, dense, SINKS, WINDOW) as streaming:
        if kept == "compact":
            settings["past_key_values"] = streaming.cache()
        found = vlm.model.generate(**given, **settings)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(
        torch.stack(found.logits), torch.stack(expected.logits), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["qwen3_vl", "internvl", "gemma3", "qwen3"])
def test_a_padded_batch_equals_a_mask_a_head(family, side, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", 5)
    vlm = example_prompts.vlm(family)
    dense = chosen(vlm)
    ids = [torch.randint(10, 60, (length,), generator=torch.Generator()) for length in (21, 34)]
    given = torch.zeros(2, 34, dtype=int)
    mask = torch.zeros(2, 34, dtype=int)
    for row, tokens in enumerate(ids):
        place = slice(34 - len(tokens), None) if side == "left" else slice(len(tokens))
        given[row, place], mask[row, place] = tokens, 1
    both = {"input_ids": given, "attention_mask": mask}
    with masked(vlm, dense):
        expected = logits(vlm, both)
    with stream(vlm, dense, SINKS, WINDOW):
        found = logits(vlm, both)
    real = mask.bool()
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)
    if side == "left":
        settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        with masked(vlm, dense):
            expected = vlm.model.generate(**both, **settings)
        with stream(vlm, dense, SINKS, WINDOW) as streaming:
            assert torch.equal(vlm.model.generate(**both, **settings), expected)
            with pytest.raises(ValueError, match="batches without padding"):
                vlm.model.generate(**both, **settings, past_key_values=streaming.cache())


@pytest.mark.parametrize("family", random_models.FAMILIES)
def test_with_every_head_dense_or_a_window_over_all_it_is_the_stock_model(family):
    vlm = example_prompts.vlm(family)
    given = inputs(family, vlm)
    stock = logits(vlm, given)
    with stream(vlm, vlm.every_head, SINKS, WINDOW) as streaming:
        assert torch.equal(logits(vlm, given), stock)
        assert streaming.dense_head_share == streaming.dense_group_share == 1
        assert streaming.layers == ()
    with stream(vlm, chosen(vlm), SINKS, 10_000):
        assert torch.equal(logits(vlm, given), stock)


def test_sliding_layers_are_left_as_they_are():
    vlm = example_prompts.vlm("gemma3")
    sliding = sorted(set(range(vlm.geometry.layers)) - set(vlm.geometry.global_layers))
    assert sliding
    with stream(vlm, HeadSet((), vlm.geometry, vlm.model_id), SINKS, WINDOW) as streaming:
        assert streaming.layers == vlm.geometry.global_layers
        kept = streaming.cache().layers
    plain = DynamicCache(config=vlm.text_config).layers
    assert [type(kept[i]) for i in sliding] == [type(plain[i]) for i in sliding]


def test_a_prompt_in_pieces_equals_the_whole():
    vlm = example_prompts.vlm("qwen3")
    ids = torch.randint(10, 60, (1, 60), generator=torch.Generator().manual_seed(0))
    dense = chosen(vlm)
    with stream(vlm, dense, SINKS, WINDOW) as streaming:
        whole = logits(vlm, {"input_ids": ids})
        for cache in (streaming.cache(), DynamicCache()):
            pieces = [
                logits(vlm, {"input_ids": piece}, past_key_values=cache)
                for piece in ids.split([25, 1, 20, 14], dim=1)
            ]
            torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-5, rtol=1e-5)


def test_the_compact_cache_holds_what_it_says():
    vlm = example_prompts.vlm("qwen3")
    geometry = vlm.geometry
    ids = torch.randint(10, 60, (1, 90), generator=torch.Generator().manual_seed(0))
    dense = chosen(vlm, whole_groups=True)
    with stream(vlm, dense, SINKS, WINDOW) as streaming:
        compact, plain = streaming.cache(), DynamicCache()
        for cache in (compact, plain):
            logits(vlm, {"input_ids": ids}, past_key_values=cache)
        assert compact.get_seq_length() == 90
        with pytest.raises(ValueError, match="cannot be cropped"):
            compact.crop(-1)
    groups = geometry.layers * geometry.kv_groups
    full_groups = len(dense.kv_groups)
    assert streaming.dense_group_share == full_groups / groups
    one = vlm.text_config.head_dim * 4 * 2
    expected = one * (90 * full_groups + (SINKS + WINDOW) * (groups - full_groups))
    assert sum(layer.bytes for layer in compact.layers) == expected
    assert (
        sum(layer.keys.nbytes + layer.values.nbytes for layer in plain.layers) == 90 * one * groups
    )


def test_a_compact_cache_is_used_where_it_belongs():
    vlm = example_prompts.vlm("qwen3")
    ids = torch.randint(10, 60, (2, 40), generator=torch.Generator().manual_seed(0))
    dense = chosen(vlm)
    with stream(vlm, dense, SINKS, WINDOW) as streaming:
        whole = logits(vlm, {"input_ids": ids})
        cache = streaming.cache()
        logits(vlm, {"input_ids": ids[:, :30]}, past_key_values=cache)
        for layer in cache.layers:
            assert layer.window_pair is None
        copied = copy.deepcopy(cache)
        for each in (cache, copied):
            rest = logits(vlm, {"input_ids": ids[:, 30:]}, past_key_values=each)
            torch.testing.assert_close(rest, whole[:, 30:], atol=1e-5, rtol=1e-5)
    with stream(vlm, dense, SINKS, WINDOW + 1), pytest.raises(ValueError, match="other keys"):
        logits(vlm, {"input_ids": ids[:, :1]}, past_key_values=cache)
    with pytest.raises(ValueError, match="use it only inside `stream`"):
        logits(vlm, {"input_ids": ids[:, :1]}, past_key_values=copied)


def test_a_call_that_failed_leaves_nothing_for_the_next_one(monkeypatch):
    vlm = example_prompts.vlm("qwen3")
    ids = torch.randint(10, 60, (1, 40), generator=torch.Generator().manual_seed(0))
    with stream(vlm, chosen(vlm), SINKS, WINDOW) as streaming:
        whole = logits(vlm, {"input_ids": ids})
        cache = streaming.cache()
        logits(vlm, {"input_ids": ids[:, :30]}, past_key_values=cache)
        with monkeypatch.context() as broken:
            broken.setattr(type(streaming), "_attend", None)
            with pytest.raises(TypeError):
                logits(vlm, {"input_ids": ids[:, 30:]}, past_key_values=copy.deepcopy(cache))
        torch.testing.assert_close(logits(vlm, {"input_ids": ids}), whole)
        rest = logits(vlm, {"input_ids": ids[:, 30:]}, past_key_values=cache)
        torch.testing.assert_close(rest, whole[:, 30:], atol=1e-5, rtol=1e-5)
    hooks = [module._forward_pre_hooks for module in vlm.attentions.values()]
    assert not any(hooks)


def test_keys_appended_by_hand_are_kept_and_evicted_as_in_a_call():
    vlm = example_prompts.vlm("qwen3")
    geometry, size = vlm.geometry, vlm.text_config.head_dim
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, geometry.kv_groups, 30, size, generator=generator)
    with stream(vlm, chosen(vlm), SINKS, WINDOW) as streaming:
        by_hand = streaming.cache()
    for part in states.split([20, 10], dim=2):
        by_hand.layers[1].append(part, part)
    layer = by_hand.layers[1]
    assert torch.equal(layer.keys, states[:, layer.full_groups])
    assert layer.evicted == (SINKS, 20 - WINDOW)
    visible = [*range(SINKS), *range(20 - WINDOW, 30)]
    assert torch.equal(layer.window_pair[0], states[:, layer.window_groups][:, :, visible])
    with pytest.raises(ValueError, match="use it only inside `stream`"):
        by_hand.update(states, states, 1)


def test_masks_that_window_heads_do_not_know_are_refused():
    vlm = example_prompts.vlm("qwen3")
    ids = torch.arange(10, 30)[None]
    causal = torch.ones(20, 20, dtype=torch.bool).tril()
    per_head = causal.expand(1, vlm.geometry.heads, 20, 20)
    bias = torch.zeros(20, 20).masked_fill(~causal, torch.finfo(torch.float32).min)
    bias[5, 2] = -1.5
    with stream(vlm, chosen(vlm), SINKS, WINDOW):
        plain = logits(vlm, {"input_ids": ids})
        given = {"input_ids": ids, "attention_mask": causal[None, None]}
        torch.testing.assert_close(logits(vlm, given), plain, atol=1e-5, rtol=1e-5)
        with pytest.raises(ValueError, match="mask per head"):
            logits(vlm, {"input_ids": ids, "attention_mask": per_head})
        with pytest.raises(ValueError, match="adds a bias"):
            logits(vlm, {"input_ids": ids, "attention_mask": bias[None, None]})


def test_padding_longer_than_a_window_is_no_obstacle(monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", 5)
    vlm = example_prompts.vlm("qwen3")
    ids = torch.randint(10, 60, (1, 50), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(50) < 20).long()[None]
    for sinks in (SINKS, 0):
        with stream(vlm, chosen(vlm), sinks, WINDOW):
            padded = logits(vlm, {"input_ids": ids, "attention_mask": mask})
            plain = logits(vlm, {"input_ids": ids[:, :20]})
        torch.testing.assert_close(padded[:, :20], plain, atol=1e-5, rtol=1e-5)


def test_gradients_are_those_of_a_mask_a_head(monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    vlm = example_prompts.vlm("qwen3")
    ids = torch.randint(10, 60, (1, 80), generator=torch.Generator().manual_seed(0))
    table = vlm.model.get_input_embeddings()(ids).detach()
    found = []
    for context in (masked(vlm, chosen(vlm), 2, 16), stream(vlm, chosen(vlm), 2, 16)):
        embeddings = table.clone().requires_grad_()
        with context:
            vlm.model(inputs_embeds=embeddings).logits.square().mean().backward()
        found.append(embeddings.grad)
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-4)


def test_beams_choose_rows_of_the_compact_cache():
    vlm = example_prompts.vlm("qwen3")
    ids = torch.randint(10, 60, (1, 30), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 10, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    with stream(vlm, chosen(vlm), SINKS, WINDOW) as streaming:
        plain = vlm.model.generate(ids, **settings)
        kept = vlm.model.generate(ids, **settings, past_key_values=streaming.cache())
    assert torch.equal(plain, kept)


@pytest.mark.parametrize("kept", ["dynamic", "static", "compact"])
def test_tiles_in_a_model_equal_a_mask_a_head(kept, monkeypatch):
    tiled = rows_in_tiles(16, monkeypatch)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    vlm, sinks, window = example_prompts.vlm("qwen3"), 5, 24
    ids = torch.randint(10, 60, (2, 203), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    settings |= {"output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
    if kept == "static":
        settings |= {"cache_implementation": "static", "disable_compile": True}
    with masked(vlm, chosen(vlm), sinks, window):
        expected = vlm.model.generate(ids, **settings)
    with stream(vlm, chosen(vlm), sinks, window) as streaming:
        if kept == "compact":
            settings["past_key_values"] = streaming.cache()
        found = vlm.model.generate(ids, **settings)
    assert tiled == [slice(29, 189)] * len(tiled) != []
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(
        torch.stack(found.logits), torch.stack(expected.logits), atol=1e-5, rtol=1e-5
    )


def rows_in_tiles(tile, monkeypatch):
    """A list that the rows of each call in tiles, which have so many rows, are added to."""
    rows, attend = [], kernels._attend_in_tiles

    def noted(query, key, value, output, part, *settings):
        rows.append(part)
        attend(query, key, value, output, part, *settings)

    monkeypatch.setattr(kernels, "TILE", tile)
    monkeypatch.setattr(kernels, "CHUNK", tile)
    monkeypatch.setattr(kernels, "_attend_in_tiles", noted)
    return rows


def attended(query, key, value, **settings):
    output = torch.full_like(query, torch.nan)
    kernels.banded(query, key, value, output, **settings)
    return output


@pytest.mark.parametrize(
    ("rows", "tile", "sinks", "window"),
    [
        (300, 16, 3, 40),
        (300, 32, 0, 32),
        (301, 32, 50, 20),
        (257, 16, 5, 16),
        (257, 16, 3, 1),
        (90, 64, 4, 60),
    ],
)
def test_tiles_equal_a_mask(rows, tile, sinks, window, monkeypatch):
    tiled = rows_in_tiles(tile, monkeypatch)
    generator = torch.Generator().manual_seed(rows)
    query = torch.randn(2, 2, 3, rows, 8, generator=generator)
    key, value = (torch.randn(2, 4, rows, 8, generator=generator) for _ in range(2))
    at = torch.arange(rows)
    seen = kernels.visible(at, at, sinks, window)
    scores = 0.4 * query.double() @ key[:, [3, 1], None].double().transpose(-1, -2)
    attention = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    expected = (attention @ value[:, [3, 1], None].double()).float()
    settings = {"sinks": sinks, "window": window, "scale": 0.4, "groups": [(0, 3), (1, 1)]}
    found = attended(query, key, value, **settings)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert bool(tiled) == (rows != 90)
    halved = attended(*(t.bfloat16() for t in (query, key, value)), **settings)
    torch.testing.assert_close(halved.float(), expected, atol=0.05, rtol=0.05)
    monkeypatch.setattr(kernels, "_FLASH", None)
    tiled.clear()
    without = attended(query, key, value, **settings)
    assert not tiled
    torch.testing.assert_close(without, expected, atol=1e-5, rtol=1e-5)
    some = attended(query, key, value, **settings | {"groups": [(1, 1)]})
    torch.testing.assert_close(some[:, 1], expected[:, 1], atol=1e-5, rtol=1e-5)
    assert some[:, 0].isnan().all()


@pytest.mark.parametrize("rows", [64, 65])
def test_an_odd_head_is_cut_in_halves(rows, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    query, key, value = torch.randn(
        3, 1, 3, rows, 8, generator=torch.Generator().manual_seed(0)
    ).unbind()
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), is_causal=True, scale=0.4
    )
    found = kernels.causal(query, key, value, 0.4)
    torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=1e-5)


def test_flex_attention_sees_what_the_banded_kernel_sees():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, 2, heads, 300, 16, generator=generator) for heads in (3, 1, 1)
    )
    for sinks, window in ((4, 130), (0, 1), (200, 20), (128, 128)):
        settings = {"sinks": sinks, "window": window, "scale": 0.3}
        expected = attended(query, key[:, :, 0], value[:, :, 0], **settings)
        found = kernels.flex(query, key[:, :, 0], value[:, :, 0], compiled=False, **settings)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        mask = kernels.block_mask(300, sinks, window, "cpu")
        at = torch.arange(384)
        blocks = kernels.visible(at, at, sinks, window).view(3, 128, 3, 128)
        some = blocks.any(3).any(1).to(torch.int32)
        assert torch.equal(mask.to_dense()[0, 0], some)


def test_settings_that_make_no_sense_are_refused():
    vlm = example_prompts.vlm("qwen3")
    dense = chosen(vlm)
    for settings, message in (
        ({"window": 0}, "window 0"),
        ({"window": 2.5}, "window 2.5"),
        ({"window": "4"}, "window '4'"),
        ({"sinks": None}, "sinks None"),
        ({"sinks": -1}, "sinks -1"),
    ):
        with pytest.raises(ValueError, match=message), stream(vlm, dense, **settings):
            pass
    with (
        pytest.raises(ValueError, match="cannot be dense in qwen3_vl"),
        stream(example_prompts.vlm("qwen3_vl"), dense),
    ):
        pass
    with (
        pytest.raises(ValueError, match="sinks are more than"),
        stream(vlm, dense, sinks=40, window=2),
    ):
        logits(vlm, {"input_ids": torch.arange(10, 30)[None]})
    assert vlm.text_config._attn_implementation == "sdpa"
