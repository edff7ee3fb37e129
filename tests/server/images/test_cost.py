"""The predicted cost of decoding a file."""

from __future__ import annotations

import io
import struct
import zlib

import pytest
from PIL import Image

from dinov3_server.errors import InvalidInput
from dinov3_server.images.cost import MAX_SCANS, PLAIN_PIXELS, Cost, cost_of
from dinov3_server.images.decode import File
from dinov3_serving.images import Box, Transform
from tests.server.images.files import PNG_RGB, encode, exif, photo, png, png_chunk, tiff
from tests.server.images.hostile import bmp_runs, jpeg_scans, lossless_webp, one_bit_png
from tests.server.images.test_damaged import SEEDS, webp_canvas

MAX_PIXELS = 100_000_000


def cost(data: bytes) -> Cost:
    assert cost_of(File(memoryview(data), MAX_PIXELS)) == cost_of(File(data, MAX_PIXELS))
    return cost_of(File(data, MAX_PIXELS))


# Kinds that threads decode. Decode processes decode all others.
PLAIN = {
    *("jpeg", "jpeg progressive", "jpeg cmyk", "jpeg mpo"),
    *("png", "png palette", "png 16-bit", "webp", "bmp", "bmp palette", "gif", "gif animated"),
}


@pytest.mark.parametrize("name", SEEDS)
def test_the_cost_of_every_kind_of_file(name: str) -> None:
    data = SEEDS[name]
    if name == "webp":  # with EXIF it has the extended format
        data = encode(photo(24, 32), "WEBP")
    seen = cost(data)
    with Image.open(io.BytesIO(data)) as image:
        assert {seen.width, seen.height} == set(image.size)  # a TIFF may be turned
    assert seen.plain == (name in PLAIN)
    assert seen.nbytes >= 24 * 32 * 4
    if seen.plain:
        assert seen.nbytes < 2 << 20


@pytest.mark.parametrize("name", SEEDS)
def test_a_truncated_file_has_a_cost_or_is_refused(name: str) -> None:
    data = SEEDS[name]
    signature = {b"RIFF": 12, b"\x89PNG": 8, b"GIF8": 6, b"\0\0\0 ": 12}.get(data[:4], 4)
    for length in range(signature, min(len(data), 1000)):
        cost(data[:length])
    for length in (0, 1):
        with pytest.raises(InvalidInput, match=r"is empty|is not an image of a known format"):
            cost(data[:length])


def test_the_largest_plain_picture() -> None:
    assert cost(encode(Image.new("L", (2048, 2048)), "JPEG")).plain
    larger = cost(encode(Image.new("L", (2048, 2049)), "JPEG"))
    assert not larger.plain
    assert larger.height * larger.width > PLAIN_PIXELS


def test_memory_by_mode() -> None:
    """Memory in bytes a pixel that Pillow and libjpeg hold at once."""
    side = 2000
    image = Image.new("RGB", (side, side))

    def each(data: bytes) -> int:
        return round((cost(data).nbytes - cost(data[:0] or encode(Image.new("RGB", (1, 1)), "BMP")).nbytes) / side**2)

    assert each(encode(image, "JPEG")) == 4
    assert each(encode(image.convert("L"), "JPEG")) == 5
    assert each(encode(image.convert("CMYK"), "JPEG")) == 8
    assert each(encode(image, "JPEG", progressive=True, subsampling=0)) == 4 + 6  # two bytes a coefficient
    assert each(encode(image, "JPEG", progressive=True, subsampling=2)) == 4 + 3
    assert each(encode(image.convert("1"), "PNG")) == 5
    assert each(encode(image.convert("RGBA"), "PNG")) == 8
    turned = cost_of(File(encode(image, "PNG"), MAX_PIXELS, True))
    assert turned.nbytes - cost(encode(image, "PNG")).nbytes == 4 * side**2


def test_many_scans_are_refused() -> None:
    assert cost(jpeg_scans(30, 100)).plain
    assert not cost(jpeg_scans(MAX_SCANS, 100)).plain
    with pytest.raises(InvalidInput, match="takes too much work: it has more than 200 scans") as error:
        cost(jpeg_scans(MAX_SCANS + 1, 10_000))
    assert "a progressive file has about 10" in str(error.value)


def test_too_many_segments_are_refused() -> None:
    scan = jpeg_scans(2, 100)
    comment = b"\xff\xfe\0\2"
    with pytest.raises(InvalidInput, match="takes too much work"):
        cost(scan[:-2] + comment * 1_000_000 + scan[-2:])
    assert not cost(scan[:2] + comment * 1_000_000 + scan[2:]).plain  # before the first scan


def test_scans_of_thumbnails_and_further_images_are_not_counted() -> None:
    other = jpeg_scans(MAX_SCANS + 1, 100)
    segment = b"\xff\xe2" + struct.pack(">H", 2 + len(other)) + other
    data = jpeg_scans(10, 100)
    behind = data.index(b"\xff\xda")
    behind = data.index(b"\xff\xda", behind + 2)
    assert cost(data[:behind] + segment + data[behind:] + other).plain


