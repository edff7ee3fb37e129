"""GIF, AVIF and HEIC: pixels as Pillow's, costs, and what is said where a library is missing."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dinov3_server.errors import InvalidInput
from dinov3_server.images import cost as cost_module
from dinov3_server.images import formats
from dinov3_server.images.cost import cost_of
from dinov3_server.images.decode import File
from tests.server.images.files import Pixels, encode, exif, photo

MAX_PIXELS = 10_000
COLOR = Image.fromarray(photo(24, 32))
ALPHA = Image.fromarray(photo(24, 32, 4))
PALETTE = COLOR.convert("P")

needs_avif = pytest.mark.skipif(not formats.HAS_AVIF, reason="Pillow has no AVIF")
needs_heic = pytest.mark.skipif(not formats.LIBHEIF, reason="pillow-heif is not installed")


def decoded(data: bytes, *, upright: bool = False) -> Pixels:
    file = File(data, MAX_PIXELS, upright)
    pixels = np.asarray(file.decode())
    assert file.read_size() == pixels.shape[:2]
    cost = cost_of(file)
    if formats.format_name(data) == "HEIC":  # coded in blocks of 64
        assert cost.height * cost.width >= pixels.size // 3
    else:
        assert cost.height * cost.width == pixels.size // 3
    return pixels


def opened(data: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize(
    "data",
    [
        encode(PALETTE, "GIF"),
        encode(PALETTE, "GIF", interlace=0),
        encode(COLOR.convert("L"), "GIF"),
        encode(COLOR.convert("1"), "GIF"),
        encode(PALETTE, "GIF", save_all=True, append_images=[PALETTE.rotate(90)], loop=0, comment=b"c" * 700),
    ],
)
def test_pixels_of_gif(data: bytes) -> None:
    np.testing.assert_array_equal(decoded(data), opened(data))
    assert cost_of(File(data, MAX_PIXELS)).plain


def test_the_transparent_color_of_a_gif_shows() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1, 2])
    data = encode(image, "GIF", transparency=1, optimize=False)
    assert decoded(data).tolist() == [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]


def gif_picture_at(data: bytes) -> int:
    return data.index(b",", 13 + 768)


def test_a_gif_whose_picture_exceeds_its_canvas() -> None:
    data = bytearray(encode(PALETTE, "GIF"))
    struct.pack_into("<HH", data, 6, 5, 4)
    np.testing.assert_array_equal(decoded(bytes(data)), opened(bytes(data)))
    assert decoded(bytes(data)).shape == (24, 32, 3)
    struct.pack_into("<HH", data, gif_picture_at(data) + 5, 65_535, 65_535)
    for read in (cost_of, File.read_size, File.decode):
        with pytest.raises(InvalidInput, match=r"65535x65535 .* allowed are 10000"):
            read(File(bytes(data), MAX_PIXELS))


def test_a_gif_with_a_long_comment_is_not_plain() -> None:
    data = encode(PALETTE, "GIF")
    at = gif_picture_at(data)
    for blocks, plain in ((3, True), (1100, False), (5000, False)):
        comment = b"!\xfe" + (b"\xff" + b"c" * 255) * blocks + b"\0"
        assert cost_of(File(data[:at] + comment + data[at:], MAX_PIXELS)).plain == plain
    assert not cost_of(File(data[:at] + b"!\xfe\0" * 5000 + data[at:], MAX_PIXELS)).plain
    for end in range(6, at + 9):  # cut off
        assert not cost_of(File(data[:end], MAX_PIXELS)).plain


@needs_avif
@pytest.mark.parametrize(
    ("image", "options"),
    [
        (COLOR, {}),
        (COLOR, {"subsampling": "4:4:4", "quality": 100}),
        (COLOR.convert("L"), {}),
        (ALPHA, {}),
        (COLOR, {"save_all": True, "append_images": [COLOR.rotate(180)]}),
    ],
)
def test_pixels_of_avif(image: Image.Image, options: dict[str, object]) -> None:
    data = encode(image, "AVIF", **options)
    np.testing.assert_array_equal(decoded(data), opened(data))
    assert formats.format_name(data) == "AVIF"
    assert not cost_of(File(data, MAX_PIXELS)).plain


@needs_avif
def test_an_avif_is_turned_when_asked_for() -> None:
    data = encode(COLOR, "AVIF", exif=exif(6))
    assert decoded(data).shape == (24, 32, 3)
    np.testing.assert_array_equal(decoded(data, upright=True), np.rot90(decoded(data), -1))


@needs_avif
def test_the_size_of_an_avif_is_that_of_its_header() -> None:
    data = bytearray(encode(COLOR, "AVIF"))
    struct.pack_into(">II", data, data.index(b"ispe") + 8, 90_000, 80_000)
    with pytest.raises(InvalidInput, match=r"the AVIF file .* 80000x90000 .* allowed are 10000"):
        cost_of(File(bytes(data), MAX_PIXELS))


@needs_heic
def test_pixels_of_heic() -> None:
    for image, options in ((COLOR, {}), (ALPHA, {"chroma": 444}), (COLOR.convert("L"), {})):
        data = encode(image, "HEIF", **options)
        assert formats.format_name(data) == "HEIC"
        np.testing.assert_array_equal(decoded(data), opened(data))
        assert not cost_of(File(data, MAX_PIXELS)).plain


@needs_heic
def test_a_heic_is_always_upright() -> None:
    data = encode(COLOR, "HEIF", exif=exif(6).tobytes())
    assert decoded(data).shape == (32, 24, 3)
    np.testing.assert_array_equal(decoded(data), decoded(data, upright=True))


def box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", 8 + len(body)) + kind + body


def test_sizes_in_boxes() -> None:
    head = box(b"ftyp", b"avif\0\0\0\0avifmif1")
    ispe = [box(b"ispe", struct.pack(">III", 0, *size)) for size in ((10, 20), (300, 200), (40, 30))]
    meta = box(b"meta", bytes(4) + box(b"iprp", box(b"ipco", b"".join(ispe))))

    def size(data: bytes) -> tuple[int, int] | None:
        header = cost_module._iso(data)
        return header and (header.height, header.width)

    assert size(head + box(b"free", bytes(99)) + meta) == (200, 300)
    wide = struct.pack(">I4sQ", 1, b"mdat", 16 + 7) + bytes(7)
    assert size(head + wide + meta) == (200, 300)
    track = box(b"tkhd", bytes(76) + struct.pack(">II", 64 << 16, 48 << 16))
    assert size(head + box(b"moov", box(b"trak", track))) == (48, 64)
    assert size(head + struct.pack(">I4s", 0, b"meta") + meta[8:]) == (200, 300)  # to the end of the file
    assert size(head + struct.pack(">I4s", 3, b"meta") + meta[8:]) is None
    assert size(head + box(b"free", b"") * 5000 + meta) is None
    assert size(head) == (0, 0)


@pytest.mark.parametrize(
    ("brands", "name"),
    [
        (b"avis\0\0\0\0msf1", "AVIF"),
        (b"mif1\0\0\0\0mif1avif", "AVIF"),
        (b"mif1\0\0\0\0mif1heic", "HEIC"),
        (b"heix\0\0\0\0mif1heix", "HEIC"),
        (b"hevc\0\0\0\0msf1hevc", "HEIC"),
        (b"msf1\0\0\0\0msf1", "HEIF"),
        (b"isom\0\0\0\0mp42", "MP4-like"),
    ],
)
def test_brands(brands: bytes, name: str) -> None:
    assert formats.format_name(box(b"ftyp", brands) + box(b"meta", b"avif" * 9)) == name


WITHOUT = """
import sys
sys.modules["pillow_heif"] = sys.modules["PIL._avif"] = None
from dinov3_server.images.decode import File
for data in (b"\\0\\0\\0\\x18ftypheic\\0\\0\\0\\0mif1heic", b"\\0\\0\\0\\x1cftypavif\\0\\0\\0\\0avifmif1miaf"):
    try:
        File(data, 100).decode()
    except Exception as error:
        print(error)
"""


def test_what_is_said_without_the_libraries() -> None:
    env = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, check=True, text=True, env=env)
    heic, avif = done.stdout.splitlines()
    allowed = "allowed are JPEG, PNG, WebP, BMP, TIFF and GIF files"
    assert f"looks like HEIC (it begins with 00 00 00 18 66 74 79 70); {allowed}" in heic
    assert heic.endswith("(for HEIC install dinov3-serving[heif] on the server)")
    assert f"looks like AVIF (it begins with 00 00 00 1c 66 74 79 70); {allowed}" in avif
    assert avif.endswith("without AVIF; Pillow >= 11.3 has it)")
