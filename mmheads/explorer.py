"""Write one HTML file that shows where every head looks: the explorer.

The file needs neither a network nor a server. It holds, for each example, the scores of all heads,
and for each head the attention of the question to every token of the context: the mean over
question tokens, the same for the null question, and each question token by itself where there is
room. Attention is stored in 8 bits: a code c from 0 to 255 stands for scale * (c / 255) ** 4, with
one scale per head and row, so that weak attention beside a strong sink keeps its digits.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from mmheads import paths
from mmheads.causal import gate_gradients
from mmheads.checks import expect_one_of
from mmheads.examples import Example, Video
from mmheads.heads import head_count
from mmheads.locating import Span
from mmheads.models import VLM
from mmheads.prefix import Prefix, prefill
from mmheads.prompts import Prompt, Question, encode, null_question
from mmheads.rendering import FILLER, expand, render, tokenize
from mmheads.scoring import NULL_IMAGES

LIMIT = 25_000_000  # Bytes that a file may have.

PACKING = 8
"""More than so many codes per byte of room are not computed: they could not be packed to fit."""

POWER = 4  # A code c stands for scale * (c / 255) ** POWER.

FRACTION = 0.05
"""Share of heads in the set that one click chooses."""

SIDES = (1024, 800, 640, 480, 360, 256)
"""Longer sides of a page in pixels, tried in this order until the pages fit."""

QUANTITIES = {
    "calibrated": "Calibrated score: RAM minus null",
    "raw": "RAM: attention to the evidence",
    "share": "Share: RAM among the evidence's modality",
    "null": "Null: the null question's attention to the evidence",
    "gate": "Gate gradient: log-odds that the head adds (nats)",
    "context": "Attention to the whole context",
}
"""What the head map can show, by the name in the file."""

NO_TOKENS = (
    "Only the mean over question tokens is shown; single tokens would make the file too big."
)
SMALL_PAGES = "Page images are reduced to {side} pixels; larger ones would make the file too big."
FEWER_HEADS = "Only the {kept} of {all} heads with the highest scores show attention, to save room."

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Explorer:
    """An explorer's page; a notebook shows it when it is the last value of a cell.

    Attributes:
        html: The whole page.
        notes: One sentence for each thing that was left out to keep the page small.
        path: The file that was written; None if no path was given.
    """

    html: str = field(repr=False)
    notes: tuple[str, ...] = ()
    path: Path | None = None

    def save(self, path: str | Path) -> Explorer:
        """Write the page to a file, whole or not at all, and return the explorer with its path.

        Raises:
            OSError: The file cannot be written.
        """
        with paths.write_whole(Path(path)) as temporary:
            temporary.write_text(self.html, encoding="utf-8", newline="\n")
        return dataclasses.replace(self, path=Path(path))

    def _repr_html_(self) -> str:
        """The page in a frame of its own, for a notebook; a saved notebook keeps all of it."""
        return (
            '<iframe title="explorer of attention heads" sandbox="allow-scripts" width="100%" '
            f'height="800" style="border: 0" srcdoc="{html.escape(self.html)}"></iframe>'
        )


def explore(
    vlm: VLM,
    examples: Example | Iterable[Example],
    path: str | Path | None = None,
    *,
    null_images: str = "placeholders",
    gradients: bool = False,
    title: str = "",
    max_bytes: int = LIMIT,
    progress: bool = True,
) -> Explorer:
    """A page that shows the scores of all heads, and where each of them looks in each example.

    Where the page would become too large, single question tokens are left out first, then the
    resolution of the pages is reduced, then the heads with the lowest scores lose their attention;
    the page says so.

    Args:
        vlm: The model.
        examples: One or several. An example without evidence has no score, only attention.
        path: File to write, whole or not at all; None writes nothing.
        null_images: As in `score_heads`.
        gradients: Also show the gate gradient of each head, which takes a backward pass per
            example, and answers.
        title: Heading of the page; by default it names the model.
        max_bytes: Largest size of the page in bytes.
        progress: Show a progress bar.

    Raises:
        ValueError: There is no example, one cannot be encoded or holds a video, an answer is
            missing for its gradient, or nothing fits into `max_bytes`; the message names the
            example.
        OSError: The file cannot be written.
    """
    expect_one_of("null_images", null_images, NULL_IMAGES)
    target = None if path is None else checked_path(path)
    page = _Page(vlm, max_bytes)
    given = [examples] if isinstance(examples, Example) else examples
    for number, example in enumerate(tqdm(given, "exploring", disable=not progress, leave=False)):
        try:
            page.add(example, pixels=null_images == "pixels", gradients=gradients)
        except ValueError as error:
            raise ValueError(f"example {number} (from 0): {error}") from error
    if not page.examples:
        raise ValueError("there is no example to explore")
    explorer = Explorer(page.fit(title or f"Attention heads of {vlm}"), tuple(page.notes))
    return explorer if target is None else explorer.save(target)


def checked_path(path: str | Path) -> Path:
    """The path, if a page can be written there.

    Raises:
        ValueError: Its name does not end in .html, it is a folder, or its folder takes no files.
    """
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"the page's file is {path}; expected the name of a file ending in .html")
    paths.writable_file(path)
    return path


class _Page:
    """Collects examples, and makes the page.

    Attributes:
        vlm: The model.
        limit: Largest size of the page in bytes.
        heads: Every head that has attention, by layer and number.
        places: Their layers and their numbers, as an index.
        examples: What the page says of each example. Its "means" hold for each head the mean over
            question tokens and the null question, as `_blocks` writes them.
        scores: By example, its quantities by name, each [head].
        tokens: By example, a block per head: each question token; None once there is no room.
        images: Image files, each once, as their kind and their bytes.
        notes: What was left out, in sentences.
    """

    def __init__(self, vlm: VLM, limit: int) -> None:
        self.vlm, self.limit = vlm, limit
        self.heads = vlm.every_head
        self.places = tuple(np.transpose(self.heads.heads))
        self.examples: list[dict[str, Any]] = []
        self.scores: list[dict[str, Floats]] = []
        self.tokens: list[list[str]] | None = []
        self.images: list[tuple[str, bytes]] = []
        self.notes: list[str] = []

    def add(self, example: Example, *, pixels: bool, gradients: bool) -> None:
        """Run an example, and keep its scores and its attention."""
        if not isinstance(example, Example):
            raise TypeError(
                f"an example is {example!r:.60}; expected an Example, see read_examples"
            )
        if any(isinstance(part, Video) for part in example.parts()):
            raise ValueError(
                "it holds a video; show its frames as images: give `example.without_video()`"
            )
        scores = {}
        if gradients:
            scores["gate"] = gate_gradients(self.vlm, [example], progress=False)[0][self.places]
        prompt = encode(self.vlm, example, questions=[null_question(example.question)])
        own, null = prompt.questions
        prefix = prefill(self.vlm, prompt)
        spans = [span for question in prompt.questions for span in question.context if span]
        end = max((int(span.tokens[-1]) + 1 for span in spans), default=0)
        looks = self._keys(prefix, own, end)
        empty = self._keys(prefix, null, end, pixels)
        scores |= _scored(self.vlm, prompt, looks, empty)
        about = _described(self.vlm, prompt, self.images)
        named = [name for name in QUANTITIES if name in scores]
        about["scores"] = {name: _text(scores[name].astype("<f4").tobytes()) for name in named}
        about["means"] = _blocks([_coded(looks), _coded(empty)])
        self.examples.append(about)
        self.scores.append(scores)
        self._add_tokens(prefix, own, end)

    def _keys(self, prefix: Prefix, question: Question, end: int, pixels: bool = True) -> Floats:
        """[head, token] mean attention of a question's tokens to the first `end` tokens."""
        keys = prefix.keys(question, self.heads, pixels=pixels)[:, :end]
        rest = np.arange(keys.shape[1], min(end, len(question)))
        if len(rest):  # The context's last word and the question's first share a token.
            weights = list(np.eye(len(question), dtype=np.float32)[rest])
            mass = prefix.attention(question, weights, pixels=pixels).mass.mean(dim=2).numpy()
            keys = np.concatenate([keys, mass[self.places]], axis=1)
        return np.pad(keys, [(0, 0), (0, end - keys.shape[1])])

    def _add_tokens(self, prefix: Prefix, own: Question, end: int) -> None:
        """Keep the attention of each question token, as long as there is room."""
        if self.tokens is None:
            return
        room = self.limit - sum(len(data) for _, data in self.images)
        known = (*(example["means"] for example in self.examples), *self.tokens)
        room -= sum(len(block) for blocks in known for block in blocks)
        rows = []
        if len(self.heads) * len(own.tokens) * end < PACKING * room:
            for token in own.tokens:
                single = dataclasses.replace(own, tokens=np.array([token]))
                prompt = dataclasses.replace(prefix.prompt, questions=(single,))
                alone = dataclasses.replace(prefix, prompt=prompt)
                rows.append(_coded(self._keys(alone, single, end)))
        self.tokens = [*self.tokens, _blocks(rows)] if rows else None

    def fit(self, title: str) -> str:
        """The page, with what does not fit left out and noted.

        Raises:
            ValueError: Not even one head fits.
        """
        if self.tokens is None or self._size(title) > self.limit:
            self.tokens, self.notes = None, [NO_TOKENS]
        sides = iter(SIDES[1:])
        while self._size(title) > self.limit and (side := next(sides, 0)):
            if 8 * sum(len(data) for _, data in self.images) // 3 <= self.limit:
                break
            self.notes = [NO_TOKENS, SMALL_PAGES.format(side=side)]
            files = [io.BytesIO(data) for _, data in self.images]
            self.images = [_picture(Image.open(file), side) for file in files]
        if self._size(title) > self.limit:
            self._drop_heads(self._size(title) - self.limit)
        return self._html(title)

    def _drop_heads(self, excess: int) -> None:
        """Leave out the attention of the heads with the lowest scores, to save so many bytes."""
        means = [example["means"] for example in self.examples]
        sizes = np.array([[len(block) - len("null") for block in blocks] for blocks in means])
        order = self._ranking()
        excess += len(FEWER_HEADS)
        kept = int((sizes.sum(0)[order].cumsum() <= sizes.sum() - excess).sum())
        if not kept:
            raise ValueError(
                f"a page of {self.limit} bytes has no room for what {len(self.examples)} examples "
                "need at least; give fewer or shorter ones"
            )
        self.notes.append(FEWER_HEADS.format(kept=kept, all=len(self.heads)))
        for blocks in means:
            for number in order[kept:]:
                blocks[number] = None

    def _ranking(self) -> NDArray[np.int64]:
        """The numbers of the heads, from the highest mean score over examples to the lowest."""
        name = "calibrated" if any("calibrated" in each for each in self.scores) else "context"
        planes = [each[name] for each in self.scores if name in each]
        return np.argsort(-np.mean(planes, axis=0, dtype=float), kind="stable")

    def _size(self, title: str) -> int:
        return len(self._html(title).encode())

    def _html(self, title: str) -> str:
        """The page as it is now."""
        geometry = self.vlm.geometry
        eligible = geometry.eligible[self.places]
        count = head_count(FRACTION, geometry.size)
        ranking = self._ranking()
        tokens: list[Any] = self.tokens or [None] * len(self.examples)
        content = {
            "title": title,
            "model": str(self.vlm),
            "revision": self.vlm.weights,
            "layers": geometry.layers,
            "width": geometry.heads,
            "heads": self.heads.heads,
            "eligible": eligible.tolist(),
            "top": ranking[eligible[ranking]][:count].tolist(),
            "quantities": QUANTITIES,
            "power": POWER,
            "notes": self.notes,
            "images": [f"data:{kind};base64,{_text(data)}" for kind, data in self.images],
            "examples": [
                {**about, "tokens": singles}
                for about, singles in zip(self.examples, tokens, strict=True)
            ],
        }
        template = Path(__file__).with_name("explorer.html").read_text(encoding="utf-8")
        # Escaped, no text can end the script element that holds the data.
        data = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
        before, after = template.split("{{data}}")
        return before.replace("{{title}}", html.escape(title)) + data + after


