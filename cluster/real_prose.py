"""Measure how well a pretrained text model predicts plain prose, whole and without heads.

python -m cluster.real_prose [MODEL.gguf]

A model that can no longer write would lose answers too. The prose is the shipped corpus, without
needles; the heads are those of `cluster.real_model`. The mean loss of each passage is written to
`data/results/real_prose.csv`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import cross_entropy

from cluster import real_model as plan
from mmheads import paths, store
from mmheads.answers import FULL_MODEL
from mmheads.attention import ablate
from mmheads.heads import HeadSet
from mmheads.scores import HeadScores
from mmheads.statistics import bootstrap_interval, paired_difference
from mmheads.tasks import corpus

if TYPE_CHECKING:
    from mmheads.models import VLM

PASSAGES = 16
TOKENS = 128
"""Tokens of a passage; the first one is given, the others are predicted."""
RANDOM_SETS = 4
"""Random sets of the same layers, of each share."""
TABLE = store.SHIPPED / "real_prose.csv"


def sets_of(scores: HeadScores) -> dict[tuple[str, int], HeadSet | None]:
    """Returns what is ablated by name and draw; None for the whole model."""
    named: dict[str, HeadSet | None] = {FULL_MODEL: None}
    named |= {plan.top_name(share): scores.top(share) for share in plan.IN_DETAIL}
    sets = {(name, 0): heads for name, heads in (named | plan.bands(scores)).items()}
    for share in plan.IN_DETAIL:
        for draw, heads in enumerate(plan.random_sets(scores.top(share))[:RANDOM_SETS]):
            sets[plan.random_name(share), draw] = heads
    return sets


def passages(vlm: VLM, count: int = PASSAGES, tokens: int = TOKENS) -> torch.Tensor:
    """Returns [passage, token] the beginnings of random paragraphs that are long enough."""
    paragraphs = corpus.shipped().paragraphs
    ids: list[list[int]] = []
    for number in np.random.default_rng(0).permutation(len(paragraphs)):
        text = " ".join(paragraphs[number])
        found = vlm.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += [found[:tokens]] if len(found) >= tokens else []
        if len(ids) == count:
            break
    return torch.tensor(ids, device=vlm.device)


@torch.no_grad()
def losses(
    vlm: VLM, ids: torch.Tensor, sets: Mapping[tuple[str, int], HeadSet | None]
) -> pd.DataFrame:
    """Returns one row per passage and set: the mean loss in nats per token."""
    parts = []
    for (name, draw), heads in sets.items():
        with ablate(vlm, heads) if heads else nullcontext():
            logits = vlm.model(input_ids=ids).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        means = loss.view(len(ids), -1).mean(dim=1).tolist()
        plan.say(f"{name}, {draw}: {np.mean(means):.3f}")
        rows = {"ablation": name, "draw": draw, "heads": len(heads or ()), "loss": means}
        parts.append(pd.DataFrame(rows).rename_axis("passage").reset_index())
    return pd.concat(parts, ignore_index=True)


def rows(table: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Yields the loss on prose of the whole model, and what each ablation adds to it.

    Args:
        table: What `losses` returned.
    """
    by_passage = table.pivot_table(index="passage", columns="ablation", values="loss", sort=False)
    whole = by_passage[FULL_MODEL]
    found = bootstrap_interval(whole, seed=0)._asdict()
    yield {"quantity": "loss on prose", "about": FULL_MODEL, **found}
    for name in by_passage.columns.drop(FULL_MODEL):
        found = bootstrap_interval(by_passage[name] - whole, seed=0)._asdict()
        p = paired_difference(by_passage[name], whole, seed=0).p
        yield {"quantity": "loss on prose, added", "about": name, **found, "p": p}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    from mmheads.models import load

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options = plan.parsed(parser, arguments)
    try:
        vlm = load(options.model)
        table = losses(vlm, passages(vlm), sets_of(plan.searched(vlm)))
        with paths.write_whole(TABLE) as path:
            table.round(6).to_csv(path, index=False, lineterminator="\n")
    except (ValueError, OSError) as error:
        print(f"cluster.real_prose: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
