"""Train a tiny model by its recipe, with progress, a log and resume."""

from __future__ import annotations

import copy
import json
import os
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers
from tqdm import tqdm
from transformers import AutoConfig

from mmheads import paths
from tiny_models import architectures, windows
from tiny_models.architectures import TinyModel
from tiny_models.losses import loss_and_accuracy
from tiny_models.processors import VOCABULARY, save_processor
from tiny_models.recipes import RECIPES, Recipe, Stage
from tiny_models.samples import KINDS, Batch, batch

CHECKPOINTS = paths.MODELS
"""Where the weights of models are after the last stage that is done."""
MEMORY = 0.93
"""Weight of the past in the running mean of an accuracy."""
LEAST_STEPS = 40
LOG_EVERY = 25
SAVE_EVERY = 40
SAVE_SECONDS = 300
"""A run is saved every so many steps, and when so many seconds have passed."""


@dataclass
class State:
    """What a run needs in order to go on.

    Attributes:
        model: The model with the weights so far.
        optimizer: The optimizer of the present stage.
        stage: Index of the present stage.
        step: Steps done in it.
        steps: Steps done in all.
        seconds: Time spent on them.
        means: Running mean of the accuracy by kind of label, in this stage.
        log: The rows of `training.csv`.
        missed: Goals that a stage had not reached when its steps were over.
    """

    model: TinyModel
    optimizer: torch.optim.Optimizer
    stage: int = 0
    step: int = 0
    steps: int = 0
    seconds: float = 0.0
    means: dict[str, float] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)


