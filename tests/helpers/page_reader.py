"""Read a drawn page back, without the code that drew it knowing."""

from functools import cache

import numpy as np
from PIL import Image

from mmheads.tasks import pages
from mmheads.tasks.line_pages import CODES, ICONS, VALUES


@cache
def _names() -> dict[bytes, str]:
    return {pages.sprite(n).tobytes(): n for n in (*CODES, *ICONS, *VALUES)}


def sprites(cell: Image.Image | np.ndarray) -> set[str]:
    """The icon, code or value that a cell of 16 x 16 px shows, wherever it stands."""
    pixels = np.asarray(cell)
    views = [pixels[y : y + 14, x : x + 14].tobytes() for y in range(3) for x in range(3)]
    return {_names()[view] for view in views if view in _names()}


def cells(image: Image.Image | np.ndarray) -> list[str]:
    """What each cell of an image shows, row by row, "" for a blank one."""
    pixels = np.asarray(image)
    rows, columns = pixels.shape[0] // 16, pixels.shape[1] // 16
    bands = [pixels[16 * row : 16 * row + 16] for row in range(rows)]
    return [
        "".join(sprites(band[:, 16 * i : 16 * i + 16])) for band in bands for i in range(columns)
    ]
