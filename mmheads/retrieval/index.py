"""Index a document once, then rank its pages or regions for many questions.

A candidate's score is the attention that it gets from the question, minus the attention that it
gets from a null question: mean over selected heads and question tokens, sum over its tokens
(paper A, arXiv 2605.27243, Sec. 7).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmheads.attention.hook import check_heads
from mmheads.checks import expect_one_of
from mmheads.heads import Head, HeadSet
from mmheads.models import VLM
from mmheads.prompts import null_question
from mmheads.retrieval.candidates import (
    Candidate,
    Part,
    Place,
    check_candidates,
    check_regions,
    question_parts,
    spread,
)
from mmheads.retrieval.ranking import Heat, Ranking, rank
from mmheads.retrieval.saved import put_window, read_index, write_index
from mmheads.retrieval.windows import (
    NULL_QUESTION,
    IndexedDocument,
    index_candidates,
    question_attention,
)

WINDOW = 200
"""Candidates per forward pass (paper A; it takes 50 for crops of layout elements)."""


NULL_IMAGES = ("placeholders", "pixels", "none")


KEEP = ("device", "cpu", "disk")


SMALL_REGION = 0.01
"""Tokens; a region that covers less of its page is probably given in another unit."""


Attention = NDArray[np.float32]
"""[head, key] of one window."""


class DocumentIndex:
    """The candidates of one document in a model's cache; each question costs its own tokens.

    Only the layers up to the deepest of the heads run, for the index and for a question. Scores
    equal those of a forward pass over candidates and question.

    Attributes:
        vlm: The model.
        document: The candidates after they have run through the model.
        heads: The heads whose attention ranks.
        count: Number of candidates.
        window: Number of candidates per forward pass.
        overlap: Least number of candidates that two neighbouring windows share.
        bytes: Bytes of the cache in memory and of the null question's attention.
    """

    def __init__(
        self,
        vlm: VLM,
        heads: HeadSet | None,
        candidates: Sequence[Candidate] | IndexedDocument,
        *,
        window: int = WINDOW,
        overlap: int = 0,
        instruction: str = "",
        keep: str = "device",
        max_tokens: int = 0,
        path: str | Path = "",
        about: str = "",
        progress: bool = False,
    ) -> None:
        """Run the candidates through the model, window by window.

        Args:
            vlm: The model.
            heads: The heads whose attention ranks; None for all that attend to the whole context.
            candidates: Images, texts, lists of them, or functions that make one of these when their
                window is run. An `IndexedDocument` is taken as it is, with its own heads and
                settings.
            window: Largest number of candidates per forward pass. All windows are of one size, as
                even as whole numbers allow, because their scores are compared.
            overlap: Least number of candidates that two neighbouring windows share; the score of a
                shared candidate is the mean over its windows.
            instruction: Text after each question.
            keep: Where the cache is kept between questions: "device", "cpu" or "disk". On disk,
                `path` is a folder with a file for each window; only one of them is in memory.
            max_tokens: Longest prompt allowed, in tokens; by default what the model's positions
                allow.
            path: File, or folder on disk, in which the index is kept while it grows, and from which
                it goes on if it holds a part of the same index; by default it is only in memory.
            about: What the candidates are; a file with other words is refused.
            progress: Show a progress bar.

        Raises:
            TypeError: The heads or the candidates are of another type.
            ValueError: There is no candidate or no head, one is blank or the name of a file, a
                window does not fit, the heads are of another model, `path` is missing or of the
                other kind, or as `encode` does.
        """
        self.vlm = vlm
        if isinstance(candidates, IndexedDocument):
            self.document = candidates
        else:
            _check_keep(keep, path)
            check_candidates(candidates)
            count = len(candidates)
            ranges = spread(count, window, overlap)
            chosen = _checked_heads(vlm, heads)
            begun = IndexedDocument(chosen, (), overlap, instruction, max_tokens, count, about)
            if path and (Path(path).is_file() or any(Path(path).glob("*.safetensors"))):
                kept = read_index(Path(path), vlm, keep=keep)
                begun = _continued(Path(path), begun, kept, ranges)
            on_disk = keep == "disk"
            self.document = index_candidates(
                vlm,
                begun,
                candidates,
                ranges,
                keep=keep,
                progress=progress,
                save=partial(write_index, Path(path), vlm) if path and not on_disk else None,
                put=partial(put_window, Path(path), vlm) if on_disk else None,
            )
        windows = self.document.windows
        self.heads = self.document.heads
        self.count = self.document.count
        self.window = len(windows[0].parts)
        self.overlap = self.document.overlap
        self.bytes = sum(each.prefix.bytes + each.null_attention.nbytes for each in windows)
        self._null = {NULL_QUESTION: [each.null_attention for each in windows]}

    @classmethod
    def load(cls, path: str | Path, vlm: VLM, *, keep: str = "device") -> DocumentIndex:
        """Read an index that `save` wrote, or one on disk, with `keep="disk"`.

        Raises:
            ValueError: There is no such file, it is damaged, it holds only a part of its
                candidates, or it was made with another model, other weights, another version or
                other settings.
        """
        _check_keep(keep, path)
        document = read_index(Path(path), vlm, keep=keep)
        if document.done < document.count:
            raise ValueError(
                f"{path} holds only the first {document.done} of {document.count} candidates; "
                "index them again with this path, and it goes on from there"
            )
        return cls(vlm, None, document)

    def save(self, path: str | Path) -> None:
        """Write the index to a file (safetensors), whole or not at all.

        Raises:
            ValueError: It is kept on disk, in its own folder.
            OSError: The file cannot be written.
        """
        write_index(Path(path), self.vlm, self.document)

    def masses(
        self,
        question: str | Sequence[Part],
        regions: Sequence[Place] | None = None,
        *,
        calibrated: bool = True,
        null: str = NULL_QUESTION,
        null_images: str = "placeholders",
        normalize: bool = False,
    ) -> NDArray[np.float32]:
        """[head, candidate] attention from the question, in the order of `heads`.

        Args:
            question: A text, or texts and images.
            regions: Boxes or parts to rank in place of whole candidates; their `page` is the
                number of the candidate.
            calibrated: Subtract the attention from the null question.
            null: The null question. The index holds the attention from "N/A"; another one is run
                once for each window, when it is first asked for.
            null_images: What the null question shows where the question shows images:
                "placeholders" leaves the positions of the images empty (as the authors' code of
                paper A does), "pixels" shows the images again, and "none" has only text. "pixels"
                also subtracts what the images of the question find by themselves, and with it
                most of the score where the question shows what is searched for.
            normalize: Divide the attention to a candidate by its number of tokens.

        Raises:
            TypeError: The question or the regions are of another type.
            ValueError: The question is empty or too long, a region covers no token of a
                candidate's image, or the attention of a head is not finite.
        """
        looks = self._attention(question, regions, calibrated, null, null_images)
        return _sums(self.document, [own - empty for own, empty in looks], regions, normalize)

    def rank(
        self,
        question: str | Sequence[Part],
        regions: Sequence[Place] | None = None,
        *,
        calibrated: bool = True,
        null: str = NULL_QUESTION,
        null_images: str = "placeholders",
        normalize: bool = False,
        top: int | None = None,
    ) -> Ranking:
        """Rank candidates, or regions of them, for a question, which is run once for both.

        Args:
            question: See `masses`.
            regions: See `masses`.
            calibrated: See `masses`.
            null: See `masses`.
            null_images: See `masses`.
            normalize: See `masses`.
            top: Keep only the best ones in the order; by default all.

        Raises:
            TypeError: See `masses`.
            ValueError: See `masses`; or `top` is below 1.
        """
        if top is not None and (not isinstance(top, int) or top < 1):
            raise ValueError(f"top is {top!r}; expected a whole number of at least 1, or None")
        looks = self._attention(question, regions, calibrated, null, null_images)
        means = [(own - empty).mean(axis=0, keepdims=True) for own, empty in looks]
        scores = _sums(self.document, means, None, normalize)[0]
        texts = [p if isinstance(p, str) else "<image>" for p in question_parts(question)]
        ranking = Ranking(
            " ".join(texts),
            scores,
            rank(scores)[:top],
            self.window,
            len(self.document.windows),
            _heat(self.document, means),
            _heat(self.document, [own.mean(axis=0, keepdims=True) for own, _ in looks]),
        )
        if regions is None:
            return ranking
        scores = _sums(self.document, means, regions, normalize)[0]
        order = rank(scores)[:top]
        return dataclasses.replace(
            ranking, scores=scores, order=order, regions=regions, candidates=ranking
        )

    def _attention(
        self,
        question: str | Sequence[Part],
        regions: Sequence[Place] | None,
        calibrated: bool,
        null: str,
        null_images: str,
    ) -> list[tuple[Attention, Attention]]:
        """By window, attention from the question and from the null question (0 if not asked)."""
        parts = question_parts(question)
        expect_one_of("null_images", null_images, NULL_IMAGES)
        if not isinstance(null, str) or not null.strip():
            raise ValueError(f"the null question is {null!r}; expected a text that is not empty")
        if regions is not None:
            check_regions(regions)
        windows = self.document.windows
        own = [question_attention(self.document, window, parts) for window in windows]
        if not calibrated:
            return [(attention, np.zeros_like(attention)) for attention in own]
        if null_images == "none" or all(isinstance(part, str) for part in parts):
            return list(zip(own, self._of_null(null), strict=True))
        empty, pixels = null_question(parts, null), null_images == "pixels"
        return [
            (attention, question_attention(self.document, window, empty, pixels=pixels))
            for attention, window in zip(own, windows, strict=True)
        ]

    def _of_null(self, null: str) -> list[Attention]:
        """By window, the attention from a null question of only text, computed once."""
        if null not in self._null:
            windows = self.document.windows
            self._null[null] = [question_attention(self.document, w, (null,)) for w in windows]
        return self._null[null]


def _check_keep(keep: str, path: str | Path) -> None:
    expect_one_of("keep", keep, KEEP)
    if keep == "disk" and (not path or Path(path).is_file()):
        raise ValueError(f"path is {str(path)!r}; expected a folder, in which to keep the index")
    if keep != "disk" and path and Path(path).is_dir():
        raise ValueError(f'{path} is not a file; keep="disk" keeps an index in a folder')


def _continued(
    path: Path, begun: IndexedDocument, kept: IndexedDocument, ranges: Sequence[range]
) -> IndexedDocument:
    """The windows of a file, if they are the first ones of an index that has begun."""
    done = [range(w.first, w.first + len(w.parts)) for w in kept.windows]
    before = {"heads": str(kept.heads), **kept.settings, "windows": done}
    now = {"heads": str(begun.heads), **begun.settings, "windows": list(ranges[: len(done)])}
    different = [
        f"{name} {value!r}, now {now[name]!r}"
        for name, value in before.items()
        if value != now[name]
    ]
    if different:
        raise ValueError(
            f"{path} is an index of other things ({'; '.join(different)}); name another file, or "
            "delete it"
        )
    return dataclasses.replace(begun, windows=kept.windows)


def _sums(
    document: IndexedDocument,
    attentions: Sequence[Attention],
    regions: Sequence[Place] | None,
    normalize: bool,
) -> NDArray[np.float32]:
    """[head, candidate] sums over tokens, means over windows."""
    count = document.count if regions is None else len(regions)
    total = np.zeros((len(attentions[0]), count), np.float32)
    windows, covered = np.zeros(count), np.zeros(count)
    for window, attention in zip(document.windows, attentions, strict=True):
        for number, span in window.spans() if regions is None else window.region_spans(regions):
            mass = attention[:, span.tokens] @ span.weights
            total[:, number] += mass / span.weights.sum() if normalize else mass
            windows[number] += 1
            covered[number] = span.weights.sum()
    if regions is not None and not windows.all():
        missed = regions[int(windows.argmin())]
        raise ValueError(f"{missed} covers no token of the {document.count} candidates")
    if regions is not None and (covered < SMALL_REGION).any():
        small = np.flatnonzero(covered < SMALL_REGION)
        warnings.warn(
            f"{len(small)} of {count} regions cover less than {SMALL_REGION} of a token, first "
            f"{regions[small[0]]}; boxes are in the unit of the page's `size`, not relative",
            stacklevel=3,
        )
    return np.divide(total, windows, dtype=np.float32)


def _heat(document: IndexedDocument, attentions: Sequence[Attention]) -> Heat:
    """By candidate with one image, the places and scores of its tokens; means over windows."""
    values: dict[int, list[NDArray[np.float32]]] = {}
    boxes = {}
    for window, attention in zip(document.windows, attentions, strict=True):
        for number in range(window.first, window.first + len(window.parts)):
            images = window.image_parts(number)
            span = window.prompt.parts[images[0]] if len(images) == 1 else None
            if span is not None:
                boxes[number] = window.prompt.boxes[images[0]]
                values.setdefault(number, []).append(attention[:, span.tokens].mean(axis=0))
    return {number: (boxes[number], np.mean(each, axis=0)) for number, each in values.items()}


def _checked_heads(vlm: VLM, heads: HeadSet | None) -> HeadSet:
    """Heads of this model, at least one; all eligible ones for None."""
    if heads is None:
        eligible = np.argwhere(vlm.geometry.eligible).tolist()
        return HeadSet(tuple(Head(*head) for head in eligible), vlm.geometry, vlm.model_id)
    if not isinstance(heads, HeadSet):
        raise TypeError(
            f"heads are {heads!r}; expected a HeadSet, as `HeadScores.top` gives, or None for all"
        )
    if not len(heads):
        raise ValueError("there is no head to rank with; give at least one, or None for all")
    check_heads(vlm, [heads], "used to rank")
    return heads
