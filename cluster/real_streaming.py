"""Answers and times of a pretrained text model whose strongest heads alone see the whole prompt.

python -m cluster.real_streaming [MODEL.gguf] [--only STEP ...]

The prompts, heads and random sets are those of `cluster.real_model`. All other heads see only the
first tokens and a window, in prefill and in decoding. Steps, in this order:

- top: the strongest heads are dense.
- random: for each prompt whose needle is outside the window, another random set is dense.
- times: CPU time of a prefill of random tokens at the same setting.

Answers are kept in `runs` and shipped by `python -m cluster.ship`; what is interrupted goes on from
there. Times are written to `data/results/real_times.csv`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import pandas as pd
import torch

from benchmarks.streaming import STOCK, arithmetic_limit
from benchmarks.timing import conditions, summary
from cluster import real_model as plan
from mmheads import answers, paths, store
from mmheads.examples import Example
from mmheads.scores import HeadScores
from mmheads.streaming import stream
from mmheads.tasks import natural_needles

if TYPE_CHECKING:
    from mmheads.models import VLM

SINKS, WINDOW = 4, 60
"""First and last tokens that all other heads see: an eighth of a prompt, as in notebook 07."""
SHARES = plan.IN_DETAIL
"""Shares of heads that are dense."""
LENGTHS = (512, 2048)
"""Tokens of the prompts whose prefill is timed."""
REPEATS = 2
PROMPTS = 24
"""The first of the prompts are asked."""
TIMES = store.SHIPPED / "real_times.csv"


def answered(
    vlm: VLM,
    examples: Iterable[Example],
    dense: answers.Ablations,
    *,
    folder: str | None = "",
) -> pd.DataFrame:
    """Returns the answers of the whole model, and with these heads dense."""
    return answers.answer_streaming(
        vlm,
        examples,
        dense,
        sinks=SINKS,
        window=WINDOW,
        max_new_tokens=plan.NEW_TOKENS,
        metric=natural_needles.score,
        folder=folder,
        progress=False,
    )


@torch.no_grad()
def timed(vlm: VLM, scores: HeadScores, lengths: Sequence[int] = LENGTHS) -> pd.DataFrame:
    """Returns the CPU seconds of a prefill by length and dense heads; the variants take turns.

    CPU time of one thread is less disturbed than wall-clock time on a machine with other work. The
    column `limit` is the speed-up that the number of operations allows.
    """
    sets = {STOCK: None} | {plan.top_name(share): scores.top(share) for share in SHARES}
    rows = []
    for length in lengths:
        generator = torch.Generator().manual_seed(length)
        ids = torch.randint(vlm.text_config.vocab_size, (1, length), generator=generator)
        seconds: dict[str, list[float]] = {name: [] for name in sets}
        for _ in range(REPEATS):
            for name, dense in sets.items():
                with nullcontext() if dense is None else stream(vlm, dense, SINKS, WINDOW):
                    start = time.process_time()
                    vlm.model(input_ids=ids, use_cache=True, logits_to_keep=1)
                    seconds[name].append(time.process_time() - start)
        table = summary(seconds)
        table.insert(0, "tokens", length)
        table["speed_up"] = table["seconds"].iloc[0] / table["seconds"]
        shares = [
            1.0 if dense is None else len(dense) / dense.geometry.size for dense in sets.values()
        ]
        table["dense_heads"] = shares
        table["limit"] = [arithmetic_limit(vlm, length, share, SINKS, WINDOW) for share in shares]
        plan.say(f"\n{table}")
        rows.append(table)
    settings = conditions(vlm, REPEATS, sinks=SINKS, window=WINDOW)
    return pd.concat(rows, ignore_index=True).assign(**settings)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    from mmheads.models import load

    steps = ("top", "random", "times")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=steps, default=steps, metavar="STEP")
    options = plan.parsed(parser, arguments)
    try:
        vlm = load(options.model)
        scores, examples = plan.searched(vlm), plan.prompts(vlm)[:PROMPTS]
        if "top" in options.only:
            sets = {plan.top_name(share): scores.top(share) for share in SHARES}
            for first in range(0, len(examples), 6):
                plan.say_right(answered(vlm, examples[first : first + 6], sets))
        if "random" in options.only:
            drawn = {share: plan.random_sets(scores.top(share)) for share in SHARES}
            for number, example in enumerate(examples):
                if example.depth == 1:  # the needle is inside the window
                    continue
                sets = {plan.random_name(share): drawn[share][number] for share in SHARES}
                plan.say_right(answered(vlm, [example], sets))
        if "times" in options.only:
            table = timed(vlm, scores)
            with paths.write_whole(TIMES) as path:
                table.to_csv(path, index=False, lineterminator="\n")
    except (ValueError, OSError) as error:
        print(f"cluster.real_streaming: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
