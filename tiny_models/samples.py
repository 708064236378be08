"""Training samples: a context, then several questions, with a label wherever one is learned.

Pages and single icons are written as the words that their cells show. A batch shows them as these
words, as the same words at the positions of a page's cells, or as pixels, so that the three kinds
of training see the same samples. What was found to help: many tokens carry a label, questions are
few against what the context holds, and what is asked for is in the context once. Without that,
models first learn shortcuts such as "a value that was not asked for yet".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from mmheads.tasks.line_pages import (
    BLANK,
    CELL,
    CODES,
    COLUMNS,
    ICONS,
    PAGE,
    PROSE,
    STOP,
    VALUES,
    Pixels,
    Record,
    Unit,
    cells,
    draw,
    fill,
)
from mmheads.tasks.needles import OPTIONS
from tiny_models.processors import MERGE, PAGE_CELLS, PATCH, VOCABULARY, Family

Generator = np.random.Generator
Show = Literal["words", "places", "pixels"]
"""How a batch shows pages: as words one after the other, as words at a page's positions, drawn."""
NO_LABEL = -100
ENLARGED = ("llava_onevision", "gemma3")
"""Families that give every image the size of a page."""

WEIGHTS = {
    "text": 1.0,
    "rendered_text": 1.0,
    "image": 1.0,
    "identical_image": 1.0,
    "icon": 1.0,  # the value beside an icon
    "option": 1.0,  # is this option in the context? asked after every option
    "cue": 1.0,  # the same labels as for "icon" and "option", one token earlier, at the icon itself
    "successor": 0.3,
    "nothing": 0.1,  # the null question is answered by a full stop
    "repeated": 1.0,  # asked before: the answer can be copied
    "cell": 1.0,  # the nearest word to what the vision tower gives for a cell
    "end": 0.1,  # an answer is followed by the end
}
"""What a label is for, and its weight in the loss."""
KINDS = tuple(WEIGHTS)


@dataclass(frozen=True)
class Picture:
    """A page or a single icon in a sample.

    Attributes:
        first: Position of the token of its first cell.
        names: What each cell shows.
        columns: Cells per line.
        tokens: Number of its tokens, which a family's processor may make more than its cells.
    """

    first: int
    names: tuple[str, ...]
    columns: int
    tokens: int


@dataclass
class Sample:
    """Token ids, with a label and its kind for each, and the pictures in order.

    What pictures look like in tokens depends on the family. With InternVL, a page ends in the
    token of a thumbnail, which is blank. With LLaVA-OneVision and Gemma 3, a single icon is
    enlarged to the size of a page: its last token is the icon's word, and those before it are
    blank.
    """

    ids: list[int] = field(default_factory=lambda: [VOCABULARY["<bos>"]])
    labels: list[int] = field(default_factory=lambda: [NO_LABEL])
    kinds: list[int] = field(default_factory=lambda: [-1])
    pictures: list[Picture] = field(default_factory=list)
    family: Family = "qwen3_vl"

    def say(self, *words: str) -> Sample:
        """Append words."""
        for word in words:
            self.ids.append(VOCABULARY[word])
            self.labels.append(NO_LABEL)
            self.kinds.append(-1)
        return self

    def show(self, names: Sequence[str], columns: int = 1) -> Sample:
        """Append a picture, as the words that its cells show, between the vision wrappers."""
        self.say("<|vision_start|>")
        words = [*names]
        if self.family == "internvl" and len(names) > 1:
            words.append(BLANK)
        if self.family in ENLARGED and len(names) == 1:
            words = [BLANK] * (PAGE_CELLS - 1) + words
        self.pictures.append(Picture(len(self.ids), tuple(names), columns, len(words)))
        return self.say(*words, "<|vision_end|>")

    def expect(self, word: str, kind: str, position: int = -1) -> Sample:
        """Label a token, by default the last one, with what it should predict."""
        self.labels[position] = VOCABULARY[word]
        self.kinds[position] = KINDS.index(kind)
        return self

    def answer(self, word: str, kind: str) -> Sample:
        """Expect an answer, then give it."""
        return self.expect(word, kind).say(word).expect("<eos>", "end")


