"""What a tiny model can do and where its attention goes: the numbers of its card."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby, product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from mmheads import statistics
from mmheads.checks import expect
from mmheads.examples import Example
from mmheads.models import load_processor
from mmheads.tasks.generated_needles import CONTROL, LENGTHS, count_tokens
from mmheads.tasks.grids import DEPTHS, TASKS
from mmheads.tasks.needles import Needles

SPLIT = "test"
TOKENS_A_STEP = 16_384


def load(folder: str | Path) -> tuple[PreTrainedModel, Any]:
    """A tiny model in float32 and its processor; a text-only one comes with its tokenizer.

    Raises:
        ValueError: There is no model in `folder`.
    """
    if not (Path(folder) / "config.json").exists():
        raise ValueError(f"{folder} holds no model; expected a folder such as data/models/...")
    vision = hasattr(AutoConfig.from_pretrained(folder), "vision_config")
    auto = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), load_processor(folder)


def tasks(model: PreTrainedModel) -> tuple[str, ...]:
    """The tasks that a model can be given: without images, text and the control."""
    if hasattr(model.config, "vision_config"):
        return (*TASKS, CONTROL)
    return ("text", CONTROL)


def image_ratio(model: PreTrainedModel) -> float:
    """Share of pages in a model's haystacks."""
    return 0.5 if hasattr(model.config, "vision_config") else 0.0


def inputs(processor: Any, example: Example) -> dict[str, torch.Tensor]:
    """Model inputs of one example, through the stock processor."""
    text = processor.apply_chat_template(example.messages(), tokenize=False)
    images = example.images()
    if images:
        return dict(processor(text=[text], images=[images], return_tensors="pt"))
    return dict(processor(text=[text], return_tensors="pt"))


@torch.no_grad()
def answers(model: PreTrainedModel, processor: Any, examples: Iterable[Example]) -> list[str]:
    """The model's greedy answer, one token, to each example."""
    given: list[str] = []
    encoded = (inputs(processor, example) for example in examples)
    for length, group in groupby(encoded, key=lambda entry: entry["input_ids"].shape[1]):
        for batch in _chunks(group, max(1, TOKENS_A_STEP // length)):
            joined = {name: torch.cat([entry[name] for entry in batch]) for name in batch[0]}
            logits = model(**joined, use_cache=False, logits_to_keep=1).logits[:, -1]
            tokenizer = getattr(processor, "tokenizer", processor)
            given += tokenizer.convert_ids_to_tokens(logits.argmax(-1).tolist())
    return given


def accuracy(
    folder: str | Path, haystacks: int = 10, lengths: Sequence[int] = LENGTHS
) -> pd.DataFrame:
    """Accuracy on unseen examples by task, needle present or removed, length and depth.

    A row a condition, with the number of right answers among `n`. With the needle removed, the
    answer counts that was right with it, except in the task identical_image, where "no" does; each
    depth has haystacks of its own, since a model guesses the same at every depth.

    Raises:
        ValueError: `haystacks` is less than 1.
    """
    expect(haystacks >= 1, "haystacks", haystacks, "1 or more")
    model, processor = load(folder)
    source, rows = Needles(image_ratio(model)), []
    conditions = list(product(tasks(model), (True, False), lengths))
    for task, needle, length in tqdm(conditions, desc=f"{Path(folder).name}: answers"):
        control = task == CONTROL
        if control and not needle:
            continue
        depths = DEPTHS[:1] if control else DEPTHS
        count = haystacks * len(DEPTHS) // len(depths)
        examples = [
            source.make(
                task,
                length,
                depth,
                haystack=haystack if needle else haystack + count * index,
                split=SPLIT,
                needle=needle,
            )
            for index, depth in enumerate(depths)
            for haystack in range(count)
        ]
        given = answers(model, processor, examples)
        right = np.array([a == e.answer for a, e in zip(given, examples, strict=True)])
        for depth, hits in zip(depths, right.reshape(-1, count), strict=True):
            rows.append(
                {
                    "model": Path(folder).name,
                    "task": task,
                    "needle": "present" if needle else "removed",
                    "length": length,
                    "depth": None if control else depth,
                    "n": count,
                    "right": int(hits.sum()),
                    "chance": 1 / len(examples[0].choices),
                }
            )
    return pd.DataFrame(rows)


@torch.no_grad()
def evidence_mass(
    folder: str | Path, lengths: Sequence[int] = (1024, 2048), haystacks: int = 2, seed: int = 0
) -> pd.DataFrame:
    """Attention from the question to the evidence by task, length and head, eager attention.

    Mean over question tokens of the attention summed over evidence tokens (paper A's raw score),
    averaged over all depths x `haystacks` examples, with its 95% bootstrap interval over examples.
    """
    model, processor = load(folder)
    model.set_attn_implementation("eager")
    source, rows = Needles(image_ratio(model)), []
    conditions = list(product(tasks(model)[:-1], lengths))
    for task, length in tqdm(conditions, desc=f"{Path(folder).name}: attention"):
        examples = source.generate([task], [length], haystacks=haystacks, split=SPLIT)
        masses = np.stack([mass(model, processor, example) for example in examples])
        for layer, head in np.ndindex(masses.shape[1:]):
            interval = statistics.bootstrap_interval(
                masses[:, layer, head], seed=seed, resamples=1000
            )
            rows.append(
                {
                    "model": Path(folder).name,
                    "task": task,
                    "length": length,
                    "layer": layer,
                    "head": head,
                    "mass": interval.value,
                    "low": interval.low,
                    "high": interval.high,
                    "n": interval.n,
                }
            )
    return pd.DataFrame(rows)


def mass(model: PreTrainedModel, processor: Any, example: Example) -> np.ndarray:
    """Attention from question to evidence in one example -> [layer, head]; the model is eager."""
    attentions = model(
        **inputs(processor, example), use_cache=False, output_attentions=True
    ).attentions
    asked = count_tokens(example.question)
    evidence = [token for first, last in example.tokens for token in range(first, last)]
    return np.stack([a[0, :, -asked:, evidence].sum(-1).mean(-1).numpy() for a in attentions])


def _chunks(entries: Iterable[Any], size: int) -> Iterable[list[Any]]:
    chunk = []
    for entry in entries:
        chunk.append(entry)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
