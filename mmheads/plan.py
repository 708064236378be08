"""What a run will compute, what that costs, and who computes it: this machine, or a Ray cluster.

Costs are estimates, from the model's shape and from the logs that paper A's authors published.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tqdm import tqdm

from mmheads import paths
from mmheads.tasks import data_root, mmlongbench_docs, needles, reasoning

if TYPE_CHECKING:
    from mmheads.models import VLM

BYTES = 2
"""Of a weight, a key or a value in bfloat16."""
HIDDEN_STATES = 12
"""Working memory a token, in hidden states: what the logs leave beside weights and cache."""
SCORING = (1.07, 1.42)
"""Time of scoring with the null question to that of a plain pass, least and most, as
`python -m mmheads.latency scoring` measured it on two CPU cores."""
USABLE = 0.9
"""Share of a GPU's memory that a run may take."""
BENCHMARK_TOKENS = 2048
"""What a question of the reasoning sets, or of MLVU, is taken for; its answer is not counted."""
MMDOCIR = (313, 20395, 170338)
"""Documents, pages and layout elements of MMDocIR, as its authors state (arXiv 2501.08828)."""
PAGE_TOKENS, LAYOUT_TOKENS = 1862, 256
"""Of a letter page at 144 dpi with 32 x 32 pixels a token, and what a layout is taken for."""
RETRIES = 3
"""How often a run is repeated whose worker was lost."""
SPLIT = "detection"


class UsageError(ValueError):
    """The command line asks for what is not there."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a model's cost depends on.

    Attributes:
        parameters: Of the whole model, with its image part.
        layers: Of the language model.
        hidden: Its width.
        heads: Query heads a layer.
        kv_groups: Key-value heads a layer.
        channels: Of a head.
        window: Tokens that a sliding layer sees.
        sliding: Number of sliding layers.
    """

    parameters: float
    layers: int
    hidden: int
    heads: int
    kv_groups: int
    channels: int
    window: int = 0
    sliding: int = 0

    def memory(self, tokens: int) -> float:
        """Bytes on the GPU at the end of a pass over a prompt of so many tokens."""
        keys = (self.layers - self.sliding) * tokens + self.sliding * min(tokens, self.window)
        cache = 2 * keys * self.kv_groups * self.channels
        return BYTES * (self.parameters + cache + HIDDEN_STATES * self.hidden * tokens)

    def operations(self, tokens: int) -> float:
        """Floating-point operations of a pass: two a parameter and token, and attention."""
        window = min(tokens, self.window)
        pairs = (self.layers - self.sliding) * tokens**2 / 2
        pairs += self.sliding * window * (tokens - window / 2)
        return 2 * self.parameters * tokens + 4 * pairs * self.heads * self.channels


def _shape(
    billions: float, layers: int, hidden: int, heads: int, groups: int, **more: int
) -> Shape:
    size = {"channels": 128, **more}
    return Shape(
        parameters=1e9 * billions,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_groups=groups,
        **size,
    )


MODELS = {
    "Qwen/Qwen2.5-VL-7B-Instruct": _shape(8.29, 28, 3584, 28, 4),
    "Qwen/Qwen2.5-VL-32B-Instruct": _shape(33.45, 64, 5120, 40, 8),
    "Qwen/Qwen3-VL-4B-Instruct": _shape(4.44, 36, 2560, 32, 8),
    "Qwen/Qwen3-VL-8B-Instruct": _shape(8.77, 36, 4096, 32, 8),
    "Qwen/Qwen3-VL-32B-Instruct": _shape(33.36, 64, 5120, 64, 8),
    "google/gemma-3-12b-it": _shape(12.19, 48, 3840, 16, 8, channels=256, window=1024, sliding=40),
    "google/gemma-3-27b-it": _shape(27.43, 62, 5376, 32, 16, window=1024, sliding=52),
    "OpenGVLab/InternVL3_5-8B-HF": _shape(8.53, 36, 4096, 32, 8),
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": _shape(8.03, 28, 3584, 28, 4),
}
"""The papers' models: billions of parameters, layers, width, heads, KV groups, as in their
configurations on the hub."""


