"""Score every head of a model: how much attention goes from the question to the evidence.

    python -m mmheads.scoring --model data/models/tiny-qwen3-vl-m --examples examples.jsonl

Definitions: paper A (arXiv 2605.27243, Sec. 3) for the retrieval score and its calibration by a
null question; paper B (arXiv 2606.05843) for Retrieval Attention Mass (RAM).
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from tqdm import tqdm

from mmheads import examples as example_files
from mmheads import figures, paths
from mmheads.attention import record_mass
from mmheads.evidence import (
    NULL_QUESTION,
    Prompt,
    encode,
    null_question,
    shuffled_question,
    with_question,
)
from mmheads.examples import Example
from mmheads.heads import HeadScores, Provenance, head_names
from mmheads.models import VLM, load
from mmheads.prefix import Prefix, prefill
from mmheads.tasks import needles

QUANTITIES = {
    "raw": "attention from a question token to the evidence, summed over it (paper A's S; RAM)",
    "null": "the same for the null question",
    "share": "raw divided by the attention to all context tokens of the evidence's modality (RAM)",
    "context": "attention to the whole context",
    "norm": "Euclidean norm of the head's output",
    "entropy": "entropy of the attention among the context's text tokens, in nats",
    "shuffled": "attention to the evidence when the question's words are shuffled",
}
"""What `score_heads` records beside the calibrated score: means over question tokens."""
NULL_IMAGES = ("pixels", "placeholders")
ROUNDING = 1e-5
SAVE_EVERY = 60.0
"""Seconds between saves of a long run."""


def score_heads(
    vlm: VLM,
    examples: Iterable[Example],
    *,
    path: str | Path = "",
    null: str = NULL_QUESTION,
    null_images: str = "pixels",
    seed: int = 0,
    max_tokens: int = 0,
    progress: bool = True,
) -> HeadScores:
    """Calibrated retrieval scores, and the quantities of `QUANTITIES`, of every head and example.

    The context runs once; the question, the null question and the shuffled question continue from
    its cache. Masses are means over question tokens, computed in float32.

    Args:
        vlm: The model.
        examples: With evidence; every one is kept.
        path: Score file (parquet) to write. Examples that it, or an interrupted run's
            `<path>.partial.parquet`, holds already are not scored again.
        null: The null question.
        null_images: "pixels" feeds the images of a question again in its null question;
            "placeholders" leaves their placeholders empty, as the authors' code does.
        seed: Seed of the shuffled questions.
        max_tokens: See `encode`.
        progress: Show a progress bar.

    Raises:
        ValueError: No example, one without evidence, scores at `path` made with another model,
            template, version or setting, or a mass outside [0, 1].
    """
    examples = list(examples)
    if not examples:
        raise ValueError("there is no example to score")
    if null_images not in NULL_IMAGES:
        raise ValueError(f"null_images is {null_images!r}; expected one of {NULL_IMAGES}")
    provenance = _provenance(vlm, null, null_images, seed)
    target = Path(path) if path else None
    done = _earlier(target, provenance) if target else {}
    marks = [example.fingerprint() for example in examples]
    saved = time.monotonic()
    bar = tqdm(examples, desc="scoring", disable=not progress, leave=False)
    for mark, example in zip(marks, bar, strict=True):
        if mark in done:
            continue
        done[mark] = _score(vlm, example, mark, null, null_images, seed, max_tokens)
        if target and time.monotonic() - saved > SAVE_EVERY:
            _collect(vlm, list(done.values()), provenance).save(_partial(target))
            saved = time.monotonic()
    scores = _collect(vlm, [done[mark] for mark in marks], provenance)
    if target:
        scores.save(target)
        _partial(target).unlink(missing_ok=True)
    return scores


def score_needles(
    vlm: VLM,
    *,
    tasks: Sequence[str] = needles.TASKS,
    lengths: Sequence[int] = needles.LENGTHS,
    pairs: int = needles.PAIRS,
    split: str = "detection",
    image_ratio: float = 0.5,
    null_images: str = "pixels",
    folder: str | Path = "",
    progress: bool = True,
) -> HeadScores:
    """Scores on the needle tasks, at all six depths x `pairs` examples a condition.

    They are kept in `folder` (default `runs/scores`), so that notebooks share them; scores of
    another model, version or setting have another file there.

    Raises:
        ValueError: As `needles.generate` and `score_heads` do.
    """
    made = _provenance(vlm, NULL_QUESTION, null_images, 0)
    mark = hashlib.sha256(repr(dataclasses.asdict(made)).encode()).hexdigest()[:8]
    place = Path(folder) if folder else paths.RUNS / "scores"
    parts = []
    for task in tasks:
        name = f"{Path(vlm.model_id).name}-{task}-{split}-{image_ratio:g}-{mark}.parquet"
        examples = needles.generate(
            [task], lengths, pairs=pairs, split=split, image_ratio=image_ratio
        )
        parts.append(
            score_heads(
                vlm, examples, path=place / name, null_images=null_images, progress=progress
            )
        )
    return HeadScores.concatenate(parts)


@dataclasses.dataclass(frozen=True, eq=False)
class _Scored:
    """One example: its row of metadata, and [layer, head] by quantity."""

    row: dict[str, Any]
    values: dict[str, NDArray[np.float32]]


def _score(
    vlm: VLM,
    example: Example,
    mark: str,
    null: str,
    null_images: str,
    seed: int,
    max_tokens: int,
) -> _Scored:
    if not example.evidence:
        raise ValueError(
            f"an example of the task {example.task!r} has no evidence; it can be answered, but "
            "heads are scored by their attention to evidence"
        )
    prompt = encode(vlm, example, max_tokens=max_tokens)
    empty = with_question(vlm, prompt, null_question(example.question, null))
    shuffled = with_question(vlm, prompt, shuffled_question(example.question, seed))
    values = score_prompt(vlm, prompt, empty, shuffled, null_images=null_images)
    for name in ("raw", "null", "share", "context", "shuffled"):
        _check_mass(values[name], name, example)
        values[name] = values[name].clip(0, 1)
    row = {
        "task": example.task,
        "length": example.length or len(prompt),
        "depth": example.depth,
        "seed": json.dumps(example.seed),
        "example": mark,
        "tokens": len(prompt),
        "question_tokens": len(prompt.question),
    }
    return _Scored(row, values)


def score_prompt(
    vlm: VLM,
    prompt: Prompt,
    empty: Prompt,
    shuffled: Prompt | None = None,
    *,
    null_images: str = "pixels",
) -> dict[str, NDArray[np.float32]]:
    """The quantities of `QUANTITIES` for one encoded example -> [layer, head] by name.

    Args:
        vlm: The model.
        prompt: With evidence.
        empty: The same prompt with the null question.
        shuffled: The same with the shuffled question; None leaves that quantity out.
        null_images: See `score_heads`.
    """
    others = [empty] if shuffled is None else [empty, shuffled]
    prefix = prefill(vlm, [prompt, *others])
    (raw, modality, context), entropy, norm = _question_pass(prefix, prompt, controls=True)
    values = {
        "raw": raw,
        "null": _question_pass(prefix, empty, pixels=null_images == "pixels")[0][0],
        "share": np.divide(raw, modality, out=np.zeros_like(raw), where=modality > 0),
        "context": context,
        "norm": norm,
        "entropy": entropy,
    }
    if shuffled is not None:
        values["shuffled"] = _question_pass(prefix, shuffled)[0][0]
    return values


def _question_pass(
    prefix: Prefix, prompt: Prompt, *, controls: bool = False, pixels: bool = True
) -> tuple[list[NDArray[np.float32]], NDArray[np.float32], NDArray[np.float32]]:
    """Means over question tokens, [layer, head]: masses, entropy and norm.

    The masses are those on the evidence and, with `controls`, on all context tokens of its
    modality and on the whole context.
    """
    vlm, layers = prefix.vlm, prefix.vlm.geometry.layers
    columns = [prompt.weights(prompt.evidence)]
    text = None
    if controls:
        visual = vlm.is_visual(prompt.ids)
        context = prompt.weights(part for part in prompt.parts if part is not None)
        kinds = {bool(visual[span.tokens[0]]) for span in prompt.evidence}
        columns += [context * np.isin(visual, list(kinds)), context]
        text = torch.from_numpy((context > 0) & ~visual)[None]
    rows = torch.from_numpy(prompt.question - prefix.length)[None]
    weights = torch.from_numpy(np.stack(columns, axis=-1))[None]
    with record_mass(vlm, rows, weights, text=text) as recording:
        prefix.ask(prompt, pixels=pixels)
    masses = recording.mass(layers)[0].mean(dim=2)
    return (
        [masses[..., column].numpy() for column in range(len(columns))],
        recording.entropy(layers)[0].mean(dim=-1).numpy(),
        recording.norm(layers)[0].mean(dim=-1).numpy(),
    )


def _check_mass(mass: NDArray[np.float32], name: str, example: Example) -> None:
    wrong = ~((mass >= -ROUNDING) & (mass <= 1 + ROUNDING))
    if wrong.any():
        raise ValueError(
            f"the {name} attention of {head_names(np.argwhere(wrong))} lies outside [0, 1] in an "
            f"example of the task {example.task!r}"
        )


def _provenance(vlm: VLM, null: str, null_images: str, seed: int) -> Provenance:
    return vlm.provenance("mmheads.scoring", null, null_images=null_images, shuffle_seed=seed)


def _partial(target: Path) -> Path:
    return target.with_suffix(".partial.parquet")


def _earlier(target: Path, provenance: Provenance) -> dict[str, _Scored]:
    """Examples scored before, by fingerprint."""
    done: dict[str, _Scored] = {}
    for path in (target, _partial(target)):
        if not path.exists():
            continue
        scores = HeadScores.load(path)
        if different := scores.provenance.differences(provenance):
            raise ValueError(
                f"{path} holds scores made otherwise: {different}; name another file, or delete "
                "this one"
            )
        for index, row in enumerate(scores.metadata.to_dict("records")):
            values = {name: array[index] for name, array in scores.quantities.items()}
            done[str(row["example"])] = _Scored({str(k): v for k, v in row.items()}, values)
    return done


def _collect(vlm: VLM, scored: list[_Scored], provenance: Provenance) -> HeadScores:
    quantities = {
        name: np.stack([one.values[name] for one in scored]).astype(np.float32)
        for name in QUANTITIES
    }
    return HeadScores(
        quantities["raw"] - quantities["null"],
        geometry=vlm.geometry,
        metadata=pd.DataFrame([one.row for one in scored]),
        quantities=quantities,
        provenance=provenance,
    )


def _picture(scores: HeadScores) -> Figure:
    figure = Figure(figsize=(figures.COLUMN, figures.COLUMN), dpi=200, layout="constrained")
    axis = figure.subplots()
    axis.set_title(f"{scores.provenance.model}, n = {len(scores.values)}")
    image = figures.heat_map(axis, scores.mean)
    figure.colorbar(image, label="calibrated retrieval score")
    return figure


def main(arguments: list[str] | None = None) -> int:
    """`python -m mmheads.scoring`: score a user's own examples, write tables and a heat map."""
    parser = argparse.ArgumentParser(prog="python -m mmheads.scoring", description=__doc__)
    parser.add_argument("--model", required=True, help="folder, or name on the hub")
    parser.add_argument("--examples", required=True, help="a .jsonl file, or a folder with one")
    parser.add_argument("--out", default="", help="folder of the results, default runs/scores")
    parser.add_argument("--device", default="", help="cpu, cuda:0 or auto")
    parser.add_argument("--fraction", type=float, default=0.05, help="share of heads to list")
    args = parser.parse_args(arguments)
    try:
        vlm = load(args.model, device=args.device)
        given = example_files.read(args.examples)
        out = Path(args.out) if args.out else paths.RUNS / "scores"
        stem = out / f"{Path(vlm.model_id).name}-{Path(args.examples).stem}"
        scores = score_heads(vlm, given, path=stem.with_suffix(".parquet"))
        with paths.write_whole(stem.with_suffix(".csv")) as path:
            scores.table().to_csv(path, index=False)
        with paths.write_whole(stem.with_suffix(".json")) as path:
            path.write_text(json.dumps(scores.released_format()))
        with paths.write_whole(stem.with_suffix(".png")) as path:
            _picture(scores).savefig(path)
        top = scores.top(args.fraction)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    for head in top:
        print(f"{head!s:>8}  {scores.mean[head]:+.4f}")
    print(f"{len(given)} examples; {stem}.parquet, .csv, .json, .png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
