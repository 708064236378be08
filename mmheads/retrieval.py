"""Rank the pages and layout elements of a document with heads: prefill once, ask many questions.

    python -m mmheads.retrieval rank --model tiny-qwen3-vl-m --heads scores.parquet \
        --question "? code" file.pdf

A candidate's score is the attention that it gets from the question, less what it gets from a null
question: mean over selected heads and question tokens, sum over its tokens (paper A, arXiv
2605.27243, Sec. 7). Metrics and candidates are those of MMDocIR (arXiv 2501.08828): the pages
(layout elements) of the question's own document.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any

import bm25s
import ir_measures
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import DynamicCache

from mmheads import figures, paths
from mmheads.attention import check_heads, record_keys
from mmheads.evidence import (
    Boxes,
    Prompt,
    Span,
    box_shares,
    encode,
    null_question,
    with_question,
    without_pixels,
)
from mmheads.examples import Example
from mmheads.heads import Head, HeadScores, HeadSet, Provenance
from mmheads.models import VLM, load
from mmheads.prefix import Prefix, prefill
from mmheads.tasks.documents import DPI, Document, PageBox, pdf

PAGE_CUTS = (1, 3, 5)
LAYOUT_CUTS = (1, 5, 10)
WINDOW = 200
"""Pages a forward pass (paper A; 50 for layout crops)."""
NULL_QUESTION = "N/A"
"""Says nothing (paper A, retrieval)."""
NULL_IMAGES = ("none", "pixels", "placeholders")
KEEP = ("device", "cpu")
FORMAT = 1
"""Version of saved indices."""
_SETTINGS = ("count", "window", "overlap", "normalize", "null_images")

Part = str | Image.Image
Candidate = Part | Sequence[Part] | Callable[[], Part | Sequence[Part]]
"""A page image, a text, several of them, or a function that makes it when it is its turn."""


def selection(scores: HeadScores, fraction: float = 0.05) -> HeadSet:
    """The heads to rank with: the union of the tasks' strongest at their longest length (paper A).

    Args:
        scores: Of one task or several, from the detection split.
        fraction: Of all heads, for each task.
    """
    sets = []
    for task in dict.fromkeys(scores.metadata["task"]):
        of_task = scores.where(task=task)
        sets.append(of_task.where(length=of_task.metadata["length"].max()).top(fraction))
    union = sets[0]
    for more in sets[1:]:
        union = union | more
    return union


@dataclass(frozen=True, eq=False)
class Ranking:
    """Candidates in the order of their scores.

    Attributes:
        question: Its texts; "<image>" stands for an image.
        scores: [candidate].
        order: Candidates by score, the best first.
        window: Candidates that shared a forward pass; scores depend on it.
        windows: Forward passes.
        heat: By candidate with one image, the boxes of its visual tokens in its pixels, and their
            scores, which add up to the candidate's (before it is normalised).
        regions: What was ranked, if not whole candidates of the index.
    """

    question: str
    scores: NDArray[np.float32]
    order: list[int]
    window: int
    windows: int
    heat: Mapping[int, tuple[Boxes, NDArray[np.float32]]]
    regions: Sequence[PageBox] | None = None

    def table(self) -> pd.DataFrame:
        """A row a candidate or region, the best first.

        Columns: rank (from 1), candidate (from 0), box (of a region), score, window.
        """
        table = pd.DataFrame(
            {
                "rank": range(1, len(self.order) + 1),
                "candidate": self.order,
                "score": self.scores[self.order],
                "window": self.window,
            }
        )
        if self.regions is not None:
            found = [self.regions[index] for index in self.order]
            table["candidate"] = [region.page for region in found]
            table.insert(2, "box", [region.box for region in found])
        return table

    def picture(self, images: Sequence[Callable[[], Any]], top: int = 3) -> Figure:
        """The best candidates with the heat of their tokens over them.

        Args:
            images: By candidate, a function that gives its image.
            top: How many candidates to show.
        """
        table = self.table().drop_duplicates("candidate")
        shown = table[table["candidate"].isin(list(self.heat))].head(top).to_dict("records")
        if not shown:
            raise ValueError("no candidate has an image whose tokens have a place on it")
        figure = Figure(figsize=(3.2 * len(shown), 4.4), dpi=120, layout="constrained")
        title = f"{self.question}\n(window of {self.window} candidates)"
        figures.set_title(figure, title, fontsize=9)
        limit = max(self.heat[row["candidate"]][1].max() for row in shown)
        axes = figure.subplots(1, len(shown), squeeze=False)[0]
        for row, axis in zip(shown, axes, strict=True):
            image = images[row["candidate"]]()
            axis.imshow(image)
            boxes, values = self.heat[row["candidate"]]
            axis.imshow(
                _raster(boxes, values, image.size),
                extent=(0, image.width, image.height, 0),
                cmap="Reds",
                vmin=0,
                vmax=max(float(limit), 1e-9),
                alpha=0.5,
            )
            axis.set_axis_off()
            axis.set_title(f"{row['rank']}: page {row['candidate'] + 1}, {row['score']:+.4f}")
        return figure


def _raster(
    boxes: Boxes, values: NDArray[np.float32], size: tuple[int, int], cells: int = 256
) -> NDArray[np.float32]:
    """[row, column] sum of the values of the tokens that lie there."""
    scale = cells / max(size)
    canvas = np.zeros((max(1, round(size[1] * scale)), max(1, round(size[0] * scale))), np.float32)
    for box, value in zip(boxes, values, strict=True):
        if not np.isnan(box).any():
            left, top, right, bottom = np.clip(np.round(box * scale), 0, None).astype(int)
            canvas[top : max(bottom, top + 1), left : max(right, left + 1)] += value
    return canvas


@dataclass(frozen=True, eq=False)
class _Window:
    """Candidates that share a forward pass.

    Attributes:
        first: The first of them.
        parts: By candidate, its parts of the context.
        sizes: By part of the context, width and height of an image.
        prefix: The candidates in the cache.
        null: [head, key] attention from the null question to the cached tokens.
    """

    first: int
    parts: tuple[tuple[int, ...], ...]
    sizes: Mapping[int, tuple[int, int]]
    prefix: Prefix
    null: NDArray[np.float32]

    @property
    def prompt(self) -> Prompt:
        return self.prefix.prompt


class DocumentIndex:
    """The candidates of one document in the model's cache: each question costs its own tokens.

    Only the layers up to the deepest of the heads run, for the index and for a question. Scores
    equal those of a forward pass over candidates and question.

    Attributes:
        vlm: The model.
        heads: Those whose attention ranks.
        window: Candidates that share a forward pass.
        overlap: At least so many stand in two neighbouring windows.
        normalize: Divide a candidate's score by its number of tokens.
        count: Number of candidates.
    """

    def __init__(
        self,
        vlm: VLM,
        heads: HeadSet | None,
        candidates: Sequence[Candidate],
        *,
        window: int = WINDOW,
        overlap: int = 0,
        normalize: bool = False,
        null: str = NULL_QUESTION,
        null_images: str = "none",
        instruction: str = "",
        keep: str = "device",
        max_tokens: int = 0,
        progress: bool = False,
    ) -> None:
        """Run the candidates through the model, window by window.

        Args:
            vlm: The model.
            heads: Those that rank; None for all that attend to the whole context.
            candidates: In their order; functions are called when their window is run.
            window: At most so many candidates share a pass. All windows are of one size, as even
                as whole numbers allow, since their scores are compared.
            overlap: At least so many candidates stand in two neighbouring windows; a candidate's
                score is the mean over its windows.
            normalize: See above.
            null: The null question, run once.
            null_images: For a question with images: "none" calibrates with the null question alone;
                "pixels" and "placeholders" run it with these images, or their empty placeholders
                (paper A).
            instruction: Said after the question.
            keep: Where the cache lies between questions: "device" or "cpu".
            max_tokens: See `encode`.
            progress: Show a progress bar.

        Raises:
            ValueError: No candidate, a window that does not fit, or as `encode` and `record_keys`
                do.
        """
        _expect("keep", keep, KEEP)
        _expect("null_images", null_images, NULL_IMAGES)
        if heads is None:
            eligible = vlm.geometry.eligible
            every = tuple(head for head in vlm.every_head if eligible[head])
            heads = HeadSet(every, vlm.geometry, vlm.model_id)
        self.vlm, self.heads = vlm, heads
        if not len(self.heads):
            raise ValueError("no head to rank with; give a set of at least one, or None for all")
        check_heads(vlm, [self.heads], "used to rank")
        self.null, self.null_images = null, null_images
        self.normalize, self.overlap, self.count = normalize, overlap, len(candidates)
        self._windows: list[_Window] = []
        spread = _spread(len(candidates), window, overlap)
        self.window = len(spread[0])
        bar = tqdm(spread, desc="index", unit="window", disable=not progress, leave=False)
        for numbers in bar:
            parts = [_parts(candidates[number]) for number in numbers]
            example = Example(
                context=tuple(part for each in parts for part in each),
                question=(null,),
                instruction=instruction,
            )
            ends = np.cumsum([0, *map(len, parts)])
            self._windows.append(
                self._indexed(
                    encode(vlm, example, max_tokens=max_tokens),
                    numbers[0],
                    tuple(tuple(range(a, b)) for a, b in pairwise(ends)),
                    keep,
                )
            )

    def _indexed(
        self, prompt: Prompt, first: int, parts: tuple[tuple[int, ...], ...], keep: str
    ) -> _Window:
        prefix = prefill(self.vlm, [prompt], layers=self.heads.layers[-1] + 1)
        sizes = {
            number: part.size
            for number, part in enumerate(prompt.example.context)
            if isinstance(part, Image.Image)
        }
        for number, each in enumerate(parts, first):
            if all(prompt.parts[part] is None for part in each):
                raise ValueError(f"candidate {number} has no token: it is blank")
        null = self._attention(prefix, prompt)
        light = prefix.alone(without_pixels(prompt), device="cpu" if keep == "cpu" else "")
        return _Window(first, parts, sizes, light, null)

    def _attention(
        self, prefix: Prefix, prompt: Prompt, *, pixels: bool = True
    ) -> NDArray[np.float32]:
        """[head, key] attention to the cached tokens."""
        start = prefix.start(prompt)
        last = max((int(part.tokens[-1]) for part in prompt.parts if part is not None), default=0)
        if last >= start:
            raise ValueError(
                f"the question {prompt.example.question!r} and the last candidate share a token; "
                "end the candidate's text with a line break"
            )
        rows = torch.from_numpy(prompt.question - start)
        with record_keys(self.vlm, rows, self.heads) as recording:
            prefix.ask(prompt, pixels=pixels)
        attention: NDArray[np.float32] = recording.attention()[:, : prefix.length].numpy()
        missing = prefix.length - attention.shape[1]
        return np.pad(attention, [(0, 0), (0, max(0, missing))])

    @property
    def bytes(self) -> int:
        """Size of the cache and of the null question's attention."""
        return sum(w.prefix.bytes + w.null.nbytes for w in self._windows)

    def masses(
        self,
        question: str | Sequence[Part],
        regions: Sequence[PageBox] | None = None,
        *,
        calibrated: bool = True,
    ) -> NDArray[np.float32]:
        """[head, candidate] attention from the question, in the order of `heads`.

        Args:
            question: Text, or text and images.
            regions: Rank these boxes on the candidates in place of whole ones; `page` is the
                candidate.
            calibrated: Subtract what the null question gives.

        Raises:
            ValueError: The question is empty, or a region does not lie on a candidate's image.
        """
        asked = _asked(question)
        attentions = [self._looks(each, asked, calibrated) for each in self._windows]
        return self._sums(attentions, regions)

    def rank(
        self,
        question: str | Sequence[Part],
        regions: Sequence[PageBox] | None = None,
        *,
        calibrated: bool = True,
    ) -> Ranking:
        """Rank candidates, or regions of them, for a question; see `masses`."""
        asked = _asked(question)
        attentions = [
            self._looks(each, asked, calibrated).mean(axis=0, keepdims=True)
            for each in self._windows
        ]
        scores = self._sums(attentions, regions)[0]
        text = " ".join(part if isinstance(part, str) else "<image>" for part in asked)
        return Ranking(
            text,
            scores,
            rank(scores),
            self.window,
            len(self._windows),
            self._heat(attentions),
            regions,
        )

    def _looks(
        self, window: _Window, question: tuple[Part, ...], calibrated: bool
    ) -> NDArray[np.float32]:
        """[head, key] attention from a question to a window's tokens."""
        prompt = with_question(self.vlm, window.prompt, question)
        attention = self._attention(window.prefix, prompt)
        if not calibrated:
            return attention
        if self.null_images == "none" or all(isinstance(part, str) for part in question):
            return attention - window.null
        empty = with_question(self.vlm, window.prompt, null_question(question, self.null))
        pixels = self.null_images == "pixels"
        return attention - self._attention(window.prefix, empty, pixels=pixels)

    def _sums(
        self, attentions: Sequence[NDArray[np.float32]], regions: Sequence[PageBox] | None
    ) -> NDArray[np.float32]:
        """[head, candidate] sums over tokens, means over windows."""
        count = self.count if regions is None else len(regions)
        total = np.zeros((len(attentions[0]), count), np.float32)
        seen = np.zeros(count)
        for window, attention in zip(self._windows, attentions, strict=True):
            for number, span in self._spans(window, regions):
                mass = attention[:, span.tokens] @ span.weights
                total[:, number] += mass / span.weights.sum() if self.normalize else mass
                seen[number] += 1
        if not seen.all():
            first = int(seen.argmin())
            name = f"candidate {first}" if regions is None else str(regions[first])
            raise ValueError(f"{name} covers no token of the {self.count} candidates")
        return np.divide(total, seen, dtype=np.float32)

    def _spans(
        self, window: _Window, regions: Sequence[PageBox] | None
    ) -> Iterator[tuple[int, Span]]:
        """The tokens of what is ranked, as far as it stands in a window."""
        prompt = window.prompt
        if regions is None:
            for number, parts in enumerate(window.parts, window.first):
                spans = [span for part in parts if (span := prompt.parts[part]) is not None]
                if spans:
                    tokens = np.concatenate([span.tokens for span in spans])
                    yield number, Span(tokens, np.concatenate([span.weights for span in spans]))
            return
        for number, region in enumerate(regions):
            if 0 <= region.page - window.first < len(window.parts):
                part = self._image(window, region.page)
                whole = None if part is None else prompt.parts[part]
                if part is None or whole is None:
                    continue
                wide, high = np.divide(window.sizes[part], region.size)
                left, top, right, bottom = region.box
                box = (left * wide, top * high, right * wide, bottom * high)
                weights = box_shares(prompt.boxes[part], box).astype(np.float32)
                inside = weights > 0
                if inside.any():
                    yield number, Span(whole.tokens[inside], weights[inside])

    @staticmethod
    def _image(window: _Window, candidate: int) -> int | None:
        """The part that is the candidate's image, if it has one whose tokens have places."""
        parts = [p for p in window.parts[candidate - window.first] if p in window.prompt.boxes]
        if len(parts) > 1:
            raise ValueError(
                f"candidate {candidate} has {len(parts)} images; regions need one each"
            )
        return parts[0] if parts else None

    def _heat(
        self, attentions: Sequence[NDArray[np.float32]]
    ) -> dict[int, tuple[Boxes, NDArray[np.float32]]]:
        """By candidate with one image, places and scores of its tokens."""
        found: dict[int, list[NDArray[np.float32]]] = {}
        boxes: dict[int, Boxes] = {}
        for window, attention in zip(self._windows, attentions, strict=True):
            for number, parts in enumerate(window.parts, window.first):
                images = [part for part in parts if part in window.prompt.boxes]
                span = window.prompt.parts[images[0]] if len(images) == 1 else None
                if span is not None:
                    (part,) = images
                    boxes[number] = window.prompt.boxes[part]
                    found.setdefault(number, []).append(attention[:, span.tokens].mean(axis=0))
        return {number: (boxes[number], np.mean(seen, axis=0)) for number, seen in found.items()}

    def save(self, path: str | Path) -> None:
        """Write the index to a file (safetensors), whole or not at all."""
        tensors: dict[str, torch.Tensor] = {}
        windows = []
        for number, window in enumerate(self._windows):
            prompt, prefix = window.prompt, window.prefix
            tensors[f"{number}.null"] = torch.from_numpy(window.null)
            for name, value in prompt.inputs.items():
                tensors[f"{number}.inputs.{name}"] = value
            for part, boxes in prompt.boxes.items():
                tensors[f"{number}.boxes.{part}"] = torch.from_numpy(boxes)
            layers: list[Any] = prefix.cache.layers
            for layer, held in enumerate(layers):
                tensors[f"{number}.keys.{layer}"] = held.keys
                tensors[f"{number}.values.{layer}"] = held.values
            windows.append(
                {
                    "first": window.first,
                    "parts": window.parts,
                    "sizes": window.sizes,
                    "context": [p if isinstance(p, str) else None for p in prompt.example.context],
                    "replacements": prompt.replacements,
                    "length": prefix.length,
                    "layers": len(layers),
                    "masked": prefix.masked,
                }
            )
        about = {
            "provenance": asdict(self._provenance()),
            "heads": list(self.heads),
            **{name: getattr(self, name) for name in _SETTINGS},
            "instruction": self._windows[0].prompt.example.instruction,
            "windows": windows,
        }
        with paths.write_whole(Path(path)) as whole:
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()},
                whole,
                metadata={"mmheads": json.dumps(about)},
            )

    @classmethod
    def load(cls, path: str | Path, vlm: VLM, *, keep: str = "device") -> DocumentIndex:
        """Read an index that `save` wrote.

        Raises:
            ValueError: There is no such file, it is broken, or it was made with another model,
                version or setting.
        """
        _expect("keep", keep, KEEP)
        path = Path(path)
        if not path.is_file():
            raise ValueError(
                f"{path} does not exist; expected a file that DocumentIndex.save wrote"
            )
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {})["mmheads"])
                made = Provenance(**about["provenance"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no whole index that DocumentIndex.save wrote") from error
        index = cls.__new__(cls)
        index.vlm, index.null = vlm, made.null_question
        if different := made.differences(index._provenance()):
            raise ValueError(f"{path} was indexed otherwise: {different}; index the document again")
        for name in _SETTINGS:
            setattr(index, name, about[name])
        index.heads = HeadSet(tuple(Head(*h) for h in about["heads"]), vlm.geometry, vlm.model_id)
        index._windows = [
            _restored(vlm, each, about["instruction"], _of(tensors, f"{number}."), index.null, keep)
            for number, each in enumerate(about["windows"])
        ]
        return index

    def _provenance(self) -> Provenance:
        return self.vlm.provenance("mmheads.retrieval", self.null, format=FORMAT)


def _of(tensors: Mapping[str, torch.Tensor], start: str) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix(start): tensor
        for name, tensor in tensors.items()
        if name.startswith(start)
    }


def _restored(
    vlm: VLM,
    about: Mapping[str, Any],
    instruction: str,
    tensors: Mapping[str, torch.Tensor],
    null: str,
    keep: str,
) -> _Window:
    """A window of a saved index."""
    blank = Image.new("L", (1, 1))
    boxes = _of(tensors, "boxes.")
    bare = Prompt(
        example=Example(
            context=tuple(blank if part is None else part for part in about["context"]),
            question=(null,),
            instruction=instruction,
        ),
        inputs=_of(tensors, "inputs."),
        question=np.empty(0, np.int64),
        parts=(),
        evidence=(),
        candidates={},
        boxes={int(part): array.numpy() for part, array in boxes.items()},
        replacements=tuple(about["replacements"]),
    )
    cache = DynamicCache()
    for layer in range(about["layers"]):
        cache.update(tensors[f"keys.{layer}"], tensors[f"values.{layer}"], layer)
    prefix = Prefix(
        vlm, with_question(vlm, bare, (null,)), about["length"], cache, masked=about["masked"]
    )
    return _Window(
        about["first"],
        tuple(map(tuple, about["parts"])),
        {int(part): tuple(size) for part, size in about["sizes"].items()},
        prefix if keep == "cpu" else prefix.alone(prefix.prompt),
        tensors["null"].numpy(),
    )


def _spread(count: int, window: int, overlap: int) -> list[range]:
    """Windows of one size that cover all candidates."""
    if not count or window < 1 or not 0 <= overlap < window:
        raise ValueError(
            f"{count} candidates in windows of {window} that overlap by {overlap}: expected at "
            "least one candidate, a window of at least one, and an overlap less than the window"
        )
    windows = 1 if count <= window else ceil((count - overlap) / (window - overlap))
    size = ceil((count + (windows - 1) * overlap) / windows)
    starts = np.linspace(0, count - size, windows).round().astype(int)
    return [range(start, start + size) for start in starts.tolist()]


def _parts(candidate: Candidate) -> tuple[Part, ...]:
    made = candidate() if callable(candidate) else candidate
    parts = (made,) if isinstance(made, (str, Image.Image)) else tuple(made)
    if not all(isinstance(part, (str, Image.Image)) for part in parts):
        raise ValueError(f"a candidate holds {parts}; expected texts and images")
    return parts


def _expect(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}; expected one of {tuple(known)}")


def _asked(question: str | Sequence[Part]) -> tuple[Part, ...]:
    asked = (question,) if isinstance(question, (str, Image.Image)) else tuple(question)
    if not any(not isinstance(part, str) or part.strip() for part in asked):
        raise ValueError("the question is empty; expected text or an image")
    return asked


def page_recall(
    rankings: Sequence[Sequence[int]],
    gold: Sequence[Iterable[int]],
    cuts: Sequence[int] = PAGE_CUTS,
) -> NDArray[np.float64]:
    """Share of each question's gold pages among the first of its ranking -> [question, cut].

    Computed by `ir_measures`, as R@k.

    Raises:
        ValueError: A question has no gold page, or a cut is less than 1.
    """
    wanted = [set(pages) for pages in gold]
    if len(rankings) != len(wanted) or any(len(set(r)) < len(r) for r in rankings):
        raise ValueError(
            f"{len(rankings)} rankings of {len(wanted)} questions: expected one each, with every "
            "page once"
        )
    if not all(wanted) or min(cuts) < 1:
        raise ValueError(
            f"recall at {tuple(cuts)}, gold pages {wanted}: expected cuts of 1 or more, and a page "
            "for every question"
        )
    relevant = [
        ir_measures.Qrel(str(number), str(page), 1)
        for number, pages in enumerate(wanted)
        for page in pages
    ]
    found = [
        ir_measures.ScoredDoc(str(number), str(page), -place)
        for number, ranking in enumerate(rankings)
        for place, page in enumerate(ranking)
    ]
    measures = {ir_measures.R @ cut: column for column, cut in enumerate(cuts)}
    recall = np.zeros((len(wanted), len(cuts)))
    for metric in ir_measures.iter_calc(list(measures), relevant, found):
        recall[int(metric.query_id), measures[metric.measure]] = metric.value
    return recall


def layout_recall(ranking: Sequence[PageBox], gold: Sequence[PageBox], k: int) -> float:
    """Share of the area of the gold boxes that the first `k` boxes of a ranking cover.

    There is no penalty for size: the box of a whole page covers all gold on it. Look at `box_area`
    beside it. Where boxes overlap each other, their common area counts once.

    Raises:
        ValueError: The gold boxes have no area, or `k` is less than 1.
    """
    found = list(ranking[:k])
    covered = total = 0.0
    for page in {box.page for box in gold}:
        here = [box for box in gold if box.page == page]
        wanted = [_points(box) for box in here]
        shown = [_points(box, here[0].size) for box in found if box.page == page]
        total += _area(wanted)
        covered += _area(wanted, shown)
    if not total or k < 1:
        raise ValueError(f"recall at {k} of gold boxes of area {total}: expected both above 0")
    return covered / total


def box_area(ranking: Sequence[PageBox], k: int) -> float:
    """Area of the first `k` boxes in pages: 1.0 is as much as one whole page."""
    return sum(_area([_points(box)]) / (box.size[0] * box.size[1]) for box in ranking[:k])


def _points(
    box: PageBox, size: tuple[float, float] | None = None
) -> tuple[float, float, float, float]:
    """A box with its corners in order and inside its page, in units of a page of `size`."""
    (left, top, right, bottom), (width, height) = box.box, box.size
    wide, high = np.divide(size or box.size, box.size)
    across = np.clip(sorted((left, right)), 0, width) * wide
    down = np.clip(sorted((top, bottom)), 0, height) * high
    return float(across[0]), float(down[0]), float(across[1]), float(down[1])


def _area(
    boxes: Sequence[tuple[float, ...]], inside: Sequence[tuple[float, ...]] | None = None
) -> float:
    """Area that boxes cover, once; with `inside`, that of it which these cover too."""
    if not boxes or inside == []:
        return 0.0
    corners = np.array([*boxes, *(inside or [])])
    x, y = np.unique(corners[:, [0, 2]]), np.unique(corners[:, [1, 3]])
    cells = np.outer(np.diff(y), np.diff(x))

    def covered(some: Sequence[tuple[float, ...]]) -> NDArray[np.bool_]:
        mask = np.zeros(cells.shape, dtype=bool)
        for left, top, right, bottom in some:
            mask[
                np.ix_((y[:-1] >= top) & (y[1:] <= bottom), (x[:-1] >= left) & (x[1:] <= right))
            ] = True
        return mask

    mask = covered(boxes) if inside is None else covered(boxes) & covered(inside)
    return float(cells[mask].sum())


def bm25_pages(document: Document, questions: Sequence[str]) -> NDArray[np.float32]:
    """BM25 scores of a document's pages by their text -> [question, page].

    Lucene's variant with its usual k1 = 1.5, b = 0.75, English stop words, no stemming; a page
    without text scores 0.
    """
    tokens = bm25s.tokenize(
        [page.text for page in document.pages], stopwords="en", show_progress=False
    )
    scores = np.zeros((len(questions), len(document.pages)), np.float32)
    if not tokens.vocab or not any(len(ids) for ids in tokens.ids):
        return scores
    index = bm25s.BM25()
    index.index(tokens, show_progress=False)
    asked: Any = bm25s.tokenize(
        list(questions), stopwords="en", return_ids=False, show_progress=False
    )
    for row, words in enumerate(asked):
        known = [word for word in words if word in tokens.vocab]
        if known:
            scores[row] = index.get_scores(known)
    return scores


def dense_pages(
    document: Document, questions: Sequence[str], retriever: Any, *, images: bool = False
) -> NDArray[np.float32]:
    """Similarities of a dense retriever -> [question, page].

    Args:
        document: Its pages are embedded one by one.
        questions: In words.
        retriever: A `sentence_transformers.SentenceTransformer` (version 5 or newer).
        images: Embed pictures of the pages, for a retriever that reads them; else their text.
    """
    pages = [page.image() if images else page.text for page in document.pages]
    similarity = retriever.similarity(
        retriever.encode_query(list(questions)), retriever.encode_document(pages)
    )
    return np.asarray(similarity, dtype=np.float32)


def rank(scores: NDArray[np.floating[Any]]) -> list[int]:
    """Candidates by score, the best first; equal ones in their order."""
    return [int(index) for index in np.argsort(-scores, kind="stable")]


def summarise(table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Means of metric columns, a row a domain, then "macro" and "micro" with n each.

    Micro is the mean over questions, macro the mean of the domains' means (MMDocIR).
    """
    domains = table.groupby("domain")[list(columns)].mean()
    domains["n"] = table.groupby("domain").size()
    summary = pd.DataFrame(
        [domains[list(columns)].mean(), table[list(columns)].mean()], index=["macro", "micro"]
    )
    summary["n"] = [len(domains), len(table)]
    return pd.concat([domains, summary]).rename_axis("domain").reset_index()


def main(arguments: list[str] | None = None) -> int:
    """`python -m mmheads.retrieval`: rank the pages of a PDF for a question, and show where."""
    parser = argparse.ArgumentParser(prog="python -m mmheads.retrieval")
    ranks = parser.add_subparsers(required=True).add_parser(
        "rank", help="rank the pages of a PDF file for a question"
    )
    ranks.add_argument("pdf", help="the document")
    ranks.add_argument("--model", required=True, help="folder, or name on the hub")
    ranks.add_argument("--heads", required=True, help="scores of its heads, from mmheads.scoring")
    ranks.add_argument("--question", required=True)
    ranks.add_argument("--fraction", type=float, default=0.05, help="share of heads a task")
    ranks.add_argument("--window", type=int, default=WINDOW, help="pages a forward pass")
    ranks.add_argument("--dpi", type=int, default=DPI, help="resolution of the pages")
    ranks.add_argument("--top", type=int, default=5, help="pages to print")
    ranks.add_argument("--out", default="", help="picture, default <document>.rank.png here")
    ranks.add_argument("--device", default="", help="cpu, cuda:0 or auto")
    args = parser.parse_args(arguments)
    try:
        _asked(args.question)
        document = pdf(args.pdf, dpi=args.dpi)
        images = [page.image for page in document.pages]
        chosen = selection(HeadScores.load(args.heads), args.fraction)
        vlm = load(args.model, device=args.device)
        index = DocumentIndex(vlm, chosen, images, window=args.window, progress=True)
        ranking = index.rank(args.question)
        for row in ranking.table().head(args.top).to_dict("records"):
            print(f"{row['rank']:>4}  page {row['candidate'] + 1:<5} {row['score']:+.5f}")
        windows = f"{len(images)} pages in windows of {ranking.window}"
        print(f"{len(index.heads)} heads of {vlm}; {windows}")
        out = Path(args.out or f"{Path(args.pdf).stem}.rank.png")
        with paths.write_whole(out) as path:
            ranking.picture(images).savefig(path)
        print(out)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
