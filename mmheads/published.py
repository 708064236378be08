"""Per-head scores that the authors of paper A released, as `HeadScores`; and printed numbers.

120 files, one per model, task and context length, of the null-calibrated retrieval score averaged
over 120 prompts (arXiv 2605.27243). They are downloaded from the source at a fixed commit, or
read from a folder, and always checked against their SHA-256. They are never copied into this
repository.
"""

import functools
import hashlib
import json
import operator
import statistics
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pooch
from tqdm import tqdm

from mmheads import paths
from mmheads.checks import expect
from mmheads.heads import Head, HeadGeometry, HeadSet, format_heads
from mmheads.provenance import Provenance
from mmheads.scores import HeadScores

COMMIT = "126112d6936b55f0ce7bc884ee4c87e567d89895"
RELEASE = f"ab-cli/MMRetHead@{COMMIT}"
SOURCE = f"https://raw.githubusercontent.com/ab-cli/MMRetHead/{COMMIT}/"
TOP = "MMRetHead"
"""Folder inside a published folder that holds `results/detection/<model>/...`."""

HOW_TO_GET = (
    "connect to the network and run again (12 MB are downloaded once), or set MMHEADS_PUBLISHED "
    f"to a folder that holds all of {TOP}/results/detection/"
)

GEOMETRIES = {
    "Qwen2.5-VL-7B-Instruct": HeadGeometry(28, 28, 4, None, architecture="qwen2_5_vl"),
    "Qwen2.5-VL-32B-Instruct": HeadGeometry(64, 40, 8, None, architecture="qwen2_5_vl"),
    "Qwen3-VL-8B-Instruct": HeadGeometry(36, 32, 8, None, architecture="qwen3_vl"),
    "Qwen3-VL-32B-Instruct": HeadGeometry(64, 64, 8, None, architecture="qwen3_vl"),
    "gemma-3-12b-it": HeadGeometry(48, 16, 8, tuple(range(5, 48, 6)), architecture="gemma3"),
    "gemma-3-27b-it": HeadGeometry(62, 32, 16, tuple(range(5, 62, 6)), architecture="gemma3"),
}
"""The released models. In Gemma 3 every sixth layer is global, the others slide."""

MODELS = {
    "Qwen2.5-VL-7B": "Qwen2.5-VL-7B-Instruct",
    "Qwen2.5-VL-32B": "Qwen2.5-VL-32B-Instruct",
    "Qwen3-VL-8B": "Qwen3-VL-8B-Instruct",
    "Qwen3-VL-32B": "Qwen3-VL-32B-Instruct",
    "Gemma3-12B": "gemma-3-12b-it",
    "Gemma3-27B": "gemma-3-27b-it",
}
"""The paper's short name of each model, and its name on the hub."""

TASKS = {
    "text": "mm_niah_retrieval-text_retrieval-text",
    "image": "mm_niah_retrieval-image_retrieval-image",
    "rendered_text": "text_needle_image_retrieval-text",
    "identical_image": "identical_retrieval-image_retrieval-image",
}
"""The four needle tasks, and how their file names begin."""

LENGTHS = (8192, 16384, 32768, 65536, 131072)
"""Nominal context lengths in tokens."""

KNOWN_DEFECTIVE = ("Qwen2.5-VL-7B-Instruct",)
"""Models whose released files hold values outside [-1, 1]."""

_LISTED = Path(__file__).with_name("published_sha256.txt").read_text(encoding="utf-8")
REGISTRY = {key: sha256 for sha256, key in map(str.split, _LISTED.splitlines())}
"""SHA-256 of every released file, by its path below `TOP`."""


class NotAvailableError(FileNotFoundError):
    """A released file is not in the folder, or cannot be downloaded."""


class DefectiveFileError(ValueError):
    """A released file is not what was released, or not what a score file must be."""


class ImpossibleScoreWarning(UserWarning):
    """A released file holds a score outside [-1, 1], as released."""


def complete_folder(*, folder: str | Path = "", cache: str | Path = "") -> Path | None:
    """The folder, or else the cache, if every released file can be read from it."""
    base = paths.published(folder) or paths.cache(cache) / "published"
    return base if all((base / TOP / key).is_file() for key in REGISTRY) else None


