"""What the tiny models are trained on: their answers, or the words that their pages show."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from tiny_models.architectures import TinyModel
from tiny_models.processors import VOCABULARY
from tiny_models.samples import KINDS, NO_LABEL, WEIGHTS, Batch

_WEIGHTS = torch.tensor(list(WEIGHTS.values()))
_IMAGE = VOCABULARY["<|image_pad|>"]


def loss_and_accuracy(
    model: TinyModel, batch: Batch, *, align: bool = False
) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss of a batch, and the share of right predictions by kind of label.

    Args:
        model: In training mode.
        batch: Samples.
        align: Compare what the vision tower gives for each cell with the word embedding of what
            the cell shows, instead of answering questions.
    """
    if align:
        return _alignment(model, batch)
    labelled = batch.labels != NO_LABEL
    logits = model.lm_head(_hidden(model, batch)[labelled])
    labels, kinds = batch.labels[labelled], batch.kinds[labelled]
    losses = functional.cross_entropy(logits, labels, reduction="none")
    weights = _WEIGHTS[kinds]
    right = (logits.detach().argmax(-1) == labels).float()
    shares = {KINDS[k]: right[kinds == k].mean().item() for k in kinds.unique().tolist()}
    return (losses * weights).sum() / weights.sum(), shares


def _hidden(model: Any, batch: Batch) -> torch.Tensor:
    """Last hidden states, with pages shown as the batch shows them."""
    network = model.model
    if batch.places is None:
        output = network(input_ids=batch.words, use_cache=False)
    elif "pixel_values" in batch.pictures:
        output = network(
            input_ids=batch.places, **_types(model, batch), **batch.pictures, use_cache=False
        )
    elif hasattr(network, "get_rope_index"):
        positions, _ = network.get_rope_index(
            batch.places, mm_token_type_ids=batch.types, **batch.pictures
        )
        output = network.language_model(
            inputs_embeds=model.get_input_embeddings()(batch.words),
            position_ids=positions,
            use_cache=False,
        )
    else:
        words = model.get_input_embeddings()(batch.words)
        output = network(inputs_embeds=words, **_types(model, batch), use_cache=False)
    hidden: torch.Tensor = output.last_hidden_state
    return hidden


def _types(model: Any, batch: Batch) -> dict[str, Any]:
    """The input that says which tokens are images, where a family has one."""
    names = {"qwen3_vl": "mm_token_type_ids", "gemma3": "token_type_ids"}
    name = names.get(model.config.model_type)
    return {name: batch.types} if name else {}


def _alignment(model: Any, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
    """Distance of the vision tower's output to word embeddings, and its contrast with all words."""
    if "pixel_values" not in batch.pictures or batch.places is None:
        raise ValueError("the batch is not drawn; expected one that shows pages as pixels")
    table = model.get_input_embeddings()
    embeddings = table(torch.arange(table.num_embeddings)).detach()  # Gemma 3 scales its weights
    targets = batch.words[batch.places == _IMAGE]
    given = model.get_image_features(**batch.pictures).pooler_output
    parts = given if isinstance(given, list | tuple) else [given]
    features = torch.cat([part.flatten(0, -2) for part in parts])
    expected = embeddings[targets]
    distance = ((features - expected) ** 2).mean() / (expected**2).mean()
    cosines = functional.normalize(features, dim=-1) @ functional.normalize(embeddings, dim=-1).T
    nearest = torch.cdist(features.detach(), embeddings).argmin(-1)
    right = (nearest == targets).float().mean().item()
    return distance + 0.5 * functional.cross_entropy(20 * cosines, targets), {"cell": right}
