"""Unusable files: each raises InvalidInput, whose message describes the file."""

from __future__ import annotations

import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dinov3_server.errors import InvalidInput
from dinov3_server.images.decode import File
from dinov3_server.images.formats import HAS_AVIF
from tests.server.images.files import PNG_RGB, encode, exif, photo, png, png16, png_chunk, tiff

MAX_PIXELS = 10_000

# Warning filters that decode.py sets on import, which pytest replaces for every test.
pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")


def refused(data: bytes, *, by_probe: bool = True) -> str:
    with pytest.raises(InvalidInput) as error:
        File(data, MAX_PIXELS).decode()
    if by_probe:
        with pytest.raises(InvalidInput) as same:
            File(data, MAX_PIXELS).read_size()
        assert str(same.value) == str(error.value)
    else:
        File(data, MAX_PIXELS).read_size()
    return str(error.value)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty (0 bytes)"),
        (b"no image", "the file of 8 bytes is not an image of a known format (it begins with 6e 6f 20 69 6d 61 67 65)"),
        (b"\x00", "the file of 1 bytes is not an image of a known format (it begins with 00)"),
        (encode(photo(), "JPEG2000"), "looks like JPEG 2000"),
        (encode(photo(), "PPM"), "looks like PPM"),
        (encode(photo(), "ICO"), "looks like ICO"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom", "looks like MP4-like"),
        (b"\0\0\0\x14ftypmif1\0\0\0\0mif1", "looks like HEIF"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "looks like SVG"),
        (b"<!DOCTYPE html><title>404</title>", "looks like HTML"),
        (b"%PDF-1.7", "looks like PDF"),
        (b"\x93NUMPY\x01\x00", "looks like npy"),
    ],
)
def test_other_formats_are_refused(data: bytes, reason: str) -> None:
    message = refused(data)
    assert reason in message
    assert "allowed are JPEG, PNG, WebP, BMP, TIFF, GIF" in message


