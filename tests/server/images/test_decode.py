"""The exact pixels of every kind of file, from lossless files made here."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from PIL import Image

from dinov3_server.errors import InvalidInput
from dinov3_server.images import decode as decode_module
from dinov3_server.images import formats
from dinov3_server.images.decode import File
from tests.server.images.files import (
    PNG_GRAY,
    PNG_PALETTE,
    PNG_RGB,
    Pixels,
    encode,
    exif,
    photo,
    png,
    png16,
    png_chunk,
    tiff,
)

MAX_PIXELS = 10_000
BLACK_IS_ZERO, WHITE_IS_ZERO, RGB, PALETTE, CMYK, YCBCR = 1, 0, 2, 3, 5, 6

# Warning filters that decode.py sets on import, which pytest replaces for every test.
pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")


def pixels(data: bytes, *, upright: bool = False) -> Pixels:
    """Decode a file, and check that `read_size` returns the same size."""
    image = File(data, MAX_PIXELS, upright).decode()
    assert image.mode == "RGB"
    array = np.asarray(image)
    assert File(data, MAX_PIXELS, upright).read_size() == array.shape[:2]
    return array


def gray(values: Pixels) -> Pixels:
    return np.repeat(values[..., None], 3, axis=2)


COLOR = photo()
WITH_ALPHA = photo(channels=4)
LUMA = photo(channels=1)
LUMA_ALPHA = photo(channels=2)
BILEVEL = LUMA > 127
SIXTEEN = np.random.default_rng(9).integers(0, 1 << 16, (5, 7), dtype=np.uint16)
SIXTEEN_RGBA = np.random.default_rng(9).integers(0, 1 << 16, (5, 7, 4), dtype=np.uint16)
FLOATS = np.array([[0.0, 0.25, 0.5, 1.0]], np.float32)
TABLE = photo(1, 256)[0]
INKS = np.array(
    [[[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 0, 0], [0, 0, 255, 0], [0, 0, 0, 255], [0, 0, 0, 55]]], np.uint8
)
INKS_RGB = [[[255, 255, 255], [0, 255, 255], [255, 0, 255], [255, 255, 0], [0, 0, 0], [200, 200, 200]]]


def palette_image(indices: Pixels) -> Image.Image:
    image = Image.fromarray(indices).copy()
    image.putpalette(TABLE.tobytes())
    return image


def tiff_of(samples: Pixels, photometric: int, bits: list[int], **options: Any) -> bytes:
    return tiff(samples.shape[1], samples.shape[0], photometric, bits, samples.tobytes(), **options)


FORMATS: dict[str, Callable[[], tuple[bytes, Any]]] = {
    "png rgb": lambda: (encode(COLOR, "PNG"), COLOR),
    "png rgba: alpha dropped, color under it kept": lambda: (encode(WITH_ALPHA, "PNG"), WITH_ALPHA[..., :3]),
    "png gray": lambda: (encode(LUMA, "PNG"), gray(LUMA)),
    "png gray and alpha": lambda: (encode(LUMA_ALPHA, "PNG"), gray(LUMA_ALPHA[..., 0])),
    "png 1-bit": lambda: (encode(BILEVEL, "PNG"), gray(BILEVEL * np.uint8(255))),
    "png 2-bit": lambda: (png(4, 1, 2, PNG_GRAY, b"\x1b"), gray(np.array([[0, 85, 170, 255]]))),
    "png 4-bit": lambda: (png(4, 1, 4, PNG_GRAY, b"\x01\xef"), gray(np.array([[0, 17, 14 * 17, 255]]))),
    "png 16-bit gray": lambda: (png16(SIXTEEN), gray(SIXTEEN >> 8)),
    "png 16-bit rgb": lambda: (png16(SIXTEEN_RGBA[..., :3]), SIXTEEN_RGBA[..., :3] >> 8),
    "png 16-bit rgba": lambda: (png16(SIXTEEN_RGBA), SIXTEEN_RGBA[..., :3] >> 8),
    "png 16-bit gray and alpha": lambda: (png16(SIXTEEN_RGBA[..., :2]), gray(SIXTEEN_RGBA[..., 0] >> 8)),
    "png palette": lambda: (encode(palette_image(LUMA), "PNG"), TABLE[LUMA]),
    "png palette, one transparent index": lambda: (
        encode(palette_image(LUMA), "PNG", transparency=int(LUMA[0, 0])),
        TABLE[LUMA],
    ),
    "png palette, alpha per index": lambda: (
        encode(palette_image(LUMA), "PNG", transparency=bytes(range(256))),
        TABLE[LUMA],
    ),
    "png palette of 2 colors": lambda: (
        png(8, 1, 1, PNG_PALETTE, b"\x55", png_chunk(b"PLTE", bytes([1, 2, 3, 200, 201, 202]))),
        [[[1, 2, 3], [200, 201, 202]] * 4],
    ),
    "png rgb, one transparent color": lambda: (
        png(7, 5, 8, PNG_RGB, COLOR.tobytes(), png_chunk(b"tRNS", struct.pack(">3H", *COLOR[0, 0]))),
        COLOR,
    ),
    "png gray, one transparent level": lambda: (
        png(7, 5, 8, PNG_GRAY, LUMA.tobytes(), png_chunk(b"tRNS", struct.pack(">H", LUMA[0, 0]))),
        gray(LUMA),
    ),
    "png animated: first frame": lambda: (
        encode(COLOR, "PNG", save_all=True, append_images=[Image.fromarray(255 - COLOR)]),
        COLOR,
    ),
    "bmp rgb": lambda: (encode(COLOR, "BMP"), COLOR),
    "bmp rgba": lambda: (encode(WITH_ALPHA, "BMP"), WITH_ALPHA[..., :3]),
    "bmp gray": lambda: (encode(LUMA, "BMP"), gray(LUMA)),
    "bmp 1-bit": lambda: (encode(BILEVEL, "BMP"), gray(BILEVEL * np.uint8(255))),
    "bmp palette": lambda: (encode(palette_image(LUMA), "BMP"), TABLE[LUMA]),
    "webp rgb": lambda: (encode(COLOR, "WEBP", lossless=True), COLOR),
    "webp rgba": lambda: (encode(WITH_ALPHA, "WEBP", lossless=True, exact=True), WITH_ALPHA[..., :3]),
    "webp animated: first frame": lambda: (
        encode(COLOR, "WEBP", lossless=True, save_all=True, append_images=[Image.fromarray(255 - COLOR)]),
        COLOR,
    ),
    "tiff rgb": lambda: (encode(COLOR, "TIFF"), COLOR),
    "tiff rgb, big endian": lambda: (tiff_of(COLOR, RGB, [8, 8, 8], order=">"), COLOR),
    "tiff rgb, lzw": lambda: (encode(COLOR, "TIFF", compression="tiff_lzw"), COLOR),
    "tiff rgb, deflate": lambda: (encode(COLOR, "TIFF", compression="tiff_adobe_deflate"), COLOR),
    "tiff rgba": lambda: (encode(WITH_ALPHA, "TIFF"), WITH_ALPHA[..., :3]),
    "tiff gray": lambda: (encode(LUMA, "TIFF"), gray(LUMA)),
    "tiff gray, white is zero": lambda: (tiff_of(LUMA, WHITE_IS_ZERO, [8]), gray(255 - LUMA)),
    "tiff gray and alpha": lambda: (encode(LUMA_ALPHA, "TIFF"), gray(LUMA_ALPHA[..., 0])),
    "tiff 1-bit": lambda: (encode(BILEVEL, "TIFF"), gray(BILEVEL * np.uint8(255))),
    "tiff 1-bit, group 4": lambda: (
        encode(BILEVEL, "TIFF", compression="group4"),
        gray(BILEVEL * np.uint8(255)),
    ),
    "tiff palette": lambda: (encode(palette_image(LUMA), "TIFF"), TABLE[LUMA]),
    "tiff 16-bit gray": lambda: (tiff_of(SIXTEEN, BLACK_IS_ZERO, [16]), gray(SIXTEEN >> 8)),
    "tiff 16-bit gray, big endian": lambda: (
        tiff_of(SIXTEEN.astype(">u2"), BLACK_IS_ZERO, [16], order=">"),
        gray(SIXTEEN >> 8),
    ),
    "tiff 16-bit gray, lzw": lambda: (encode(SIXTEEN, "TIFF", compression="tiff_lzw"), gray(SIXTEEN >> 8)),
    "tiff 16-bit gray, white is zero": lambda: (tiff_of(SIXTEEN, WHITE_IS_ZERO, [16]), gray(255 - (SIXTEEN >> 8))),
    "tiff 12-bit gray": lambda: (tiff(2, 1, BLACK_IS_ZERO, [12], b"\xfe\xf8\x01"), gray(np.array([[0xFE, 0x80]]))),
    "tiff 16-bit signed gray": lambda: (
        tiff_of(SIXTEEN >> 1, BLACK_IS_ZERO, [16], tags={339: [2]}),
        gray(SIXTEEN >> 9),
    ),
    "tiff 32-bit gray of 16-bit values": lambda: (
        tiff_of(SIXTEEN.astype("<u4"), BLACK_IS_ZERO, [32]),
        gray(SIXTEEN >> 8),
    ),
    "tiff 16-bit rgb": lambda: (
        tiff_of(SIXTEEN_RGBA[..., :3], RGB, [16, 16, 16]),
        SIXTEEN_RGBA[..., :3] >> 8,
    ),
    "tiff 16-bit rgb, big endian": lambda: (
        tiff_of(SIXTEEN_RGBA[..., :3].astype(">u2"), RGB, [16, 16, 16], order=">"),
        SIXTEEN_RGBA[..., :3] >> 8,
    ),
    "tiff float": lambda: (tiff_of(FLOATS, BLACK_IS_ZERO, [32], tags={339: [3]}), gray(np.array([[0, 64, 128, 255]]))),
    "tiff float, big endian": lambda: (
        tiff_of(FLOATS.astype(">f4"), BLACK_IS_ZERO, [32], tags={339: [3]}, order=">"),
        gray(np.array([[0, 64, 128, 255]])),
    ),
    "tiff cmyk": lambda: (tiff_of(INKS, CMYK, [8, 8, 8, 8]), INKS_RGB),
    "tiff of several pages: the first": lambda: (
        encode(COLOR, "TIFF", save_all=True, append_images=[Image.fromarray(255 - COLOR)]),
        COLOR,
    ),
    "tiff in tiles": lambda: (
        tiff_of(
            np.pad(COLOR, ((0, 11), (0, 9), (0, 0))), RGB, [8, 8, 8], tags={256: [7], 257: [5], 322: [16], 323: [16]}
        ),
        COLOR,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FORMATS)
def test_pixels(kind: str) -> None:
    data, expected = FORMATS[kind]()
    np.testing.assert_array_equal(pixels(data), expected)


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if "transparent" in kind or "alpha" in kind])
def test_alpha_is_dropped_without_a_warning(kind: str) -> None:
    """A valid file decodes even without the warning filters that decode.py sets."""
    data, _ = FORMATS[kind]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels(data)


def flat(*color: int, mode: str) -> Image.Image:
    return Image.new(mode, (16, 16), color)


def test_jpeg_rgb_and_gray() -> None:
    assert (
        np.abs(pixels(encode(flat(200, 30, 90, mode="RGB"), "JPEG", quality=95)).astype(int) - [200, 30, 90]).max() <= 2
    )
    assert (pixels(encode(Image.new("L", (16, 16), 77), "JPEG", quality=95)) == 77).all()


def test_jpeg_is_decoded_at_full_size() -> None:
    """Draft mode (decoding at 1/2, 1/4, 1/8 for thumbnails) would give other pixels."""
    data = encode(np.repeat(np.repeat(photo(8, 8), 8, 0), 8, 1), "JPEG", quality=95, subsampling=0)
    with Image.open(io.BytesIO(data)) as reference:
        np.testing.assert_array_equal(pixels(data), np.asarray(reference))


def test_jpeg_cmyk_is_inverted_as_adobe_writes_it() -> None:
    array = pixels(encode(flat(255, 0, 55, 0, mode="CMYK"), "JPEG", quality=95)).astype(int)
    assert np.abs(array - [0, 255, 200]).max() <= 2


def test_jpeg_ycck() -> None:
    """Stored Y 100, Cb 128, Cr 200, K 255. YCCK is CMY by C = 255 - (Y + 1.402 (Cr - 128)) and so on, and Adobe stores
    the complement of the inks: so C is R, and K 255 is no black."""
    data = encode(flat(155, 127, 55, 0, mode="CMYK"), "JPEG", quality=95)
    transform_flag = data.index(b"Adobe") + 11
    assert data[transform_flag] == 0
    array = pixels(data[:transform_flag] + b"\x02" + data[transform_flag + 1 :]).astype(int)
    assert np.abs(array - [255 - 201, 255 - 49, 255 - 100]).max() <= 2


def test_a_jpeg_of_several_images_gives_the_first() -> None:
    first, second = flat(200, 30, 90, mode="RGB"), flat(0, 0, 0, mode="RGB")
    array = pixels(encode(first, "MPO", save_all=True, append_images=[second], quality=95)).astype(int)
    assert np.abs(array - [200, 30, 90]).max() <= 2


NEEDS_PILLOW_13: dict[str, tuple[bytes, Any]] = {
    "tiff gray, premultiplied by alpha": (
        tiff_of(np.array([[[100, 255], [50, 128]]], np.uint8), BLACK_IS_ZERO, [8, 8], tags={338: [1]}),
        gray(np.array([[100, 99]])),
    ),
    "tiff ycbcr, uncompressed": (
        tiff_of(np.full((2, 2, 3), [100, 128, 200], np.uint8), YCBCR, [8, 8, 8], tags={530: [1, 1]}),
        np.full((2, 2, 3), [201, 49, 100]),
    ),
}


@pytest.mark.parametrize("kind", NEEDS_PILLOW_13)
def test_tiff_that_needs_pillow_13_is_refused_by_earlier_versions(kind: str) -> None:
    data, expected = NEEDS_PILLOW_13[kind]
    if int(PIL.__version__.partition(".")[0]) >= 13:
        assert np.abs(pixels(data).astype(int) - expected).max() <= 2
    else:
        refused_for_old_pillow(data)


def test_earlier_pillows_refuse_ycbcr_and_name_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever Pillow runs these tests."""
    for module in (decode_module, formats):
        monkeypatch.setattr(module, "READS_ALL_TIFF", False)
    refused_for_old_pillow(NEEDS_PILLOW_13["tiff ycbcr, uncompressed"][0])
    refused_for_old_pillow(b"II*\0")
    compressed = encode(Image.new("YCbCr", (16, 16), (100, 128, 200)), "TIFF", compression="tiff_lzw")
    assert np.abs(pixels(compressed).astype(int) - [201, 49, 100]).max() <= 2