Sampler = Callable[[Generator], Sample]


def recall(records: int, codes: int, asks: int, repeats: int = 0) -> Sampler:
    """Sentences, then questions about `asks` of them, with `repeats` of these asked again later."""

    def sample(rng: Generator) -> Sample:
        chosen = rng.permutation(CODES)[:codes]
        values = rng.choice(VALUES, records)
        if records <= codes:
            keys, asked = chosen[:records], rng.permutation(records)[:asks]
        else:
            keys = rng.choice(chosen[asks:], records)
            asked = rng.permutation(records)[:asks]
            keys[asked] = chosen[:asks]
        order = [(int(index), "text") for index in asked]
        for _ in range(repeats):
            at = int(rng.integers(1, len(order) + 1))
            order.insert(at, (order[int(rng.integers(at))][0], "repeated"))
        result = Sample()
        for key, value in zip(keys, values, strict=True):
            result.say(key, value, STOP)
        for index, kind in order:
            result.say("?", keys[index]).answer(values[index], kind)
        return result

    return sample


def ask(
    units: int,
    pages: float | tuple[float, float],
    asks: int,
    mix: Mapping[str, float],
    prose: float = PROSE,
    icon_sentences: float = 0.0,
    cues: bool = False,
    family: Family = "qwen3_vl",
) -> Sampler:
    """A haystack of text units and pages, and questions of several kinds.

    A needle is asked for once; but icons that are in the context come back in later questions, as
    those do that are not in it: what an earlier question showed tells nothing.

    Args:
        units: Number of units of the haystack.
        pages: Share of pages; with two numbers, every sample draws its share between them.
        asks: Number of questions; those for which the haystack has no room are left out.
        mix: How often each kind is asked.
        prose: Share of prose among the sentences.
        icon_sentences: Share of sentences, and of needles for the icon question, whose key is an
            icon's name in text. Only samples that are never drawn may have any.
        cues: Label the icons in questions too, and not only the token after each: there a model
            can match the icon with itself, which it must learn before it can pass the result on.
        family: Whose tokens pages and icons have.
    """
    names = list(mix)
    shares = np.array(list(mix.values())) / sum(mix.values())

    def sample(rng: Generator) -> Sample:
        codes = [str(code) for code in rng.permutation(CODES)]
        icons = [str(icon) for icon in rng.permutation(ICONS)]
        hidden = [icons.pop() for _ in range(2 * len(OPTIONS))]
        kinds = [str(kind) for kind in rng.choice(names, asks, p=shares)]
        needle_codes = [codes.pop() for _ in range(asks)]
        needle_icons = [icons.pop() for _ in range(asks)]
        share = rng.uniform(*pages) if isinstance(pages, tuple) else pages
        is_page = rng.random(units) < share
        haystack = fill(is_page, codes, icons, rng, prose, icon_sentences)
        free = _slots(haystack, rng)

        def place(key: str, on_page: bool) -> Record | None:
            if not free[on_page]:
                return None
            index, slot = free[on_page].pop()
            record = Record(key, str(rng.choice(VALUES)))
            haystack[index] = haystack[index].replace(slot, record)
            return record

        questions: list[tuple[str, Record | None]] = []
        asked: list[Record] = []
        for kind in kinds:
            if kind in ("text", "rendered_text"):
                questions.append((kind, place(needle_codes.pop(), kind == "rendered_text")))
            elif kind in ("image", "icon") or (kind == "identical_image" and rng.random() < 0.5):
                record = None
                if asked and kind != "icon" and rng.random() < 0.5:
                    record = asked[int(rng.integers(len(asked)))]
                in_text = icon_sentences > 0 and rng.random() < icon_sentences
                record = record or place(needle_icons.pop(), not in_text)
                asked += [record] if record else []
                questions.append((kind, record))
            else:
                questions.append((kind, None))

        result = Sample(family=family)
        for unit in haystack:
            if unit.is_page:
                result.show(cells(unit.records), COLUMNS)
            else:
                for record in unit.records:
                    result.say(record.key, record.value, STOP)
        for kind, record in questions:
            _question(result, kind, record, hidden, rng, cues)
        return result

    return sample


