"""Run a pretrained text model: find its heads, then take them out of it.

python -m cluster.real_model [MODEL.gguf] [--only STEP ...]

Needles in natural language are hidden in the shipped corpus. Steps, in this order:

- grid: scores of the detection needles at each length and depth.
- heads: the head list, found as `mmheads detect` finds it, in `data/heads`.
- ablation: test prompts, answered by the whole model and without the strongest heads.
- again: the search for heads repeated with other needles and haystacks.
- random: the same prompts without random heads of the same layers, group by group.
- more: further test prompts, as in the step ablation.

Results are kept in `runs` prompt by prompt. What is interrupted goes on from there and from what is
shipped; only the step heads scores anew what is not kept. Ship results by `python -m cluster.ship`.
The tests of the model and its page in the documentation take their prompts and sets from here.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING

import pandas as pd

from mmheads import answers, paths
from mmheads.controls import random_controls
from mmheads.detection import Detection, Search, detect
from mmheads.examples import Example
from mmheads.heads import HeadSet
from mmheads.scores import HeadScores
from mmheads.scoring import score_needles
from mmheads.tasks import natural_needles
from mmheads.tasks.grids import Grid

if TYPE_CHECKING:
    from mmheads.models import VLM

TASK = "text"
LENGTHS = (256, 512, 1024)
HAYSTACKS = 4
SEED_AGAIN = 1
"""Seed of the needles and haystacks with which the search is repeated."""
LENGTH_AGAIN = 512
"""Length of their prompts."""
TEST_LENGTH = 512
PROMPTS = 24
"""Test prompts, each of a haystack of its own; the depths take turns."""
WITH_RANDOM = 12
"""The first of them, which are asked without random sets too."""
FRACTIONS = (0.01, 0.02, 0.05, 0.1)
MAIN = 0.05
"""The fraction of the head list, and of the comparison that counts."""
CONTROLLED = (0.05, 0.1)
"""Fractions that are compared with random sets."""
DRAWS = 180
"""Random sets, more than there may be time for: they are asked group by group."""
GROUP = 36
"""Random sets of a group, of each fraction: three per prompt and turn."""
TURNS = 2
"""How many prompts are asked with each random set."""
NEW_TOKENS = 24
BATCH_TOKENS = 10_240
"""Room for all sets of a prompt, which share the layers below their first head."""


def grid(vlm: VLM) -> HeadScores:
    """Returns the scores of the detection needles."""
    return _scored(vlm, natural_needles.for_model(vlm), LENGTHS)


def found(vlm: VLM) -> Detection:
    """Returns the heads that are shipped, with what says so."""
    return _search(vlm, 0, LENGTHS)


def again(vlm: VLM) -> Detection:
    """Returns the heads that a search with other needles and haystacks finds."""
    return _search(vlm, SEED_AGAIN, (LENGTH_AGAIN,))


def _scored(vlm: VLM, source: Grid, lengths: Sequence[int]) -> HeadScores:
    return score_needles(
        vlm, tasks=[TASK], lengths=lengths, haystacks=HAYSTACKS, progress=False, source=source
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


def selections(scores: HeadScores) -> dict[str, HeadSet]:
    """Returns the strongest heads by name."""
    return {top_name(fraction): scores.top(fraction) for fraction in FRACTIONS}


def top_name(fraction: float) -> str:
    """Name of the strongest heads."""
    return f"top {fraction:.0%}"


def random_name(fraction: float) -> str:
    """Name of random sets of as many heads."""
    return f"random {fraction:.0%}, same layers"


def random_sets(selected: HeadSet) -> list[HeadSet]:
    """Returns random sets of the same layers, drawn from all heads."""
    eligible = selected.geometry.eligible
    return random_controls(selected, eligible, draws=DRAWS, seed=0, match="layer", disjoint=False)


def asked_of(draw: int) -> list[int]:
    """Returns the prompts that are asked with a random set, one per turn.

    In each turn of a group, every prompt is asked with the same number of sets.
    """
    shift = WITH_RANDOM // 2 + draw // WITH_RANDOM % (WITH_RANDOM // 2)
    return [(draw + turn * shift) % WITH_RANDOM for turn in range(TURNS)]


def answered(
    vlm: VLM, examples: Mapping[int, Example], sets: Callable[[int], answers.Ablations]
) -> pd.DataFrame:
    """Returns the answers to prompts by number, each with sets of its own by name."""
    parts = []
    for number, example in examples.items():
        start = time.process_time()
        part = answers.answer(
            vlm,
            [example],
            sets(number),
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


def ablation(vlm: VLM, scores: HeadScores, numbers: range) -> pd.DataFrame:
    """Returns the answers of the whole model and without the strongest heads."""
    sets, examples = selections(scores), prompts(vlm)
    return answered(vlm, {number: examples[number] for number in numbers}, lambda _: sets)


def ablation_of_random_sets(vlm: VLM, scores: HeadScores) -> Iterator[pd.DataFrame]:
    """Yields the answers without random sets of each group and turn."""
    sets = {fraction: random_sets(scores.top(fraction)) for fraction in CONTROLLED}
    examples = dict(enumerate(prompts(vlm)[:WITH_RANDOM]))
    for start, turn in product(range(0, DRAWS, GROUP), range(TURNS)):
        chosen: dict[int, dict[str, list[HeadSet]]] = {
            number: {random_name(fraction): [] for fraction in CONTROLLED} for number in examples
        }
        for draw, fraction in product(range(start, start + GROUP), CONTROLLED):
            chosen[asked_of(draw)[turn]][random_name(fraction)].append(sets[fraction][draw])
        yield answered(vlm, examples, chosen.__getitem__)


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

    steps = ("grid", "heads", "ablation", "again", "random", "more")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=steps, default=steps, metavar="STEP")
    options = parsed(parser, arguments)
    try:
        vlm = load(options.model)
        say(f"{vlm} is loaded")
        scores = grid(vlm)
        say(f"{len(scores.values)} prompts are scored")
        if "heads" in options.only:
            detection = found(vlm)
            say(f"heads {detection.heads}\n{detection.table.T}")
            detection.heads.save(paths.HEADS / f"{vlm.model_id}.json")
        if "ablation" in options.only:
            say_right(ablation(vlm, scores, range(WITH_RANDOM)))
        if "again" in options.only:
            repeated, listed = again(vlm), HeadSet.load(vlm.model_id)
            shared = len(repeated.heads & listed)
            say(f"{shared} of {len(listed)} heads are found again\n{repeated.table.T}")
        if "random" in options.only:
            for table in ablation_of_random_sets(vlm, scores):
                say_right(table)
        if "more" in options.only:
            say_right(ablation(vlm, scores, range(WITH_RANDOM, PROMPTS)))
    except (ValueError, OSError) as error:
        print(f"cluster.real_model: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
