"""Rank the text blocks of a real page with a pretrained text model: what every head attends to.

python -m cluster.real_blocks [MODEL.gguf]

Of the documents of `cluster.real_documents`, the questions are those about one page whose gold
boxes text blocks can cover: at least half of their area. The model reads the blocks of the gold
page, all of them, and is told neither the places of the blocks nor the other pages. The attention
of every head from each question to each block is kept and shipped as that to pages is;
`python -m cluster.real_ranking` writes the rankings.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster import real_documents as pages
from cluster.real_model import parsed
from mmheads import store
from mmheads.pdfs import PageBox
from mmheads.retrieval import NULL_QUESTION, DocumentIndex, PagePart, layout_recall
from mmheads.tasks.mmdocir import AnnotatedDocument, Question

if TYPE_CHECKING:
    from mmheads.models import VLM

LEAST_COVERED = 0.5
"""Share of the gold boxes' area that the text blocks of a page must cover."""
SETTINGS = {"candidates": "blocks"}
"""Settings by which attention to blocks is told from attention to pages."""


@dataclass(frozen=True)
class BlockPage:
    """A page with the questions that its text blocks can answer.

    Attributes:
        document: The document.
        page: Index of the page, from 0.
        texts: The text of each block.
        boxes: The place of each block.
        questions: The questions, by their number in the document.
    """

    document: AnnotatedDocument
    page: int
    texts: tuple[str, ...]
    boxes: tuple[PageBox, ...]
    questions: dict[int, Question]

    def gold(self, question: Question) -> list[PageBox]:
        """Returns the gold boxes of a question on this page."""
        return [box for box in question.boxes if box.page == self.page]

    def covered(self, question: Question) -> float:
        """Returns the share of the gold boxes' area that all blocks together cover."""
        return layout_recall(self.boxes, self.gold(question), len(self.boxes))


def block_pages(document: AnnotatedDocument) -> Iterator[BlockPage]:
    """Yields the pages of a document whose blocks are ranked, with the questions that are asked."""
    gold_pages = [set(question.pages) for question in document.questions]
    for index in sorted({page for each in gold_pages if len(each) == 1 for page in each}):
        page = document.pages[index]
        boxes = tuple(PageBox(index, block.box, page.size) for block in page.paragraphs)
        texts = tuple(f"{block.text.strip()}\n" for block in page.paragraphs)
        found = BlockPage(document, index, texts, boxes, {})
        for number, question in enumerate(document.questions):
            if gold_pages[number] != {index} or not found.gold(question) or len(boxes) < 2:
                continue
            if found.covered(question) >= LEAST_COVERED:
                found.questions[number] = question
        if found.questions:
            yield found


def measure(vlm: VLM, kept: store.Results, page: BlockPage) -> None:
    """Keep the attention from each question about a page, and from the null question (-1)."""
    asked = {-1: NULL_QUESTION} | {n: each.text for n, each in page.questions.items()}
    pages.keep(
        kept,
        page.texts,
        asked,
        lambda: DocumentIndex(vlm, None, [page.texts]),
        [PagePart(0, part) for part in range(len(page.texts))],
        "block",
        document=page.document.name,
        page=page.page,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    from mmheads.models import load

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options = parsed(parser, arguments)
    try:
        found = [page for document in pages.documents() for page in block_pages(document)]
        vlm = load(options.model)
        with pages.results(vlm, SETTINGS) as kept:
            for page in found:
                measure(vlm, kept, page)
    except (ValueError, OSError) as error:
        print(f"cluster.real_blocks: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