@dataclass(frozen=True)
class GPU:
    """A GPU's memory in bytes and its dense bfloat16 operations a second, as its maker states."""

    memory: float
    peak: float


GPUS = {
    "A100-80GB": GPU(80e9, 312e12),
    "H100": GPU(80e9, 989e12),
    "H200": GPU(141e9, 989e12),
    "L40S": GPU(48e9, 362e12),
}
LOGGED = "Qwen/Qwen3-VL-8B-Instruct"
LOGS = {8192: (0.15, 0.08), 131072: (0.021, 0.012)}
"""Prompts a second, fastest and slowest, by context length: paper A's own logs of `LOGGED`, null
question included. They do not name their GPU."""
TAKEN_FOR = "A100-80GB"
"""The GPU that the logs are taken for: its 47 to 53 GB did not fit a smaller one."""


@dataclass(frozen=True)
class Speed:
    """Seconds that every prompt takes, and the share of the GPU's peak that a pass reaches."""

    overhead: float
    utilisation: float

    def seconds(self, shape: Shape, tokens: int, gpu: GPU) -> float:
        """Estimated seconds to score one prompt."""
        return self.overhead + shape.operations(tokens) / (gpu.peak * self.utilisation)


def speeds() -> tuple[Speed, Speed]:
    """The fastest and the slowest that the logs allow: a line through their two lengths."""
    short, long = LOGS
    work = MODELS[LOGGED].operations(long) - MODELS[LOGGED].operations(short)
    found = []
    for fewest, most in zip(LOGS[short], LOGS[long], strict=True):
        rate = work / (1 / most - 1 / fewest)
        overhead = 1 / fewest - MODELS[LOGGED].operations(short) / rate
        found.append(Speed(overhead, rate / GPUS[TAKEN_FOR].peak))
    return found[0], found[1]


@cache
def shape_of(model: str) -> Shape | None:
    """The shape of a model of the table, or of a folder by its configuration and weights.

    Raises:
        UsageError: The folder holds no configuration, or no `*.safetensors`.
    """
    folder = folder_of(model)
    if folder is None:
        return MODELS.get(model)
    from safetensors import safe_open
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} holds no config.json: expected a model's folder")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UsageError(f"{folder} holds no *.safetensors: its size is unknown")
    parameters = 0
    for path in weights:
        with safe_open(path, framework="np") as file:
            parameters += sum(math.prod(file.get_slice(k).get_shape()) for k in file.keys())  # noqa: SIM118
    text: Any = AutoConfig.from_pretrained(folder).get_text_config()
    heads = text.num_attention_heads
    return Shape(
        parameters=parameters,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=heads,
        kv_groups=getattr(text, "num_key_value_heads", None) or heads,
        channels=getattr(text, "head_dim", None) or text.hidden_size // heads,
        window=getattr(text, "sliding_window", None) or 0,
        sliding=Counter(getattr(text, "layer_types", None) or [])["sliding_attention"],
    )


def folder_of(model: str) -> Path | None:
    """The folder of a shipped or a local model; None for a name on the hub."""
    return next((path for path in (paths.MODELS / model, Path(model)) if path.is_dir()), None)


def name_of(model: str) -> str:
    """What a model's files are called: the last part of its name or folder."""
    return (folder_of(model) or Path(model)).resolve().name


class Unit(Protocol):
    """A piece of work that any process can do: a score run, or a notebook."""

    @property
    def name(self) -> str:
        """What a reader calls it."""

    @property
    def gpus(self) -> int:
        """GPUs that it takes, where there are any."""

    def run(self) -> str:
        """Do it; the error in one line, or nothing."""


