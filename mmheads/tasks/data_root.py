"""The published data sets in one folder, as the notebooks' parameter `data` names it.

Each lies under its own name, with the files that the hub or its authors have; any may be missing:

    MMLongBench/              mmlb_data/, mmlb_image/: needles, document questions
    MMDocIR/                  MMDocIR_annotations.jsonl and tables, or pdfs/
    RefCOCOg/                 val*.parquet
    VidSTG/                   annotations/, vidor/, frames/
    MLVU/                     json/, frames/
    MMMU/ MMMU_Pro/ MathVision/ MathVista/
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from mmheads.examples import Example
from mmheads.metrics import Metric, same
from mmheads.tasks import docqa, documents, grounding, needles, niah, reasoning, videos

FOLDERS = {
    "needles": "MMLongBench",
    "docqa": "MMLongBench",
    "mmdocir": "MMDocIR",
    "refcocog": "RefCOCOg",
    "vidstg": "VidSTG",
    "mlvu": "MLVU",
    "mmmu": "MMMU",
    "mmmu_pro": "MMMU_Pro",
    "mathvision": "MathVision",
    "mathvista": "MathVista",
}


@dataclass(frozen=True, eq=False)
class Examples:
    """Examples of a set, made anew whenever they are gone through.

    The pages of a hundred long documents do not fit in memory together.

    Attributes:
        make: Makes them one by one.
    """

    make: Callable[[], Iterator[Example]]

    def __iter__(self) -> Iterator[Example]:
        return self.make()


def folder(data: str | Path, name: str) -> Path | None:
    """The folder of a data set, one of `FOLDERS`; None if it is not there.

    Raises:
        ValueError: `data` is no folder.
    """
    if not Path(data).is_dir():
        raise ValueError(f"data is {str(data)!r}: no such folder; expected one as {__name__} says")
    found = Path(data) / FOLDERS[name]
    return found if found.is_dir() else None


def haystacks(data: str | Path = "") -> Any:
    """What makes the needle examples: the module `needles`, or the published MM-NIAH in `data`.

    Both have `make` and `generate`; published ones also their `lengths` and `depths`.

    Raises:
        ValueError: There is no MMLongBench in `data`, or as `niah.read` does.
    """
    if not data:
        return needles
    found = folder(data, "needles")
    if found is None:
        raise ValueError(f"{data} holds no folder {FOLDERS['needles']}: no needles to look for")
    return niah.read(found)


def needle_metric(data: str | Path = "") -> Metric:
    """What an answer to a needle example of `haystacks` is worth."""
    return niah.score if data else same


def probes(
    data: str | Path,
    *,
    limit: int = 100,
    pages: int = 20,
    frames: int = videos.FRAMES,
    video: bool = True,
) -> dict[str, Examples]:
    """Examples with evidence of each of paper B's probing sets that is there, by name.

    Args:
        data: The folder.
        limit: Examples a set, the first that have evidence.
        pages: Pages of a document around the evidence.
        frames: Frames of a video.
        video: False gives them as images, for models that read no videos (`VLM.reads_video`).

    Raises:
        ValueError: As the loaders do.
    """
    found: dict[str, Callable[[], Iterator[Example]]] = {}
    if refcocog := folder(data, "refcocog"):
        found["refcocog"] = partial(grounding.refcocog, refcocog)
    if vidstg := folder(data, "vidstg"):
        parts = (vidstg / part for part in ("annotations", "vidor", "frames"))
        found["vidstg"] = partial(grounding.vidstg, *parts, count=frames)
    if mmdocir := folder(data, "mmdocir"):
        found["mmdocir"] = partial(_of_documents, mmdocir, pages)
    if (mmlb := folder(data, "docqa")) and (mmlb / niah.DATA / "documentQA").is_dir():
        questions = docqa.read(mmlb)
        for subset in questions.subsets:
            shortest = min(length for name, length in questions.opened if name == subset)
            every = questions.count(subset, shortest)
            found[subset] = partial(questions.generate, [subset], [shortest], every)
    return {
        name: Examples(partial(_with_evidence, make, limit, video)) for name, make in found.items()
    }


def _with_evidence(
    make: Callable[[], Iterator[Example]], limit: int, video: bool
) -> Iterator[Example]:
    for example in islice((each for each in make() if each.evidence), limit):
        yield example if video else example.without_video()


def _of_documents(mmdocir: Path, pages: int) -> Iterator[Example]:
    found = documents.read(mmdocir)
    if not found.documents:
        problem = found.problems[0] if found.problems else "it has no line of annotations"
        raise ValueError(f"{mmdocir} holds no document that can be read: {problem}")
    for document in found.documents:
        for question in document.questions:
            yield documents.example(document, question, pages=pages)


def document_questions(
    data: str | Path, length: int, *, limit: int = docqa.QUESTIONS
) -> dict[str, Examples]:
    """Questions on long documents (paper A, Fig. 8) by subset; `docqa.score` scores them.

    Raises:
        ValueError: As `docqa.read` and its `make` do.
    """
    found = folder(data, "docqa")
    if found is None or not (found / niah.DATA / "documentQA").is_dir():
        return {}
    questions = docqa.read(found)
    there = [subset for subset, of in questions.opened if of == length]
    return {
        subset: Examples(partial(questions.generate, [subset], [length], limit)) for subset in there
    }


def benchmarks(
    data: str | Path, *, mode: str = "direct", limit: int | None = None, video: bool = True
) -> dict[str, tuple[list[Example], Metric]]:
    """Questions of the reasoning sets (paper A, Fig. 9) and of MLVU that are there, by name.

    Args:
        data: The folder.
        mode: "direct" or "cot"; MLVU is asked directly alone.
        limit: Questions a set.
        video: As in `probes`.

    Raises:
        ValueError: As the loaders do.
    """
    if mode not in reasoning.MODES:
        raise ValueError(f"mode is {mode!r}; expected one of {reasoning.MODES}")
    found: dict[str, tuple[list[Example], Metric]] = {}
    for name, benchmark in reasoning.BENCHMARKS.items():
        if there := folder(data, name):
            asked = reasoning.read(name, there, mode=mode, limit=limit)
            found[name] = asked, benchmark.metric
    if mode == "direct" and (mlvu := folder(data, "mlvu")):
        clips = videos.mlvu(mlvu / "json", mlvu / "frames", limit=limit)
        asked = [each if video else each.without_video() for each in clips]
        found["mlvu"] = asked, videos.choice_answer
    return found


def prompts(
    source: Any, task: str, length: int, count: int, *, split: str = "test", **settings: Any
) -> Examples:
    """Needle prompts of `haystacks` at all depths in turn.

    Generated ones have a haystack each; of published ones, a pair comes at every depth before the
    next. Every other identical image is not there: of generated ones always at the same depths.

    Args:
        source: What `haystacks` gives.
        task: See `needles.make`.
        length: "
        count: Number of prompts.
        split: "
        settings: Further ones of the source's `make`.
    """
    depths = getattr(source, "depths", needles.DEPTHS)
    apart = 1 if source is needles else len(depths)
    wanted = ["no", "yes"] if task == "identical" else [None]

    def one(i: int) -> Example:
        made: Example = source.make(
            task,
            length,
            depths[i % len(depths)],
            pair=i // apart,
            split=split,
            answer=wanted[(i if apart == 1 else i + i // apart) % len(wanted)],
            **settings,
        )
        return made

    return Examples(lambda: map(one, range(count)))
