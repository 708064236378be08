"""Questions about long documents in MMLongBench (arXiv 2505.10610): MMLongBench-Doc and SlideVQA.

Paper A (arXiv 2605.27243, Fig. 8) answers those of 128K tokens with heads masked. A document is cut
to the length, or filled up with pages of others.

The folder is that of the hub's unpacked archives (`ZhaoweiWang/MMLongBench`: `0_mmlb_data.tar.gz`,
`5_docqa_image.tar.gz`): records in `mmlb_data/documentQA/mmlongdoc_K128.jsonl` and the like, pages
in `mmlb_image/`. File names and columns are those that MMLongBench's evaluation code reads, the
numbering of pages is that of its README (DocVQA page indices); they were not checked against the
hub here:

- `doc_name`, `question`, `answer` (a list as JSON), `answer_format`: one of `metrics.KINDS`.
- `page_list`: paths `<folder of the document>/<name>_page<number>.jpg` with numbers from 0
  (mmlongdoc), or `<name>-<number>-1024.jpg` from 1 (slidevqa).
- `ans_page_list`: pages that hold the evidence, from 0 in the whole document in both subsets.
- `length`: tokens; not read by their code, so it may be missing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from mmheads import metrics
from mmheads.examples import Example, Part, Region
from mmheads.tasks.mm_niah import DATA, LENGTHS, image_folder
from mmheads.tasks.mm_niah_records import BEFORE_QUESTION
from mmheads.tasks.records import Columns, Record, Text, read_records

SUBSETS = {"mmlongdoc": "MMLongBench-Doc", "slidevqa": "SlideVQA"}
"""The names of the data sets that the subsets are from."""
QUESTIONS = 100
"""Number of questions per subset and length that MMLongBench's evaluation asks."""
INSTRUCTION = (
    "\nAnswer as concisely as you can, with a phrase or a sentence. If the document does not "
    "answer the question, say 'Not answerable'."
)

_SEED = 42
_NAME = 15
"""Characters of a document's name by which the prompt tells it from others."""
_PAGE = {
    "mmlongdoc": (re.compile(r"_page(\d+)\.\w+$"), 0),
    "slidevqa": (re.compile(r"-(\d+)-\d+\.\w+$"), 1),
}
"""The number in a page's file name, and the number of the first page."""


class _Columns(Columns):
    doc_name: Text
    question: Text
    answer: str | int | float | list[Any]
    answer_format: str
    page_list: list[str]
    ans_page_list: list[Annotated[int, Field(ge=0)]] | None
    length: float | None = None