@dataclass(frozen=True, kw_only=True)
class ScoreRun:
    """The scores of one model on one needle task at one length: a file of `runs/scores`.

    Attributes:
        model: Shipped model, folder, or name on the hub.
        task: One of `needles.TASKS`.
        length: Context length.
        pairs: Question-evidence pairs, each at every depth.
        null_images: See `score_heads`.
        image_ratio: See `needles.make`.
        data: Folder of the published needles; empty: generated ones.
        folder: Where scores are kept; empty: `runs/scores`.
        gpus: GPUs that the model is spread over.
    """

    model: str
    task: str
    length: int
    pairs: int
    null_images: str = "pixels"
    image_ratio: float = 0.5
    data: str = ""
    folder: str = ""
    gpus: int = 1

    @property
    def name(self) -> str:
        """What a reader calls it."""
        share = "" if self.image_ratio == 0.5 else f", {self.image_ratio:g} images"
        return f"{name_of(self.model)} {self.task} {self.length}{share}"

    @property
    def prompts(self) -> int:
        """Number of prompts: depths x pairs."""
        return len(needles.DEPTHS) * self.pairs

    def scored(self) -> int:
        """Prompts that are scored already, by these versions and with this null question.

        Weights, template and precision are compared when the run starts.
        """
        import pyarrow.parquet as pq

        from mmheads.scoring import needle_stem, scores_folder

        source = _opened(self.data) if self.data and Path(self.data).is_dir() else needles
        stem = needle_stem(
            name_of(self.model), self.task, self.length, SPLIT, self.image_ratio, source
        )
        found = [0]
        for path in scores_folder(self.folder).glob("*.parquet"):
            if not path.name.startswith(f"{stem}-") or ".partial." in path.name:
                continue
            about = pq.read_metadata(path)
            made = json.loads(about.metadata[b"mmheads"])["provenance"]
            same = all(
                version(name).split("+")[0] == held for name, held in made["versions"].items()
            )
            if same and made["settings"]["null_images"] == self.null_images:
                found.append(about.num_rows)
        return min(max(found), self.prompts)

    def run(self) -> str:
        """Score; prompts that are scored already are not scored again."""
        from mmheads.scoring import score_needles

        try:
            score_needles(
                _loaded(self.model, "auto" if self.gpus > 1 else ""),
                tasks=[self.task],
                lengths=[self.length],
                pairs=self.pairs,
                split=SPLIT,
                image_ratio=self.image_ratio,
                null_images=self.null_images,
                folder=self.folder,
                progress=False,
                source=data_root.haystacks(self.data),
            )
        except Exception as error:
            return first_line(error)
        return ""


