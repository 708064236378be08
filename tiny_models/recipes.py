"""How each tiny model is trained: where it starts, and its stages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from mmheads.tasks.line_pages import PROSE, UNIT_TOKENS
from tiny_models.processors import Family
from tiny_models.samples import ENLARGED, Sampler, Show, ask, look, recall


@dataclass(frozen=True)
class Source:
    """Samples of one kind: how often a step uses them, how many it takes, how it shows pages."""

    share: float
    batch: int
    sampler: Sampler
    show: Show = "words"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Training on one mix of samples, until it is learned.

    Attributes:
        name: Unique in its recipe.
        sources: A step takes its samples from one of them.
        goals: Accuracy by kind of label, as a running mean, at which the stage ends. Without
            goals it takes all its steps.
        steps: Steps after which it ends in any case.
        rate: Learning rate.
        warm_up: Steps over which the learning rate rises to it.
        decay: Let the learning rate fall to 0 over `steps`.
        trains: All weights, or only the vision tower, which then learns to give the word
            embedding of what each cell shows, or only the language model.
        grow: Layers after which a new one is inserted before the stage.
        rope_theta: New base of the rotary position embedding from this stage on; 0 keeps it.
        window: New window of Gemma 3's sliding layers, together with `rope_theta`.
        widen: Add the words of prose to the vocabulary before the stage.
        icons_like_codes: Draw the embeddings of icons anew before the stage, with the mean and
            covariance of the codes' embeddings: heads that match codes then match icons too.
        restart: Begin as from a checkpoint: weights rounded to 16 bits, a new optimizer.
        norm_rate: Factor on the learning rate of the norms of queries and keys, which bound how
            sharply a head can attend: among many keys a head must be sharper.
        vision_rate: Factor on the learning rate of the vision tower where everything is trained:
            at the full rate it forgets within 50 steps which code a cell shows.
    """

    name: str
    sources: tuple[Source, ...]
    goals: Mapping[str, float] = field(default_factory=dict)
    steps: int = 2000
    rate: float = 2e-3
    warm_up: int = 20
    decay: bool = False
    trains: Literal["all", "vision", "language"] = "all"
    grow: tuple[int, ...] = ()
    rope_theta: float = 0.0
    window: int = 0
    widen: bool = False
    icons_like_codes: bool = False
    restart: bool = False
    norm_rate: float = 1.0
    vision_rate: float = 0.05


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A model's start and its stages.

    Attributes:
        start: Name of the text-only model it is adapted from; "" for random weights.
        family: Model type of a vision-language model; a text model has the decoder of one.
        layers: Layers at the start, where the weights are random.
        heads: Heads per layer there.
        kv_heads: KV groups per layer there.
        width: Channels of the hidden states there.
        stages: In order.
        seed: Seed of weights and samples.
    """

    start: str = ""
    family: Family = "qwen3_vl"
    layers: int = 4
    heads: int = 16
    kv_heads: int = 4
    width: int = 128
    stages: tuple[Stage, ...]
    seed: int = 0


def _text(units: int, asks: int, prose: float = 0.0) -> Sampler:
    return ask(units, 0.0, asks, {"text": 1, "successor": 0.08, "nothing": 0.04}, prose)


def _recall(batch: int, *settings: int) -> tuple[Source]:
    return (Source(1, batch, recall(*settings)),)


_UNITS = (4, 5, 7, 9, 11, 14, 18, 22, 28, 36, 45, 57, 72, 90, 114)
"""Lengths of haystacks. With few of them, a model learns at which positions questions are."""


def _at_most(tokens: int, units: int) -> int:
    """Samples of so many units, and questions of some 100 tokens, that hold so many tokens."""
    return max(1, tokens // (units * UNIT_TOKENS + 100))


def _prose(share: float, tokens: int, lengths: Sequence[int] = _UNITS) -> tuple[Source, ...]:
    """Text of these lengths, most of it prose."""
    return tuple(
        Source(
            share / len(lengths),
            _at_most(tokens, units),
            _text(units, min(3 * units, 32), PROSE),
        )
        for units in lengths
    )


_FROM_NOTHING = (
    Stage(
        name="4 of 8 codes",
        sources=_recall(128, 4, 8, 4, 12),
        goals={"text": 0.9},
        rate=3e-3,
        warm_up=50,
    ),
    Stage(name="4 of 16", sources=_recall(128, 4, 16, 4, 8), goals={"text": 0.93}),
    Stage(name="6 of 32", sources=_recall(128, 6, 32, 4, 4), goals={"text": 0.93}),
    Stage(name="8 of 64", sources=_recall(96, 8, 64, 6, 2), goals={"text": 0.93}),
    Stage(name="16 records", sources=_recall(64, 16, 64, 12), goals={"text": 0.93}),
)
_RECORDS = Stage(
    name="32 records, two layers more",
    sources=_recall(40, 32, 64, 16),
    goals={"text": 0.93},
    grow=(1, 3),
)
_LARGER_BASE = Stage(
    name="256 tokens, larger RoPE base",
    sources=(Source(1, 20, _text(14, 24)),),
    steps=250,
    rope_theta=5e6,
)
_LONGER = (
    Stage(name="512 tokens", sources=(Source(1, 10, _text(28, 28)),), steps=250),
    Stage(name="1024 tokens", sources=(Source(1, 5, _text(57, 32)),), steps=125, rate=1.5e-3),
    Stage(
        name="all lengths",
        sources=tuple(Source(1, 4, _text(units, 32)) for units in (7, 14, 28, 57, 114)),
        steps=250,
        rate=1.5e-3,
        norm_rate=5.0,
        decay=True,
    ),
    Stage(
        name="any length",
        sources=tuple(Source(1, _at_most(7000, units), _text(units, 32)) for units in _UNITS),
        steps=250,
        rate=1.5e-3,
        decay=True,
    ),
    Stage(
        name="prose between the records",
        sources=_prose(1, 7000),
        steps=200,
        rate=1.5e-3,
        decay=True,
        widen=True,
    ),
    Stage(
        name="long texts",
        sources=_prose(0.3, 7000, _UNITS[:8]) + _prose(0.7, 7000, _UNITS[8:]),
        steps=150,
        rate=1.5e-3,
        decay=True,
    ),
)
_TEXT_STAGES = (*_FROM_NOTHING, _RECORDS, _LARGER_BASE, *_LONGER)
"""Finding a record in text. Everything below is learned by a model that can do this."""
_GEMMA_TEXT_STAGES = (
    *_FROM_NOTHING,
    replace(_RECORDS, grow=(0, 3), restart=True),
    replace(_LARGER_BASE, name="256 tokens, larger RoPE base and window", window=128, restart=True),
    *(replace(stage, restart=stage.widen) for stage in _LONGER),
)
"""Until a window is longer than the first texts, only global layers can find a record.

