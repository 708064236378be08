"""Score every head of a model: how much attention goes from the question to the evidence.

Definitions: paper A (arXiv 2605.27243, Sec. 3) for the retrieval score and its calibration by a
null question; paper B (arXiv 2606.05843) for Retrieval Attention Mass (RAM).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from mmheads import store
from mmheads.checks import expect_one_of, parse
from mmheads.examples import Example
from mmheads.heads import HeadGeometry, format_heads
from mmheads.models import VLM
from mmheads.prefix import Attention
from mmheads.prompts import NULL_QUESTION, Prompt, encode, null_question, shuffled_question
from mmheads.provenance import code_version
from mmheads.scores import HeadScores, concatenate
from mmheads.tasks.grids import HAYSTACKS, Grid
from mmheads.tasks.needles import GENERATED
from mmheads.together import Asked, ask_all

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


COUNTS = ("tokens", "question_tokens", "evidence_tokens")
"""Tokens of the prompt, of its question, and of its evidence, in the metadata of scores."""

NULL_IMAGES = ("pixels", "placeholders")


BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}
"""Padded prompt tokens per batch by kind of device; a longer prompt is a batch by itself."""


SIMILAR = 0.8
"""The shortest prompt of a batch has at least this part of the longest one's tokens."""


ROUNDING = 1e-5

VERSION = 1
"""To be raised by hand when the same example gets other scores: shipped ones are then left out."""

MASSES = ("raw", "null", "share", "context", "shuffled")
"""The quantities that lie in [0, 1]."""

SHORT = dict.fromkeys(MASSES, "uint16") | {"norm": "float16", "entropy": "float16"}
"""How shipped files hold the quantities; see `write_table`."""

MODULES = (
    *("families", "compat", "models", "rendering", "processing", "locating", "prompts"),
    *("decoder", "prefix", "together", "attention"),
    "scoring",
)
"""The code that measures; kept scores are computed again when it changes."""


def score_heads(
    vlm: VLM,
    examples: Iterable[Example],
    *,
    folder: str | Path | None = None,
    fresh: bool = False,
    null: str = NULL_QUESTION,
    null_images: str = "placeholders",
    seed: int = 0,
    max_tokens: int = 0,
    progress: bool = True,
) -> HeadScores:
    """Calibrated retrieval scores, and the quantities of `QUANTITIES`, of every head and example.

    Examples of similar length run together where that is exact. A context runs once; the question,
    the null question and the shuffled question continue from its cache in one pass. Masses are
    means over question tokens, computed in float32.

    Args:
        vlm: The model.
        examples: Examples with evidence.
        folder: Folder of the results store. Examples that it holds already under the same
            provenance are not scored again, and what was scored before an error or an interrupt
            is kept there. Empty: `runs/scores`; None: nothing is read or kept.
        fresh: Leave out shipped results.
        null: The null question.
        null_images: "placeholders" leaves the placeholders of a question's images empty in its
            null question, as the authors' code does; "pixels" feeds the images again.
        seed: Seed of the shuffled questions.
        max_tokens: See `encode`.
        progress: Show a progress bar.

    Raises:
        ValueError: There is no example, one has no evidence, an attention mass lies outside [0, 1]
            or a value is not finite; the message names the example.
        OSError: The folder cannot be written.
    """
    with open_results(vlm, folder, fresh, null, null_images, seed) as results:
        return score_into(vlm, examples, results, max_tokens=max_tokens, progress=progress)


def score_needles(
    vlm: VLM,
    *,
    tasks: Sequence[str] = (),
    lengths: Sequence[int] = (),
    haystacks: int = HAYSTACKS,
    split: str = "detection",
    null_images: str = "placeholders",
    folder: str | Path = "",
    fresh: bool = False,
    progress: bool = True,
    source: Grid = GENERATED,
) -> HeadScores:
    """Scores on the needle tasks, with all depths of `haystacks` haystacks per condition.

    They are kept in the results store, so that notebooks share them and several processes can
    score at once. The order is tasks, lengths, depths, haystacks.

    Args:
        vlm: The model.
        tasks: Needle tasks; by default all of the source.
        lengths: Context lengths; by default all of the source.
        haystacks: Haystacks per task and length.
        split: Which examples.
        null_images: See `score_heads`.
        folder: Folder of the store; empty: `runs/scores`.
        fresh: Leave out shipped results.
        progress: Show a progress bar.
        source: What makes the examples, such as what `data_root.haystacks` returns.

    Raises:
        ValueError: As `source.generate` and `score_heads` do.
    """
    parts = []
    with open_results(vlm, folder, fresh, null_images=null_images) as results:
        for task, length in product(tasks or source.tasks, lengths or source.lengths):
            condition = needle_condition(task, length, split, source)
            examples = source.generate([task], [length], haystacks=haystacks, split=split)
            parts.append(score_into(vlm, examples, results, condition, progress=progress))
    return concatenate(parts)


