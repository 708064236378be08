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
from mmheads.tasks import needles

if TYPE_CHECKING:
    from mmheads.models import VLM

PAGES = 0.5
"""Share of pages in haystacks whose share is not named."""


@dataclass(frozen=True, kw_only=True)
class ScoreRun:
    """The scores of one model on one needle task at one length: kept in the store.

    Attributes:
        model: Shipped model, folder, or name on the hub.
        task: One of `needles.TASKS`.
        length: Context length in tokens.
        pairs: Question-evidence pairs, each at every depth.
        split: Which needles.
        null_images: See `score_heads`.
        image_ratio: See `needles.make`.
        data: Folder of the published needles; empty: generated ones.
        folder: Where scores are kept; empty: `runs/scores`.
        gpus: GPUs that the model is spread over.
        fresh: Leave out shipped scores.
    """

    model: str
    task: str
    length: int
    pairs: int
    split: str = "detection"
    null_images: str = "placeholders"
    image_ratio: float = PAGES
    data: str = ""
    folder: str = ""
    gpus: int = 1
    fresh: bool = False

    @property
    def name(self) -> str:
        """Its name on the screen."""
        share = "" if self.image_ratio == PAGES else f", {self.image_ratio:g} images"
        return f"{name_of(self.model)} {self.task} {self.length}{share}"

    @property
    def prompts(self) -> int:
        """Number of prompts: depths x pairs."""
        return len(needles.DEPTHS) * self.pairs

    def scored(self) -> int:
        """Returns the prompts that these versions have scored already with this null question.

        Weights, template and precision are compared when the run starts.
        """
        from mmheads.kept_scores import count_scored

        source = open_haystacks(self.data) if self.data and Path(self.data).is_dir() else needles
        scored = count_scored(
            name_of(self.model),
            self.task,
            self.length,
            split=self.split,
            image_ratio=self.image_ratio,
            null_images=self.null_images,
            folder=self.folder,
            fresh=self.fresh,
            source=source,
        )
        return min(scored, self.prompts)

    def run(self) -> str:
        """Score; prompts that are scored already are not scored again."""
        from mmheads.scoring import score_needles
        from mmheads.tasks import data_root

        try:
            score_needles(
                _loaded(self.model, "auto" if self.gpus > 1 else ""),
                tasks=[self.task],
                lengths=[self.length],
                pairs=self.pairs,
                split=self.split,
                image_ratio=self.image_ratio,
                null_images=self.null_images,
                folder=self.folder,
                fresh=self.fresh,
                progress=False,
                source=data_root.haystacks(self.data),
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
def open_haystacks(data: str) -> Any:
    """Returns the haystacks of a folder; its files are opened, and searched for pairs, once."""
    from mmheads.tasks import data_root

    return data_root.haystacks(data)


def score_runs(workload: Workload, parameters: Mapping[str, Any]) -> list[ScoreRun]:
    """Returns the score runs that a notebook with this workload and these parameters needs."""
    return [
        ScoreRun(
            model=row.model or parameters["model"],
            task=row.task,
            length=row.length,
            pairs=row.haystacks,
            split=row.split,
            null_images=parameters.get("null_images", "placeholders"),
            image_ratio=PAGES if row.image_ratio is None else row.image_ratio,
            data=parameters.get("data", "") if row.image_ratio is None else "",
            folder=parameters.get("scores_folder", ""),
            fresh=parameters.get("fresh", False),
        )
        for row in workload.scores
    ]


def check_haystacks(workload: Workload, data: str) -> None:
    """Refuses a workload that needs more published needles than there are.

    Raises:
        UsageError: A task, length and split has fewer pairs than the notebook asks for.
    """
    if not data or not workload.scores:
        return
    source = open_haystacks(data)
    for (task, length, split), pairs in workload.haystacks(len(source.depths)).items():
        there = source.count(task, length, split)
        if there < pairs:
            raise UsageError(
                f"{data} has {there} pairs of the task {task} at {length} tokens in the split "
                f"{split}; {pairs} are asked for: lower pairs, detection_pairs or prompts"
            )


def merged(runs: Iterable[ScoreRun]) -> list[ScoreRun]:
    """Returns each score run once, with the most pairs that are asked for; models together."""
    most: dict[ScoreRun, int] = {}
    for run in runs:
        condition = replace(run, pairs=0)
        most[condition] = max(run.pairs, most.get(condition, 0))
    models = list(dict.fromkeys(run.model for run in most))
    each = [replace(condition, pairs=pairs) for condition, pairs in most.items()]
    return sorted(each, key=lambda run: models.index(run.model))