@dataclass(frozen=True, eq=False)
class DocumentQuestions:
    """Questions about long documents.

    Attributes:
        folder: The folder that was opened.
        opened: The file of each subset and length.
    """

    folder: Path
    opened: Mapping[tuple[str, int], Path]
    _read: dict[Path, list[Record[_Columns]]] = field(default_factory=dict, repr=False, init=False)

    @property
    def subsets(self) -> tuple[str, ...]:
        """Those of `SUBSETS` that have records."""
        return tuple(dict.fromkeys(subset for subset, _ in self.opened))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Nominal lengths in tokens that have records."""
        return tuple(sorted({length for _, length in self.opened}))

    def count(self, subset: str, length: int) -> int:
        """Return the number of questions.

        Raises:
            ValueError: There are no such records, or they lack a column.
        """
        return len(self._records(subset, length))

    def make(self, subset: str, length: int, *, index: int = 0) -> Example:
        """Make one example.

        The context has every page after its document's name and its number as published, in the
        published order. The evidence is every gold page that is in the context, whole; there is
        none for a question that cannot be answered, or whose gold pages were cut off. All pages
        are candidates ("page"). The question names its document, as in paper A's code. The answer
        names its kind, for `question_answer`. The length is the nominal one
        of the file.

        Args:
            subset: One of `SUBSETS`.
            length: One of `lengths`.
            index: Which question, from 0, in the order in which MMLongBench's evaluation draws
                them (shuffled with its seed): the first 100 are those that it scores.

        Raises:
            ValueError: There is no such question; a page's name or number is not as expected, a
                gold page is past the end of its document, an image cannot be read, or the answer
                is not of its kind.
        """
        records = self._records(subset, length)
        if not 0 <= index < len(records):
            raise ValueError(
                f"index is {index}; {subset} has {len(records)} questions at length {length}: "
                f"expected 0 to {len(records) - 1}"
            )
        row = int(np.random.default_rng(_SEED).permutation(len(records))[index])
        record = records[row]
        kind, gold = _answer(record)
        pages = [_page(record, path, subset) for path in record.values.page_list]
        gold_pages = [] if kind == "None" else _gold_pages(record, pages, _PAGE[subset][1])
        context: list[Part] = []
        for (name, number), path in zip(pages, record.values.page_list, strict=True):
            apart = "\n\n" if context else ""
            context += [f"{apart}Document {name[:_NAME]} (page {number}): ", record.image(path)]
        document = record.values.doc_name[:_NAME]
        question = (
            f"Based on Document {document}, answer the following question. {record.values.question}"
        )
        regions = tuple(Region(part=2 * page + 1) for page in range(len(pages)))
        return Example(
            context=(*context, BEFORE_QUESTION),
            question=(question,),
            answer=f"{kind}: {gold}",
            evidence=tuple(regions[page] for page in gold_pages) or None,
            candidates={"page": regions},
            instruction=INSTRUCTION,
            task=subset,
            length=length,
            depth=gold_pages[0] / max(1, len(pages) - 1) if gold_pages else None,
            haystack=(list(SUBSETS).index(subset), length, row),
        )

    def generate(
        self,
        subsets: Sequence[str] = (),
        lengths: Sequence[int] = (),
        questions: int = QUESTIONS,
    ) -> Iterator[Example]:
        """Make the first questions of each subset and length, all where there are fewer."""
        for subset, length in product(subsets or self.subsets, lengths or self.lengths):
            for index in range(min(questions, self.count(subset, length))):
                yield self.make(subset, length, index=index)

    def _records(self, subset: str, length: int) -> list[Record[_Columns]]:
        if (subset, length) not in self.opened:
            raise ValueError(
                f"{self.folder} holds no questions of {subset!r} at length {length!r}; it has the "
                f"subsets {self.subsets} and the lengths {self.lengths}"
            )
        path = self.opened[subset, length]
        if path not in self._read:
            records = read_records(path.parent, _Columns, files=path.name)
            images = image_folder(self.folder)
            self._read[path] = [replace(record, folder=images) for record in records]
        return self._read[path]


def read_document_questions(folder: str | Path) -> DocumentQuestions:
    """Open a folder with `mmlb_data` and `mmlb_image`; any of the lengths may be missing.

    Records are read when they are first asked for, images opened when an example is made.

    Raises:
        ValueError: The folder holds no such records, or no images.
    """
    folder = Path(folder)
    image_folder(folder)  # an error now if there is none
    place = folder / DATA / "documentQA"
    files = {(of, n): place / f"{of}_K{n // 1024}.jsonl" for of, n in product(SUBSETS, LENGTHS)}
    opened = {key: path for key, path in files.items() if path.is_file()}
    if not opened:
        raise ValueError(
            f"{place} holds no file such as mmlongdoc_K128.jsonl; expected "
            "the unpacked 0_mmlb_data.tar.gz of MMLongBench"
        )
    return DocumentQuestions(folder, opened)


def question_answer(answer: str, gold: str) -> float:
    """Return MMLongBench's score of what follows "Answer:", by `metrics.document_answer`.

    Args:
        answer: What the model answered.
        gold: The answer of an example: its kind, a colon, the right answer.

    Raises:
        ValueError: The gold answer names no kind of `metrics.KINDS`, or is not of its kind.
    """
    kind, _, right = gold.partition(": ")
    return metrics.document_answer(re.sub(r"(?is)^.*?answer:\s*", "", answer).strip(), right, kind)


def _answer(record: Record[_Columns]) -> tuple[str, str]:
    """Kind and gold answer; a question that cannot be answered is of the kind None."""
    kind, given = record.values.answer_format, record.values.answer
    gold = given if isinstance(given, str) else json.dumps(given)
    if metrics.normalised(gold) == "not answerable":
        kind = "None"
    try:
        metrics.document_answer("", gold, kind)
    except ValueError as error:
        raise record.error(f"answer_format or answer: {error}") from error
    return kind, gold


def _page(record: Record[_Columns], path: str, subset: str) -> tuple[str, int]:
    """Folder of the document and number of the page, from the path of its image."""
    pattern, first = _PAGE[subset]
    number = pattern.search(path)
    if not number or int(number.group(1)) < first:
        raise record.error(
            f"a page of page_list is {path!r}; expected a path that ends like "
            f"{'_page0.jpg' if subset == 'mmlongdoc' else '-1-1024.jpg'}, numbered from {first}"
        )
    return PurePosixPath(path).parent.name, int(number.group(1))


def _gold_pages(record: Record[_Columns], pages: list[tuple[str, int]], first: int) -> list[int]:
    """Places of the gold pages among the pages of the context."""
    gold, name = record.values.ans_page_list or [], record.values.doc_name
    folders = {folder for folder, _ in pages}
    own = folders & {name} or {each for each in folders if each[:_NAME] == name[:_NAME]}
    if len(own) != 1:
        raise record.error(
            f"page_list has pages of {sorted(folders)}; expected one of them to be the document "
            f"{name!r}"
        )
    last = max(number - first for folder, number in pages if folder in own)
    if folders - own and (past := [page for page in gold if page > last]):
        raise record.error(
            f"ans_page_list names the pages {past}, but the document, which is whole since pages "
            f"of others follow, has 0 to {last}"
        )
    return [
        place
        for place, (folder, number) in enumerate(pages)
        if folder in own and number - first in gold
    ]
