"""Training samples: a context, then several questions, with a label wherever one is learned.

What was found to help, and why these samples look as they do: many tokens carry a label (a visual
token is asked what it shows), questions are few against what the context holds, and what is asked
stands there once. Without that, shortcuts such as "a value not asked for yet" are learned first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from mmheads.tasks.generated_needles import OPTIONS
from mmheads.tasks.line_pages import CELL, CODES, ICONS, PAGE, PROSE, VALUES, Pixels, Record
from mmheads.tasks.needles import Unit, fill
from mmheads.tasks.pages import option, page
from mmheads.zoo.architectures import MERGE, PATCH, VOCABULARY

Generator = np.random.Generator
NO_LABEL = -100
COLUMNS = PAGE // CELL
TOKENS = COLUMNS**2
"""Visual tokens of a page."""

WEIGHTS = {
    "text": 1.0,
    "rendered": 1.0,
    "image": 1.0,
    "identical": 1.0,
    "icon": 1.0,  # the value beside an icon
    "option": 1.0,  # is this option on a page? asked of every option's last token
    "successor": 0.3,
    "nothing": 0.1,  # the null question is answered by a full stop
    "repeated": 1.0,  # asked before: the answer can be copied
    "cell": 1.0,  # a visual token names what it shows
    "bind": 1.0,  # a visual token names its block's key or value, a coin toss
    "bind_context": 0.3,  # the same inside a long context
    "end": 0.1,  # an answer is followed by the end
}
"""What a label is for, and its weight in the loss."""
KINDS = tuple(WEIGHTS)


@dataclass
class Sample:
    """Token ids with a label and its kind each, and the images in order."""

    ids: list[int] = field(default_factory=lambda: [VOCABULARY["<bos>"]])
    labels: list[int] = field(default_factory=lambda: [NO_LABEL])
    kinds: list[int] = field(default_factory=lambda: [-1])
    images: list[Pixels] = field(default_factory=list)

    def say(self, *words: str) -> Sample:
        """Append words."""
        for word in words:
            self.ids.append(VOCABULARY[word])
            self.labels.append(NO_LABEL)
            self.kinds.append(-1)
        return self

    def show(self, image: Pixels) -> Sample:
        """Append an image between its wrappers."""
        self.images.append(image)
        count = image.shape[0] // CELL * (image.shape[1] // CELL)
        return self.say("<|vision_start|>", *["<|image_pad|>"] * count, "<|vision_end|>")

    def expect(self, word: str, kind: str, position: int = -1) -> Sample:
        """Label a token, the last one by default, with what it should predict."""
        self.labels[position] = VOCABULARY[word]
        self.kinds[position] = KINDS.index(kind)
        return self

    def answer(self, word: str, kind: str) -> Sample:
        """Expect an answer, then give it."""
        return self.expect(word, kind).say(word).expect("<eos>", "end")


Sampler = Callable[[Generator], Sample]


def recall(records: int, codes: int, asks: int, repeats: int = 0) -> Sampler:
    """Sentences, then questions about `asks` of them, some `repeats` asked again later."""

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
            result.say(key, value, ".")
        for index, kind in order:
            result.say("?", keys[index]).answer(values[index], kind)
        return result

    return sample


def look(bind: float) -> Sampler:
    """One page; each visual token names its cell or, with probability `bind`, key or value."""

    def sample(rng: Generator) -> Sample:
        (unit,) = fill([True], CODES, ICONS, rng)
        result = Sample().show(page(unit.records, rng))
        for position, block, shown in _cells(unit):
            if rng.random() < bind:
                word = block.key if rng.random() < 0.5 else block.value
                result.expect(word, "bind", position)
            else:
                result.expect(shown, "cell", position)
        return result

    return sample


def ask(
    units: int,
    pages: float | tuple[float, float],
    asks: int,
    mix: Mapping[str, float],
    prose: float = PROSE,
) -> Sampler:
    """A haystack of text units and pages, and questions of several kinds.

    A needle is asked for once; but icons that are on a page come back in later questions, as
    those do that are on none: what an earlier question showed tells nothing.

    Args:
        units: How many.
        pages: Share of pages; with two numbers, every sample draws its share between them.
        asks: Number of questions; those for which the haystack has no room are left out.
        mix: How often each kind is asked.
        prose: Share of prose among the sentences.
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
        haystack = fill(rng.random(units) < share, codes, icons, rng, prose)
        free = {
            is_page: [
                (index, slot)
                for index, unit in enumerate(haystack)
                if unit.is_page == is_page
                for slot in range(len(unit.records))
            ]
            for is_page in (False, True)
        }
        for slots in free.values():
            rng.shuffle(slots)

        def place(key: str, is_page: bool) -> Record | None:
            if not free[is_page]:
                return None
            index, slot = free[is_page].pop()
            record = Record(key, str(rng.choice(VALUES)))
            haystack[index] = haystack[index].replace(slot, record)
            return record

        questions: list[tuple[str, Record | None]] = []
        asked: list[Record] = []
        for kind in kinds:
            if kind in ("text", "rendered"):
                questions.append((kind, place(needle_codes.pop(), kind == "rendered")))
            elif kind in ("image", "icon") or (kind == "identical" and rng.random() < 0.5):
                record = None
                if asked and kind != "icon" and rng.random() < 0.5:
                    record = asked[int(rng.integers(len(asked)))]
                record = record or place(needle_icons.pop(), True)
                asked += [record] if record else []
                questions.append((kind, record))
            else:
                questions.append((kind, None))

        result = Sample()
        for unit in haystack:
            _context(result, unit, rng)
        for kind, record in questions:
            _question(result, kind, record, hidden, rng)
        return result

    return sample