def _slots(haystack: Sequence[Unit], rng: Generator) -> dict[bool, list[tuple[int, int]]]:
    """Shuffled places (unit, record) for needles, in text and on pages."""
    slots: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
    for index, unit in enumerate(haystack):
        slots[unit.is_page] += [(index, slot) for slot in range(len(unit.records))]
    for places in slots.values():
        rng.shuffle(places)
    return slots


def _question(
    result: Sample,
    kind: str,
    record: Record | None,
    hidden: Sequence[str],
    rng: Generator,
    cues: bool,
) -> None:
    def show_icon(icon: str, word: str, kind: str) -> None:
        result.show((icon,)).expect(word, kind)
        if cues:
            result.expect(word, "cue", -2)

    if kind == "successor":
        at = int(rng.integers(len(VALUES)))
        result.say("after", VALUES[at]).answer(VALUES[(at + 1) % len(VALUES)], kind)
    elif kind == "nothing":
        result.say("?", *["N/A"] * int(rng.integers(1, 6))).answer(STOP, kind)
    elif kind == "identical_image":
        word = "yes" if record else "no"
        icon = record.key if record else str(rng.choice(hidden))
        result.say("seen")
        show_icon(icon, word, "option")
        result.say("?").answer(word, kind)
    elif record is None:
        return
    elif kind == "image":
        place = int(rng.integers(len(OPTIONS)))
        shown = [str(icon) for icon in rng.choice(hidden, len(OPTIONS), replace=False)]
        shown[place] = record.key
        result.say("which")
        for index, icon in enumerate(shown):
            show_icon(icon, "yes" if index == place else "no", "option")
            result.say(OPTIONS[index])
        result.say("?").answer(OPTIONS[place], kind)
    elif kind == "icon":
        result.say("?")
        show_icon(record.key, record.value, kind)
        result.answer(record.value, kind)
    else:
        result.say("?", record.key).answer(record.value, kind)


def look(pages: int, icons: int, family: Family = "qwen3_vl") -> Sampler:
    """Pages and single icons, to learn what each of their cells shows."""

    def sample(rng: Generator) -> Sample:
        result = Sample(family=family)
        for unit in fill([True] * pages, CODES, ICONS, rng):
            result.show(cells(unit.records), COLUMNS)
        for icon in rng.choice(ICONS, icons):
            result.show((str(icon),))
        return result

    return sample


@dataclass(frozen=True)
class Batch:
    """Samples as tensors, padded on the right.

    There is no attention mask: under a causal one, nothing sees the padding.

    Attributes:
        words: Token ids, shape [sample, token]; pictures are the words that they show.
        labels: What each token should predict, or `NO_LABEL`.
        kinds: Index into `KINDS` for each label, else -1.
        places: Token ids with placeholders for what the vision tower gives; None if pictures are
            words.
        types: 1 for these placeholders, else 0.
        pictures: Model inputs about the pictures, and their pixels where they are drawn.
    """

    words: torch.Tensor
    labels: torch.Tensor
    kinds: torch.Tensor
    places: torch.Tensor | None = None
    types: torch.Tensor | None = None
    pictures: Mapping[str, torch.Tensor] = field(default_factory=dict)


