"""Answer your examples without some heads, and without as many random heads.

Answers without the heads are compared with those of the full model in pairs, by an exact test, and
the selected heads are ranked among the random sets. The command says beforehand how long this
takes, and goes on where it was interrupted.

Examples:
    mmheads ablate tiny-qwen3-vl-m tiny-qwen3-vl-m examples.jsonl --draws 50
    mmheads ablate my-model runs/detect/my-model-natural-corpus-0.5.json examples.jsonl --json
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from mmheads import commands, paths
from mmheads.commands import Outcome

METRICS = ("same", "token_f1", "document_answer")
"""Rules of `mmheads.metrics`."""

SELECTED, RANDOM = "selected", "random"


def add(subparsers: Any) -> None:
    """Add the command."""
    parser = commands.add(subparsers, "ablate", run, __doc__)
    commands.add_model(parser)
    parser.add_argument("heads", help=commands.HEADS)
    commands.add_examples(parser)
    commands.add_out(parser, "write all answers to this .csv file")
    commands.add_number(parser, "--draws", 200, "number of random sets of heads", low=2)
    match = "random sets have as many heads per layer or KV group as the selected heads, or any"
    commands.add_choice(parser, "--match", ("layer", "kv_group", "none"), match)
    mode = "what an ablated head gives: nothing, or the mean of all that it may attend to"
    commands.add_choice(parser, "--mode", ("zero", "uniform"), mode)
    when = "when heads are ablated: as the prompt is read, as the answer is written, both, or only "
    when += "at the positions that predict the answer"
    commands.add_choice(parser, "--when", ("both", "prefill", "decode", "answer"), when)
    metric = "how an answer is compared with yours: the same but for white space at the ends, F1 "
    metric += "of the words, or the rule of MMLongBench-Doc"
    commands.add_choice(parser, "--metric", METRICS, metric)
    commands.add_number(parser, "--max-new-tokens", 32, "longest answer, in tokens")
    commands.add_fraction(parser, "to take from a score file")
    commands.add_number(parser, "--seed", 0, "seed of the random sets", low=0)


def run(options: argparse.Namespace) -> Outcome:
    """Answer the examples, compare, and write the table of answers."""
    from mmheads import metrics
    from mmheads.answers import answer
    from mmheads.attention import check_heads
    from mmheads.controls import random_controls
    from mmheads.effects import against_random, effects
    from mmheads.example_files import read_examples
    from mmheads.models import load

    examples = read_examples(options.examples)
    for line, has_answer in zip(examples.lines, examples.has_answer, strict=True):
        if not has_answer:
            raise ValueError(f"{examples.path}, line {line}: the example has no answer to compare")
    if len(examples) < 2:
        raise ValueError(f"{examples.path} holds one example; expected at least 2 to compare")
    heads = commands.read_heads(options.heads, options.fraction)
    if options.out:
        paths.writable_file(Path(options.out))
    vlm = load(options.model, device=options.device)
    check_heads(vlm, [heads], "ablated")
    controls = random_controls(
        heads,
        vlm.geometry.eligible,
        draws=options.draws,
        seed=options.seed,
        match="" if options.match == "none" else options.match,
        disjoint=False,
    )
    settings: dict[str, Any] = {
        "mode": options.mode,
        "when": options.when,
        "max_new_tokens": options.max_new_tokens,
        "metric": getattr(metrics, options.metric),
    }
    for _ in range(2):  # the first one warms up
        start = time.perf_counter()
        answer(vlm, examples[:1], {SELECTED: heads}, folder=None, progress=False, **settings)
    each = (time.perf_counter() - start) / 2
    count = len(examples) * (options.draws + 2)
    commands.note(
        f"{len(heads)} heads of {vlm} and {options.draws} random sets matched by {options.match}: "
        f"{count} answers take at most about {commands.duration(each * count)}; fewer --draws take "
        "less, and after an interrupt the same command goes on"
    )
    table = answer(vlm, examples, {SELECTED: heads, RANDOM: controls}, **settings)
    if options.out:
        with paths.write_whole(Path(options.out)) as path:
            table.to_csv(path, index=False)
    effect = effects(table.assign(examples="all"), ("examples",), seed=options.seed)
    among = against_random(table, SELECTED, RANDOM)
    (p,) = effect.loc[effect["ablation"] == SELECTED, "p"].astype(float)
    data = {
        "model": vlm.model_id,
        "revision": vlm.revision,
        "heads": commands.listed(heads),
        "effects": commands.records(effect.drop(columns="examples")),
        "p_exact": p,
        "among_random": among._asdict(),
        "file": options.out,
    }
    lines = []
    for row in effect.to_dict("records"):
        change = ""
        if row["ablation"] == SELECTED:
            change = f", change {100 * row['change']:+.1f} points, exact p = {p:.3g}"
        lines.append(
            f"{row['ablation']}: {row['score']:.1%} [{row['low']:.1%}, {row['high']:.1%}]{change}, "
            f"{row['heads']} heads ablated, n = {row['n']}"
        )
    lines.append(
        f"{among.as_low} of {among.draws} random sets are as low as the selected heads or lower: "
        f"p = {among.p:.3g}"
    )
    return Outcome(data, lines + [options.out] * bool(options.out))