def test_a_baseline_jpeg_in_one_scan_is_not_searched_for_more() -> None:
    """libjpeg accepts no second scan, so the file need not be searched."""
    data = encode(photo(40, 56), "JPEG")
    assert cost(data[:-2] + b"\xff\xda" * 1000 + data[-2:]).plain


def test_restarts_and_stuffed_bytes_are_not_segments() -> None:
    data = jpeg_scans(2, 100)
    assert cost(data[:-2] + b"\xff\xd0\xff\0" * 100_000 + data[-2:]).plain


def test_arithmetic_coding_and_two_frames_are_not_plain() -> None:
    data = encode(photo(40, 56), "JPEG")
    frame = data.index(b"\xff\xc0")
    assert not cost(data[:frame] + b"\xff\xc9" + data[frame + 2 :]).plain
    length = 2 + int.from_bytes(data[frame + 2 : frame + 4])
    assert not cost(data[: frame + length] + data[frame:]).plain


def test_partial_blocks_count_as_whole() -> None:
    """An image one pixel wide takes blocks of 8, times the sampling."""
    data = encode(Image.new("RGB", (1, 60_000)), "JPEG", progressive=True, subsampling=2)
    assert cost(data).nbytes > 60_000 * 16 * 2 * 1.5


@pytest.mark.parametrize(
    "chunk",
    [
        png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1 << 20)) + bytes(1 << 15)),
        png_chunk(b"iCCP", b"name\0\0" + bytes(1 << 15)),
        png_chunk(b"iTXt", b"Comment\0\1\0\0\0" + bytes(1 << 15)),
        png_chunk(b"acTL", bytes(8)),
        png_chunk(b"IHDR", struct.pack(">IIBBBBB", 9, 9, 8, 2, 0, 0, 0)),
        png_chunk(b"tEXt", b"") * 3000,
    ],
)
@pytest.mark.parametrize("after", [False, True])
def test_pngs_that_are_not_plain(chunk: bytes, after: bool) -> None:
    rows = photo().tobytes()
    assert cost(png(7, 5, 8, PNG_RGB, rows)).plain
    data = png(7, 5, 8, PNG_RGB, rows, after=chunk) if after else png(7, 5, 8, PNG_RGB, rows, chunk)
    assert not cost(data).plain


def test_compressed_text_costs_its_largest_inflated_size() -> None:
    rows = photo().tobytes()
    text = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1 << 19)))
    with_text = cost(png(7, 5, 8, PNG_RGB, rows, text))
    assert with_text.plain
    assert with_text.nbytes - cost(png(7, 5, 8, PNG_RGB, rows)).nbytes > 1 << 19


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (lossless_webp(8000, 9000), (8000, 9000)),
        (webp_canvas(3000, 4000), (3000, 4000)),
        (bmp_runs(1000), (1000, 1000)),
        (one_bit_png(5000), (5000, 5000)),
        (tiff(900, 800, 2, [8, 8, 8], bytes(300)), (800, 900)),
        (tiff(900, 800, 1, [32], bytes(300), order=">"), (800, 900)),
    ],
)
def test_formats_that_are_never_plain(data: bytes, size: tuple[int, int]) -> None:
    seen = cost(data)
    assert not seen.plain
    assert (seen.height, seen.width) == size
    assert seen.nbytes > size[0] * size[1] * 5
    with pytest.raises(InvalidInput, match=f"{size[0]}x{size[1]} .height x width.* allowed are 1000"):
        cost_of(File(data, 1000))


def test_a_tiff_that_is_truncated_or_has_wild_offsets() -> None:
    for offset in (0, 3, 1 << 20, (1 << 64) - 1):
        big = b"II+\0\x08\0\0\0" + struct.pack("<Q", offset) + bytes(40)
        assert not cost(big).plain
    endless = b"II*\0\x08\0\0\0\xff\xff" + struct.pack("<HHII", 256, 4, 1, 5) * 65535
    assert not cost(endless).plain


def test_transforms_count_one_at_a_time() -> None:
    seen = Cost(1000, 2000, 50, True)
    small, large = Transform((16, 16), "bilinear"), Transform((1000, 500), "bilinear", flip=True)
    assert seen.with_transforms([small, large]).nbytes == seen.with_transforms([large]).nbytes
    assert seen.with_transforms([large]).nbytes > 50 + 4 * 1000 * 500 * 3
    crop = Transform(None, "bilinear", Box(0, 0, 1 << 31, 1 << 31))  # refused later
    assert seen.with_transforms([crop]).nbytes < 1000 * 2000 * 30
    assert seen.with_transforms([Transform((16, 16), "nearest", Box(0, 0, 100, 100))]).nbytes < 200_000


def test_small_exif_costs_nothing() -> None:
    assert cost(encode(photo(), "JPEG", exif=exif(6))).plain