def batch(
    samples: Sequence[Sample],
    rng: Generator,
    show: Show = "words",
    family: Family = "qwen3_vl",
) -> Batch:
    """Samples as tensors; `rng` shifts the sprites of drawn pictures and adds noise to them."""
    length = max(len(sample.ids) for sample in samples)

    def padded(rows: list[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([row + [value] * (length - len(row)) for row in rows])

    words = padded([sample.ids for sample in samples], VOCABULARY["<pad>"])
    labels = padded([sample.labels for sample in samples], NO_LABEL)
    kinds = padded([sample.kinds for sample in samples], -1)
    pictures = [picture for sample in samples for picture in sample.pictures]
    if show == "words" or not pictures:
        return Batch(words, labels, kinds)
    places, types = words.clone(), torch.zeros_like(words)
    end = family == "llava_onevision"  # which gives the end of a picture too
    for row, sample in enumerate(samples):
        for picture in sample.pictures:
            cells_of = slice(picture.first, picture.first + picture.tokens + end)
            places[row, cells_of] = VOCABULARY["<|image_pad|>"]
            types[row, cells_of] = 1
    inputs = _sizes(pictures, family)
    if show == "pixels":
        drawn = [draw(p.names, p.columns, rng) for p in pictures]
        shown = [pixels(image, family, rng) for image in drawn]
        inputs["pixel_values"] = torch.from_numpy(np.concatenate(shown))
    return Batch(words, labels, kinds, places, types, inputs)


def _sizes(pictures: Sequence[Picture], family: Family) -> dict[str, torch.Tensor]:
    """What a model must know of the pictures beside their pixels."""
    if family in ("internvl", "gemma3"):
        return {}
    if family == "llava_onevision":
        sizes = [[CELL * (len(p.names) // p.columns), CELL * p.columns] for p in pictures]
        several = max(2, len(pictures))  # one picture by itself would get finer tokens too
        return {
            "image_sizes": torch.tensor(sizes),
            "batch_num_images": torch.tensor([several]),
        }
    grids = [[1, MERGE * (p.tokens // p.columns), MERGE * p.columns] for p in pictures]
    return {"image_grid_thw": torch.tensor(grids)}


def pixels(
    image: Pixels, family: Family = "qwen3_vl", rng: Generator | None = None
) -> npt.NDArray[np.float32]:
    """An image as a family's stock image processor gives it; `rng` adds noise.

    For Qwen3-VL its patches, shape [patch, 384]; for InternVL its tiles of one cell each and, if
    there are several, a thumbnail, shape [tile, 3, 16, 16]; for Gemma 3 the image in the size of a
    page, shape [1, 3, 64, 64], and for LLaVA-OneVision the same as the only tile of each image,
    shape [1, 1, 3, 64, 64].
    """
    if family in ENLARGED:
        image = _resized(image, PAGE)
    scaled = image.astype(np.float32) / 127.5 - 1
    if rng is not None:
        scaled += rng.normal(0, 0.06, scaled.shape).astype(np.float32)
    if family in ENLARGED:
        page = scaled.transpose(2, 0, 1)[None]
        return page if family == "gemma3" else page[None]
    rows, columns = image.shape[0] // CELL, image.shape[1] // CELL
    if family == "internvl":
        tiles = scaled.reshape(rows, CELL, columns, CELL, 3).transpose(0, 2, 4, 1, 3)
        tiles = tiles.reshape(-1, 3, CELL, CELL)
        if len(tiles) == 1:
            return tiles
        small = pixels(_resized(image, CELL), family, rng)
        return np.concatenate([tiles, small])
    grid = scaled.reshape(rows, MERGE, PATCH, columns, MERGE, PATCH, 3)
    ordered = grid.transpose(0, 3, 1, 4, 6, 2, 5)[..., None, :, :].repeat(2, axis=5)
    return ordered.reshape(rows * columns * MERGE**2, -1)


def _resized(image: Pixels, side: int) -> Pixels:
    """The image as a square, resized as the stock image processors do it."""
    square = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(square)
