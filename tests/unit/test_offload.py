"""A model spread over several devices gives what it gives on one; here the disk is the second."""

import example_prompts
import numpy as np
import pytest
import random_models
import torch

from mmheads.attention import ablate, mean_outputs
from mmheads.heads import Head, HeadSet
from mmheads.models import load
from mmheads.prefix import on_device
from mmheads.prompts import encode
from mmheads.scoring import score_heads
from mmheads.streaming import stream

pytestmark = pytest.mark.slow
pytest.importorskip("accelerate", reason="device maps need Accelerate")


def spread(vlm) -> dict[str, str]:
    """Every second layer of the decoder on disk, all else on the CPU."""
    prefix = next(
        name for name, module in vlm.model.named_modules() if module is vlm.decoder.layers
    )
    layers = {f"{prefix}.{i}": "disk" for i in range(0, vlm.geometry.layers, 2)}
    weights = vlm.model.named_parameters(remove_duplicate=False)
    names = {name.rsplit(".", 1)[0] for name, _ in weights}
    others = {name: "cpu" for name in names if not name.startswith(tuple(f"{i}." for i in layers))}
    return layers | others


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3", "internvl"])
def test_recording_masking_and_streaming_on_several_devices(family, tmp_path):
    folder = random_models.save(family, tmp_path / family)
    whole = load(folder, device="cpu")
    parted = load(folder, device=spread(whole))
    assert {str(p.device) for p in parted.model.parameters()} == {"cpu", "meta"}
    examples = [example_prompts.example(family)]
    scores = [score_heads(vlm, examples, progress=False).values for vlm in (whole, parted)]
    np.testing.assert_allclose(*scores, atol=1e-6, rtol=1e-5)

    layers = [int(layer) for layer in whole.geometry.eligible.any(axis=1).nonzero()[0]]
    found = []
    for vlm in (whole, parted):
        inputs = on_device(vlm, encode(vlm, example_prompts.without_images(examples[0])).inputs)
        heads = HeadSet(tuple(Head(n, 0) for n in layers), vlm.geometry, vlm.model_id)
        with torch.no_grad():
            with mean_outputs(vlm) as means:
                vlm.model(**inputs)
            given = [means()]
            for context in (
                ablate(vlm, heads),
                ablate(vlm, heads, "mean", means=means()),
                stream(vlm, heads, 2, 5),
            ):
                with context:
                    given.append(vlm.model(**inputs).logits)
        found.append(given)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-5)
