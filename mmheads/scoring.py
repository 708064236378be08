"""Score every head of a model: how much attention goes from the question to the evidence.

Definitions: paper A (arXiv 2605.27243, Sec. 3) for the retrieval score and its calibration by a
null question; paper B (arXiv 2606.05843) for Retrieval Attention Mass (RAM).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from mmheads import paths
from mmheads.examples import Example
from mmheads.heads import head_names
from mmheads.models import VLM
from mmheads.prefix import Prefix, prefill
from mmheads.prompts import (
    NULL_QUESTION,
    Prompt,
    Question,
    encode,
    null_question,
    shuffled_question,
)
from mmheads.scores import HeadScores, Provenance
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
            `<path>.partial.parquet`, holds already are not scored again; it keeps them all.
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
    if null_images not in NULL_IMAGES:
        raise ValueError(f"null_images is {null_images!r}; expected one of {NULL_IMAGES}")
    provenance = _provenance(vlm, null, null_images, seed)
    target = Path(path) if path else None
    done = _earlier(target, provenance) if target else {}
    asked = []
    kept = len(done)
    saved = time.monotonic()
    for example in tqdm(examples, desc="scoring", disable=not progress, leave=False):
        mark = example.fingerprint()
        if mark not in done:
            done[mark] = _score(vlm, example, mark, null, null_images, seed, max_tokens)
        asked.append(done[mark].of(example))
        if target and len(done) > kept and time.monotonic() - saved > SAVE_EVERY:
            _collect(vlm, list(done.values()), provenance).save(_partial(target))
            saved = time.monotonic()
    if not asked:
        raise ValueError("there is no example to score")
    if target and (len(done) > kept or _partial(target).exists()):
        _collect(vlm, list(done.values()), provenance).save(target)
        _partial(target).unlink(missing_ok=True)
    return _collect(vlm, asked, provenance)


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
    source: Haystacks = needles,
) -> HeadScores:
    """Scores on the needle tasks, at all six depths x `pairs` examples a condition.

    They are kept in `folder` (default `runs/scores`), a file a model, task and length, so that
    notebooks share them and several processes can score at once; scores of another model, version
    or setting have another file there. The order is tasks, lengths, depths, pairs.

    Args:
        vlm: The model.
        tasks: Names of the source's tasks.
        lengths: Its context lengths.
        pairs: Question-evidence pairs a condition.
        split: Which examples.
        image_ratio: Share of pages in a generated haystack, see `needles.make`.
        null_images: See `score_heads`.
        folder: Where scores are kept.
        progress: Show a progress bar.
        source: What makes the examples: the module `needles`, or `niah.read(folder)`.

    Raises:
        ValueError: As `source.generate` and `score_heads` do.
    """
    place, mark = scores_folder(folder), _mark(vlm, null_images)
    depths = getattr(source, "depths", needles.DEPTHS)
    settings: dict[str, Any] = {"split": split}
    if source is needles:
        settings["image_ratio"] = image_ratio
    parts = []
    for task, length in product(tasks, lengths):
        stem = needle_stem(vlm.model_id, task, length, split, image_ratio, source)
        examples = source.generate([task], [length], depths, pairs, **settings)
        path = place / f"{stem}-{mark}.parquet"
        parts.append(
            score_heads(vlm, examples, path=path, null_images=null_images, progress=progress)
        )
    return HeadScores.concatenate(parts)


def score_sets(
    vlm: VLM,
    sets: Mapping[str, Iterable[Example]],
    *,
    null_images: str = "pixels",
    folder: str | Path = "",
    progress: bool = True,
) -> dict[str, HeadScores]:
    """Scores on data sets by name, each kept in a file of `folder` as needle scores are.

    Raises:
        ValueError: As `score_heads` does.
    """
    place, mark = scores_folder(folder), _mark(vlm, null_images)
    return {
        name: score_heads(
            vlm,
            examples,
            path=place / f"{Path(vlm.model_id).name}-{name}-{mark}.parquet",
            null_images=null_images,
            progress=progress,
        )
        for name, examples in sets.items()
    }


def kept_needles(
    model: str,
    lengths: Sequence[int] = (),
    *,
    tasks: Sequence[str] = needles.TASKS,
    split: str = "detection",
    folder: str | Path = "",
) -> HeadScores:
    """Needle scores that `score_needles` has kept, read without the model.

    Those on published haystacks if there are any, else on generated ones.

    Args:
        model: Name of the model, as in the names of the files.
        lengths: Context lengths; by default all that the first task was scored at.
        tasks: Needle tasks.
        split: See `score_needles`.
        folder: "

    Raises:
        ValueError: A task and length has no file, or files that were made in several ways.
    """
    name, place = Path(model).name, scores_folder(folder)
    stems = re.compile(
        rf"{re.escape(name)}-{tasks[0]}-(\d+)-{split}-(published|0\.5)-[0-9a-f]{{8}}\.parquet"
    )
    kept = [stems.fullmatch(path.name) for path in place.glob("*.parquet")]
    known = {(match[2], int(match[1])) for match in kept if match}
    if not known:
        raise ValueError(f"{place} holds no needle scores of {name}; run notebook 02 first")
    kind = max(known)[0]  # "published" comes behind "0.5"
    parts = []
    for task, length in product(tasks, lengths or sorted(n for of, n in known if of == kind)):
        stem = f"{name}-{task}-{length}-{split}-{kind}"
        found = list(place.glob(f"{stem}-????????.parquet"))
        if len(found) != 1:
            names = ", ".join(path.name for path in found) or "none"
            raise ValueError(
                f"{place} holds {names} for {stem}; expected one score file: run notebook "
                "02 with this model and these lengths, and keep one version"
            )
        parts.append(HeadScores.load(found[0]))
    return HeadScores.concatenate(parts)


def scores_folder(folder: str | Path = "") -> Path:
    """Where scores are kept, by default `runs/scores`."""
    return Path(folder) if folder else paths.RUNS / "scores"


def _mark(vlm: VLM, null_images: str) -> str:
    """Of how scores are made, in the names of their files."""
    made = dataclasses.asdict(_provenance(vlm, NULL_QUESTION, null_images, 0))
    return hashlib.sha256(repr(made).encode()).hexdigest()[:8]


class Haystacks(Protocol):
    """Makes needle examples: the module `needles`, or published ones."""

    def generate(
        self,
        tasks: Sequence[str],
        lengths: Sequence[int],
        depths: Sequence[float],
        pairs: int,
        **settings: Any,
    ) -> Iterable[Example]:
        """Every example of a grid, pairs innermost."""


def needle_stem(
    model: str, task: str, length: int, split: str, image_ratio: float, source: Haystacks = needles
) -> str:
    """Name of a file of needle scores, before the mark of how they were made.

    Generated needles have their share of pages in it, others the `name` of their source.
    """
    generated = source is needles
    parts = [Path(model).name, task, f"{length}", split]
    return "-".join([*parts, f"{image_ratio:g}" if generated else _name(source)])


def _name(source: Haystacks) -> str:
    return str(getattr(source, "name", "published"))


@dataclasses.dataclass(frozen=True, eq=False)
class _Scored:
    """One example: its row of metadata, and [layer, head] by quantity."""

    row: dict[str, Any]
    values: dict[str, NDArray[np.float32]]

    def of(self, example: Example) -> _Scored:
        """The same for an example with the same content, which may be of another depth."""
        seed = json.dumps(example.seed)
        row = self.row | {"task": example.task, "depth": example.depth, "seed": seed}
        return _Scored(row, self.values)


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
    others = null_question(example.question, null), shuffled_question(example.question, seed)
    prompt = encode(vlm, example, questions=others, max_tokens=max_tokens)
    values = score_prompt(vlm, prompt, null_images=null_images)
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
    vlm: VLM, prompt: Prompt, *, null_images: str = "pixels"
) -> dict[str, NDArray[np.float32]]:
    """The quantities of `QUANTITIES` for one encoded example -> [layer, head] by name.

    Args:
        vlm: The model.
        prompt: With evidence, and with the null question as its second; the shuffled question is
            the third, and without one that quantity is left out.
        null_images: See `score_heads`.
    """
    own, empty, *shuffled = prompt.questions
    prefix = prefill(vlm, prompt)
    visual = vlm.is_visual(prompt.ids)
    context = own.weights(own.context)
    kinds = {bool(visual[span.tokens[0]]) for span in own.evidence}
    modality = context * np.isin(visual, list(kinds))
    attention = prefix.attention(
        own,
        [own.weights(own.evidence), modality, context],
        text=(context > 0) & ~visual,
    )
    raw, among, everywhere = attention.mass.mean(dim=2).movedim(-1, 0).numpy()
    values = {
        "raw": raw,
        "null": _mean_mass(prefix, empty, pixels=null_images == "pixels"),
        "share": np.divide(raw, among, out=np.zeros_like(raw), where=among > 0),
        "context": everywhere,
        "norm": attention.norm.mean(dim=-1).numpy(),
        "entropy": attention.entropy.mean(dim=-1).numpy(),
    }
    if shuffled:
        values["shuffled"] = _mean_mass(prefix, shuffled[0])
    return values


def _mean_mass(prefix: Prefix, question: Question, *, pixels: bool = True) -> NDArray[np.float32]:
    """[layer, head] attention to the evidence, mean over the question's tokens."""
    evidence = [question.weights(question.evidence)]
    mass = prefix.attention(question, evidence, pixels=pixels).mass
    means: NDArray[np.float32] = mass.mean(dim=2)[..., 0].numpy()
    return means


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
