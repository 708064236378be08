"""Rank the pages or regions of a document by the attention of chosen heads (paper A, Sec. 6)."""

from mmheads.retrieval.baselines import bm25_pages, dense_pages
from mmheads.retrieval.candidates import PagePart
from mmheads.retrieval.index import KEEP, NULL_IMAGES, WINDOW, DocumentIndex
from mmheads.retrieval.kept import rank_documents
from mmheads.retrieval.metrics import (
    LAYOUT_CUTS,
    PAGE_CUTS,
    box_area,
    layout_recall,
    page_recall,
    summarise,
)
from mmheads.retrieval.ranking import Ranking, rank
from mmheads.retrieval.windows import NULL_QUESTION
from mmheads.scores import union_of_top

__all__ = [
    "KEEP",
    "LAYOUT_CUTS",
    "NULL_IMAGES",
    "NULL_QUESTION",
    "PAGE_CUTS",
    "WINDOW",
    "DocumentIndex",
    "PagePart",
    "Ranking",
    "bm25_pages",
    "box_area",
    "dense_pages",
    "layout_recall",
    "page_recall",
    "rank",
    "rank_documents",
    "summarise",
    "union_of_top",
]
