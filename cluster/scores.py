"""The scores of one model, task and length, as a piece of work that any process can do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.models import UsageError, name_of
from cluster.units import first_line
from cluster.workload import Workload
from mmheads.tasks.grids import DEPTHS, Grid
from mmheads.tasks.needles import GENERATED, Needles

if TYPE_CHECKING:
    from mmheads.models import VLM


@dataclass(frozen=True, kw_only=True)
class ScoreRun:
    """The scores of one model on one needle task at one length: kept in the store.

    Attributes:
        model: Shipped model, folder, or name on the hub.
        task: One of the source's tasks.
        length: Context length in tokens.
        haystacks: Number of haystacks, each at every depth.
        split: Which needles.
        null_images: See `score_heads`.
        source: What makes the needles, or the folder of published ones.
        folder: Where scores are kept; empty: `runs/scores`.
        gpus: GPUs that the model is spread over.
        fresh: Leave out shipped scores.
    """

    model: str
    task: str
    length: int
    haystacks: int
    split: str = "detection"
    null_images: str = "placeholders"
    source: Needles | str = GENERATED
    folder: str = ""
    gpus: int = 1
    fresh: bool = False

    @property
    def name(self) -> str:
        """Its name on the screen."""
        return f"{name_of(self.model)} {self.task} {self.length}{self.share}"

    @property
    def share(self) -> str:
        """What the name says of the share of pages in generated haystacks, unless it is usual."""
        if isinstance(self.source, str) or self.source == GENERATED:
            return ""
        return f", {self.source.image_ratio:g} images"

    @property
    def prompts(self) -> int:
        """Number of prompts: depths x haystacks."""
        return len(DEPTHS) * self.haystacks

    def scored(self) -> int:
        """Returns the prompts that these versions have scored already with this null question.

        Weights, template and precision are compared when the run starts.
        """
        from mmheads.kept_scores import count_scored

        if isinstance(self.source, str) and not Path(self.source).is_dir():
            return 0
        scored = count_scored(
            name_of(self.model),
            self.task,
            self.length,
            split=self.split,
            null_images=self.null_images,
            folder=self.folder,
            fresh=self.fresh,
            source=opened(self.source),
        )
        return min(scored, self.prompts)

    @property
    def finished(self) -> bool:
        """Whether all its prompts are scored; the notebooks look again when they read them."""
        return self.scored() == self.prompts

    def run(self) -> str:
        """Score; prompts that are scored already are not scored again."""
        from mmheads.scoring import score_needles

        try:
            score_needles(
                _loaded(self.model, "auto" if self.gpus > 1 else ""),
                tasks=[self.task],
                lengths=[self.length],
                haystacks=self.haystacks,
                split=self.split,
                null_images=self.null_images,
                folder=self.folder,
                fresh=self.fresh,
                progress=False,
                source=opened(self.source),
            )
        except Exception as error:
            return first_line(error)
        return ""


_held: dict[str, VLM] = {}


def _loaded(model: str, device: str) -> VLM:
    """Returns the model; the one before it is let go first, so that two are never in memory."""
    import transformers

    from mmheads.models import load

    if model not in _held:
        _held.clear()
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        _held[model] = load(model, device=device)
    return _held[model]


@cache
def opened(source: Needles | str) -> Grid:
    """Returns what makes the examples; files of a folder are opened, and searched, once."""
    from mmheads.tasks import data_root

    return data_root.haystacks(source) if isinstance(source, str) else source


def score_runs(workload: Workload, parameters: Mapping[str, Any]) -> list[ScoreRun]:
    """Returns the score runs that a notebook with this workload and these parameters needs."""
    usual = parameters.get("data") or GENERATED
    return [
        ScoreRun(
            model=row.model or parameters["model"],
            task=row.task,
            length=row.length,
            haystacks=row.haystacks,
            split=row.split,
            null_images=parameters.get("null_images", "placeholders"),
            source=usual if row.image_ratio is None else Needles(row.image_ratio),
            folder=parameters.get("scores_folder", ""),
            fresh=parameters.get("fresh", False),
        )
        for row in workload.scores
    ]


def check_haystacks(workload: Workload, data: str) -> None:
    """Refuses a workload that needs more published needles than there are.

    Raises:
        UsageError: A task, length and split has fewer haystacks than the notebook asks for.
    """
    if not data or not workload.scores:
        return
    source: Any = opened(data)
    for (task, length, split), needed in workload.haystacks(len(source.depths)).items():
        there = source.count(task, length, split)
        if there < needed:
            raise UsageError(
                f"{data} has {there} haystacks of the task {task} at {length} tokens in the split "
                f"{split}; {needed} are asked for: lower haystacks, detection_haystacks or prompts"
            )


def merged(runs: Iterable[ScoreRun]) -> list[ScoreRun]:
    """Returns each score run once, with the most haystacks that are asked for; models together."""
    most: dict[ScoreRun, int] = {}
    for run in runs:
        condition = replace(run, haystacks=0)
        most[condition] = max(run.haystacks, most.get(condition, 0))
    models = list(dict.fromkeys(run.model for run in most))
    each = [replace(condition, haystacks=count) for condition, count in most.items()]
    return sorted(each, key=lambda run: models.index(run.model))