def refused_for_old_pillow(data: bytes) -> None:
    for call in (File.decode, File.read_size):
        with pytest.raises(InvalidInput) as error:
            call(File(data, MAX_PIXELS))
        message = str(error.value)
        assert f"the TIFF file of {len(data)} bytes" in message
        assert f"this server has Pillow {PIL.__version__}" in message
        assert "Pillow >= 13" in message
        assert "send RGB" in message


def test_icc_profile_is_ignored() -> None:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for format in ("PNG", "TIFF"):
        np.testing.assert_array_equal(pixels(encode(COLOR, format, icc_profile=profile)), COLOR)


UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).swapaxes(0, 1),
    8: lambda stored: np.rot90(stored),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_exif_orientation_is_applied_when_asked_for(format: str, orientation: int) -> None:
    data = encode(COLOR, format, exif=exif(orientation), **({"lossless": True} if format == "WEBP" else {}))
    np.testing.assert_array_equal(pixels(data), COLOR)
    np.testing.assert_array_equal(pixels(data, upright=True), UPRIGHT[orientation](COLOR))


def test_exif_orientation_of_jpeg() -> None:
    data = encode(photo(16, 24), "JPEG", exif=exif(6))
    stored = pixels(data)
    assert stored.shape == (16, 24, 3)
    np.testing.assert_array_equal(pixels(data, upright=True), UPRIGHT[6](stored))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_invalid_orientation_is_ignored(orientation: int) -> None:
    np.testing.assert_array_equal(pixels(encode(COLOR, "PNG", exif=exif(orientation)), upright=True), COLOR)


