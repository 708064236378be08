"""Answers of a model, whole and with heads ablated, and how far ablation changes them.

A masking is a set of heads, or several draws of one size; its effect is the paired difference to
the whole model on the same examples (paper A, arXiv 2605.27243, Sec. 5; paper B, arXiv 2606.05843,
Fig. 6).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import pandas as pd
import torch
from filelock import FileLock
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList

from mmheads import paths
from mmheads.attention.interventions import ablate
from mmheads.examples import Example
from mmheads.heads import HeadSet
from mmheads.metrics import Metric, same
from mmheads.models import VLM
from mmheads.prefix import on_device
from mmheads.prompts import Prompt, encode
from mmheads.streaming.heads import stream

WHOLE = "none"
"""The masking that takes no head out."""


TOKENS_A_BATCH = {"cpu": 2048, "cuda": 8192}
"""By kind of device: on a CPU, smaller batches stay in its cache."""


FORMAT = 1
"""To be raised when the same ablation gives other answers: kept ones are then computed again."""


BLOCK = 32
"""Examples in memory at a time: a hundred long documents do not fit together."""


SAVE_EVERY = 60.0
"""Seconds between saves of a long run."""


Maskings = Mapping[str, HeadSet | Sequence[HeadSet]]


@dataclass(frozen=True, eq=False)
class _Row:
    """One row of a batch: an example under one set of heads."""

    key: str
    prompt: Prompt
    heads: HeadSet


def answer(
    vlm: VLM,
    examples: Iterable[Example],
    maskings: Maskings | None = None,
    *,
    mode: str = "zero",
    when: str = "both",
    means: torch.Tensor | None = None,
    max_new_tokens: int = 32,
    metric: Metric = same,
    batch_tokens: int = 0,
    folder: str | Path = "",
    progress: bool = True,
) -> pd.DataFrame:
    """Answer examples greedily, with the whole model and under each masking.

    Rows of a batch are prompts of one length, each with its own heads ablated: nothing is padded.
    Answers are kept in `folder`, a file for each model and version, and not computed again; an
    interrupted run goes on there.

    Args:
        vlm: The model.
        examples: With or without evidence.
        maskings: Sets of heads by name, or several draws of a name; the whole model, "none",
            answers in any case.
        mode: See `ablate`.
        when: See `ablate`.
        means: See `ablate`.
        max_new_tokens: Longest answer.
        metric: (answer, gold) -> score in [0, 1].
        batch_tokens: Prompt tokens a batch, by default those of `TOKENS_A_BATCH`; a longer prompt
            is a batch of its own.
        folder: Default `runs/answers`.
        progress: Show a progress bar.

    Returns:
        A row an example and set of heads: masking, draw (0-based), heads (their number), example
        (index), task, length, depth, seed (of its haystack), given (the answer), score.

    Raises:
        ValueError: No example, a masking named "none", or as `ablate` and `encode` do.
    """
    settings = (mode, when, max_new_tokens, None if means is None else _hash(means.tolist()))
    return _answered(
        vlm,
        examples,
        _sets(maskings or {}, HeadSet((), vlm.geometry, vlm.model_id)),
        settings,
        lambda rows: ablate(vlm, [row.heads for row in rows], mode, when, means=means),
        max_new_tokens=max_new_tokens,
        metric=metric,
        batch_tokens=batch_tokens,
        folder=folder,
        progress=progress,
    )


def answer_streaming(
    vlm: VLM,
    examples: Iterable[Example],
    dense: Maskings,
    *,
    sinks: int,
    window: int,
    max_new_tokens: int = 32,
    metric: Metric = same,
    batch_tokens: int = 0,
    folder: str | Path = "",
    progress: bool = True,
) -> pd.DataFrame:
    """Answer examples with the whole model, and with some heads dense and all others streaming.

    The mask is really applied, at every length; see `stream`.

    Args:
        vlm: The model.
        examples: As in `answer`.
        dense: Sets of heads that stay dense by name, or several draws of a name.
        sinks: First tokens that the others see.
        window: Last tokens that the others see.
        max_new_tokens: As in `answer`, like all that follow.
        metric: "
        batch_tokens: "
        folder: "
        progress: "

    Returns:
        As `answer`; heads is the number of dense heads.

    Raises:
        ValueError: As `answer` and `stream` do.
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
    folder: str | Path,
    progress: bool,
    together: bool = False,
) -> pd.DataFrame:
    """Answers to all examples under all sets; `together`: rows of a batch have one set."""
    kept = _Kept(vlm, Path(folder) if folder else paths.RUNS / "answers")
    whole = sets[WHOLE, 0]
    order = {id(heads): place for place, heads in enumerate(sets.values())}

    def key(mark: str, heads: HeadSet) -> str:
        if heads is whole:
            return _hash([FORMAT, mark, [], max_new_tokens])
        return _hash([FORMAT, mark, sorted(heads), settings])

    table: list[dict[str, object]] = []
    left = iter(examples)
    with tqdm(total=0, desc="answers", disable=not progress, leave=False) as bar:
        while block := [(each.fingerprint(), each) for each in islice(left, BLOCK)]:
            wanted = [
                (key(mark, heads), example, heads)
                for mark, example in block
                for heads in sets.values()
            ]
            if together:
                wanted.sort(key=lambda one: order[id(one[2])])
            todo = {k: (example, heads) for k, example, heads in wanted if k not in kept.answers}
            bar.total = bar.n + len(todo)
            for rows in _batches(vlm, todo, batch_tokens or default_batch_tokens(vlm), together):
                with changed(rows):
                    given = _generate(vlm, [row.prompt for row in rows], max_new_tokens)
                kept.add({row.key: text for row, text in zip(rows, given, strict=True)})
                bar.update(len(rows))
            first = len(table) // len(sets)
            for index, (mark, example) in enumerate(block, start=first):
                for (name, draw), heads in sets.items():
                    text = kept.answers[key(mark, heads)]
                    table.append(
                        {
                            "masking": name,
                            "draw": draw,
                            "heads": len(heads),
                            "example": index,
                            "task": example.task,
                            "length": example.length,
                            "depth": example.depth,
                            "seed": json.dumps(example.seed) if example.seed else mark,
                            "given": text,
                            "score": metric(text, example.answer),
                        }
                    )
    if not table:
        raise ValueError("there is no example to answer")
    kept.save()
    return pd.DataFrame(table)


