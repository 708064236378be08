"""Rank the pages of real documents with a pretrained text model: what every head attends to.

python -m cluster.real_documents [MODEL.gguf] [--pages N] [--whole]

The documents are those of MMDocIR that are at hand (`MMHEADS_REAL_DOCS`), the shortest first. A
page is the beginning of its text layer, or with `--whole` all of it. The attention of every head
from each question to each page is kept in `runs`, so that sets of heads are compared without the
model; what is interrupted goes on from there. Ship it by `python -m cluster.ship`, and write the
rankings by `python -m cluster.real_ranking`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from cluster.real_model import parsed
from mmheads import paths, store
from mmheads.pdfs import Document, Page
from mmheads.provenance import code_version, hash_json
from mmheads.retrieval import NULL_QUESTION, DocumentIndex, PagePart
from mmheads.tasks.mmdocir import AnnotatedDocument, read_mmdocir

if TYPE_CHECKING:
    from mmheads.models import VLM

KIND = "masses"
VERSION = 1
"""Raised when what is computed changes: shipped results of another version are left out."""
MODULES = ("prefix", "prompts", "attention", "retrieval", "pdfs", "gguf")
"""Modules whose code the kept results depend on."""
SHORT = {"mass": "uint16"}
"""Arrays that are shipped in 16 bits; see `mmheads.tables.write_table`."""

CHARACTERS = 1500
"""Of each page: the first ones of its text layer."""
WINDOW = 8
"""Largest number of pages that share a forward pass."""
SETTINGS = {"characters": CHARACTERS, "window": WINDOW}
WHOLE = {"characters": 0, "window": 4}
"""With all characters of a page; fewer of these fit into a forward pass."""
EMPTY = "(no text)"


def documents() -> list[AnnotatedDocument]:
    """Returns the documents that hold text, the shortest first; those of one length by name.

    Raises:
        ValueError: They are not at hand.
    """
    folder = paths.real_docs("")
    if folder is None:
        raise ValueError("the documents are not at hand; name their folder by MMHEADS_REAL_DOCS")
    found = read_mmdocir(folder).documents
    written = [each for each in found if any(page.text.strip() for page in each.pages)]
    return sorted(written, key=lambda each: (len(each.pages), each.name))


def beginnings(document: Document, characters: int = CHARACTERS) -> Document:
    """Returns a document with only the first characters of each page, or with all of them for 0."""
    pages = [
        dataclasses.replace(page, read_text=partial(_beginning, page, characters))
        for page in document.pages
    ]
    return dataclasses.replace(document, pages=pages)


def _beginning(page: Page, characters: int) -> str:
    return page.text.strip()[: characters or None]


def texts_of(document: Document, characters: int = CHARACTERS) -> list[str]:
    """Returns the pages as the model reads them; see `beginnings`."""
    return [f"{page.text or EMPTY}\n" for page in beginnings(document, characters).pages]


def results(vlm: VLM, settings: Mapping[str, Any] = SETTINGS) -> store.Results:
    """Returns what is kept and shipped of a model, with other candidates by other settings."""
    made = vlm.provenance(
        "cluster.real_documents", NULL_QUESTION, code=code_version(MODULES), **settings
    )
    return store.open(KIND, made, version=VERSION)


def keys(texts: Sequence[str], question: str) -> list[str]:
    """Returns the keys of the rows of a question: its attention to each page, given all of them."""
    pages = hash_json(list(texts))
    return [hash_json([pages, question, page], 16) for page in range(len(texts))]


def measure(vlm: VLM, kept: store.Results, document: AnnotatedDocument) -> None:
    """Keep the attention from each question of a document, and from the null question (-1)."""
    settings = kept.provenance.settings
    texts = texts_of(document, settings["characters"])
    asked = dict.fromkeys([NULL_QUESTION, *(question.text for question in document.questions)])
    keep(
        kept,
        texts,
        dict(enumerate(asked, -1)),
        lambda: DocumentIndex(vlm, None, texts, window=settings["window"]),
        document=document.name,
    )


def keep(
    kept: store.Results,
    texts: Sequence[str],
    asked: Mapping[int, str],
    make_index: Callable[[], DocumentIndex],
    regions: Sequence[PagePart] | None = None,
    candidate: str = "page",
    **about: str | int,
) -> None:
    """Keep the attention from questions to candidates, where it is not kept.

    Args:
        kept: Where it is kept.
        texts: The candidates, by which the rows are found again.
        asked: Questions by number.
        make_index: Returns the index that is asked, if one must be.
        regions: The candidates as parts of what is indexed; by default all of it.
        candidate: What a candidate is: the column of its number.
        about: The document, and what else a row says.
    """
    named = {number: keys(texts, text) for number, text in asked.items()}
    missing = [number for number in asked if named[number][-1] not in kept]
    if not missing:
        return
    start = time.process_time()
    index = make_index()
    seconds = time.process_time() - start
    shape = (index.vlm.geometry.layers, index.vlm.geometry.heads)
    for number in missing:
        masses = index.masses(asked[number], regions, calibrated=False)  # [head, candidate]
        for place, (key, mass) in enumerate(zip(named[number], masses.T.clip(0, 1), strict=True)):
            which = {"document": about["document"], "question": number, **about, candidate: place}
            kept.add(key, which | {"mass": mass.reshape(shape)})
    kept.save()
    asking, windows = time.process_time() - start - seconds, len(index.document.windows)
    print(
        f"{time.strftime('%H:%M:%S')} {', '.join(map(str, about.values()))}: {len(texts)} "
        f"{candidate}s in {windows} windows, {seconds:.0f} s; {len(missing)} questions, "
        f"{asking:.0f} s",
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    from mmheads.models import load

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pages", type=int, default=10_000, help="rank only documents of at most so many pages"
    )
    parser.add_argument("--whole", action="store_true", help="read whole pages")
    options = parsed(parser, arguments)
    try:
        found = [each for each in documents() if len(each.pages) <= options.pages]
        vlm = load(options.model)
        with results(vlm, WHOLE if options.whole else SETTINGS) as kept:
            for document in found:
                measure(vlm, kept, document)
    except (ValueError, OSError) as error:
        print(f"cluster.real_documents: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
