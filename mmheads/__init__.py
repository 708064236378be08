"""Find the attention heads of a vision-language model that fetch the evidence, and use them.

The names below are all that most work needs; each is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmheads.answers import answer as answer
    from mmheads.attention import ablate as ablate
    from mmheads.attention import gate as gate
    from mmheads.controls import random_controls as random_controls
    from mmheads.example_files import read_examples as read_examples
    from mmheads.examples import Example as Example
    from mmheads.examples import Region as Region
    from mmheads.explorer import explore as explore
    from mmheads.heads import HeadSet as HeadSet
    from mmheads.heads import overlap as overlap
    from mmheads.models import load as load
    from mmheads.prompts import encode as encode
    from mmheads.retrieval import DocumentIndex as DocumentIndex
    from mmheads.scores import HeadScores as HeadScores
    from mmheads.scores import spearman as spearman
    from mmheads.scoring import score_heads as score_heads
    from mmheads.streaming import stream as stream

__version__ = "0.1.0"

_MODULES = {
    "DocumentIndex": "retrieval",
    "Example": "examples",
    "HeadScores": "scores",
    "HeadSet": "heads",
    "Region": "examples",
    "ablate": "attention",
    "answer": "answers",
    "encode": "prompts",
    "explore": "explorer",
    "gate": "attention",
    "load": "models",
    "overlap": "heads",
    "random_controls": "controls",
    "read_examples": "example_files",
    "score_heads": "scoring",
    "spearman": "scores",
    "stream": "streaming",
}
"""The module of each public name."""

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    """A public name, from its module."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    """The public names, for completion."""
    return sorted([*globals(), *_MODULES])
