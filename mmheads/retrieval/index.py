"""Index a document once, then rank its pages or regions for many questions.

A candidate's score is the attention that it gets from the question, less what it gets from a null
question: mean over selected heads and question tokens, sum over its tokens (paper A, arXiv
2605.27243, Sec. 7).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import DynamicCache

from mmheads import paths
from mmheads.attention.hook import check_heads
from mmheads.examples import Example
from mmheads.families import Boxes, box_shares
from mmheads.heads import Head, HeadSet
from mmheads.models import VLM
from mmheads.prefix import Prefix, prefill
from mmheads.prompts import (
    Prompt,
    Question,
    Span,
    ask,
    encode,
    null_question,
    restore,
    without_pixels,
)
from mmheads.retrieval.ranking import Ranking, rank
from mmheads.scores import HeadScores, Provenance
from mmheads.tasks.documents import PageBox

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
            ValueError: No candidate, a window that does not fit, or as `encode` and `prefill` do.
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
        prefix = prefill(self.vlm, prompt, layers=self.heads.layers[-1] + 1)
        sizes = {
            number: part.size
            for number, part in enumerate(prompt.example.context)
            if isinstance(part, Image.Image)
        }
        for number, each in enumerate(parts, first):
            if all(prompt.parts[part] is None for part in each):
                raise ValueError(f"candidate {number} has no token: it is blank")
        null = self._attention(prefix, prompt.own)
        light = prefix.alone(without_pixels(prompt), device="cpu" if keep == "cpu" else "")
        return _Window(first, parts, sizes, light, null)

    def _attention(
        self, prefix: Prefix, question: Question, *, pixels: bool = True
    ) -> NDArray[np.float32]:
        """[head, key] attention to the cached tokens."""
        last = max((int(part.tokens[-1]) for part in question.context if part), default=0)
        if last >= prefix.start(question):
            raise ValueError(
                f"the question {question.parts!r} and the last candidate share a token; "
                "end the candidate's text with a line break"
            )
        return prefix.keys(question, self.heads, pixels=pixels)

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
        asked = question_parts(question)
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
        asked = question_parts(question)
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
        asked = ask(self.vlm, window.prompt, question)
        attention = self._attention(window.prefix, asked)
        if not calibrated:
            return attention
        if self.null_images == "none" or all(isinstance(part, str) for part in question):
            return attention - window.null
        empty = ask(self.vlm, window.prompt, null_question(question, self.null))
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
            assert prefix.cache is not None, "Prefix.alone refuses a context that is not cached"
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
    example = Example(
        context=tuple(blank if part is None else part for part in about["context"]),
        question=(null,),
        instruction=instruction,
    )
    boxes = {int(part): array.numpy() for part, array in _of(tensors, "boxes.").items()}
    prompt = restore(vlm, example, _of(tensors, "inputs."), about["replacements"], boxes)
    cache = DynamicCache()
    for layer in range(about["layers"]):
        cache.update(tensors[f"keys.{layer}"], tensors[f"values.{layer}"], layer)
    prefix = Prefix(vlm, prompt, about["length"], cache, masked=about["masked"])
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


def question_parts(question: str | Sequence[Part]) -> tuple[Part, ...]:
    """The parts of a question; raise ValueError if it is empty."""
    asked = (question,) if isinstance(question, (str, Image.Image)) else tuple(question)
    if not any(not isinstance(part, str) or part.strip() for part in asked):
        raise ValueError("the question is empty; expected text or an image")
    return asked
