"""Rankings of pages that use no attention: BM25, and a dense text retriever."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import bm25s
import numpy as np
from numpy.typing import NDArray

from mmheads.pdfs import Document


def bm25_pages(document: Document, questions: Sequence[str]) -> NDArray[np.float32]:
    """BM25 scores of a document's pages by their text -> [question, page].

    Lucene's variant with its usual k1 = 1.5, b = 0.75, English stop words, no stemming; a page
    without text scores 0.
    """
    texts = [page.text for page in document.pages]
    tokens = bm25s.tokenize(texts, stopwords="en", show_progress=False)
    scores = np.zeros((len(questions), len(document.pages)), np.float32)
    if not any(len(ids) for ids in tokens.ids):
        return scores
    index = bm25s.BM25()
    index.index(tokens, show_progress=False)
    question_words: Any = bm25s.tokenize(
        list(questions), stopwords="en", return_ids=False, show_progress=False
    )
    for row, words in enumerate(question_words):
        if words:
            scores[row] = index.get_scores(words)
    return scores


def dense_pages(
    document: Document, questions: Sequence[str], retriever: Any, *, images: bool = False
) -> NDArray[np.float32]:
    """Similarities of a dense retriever -> [question, page].

    Args:
        document: The document; each of its pages is embedded as a whole.
        questions: The texts of the questions.
        retriever: A `sentence_transformers.SentenceTransformer` (version 5 or newer).
        images: Embed pictures of the pages, for a retriever that reads them, instead of their text.
    """
    pages = [page.image() if images else page.text for page in document.pages]
    similarity = retriever.similarity(
        retriever.encode_query(list(questions)), retriever.encode_document(pages)
    )
    return np.asarray(similarity, dtype=np.float32)