Stages that change the model restart, so that the checkpoint before them can be gone on from.
"""

_MIX = {
    "text": 1.0,
    "rendered_text": 1.0,
    "image": 1.0,
    "identical_image": 1.0,
    "icon": 1.0,
    "successor": 0.1,
    "nothing": 0.05,
}
_ICONS = {**_MIX, "text": 0.5, "rendered_text": 0.7}
_TEXT_TOO = {**_MIX, "text": 2.0}
"""Short contexts make a model forget long ones, above all in text."""
_READ = {**_TEXT_TOO, "rendered_text": 2.0}
"""Records in text and on pages: what is lost first as contexts get longer."""
_ANSWERED = {"image": 0.9, "identical_image": 0.9, "icon": 0.9, "rendered_text": 0.9}


def _mixed(
    units: Sequence[int],
    tokens: int,
    *,
    mix: Mapping[str, float] = _MIX,
    asks: int = 10,
    share: float = 1.0,
    show: Show = "words",
    icon_sentences: float = 0.0,
    cues: bool = True,
    family: Family = "qwen3_vl",
) -> tuple[Source, ...]:
    """Haystacks of text and pages in any ratio; a step has about `tokens` tokens."""
    per_question = 18 if family in ENLARGED else 9
    return tuple(
        Source(
            share / len(units),
            max(1, tokens // (UNIT_TOKENS * count + per_question * min(2 * count, asks))),
            ask(
                *(count, (0.0, 1.0), min(2 * count, asks), mix, PROSE, icon_sentences, cues),
                family=family,
            ),
            show,
        )
        for count in units
    )


def _long(name: str, sources: tuple[Source, ...], steps: int) -> Stage:
    """A stage with long contexts, in which heads must become sharper."""
    return Stage(
        name=name,
        sources=sources,
        steps=steps,
        rate=1.2e-3,
        decay=True,
        restart=True,
        norm_rate=3.0,
    )


def _cells(sampler: Sampler) -> Stage:
    """Only the vision tower, on pages and icons."""
    return Stage(
        name="what each cell shows",
        sources=(Source(1, 1, sampler, "pixels"),),
        steps=800,
        rate=3e-3,
        warm_up=30,
        decay=True,
        trains="vision",
        restart=True,
    )


_PAGES = Stage(
    name="pages as words, two layers more",
    sources=_mixed((2, 3, 4, 6, 8), 2400, icon_sentences=0.4, cues=False),
    steps=120,
    rate=1.5e-3,
    grow=(3, 5),
    icons_like_codes=True,
    restart=True,
)
_WORD_STAGES = (
    Stage(
        name="icons as keys",
        sources=_mixed((1, 2, 3, 4, 6), 1500, mix=_ICONS, icon_sentences=0.4),
        goals=_ANSWERED,
        steps=500,
        rate=1.5e-3,
    ),
    Stage(
        name="contexts of up to 500 tokens",
        sources=_mixed((4, 6, 9, 14, 20, 28), 1800, mix=_TEXT_TOO, asks=20),
        goals={**_ANSWERED, "text": 0.9},
        steps=250,
        rate=1.2e-3,
        restart=True,
        norm_rate=3.0,
    ),
    _long(
        name="contexts of any length",
        sources=_mixed((4, 6, 9, 14, 22), 2400, mix=_TEXT_TOO, share=0.4, asks=20)
        + _mixed((36, 57, 90, 114), 2400, mix=_TEXT_TOO, share=0.6, asks=24),
        steps=250,
    ),
    _long(
        name="more questions on long contexts",
        sources=_mixed((9, 14, 22), 2400, mix=_TEXT_TOO, share=0.3, asks=32)
        + _mixed((28, 36, 45, 57), 2400, mix=_TEXT_TOO, share=0.4, asks=40)
        + _mixed((72, 90, 114), 2400, mix=_TEXT_TOO, share=0.3, asks=40),
        steps=500,
    ),
)

_BESIDE = {
    **_MIX,
    "text": 0.5,
    "rendered_text": 2.0,
    "image": 0.5,
    "identical_image": 0.5,
    "icon": 2.0,
}
"""At a page's positions, what is beside a key must be learned again."""
_WORDS_TOO = _mixed((4, 8, 16, 40), 1800, share=0.25, icon_sentences=0.4)
"""Text and pages as words, at positions in one dimension: what the text model learned."""

