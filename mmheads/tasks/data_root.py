"""The published data sets in one folder, which the parameter `data` of the notebooks names.

Each data set is in a folder of its own name, with the files as the hub or its authors publish them.
Any of them may be missing:

    MMLongBench/              mmlb_data/, mmlb_image/: needles, document questions
    MMDocIR/                  MMDocIR_annotations.jsonl and tables, or pdfs/
    RefCOCOg/                 val*.parquet
    VidSTG/                   annotations/, vidor/, frames/
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from mmheads.examples import Example
from mmheads.metrics import Metric, same
from mmheads.tasks import mm_niah, mmdocir, mmlongbench_docs, videos
from mmheads.tasks.grids import Grid
from mmheads.tasks.needles import GENERATED
from mmheads.tasks.probes import refcocog, vidstg

FOLDERS = {
    "needles": "MMLongBench",
    "docqa": "MMLongBench",
    "mmdocir": "MMDocIR",
    "refcocog": "RefCOCOg",
    "vidstg": "VidSTG",
}


@dataclass(frozen=True, eq=False)
class Examples:
    """Examples of a data set, made again in each iteration.

    The pages of a hundred long documents do not fit in memory together.

    Attributes:
        make: Returns a new iterator over the examples, which makes them one by one.
    """

    make: Callable[[], Iterator[Example]]

    def __iter__(self) -> Iterator[Example]:
        return self.make()


def folder(data: str | Path, name: str) -> Path | None:
    """Return the folder of a data set, one of `FOLDERS`; None if it does not exist.

    Raises:
        ValueError: `data` is not a folder.
    """
    if not Path(data).is_dir():
        raise ValueError(
            f"data is {str(data)!r}, which is not a folder; expected one as described in {__name__}"
        )
    place = Path(data) / FOLDERS[name]
    return place if place.is_dir() else None


def haystacks(data: str | Path = "") -> Grid:
    """Return what makes needle examples: `GENERATED`, or the published MM-NIAH in `data`.

    Raises:
        ValueError: There is no MMLongBench in `data`, or as `mm_niah.read_mm_niah` does.
    """
    if not data:
        return GENERATED
    place = folder(data, "needles")
    if place is None:
        raise ValueError(
            f"{data} holds no folder {FOLDERS['needles']}; expected the published needles there"
        )
    return mm_niah.read_mm_niah(place)


def needle_metric(data: str | Path = "") -> Metric:
    """Return the function that scores answers to the needle examples of `haystacks`."""
    return mm_niah.needle_answer if data else same


def probes(
    data: str | Path,
    *,
    limit: int = 100,
    pages: int = 20,
    frames: int = videos.FRAMES,
    video: bool = True,
) -> dict[str, Examples]:
    """Return examples with evidence from each of paper B's probing sets that exists, by name.

    Args:
        data: The folder of all data sets.
        limit: Largest number of examples per set; the first ones that have evidence are taken.
        pages: Pages of a document around the evidence.
        frames: Frames per video.
        video: False gives videos as images, for models that do not read videos
            (`VLM.reads_video`).

    Raises:
        ValueError: As the loaders do.
    """
    makers: dict[str, Callable[[], Iterator[Example]]] = {}
    if place := folder(data, "refcocog"):
        makers["refcocog"] = partial(refcocog, place)
    if place := folder(data, "vidstg"):
        parts = (place / part for part in ("annotations", "vidor", "frames"))
        makers["vidstg"] = partial(vidstg, *parts, count=frames)
    if place := folder(data, "mmdocir"):
        makers["mmdocir"] = partial(_of_documents, place, pages)
    if (place := folder(data, "docqa")) and (place / mm_niah.DATA / "documentQA").is_dir():
        questions = mmlongbench_docs.read_document_questions(place)
        for subset in questions.subsets:
            shortest = min(length for name, length in questions.opened if name == subset)
            every = questions.count(subset, shortest)
            makers[subset] = partial(questions.generate, [subset], [shortest], every)
    return {
        name: Examples(partial(_with_evidence, make, limit, video)) for name, make in makers.items()
    }


def _with_evidence(
    make: Callable[[], Iterator[Example]], limit: int, video: bool
) -> Iterator[Example]:
    for example in islice((each for each in make() if each.evidence), limit):
        yield example if video else example.without_video()


def _of_documents(path: Path, pages: int) -> Iterator[Example]:
    collection = mmdocir.read_mmdocir(path)
    problems = collection.problems
    if not collection.documents:
        problem = problems[0] if problems else "it has no line of annotations"
        raise ValueError(f"{path} holds no document that can be read: {problem}")
    if problems:
        count = len(problems) + len(collection.documents)
        warnings.warn(
            f"{len(problems)} of {count} documents in {path} cannot be read and are left out; the "
            f"first: {problems[0]}",
            stacklevel=2,
        )
    for document in collection.documents:
        for question in document.questions:
            yield mmdocir.to_example(document, question, pages=pages)


def document_questions(
    data: str | Path, length: int, *, limit: int = mmlongbench_docs.QUESTIONS
) -> dict[str, Examples]:
    """Return questions about long documents (paper A, Fig. 8) by subset.

    `mmlongbench_docs.question_answer` scores their answers.

    Args:
        data: The folder of all data sets.
        length: Nominal length of the documents in tokens.
        limit: Largest number of questions per subset.

    Raises:
        ValueError: As for `mmlongbench_docs.read_document_questions` and its `make`.
    """
    place = folder(data, "docqa")
    if place is None or not (place / mm_niah.DATA / "documentQA").is_dir():
        return {}
    questions = mmlongbench_docs.read_document_questions(place)
    return {
        subset: Examples(partial(questions.generate, [subset], [length], limit))
        for subset, nominal in questions.opened
        if nominal == length
    }


def prompts(source: Grid, task: str, length: int, count: int, *, split: str = "test") -> Examples:
    """Return needle prompts of `haystacks`, with the needle at all depths in turn.

    A haystack comes at every depth before the next one, or at one depth only if the source has
    `one_depth_each`. In the task "identical_image", every second prompt has no needle (answer
    "no"), so that over two rounds of the depths each depth has both answers.

    Args:
        source: What makes the examples.
        task: One of the source's tasks.
        length: Length of the prompts in tokens; nominal for published haystacks.
        count: Number of prompts.
        split: One of `grids.SPLITS`.
    """
    depths = source.depths
    apart = 1 if source.one_depth_each else len(depths)
    answers = ["no", "yes"] if task == "identical_image" else [None]

    def make(i: int) -> Example:
        return source.make(
            task,
            length,
            depths[i % len(depths)],
            haystack=i // apart,
            split=split,
            answer=answers[(i % len(depths) + i // len(depths)) % len(answers)],
        )

    return Examples(lambda: map(make, range(count)))