def score_datasets(
    vlm: VLM,
    datasets: Mapping[str, Iterable[Example]],
    *,
    null_images: str = "placeholders",
    folder: str | Path = "",
    fresh: bool = False,
    progress: bool = True,
) -> dict[str, HeadScores]:
    """Scores on data sets by name, kept as needle scores are.

    Raises:
        ValueError: As `score_heads` does.
    """
    with open_results(vlm, folder, fresh, null_images=null_images) as results:
        return {
            name: score_into(vlm, examples, results, {"dataset": name}, progress=progress)
            for name, examples in datasets.items()
        }


def needle_condition(task: str, length: int, split: str, source: Grid) -> dict[str, Any]:
    """What a condition of needle scores is made of, as the store notes it."""
    return {"task": task, "length": length, "split": split, **source.about}


def open_results(
    vlm: VLM,
    folder: str | Path | None,
    fresh: bool,
    null: str = NULL_QUESTION,
    null_images: str = "placeholders",
    seed: int = 0,
) -> store.Results:
    """The store of a model's scores, for `score_into`; see `score_heads` for the settings."""
    expect_one_of("null_images", null_images, NULL_IMAGES)
    settings = {"null_images": null_images, "shuffle_seed": seed}
    code = code_version(MODULES)
    return store.open(
        "scores",
        vlm.provenance("mmheads.scoring", null, code=code, **settings),
        version=VERSION,
        folder=folder,
        fresh=fresh,
        arrays=QUANTITIES,
        about={"geometry": dataclasses.asdict(vlm.geometry)},
    )


def score_into(
    vlm: VLM,
    examples: Iterable[Example],
    results: store.Results,
    condition: Mapping[str, Any] | None = None,
    *,
    max_tokens: int = 0,
    progress: bool,
) -> HeadScores:
    """Scores of examples, from the store where it has them."""
    settings = results.provenance.settings
    null, seed = results.provenance.null_question, settings["shuffle_seed"]
    limit = BATCH_TOKENS.get(vlm.device.type, BATCH_TOKENS["cuda"])
    rows: list[dict[str, Any]] = []
    waiting: dict[str, tuple[int, Prompt]] = {}

    def finish() -> None:
        batch = dict(waiting)
        waiting.clear()
        if batch:
            _score_batch(vlm, batch, results, settings["null_images"])

    try:
        for index, example in enumerate(
            tqdm(examples, desc="scoring", disable=not progress, leave=False)
        ):
            key = example.fingerprint()
            rows.append({**example.labels(key), "key": key})
            if key in results or key in waiting:
                continue
            with _named(index):
                prompt = _encoded(vlm, example, null, seed, max_tokens)
            if not _fit([*(each for _, each in waiting.values()), prompt], limit):
                finish()
            waiting[key] = index, prompt
        finish()
    except Exception:
        finish()  # what came before the error is kept
        raise
    finally:
        if condition:
            results.note(condition, [row for row in rows if row["key"] in results])
    if not rows:
        raise ValueError("there is no example to score")
    return collect(results, rows)


def _fit(prompts: Sequence[Prompt], limit: int) -> bool:
    """Whether prompts are of similar length, and all questions together too, within the limit."""
    contexts = [prompt.shared for prompt in prompts]
    questions = [sum(len(each) - p.shared for each in p.questions) for p in prompts]
    similar = all(min(each) >= SIMILAR * max(each) for each in (contexts, questions))
    return len(prompts) * (max(contexts) + max(questions)) <= limit and similar