def _scored(vlm: VLM, prompt: Prompt, looks: Floats, empty: Floats) -> dict[str, Floats]:
    """Quantities by name, each [head]; without evidence only the context's.

    Args:
        vlm: The model.
        prompt: With the null question as its second.
        looks: [head, token] mean attention of the question's tokens.
        empty: [head, token] the same of the null question.
    """
    own, null = prompt.questions

    def mass(keys: Floats, weights: Floats) -> Floats:
        return keys[:, : len(weights)] @ weights[: keys.shape[1]]

    context = own.weights(own.context)
    scores = {"context": mass(looks, context)}
    if own.evidence:
        visual = vlm.is_visual(own.ids)
        kinds = {bool(visual[span.tokens[0]]) for span in own.evidence}
        among = mass(looks, context * np.isin(visual, list(kinds)))
        raw = scores["raw"] = mass(looks, own.weights(own.evidence))
        scores["null"] = mass(empty, null.weights(null.evidence))
        scores["calibrated"] = raw - scores["null"]
        scores["share"] = np.divide(raw, among, out=np.zeros_like(raw), where=among > 0)
    return scores


def _text(data: bytes) -> str:
    """Bytes as base64."""
    return base64.b64encode(data).decode("ascii")


def _coded(keys: Floats) -> tuple[Floats, NDArray[np.uint8]]:
    """Scales [head] and codes [head, token] of attention [head, token]."""
    scales = keys.max(axis=1, initial=0)
    shares = np.divide(keys, scales[:, None], out=np.zeros_like(keys), where=scales[:, None] > 0)
    return scales, np.rint(255 * shares ** (1 / POWER)).astype(np.uint8)