def load(
    model: str,
    task: str,
    length: int | str,
    *,
    folder: str | Path = "",
    cache: str | Path = "",
) -> HeadScores:
    """The released scores of one model, task and context length.

    Args:
        model: Short name, name on the hub, or folder of that name: "Qwen3-VL-8B",
            "Qwen/Qwen3-VL-8B-Instruct", "models/Qwen3-VL-8B-Instruct".
        task: One of `TASKS`.
        length: Context length in tokens, one of `LENGTHS`; "8K" means 8192.
        folder: Read from this folder; by default from that of `paths.published`, and without
            any, download.
        cache: Keep downloads here; by default in `paths.cache`.

    Returns:
        Values [1, layer, head]: the authors released means over their prompts, not prompts.
        Gemma 3's sliding-window layers are ineligible.

    Raises:
        NotAvailableError: the file is missing in the folder, or cannot be downloaded.
        DefectiveFileError: wrong checksum, invalid JSON, a head that is missing or given twice, or
            a score that is not a number in [-1, 1].

    Warns:
        ImpossibleScoreWarning: a score outside [-1, 1] of a model that is known to have some.
    """
    name = MODELS.get(Path(model).name, Path(model).name)
    expect(name in GEOMETRIES, "model", model, f"one of {', '.join(MODELS)}")
    expect(task in TASKS, "task", task, f"one of {', '.join(TASKS)}")
    tokens = _tokens(length)
    key = (
        f"results/detection/{name}/{TASKS[task]}_test_K{tokens // 1024}_dep6_in{tokens}"
        "_size20_sampFalse_addnullTrue_42.json"
    )
    return parse(_fetch(key, folder, cache), key, task=task, length=tokens)


def heads(
    model: str | HeadGeometry,
    *,
    tasks: Sequence[str] = tuple(TASKS),
    length: int | str = "128K",
    fraction: float = 0.05,
    folder: str | Path = "",
    cache: str | Path = "",
) -> HeadSet:
    """The union of the strongest heads of some tasks, as paper A ranks documents with.

    Args:
        model: As in `load`, or the geometry of a loaded model.
        tasks: Some of `TASKS`.
        length: See `load`.
        fraction: Share of all heads that each task selects.
        folder: See `load`.
        cache: See `load`.

    Raises:
        ValueError: No released model has this name or geometry, or as `load` does.
        NotAvailableError: As `load` does.
    """
    expect(bool(tasks), "tasks", tasks, f"at least one of {', '.join(TASKS)}")
    if isinstance(model, HeadGeometry):
        names = [name for name, geometry in GEOMETRIES.items() if geometry.fits(model)]
        expect(names, "model", model, f"the heads of one of {', '.join(MODELS)}")
        model = names[0]
    where: Any = {"folder": folder, "cache": cache}
    sets = (load(model, task, length, **where).top(fraction) for task in tasks)
    return functools.reduce(operator.or_, sets)


def load_all(
    models: Iterable[str] = tuple(MODELS),
    tasks: Iterable[str] = tuple(TASKS),
    lengths: Iterable[int | str] = LENGTHS,
    *,
    folder: str | Path = "",
    cache: str | Path = "",
) -> dict[tuple[str, str, int], HeadScores]:
    """The released scores by (model, task, length), in the order given; or none of them.

    If a file is not available, one line says which and how to get it, and the result is empty:
    a figure is made from all that it needs, or left as it is.
    """
    keys = [(model, task, _tokens(n)) for model in models for task in tasks for n in lengths]
    no_download = bool(paths.published(folder) or complete_folder(cache=cache))
    try:
        return {
            key: load(*key, folder=folder, cache=cache)
            for key in tqdm(keys, desc="released scores", leave=False, disable=no_download)
        }
    except NotAvailableError as error:
        print(f"Skipped: released scores; committed figures stay as they are. {error}")
        return {}


def impossible_heads(
    released: Mapping[tuple[str, str, int], HeadScores],
) -> dict[str, list[Head]]:
    """Heads of each model with a score outside [-1, 1] in any of its files, by (layer, head)."""
    impossible: dict[str, set[Head]] = {}
    for (model, _, _), scores in released.items():
        impossible.setdefault(model, set()).update(scores.out_of_range(-1, 1))
    return {model: sorted(heads) for model, heads in impossible.items()}


