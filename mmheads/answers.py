"""Answers of the full model and of the model with heads ablated.

An ablation is a set of heads, or several draws of one size; its effect is the paired difference to
the full model on the same examples (paper A, arXiv 2605.27243, Sec. 5; paper B, arXiv 2606.05843,
Fig. 6).
"""

from __future__ import annotations

import dataclasses
import json
import numbers
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList

from mmheads import store
from mmheads.attention.hook import check_revision
from mmheads.attention.interventions import ablate
from mmheads.attention.sharing import ablate_rows, can_share
from mmheads.checks import DAMAGED
from mmheads.examples import Example
from mmheads.heads import HeadSet
from mmheads.metrics import Metric, same
from mmheads.models import VLM
from mmheads.prefix import on_device
from mmheads.prompts import WITHOUT_PIXELS, Prompt, encode
from mmheads.provenance import code_version, hash_json
from mmheads.streaming.heads import stream

FULL_MODEL = "full model"
"""The ablation that takes no head out."""

BATCH_TOKENS = {"cpu": 8192, "cuda": 8192}
"""Prompt tokens per batch by kind of device."""

VERSION = 1
"""To be raised by hand when the same ablation gives other answers: shipped ones are left out."""

MODULES = (
    *("families", "compat", "models", "rendering", "processing", "locating", "prompts"),
    *("decoder", "prefix", "attention"),
    *("streaming", "answers"),
)
"""The code that answers; kept answers are computed again when it changes."""

BLOCK = 32
"""Examples in memory at a time: a hundred long documents do not fit together."""

Ablations = Mapping[str, HeadSet | Sequence[HeadSet]]


@dataclass(frozen=True, eq=False)
class _Row:
    """One row of a batch: an example under one set of heads."""

    key: str
    prompt: Prompt
    heads: HeadSet


def answer(
    vlm: VLM,
    examples: Iterable[Example],
    ablations: Ablations | None = None,
    *,
    mode: str = "zero",
    when: str = "both",
    means: torch.Tensor | None = None,
    max_new_tokens: int = 32,
    metric: Metric = same,
    batch_tokens: int = 0,
    folder: str | Path | None = "",
    fresh: bool = False,
    progress: bool = True,
) -> pd.DataFrame:
    """Answer examples greedily, with the full model and under each ablation.

    The ablations of a prompt are rows of one batch: images are embedded once, and layers below the
    first ablated head run once (see `ablate_rows`). Where a prompt has one row, or a family cannot
    share layers, the rows are prompts of one length. Nothing is padded. Answers are kept in the
    results store and not computed again, those before an error or an interrupt too.

    Args:
        vlm: The model.
        examples: Examples with or without evidence.
        ablations: Sets of heads by name, or several draws under one name; the full model answers
            in any case.
        mode: See `ablate`.
        when: See `ablate`.
        means: See `ablate`.
        max_new_tokens: Number of tokens of the longest answer.
        metric: (prediction, gold answer) -> score in [0, 1].
        batch_tokens: Prompt tokens per batch, by default those of `BATCH_TOKENS`; a longer prompt
            is a batch by itself.
        folder: Folder of the results store; empty: `runs/answers`; None: nothing is read or kept.
        fresh: Leave out shipped answers.
        progress: Show a progress bar.

    Returns:
        One row per example and set of heads: ablation, draw (0-based), heads (their number),
        example (index), task, length, depth, haystack, prediction, score.

    Raises:
        ValueError: There is no example, an ablation is named "full model", the metric gives no
            number in [0, 1], or as `ablate` and `encode` do.
        OSError: The folder cannot be written.
    """
    settings = (mode, when, max_new_tokens, None if means is None else hash_json(means.tolist()))
    return _answered(
        vlm,
        examples,
        _sets(ablations or {}, HeadSet((), vlm.geometry, vlm.model_id)),
        settings,
        lambda rows: _ablated(vlm, rows, mode, when, means),
        max_new_tokens=max_new_tokens,
        metric=metric,
        batch_tokens=batch_tokens,
        folder=folder,
        fresh=fresh,
        progress=progress,
    )