@contextmanager
def _named(index: int) -> Iterator[None]:
    """Names the example in a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"example {index} (from 0): {error}") from error


def _score_batch(
    vlm: VLM, batch: Mapping[str, tuple[int, Prompt]], results: store.Results, null_images: str
) -> None:
    """Keep the quantities of prompts by key, or name the first example that has none."""
    prompts = [prompt for _, prompt in batch.values()]
    try:
        scored: list[dict[str, Any]] = score_prompts(vlm, prompts, null_images=null_images)
    except ValueError:
        scored = []  # one by one below, to name the example
    for place, (key, (index, prompt)) in enumerate(batch.items()):
        with _named(index):
            values = scored[place] if scored else score_prompt(vlm, prompt, null_images=null_images)
            for name in MASSES:
                _check_mass(values[name], name, prompt.example)
                values[name] = values[name].clip(0, 1)
            _check_finite(values)
        counts = {
            "tokens": len(prompt),
            "question_tokens": len(prompt.question),
            "evidence_tokens": float(sum(span.weights.sum() for span in prompt.evidence)),
        }
        results.add(key, {**prompt.example.labels(key), **counts, **values})


def _check_finite(row: Mapping[str, Any]) -> None:
    for name in QUANTITIES:
        wrong = ~np.isfinite(row[name])
        if wrong.any():
            raise ValueError(
                f"{name} of {format_heads(np.argwhere(wrong))} is not finite; the model's weights "
                "or activations overflow in its precision"
            )


def collect(results: store.Results, rows: Sequence[Mapping[str, Any]]) -> HeadScores:
    """Scores of some rows of the store, each with task, length, depth, haystack and `key`."""
    stored = [results[row["key"]] for row in rows]
    known = [name for name in QUANTITIES if all(name in values for values in stored)]
    quantities = {name: np.stack([values[name] for values in stored]) for name in known}
    labels = ("task", "length", "depth", "haystack")
    metadata = [
        {
            **{name: row[name] for name in labels},
            "example": row["key"],
            **{name: values[name] for name in COUNTS if name in values},
        }
        for row, values in zip(rows, stored, strict=True)
    ]
    return HeadScores(
        quantities["raw"] - quantities["null"],
        geometry=parse(HeadGeometry, results.about["geometry"]),
        metadata=pd.DataFrame(metadata),
        quantities=quantities,
        provenance=results.provenance,
    )


def _encoded(vlm: VLM, example: Example, null: str, seed: int, max_tokens: int) -> Prompt:
    """An example with its null question and its shuffled question."""
    if not example.evidence:
        raise ValueError(
            f"an example of the task {example.task!r} has no evidence; it can be answered, but "
            "heads are scored by their attention to evidence"
        )
    others = null_question(example.question, null), shuffled_question(example.question, seed)
    return encode(vlm, example, questions=others, max_tokens=max_tokens)


def score_prompt(
    vlm: VLM, prompt: Prompt, *, null_images: str = "placeholders"
) -> dict[str, NDArray[np.float32]]:
    """The quantities of `QUANTITIES` for one encoded example -> [layer, head] by name.

    Args:
        vlm: The model.
        prompt: With evidence, and with the null question as its second; the shuffled question is
            the third, and without one that quantity is left out.
        null_images: See `score_heads`.
    """
    return score_prompts(vlm, [prompt], null_images=null_images)[0]


def score_prompts(
    vlm: VLM, prompts: Sequence[Prompt], *, null_images: str = "placeholders"
) -> list[dict[str, NDArray[np.float32]]]:
    """As `score_prompt` for several prompts, which run as one batch where that is exact."""
    asked = [_asked(vlm, prompt, null_images) for prompt in prompts]
    return [_quantities(*attention) for attention in ask_all(vlm, prompts, asked)]


def _asked(vlm: VLM, prompt: Prompt, null_images: str) -> list[Asked]:
    """The questions of a prompt: its own, the null question and perhaps the shuffled one."""
    own, empty, *shuffled = prompt.questions
    visual = vlm.is_visual(prompt.ids)
    context = own.weights(own.context)
    kinds = {bool(visual[span.tokens[0]]) for span in own.evidence}
    modality = context * np.isin(visual, list(kinds))
    spans = [own.weights(own.evidence), modality, context]
    return [
        Asked(own, spans, text=(context > 0) & ~visual),
        Asked(empty, [empty.weights(empty.evidence)], pixels=null_images == "pixels"),
        *(Asked(each, [each.weights(each.evidence)]) for each in shuffled),
    ]


def _quantities(
    own: Attention, empty: Attention, shuffled: Attention | None = None
) -> dict[str, NDArray[np.float32]]:
    """[layer, head] by name: means over the tokens of the questions."""
    raw, among, everywhere = own.mass.mean(dim=2).movedim(-1, 0).numpy()
    values = {
        "raw": raw,
        "null": empty.mass.mean(dim=2)[..., 0].numpy(),
        "share": np.divide(raw, among, out=np.zeros_like(raw), where=among > 0),
        "context": everywhere,
        "norm": own.norm.mean(dim=-1).numpy(),
        "entropy": own.entropy.mean(dim=-1).numpy(),
    }
    if shuffled is not None:
        values["shuffled"] = shuffled.mass.mean(dim=2)[..., 0].numpy()
    return values


def _check_mass(mass: NDArray[np.float32], name: str, example: Example) -> None:
    wrong = ~((mass >= -ROUNDING) & (mass <= 1 + ROUNDING))
    if wrong.any():
        raise ValueError(
            f"the {name} attention of {format_heads(np.argwhere(wrong))} lies outside [0, 1] in an "
            f"example of the task {example.task!r}"
        )
