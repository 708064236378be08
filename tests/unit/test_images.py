"""Images of every mode and format get the pixel values that a viewer shows, or one clear error."""

import io
import struct
import warnings
import zlib
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from mmheads import images
from mmheads.images import open_frames, open_image

RED, GREEN, BLUE, GREY = (255, 0, 0), (0, 128, 0), (0, 0, 255), (90, 90, 90)
SCAN = [0, 1, 128, 129, 25700, 32768, 65406, 65407, 65535]
"""Values of 16 bits; 257 of them are one step of 8 bits, so 128 rounds down and 129 up."""
SCAN_IN_8_BITS = [0, 0, 0, 1, 100, 128, 254, 255, 255]


def file_of(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(image: Image.Image) -> list:
    assert image.mode == "RGB"
    return np.asarray(image).reshape(-1, 3).tolist()


def greys(image: Image.Image) -> list:
    rows = np.asarray(image)
    assert image.mode == "RGB"
    assert (rows == rows[..., :1]).all()
    return rows[..., 0].ravel().tolist()


def quadrants() -> Image.Image:
    """Red, green above blue, grey; 6 pixels wide, 4 high."""
    image = Image.new("RGB", (6, 4))
    for index, color in enumerate((RED, GREEN, BLUE, GREY)):
        left, top = 3 * (index % 2), 2 * (index // 2)
        image.paste(color, (left, top, left + 3, top + 2))
    return image


def png_by_hand(bits: int, color: int, row: bytes, width: int, transparent: bytes) -> bytes:
    """A PNG file with one row of pixels, of a kind that Pillow does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", width, 1, bits, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(kind, content)
        for kind, content in (
            (b"IHDR", header),
            (b"tRNS", transparent),
            (b"IDAT", zlib.compress(b"\0" + row)),
            (b"IEND", b""),
        )
    )


def tiff_by_hand(row: bytes, width: int, bits: int, *, white: int = 1, kind: int = 1) -> bytes:
    """A greyscale TIFF file with one row; white 0 means that zeros are white, kind 2 a sign."""
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: white, 273: 0, 277: 1, 278: 1}
    tags |= {279: len(row), 339: kind}
    start = 8 + 2 + 12 * len(tags) + 4
    tags[273] = start
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + b"\0\0\0\0" + row


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_turns_the_picture_upright(orientation, kind):
    to_stored = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    seen = quadrants().resize((48, 32), Image.Resampling.NEAREST)
    stored = seen.transpose(to_stored[orientation]) if orientation > 1 else seen
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {} if kind in ("PNG", "TIFF") else {"quality": 95}
    content = file_of(stored, kind, exif=exif, **options)
    for source in (content, Image.open(io.BytesIO(content))):
        image = open_image(source)
        assert image.size == (48, 32)
        for place, color in {(8, 8): RED, (40, 8): GREEN, (8, 24): BLUE, (40, 24): GREY}.items():
            assert np.abs(np.subtract(image.getpixel(place), color)).max() <= 6
        assert open_image(image).tobytes() == image.tobytes()


def test_orientation_of_transparent_16_bit_scans_is_applied_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    scan = Image.fromarray(np.array([[0, 300, 65535]], np.uint16))
    image = open_image(file_of(scan, exif=exif, transparency=300))
    assert image.size == (1, 3)
    assert greys(image) == [0, 255, 255]


def test_damaged_exif_data_do_not_hide_the_picture():
    content = file_of(Image.new("RGB", (3, 2), RED), exif=b"Exif\0\0garbage garbage")
    assert pixels(open_image(content)) == [[255, 0, 0]] * 6


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", None])
def test_transparency_is_composited_on_white(kind):
    ink = Image.new("RGBA", (4, 1), (0, 0, 0, 0))
    for place, color in enumerate([(0, 0, 0, 0), (0, 0, 0, 255), (0, 0, 0, 51), (200, 0, 0, 128)]):
        ink.putpixel((place, 0), color)
    source = ink if kind is None else file_of(ink, kind, **{"lossless": True, "exact": True})
    expected = [[255] * 3, [0] * 3, [204] * 3, [227, 127, 127]]
    assert np.abs(np.subtract(pixels(open_image(source)), expected)).max() <= 1


def test_transparent_grey_and_palettes_are_composited_on_white():
    grey = Image.new("LA", (3, 1))
    for place, value in enumerate([(0, 0), (0, 255), (100, 0)]):
        grey.putpixel((place, 0), value)
    assert greys(open_image(file_of(grey))) == [255, 0, 255]
    assert greys(open_image(grey.convert("La"))) == [255, 0, 255]
    assert greys(open_image(Image.new("RGBa", (1, 1)))) == [255]

    palette = Image.new("P", (3, 1))
    palette.putpalette([0, 0, 0, 10, 20, 30, *RED])
    palette.putdata([0, 1, 2])
    one = file_of(palette, transparency=0)
    some = file_of(palette, transparency=b"\x00\xff\x00")
    gif = file_of(palette, "GIF", transparency=0)
    assert pixels(open_image(one)) == [[255] * 3, [10, 20, 30], list(RED)]
    assert pixels(open_image(some)) == [[255] * 3, [10, 20, 30], [255] * 3]
    assert pixels(open_image(gif)) == [[255] * 3, [10, 20, 30], list(RED)]
    with_alpha = Image.new("P", (2, 1))
    with_alpha.putpalette([0, 0, 0, 0, 0, 0, 0, 255], "RGBA")
    with_alpha.putdata([0, 1])
    assert greys(open_image(with_alpha)) == [255, 0]


@pytest.mark.parametrize(
    ("mode", "values", "transparent", "expected"),
    [
        ("1", [0, 255], 0, [[255] * 3, [255] * 3]),
        ("1", [0, 255], 1, [[0] * 3, [255] * 3]),
        ("L", [0, 7, 8], 7, [[0] * 3, [255] * 3, [8] * 3]),
        ("RGB", [(1, 2, 3), (1, 2, 4)], (1, 2, 3), [[255] * 3, [1, 2, 4]]),
    ],
)
def test_one_transparent_value_of_a_png_becomes_white(mode, values, transparent, expected):
    image = Image.new(mode, (len(values), 1))
    image.putdata(values)
    assert pixels(open_image(file_of(image, transparency=transparent))) == expected


def test_transparent_values_of_2_4_and_16_bits_are_found():
    grey, color = 0, 2
    two = png_by_hand(2, grey, b"\x1b", 4, b"\0\x01")
    assert greys(open_image(two)) == [0, 255, 170, 255]
    four = png_by_hand(4, grey, b"\x5a", 2, b"\0\x05")
    assert greys(open_image(four)) == [255, 170]
    sixteen = png_by_hand(16, grey, struct.pack(">3H", 0, 1000, 40000), 3, struct.pack(">H", 1000))
    assert greys(open_image(sixteen)) == [0, 255, 156]
    row = struct.pack(">6H", 1000, 2000, 3000, 40000, 50000, 60000)
    channels = png_by_hand(16, color, row, 2, struct.pack(">3H", 1000, 2000, 3000))
    assert pixels(open_image(channels)) == [[255] * 3, [156, 195, 234]]


def test_greyscale_of_16_bits_is_scaled_not_cut():
    little = Image.fromarray(np.array([SCAN], "<u2"))
    big = Image.fromarray(np.array([SCAN], ">u2"))
    integers = Image.fromarray(np.array([SCAN], np.int32))
    assert (little.mode, big.mode, integers.mode) == ("I;16", "I;16B", "I")
    files = [file_of(image, kind) for image in (little, big) for kind in ("PNG", "TIFF")]
    files.append(file_of(little, "PPM"))
    for source in (little, big, integers, *files):
        assert greys(open_image(source)) == SCAN_IN_8_BITS


def test_scans_of_12_bits_with_a_sign_or_zero_as_white_are_scaled_from_their_own_range():
    twelve = tiff_by_hand(b"\xff\xf8\x00", 2, 12)
    assert greys(open_image(twelve)) == [255, 128]
    inverted = tiff_by_hand(struct.pack("<3H", 0, 25700, 65535), 3, 16, white=0)
    assert greys(open_image(inverted)) == [255, 155, 0]
    assert greys(open_image(tiff_by_hand(b"\0\xff", 2, 8, white=0))) == [255, 0]
    signed = tiff_by_hand(struct.pack("<2h", 0, 32767), 2, 16, kind=2)
    assert greys(open_image(signed)) == [0, 255]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (tiff_by_hand(struct.pack("<2h", -5, 9), 2, 16, kind=2), "from -5 to 9; expected 0 to 327"),
        (tiff_by_hand(struct.pack("<I", 9), 1, 32), "holds integers of 32 bits"),
        (tiff_by_hand(struct.pack("<f", 0.5), 1, 32, kind=3), "holds floating-point numbers"),
        (Image.new("F", (1, 1), 0.5), "holds floating-point numbers"),
        (Image.new("I", (1, 1), 65536), "from 65536 to 65536; expected 0 to 65535"),
        (Image.new("I", (1, 1), -1), "from -1 to -1; expected 0 to 65535"),
    ],
)
def test_numbers_without_a_known_white_are_refused(source, message):
    with pytest.raises(ValueError, match=rf"^scan\.tif holds .*{message.removeprefix('holds ')}"):
        open_image(source, "scan.tif")


def test_other_modes_keep_their_colors():
    cmyk = Image.new("CMYK", (1, 1), (0, 255, 255, 0))
    assert pixels(open_image(cmyk)) == [list(RED)]
    assert np.abs(np.subtract(pixels(open_image(file_of(cmyk, "JPEG"))), RED)).max() <= 2
    assert pixels(open_image(file_of(cmyk, "TIFF"))) == [list(RED)]
    bits = Image.new("1", (2, 1))
    bits.putpixel((1, 0), 1)
    for source in (bits, file_of(bits), file_of(bits, "TIFF"), file_of(bits, "PPM")):
        assert greys(open_image(source)) == [0, 255]
    palette = quadrants().quantize(4)
    for source in (palette, file_of(palette), file_of(palette, "BMP"), file_of(palette, "GIF")):
        assert pixels(open_image(source)) == pixels(quadrants())
    ycbcr = quadrants().convert("YCbCr")
    assert np.abs(np.subtract(pixels(open_image(ycbcr)), pixels(quadrants()))).max() <= 2


def test_the_result_is_a_copy_without_metadata():
    image = Image.new("RGB", (2, 1), BLUE)
    image.info["dpi"] = (72, 72)
    opened = open_image(image)
    opened.putpixel((0, 0), RED)
    assert image.getpixel((0, 0)) == BLUE
    assert opened.info == {}


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "WEBP", "PNG"])
def test_several_frames_are_an_error_or_pages(kind, tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, GREEN, BLUE)]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    path = tmp_path / "scan"
    content = file_of(frames[0], kind, save_all=True, append_images=frames[1:], **lossless)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"scan has 3 frames where one image .*open_frames$"):
        open_image(path)
    colors = [frame.getpixel((4, 4)) for frame in open_frames(path)]
    assert colors == [RED, GREEN, BLUE]


def test_one_image_is_one_frame_and_previews_in_photos_are_none():
    assert [frame.size for frame in open_frames(quadrants())] == [(6, 4)]
    photo, preview = quadrants().resize((48, 32)), quadrants()
    content = file_of(photo, "MPO", save_all=True, append_images=[preview])
    assert Image.open(io.BytesIO(content)).n_frames == 2
    assert open_image(content).size == (48, 32)
    assert [frame.size for frame in open_frames(content)] == [(48, 32)]


def test_frames_are_bounded_together(monkeypatch):
    frames = [Image.new("L", (10, 10), value) for value in (0, 100, 200)]
    content = file_of(frames[0], "TIFF", save_all=True, append_images=frames[1:])
    monkeypatch.setattr(images, "MAX_PIXELS_OF_FRAMES", 250)
    with pytest.raises(ValueError, match=r"scan has 3 frames with more than 250 pixels"):
        open_frames(content, "scan")


def test_sizes_up_to_the_one_limit_are_read_without_a_warning(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    monkeypatch.setattr(images, "MAX_PIXELS", 200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(file_of(Image.new("L", (20, 10)))).size == (20, 10)
    with pytest.raises(ValueError, match=r"^big.png is too large .* at most 200 pixels"):
        open_image(file_of(Image.new("L", (21, 10))), "big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ValueError, match=r"^big.png has 21 x 10 pixels; expected at most 200"):
        open_image(file_of(Image.new("L", (21, 10))), "big.png")


def test_a_decompression_bomb_is_one_sentence_and_is_not_decoded():
    header = struct.pack(">IIBBBBB", 60000, 60000, 1, 0, 0, 0, 0)
    content = png_by_hand(1, 0, b"", 1, b"\0\0")
    bomb = content[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + content[33:]
    with pytest.raises(ValueError, match=r"^bomb.png is too large .*178,956,970 pixels") as caught:
        open_image(bomb, "bomb.png")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"no image", "is damaged, or not an image of a known format .*b'no image'.*PNG, JPEG"),
        (b"<?xml version='1.0'?><svg xmlns='x'/>", "is an SVG drawing; export it"),
        (b"\0\0\0\x24ftypheic\0\0\0\0mif1", "is a HEIC photo; export it"),
        (b"%PDF-1.7\n", "is a PDF file; open it with mmheads.pdfs.open_pdf"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is damaged, or not an image"),
        (file_of(quadrants())[:60], "cannot be read as an image"),
        (file_of(quadrants())[:20], "is damaged|cannot be read"),
        (file_of(quadrants().resize((600, 400)), "JPEG")[:3000], "cannot be read as an image"),
        (file_of(quadrants(), "TIFF")[:-100], "is damaged"),
        (file_of(quadrants(), "GIF")[:30], "is damaged"),
    ],
)
def test_broken_files_are_one_sentence_with_their_name(content, message, tmp_path):
    path = tmp_path / "page ä 1.png"
    path.write_bytes(content)
    for opener in (open_image, open_frames):
        with pytest.raises(ValueError, match=rf"^\S*/\S+/page ä 1.png ({message})") as caught:
            opener(path)
        assert "\n" not in str(caught.value)


def test_every_cut_and_every_flipped_bit_gives_an_image_or_a_value_error():
    kinds = {"PNG": "RGBA", "JPEG": "RGB", "WEBP": "RGB", "GIF": "P", "TIFF": "RGB", "BMP": "RGB"}
    random = np.random.default_rng(0)
    for kind, mode in kinds.items():
        whole = file_of(quadrants().convert(mode), kind)
        cuts = [whole[:size] for size in range(0, len(whole), max(1, len(whole) // 60))]
        for place in random.integers(0, len(whole), 60):
            cuts.append(whole[:place] + bytes([whole[place] ^ 0x81]) + whole[place + 1 :])
        read = 0
        for content in cuts:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with suppress(ValueError):
                    read += open_image(content).mode == "RGB"
        assert read < len(cuts)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.png", "missing.png does not exist; expected an image file"),
        ("https://example.org/a.png", "a.png is a URL"),
        ("data:image/png;base64," + 9000 * "A", r"^data:image/png.{1,90}\.\.\. is a URL"),
        ("a\0b.png", "does not exist"),
    ],
)
def test_what_is_no_file_is_said(source, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        open_image(source)
    with pytest.raises(ValueError, match=message.removeprefix("^")):
        open_image(tmp_path / source)


def test_folders_and_other_types_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is a folder or a device; expected an image file"):
        open_image(tmp_path)
    with pytest.raises(TypeError, match="is of type int; expected a path, bytes, or an image"):
        open_image(5)
    with pytest.raises(ValueError, match="has 0 x 5 pixels; expected at least one"):
        open_image(Image.new("RGB", (0, 5)))