def answer_streaming(
    vlm: VLM,
    examples: Iterable[Example],
    dense: Ablations,
    *,
    sinks: int,
    window: int,
    max_new_tokens: int = 32,
    metric: Metric = same,
    batch_tokens: int = 0,
    folder: str | Path | None = "",
    fresh: bool = False,
    progress: bool = True,
) -> pd.DataFrame:
    """Answer examples with the full model, and with some heads dense and all others streaming.

    The mask is really applied, at every length; see `stream`.

    Args:
        vlm: The model.
        examples: Examples with or without evidence.
        dense: Sets of heads that stay dense by name, or several draws under one name.
        sinks: Number of first tokens that the other heads see.
        window: Number of last tokens that the other heads see.
        max_new_tokens: Number of tokens of the longest answer.
        metric: See `answer`.
        batch_tokens: See `answer`.
        folder: See `answer`.
        fresh: See `answer`.
        progress: Show a progress bar.

    Returns:
        As `answer`; heads is the number of dense heads.

    Raises:
        ValueError: As `answer` and `stream` do.
        OSError: The folder cannot be written.
    """
    return _answered(
        vlm,
        examples,
        _sets(dense, vlm.every_head),
        ("stream", sinks, window, max_new_tokens),
        lambda rows: stream(vlm, rows[0].heads, sinks, window),
        together=True,
        max_new_tokens=max_new_tokens,
        metric=metric,
        batch_tokens=batch_tokens,
        folder=folder,
        fresh=fresh,
        progress=progress,
    )


def _answered(
    vlm: VLM,
    examples: Iterable[Example],
    sets: Mapping[tuple[str, int], HeadSet],
    settings: tuple[object, ...],
    changed: Callable[[list[_Row]], AbstractContextManager[object]],
    *,
    max_new_tokens: int,
    metric: Metric,
    batch_tokens: int,
    folder: str | Path | None,
    fresh: bool,
    progress: bool,
    together: bool = False,
) -> pd.DataFrame:
    """Answers to all examples under all sets; `together`: rows of a batch have one set."""
    full = sets[FULL_MODEL, 0]
    order = {id(heads): place for place, heads in enumerate(sets.values())}
    batch_tokens = batch_tokens or default_batch_tokens(vlm)

    def key(fingerprint: str, heads: HeadSet) -> str:
        if heads is full:
            return hash_json([fingerprint, [], max_new_tokens], 16)
        return hash_json([fingerprint, sorted(heads), settings], 16)

    table: list[dict[str, object]] = []
    remaining = iter(examples)
    with (
        _open(vlm, folder, fresh) as results,
        tqdm(total=0, desc="answers", disable=not progress, leave=False) as bar,
    ):
        check_revision(vlm, sets.values(), results.provenance.revision)
        while block := [(each.fingerprint(), each) for each in islice(remaining, BLOCK)]:
            if not table:
                _score(metric, block[0][1].answer, block[0][1])  # a wrong metric fails at once
            asked = [
                (key(fingerprint, heads), example, heads)
                for fingerprint, example in block
                for heads in sets.values()
            ]
            if together:
                asked.sort(key=lambda entry: order[id(entry[2])])
            todo = {k: (example, heads) for k, example, heads in asked if k not in results}
            bar.total = bar.n + len(todo)
            for rows in _batches(vlm, todo, batch_tokens, together, can_share(vlm)):
                with changed(rows):
                    predictions = _generate(vlm, [row.prompt for row in rows], max_new_tokens)
                for row, text in zip(rows, predictions, strict=True):
                    results.add(row.key, {"prediction": text, **_how(row, settings)})
                bar.update(len(rows))
            first = len(table) // len(sets)
            for index, (fingerprint, example) in enumerate(block, start=first):
                for (name, draw), heads in sets.items():
                    prediction = str(results[key(fingerprint, heads)]["prediction"])
                    which = {"ablation": name, "draw": draw, "heads": len(heads), "example": index}
                    score = _score(metric, prediction, example)
                    told = {"prediction": prediction, "score": score}
                    table.append({**which, **example.labels(fingerprint), **told})
    if not table:
        raise ValueError("there is no example to answer")
    return pd.DataFrame(table)


def _ablated(
    vlm: VLM, rows: Sequence[_Row], mode: str, when: str, means: torch.Tensor | None
) -> AbstractContextManager[object]:
    """The model with the heads of each row ablated."""
    sets, prompts = [row.heads for row in rows], [row.prompt for row in rows]
    if not _share(vlm, prompts):
        return ablate(vlm, sets, mode, when, means=means)
    return ablate_rows(vlm, on_device(vlm, prompts[0].inputs), sets, mode, when, means=means)


def _share(vlm: VLM, prompts: Sequence[Prompt]) -> bool:
    """Whether the rows of a batch, all of one prompt, share layers."""
    return len(prompts) > 1 and prompts[1] is prompts[0] and can_share(vlm)