def train(
    name: str,
    out: str | Path = "",
    work: str | Path = "",
    threads: int = 2,
    stop_after: str = "",
    go_on_from: str | Path = "",
) -> Path:
    """Train a model, save it after every stage, and return the folder of its checkpoint.

    An interrupted run goes on from its last save when it is started again. Every step draws its
    samples from (seed, stage, step), so that it does not matter where it was interrupted.

    Args:
        name: One of `RECIPES`.
        out: Where the checkpoint goes, by default `data/models/<name>`.
        work: Where saves and the log go, by default `runs/tiny_models/<name>`.
        threads: Threads of PyTorch; another number changes rounding, not the recipe.
        stop_after: Name of a stage to stop after, by default the last one.
        go_on_from: Folder of a checkpoint of this model, to go on from where its stages end; the
            recipe's next stage must be one that restarts. A run saved in `work` comes first.

    Raises:
        ValueError: There is no such recipe or stage, `threads` is less than 1, `work` holds
            another run, the model that this one starts from does not exist, `go_on_from` is not
            a checkpoint to go on from, or `out` holds a model that this code did not train.
    """
    if name not in RECIPES:
        raise ValueError(f"no model is named {name!r}; expected one of {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    names = [stage.name for stage in recipe.stages]
    if stop_after not in ("", *names):
        raise ValueError(f"no stage is named {stop_after!r}; expected one of {', '.join(names)}")
    if threads < 1:
        raise ValueError(f"threads is {threads}; expected 1 or more")
    folder = Path(work) if work else paths.RUNS / "tiny_models" / name
    target = Path(out) if out else CHECKPOINTS / name
    if (target / "config.json").exists():
        training_facts(target)
    torch.set_num_threads(threads)
    state = _load(name, folder)
    if state is None:
        state = _from_checkpoint(name, Path(go_on_from)) if go_on_from else _start(recipe)
    last = names.index(stop_after) + 1 if stop_after else len(names)
    while state.stage < last:
        _run_stage(state, name, folder)
        _export(state, name, target)
    return target


def training_facts(folder: Path) -> dict[str, Any]:
    """What `training.json` says about a checkpoint that `train` wrote.

    The stages that are left are those of the recipe as it is now.

    Raises:
        ValueError: This code did not train it.
    """
    path = folder / "training.json"
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    recipe = RECIPES.get(facts.get("name", ""))
    names = [stage.name for stage in recipe.stages] if recipe else []
    done = facts.get("stages", [])
    if not done or names[: len(done)] != done or "left" not in facts:
        raise ValueError(
            f"{folder} holds a model that python -m tiny_models train did not make, or none; "
            "nothing was written there"
        )
    return facts | {"left": names[len(done) :]}


def _run_stage(state: State, name: str, folder: Path) -> None:
    recipe = RECIPES[name]
    stage = recipe.stages[state.stage]
    if state.step == 0:
        _begin(state, stage, recipe.seed)
    if recipe.family == "gemma3":
        windows.use(state.model)
    shares = np.array([source.share for source in stage.sources])
    shares = shares / shares.sum()
    before, begin = state.seconds, time.monotonic()
    saved = begin
    with tqdm(total=stage.steps, initial=state.step, desc=stage.name, leave=False) as progress:
        while state.step < stage.steps and not _reached(stage, state):
            rng = np.random.default_rng((recipe.seed, state.stage, state.step))
            source = stage.sources[rng.choice(len(shares), p=shares)]
            samples = [source.sampler(rng) for _ in range(source.batch)]
            shown = batch(samples, rng, source.show, recipe.family)
            loss, tokens = _step(state, stage, shown)
            state.seconds = before + time.monotonic() - begin
            progress.update()
            if state.step % LOG_EVERY == 0 or state.step == stage.steps or _reached(stage, state):
                _log(state, stage, folder, loss, tokens)
            if state.step % SAVE_EVERY == 0 or time.monotonic() - saved > SAVE_SECONDS:
                _save(state, name, folder)
                saved = time.monotonic()
    for kind, goal in stage.goals.items():
        if (mean := state.means.get(kind, 0.0)) < goal:
            state.missed.append(f"{stage.name}: {kind} {mean:.2f} of {goal}")
    state.stage, state.step, state.means = state.stage + 1, 0, {}
    _save(state, name, folder)


def _begin(state: State, stage: Stage, seed: int) -> None:
    """Change the model as a stage begins, and give it a new optimizer where it must have one."""
    changes = stage.grow or stage.rope_theta or stage.widen or stage.icons_like_codes
    if changes and not isinstance(state.model, architectures.TextModel):
        raise TypeError(f"only text models are changed, not {type(state.model).__name__}")
    if stage.restart:
        with torch.no_grad():
            for weight in state.model.parameters():
                weight.copy_(weight.half())  # only weights: buffers such as frequencies stay exact
    torch.manual_seed(seed + 1)
    model: Any = state.model
    if stage.grow:
        model = architectures.grow(model, stage.grow)
    if stage.rope_theta:
        model = architectures.stretch(model, stage.rope_theta, stage.window)
    if stage.widen:
        model = architectures.widen(model)
    if stage.icons_like_codes:
        architectures.icons_like_codes(model)
    if changes or stage.restart:
        state.model, state.optimizer = model, _optimizer(model, stage)


def _step(state: State, stage: Stage, samples: Batch) -> tuple[float, int]:
    """Take one step of the optimizer; the loss, and the length of the samples in tokens."""
    for group in state.optimizer.param_groups:
        group["lr"] = _rate(stage, state.step) * group["factor"]
    loss, right = loss_and_accuracy(state.model, samples, align=stage.trains == "vision")
    loss.backward()
    trained = [p for group in state.optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    state.optimizer.step()
    state.model.zero_grad()
    state.step += 1
    state.steps += 1
    for kind, share in right.items():
        state.means[kind] = MEMORY * state.means.get(kind, 0.0) + (1 - MEMORY) * share
    return loss.item(), samples.words.shape[1]


def _rate(stage: Stage, step: int) -> float:
    warm = min(1.0, (step + 1) / stage.warm_up)
    return stage.rate * warm * (1 - step / stage.steps if stage.decay else 1.0)


def _reached(stage: Stage, state: State) -> bool:
    return (
        bool(stage.goals)
        and state.step >= LEAST_STEPS
        and all(state.means.get(kind, 0.0) >= goal for kind, goal in stage.goals.items())
    )


def _optimizer(model: TinyModel, stage: Stage) -> torch.optim.Optimizer:
    """Weights that are trained, in groups with a factor on the learning rate.

    The norms of queries and keys come after the others, and the vision tower last.
    """
    norms = ("q_norm.weight", "k_norm.weight")
    rest: dict[str, Any] = {"params": [], "factor": 1.0}
    sharp: dict[str, Any] = {"params": [], "factor": stage.norm_rate}
    sees: dict[str, Any] = {"params": [], "factor": stage.vision_rate}
    for name, weight in model.named_parameters():
        vision = architectures.is_vision(name)
        if vision and stage.trains != "language":
            (rest if stage.trains == "vision" else sees)["params"].append(weight)
        elif not vision and stage.trains != "vision":
            (sharp if name.endswith(norms) else rest)["params"].append(weight)
    return torch.optim.AdamW([rest, sharp, sees], lr=0.0, betas=(0.9, 0.98), weight_decay=0.01)


def _start(recipe: Recipe) -> State:
    torch.manual_seed(recipe.seed)
    if recipe.start:
        source = CHECKPOINTS / recipe.start
        if not (source / "config.json").exists():
            raise ValueError(
                f"{source} does not exist, and training starts from it; make it with "
                f"python -m tiny_models train {recipe.start}"
            )
        model: TinyModel = architectures.adapt(_loaded(source), recipe.family)
    else:
        build = architectures.gemma3 if recipe.family == "gemma3" else architectures.qwen3
        model = build(recipe.layers, recipe.heads, recipe.kv_heads, recipe.width)
    return State(model, _optimizer(model, recipe.stages[0]))


def _loaded(folder: Path) -> Any:
    """The model of a checkpoint, in 32 bits."""
    model_class = architectures.MODEL_CLASSES[AutoConfig.from_pretrained(folder).model_type]
    return model_class.from_pretrained(folder, dtype=torch.float32)


def _from_checkpoint(name: str, folder: Path) -> State:
    recipe = RECIPES[name]
    if not (folder / "training.json").exists():
        raise ValueError(f"{folder} holds no training.json; expected a checkpoint of {name}")
    facts = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    names, done = [stage.name for stage in recipe.stages], facts["stages"]
    goes_on = (
        (facts["name"], facts["seed"]) == (name, recipe.seed)
        and names[: len(done)] == done
        and len(done) < len(names)
        and recipe.stages[len(done)].restart
    )
    if not goes_on:
        raise ValueError(
            f"{folder} holds {facts['name']}, seed {facts['seed']}, after the stages {done}; "
            f"expected {name}, seed {recipe.seed}, before a stage that restarts, of {names}"
        )
    model = _loaded(folder)
    log = pd.read_csv(folder / "training.csv", dtype=str, keep_default_na=False)
    return State(
        model.train(),
        _optimizer(model, recipe.stages[len(done)]),
        stage=len(done),
        steps=facts["steps"],
        seconds=60 * facts["minutes"],
        log=[{str(k): v for k, v in row.items()} for row in log.to_dict("records")],
        missed=facts["missed"],
    )


def _export(state: State, name: str, target: Path) -> None:
    """Write 16-bit weights, processor and log, and how they were made."""
    recipe = RECIPES[name]
    target.mkdir(parents=True, exist_ok=True)
    half: Any = copy.deepcopy(state.model)
    half.half()
    for config in (half.config, *(getattr(half.config, key) for key in half.config.sub_configs)):
        config.dtype = None  # loaded weights leave theirs there, 32 bits
    half.generation_config.eos_token_id = VOCABULARY["<eos>"]
    half.generation_config.pad_token_id = VOCABULARY["<pad>"]
    half.save_pretrained(target)
    save_processor(half, target)
    _write_log(state, target)
    done = [stage.name for stage in recipe.stages[: state.stage]]
    facts = {
        "name": name,
        "seed": recipe.seed,
        "start": recipe.start,
        "stages": done,
        "left": [stage.name for stage in recipe.stages[state.stage :]],
        "missed": state.missed,
        "steps": state.steps,
        "minutes": round(state.seconds / 60, 1),
        "command": f"python -m tiny_models train {name}",
        "threads": torch.get_num_threads(),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
    }
    with paths.write_whole(target / "training.json") as path:
        path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _run(name: str, stage: int) -> dict[str, Any]:
    """What a save must agree with, for the run to go on."""
    recipe = RECIPES[name]
    names = [stage.name for stage in recipe.stages[:stage]]
    return {"model": name, "seed": recipe.seed, "stages": names}


_KEPT = ("stage", "step", "steps", "seconds", "means", "log", "missed")


def _save(state: State, name: str, folder: Path) -> None:
    values = {key: getattr(state, key) for key in _KEPT}
    values |= {
        "config": json.dumps(state.model.config.to_dict(), default=str),
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "run": _run(name, state.stage),
    }
    with paths.write_whole(folder / "state.pt") as path:
        torch.save(values, path)


def _load(name: str, folder: Path) -> State | None:
    """The state saved in a folder, read as data only: a save cannot run code."""
    path = folder / "state.pt"
    if not path.exists():
        return None
    saved: dict[str, Any] = torch.load(path, weights_only=True)
    kept, expected = saved["run"], _run(name, saved["stage"])
    if kept != expected:
        raise ValueError(
            f"{path} holds the run {kept}, not {expected}; name another folder with --work"
        )
    config = json.loads(saved["config"])
    model_class = architectures.MODEL_CLASSES[config["model_type"]]
    model = model_class(model_class.config_class.from_dict(config))
    model.load_state_dict(saved["model"])
    stages = RECIPES[name].stages
    before = stages[max(0, saved["stage"] - (saved["step"] == 0))]
    optimizer = _optimizer(model, before)
    optimizer.load_state_dict(saved["optimizer"])
    return State(model=model, optimizer=optimizer, **{key: saved[key] for key in _KEPT})


def _log(state: State, stage: Stage, folder: Path, loss: float, length: int) -> None:
    state.log.append(
        {
            "stage": stage.name,
            "step": state.step,
            "seconds": round(state.seconds),
            "loss": f"{loss:.3f}",
            "tokens": length,
            **{kind: f"{mean:.3f}" for kind, mean in state.means.items()},
        }
    )
    _write_log(state, folder)


def _write_log(state: State, folder: Path) -> None:
    columns = ["stage", "step", "seconds", "loss", "tokens", *KINDS]
    with paths.write_whole(folder / "training.csv") as path:
        pd.DataFrame(state.log, columns=columns).to_csv(path, index=False)