def _sets(maskings: Maskings, whole: HeadSet) -> dict[tuple[str, int], HeadSet]:
    """Sets of heads by name and draw, that of the whole model first."""
    found = {(WHOLE, 0): whole}
    for name, heads in maskings.items():
        draws = [heads] if isinstance(heads, HeadSet) else heads
        if name == WHOLE:
            raise ValueError(f"{WHOLE!r} is the whole model and always there; use another name")
        found |= {(name, draw): chosen for draw, chosen in enumerate(draws)}
    return found


def default_batch_tokens(vlm: VLM) -> int:
    """Prompt tokens per batch on the model's device."""
    return TOKENS_A_BATCH.get(vlm.device.type, TOKENS_A_BATCH["cuda"])


def _batches(
    vlm: VLM,
    todo: Mapping[str, tuple[Example, HeadSet]],
    batch_tokens: int,
    together: bool,
) -> Iterator[list[_Row]]:
    """Neighbouring rows whose inputs have the same shapes, up to so many tokens."""
    rows: list[_Row] = []
    last: tuple[Example, Prompt] | None = None
    for key, (example, heads) in todo.items():
        if last is None or last[0] is not example:
            last = example, encode(vlm, example)
        prompt = last[1]
        if rows and (
            _shapes(prompt) != _shapes(rows[0].prompt)
            or (len(rows) + 1) * len(prompt) > batch_tokens
            or (together and heads is not rows[0].heads)
        ):
            yield rows
            rows = []
        rows.append(_Row(key, prompt, heads))
    if rows:
        yield rows


def _shapes(prompt: Prompt) -> dict[str, tuple[int, ...]]:
    """Those of an example; an input holds a row an example, an image or a patch."""
    return {name: tuple(value.shape[1:]) for name, value in prompt.inputs.items()}


def stacked(prompts: Sequence[Prompt]) -> dict[str, torch.Tensor]:
    """Model inputs of prompts of one shape as one batch."""
    return {name: torch.cat([p.inputs[name] for p in prompts]) for name in prompts[0].inputs}


@torch.no_grad()
def _generate(vlm: VLM, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
    inputs = on_device(vlm, stacked(prompts))
    tokens = vlm.model.generate(
        **inputs,
        logits_processor=LogitsProcessorList([_Finite(vlm)]),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        pad_token_id=vlm.tokenizer.pad_token_id or vlm.tokenizer.eos_token_id,
    )
    given: list[str] = vlm.tokenizer.batch_decode(
        tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return given


class _Finite(LogitsProcessor):
    """Passes the logits of each step on unchanged, and refuses those that are not finite."""

    def __init__(self, vlm: VLM) -> None:
        self.vlm = vlm

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not scores.isfinite().all():
            raise ValueError(
                f"the logits of {self.vlm} are not finite; its weights are damaged, or float16 is "
                "too narrow for it: load it in bfloat16 or float32"
            )
        return scores


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


class _Kept:
    """Answers computed so far with a model, in a file."""

    def __init__(self, vlm: VLM, folder: Path) -> None:
        made = _hash(asdict(vlm.provenance("mmheads.answers")))[:8]
        self.path = folder / f"{Path(vlm.model_id).name}-{made}.parquet"
        self.saved = time.monotonic()
        self.answers = self._read()
        self.changed = False

    def _read(self) -> dict[str, str]:
        if not self.path.exists():
            return {}
        table = pd.read_parquet(self.path)
        return dict(zip(table["key"], table["given"], strict=True))

    def add(self, answers: Mapping[str, str]) -> None:
        self.answers |= answers
        self.changed = True
        if time.monotonic() - self.saved > SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Write what is new to what another process may have written meanwhile."""
        if not self.changed:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_suffix(".lock")), paths.write_whole(self.path) as path:
            self.answers = self._read() | self.answers
            table = pd.DataFrame({"key": list(self.answers), "given": list(self.answers.values())})
            table.to_parquet(path, index=False)
        self.saved, self.changed = time.monotonic(), False
