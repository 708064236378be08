"""Examples: what their images become."""

import io

import numpy as np
from PIL import Image

from mmheads.examples import Example, Video


def test_images_given_in_python_are_those_that_people_see():
    transparent = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    grey = Image.fromarray(np.full((2, 4), 32768, np.uint16))
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # To be turned by 90 degrees.
    Image.new("RGB", (4, 2), "red").save(file, "JPEG", exif=exif)
    sideways = Image.open(file)
    plain = Image.new("RGB", (4, 2), "blue")
    example = Example(
        context=(transparent, Video(frames=(grey, plain))), question=("why ?", sideways, plain)
    )
    white, video = example.context
    assert (white.mode, white.getpixel((0, 0))) == ("RGB", (255, 255, 255))
    assert video.frames[0].getpixel((0, 0)) == (128, 128, 128)
    assert video.frames[1] is plain
    _, upright, same = example.question
    assert upright.size == (2, 4)
    assert same is plain