_VISION_STAGES = (
    Stage(
        name="words at a page's own positions",
        sources=_mixed((1, 2, 3, 4, 6, 8), 1500, mix=_BESIDE, share=0.75, show="places")
        + _WORDS_TOO,
        goals=_ANSWERED,
        steps=600,
        rate=1.5e-3,
        trains="language",
        norm_rate=3.0,
    ),
    _cells(look(40, 64)),
    Stage(
        name="everything together",
        sources=_mixed((2, 3, 4, 6, 8, 12), 1800, share=0.75, show="pixels") + _WORDS_TOO,
        goals=_ANSWERED,
        steps=300,
        rate=1e-3,
        restart=True,
    ),
    _long(
        name="everything in contexts of any length",
        sources=_mixed((4, 6, 9, 14, 22), 2400, share=0.25, show="pixels", asks=24)
        + _mixed((28, 36, 45, 57), 2400, mix=_TEXT_TOO, share=0.25, show="pixels", asks=40)
        + _mixed((72, 90, 114), 2400, mix=_TEXT_TOO, share=0.25, show="pixels", asks=40)
        + _mixed((9, 22, 36, 57, 90, 114), 2400, mix=_TEXT_TOO, share=0.25, asks=40),
        steps=900,
    ),
    _long(
        name="more questions on long contexts",
        sources=_mixed((4, 6, 9, 14, 22), 2400, share=0.15, show="pixels", asks=24)
        + _mixed((28, 36, 45, 57), 2700, mix=_READ, share=0.3, show="pixels", asks=44)
        + _mixed((72, 90, 114), 2700, mix=_READ, share=0.35, show="pixels", asks=48)
        + _mixed((9, 22, 36, 57, 90, 114), 2700, mix=_TEXT_TOO, share=0.2, asks=44),
        steps=1000,
    ),
)

