"""Train a tiny model by its recipe, with progress, a log and resume."""

from __future__ import annotations

import copy
import json
import os
import platform
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers
from tqdm import tqdm
from transformers import AutoConfig, Qwen3ForCausalLM, Qwen3VLForConditionalGeneration

from mmheads import paths
from mmheads.zoo import architectures
from mmheads.zoo.architectures import VOCABULARY
from mmheads.zoo.recipes import RECIPES, Recipe, Stage
from mmheads.zoo.samples import KINDS, NO_LABEL, WEIGHTS, batch

MEMORY = 0.93
"""Weight of the past in the running mean of an accuracy."""
LEAST_STEPS = 40
LOG_EVERY = 25
SAVE_EVERY = 250
TinyModel = Qwen3ForCausalLM | Qwen3VLForConditionalGeneration
MODEL_CLASSES: dict[str, Any] = {
    "qwen3": Qwen3ForCausalLM,
    "qwen3_vl": Qwen3VLForConditionalGeneration,
}
_WEIGHTS = torch.tensor(list(WEIGHTS.values()))


@dataclass
class State:
    """What a run needs in order to go on.

    Attributes:
        model: With the weights so far.
        optimizer: Of the present model: growing starts a new one.
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
    log: list[dict[str, object]] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)


def train(
    name: str,
    out: str | Path = "",
    work: str | Path = "",
    threads: int = 2,
    stop_after: str = "",
    shipped: str | Path = "",
) -> Path:
    """Train a model and save it with its processor and log -> the folder of the checkpoint.

    An interrupted run goes on from its last save when started again. Every step draws its
    samples from (seed, stage, step), so that it does not matter where it was interrupted.

    Args:
        name: One of `RECIPES`.
        out: Where the checkpoint goes, default `runs/zoo/<name>/trained`.
        work: Where saves, the log and the model after each stage go, default `runs/zoo/<name>`.
        threads: Threads of PyTorch; another number changes rounding, not the recipe.
        stop_after: Name of a stage to stop after, default the last one.
        shipped: Folder of a checkpoint of this model, to go on from it where its stages end; the
            recipe's next stage must be one that restarts. A run saved in `work` comes first.

    Raises:
        ValueError: There is no such recipe or stage, fewer than one thread, `work` holds another
            run, the model that this one starts from is not there, or `shipped` is no checkpoint
            to go on from.
    """
    if name not in RECIPES:
        raise ValueError(f"no model is named {name!r}; there are {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    names = [stage.name for stage in recipe.stages]
    if stop_after not in ("", *names):
        raise ValueError(f"no stage is named {stop_after!r}; there are {', '.join(names)}")
    if threads < 1:
        raise ValueError(f"threads is {threads}; expected 1 or more")
    folder = Path(work) if work else paths.RUNS / "zoo" / name
    torch.set_num_threads(threads)
    state = _load(name, folder) or (_shipped(name, Path(shipped)) if shipped else _start(recipe))
    last = names.index(stop_after) + 1 if stop_after else len(names)
    while state.stage < last:
        _run_stage(state, name, folder)
    target = Path(out) if out else folder / "trained"
    _export(state, name, target)
    return target


def _run_stage(state: State, name: str, folder: Path) -> None:
    recipe = RECIPES[name]
    stage = recipe.stages[state.stage]
    if state.step == 0 and (stage.grow or stage.rope_theta or stage.widen):
        if not isinstance(state.model, Qwen3ForCausalLM):
            raise TypeError(f"only text models are changed, not {type(state.model).__name__}")
        torch.manual_seed(recipe.seed + 1)
        if stage.grow:
            state.model = architectures.grow(state.model, stage.grow)
        if stage.rope_theta:
            state.model = architectures.stretch(state.model, stage.rope_theta)
        if stage.widen:
            state.model = architectures.widen(state.model)
        state.optimizer = _optimizer(state.model)
    if state.step == 0 and stage.restart:
        rounded: Any = state.model
        rounded.half().float()
        state.optimizer = _optimizer(state.model)
    seed = (recipe.seed, state.stage)
    shares = np.array([source.share for source in stage.sources])
    shares = shares / shares.sum()
    before, begin = state.seconds, time.monotonic()
    with tqdm(total=stage.steps, initial=state.step, desc=stage.name, leave=False) as progress:
        while state.step < stage.steps and not _reached(stage, state):
            rng = np.random.default_rng((*seed, state.step))
            source = stage.sources[rng.choice(len(shares), p=shares)]
            inputs, labels, kinds = batch([source.sampler(rng) for _ in range(source.batch)], rng)
            rest, norms = state.optimizer.param_groups
            rest["lr"] = _rate(stage, state.step)
            norms["lr"] = rest["lr"] * stage.norm_rate
            loss, right = _loss(state.model, inputs, labels, kinds)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)
            state.optimizer.step()
            state.optimizer.zero_grad()
            state.step += 1
            state.steps += 1
            for kind, share in right.items():
                state.means[kind] = MEMORY * state.means.get(kind, 0.0) + (1 - MEMORY) * share
            state.seconds = before + time.monotonic() - begin
            progress.update()
            progress.set_postfix({kind: f"{state.means.get(kind, 0):.2f}" for kind in stage.goals})
            if state.step % LOG_EVERY == 0 or state.step == stage.steps or _reached(stage, state):
                _log(state, stage, folder, loss.item(), labels.shape[1])
            if state.step % SAVE_EVERY == 0:
                _save(state, name, folder)
    for kind, goal in stage.goals.items():
        if (mean := state.means.get(kind, 0.0)) < goal:
            state.missed.append(f"{stage.name}: {kind} {mean:.2f}, wanted {goal}")
            print(f"stage over after {state.step} steps; {state.missed[-1]}")
    state.stage, state.step, state.means = state.stage + 1, 0, {}
    _save(state, name, folder)
    state.model.save_pretrained(folder / f"stage-{state.stage}")


def _loss(
    model: TinyModel,
    inputs: dict[str, torch.Tensor],
    labels: torch.Tensor,
    kinds: torch.Tensor,
) -> tuple[torch.Tensor, dict[str, float]]:
    """Weighted cross entropy of the labelled tokens, and the accuracy by kind of label."""
    labelled = labels != NO_LABEL
    hidden = model.model(**inputs, use_cache=False).last_hidden_state[labelled]
    logits, labels, kinds = model.lm_head(hidden), labels[labelled], kinds[labelled]
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    weights = _WEIGHTS[kinds]
    right = (logits.detach().argmax(-1) == labels).float()
    shares = {KINDS[k]: right[kinds == k].mean().item() for k in kinds.unique().tolist()}
    return (losses * weights).sum() / weights.sum(), shares


def _rate(stage: Stage, step: int) -> float:
    warm = min(1.0, (step + 1) / stage.warm_up)
    return stage.rate * warm * (1 - step / stage.steps if stage.decay else 1.0)


def _reached(stage: Stage, state: State) -> bool:
    return (
        bool(stage.goals)
        and state.step >= LEAST_STEPS
        and all(state.means.get(kind, 0.0) >= goal for kind, goal in stage.goals.items())
    )


def _optimizer(model: TinyModel) -> torch.optim.Optimizer:
    """One group for the norms of queries and keys, after one for all the rest."""
    named = list(model.named_parameters())
    norms = [p for name, p in named if name.endswith(("q_norm.weight", "k_norm.weight"))]
    rest = [p for name, p in named if not name.endswith(("q_norm.weight", "k_norm.weight"))]
    return torch.optim.AdamW(
        [{"params": rest}, {"params": norms}], lr=0.0, betas=(0.9, 0.98), weight_decay=0.01
    )


def _start(recipe: Recipe) -> State:
    torch.manual_seed(recipe.seed)
    if recipe.start:
        source = paths.MODELS / recipe.start
        if not (source / "config.json").exists():
            raise ValueError(
                f"{source} does not exist, and training starts from it; make it with "
                f"python -m mmheads.zoo train {recipe.start} --out {source}"
            )
        text = Qwen3ForCausalLM.from_pretrained(source, dtype=torch.float32)
        model: TinyModel = architectures.adapt(text)
    else:
        model = architectures.qwen3(recipe.layers)
    return State(model, _optimizer(model))


def _shipped(name: str, folder: Path) -> State:
    recipe = RECIPES[name]
    if not (folder / "training.json").exists():
        raise ValueError(f"{folder} holds no training.json; expected data/models/{name}")
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
    config = AutoConfig.from_pretrained(folder)
    classes = MODEL_CLASSES[config.model_type]
    model = classes(config).float()
    model.load_state_dict(classes.from_pretrained(folder, dtype=torch.float32).state_dict())
    log = pd.read_csv(folder / "training.csv", dtype=str, keep_default_na=False)
    return State(
        model,
        _optimizer(model),
        stage=len(done),
        steps=facts["steps"],
        seconds=60 * facts["minutes"],
        log=[{str(k): v for k, v in row.items()} for row in log.to_dict("records")],
        missed=facts["missed"],
    )


def _export(state: State, name: str, target: Path) -> None:
    """Write weights in 16 bits, processor, log and how they came about."""
    recipe = RECIPES[name]
    target.mkdir(parents=True, exist_ok=True)
    half: Any = copy.deepcopy(state.model)
    half.half()
    half.generation_config.eos_token_id = VOCABULARY["<eos>"]
    half.generation_config.pad_token_id = VOCABULARY["<pad>"]
    half.save_pretrained(target)
    architectures.save_processor(half, target)
    _write_log(state, target)
    facts = {
        "name": name,
        "seed": recipe.seed,
        "start": recipe.start,
        "stages": [stage.name for stage in recipe.stages[: state.stage]],
        "missed": state.missed,
        "steps": state.steps,
        "minutes": round(state.seconds / 60, 1),
        "threads": torch.get_num_threads(),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
    }
    with paths.write_whole(target / "training.json") as path:
        path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8", newline="\n")


def _run(name: str, stage: int) -> dict[str, object]:
    """What a save must agree with, for the run to go on."""
    recipe = RECIPES[name]
    return {
        "model": name,
        "seed": recipe.seed,
        "stages": [stage.name for stage in recipe.stages[:stage]],
    }


def _save(state: State, name: str, folder: Path) -> None:
    values = {f.name: getattr(state, f.name) for f in fields(State)}
    values |= {
        "config": state.model.config.to_dict(),
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "run": _run(name, state.stage),
    }
    with paths.write_whole(folder / "state.pt") as path:
        torch.save(values, path)


def _load(name: str, folder: Path) -> State | None:
    path = folder / "state.pt"
    if not path.exists():
        return None
    try:
        saved: dict[str, Any] = torch.load(path, weights_only=True)  # never runs code from a file
    except Exception as error:  # a damaged file makes the unpickler fail in many ways
        raise ValueError(
            f"{path} is damaged, or holds more than tensors and numbers; delete it, or name "
            "another --work folder"
        ) from error
    if not isinstance(saved, dict) or not saved.keys() >= {"run", "stage", "config", "model"}:
        raise ValueError(f"{path} does not hold a run; name another --work folder")
    held, wanted = saved.pop("run"), _run(name, saved["stage"])
    if held != wanted:
        raise ValueError(f"{path} holds the run {held}, not {wanted}; name another --work folder")
    settings = saved.pop("config")
    kind = MODEL_CLASSES[settings["model_type"]]
    model = kind(kind.config_class.from_dict(settings))
    model.load_state_dict(saved.pop("model"))
    optimizer = _optimizer(model)
    optimizer.load_state_dict(saved.pop("optimizer"))
    return State(model=model, optimizer=optimizer, **saved)


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