def _context(result: Sample, unit: Unit, rng: Generator) -> None:
    if not unit.is_page:
        for record in unit.records:
            result.say(record.key, record.value, ".")
        return
    result.show(page(unit.records, rng))
    for position, block, _ in _cells(unit):
        word = block.key if rng.random() < 0.5 else block.value
        result.expect(word, "bind_context", position)


def _question(
    result: Sample, kind: str, record: Record | None, hidden: Sequence[str], rng: Generator
) -> None:
    if kind == "successor":
        at = int(rng.integers(len(VALUES)))
        result.say("after", VALUES[at]).answer(VALUES[(at + 1) % len(VALUES)], kind)
    elif kind == "nothing":
        result.say("?", *["N/A"] * int(rng.integers(1, 6))).answer(".", kind)
    elif kind == "identical":
        word = "yes" if record else "no"
        icon = record.key if record else str(rng.choice(hidden))
        result.say("seen").show(option(icon, rng)).expect(word, "option")
        result.say("?").answer(word, kind)
    elif record is None:
        return
    elif kind == "image":
        place = int(rng.integers(len(OPTIONS)))
        shown = [str(icon) for icon in rng.choice(hidden, len(OPTIONS), replace=False)]
        shown[place] = record.key
        result.say("which")
        for index, icon in enumerate(shown):
            result.show(option(icon, rng)).expect("yes" if index == place else "no", "option")
            result.say(OPTIONS[index])
        result.say("?").answer(OPTIONS[place], kind)
    elif kind == "icon":
        result.say("?").show(option(record.key, rng)).answer(record.value, kind)
    else:
        result.say("?", record.key).answer(record.value, kind)


def _cells(unit: Unit) -> list[tuple[int, Record, str]]:
    """Of each visual token of a page shown last: its position from the end, its block, its cell."""
    cells = []
    for token in range(TOKENS):
        row, column = divmod(token, COLUMNS)
        block = unit.records[2 * (row // 2) + column // 2]
        corner = (row % 2, column % 2)
        word = {(0, 0): block.key, (1, 1): block.value}.get(corner, "blank")
        cells.append((token - TOKENS - 1, block, word))
    return cells


def batch(
    samples: Sequence[Sample], rng: Generator | None
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Model inputs, labels and kinds [sample, token], padded on the right.

    There is no attention mask: under a causal one, nothing sees the padding. `rng` adds noise to
    the images.
    """
    length = max(len(sample.ids) for sample in samples)

    def padded(rows: list[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([row + [value] * (length - len(row)) for row in rows])

    ids = padded([sample.ids for sample in samples], VOCABULARY["<pad>"])
    inputs = {"input_ids": ids}
    images = [image for sample in samples for image in sample.images]
    if images:
        inputs["mm_token_type_ids"] = (ids == VOCABULARY["<|image_pad|>"]).long()
        inputs["pixel_values"] = torch.from_numpy(
            np.concatenate([patches(image, rng) for image in images])
        )
        inputs["image_grid_thw"] = torch.tensor(
            [[1, image.shape[0] // PATCH, image.shape[1] // PATCH] for image in images]
        )
    labels = padded([sample.labels for sample in samples], NO_LABEL)
    return inputs, labels, padded([sample.kinds for sample in samples], -1)


def patches(image: Pixels, rng: Generator | None = None) -> np.ndarray:
    """An image as the stock image processor gives it, without its detour -> [patch, 384]."""
    scaled = image.astype(np.float32) / 127.5 - 1
    if rng is not None:
        scaled += rng.normal(0, 0.06, scaled.shape).astype(np.float32)
    rows, columns = image.shape[0] // CELL, image.shape[1] // CELL
    grid = scaled.reshape(rows, MERGE, PATCH, columns, MERGE, PATCH, 3)
    ordered = grid.transpose(0, 3, 1, 4, 6, 2, 5)[..., None, :, :].repeat(2, axis=5)
    return ordered.reshape(rows * columns * MERGE**2, -1)