def test_exif_after_the_pixels_of_a_png_is_applied() -> None:
    after = png_chunk(b"eXIf", exif(6).tobytes()[6:])
    data = png(7, 5, 8, PNG_RGB, COLOR.tobytes(), after=after)
    np.testing.assert_array_equal(pixels(data), COLOR)
    np.testing.assert_array_equal(pixels(data, upright=True), UPRIGHT[6](COLOR))


@pytest.mark.parametrize("upright", [False, True])
@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_orientation_of_tiff_is_part_of_the_format_and_always_applied(
    orientation: int, upright: bool, compression: str | None
) -> None:
    data = encode(COLOR, "TIFF", exif=exif(orientation), compression=compression)
    np.testing.assert_array_equal(pixels(data, upright=upright), UPRIGHT[orientation](COLOR))


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_ycbcr_tiff_is_turned_once(orientation: int) -> None:
    """Libtiff turns it too when it converts the colors."""
    stored = Image.fromarray(COLOR).convert("YCbCr")
    data = encode(stored, "TIFF", exif=exif(orientation), compression="tiff_lzw")
    expected = UPRIGHT[orientation](np.asarray(stored.convert("RGB")))
    assert np.abs(pixels(data).astype(int) - expected).max() <= 2


@pytest.mark.parametrize(
    ("samples", "tags", "reason"),
    [
        (np.array([[0.0, 254.7]], np.float32), {339: [3]}, "floats from 0 to 254.7: allowed are 0.0"),
        (np.array([[-0.5, 1.0]], np.float32), {339: [3]}, "floats from -0.5 to 1: allowed are 0.0"),
        (np.array([[0.5, np.nan]], np.float32), {339: [3]}, "floats from nan to nan: allowed are 0.0"),
        (np.array([[0, 65536]], np.int32), {339: [2]}, "integers from 0 to 65536: allowed are 0 to 65535"),
        (np.array([[-1, 5]], np.int32), {339: [2]}, "integers from -1 to 5: allowed are 0 to 65535"),
    ],
)
def test_samples_without_a_meaning_are_refused(samples: Pixels, tags: dict[int, list[int]], reason: str) -> None:
    with pytest.raises(InvalidInput) as error:
        pixels(tiff_of(samples, BLACK_IS_ZERO, [32], tags=tags))
    assert reason in str(error.value)


DAMAGED_METADATA = r"""
import concurrent.futures, sys
from dinov3_server.images import decode as decode_module
from dinov3_server.images.decode import File
data = sys.stdin.buffer.read()
def once(_):
    File(data, 100).read_size()
    return File(data, 100).decode().getpixel((0, 0))
with concurrent.futures.ThreadPoolExecutor(4) as pool:
    sys.stdout.write(repr(set(pool.map(once, range(40)))))
"""


def test_pillows_warnings_neither_fail_an_image_nor_reach_stderr() -> None:
    """In a separate process, where only decode.py sets filters after -W error."""
    artist = 315
    data = tiff_of(COLOR, RGB, [8, 8, 8], tags={artist: range(9)})
    where = data.index(struct.pack("<HHI", artist, 3, 9)) + 8
    data = data[:where] + struct.pack("<I", len(data) - 4) + data[where + 4 :]  # beyond the end of the file
    with pytest.warns(UserWarning, match="larger than file|corrupt|Truncated"), Image.open(io.BytesIO(data)):
        pass
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", DAMAGED_METADATA],
        input=data,
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        cwd=Path(__file__).parent,
    )
    assert done.stderr == b""
    assert done.stdout.decode() == repr({tuple(COLOR[0, 0].tolist())})
