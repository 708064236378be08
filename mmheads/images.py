"""Images of every source as people see them: upright, on white, in RGB with 8 bits per channel.

Every reader of the package opens its images here, so that the model sees what a viewer shows and
the boxes that somebody read off a viewer fit.
"""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF", "ICO")
"""Formats that are read. EPS is left out because Pillow runs Ghostscript for it."""

MAX_PIXELS = 178_956_970
"""Largest width times height of an image; Pillow refuses larger files as decompression bombs."""

MAX_PIXELS_OF_FRAMES = 1_000_000_000
"""Largest number of pixels that `open_frames` returns for one file (3 GB of memory)."""

_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # Tags of TIFF.
_URL = re.compile(r"(^|[\\/])([a-z][a-z0-9+.]+:[\\/]|data:)", re.IGNORECASE)

Source = str | Path | bytes | Image.Image


class _RefusedError(ValueError):
    """What is wrong with an image, as the end of a sentence that begins with its name."""


def open_image(source: Source, name: str = "") -> Image.Image:
    """Open one image and return it as people see it, in RGB.

    The EXIF orientation is applied first, so boxes refer to the upright picture. Transparent
    pixels are composited on white. Greyscale of more than 8 bits is scaled from the range of its
    format (0 to 65,535 for 16 bits) to 0 to 255; mode "I" counts as 16 bits. The further pictures
    in photos of phones and stereo cameras (MPO: previews, brightness maps) are not frames.

    Args:
        source: A path, the bytes of a file, or an image of Pillow.
        name: What error messages call the image; by default the path.

    Raises:
        ValueError: The image is missing, empty, cut, broken, larger than `MAX_PIXELS`, of another
            format than `FORMATS`, has several frames, or holds numbers of unknown range
            (floating point, 32-bit integers). The message is one sentence that begins with the
            name.
        TypeError: The source is of another type.
    """
    with _opened(source, name) as image:
        if (count := _frame_count(image)) > 1:
            raise _RefusedError(
                f"has {count} frames where one image is expected; save the one that you mean as "
                "a file of its own, or read all of them as pages with mmheads.images.open_frames"
            )
        return _as_seen(image)


def image_size(source: Source, name: str = "") -> tuple[int, int]:
    """Read the width and height of an image from its header, without decoding its pixels.

    The EXIF orientation is not applied: it can exchange the two numbers.

    Args:
        source: A path, the bytes of a file, or an image of Pillow.
        name: What error messages call the image; by default the path.

    Raises:
        ValueError: The image is missing, empty, or of another format than `FORMATS`.
        TypeError: The source is of another type.
    """
    with _opened(source, name) as image:
        return image.size


def open_frames(source: Source, name: str = "") -> tuple[Image.Image, ...]:
    """Open all frames of a file, such as the pages of a scan in TIFF, as images in RGB.

    Each frame is what `open_image` would return for it; a file of one image has one frame.

    Args:
        source: A path, the bytes of a file, or an image of Pillow.
        name: What error messages call the file; by default the path.

    Raises:
        ValueError: As for `open_image`, or the frames together have more than
            `MAX_PIXELS_OF_FRAMES` pixels.
        TypeError: The source is of another type.
    """
    images: list[Image.Image] = []
    pixels = 0
    with _opened(source, name) as image:
        count = _frame_count(image)
        for index in range(count):
            if count > 1:
                image.seek(index)
            pixels += image.width * image.height
            if pixels > MAX_PIXELS_OF_FRAMES:
                raise _RefusedError(
                    f"has {count} frames with more than {MAX_PIXELS_OF_FRAMES:,} pixels "
                    "(MAX_PIXELS_OF_FRAMES); split it into several files or make it smaller"
                )
            images.append(_as_seen(image))
    return tuple(images)


@contextmanager
def _opened(source: Source, name: str) -> Iterator[Image.Image]:
    """An image of Pillow, open for a while; every error of the block becomes one ValueError."""
    name = name or _name(source)
    try:
        with warnings.catch_warnings():
            # Pillow warns about images above half of the size that it refuses.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            if isinstance(source, Image.Image):
                yield source
                return
            with _stream(source) as stream, _identified(stream) as image:
                yield image
    except _RefusedError as error:
        raise ValueError(f"{name} {error}") from None
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{name} is too large ({error}); expected at most {MAX_PIXELS:,} pixels (MAX_PIXELS)"
        ) from error
    except Exception as error:  # Pillow raises nearly every kind of exception for broken files.
        reason = str(error) or type(error).__name__
        raise ValueError(
            f"{name} cannot be read as an image ({reason}); expected a whole, undamaged file"
        ) from error