def parse(raw: bytes, name: str, *, task: str, length: int) -> HeadScores:
    """Scores from the bytes of a released file `name`, `.../<model>/<file>`. See `load`."""
    model = name.split("/")[-2]
    geometry = GEOMETRIES[model]
    try:
        content = json.loads(raw)
        scores = [
            ((int(layer), int(head)), float(score))
            for head_name, score in content["head_score_list"]
            for layer, head in [head_name.split("-")]
        ]
        input_tokens = statistics.fmean(content["metrics"]["input_len"])
        prompts = len(content["metrics"]["input_len"])
        model_id, seed = str(content["args"]["model_name_or_path"]), int(content["args"]["seed"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DefectiveFileError(
            f"{name} is not a released score file: {type(error).__name__} {error}"
        ) from error

    counts = Counter(head for head, _ in scores)
    expected = set(np.ndindex(geometry.layers, geometry.heads))
    for heads, problem in (
        (expected - counts.keys(), "lacks the heads"),
        (counts.keys() - expected, "holds heads that the model does not have:"),
        ({head for head in counts if counts[head] > 1}, "holds more than one score of"),
        ({head for head, score in scores if not np.isfinite(score)}, "has no number for"),
    ):
        if heads:
            raise DefectiveFileError(f"{name} {problem} {format_heads(sorted(heads))}")

    values = np.array([score for _, score in sorted(scores)], dtype=np.float32)
    about = {"task": task, "length": length, "depth": np.nan, "haystack": ""}
    about |= {"prompts": prompts, "mean_input_tokens": input_tokens}
    result = HeadScores(
        values.reshape(1, geometry.layers, geometry.heads),
        geometry=geometry,
        metadata=pd.DataFrame([about]),
        provenance=Provenance(
            model=model_id,
            null_question=" ".join(["N/A"] * 5),
            settings={"shuffle_seed": seed},
            source=f"{RELEASE}/{name}",
        ),
    )
    if impossible := result.out_of_range(-1, 1):
        message = (
            f"{name}: calibrated scores of {format_heads(impossible)} lie outside [-1, 1], where a "
            "difference of two attention masses cannot lie"
        )
        if model not in KNOWN_DEFECTIVE:
            raise DefectiveFileError(message)
        warnings.warn(f"{model}: {message}", ImpossibleScoreWarning, stacklevel=3)
    return result


def paper(table: str) -> pd.DataFrame:
    """A table of numbers printed in a paper, `data/papers/<table>.csv`."""
    return pd.read_csv(paths.PAPERS / f"{table}.csv")


def _tokens(length: int | str) -> int:
    named = {f"{n // 1024}K": n for n in LENGTHS} | {n: n for n in LENGTHS}
    expect(length in named, "length", length, f"one of {', '.join(map(str, named))}")
    return named[length]


def _fetch(key: str, folder: str | Path, cache: str | Path) -> bytes:
    """The verified bytes of a released file, from the folder, the cache or the network."""
    base = paths.published(folder)
    sha256 = REGISTRY[key]
    if base is None:
        pooch.get_logger().setLevel("WARNING")
        target = paths.cache(cache) / "published" / TOP / key
        try:
            return Path(
                pooch.retrieve(
                    SOURCE + key,
                    known_hash=sha256,
                    path=target.parent,
                    fname=target.name,
                    downloader=pooch.HTTPDownloader(timeout=10),
                )
            ).read_bytes()
        except OSError as error:
            raise NotAvailableError(
                f"{key} could not be downloaded ({type(error).__name__}); {HOW_TO_GET}"
            ) from error
        except ValueError as error:
            raise DefectiveFileError(str(error)) from error
    path = base / TOP / key
    if not path.is_file():
        raise NotAvailableError(
            f"{path} does not exist; complete that folder, or unset MMHEADS_PUBLISHED to download"
        )
    raw = path.read_bytes()
    digest = hashlib.sha256(raw).hexdigest()
    if digest != sha256:
        raise DefectiveFileError(
            f"{path} has SHA-256 {digest[:12]}..., the released file has {sha256[:12]}...: "
            "it is truncated or changed, get it again"
        )
    return raw
