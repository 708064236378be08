"""How each tiny model is trained: where it starts, and its stages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mmheads.tasks.line_pages import PROSE, UNIT_TOKENS
from mmheads.zoo.samples import Sampler, ask, look, recall


@dataclass(frozen=True)
class Source:
    """Samples of one kind: how often a step uses them, and how many it takes."""

    share: float
    batch: int
    sampler: Sampler


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
        grow: Layers after which a new one is inserted before the stage.
        rope_theta: New base of the rotary position embedding from this stage on; 0 keeps it.
        widen: Let all words into the vocabulary before the stage, not those of records alone.
        restart: Begin as from a shipped checkpoint: weights rounded to 16 bits, a new optimizer.
        norm_rate: Factor on the learning rate of the norms of queries and keys, which bound how
            sharply a head can attend: among many keys a head must be sharper.
    """

    name: str
    sources: tuple[Source, ...]
    goals: Mapping[str, float] = field(default_factory=dict)
    steps: int = 2000
    rate: float = 2e-3
    warm_up: int = 20
    decay: bool = False
    grow: tuple[int, ...] = ()
    rope_theta: float = 0.0
    widen: bool = False
    restart: bool = False
    norm_rate: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A model's start and its stages.

    Attributes:
        start: Name of the text-only model it is adapted from; "" for random weights.
        layers: Layers at the start, where the weights are random.
        stages: In order.
        seed: Seed of weights and samples.
    """

    start: str = ""
    layers: int = 4
    stages: tuple[Stage, ...]
    seed: int = 0


def _text(units: int, asks: int, prose: float = 0.0) -> Sampler:
    return ask(units, 0.0, asks, {"text": 1, "successor": 0.08, "nothing": 0.04}, prose)


def _recall(batch: int, *settings: int) -> tuple[Source]:
    return (Source(1, batch, recall(*settings)),)


_UNITS = (4, 5, 7, 9, 11, 14, 18, 22, 28, 36, 45, 57, 72, 90, 114)
"""Lengths of haystacks. With few of them, a model learns at which positions questions stand."""


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


_TEXT_STAGES = (
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
    Stage(
        name="32 records, two layers more",
        sources=_recall(40, 32, 64, 16),
        goals={"text": 0.93},
        grow=(1, 3),
    ),
    Stage(
        name="256 tokens, larger RoPE base",
        sources=(Source(1, 20, _text(14, 24)),),
        steps=250,
        rope_theta=5e6,
    ),
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

_READ = {"rendered": 1.0, "image": 0.5, "identical": 1.0, "icon": 1.0}
_ALL = {"text": 1.0, **_READ, "image": 1.0, "icon": 0.5, "successor": 0.1, "nothing": 0.05}
_SLOW = {**_ALL, "rendered": 3.0, "identical": 0.5, "icon": 0.25}
"""Rendered text is learned last: its key is read on a page and asked for in words."""
_WORDS = {**_ALL, "text": 5.0, "rendered": 1.5, "image": 0.7, "identical": 0.5}
_FAR = {**_ALL, "text": 4.0, "rendered": 3.0, "image": 0.7}
_SENTENCES = {**_ALL, "text": 12.0, "rendered": 0.5, "image": 0.3, "identical": 0.3, "icon": 0.2}
_CODES = {"rendered": 4.0, "text": 0.5, "image": 0.3}
_TEXT_TOO = _prose(0.15, 4000)
"""Text is forgotten unless it is trained on meanwhile."""


def _mixed(
    mix: Mapping[str, float], *lengths: int, share: float = 1.0, asks: int = 20
) -> tuple[Source, ...]:
    """Haystacks of text and pages in any ratio, of so many units."""
    return tuple(
        Source(share, _at_most(6000, units), ask(units, (0.0, 1.0), min(2 * units, asks), mix))
        for units in lengths
    )


def _mostly_long(mix: Mapping[str, float], share: float) -> tuple[Source, ...]:
    """All lengths; each of the longest four is used `share` times as often as a shorter one."""
    return _mixed(mix, *_UNITS[:11], asks=32) + _mixed(mix, *_UNITS[11:], share=share, asks=32)


_VISION_STAGES = (
    Stage(
        name="what is in my cell",
        sources=(Source(0.85, 96, look(0.0)), *_TEXT_TOO),
        goals={"cell": 0.95},
    ),
    Stage(
        name="key or value of my block",
        sources=(Source(0.85, 96, look(0.9)), *_TEXT_TOO),
        goals={"bind": 0.46},
    ),
    Stage(
        name="questions about a page",
        sources=(
            Source(0.7, 96, ask(1, 1.0, 3, _READ)),
            Source(0.15, 96, look(0.9)),
            *_TEXT_TOO,
        ),
        goals={"rendered": 0.9, "icon": 0.9, "option": 0.9},
        steps=750,
    ),
    Stage(name="to 160 tokens", sources=_mixed(_ALL, *_UNITS[:4]), steps=250),
    Stage(
        name="codes on pages",
        sources=tuple(
            Source(3, _at_most(6000, units), ask(units, (0.5, 1.0), 3 * units, _CODES))
            for units in (2, 3, 4, 6, 8)
        )
        + _mixed(_ALL, *_UNITS[2:9]),
        goals={"rendered": 0.85},
        steps=400,
    ),
    Stage(name="to 500 tokens", sources=_mixed(_SLOW, *_UNITS[:9]), steps=140),
    Stage(name="to 1300 tokens", sources=_mixed(_SLOW, *_UNITS[2:13]), steps=120),
    Stage(name="any length", sources=_mixed(_SLOW, *_UNITS), steps=240, decay=True),
    Stage(
        name="text again",
        sources=_mixed(_WORDS, *_UNITS),
        steps=160,
        rate=1.5e-3,
        decay=True,
    ),
    Stage(
        name="longest contexts",
        sources=_mixed(_FAR, *_UNITS[:11]) + _mixed(_FAR, *_UNITS[11:], share=7.0, asks=32),
        steps=350,
        rate=1.5e-3,
        decay=True,
    ),
    Stage(
        name="text among pages",
        sources=_mixed(_SENTENCES, *_UNITS[:9], share=0.5, asks=32)
        + _mixed(_SENTENCES, *_UNITS[9:], share=2.0, asks=32),
        steps=400,
        rate=1.5e-3,
        decay=True,
        restart=True,
    ),
    Stage(
        name="text among many pages",
        sources=_mostly_long(_WORDS, 7.0),
        steps=400,
        rate=1.5e-3,
        norm_rate=4.0,
        decay=True,
    ),
    Stage(
        name="text in the longest contexts",
        sources=_mostly_long(_WORDS, 11.0),
        steps=250,
        rate=1e-3,
        decay=True,
    ),
)

RECIPES = {
    "tiny-qwen3-m": Recipe(stages=_TEXT_STAGES),
    "tiny-qwen3-vl-m": Recipe(start="tiny-qwen3-m", stages=_VISION_STAGES),
}
"""By name of the model."""