_FEWER_ICONS = {**_READ, "image": 0.4, "identical_image": 0.6, "icon": 0.6}


def _at_any_length(family: Family, mix: Mapping[str, float], steps: int) -> Stage:
    """Everything together in short and long contexts, with all images of this family's size."""

    def some(units: Sequence[int], share: float, show: Show = "pixels") -> tuple[Source, ...]:
        return _mixed(units, 2400, mix=mix, asks=40, share=share, show=show, family=family)

    return Stage(
        name="everything in contexts of any length",
        sources=some((2, 4, 6, 9, 14), 0.2)
        + some((22, 28, 36, 45, 57), 0.3)
        + some((72, 90, 114), 0.3)
        + some((9, 22, 36, 57, 90, 114), 0.2, "places" if family == "gemma3" else "words"),
        steps=steps,
        rate=6e-4,
        decay=True,
        restart=True,
        norm_rate=3.0,
    )


_INTERNVL_STAGES = (_cells(look(32, 32, "internvl")), _at_any_length("internvl", _READ, 600))
"""Positions have one dimension, so pages are known as words from the text model."""


def _large_icons(family: Family, show: Show) -> Stage:
    """Icons of the size of a page, where the text model knows them as single words."""
    return Stage(
        name="icons of the size of a page",
        sources=_mixed((1, 2, 3, 4, 6), 1800, mix={**_MIX, "text": 0.3}, show=show, family=family),
        goals=_ANSWERED,
        steps=300,
        rate=1e-3,
        trains="language",
    )


_LLAVA_STAGES = (
    _large_icons("llava_onevision", "words"),
    _cells(look(32, 32, "llava_onevision")),
    _at_any_length("llava_onevision", _FEWER_ICONS, 400),
)
"""An icon in a question takes 16 tokens, the last of which is its word; pages are as before."""
_GEMMA_STAGES = (
    _large_icons("gemma3", "places"),
    _cells(look(32, 32, "gemma3")),
    _at_any_length("gemma3", _FEWER_ICONS, 500),
)
"""As with LLaVA-OneVision, but the cells of a page, and those of an icon, see each other."""

RECIPES = {
    "tiny-qwen3-m": Recipe(stages=(*_TEXT_STAGES, _PAGES, *_WORD_STAGES)),
    "tiny-qwen3-vl-m": Recipe(start="tiny-qwen3-m", stages=_VISION_STAGES),
    "tiny-qwen3-vl-m-seed1": Recipe(start="tiny-qwen3-m", stages=_VISION_STAGES, seed=1),
    "tiny-qwen3-vl-m-seed2": Recipe(start="tiny-qwen3-m", stages=_VISION_STAGES, seed=2),
    "tiny-internvl-m": Recipe(start="tiny-qwen3-m", family="internvl", stages=_INTERNVL_STAGES),
    "tiny-llava-onevision-m": Recipe(
        start="tiny-qwen3-m", family="llava_onevision", stages=_LLAVA_STAGES
    ),
    "tiny-gemma3-text-m": Recipe(
        family="gemma3",
        layers=6,
        heads=12,
        kv_heads=6,
        width=144,
        stages=(
            *_GEMMA_TEXT_STAGES,
            replace(_PAGES, name="pages as words, four layers more", grow=(0, 1, 4, 5)),
            *_WORD_STAGES,
        ),
    ),
    "tiny-gemma3-m": Recipe(start="tiny-gemma3-text-m", family="gemma3", stages=_GEMMA_STAGES),
    "tiny-qwen3-s": Recipe(
        layers=3,
        heads=8,
        kv_heads=2,
        stages=(
            *_FROM_NOTHING,
            replace(_RECORDS, name="32 records", grow=()),
            _LARGER_BASE,
            *_LONGER,
            replace(_PAGES, name="pages as words, one layer more", grow=(1,)),
            *_WORD_STAGES,
        ),
    ),
    "tiny-qwen3-vl-s": Recipe(start="tiny-qwen3-s", stages=_VISION_STAGES),
}
"""By name of the model."""

NOT_TRAINED = ("tiny-qwen3-s", "tiny-qwen3-vl-s")
"""Models without a checkpoint."""
