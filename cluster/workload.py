"""What a notebook computes, as its own cell tagged `workload` declares it.

The cell is plain Python over the notebook's parameters and defines `workload`, with two lists:

- `scores`: dicts with `task`, `length`, `haystacks` and `split`, one per file of needle scores.
  With `image_ratio`, the share of pages, the haystacks are always generated ones. `model` names
  another model than the notebook's.
- `passes`: dicts with `what`, `length` in tokens, `prompts`, and `passes` of the model per prompt.
  `task` and `split` say which needles the prompts ask for; `passes_per_head` adds as many passes
  per head of the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.models import UsageError
from cluster.parameters import read_cells


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Needle scores that a notebook reads.

    Attributes:
        task: Needle task.
        length: Context length in tokens.
        haystacks: Number of haystacks, each at every depth.
        split: Which needles.
        image_ratio: Share of pages in generated haystacks; None: the notebook's haystacks.
        model: Model; empty: the notebook's.
    """

    task: str
    length: int
    haystacks: int
    split: str
    image_ratio: float | None = None
    model: str = ""


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Passes of the model over prompts of one length.

    Attributes:
        what: What they are for.
        length: Tokens of a prompt.
        prompts: Number of prompts.
        passes: Passes per prompt.
        passes_per_head: Further passes per prompt and head of the model.
        task: Needle task of the prompts; empty: they are not needles.
        split: Which needles.
    """

    what: str
    length: int
    prompts: int
    passes: int
    passes_per_head: int = 0
    task: str = ""
    split: str = ""


@dataclass(frozen=True)
class Workload:
    """What a notebook computes with one set of parameters.

    Attributes:
        scores: Needle scores.
        passes: All other passes of its model.
    """

    scores: tuple[Scores, ...] = ()
    passes: tuple[Passes, ...] = ()

    def haystacks(self, depths: int) -> dict[tuple[str, int, str], int]:
        """Returns how many haystacks are needed, by task, length and split.

        Args:
            depths: At how many depths there is each of them.
        """
        needed: dict[tuple[str, int, str], int] = {}
        for row in self.scores:
            if row.image_ratio is None:
                key = (row.task, row.length, row.split)
                needed[key] = max(row.haystacks, needed.get(key, 0))
        for each in self.passes:
            if each.task:
                key = (each.task, each.length, each.split)
                needed[key] = max(math.ceil(each.prompts / depths), needed.get(key, 0))
        return needed


NOTHING = Workload()
"""The workload of a notebook that declares none."""


def read(notebook: Path, parameters: Mapping[str, Any]) -> Workload:
    """Returns what a notebook computes with these parameters; nothing if it declares nothing.

    Args:
        notebook: Its file.
        parameters: All its parameters.

    Raises:
        UsageError: The cell fails with these parameters, or does not define what it should.
    """
    cells = [cell for cell in read_cells(notebook) if "workload" in cell.metadata.get("tags", [])]
    if not cells:
        return NOTHING
    if len(cells) > 1:
        raise UsageError(f"{notebook} has {len(cells)} cells tagged workload; expected one")
    names: dict[str, Any] = dict(parameters)
    try:
        exec(compile(cells[0].source, f"{notebook}, cell tagged workload", "exec"), names)
        declared = names["workload"]
        return Workload(
            tuple(Scores(**row) for row in declared.get("scores", [])),
            tuple(Passes(**row) for row in declared.get("passes", [])),
        )
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UsageError(
            f"{notebook.stem} cannot say what it computes with these parameters ({reason})"
        ) from error