def _name(source: Source) -> str:
    if isinstance(source, Image.Image):
        return str(getattr(source, "filename", "")) or "The image"
    if isinstance(source, bytes):
        return f"The image of {len(source):,} bytes"
    if isinstance(source, str | Path):
        text = str(source)
        return text if len(text) <= 300 else f"{text[:100]}..."
    raise TypeError(
        f"The source of an image is of type {type(source).__name__}; expected a path, bytes, or "
        "an image of Pillow"
    )


def _stream(source: str | Path | bytes) -> BinaryIO:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if not os.path.exists(source):
        if _URL.search(str(source)):
            raise _RefusedError("is a URL; expected the path of an image that is on this machine")
        raise _RefusedError("does not exist; expected an image file")
    if not os.path.isfile(source):
        raise _RefusedError("is a folder or a device; expected an image file")
    return Path(source).open("rb")


def _identified(stream: BinaryIO) -> Image.Image:
    start = stream.read(512)
    stream.seek(0)
    if not start:
        raise _RefusedError("is empty (0 bytes); expected an image")
    Image.init()
    try:
        return Image.open(stream, formats=[f for f in FORMATS if f in Image.OPEN])
    except UnidentifiedImageError:
        if start.startswith(b"%PDF"):
            advice = "is a PDF file; open it with mmheads.pdfs.open_pdf"
        elif b"<svg" in start:
            advice = "is an SVG drawing; export it as a PNG file"
        elif start[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1"):
            advice = "is a HEIC photo; export it as a JPEG file"
        else:
            advice = (
                f"is damaged, or not an image of a known format (it begins with {start[:16]!r}); "
                f"expected a whole file of one of {', '.join(FORMATS)}"
            )
        raise _RefusedError(advice) from None


def _frame_count(image: Image.Image) -> int:
    return 1 if image.format == "MPO" else int(getattr(image, "n_frames", 1))


def _as_seen(image: Image.Image) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _RefusedError(
            f"has {width} x {height} pixels; expected at most {MAX_PIXELS:,} (MAX_PIXELS)"
        )
    if not width * height:
        raise _RefusedError(f"has {width} x {height} pixels; expected at least one")
    if image.mode == "F":
        raise _RefusedError(
            "holds floating-point numbers, and which of them is white is not known; scale them "
            "to 0 to 255 and save them with 8 bits per pixel"
        )
    _match_transparent_value(image)
    tags = dict(getattr(image, "tag_v2", {}))
    upright = _upright(image)
    if upright.mode.startswith("I"):
        upright = _eight_bits(upright, tags)
    if upright.has_transparency_data:
        if upright.mode == "La":
            upright = upright.convert("LA")
        white = Image.new("RGBA", upright.size, "white")
        upright = Image.alpha_composite(white, upright.convert("RGBA"))
    seen = upright.convert("RGB")
    seen.info.clear()
    return seen


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF data say; damaged EXIF data say nothing."""
    image.load()
    try:
        image.getexif()
    except Exception:  # The parser of EXIF raises nearly every kind of exception.
        return image
    return ImageOps.exif_transpose(image)


def _match_transparent_value(image: Image.Image) -> None:
    """Scale the transparent value of a PNG file as Pillow scales its pixels.

    Pillow gives pixels of 2 and 4 bits, and those of 16 bits per channel, in 8 bits, but leaves
    the transparent value as it is in the file.
    """
    tiles = getattr(image, "tile", None)
    value = image.info.get("transparency")
    if image.format != "PNG" or not tiles or value is None:
        return
    match tiles[0].args:
        case "L;2":
            image.info["transparency"] = value * 85
        case "L;4":
            image.info["transparency"] = value * 17
        case "RGB;16B":
            image.info["transparency"] = tuple(channel >> 8 for channel in value)


def _eight_bits(image: Image.Image, tags: dict[int, Any]) -> Image.Image:
    """Scale greyscale of more than 8 bits, of mode "I" or "I;16...", to mode "L" or "LA".

    Args:
        image: The image.
        tags: The tags of the file if it is TIFF, whose samples may have other than 16 bits, or a
            sign, or 0 as white.
    """
    bits = int(np.max(tags.get(_BITS, 16)))
    signed = 2 in np.atleast_1d(tags.get(_SAMPLE_FORMAT, 1))
    if bits > 16:
        raise _RefusedError(
            f"holds integers of {bits} bits, and which of them is white is not known; scale them "
            "to 0 to 255 and save them with 8 bits per pixel"
        )
    values = np.asarray(image)
    white = 2 ** (bits - signed) - 1
    if values.min() < 0 or values.max() > white:
        raise _RefusedError(
            f"holds grey values from {values.min()} to {values.max()}; expected 0 to {white}"
        )
    table = ((np.arange(white + 1) * 255 + white // 2) // white).astype(np.uint8)
    grey = Image.fromarray(table[::-1][values] if tags.get(_PHOTOMETRIC) == 0 else table[values])
    transparent = image.info.get("transparency")
    if transparent is None:
        return grey
    alpha = Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
    return Image.merge("LA", (grey, alpha))
