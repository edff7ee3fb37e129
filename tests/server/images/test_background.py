"""Alpha over a color: Pillow's alpha_composite, for every form of alpha."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image

from dinov3_server.images.cost import cost_of
from dinov3_server.images.decode import File
from dinov3_serving.images import Color
from tests.server.images.files import PNG_GRAY, PNG_RGB, Pixels, encode, exif, photo, png, png_chunk

BACKGROUND = Color(200, 30, 90)
RGBA = Image.fromarray(photo(24, 32, 4))
LA = RGBA.convert("LA")
PALETTE = RGBA.convert("RGB").convert("P")
LUMA = photo(24, 32, 1)
COLOR = photo(24, 32)
USED = PALETTE.getpixel((0, 0))


def decoded(data: bytes, background: Color | None = BACKGROUND) -> Pixels:
    return np.asarray(File(data, 10_000, background=background).decode())


def over(data: bytes) -> Pixels:
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image).convert("RGB"))


WITH_ALPHA = {
    "png": encode(RGBA, "PNG"),
    "png gray": encode(LA, "PNG"),
    "png palette, one color": encode(PALETTE, "PNG", transparency=USED),
    "png palette, many": encode(PALETTE, "PNG", transparency=bytes(range(256))),
    "png color": png(32, 24, 8, PNG_RGB, COLOR.tobytes(), png_chunk(b"tRNS", struct.pack(">3H", *COLOR[0, 0]))),
    "png gray level": png(32, 24, 8, PNG_GRAY, LUMA.tobytes(), png_chunk(b"tRNS", struct.pack(">H", int(LUMA[0, 0])))),
    "webp": encode(RGBA, "WEBP", lossless=True, exact=True),
    "gif": encode(PALETTE, "GIF", transparency=USED),
    "tiff": encode(RGBA, "TIFF"),
    "tiff gray": encode(LA, "TIFF"),
}


@pytest.mark.parametrize("kind", WITH_ALPHA)
def test_alpha_is_composited(kind: str) -> None:
    data = WITH_ALPHA[kind]
    np.testing.assert_array_equal(decoded(data), over(data))
    assert (decoded(data) != decoded(data, None)).any()


def test_the_formula() -> None:
    """Half of red over blue; alpha of nothing shows the background alone, whatever color is stored."""
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 128))
    image.putpixel((1, 0), (9, 9, 9, 0))
    assert decoded(encode(image, "PNG"), Color(0, 0, 255)).tolist() == [[[128, 0, 127], [0, 0, 255]]]


def test_a_transparent_level_of_16_bit_gray() -> None:
    samples = np.array([[0x1234, 0x1235, 0xFF00]], np.uint16)
    chunk = png_chunk(b"tRNS", struct.pack(">H", 0x1234))
    data = png(3, 1, 16, PNG_GRAY, samples.astype(">u2").tobytes(), chunk)
    assert decoded(data).tolist() == [[list(BACKGROUND), [0x12] * 3, [0xFF] * 3]]
    assert decoded(data, None).tolist() == [[[0x12] * 3, [0x12] * 3, [0xFF] * 3]]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP", "GIF"])
def test_files_without_alpha_are_the_same(format: str) -> None:
    data = encode(RGBA.convert("RGB"), format)
    np.testing.assert_array_equal(decoded(data), decoded(data, None))


def test_it_is_turned_afterwards() -> None:
    data = encode(RGBA, "PNG", exif=exif(6))
    turned = File(data, 10_000, True, BACKGROUND).decode()
    np.testing.assert_array_equal(np.asarray(turned), np.rot90(over(data), -1))


def test_it_costs_memory() -> None:
    data = encode(Image.new("RGBA", (1000, 1000)), "PNG")
    more = cost_of(File(data, 10**6, background=BACKGROUND)).nbytes - cost_of(File(data, 10**6)).nbytes
    assert more == 12 * 1000 * 1000
