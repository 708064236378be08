"""Run a pretrained text model: find its heads, then take them out of it.

python -m cluster.real_model [MODEL.gguf] [--only STEP ...]

Needles in natural language are hidden in the shipped corpus. Steps, in this order:

- grid: scores of needles in more haystacks, and at one more length, than the search uses.
- heads: the head list, found as `mmheads detect` finds it, in `data/heads`.
- ablation: test prompts, answered by the whole model and without the strongest heads.
- again: the search for heads repeated with other needles and haystacks.
- random: the same prompts without random heads of the same layers.
- bands: the same prompts without heads of other ranks.
- when: the same prompts with the strongest heads ablated only at some of the tokens.

Results are kept in `runs` prompt by prompt. What is interrupted goes on from there and from what is
shipped; only the step heads scores anew what is not kept. `--prompts 0 24` asks only these prompts,
so that two processes can share the work, each in a copy of the repository. Ship results by
`python -m cluster.ship`.
The tests of the model and its page in the documentation take their prompts and sets from here.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import pandas as pd

from mmheads import answers, paths
from mmheads.controls import random_controls
from mmheads.detection import Detection, Search, detect
from mmheads.examples import Example
from mmheads.heads import HeadSet, head_count
from mmheads.scores import HeadScores
from mmheads.scoring import score_needles
from mmheads.tasks import natural_needles
from mmheads.tasks.grids import Grid

if TYPE_CHECKING:
    from mmheads.models import VLM

TASK = "text"
LENGTHS = (256, 512, 1024)
HAYSTACKS = 4
"""Lengths and haystacks of the prompts that the heads are found on."""
GRID_LENGTHS = (*LENGTHS, 2048)
GRID_HAYSTACKS = 10
"""Those of the scores that are reported; the first haystacks are those of the search."""
SEED_AGAIN = 1
"""Seed of the needles and haystacks with which the search is repeated."""
LENGTH_AGAIN = 512
"""Length of their prompts."""
TEST_LENGTH = 512
PROMPTS = 48
"""Test prompts, each of a haystack of its own; the depths take turns."""
FRACTIONS = (0.01, 0.02, 0.05, 0.1)
MAIN = 0.05
"""The fraction of the head list, and of the comparison that counts."""
IN_DETAIL = (MAIN, 0.1)
"""The fractions of which more is asked: some of the tokens, prose, few dense heads."""
RANDOM_SETS = {0.01: 24, 0.02: 24, MAIN: 200, 0.1: 24}
"""Random sets by the fraction that they are compared with."""
PART = 6
"""Prompts of a part, one at each depth; each random set is asked with one part."""
BANDS = {f"rank {a:.0%} to {b:.0%}": (a, b) for a, b in pairwise((0.05, 0.1, 0.2, 0.5, 1))}
"""Bands of rank below the strongest heads: the shares of the heads between which they lie."""
BOTTOM = f"bottom {MAIN:.0%}"
WHEN = {
    "prefill": "only in the prompt",
    "decode": "only at generated tokens",
    "answer": "only at generated tokens and the one before them",
}
"""Tokens at which the strongest heads are ablated, by the name that `ablate` has for them."""
NEW_TOKENS = 24
BATCH_TOKENS = 10_240
"""Room for all sets of a prompt, which share the layers below their first head."""


def grid(vlm: VLM) -> HeadScores:
    """Returns the scores of the detection needles in all haystacks and at all lengths."""
    return _scored(vlm, natural_needles.for_model(vlm), GRID_LENGTHS, GRID_HAYSTACKS)


def searched(vlm: VLM) -> HeadScores:
    """Returns the scores of the prompts that the heads are found on."""
    return _scored(vlm, natural_needles.for_model(vlm), LENGTHS)


def of_search(scores: HeadScores) -> HeadScores:
    """Returns the part of the scores of `grid` that `searched` returns."""
    of = scores.metadata
    first = of["haystack"].map(lambda text: json.loads(text)[2] < HAYSTACKS)
    return scores.take((first & of["length"].isin(LENGTHS)).to_numpy())


def found(vlm: VLM) -> Detection:
    """Returns the heads that are shipped, with what says so."""
    return _search(vlm, 0, LENGTHS)


def again(vlm: VLM) -> Detection:
    """Returns the heads that a search with other needles and haystacks finds."""
    return _search(vlm, SEED_AGAIN, (LENGTH_AGAIN,))


def _scored(
    vlm: VLM, source: Grid, lengths: Sequence[int], haystacks: int = HAYSTACKS
) -> HeadScores:
    return score_needles(
        vlm, tasks=[TASK], lengths=lengths, haystacks=haystacks, progress=False, source=source
    )


def _search(vlm: VLM, seed: int, lengths: Sequence[int]) -> Detection:
    needles = natural_needles.for_model(vlm, seed=seed)
    _scored(vlm, needles, lengths)  # notes what the scores are of, so that they are read again
    search = Search(needles=needles, tasks=(TASK,), lengths=lengths, haystacks=HAYSTACKS)
    return detect(vlm, search, progress=False)


def prompts(vlm: VLM) -> list[Example]:
    """Returns the prompts of the ablation, which share no needle with those of the detection."""
    needles = natural_needles.for_model(vlm)
    depths = needles.depths
    return [
        needles.make(TASK, TEST_LENGTH, depths[n % len(depths)], haystack=n, split="test")
        for n in range(PROMPTS)
    ]


def selections(scores: HeadScores, fractions: Sequence[float] = FRACTIONS) -> dict[str, HeadSet]:
    """Returns the strongest heads by name."""
    return {top_name(fraction): scores.top(fraction) for fraction in fractions}


def top_name(fraction: float) -> str:
    """Name of the strongest heads."""
    return f"top {fraction:.0%}"


def when_name(name: str, when: str) -> str:
    """Name of heads that are ablated at some of the tokens."""
    return f"{name}, {WHEN[when]}"


def random_name(fraction: float) -> str:
    """Name of random sets of as many heads."""
    return f"random {fraction:.0%}, same layers"


def bands(scores: HeadScores) -> dict[str, HeadSet]:
    """Returns the heads of bands of rank, and the weakest heads, by name."""
    ranked = scores.top(count=int(scores.eligible.sum()))
    sets = {
        name: replace(ranked, heads=ranked.heads[slice(*(head_count(x, len(ranked)) for x in at))])
        for name, at in BANDS.items()
    }
    return sets | {BOTTOM: scores.bottom(head_count(MAIN, len(ranked)))}


def random_sets(selected: HeadSet) -> list[HeadSet]:
    """Returns random sets of the same layers, drawn from all heads."""
    eligible, draws = selected.geometry.eligible, max(RANDOM_SETS.values())
    return random_controls(selected, eligible, draws=draws, seed=0, match="layer", disjoint=False)


def part_of(draw: int) -> range:
    """Returns the prompts that are asked with a random set; the parts take turns."""
    first = PART * (draw % (PROMPTS // PART))
    return range(first, first + PART)


def answered(
    vlm: VLM,
    numbers: Iterable[int],
    sets: Callable[[int], answers.Ablations],
    when: str = "both",
) -> pd.DataFrame:
    """Returns the answers to prompts by number, each with sets of its own by name; see `ablate`."""
    examples, parts = prompts(vlm), []
    for number in numbers:
        start = time.process_time()
        part = answers.answer(
            vlm,
            [examples[number]],
            sets(number),
            when=when,
            max_new_tokens=NEW_TOKENS,
            metric=natural_needles.score,
            batch_tokens=BATCH_TOKENS,
            progress=False,
        )
        part["example"] = number
        parts.append(part)
        scores = part.groupby("ablation", sort=False)["score"].agg(["mean", "size"]).round(2)
        say(f"prompt {number}, {time.process_time() - start:.0f} s: {scores.T.to_dict()}")
    return pd.concat(parts, ignore_index=True)


def sets_of_prompt(scores: HeadScores) -> Callable[[int], dict[str, list[HeadSet]]]:
    """Returns a function from the number of a prompt to the random sets that it is asked with."""
    sets = {fraction: random_sets(scores.top(fraction)) for fraction in RANDOM_SETS}

    def of_prompt(number: int) -> dict[str, list[HeadSet]]:
        return {
            random_name(fraction): [
                sets[fraction][draw] for draw in range(draws) if number in part_of(draw)
            ]
            for fraction, draws in RANDOM_SETS.items()
        }

    return of_prompt


def say(text: str) -> None:
    """Print a line of the log, with the time of day and the CPU time."""
    print(f"{time.strftime('%H:%M:%S')} {time.process_time():6.0f} s CPU  {text}", flush=True)


def say_right(table: pd.DataFrame) -> None:
    """Print the share of right answers."""
    say(f"\n{table.groupby('ablation')['score'].agg(['mean', 'size'])}")


def parsed(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options of a command line, with the file of the model as `model`."""
    named = os.environ.get("MMHEADS_REAL_LM", "")
    parser.add_argument(
        "model", nargs="?", default=named, metavar="MODEL", help="the file: MMHEADS_REAL_LM"
    )
    options = parser.parse_args(arguments)
    if not options.model:
        parser.error("give the GGUF file, or name it by MMHEADS_REAL_LM")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    from mmheads.models import load

    steps = ("grid", "heads", "ablation", "again", "random", "bands", "when")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=steps, default=steps, metavar="STEP")
    parser.add_argument(
        "--prompts", nargs=2, type=int, default=(0, PROMPTS), metavar=("FIRST", "STOP")
    )
    options = parsed(parser, arguments)
    numbers = range(PROMPTS)[slice(*options.prompts)]
    try:
        vlm = load(options.model)
        say(f"{vlm} is loaded")
        scores = searched(vlm)
        say(f"{len(scores.values)} prompts are scored")
        if "grid" in options.only:
            say(f"{len(grid(vlm).values)} prompts are scored in all")
        if "heads" in options.only:
            detection = found(vlm)
            say(f"heads {detection.heads}\n{detection.table.T}")
            detection.heads.save(paths.HEADS / f"{vlm.model_id}.json")
        if "ablation" in options.only:
            tops = selections(scores)
            say_right(answered(vlm, numbers, lambda _: tops))
        if "again" in options.only:
            repeated, listed = again(vlm), HeadSet.load(vlm.model_id)
            shared = len(repeated.heads & listed)
            say(f"{shared} of {len(listed)} heads are found again\n{repeated.table.T}")
        if "random" in options.only:
            say_right(answered(vlm, numbers, sets_of_prompt(scores)))
        if "bands" in options.only:
            ranks = bands(scores)
            say_right(answered(vlm, numbers, lambda _: ranks))
        if "when" in options.only:
            strongest = selections(scores, IN_DETAIL)
            for when in WHEN:
                say(f"ablated {WHEN[when]}")
                say_right(answered(vlm, numbers, lambda _: strongest, when))
    except (ValueError, OSError) as error:
        print(f"cluster.real_model: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