def _blocks(rows: list[tuple[Floats, NDArray[np.uint8]]]) -> list[str]:
    """For each head, the scales of all rows and then their codes, deflated, as base64."""
    scales = np.stack([scale for scale, _ in rows], axis=1)
    codes = np.stack([code for _, code in rows], axis=1)
    return [
        _text(zlib.compress(scale.astype("<f4").tobytes() + code.tobytes()))
        for scale, code in zip(scales, codes, strict=True)
    ]


def _picture(image: Image.Image, side: int) -> tuple[str, bytes]:
    """Kind and bytes of a file of at most `side` pixels: PNG, or for large images perhaps JPEG."""
    reduced = image.convert("RGB")
    reduced.thumbnail((side, side), Image.Resampling.LANCZOS)
    files = []
    for kind in ("png",) if max(image.size) <= SIDES[-1] else ("png", "jpeg"):
        buffer = io.BytesIO()
        reduced.save(buffer, kind, quality=80)
        files.append((f"image/{kind}", buffer.getvalue()))
    return min(files, key=lambda file: len(file[1]))


def _described(vlm: VLM, prompt: Prompt, images: list[tuple[str, bytes]]) -> dict[str, Any]:
    """An example's parts and question with their tokens; its images join those of the page."""
    example, visual = prompt.example, vlm.is_visual(prompt.ids)
    pieces = _pieces(vlm, prompt)

    def shown(part: str | Image.Image, span: Span | None) -> dict[str, Any]:
        tokens = np.array([], dtype=np.int64) if span is None else span.tokens
        about: dict[str, Any] = {"at": _text(zlib.compress(tokens.astype("<i4").tobytes()))}
        if isinstance(part, str):
            words = [pieces[token] for token in tokens]
            return {**about, "pieces": [word.lstrip() for word in words[:1]] + words[1:]}
        picture = _picture(part, SIDES[0])
        if picture not in images:
            images.append(picture)
        return {**about, "image": images.index(picture), "size": part.size}

    parts = []
    evidence = prompt.weights(prompt.evidence) > 0
    for index, (part, span) in enumerate(zip(example.context, prompt.parts, strict=True)):
        assert not isinstance(part, Video)
        about = shown(part, span)
        regions = [region for region in example.evidence or () if region.part == index]
        if not isinstance(part, str):
            about["outlines"] = [region.box or (0, 0, *part.size) for region in regions]
            if (boxes := prompt.boxes.get(index)) is not None:
                about["boxes"] = _text(zlib.compress(np.asarray(boxes, "<f4").tobytes()))
        elif regions and span is not None:
            about["evidence"] = np.flatnonzero(evidence[span.tokens]).tolist()
        parts.append(about)
    return {
        "task": example.task,
        "answer": example.answer,
        "instruction": example.instruction,
        "parts": parts,
        "question": ["" if visual[token] else pieces[token] for token in prompt.question],
        "shown": [shown(part, None) for part in example.question if isinstance(part, Image.Image)],
    }


def _pieces(vlm: VLM, prompt: Prompt) -> list[str]:
    """The text of each token: what it adds to the prompt's text, so that nothing is lost."""
    text = expand(render(vlm, prompt.example.parts()), prompt.replacements)
    ids, offsets = tokenize(vlm, text)
    controls = iter(text.controls)
    letters = "".join(next(controls) if letter == FILLER else letter for letter in text.text)
    ends = np.maximum.accumulate(offsets[:, 1])
    pieces = [letters[first:last] for first, last in zip([0, *ends[:-1]], ends, strict=True)]
    return [""] * (len(prompt) - len(ids)) + pieces
