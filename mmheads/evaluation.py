"""The benchmarks of lmms-eval, with the full model and with heads ablated.

lmms-eval has the questions and the metrics, among them those of MMMU, MMMU-Pro and MathVision
(paper A, arXiv 2605.27243, Fig. 9). The answers are those of `mmheads.answers`: greedy, and kept in
the results store. lmms-eval is the optional extra `benchmarks`, imported only where it is used.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image
from transformers.video_utils import load_video

from mmheads.answers import FULL_MODEL, Ablations, answer
from mmheads.examples import Example, Part, Video
from mmheads.heads import HeadSet
from mmheads.images import open_image
from mmheads.models import VLM

FRAMES = 16
"""Frames per video, spread evenly over it."""


def evaluate(
    vlm: VLM,
    tasks: Sequence[str],
    ablations: Ablations | None = None,
    *,
    answers: Callable[..., pd.DataFrame] = answer,
    limit: int | None = None,
    max_new_tokens: int = 1024,
    task_folder: str | Path | None = None,
    **settings: Any,
) -> pd.DataFrame:
    """Run tasks of lmms-eval with the full model and under each ablation.

    Args:
        vlm: The model.
        tasks: Names of tasks or of groups of tasks, such as "mmmu_val".
        ablations: Sets of heads by name, or several draws under one name, as in `answer`.
        answers: `answer`, or `answers.answer_streaming`, for which `ablations` are dense heads.
        limit: Number of questions per task, the first ones; None for all.
        max_new_tokens: Number of tokens of the longest answer; a task may ask for shorter ones.
        task_folder: Folder with YAML files of further tasks.
        settings: Further arguments of `answers`, for example `mode` or `folder`.

    Returns:
        One row per set of heads, task and metric: ablation, draw (0-based), heads (their number),
        task, metric, filter (of lmms-eval, "none" by default), value, questions (their number).

    Raises:
        ImportError: lmms-eval is not installed.
        ValueError: As `responses` does, or a task compares likelihoods or asks in several rounds.
    """
    try:
        from lmms_eval.api.model import lmms
        from lmms_eval.evaluator import simple_evaluate
        from lmms_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(
            f"benchmarks need lmms-eval, which cannot be imported here ({error}); install the "
            "extra `benchmarks`: pip install --editable '.[benchmarks]'"
        ) from error
    manager = TaskManager("WARNING", include_path=str(task_folder) if task_folder else None)
    keys = [(FULL_MODEL, 0)]
    for name, of in (ablations or {}).items():
        keys += [(name, draw) for draw in range(1 if isinstance(of, HeadSet) else len(of))]
    settings |= {"answers": answers, "max_new_tokens": max_new_tokens}
    said: list[pd.DataFrame] = []
    rows: list[dict[str, object]] = []
    for key in keys:

        def generate(model: Any, requests: Sequence[Any], key: tuple[str, int] = key) -> list[str]:
            if not said:  # The first run answers for all sets of heads.
                said.append(responses(vlm, requests, model.task_dict, ablations, **settings))
            return said[0]["prediction"].loc[[key]].tolist()

        methods = {"generate_until": generate, "is_simple": False}
        refused = dict.fromkeys(("loglikelihood", "generate_until_multi_round"), _refuse)
        model = type("AblatedModel", (lmms,), methods | refused)()
        run = {"task_manager": manager, "limit": limit, "bootstrap_iters": 0}
        results = simple_evaluate(model=model, tasks=list(tasks), **run)
        heads = said[0]["heads"].loc[[key]].iloc[0]
        which = {"ablation": key[0], "draw": key[1], "heads": heads}
        rows += [which | row for row in _metrics(results)]
    return pd.DataFrame(rows)


def responses(
    vlm: VLM,
    requests: Sequence[Any],
    documents: Mapping[str, Any],
    ablations: Ablations | None = None,
    *,
    answers: Callable[..., pd.DataFrame] = answer,
    max_new_tokens: int = 1024,
    **settings: Any,
) -> pd.DataFrame:
    """Answer requests of lmms-eval under each ablation.

    An answer is cut where a text begins at which its task stops. An empty line, at which tasks stop
    by default, is not one of them, as in lmms-eval's own models for Qwen.

    Args:
        vlm: The model.
        requests: lmms-eval's `Instance`s of tasks that generate: their `args` are (text, function
            of a document that returns messages, settings of generation, number of the document,
            task, split).
        documents: By task and split, the documents.
        ablations: See `evaluate`.
        answers: See `evaluate`.
        max_new_tokens: See `evaluate`.
        settings: See `evaluate`.

    Returns:
        The columns of `answers`, indexed by (ablation, draw), in the order of the requests.

    Raises:
        ValueError: A task samples its answers, or as `to_example` and `answers` do.
    """
    lengths = defaultdict(list)
    for place, request in enumerate(requests):
        _, _, how, _, task, _ = request.args
        if how.get("do_sample") or (how.get("temperature") or 0) > 0:
            raise ValueError(
                f"the task {task} samples its answers ({how}), but answers are greedy here; leave "
                "it out, or change its `generation_kwargs` in a YAML file of `task_folder`"
            )
        lengths[min(how.get("max_new_tokens") or max_new_tokens, max_new_tokens)].append(place)
    tables = []
    for length, places in lengths.items():
        examples = (to_example(vlm, requests[place], documents) for place in places)
        table = answers(vlm, examples, ablations or {}, max_new_tokens=length, **settings)
        tables.append(table.assign(example=table["example"].map(dict(enumerate(places)))))
    table = pd.concat(tables).sort_values("example", kind="stable")
    stops = [request.args[2].get("until") or [] for request in requests]
    said = zip(table["prediction"], table["example"], strict=True)
    table["prediction"] = [_cut(text, stops[place]) for text, place in said]
    return table.set_index(["ablation", "draw"]).sort_index(kind="stable")


def to_example(vlm: VLM, request: Any, documents: Mapping[str, Any]) -> Example:
    """Return what a request of lmms-eval asks, as an example without evidence.

    Videos are read with PyAV; a model that reads none gets their frames as images.

    Args:
        vlm: The model.
        request: See `responses`.
        documents: See `responses`.

    Raises:
        ValueError: The request is not one message of a user with texts, images and videos, or one
            of them cannot be read.
    """
    _, to_messages, _, number, task, split = request.args
    messages = to_messages(documents[task][split][number])
    roles = [message["role"] for message in messages]
    if roles != ["user"]:
        raise ValueError(f"the task {task} has messages of {roles}; expected one of the user")
    parts = [_part(piece, f"{task}, question {number}") for piece in messages[0]["content"]]
    example = Example(context=(), question=tuple(parts), task=task)
    return example if vlm.reads_video else example.without_video()


def _part(piece: Mapping[str, Any], name: str) -> Part:
    match piece["type"]:
        case "text":
            return str(piece["text"])
        case "image":
            return open_image(piece["url"], name)
        case "video":
            frames, about = load_video(piece["url"], num_frames=FRAMES, backend="pyav")
            pictures = tuple(map(Image.fromarray, frames))
            return Video(frames=pictures, fps=len(pictures) / about.duration)
    raise ValueError(f"{name} has a part of the type {piece['type']}; expected text, image, video")


def _cut(text: str, stops: str | Sequence[str]) -> str:
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.split(stop)[0] if stop.strip() else text
    return text


def _refuse(model: Any, requests: Sequence[Any]) -> None:
    raise ValueError(
        f"the task {requests[0].task_name} compares likelihoods or asks in several rounds; only "
        "tasks that generate one answer (`output_type: generate_until`) are run with heads ablated"
    )


def _metrics(results: Mapping[str, Any]) -> list[dict[str, object]]:
    """The rows of one run: the numbers in lmms-eval's results that are not standard errors."""
    rows: list[dict[str, object]] = []
    for task, values in results["results"].items():
        count = results["n-samples"].get(task, {}).get("effective")
        for key, value in values.items():
            metric, _, chosen = key.partition(",")
            if chosen and "_stderr" not in metric and isinstance(value, int | float):
                which = {"task": task, "metric": metric, "filter": chosen}
                rows.append(which | {"value": float(value), "questions": count})
    return rows
