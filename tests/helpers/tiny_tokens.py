"""How the tiny Qwen models count tokens: an independent count to compare the encoder with.

Their prompt starts with one token, a word is one token, and an image has one token for each cell of
16 x 16 px, between two wrappers.
"""

from collections.abc import Sequence

from PIL import Image

from mmheads.examples import Example, Part
from mmheads.tasks.line_pages import CELL


def count_tokens(parts: Sequence[Part]) -> int:
    """Number of tokens of parts in a prompt."""
    return sum(
        (part.width // CELL) * (part.height // CELL) + 2
        if isinstance(part, Image.Image)
        else len(part.split())
        for part in parts
    )


def evidence_tokens(example: Example) -> list[int]:
    """Places in the prompt of the tokens of an example's evidence, in order."""
    tokens: list[int] = []
    for region in example.evidence or ():
        part = example.context[region.part]
        start = 1 + count_tokens(example.context[: region.part])
        if isinstance(part, Image.Image):
            columns = part.width // CELL
            left, top, right, bottom = (int(edge) // CELL for edge in region.box)
            for row in range(top, bottom):
                first = start + 1 + columns * row
                tokens += range(first + left, first + right)
        else:
            first, last = region.chars
            before = len(part[:first].split())
            tokens += range(start + before, start + before + len(part[first:last].split()))
    return tokens