def _open(vlm: VLM, folder: str | Path | None, fresh: bool) -> store.Results:
    made = vlm.provenance("mmheads.answers", code=code_version(MODULES))
    made = dataclasses.replace(made, generation=vlm.generation_hash())
    return store.open("answers", made, version=VERSION, folder=folder, fresh=fresh)


def _how(row: _Row, settings: tuple[object, ...]) -> dict[str, object]:
    """What the store keeps beside an answer, so that it can be computed again."""
    example = row.prompt.example
    how = {"answer": example.answer, "heads": json.dumps(sorted(row.heads))}
    return {**example.labels(), **how, "settings": json.dumps(settings)}


def _score(metric: Metric, prediction: str, example: Example) -> float:
    """What the metric says of a prediction."""
    value = metric(prediction, example.answer)
    if not isinstance(value, numbers.Real) or not 0 <= value <= 1:
        raise ValueError(
            f"the metric {metric} gives {value!r} for the prediction {prediction!r} and the answer "
            f"{example.answer!r}; expected a number in [0, 1]"
        )
    return float(value)


def _sets(ablations: Ablations, full: HeadSet) -> dict[tuple[str, int], HeadSet]:
    """Sets of heads by name and draw, that of the full model first."""
    sets = {(FULL_MODEL, 0): full}
    for name, heads in ablations.items():
        draws = [heads] if isinstance(heads, HeadSet) else heads
        if name == FULL_MODEL:
            raise ValueError(f"{name!r} names the model without ablation; use another name")
        sets |= {(name, draw): drawn for draw, drawn in enumerate(draws)}
    return sets


def default_batch_tokens(vlm: VLM) -> int:
    """Prompt tokens per batch on the model's device."""
    return BATCH_TOKENS.get(vlm.device.type, BATCH_TOKENS["cuda"])


def _batches(
    vlm: VLM,
    todo: Mapping[str, tuple[Example, HeadSet]],
    batch_tokens: int,
    together: bool,
    share: bool,
) -> Iterator[list[_Row]]:
    """Neighbouring rows whose inputs have the same shapes, at most `batch_tokens` tokens.

    `share`: the rows of a prompt with several are not in a batch with those of other prompts.
    """
    rows: list[_Row] = []
    last: tuple[Example, Prompt] | None = None
    several = Counter(id(example) for example, _ in todo.values() if share and not together)
    for key, (example, heads) in todo.items():
        fork = last is not None and last[0] is not example
        fork &= last is not None and max(several[id(example)], several[id(last[0])]) > 1
        if last is None or last[0] is not example:
            last = example, encode(vlm, example)
        prompt = last[1]
        if rows and (
            fork
            or _shapes(prompt) != _shapes(rows[0].prompt)
            or (len(rows) + 1) * len(prompt) > batch_tokens
            or (together and heads is not rows[0].heads)
        ):
            yield rows
            rows = []
        rows.append(_Row(key, prompt, heads))
    if rows:
        yield rows


def _shapes(prompt: Prompt) -> dict[str, tuple[int, ...]]:
    """Shapes of one example's inputs; an input has one row per example, image or patch."""
    return {name: tuple(value.shape[1:]) for name, value in prompt.inputs.items()}


def stacked(prompts: Sequence[Prompt], *, pixels: bool = True) -> dict[str, torch.Tensor]:
    """Model inputs of prompts of one shape as one batch, with or without their pixels."""
    names = [name for name in prompts[0].inputs if pixels or name in WITHOUT_PIXELS]
    return {name: torch.cat([p.inputs[name] for p in prompts]) for name in names}


@torch.no_grad()
def _generate(vlm: VLM, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
    # `ablate_rows` gives the images of one row for all
    inputs = on_device(vlm, stacked(prompts, pixels=not _share(vlm, prompts)))
    tokens = vlm.model.generate(
        **inputs,
        logits_processor=LogitsProcessorList([_Finite(vlm)]),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        pad_token_id=vlm.tokenizer.pad_token_id or vlm.tokenizer.eos_token_id,
    )
    predictions: list[str] = vlm.tokenizer.batch_decode(
        tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return predictions


class _Finite(LogitsProcessor):
    """Passes the logits of each step on unchanged, and refuses those that are not finite."""

    def __init__(self, vlm: VLM) -> None:
        self.vlm = vlm

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not scores.isfinite().all():
            raise ValueError(f"the logits of {self.vlm} are not finite; {DAMAGED}")
        return scores