WHOLE = {
    "JPEG": encode(photo(40, 56), "JPEG"),
    "PNG": encode(photo(40, 56), "PNG"),
    "WebP": encode(photo(40, 56), "WEBP"),
    "BMP": encode(photo(40, 56), "BMP"),
    "TIFF": encode(photo(40, 56), "TIFF", compression="tiff_lzw"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_file_of_only_a_signature_is_refused(name: str) -> None:
    message = refused(WHOLE[name][:12])
    assert f"the {name} file of 12 bytes" in message


@pytest.mark.parametrize("name", ["JPEG", "PNG", "BMP"])
def test_truncated_files_are_refused(name: str) -> None:
    data = WHOLE[name][: len(WHOLE[name]) * 2 // 3]
    message = refused(data, by_probe=False)
    assert message.startswith(f"the {name} file of {len(data)} bytes cannot be decoded: ")
    assert "truncated" in message.lower()


@pytest.mark.parametrize("name", ["WebP", "TIFF"])
def test_files_with_a_truncated_header_are_refused(name: str) -> None:
    data = WHOLE[name][: len(WHOLE[name]) * 2 // 3]
    assert f"the {name} file of {len(data)} bytes" in refused(data)


def test_files_with_a_corrupt_body_are_refused() -> None:
    data = bytearray(WHOLE["PNG"])
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(64)
    assert "cannot be decoded" in refused(bytes(data), by_probe=False)


def with_size(data: bytes, height: int, width: int) -> bytes:
    """Return a JPEG whose frame header has another size (ITU-T T.81, B.2.2)."""
    frame = data.index(b"\xff\xc0")
    return data[: frame + 5] + struct.pack(">HH", height, width) + data[frame + 9 :]


def webp_canvas(height: int, width: int) -> bytes:
    """Return an animation of one small frame on a canvas of this size (WebP container specification)."""
    frame = encode(photo(16, 16), "WEBP")[12:]
    placed = bytes(6) + (15).to_bytes(3, "little") * 2 + (10).to_bytes(3, "little") + b"\0" + frame
    canvas = b"\x02\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", len(canvas)) + canvas + b"ANIM" + struct.pack("<I", 6) + bytes(6)
    body += b"ANMF" + struct.pack("<I", len(placed)) + placed
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (with_size(WHOLE["JPEG"], 65000, 64000), "65000x64000 (height x width) = 4160000000 pixels"),
        (png(90000, 80000, 8, PNG_RGB, b""), "80000x90000 (height x width) = 7200000000 pixels"),
        (webp_canvas(16000, 15000), "16000x15000 (height x width) = 240000000 pixels"),
        (WHOLE["BMP"][:18] + struct.pack("<ii", 10**6, 10**6) + WHOLE["BMP"][26:], "= 1000000000000 pixels"),
        (tiff(10**9, 10**9, 2, [8, 8, 8], b"\0" * 3), "= 1000000000000000000 pixels"),
        (encode(photo(100, 101), "PNG"), "100x101 (height x width) = 10100 pixels"),
    ],
)
def test_too_many_pixels_are_refused_by_the_header(data: bytes, reason: str) -> None:
    message = refused(data)
    assert reason in message
    assert "allowed are 10000" in message


def test_exactly_the_allowed_pixels_are_accepted() -> None:
    assert File(encode(photo(100, 100), "PNG"), MAX_PIXELS).read_size() == (100, 100)


def test_pillows_own_limit_is_disabled() -> None:
    """Only our limit counts: Pillow would warn from 90 million pixels on."""
    data = encode(Image.new("1", (10_000, 10_000)), "PNG")
    assert File(data, 100_000_000).read_size() == (10_000, 10_000)


def test_a_small_tiff_with_a_huge_tile_is_refused() -> None:
    """libtiff would allocate and inflate the whole tile."""
    tile = {322: [30_000], 323: [20_000], 259: [8]}
    data = tiff(16, 16, 2, [8, 8, 8], zlib.compress(bytes(1000)), tags=tile)
    message = refused(data)
    assert "a tile has 20000x30000 (height x width) = 600000000 pixels, allowed are 10000" in message


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt"])
def test_a_png_with_inflating_text_is_refused(kind: bytes) -> None:
    text = zlib.compress(bytes(8 << 20))
    head = b"Comment\0\0" if kind == b"zTXt" else b"Comment\0\1\0\0\0"
    message = refused(png(7, 5, 8, PNG_RGB, photo().tobytes(), png_chunk(kind, head + text)))
    assert "Decompressed data too large" in message


def test_pillow_logs_nothing_of_a_clients_file(caplog: pytest.LogCaptureFixture) -> None:
    refused(tiff(7, 5, 2, [8, 8, 8], photo().tobytes(), tags={277: [100]}))  # samples per pixel
    assert not caplog.records


def seeds() -> dict[str, bytes]:
    """Return one file of every decoder and container."""
    color = Image.fromarray(photo(24, 32))
    turned = color.rotate(180)
    samples = np.random.default_rng(3).integers(0, 1 << 16, (24, 32), dtype=np.uint16)
    return {
        "jpeg": encode(color, "JPEG", exif=exif(6)),
        "jpeg progressive": encode(color, "JPEG", progressive=True),
        "jpeg cmyk": encode(color.convert("CMYK"), "JPEG"),
        "jpeg mpo": encode(color, "MPO", save_all=True, append_images=[turned]),
        "png": encode(color, "PNG", exif=exif(6)),
        "png palette": encode(color.convert("P"), "PNG", transparency=bytes(range(256))),
        "png animated": encode(color, "PNG", save_all=True, append_images=[turned]),
        "png 16-bit": png16(samples),
        "webp": encode(color, "WEBP", exif=exif(6)),
        "webp lossless": encode(color, "WEBP", lossless=True),
        "webp animated": encode(color, "WEBP", save_all=True, append_images=[turned]),
        "bmp": encode(color, "BMP"),
        "bmp palette": encode(color.convert("P"), "BMP"),
        "tiff": encode(color, "TIFF", exif=exif(6)),
        "tiff lzw": encode(color, "TIFF", compression="tiff_lzw"),
        "tiff deflate": encode(color, "TIFF", compression="tiff_adobe_deflate"),
        "tiff jpeg": encode(color, "TIFF", compression="jpeg"),
        "tiff group 4": encode(color.convert("1"), "TIFF", compression="group4"),
        "tiff 16-bit": encode(samples, "TIFF"),
        "tiff float": encode((samples / 65535).astype(np.float32), "TIFF"),
        "gif": encode(color, "GIF"),
        "gif animated": encode(color.convert("P"), "GIF", save_all=True, append_images=[turned], transparency=3),
        **({"avif": encode(color, "AVIF", exif=exif(6))} if HAS_AVIF else {}),
    }


SEEDS = seeds()


def damaged(data: bytes, chance: random.Random) -> bytes:
    if chance.random() < 0.3:
        return data[: chance.randrange(len(data))]
    changed = bytearray(data)
    for _ in range(chance.choice((1, 2, 4, 16))):
        reach = min(len(data), 200) if chance.random() < 0.5 else len(data)  # headers are at the front
        changed[chance.randrange(reach)] = chance.choice((0, 1, 255, chance.randrange(256)))
    return bytes(changed)


@pytest.mark.parametrize("name", SEEDS)
def test_damaged_files_are_decoded_or_refused(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    data = SEEDS[name]
    chance = random.Random(name)
    assert File(data, MAX_PIXELS).decode().mode == "RGB"
    refused = 0
    for _ in range(150):
        file = damaged(data, chance)
        for upright in (False, True):
            try:
                image = File(file, MAX_PIXELS, upright).decode()
            except InvalidInput:
                refused += 1
                continue
            assert image.mode == "RGB"
            size = File(file, MAX_PIXELS, upright).read_size()
            assert size == (image.height, image.width)
            assert len(image.tobytes()) == size[0] * size[1] * 3
    assert refused
    assert capfd.readouterr().err == ""


def test_any_exception_of_pillow_is_invalid_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: object, **__: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(Image, "open", explode)
    message = refused(encode(photo(), "BMP"))
    assert message.endswith("cannot be decoded: ZeroDivisionError('division by zero')")