def first_line(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


_held: dict[str, VLM] = {}


def _loaded(model: str, device: str) -> VLM:
    """The model; the one before it is let go first, so that two are never in memory."""
    import transformers

    from mmheads.models import load

    if model not in _held:
        _held.clear()
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        _held[model] = load(model, device=device)
    return _held[model]


def score_runs(parameters: Mapping[str, Any]) -> list[ScoreRun]:
    """The score runs that a notebook with these parameters needs; none if it scores no needles."""
    pairs = parameters.get("detection_pairs", parameters.get("pairs"))
    if not {"model", "lengths", "scores_folder"} <= parameters.keys() or pairs is None:
        return []
    one = {
        "pairs": pairs,
        "null_images": parameters.get("null_images", "pixels"),
        "folder": parameters["scores_folder"],
    }
    model, data = parameters["model"], parameters.get("data", "")
    runs = [
        ScoreRun(model=model, task=task, length=length, data=data, **one)
        for task in needles.TASKS
        for length in parameters["lengths"]
    ]
    if "image_shares" in parameters:
        one |= {"task": "text", "length": parameters["share_length"]}
        shares = parameters["image_shares"]
        runs += [ScoreRun(model=model, image_ratio=share, **one) for share in shares]
        if predecessor := parameters.get("predecessor"):
            runs.append(ScoreRun(model=predecessor, image_ratio=0.0, **one))
    return runs


@cache
def _opened(data: str) -> Any:
    """Published needles, whose files are opened, and gone through to count them, once."""
    return data_root.haystacks(data)


def check_pairs(parameters: Mapping[str, Any]) -> None:
    """Raise UsageError if published needles have fewer pairs than a notebook will ask for."""
    data = parameters.get("data", "")
    if not data or not score_runs(parameters):
        return
    source = _opened(data)
    wanted = [
        ("detection", length, parameters.get("detection_pairs", parameters.get("pairs")))
        for length in parameters["lengths"]
    ]
    if "prompts" in parameters:
        each = math.ceil(parameters["prompts"] / len(source.depths))
        wanted.append(("test", parameters["length"], each))
    if "fractions" in parameters and "prompts" in parameters:  # notebook 05: maps, held-out prompts
        wanted.append(("heldout", parameters["length"], each))
        wanted += [("test", length, parameters["pairs"]) for length in parameters["lengths"]]
    for (split, length, pairs), task in product(wanted, needles.TASKS):
        there = source.count(task, length, split)
        if there < pairs:
            raise UsageError(
                f"{data} has {there} pairs of the task {task} at {length} tokens in the split "
                f"{split}; {pairs} are asked for: lower pairs, detection_pairs or prompts"
            )


def merged(runs: Iterable[ScoreRun]) -> list[ScoreRun]:
    """Each score run once, with the most pairs that any notebook asks for; models together."""
    most: dict[ScoreRun, int] = {}
    for run in runs:
        condition = replace(run, pairs=0)
        most[condition] = max(run.pairs, most.get(condition, 0))
    models = list(dict.fromkeys(run.model for run in most))
    found = [replace(condition, pairs=pairs) for condition, pairs in most.items()]
    return sorted(found, key=lambda run: models.index(run.model))


def answers(parameters: Mapping[str, Any]) -> Counter[int]:
    """Answers that notebook 05 gives at most, by context length: prompts x maskings.

    A prompt's answer with the whole model counts once. Sets of heads that happen to be equal are
    answered once too, which is not known before.
    """
    tasks, lengths = len(needles.TASKS), parameters["lengths"]
    prompts, draws = parameters["prompts"], parameters["draws"]
    shares = len(parameters["fractions"])
    all_kinds = sum(share >= parameters["all_controls"] for share in parameters["fractions"])
    at_length = tasks * (1 + shares)  # held-out prompts: the share is fixed
    at_length += tasks * (1 + shares * (2 + draws) + all_kinds * 2 * draws)  # Fig. 6 of paper B
    published = bool(parameters.get("data"))
    at_length += tasks * (7 + draws) + (not published) * 2 * (1 + 8 + draws)  # control rankings
    at_length += tasks * (3 + 3 * shares)  # where and how; sets by cause
    found = Counter({parameters["length"]: prompts * at_length})
    for length in lengths:  # Fig. 1 of paper A
        found[length] += 2 * 3 * len(needles.DEPTHS) * parameters["pairs"]
    for length in (lengths[0], lengths[-1]):  # its Fig. 7
        found[length] += 2 * (prompts // 2) * (1 + len(lengths))
    of_union = 2 + 2 * draws
    if published:  # its Figs. 8 and 9
        asked = len(mmlongbench_docs.SUBSETS) * parameters["long_questions"]
        found[parameters["long_length"]] += asked * of_union
        sets = len(reasoning.BENCHMARKS) * len(reasoning.MODES) + 1
        found[BENCHMARK_TOKENS] += sets * parameters["benchmark_questions"] * of_union
    else:
        found[16 * needles.UNIT_TOKENS] += 2 * prompts * of_union
    return found


def rankings(parameters: Mapping[str, Any]) -> Counter[int]:
    """Passes of notebook 06 over MMDocIR, by tokens: its documents, and windows of its layouts.

    Questions continue from an index and add little. Nothing where the data are not used.
    """
    if not parameters.get("data"):
        return Counter()
    documents, pages, layouts = MMDOCIR
    mean = min(pages // documents, parameters["real_window"])
    window = parameters["layout_window"]
    passes = math.ceil(pages / mean)
    return Counter(
        {mean * PAGE_TOKENS: passes, window * LAYOUT_TOKENS: math.ceil(layouts / window)}
    )


def single_heads(parameters: Mapping[str, Any], heads: int) -> Counter[int]:
    """Passes of notebook 05 with one head ablated, and three a gradient, by context length."""
    prompts = len(needles.TASKS) * parameters["cause_prompts"]
    return Counter({parameters["cause_length"]: prompts * (heads + 1 + 3)})


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row of the printed plan."""

    model: str
    work: str
    length: int
    prompts: int
    scored: int | None = None

    @property
    def done(self) -> str:
        """Whether the result is there already."""
        if self.scored is None:
            return ""
        return {0: "no", self.prompts: "yes"}.get(self.scored, f"{self.scored} prompts")


def lines(
    runs: Iterable[ScoreRun],
    ablations: Iterable[Mapping[str, Any]],
    retrievals: Iterable[Mapping[str, Any]] = (),
) -> list[Line]:
    """The rows of the plan.

    Args:
        runs: Score runs.
        ablations: Parameters of each run of notebook 05.
        retrievals: Parameters of each run of notebook 06.
    """
    found = [
        Line(
            model=run.model,
            work=run.task if run.image_ratio == 0.5 else f"{run.task}, {run.image_ratio:g} images",
            length=run.length,
            prompts=run.prompts,
            scored=run.scored(),
        )
        for run in runs
    ]
    for parameters in ablations:
        model = parameters["model"]
        shape = shape_of(model)
        works = {"answers (05)": answers(parameters)}
        if shape:
            works["single heads (05)"] = single_heads(parameters, shape.layers * shape.heads)
        found += [
            Line(model=model, work=work, length=length, prompts=count)
            for work, counts in works.items()
            for length, count in sorted(counts.items())
        ]
    found += [
        Line(model=parameters["model"], work="MMDocIR (06)", length=length, prompts=count)
        for parameters in retrievals
        for length, count in rankings(parameters).items()
    ]
    return found


def needed(model: str, length: int, gpu: GPU) -> int | None:
    """GPUs that hold a model and a prompt of this length; None if its shape is not known."""
    shape = shape_of(model)
    return math.ceil(shape.memory(length) / (USABLE * gpu.memory)) if shape else None


def describe(
    runs: Sequence[ScoreRun],
    ablations: Sequence[Mapping[str, Any]],
    retrievals: Sequence[Mapping[str, Any]],
    notebooks: Sequence[str],
    gpu: str = "",
) -> str:
    """The plan as text: a table of runs, totals a model, the notebooks, and where numbers are from.

    Args:
        runs: Score runs.
        ablations: Parameters of each run of notebook 05.
        retrievals: Parameters of each run of notebook 06.
        notebooks: Names of all notebooks that run.
        gpu: One of `GPUS`; empty leaves out hours and the number of GPUs.
    """
    import pandas as pd

    fast, slow = speeds()
    chosen = GPUS[gpu] if gpu else None
    rows = []
    for line in lines(runs, ablations, retrievals):
        shape = shape_of(line.model)
        row: dict[str, Any] = {
            "model": name_of(line.model),
            "work": line.work,
            "length": line.length,
            "prompts": line.prompts,
            "tokens": line.prompts * line.length,
            "GB": math.nan if shape is None else shape.memory(line.length) / 1e9,
        }
        if chosen:
            count = needed(line.model, line.length, chosen)
            row |= {"GPUs": "?" if count is None else f"{count}"}
            for name, speed, ratio in (
                ("h fast", fast, max(SCORING)),
                ("h slow", slow, min(SCORING)),
            ):
                each = speed.seconds(shape, line.length, chosen) if shape else math.nan
                plain = 1.0 if line.scored is not None else ratio
                row[name] = line.prompts * each / plain / 3600
        rows.append(row | {"scored": line.done, "left": line.prompts - (line.scored or 0)})
    table = pd.DataFrame(rows)
    parts = [_counts(runs)]
    if rows:
        shown = table.drop(columns="left").to_string(index=False, float_format="{:.1f}".format)
        parts += [shown, _totals(table)]
        if unknown := sorted({name_of(run.model) for run in runs if not shape_of(run.model)}):
            parts.append(f"Neither a folder nor a known model, not estimated: {', '.join(unknown)}")
        parts.append(_sources(fast, slow, gpu))
    return "\n\n".join([*parts, "Notebooks that run:\n" + "\n".join(notebooks)])


def _counts(runs: Sequence[ScoreRun]) -> str:
    """How many prompts are scored, as models x tasks x lengths x prompts where it is a grid."""
    grid = [run for run in runs if run.image_ratio == 0.5]
    others = [run for run in runs if run.image_ratio != 0.5]
    said = []
    if grid:
        sides = [len({getattr(r, side) for r in grid}) for side in ("model", "task", "length")]
        sizes = {run.prompts for run in grid}
        total = f"{sum(run.prompts for run in grid):,} prompts"
        if len(grid) == math.prod(sides) and len(sizes) == 1:
            names = ("model", "task", "length", "prompt")
            factors = zip([*sides, *sizes], names, strict=True)
            product = " x ".join(f"{n} {name}{'s' if n > 1 else ''}" for n, name in factors)
            total = f"{product} = {total}"
        said.append(f"Needles: {total}")
    if others:
        count = f"{len(others)} runs, {sum(run.prompts for run in others):,} prompts"
        said.append(f"Shares of images and predecessors: {count}")
    return "\n".join(said or ["No scores are needed."])


def _totals(table: Any) -> str:
    """Totals a model: prompts, those still to do, tokens, largest memory, GPU hours."""
    rules = {"prompts": "sum", "left": "sum", "tokens": "sum", "GB": "max"}
    if "GPUs" in table:
        for name in ("h fast", "h slow"):
            count = table["GPUs"].where(table["GPUs"] != "?").astype(float)
            table[f"GPU {name}"] = table[name] * count * table["left"] / table["prompts"]
            rules[f"GPU {name}"] = "sum"
    totals = table.groupby("model", sort=False).agg(rules)
    totals = totals.rename(columns={"left": "still to do"})
    return "Totals a model:\n" + str(totals.to_string(float_format="{:,.1f}".format))


def _sources(fast: Speed, slow: Speed, gpu: str) -> str:
    """Where the estimates come from."""
    said = (
        "GB and hours are estimates, not measurements. GB: weights and KV cache in bfloat16 and "
        f"{HIDDEN_STATES} hidden states a token; that fits paper A's logs of {name_of(LOGGED)}, "
        "19 to 20 GB at 8,192 tokens and 47 to 53 GB at 131,072."
    )
    if not gpu:
        return _wrapped(f"{said} Name a GPU for hours: --gpu {' | '.join(GPUS)}.")
    factor = GPUS["H100"].peak / GPUS[TAKEN_FOR].peak
    spread = f"{fast.utilisation:.0%} to {slow.utilisation:.0%}"
    return _wrapped(
        f"{said} Hours on {gpu}, fast and slow: a pass is 2 x parameters x tokens and attention; "
        "paper A's logs (0.08 to 0.15 prompts/s at 8,192 tokens, 0.012 to 0.021 at 131,072, null "
        f"question included) are on a GPU without a name; taken for an {TAKEN_FOR}, they are "
        f"{fast.overhead:.0f} to {slow.overhead:.0f} s a prompt and {spread} of the peak. Were it "
        f"an H100, passes would take {factor:.1f} times as long. An answer is taken for a scored "
        f"prompt divided by {SCORING[0]} to {SCORING[1]}, measured here on two CPU cores. Where "
        "GPUs is more than 1, one does not hold the run: its layers are spread over so many "
        "(device_map auto), which work in turn; GPU hours count them all. Small models are far "
        "faster than this. Not counted: answers of notebook 07, null questions with images in 02, "
        "paper B's data sets, and the tokens of a chain of thought."
    )


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 100, break_on_hyphens=False)


def on_gpus(runs: Iterable[ScoreRun], gpu: str) -> list[ScoreRun]:
    """The runs with the number of GPUs of this name that each needs; of no name, one."""
    if not gpu:
        return list(runs)
    return [replace(run, gpus=needed(run.model, run.length, GPUS[gpu]) or 1) for run in runs]


class Runner(Protocol):
    """Runs units, in any order and some at a time."""

    def __call__(self, units: Sequence[Unit], progress: str = "") -> list[str]:
        """The error of each unit in the order given, empty where it succeeded.

        Args:
            units: The units.
            progress: Title of a progress bar; empty shows none.
        """


@contextmanager
def ray_cluster(address: str, workers: int = 0) -> Iterator[Runner]:
    """A runner that hands each unit to a Ray cluster; a unit whose worker is lost is run again.

    Every machine of the cluster must see the working folder and this package at the same paths.

    Args:
        address: Of the cluster's head, "auto", or "local" to start one here.
        workers: Number of workers of a local cluster, by default one a core.

    Raises:
        UsageError: Ray is not installed, there is no cluster, or a unit needs more GPUs than any
            of its machines has.
    """
    try:
        import ray
    except ImportError as error:
        raise UsageError("--ray needs Ray: pip install 'mmheads[ray]'") from error
    own: dict[str, Any] = {}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        own = {"include_dashboard": False, "object_store_memory": 100 << 20}
        own |= {"num_cpus": workers} if workers else {}
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if host and port.isdigit():  # Ray itself takes minutes to say that nobody answers
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise UsageError(
            f"--ray {address}: no cluster ({first_line(error)}); start one with "
            "`ray start --head`, and set RAY_AUTH_TOKEN as there if it asks for a token"
        ) from error
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    most = int(max(node["Resources"].get("GPU", 0) for node in nodes if node["Alive"]))
    settings: dict[str, Any] = {"num_cpus": 1, "max_retries": RETRIES}
    if most:
        settings["max_calls"] = 1  # else a worker keeps its model on the GPU
    remote: Any = ray.remote(**settings)(_work)

    def runner(units: Sequence[Unit], progress: str = "") -> list[str]:
        for unit in units:
            if most and unit.gpus > most:
                raise UsageError(
                    f"{unit.name} needs {unit.gpus} GPUs on one machine; the largest has {most}"
                )
        errors = [""] * len(units)
        pending = {}
        for at, unit in enumerate(units):
            task = remote.options(name=unit.name, num_gpus=unit.gpus if most else 0)
            pending[task.remote(unit, str(Path.cwd()))] = at
        with tqdm(total=len(units), desc=progress, disable=not progress) as bar:
            while pending:
                (done,), _ = ray.wait(list(pending))
                try:
                    errors[pending[done]] = ray.get(done)
                except ray.exceptions.RayError as error:
                    errors[pending[done]] = first_line(error)
                del pending[done]
                bar.update()
        return errors

    try:
        yield runner
    finally:
        ray.shutdown()


def _work(unit: Unit, folder: str) -> str:
    """What a worker does: the unit, in the folder of the one who asked."""
    os.chdir(folder)
    return unit.run()
