"""Ablate the strongest heads of a pretrained text model one by one.

python -m cluster.real_single [MODEL.gguf]

What the right answer to a needle prompt loses in log-odds without a single head, and the gradients
that foretell it, are kept in `runs` and shipped by `python -m cluster.ship`; what is interrupted
goes on from there. Log-odds are those of the first token, so the prompts are those that the whole
model answers with the value itself.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.stats
from numpy.typing import NDArray

from cluster import real_model as plan
from mmheads import causal, store
from mmheads.examples import Example
from mmheads.provenance import Provenance, code_version, library_versions
from mmheads.scores import HeadScores
from mmheads.statistics import holm, paired_difference, stratified_interval

if TYPE_CHECKING:
    from mmheads.models import VLM

STRONGEST = 40
"""Heads that are ablated one by one."""
PROMPTS = 12
"""Prompts on which this is done; the gradients of all heads are taken on those that are left."""


def examples(vlm: VLM) -> list[Example]:
    """Returns the prompts that the whole model answers with the value itself."""
    table = plan.answered(vlm, range(plan.PROMPTS), lambda _: {})
    whole = table.set_index("example")["prediction"]
    return [
        example
        for number, example in enumerate(plan.prompts(vlm))
        if whole[number].strip().startswith(str(example.answer))
    ]


def measure(vlm: VLM, scores: HeadScores) -> None:
    """Keep the effects of the strongest heads, and the gradients of all."""
    asked, strongest = examples(vlm), scores.top(count=STRONGEST)
    kept: dict[str, Any] = {"folder": "", "progress": False}
    causal.gate_gradients(vlm, asked[PROMPTS:], **kept)
    kept |= {"heads": strongest, "batch_tokens": plan.BATCH_TOKENS}
    causal.single_head_effects(vlm, asked[:PROMPTS], **kept)


def measured(
    scores: HeadScores, folder: str | Path
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Returns what answers lose without single heads, and gradients -> [example, head], nats.

    Both are of the strongest heads, in the order of their score; each on prompts of its own. They
    are empty where nothing is shipped.

    Args:
        scores: Scores of the prompts that the heads are found on.
        folder: Where effects are kept, which are returned too; empty: `runs/effects`.

    Raises:
        ValueError: There are effects of other heads, or on another number of prompts.
    """
    now = Provenance(code=code_version(causal.MODULES), versions=library_versions())
    model = Path(scores.provenance.model).name
    known = store.known("effects", model, version=causal.VERSION, now=now, folder=folder)
    rows = [results[key] for results in known for key in sorted(results)]
    which = tuple(np.transpose(scores.top(count=STRONGEST).heads))
    effects, gradients = (
        np.array([row["nats"][which] for row in rows if row["quantity"] == quantity])
        for quantity in ("effect", "gradient")
    )
    if len(effects) not in (0, PROMPTS) or np.isnan(effects).any():
        raise ValueError(
            f"{len(effects)} prompts with effects of single heads are shipped or kept, expected "
            f"{PROMPTS} with all of the strongest heads; delete those that are not wanted"
        )
    return effects, gradients


def rows(scores: HeadScores, folder: str | Path) -> Iterator[dict[str, Any]]:
    """Yields what answers lose without each of the strongest heads, and what foretells it.

    Prompts are the units; p is that of sign flips, corrected by Holm over the heads. Arguments are
    those of `measured`.
    """
    effects, gradients = measured(scores, folder)
    if not len(effects):
        return
    strongest = scores.top(count=STRONGEST)
    tests = [paired_difference(each, np.zeros(len(each)), seed=0) for each in effects.T]
    corrected = holm([test.p for test in tests])
    for head, test, p in zip(strongest, tests, corrected, strict=True):
        about = {"quantity": "nats lost without one head", "about": str(head)}
        yield about | test._asdict() | {"p": p}
    own = np.array([strongest.scores[head] for head in strongest])
    for name, units in {"score": [effects], "gradient": [effects, gradients]}.items():
        value = stratified_interval(units, partial(_correlation, own), seed=0)
        about = {"quantity": "rank correlation with the nats lost", "about": name}
        yield about | value._asdict() | {"n": len(effects)}
    yield {"quantity": "prompts with gradients", "about": "all", "value": len(gradients)}


def _correlation(scores: NDArray[Any], drawn: Sequence[NDArray[Any]]) -> float:
    """Spearman's over heads, of mean effects with mean gradients or else with scores."""
    effects, *gradients = drawn
    foretold = gradients[0].mean(axis=0) if gradients else scores
    found: float = scipy.stats.spearmanr(foretold, effects.mean(axis=0)).statistic
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    from mmheads.models import load

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options = plan.parsed(parser, arguments)
    try:
        vlm = load(options.model)
        scores = plan.searched(vlm)
        measure(vlm, scores)
        for row in rows(scores, ""):
            plan.say(str(row))
    except (ValueError, OSError) as error:
        print(f"cluster.real_single: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
