"""Image files to attack a decoder: valid ones of every format, damaged ones, and small ones that are expensive.

Everything is drawn from a `random.Random`, so a seed always gives the same bytes.
"""

from __future__ import annotations

import functools
import io
import random
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

from dinov3_server.images.formats import HAS_AVIF, LIBHEIF

# (format, mode, options of Image.save). PPM and ICO are refused.
_KINDS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("JPEG", "RGB", {"quality": 80}),
    ("JPEG", "RGB", {"progressive": True, "subsampling": 0}),
    ("JPEG", "L", {"optimize": True}),
    ("JPEG", "CMYK", {}),
    ("JPEG", "RGB", {"restart_marker_blocks": 1}),
    *(("PNG", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
    ("PNG", "P", {"transparency": 3, "bits": 4}),
    ("WEBP", "RGB", {"quality": 60}),
    ("WEBP", "RGBA", {"lossless": True}),
    *(("BMP", mode, {}) for mode in ("1", "L", "P", "RGB", "RGBA")),
    *(("TIFF", mode, {}) for mode in ("1", "L", "LA", "RGB", "RGBA", "CMYK", "I;16", "F", "I", "LAB")),
    *(("TIFF", "RGB", {"compression": name}) for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")),
    ("TIFF", "1", {"compression": "group4"}),
    ("TIFF", "L", {"compression": "tiff_lzw", "tiffinfo": {317: 2}}),  # 317: predictor
    ("GIF", "P", {}),
    ("GIF", "L", {"interlace": 0}),
    ("GIF", "P", {"transparency": 3}),
    *((("AVIF", "RGB", {"speed": 10}), ("AVIF", "RGBA", {"speed": 10, "subsampling": "4:4:4"})) if HAS_AVIF else ()),
    *((("HEIF", "RGB", {}), ("HEIF", "RGBA", {})) if LIBHEIF else ()),
    ("PPM", "RGB", {}),
    ("ICO", "RGBA", {}),
)
_EDGES = (0, 1, 2, 3, 7, 8, 15, 16, 127, 128, 255, 256, 32767, 32768, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
# Length of a header, which has sizes, offsets and types, in bytes.
_HEADER = 64


@functools.cache
def sound_files() -> tuple[bytes, ...]:
    """Return a small file of each format, mode and compression, also with an animation, an MPO and EXIF tags."""
    files = [_saved(_picture(mode, 40, 56), format, **options) for format, mode, options in _KINDS]
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation
    files += [_saved(_picture("RGB", 33, 17), format, exif=turned) for format in ("JPEG", "PNG", "WEBP", "TIFF")]
    frames = [_picture("RGB", 24, 24) for _ in range(3)]
    animated = ("WEBP", "PNG", "TIFF", "MPO", "GIF", *(("AVIF",) if HAS_AVIF else ()))
    files += [_saved(frames[0], kind, save_all=True, append_images=frames[1:]) for kind in animated]
    return tuple(files)


def image_file(rng: random.Random) -> bytes:
    """Return a file of at most about 20 KB: valid (one in four), damaged, or of random bytes."""
    kind = rng.random()
    if kind < 0.25:
        return rng.choice(sound_files())
    if kind < 0.27:
        return rng.randbytes(rng.choice((0, 1, 2, 8, 100)))
    return damaged(rng, rng.choice(sound_files()))


def photo(rng: random.Random) -> bytes:
    """Return a valid file with a unique picture, whose features differ from those of all others."""
    height, width = rng.choice((40, 64, 300)), rng.choice((50, 64, 200))
    noise = np.random.default_rng(rng.getrandbits(32))
    cells = Image.fromarray(noise.integers(0, 256, (5, 7, 3), np.uint8))
    format, mode, options = rng.choice(
        (
            ("JPEG", "RGB", {"quality": 80}),
            ("PNG", "RGB", {}),
            ("PNG", "P", {}),
            ("WEBP", "RGB", {}),
            ("TIFF", "RGB", {}),
        )
    )
    return _saved(cells.resize((width, height), Image.Resampling.BICUBIC).convert(mode), format, **options)


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Return `data` with one to four damages. Half of the time the checksums of a PNG are corrected, so that its reader
    goes on."""
    body = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        rng.choice(_DAMAGES)(rng, body)
    if body.startswith(b"\x89PNG\r\n\x1a\n") and rng.random() < 0.5:
        _mend_png(body)
    return bytes(body)


def bomb(rng: random.Random) -> bytes:
    """Return a small file that is expensive to decode: many pixels, scans, tiles or frames. At most 1 MB."""
    return rng.choice(_BOMBS)(rng)


def _picture(mode: str, height: int, width: int) -> Image.Image:
    """Return a gradient with noise, which uses every stage of a decoder."""
    generator = np.random.default_rng(height * width)
    rows, columns = np.mgrid[0:height, 0:width]
    gradient = np.stack([rows * 4, columns * 3, (rows + columns) * 2], axis=-1) % 200
    rgb = Image.fromarray((gradient + generator.integers(0, 56, gradient.shape)).astype(np.uint8))
    if mode == "I;16":
        return Image.fromarray(generator.integers(0, 1 << 16, (height, width)).astype(np.uint16))
    if mode == "F":
        return Image.fromarray(generator.random((height, width), np.float32))
    if mode == "LAB":
        return Image.frombytes("LAB", (width, height), rgb.tobytes())
    return rgb.convert(mode)


def _saved(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def _flip_bits(rng: random.Random, body: bytearray) -> None:
    for _ in range(rng.choice((1, 2, 8))):
        if body:
            body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)


def _change_header(rng: random.Random, body: bytearray) -> None:
    """Replace a number of 1, 2 or 4 bytes near the beginning by an edge case."""
    size, order = rng.choice((1, 2, 4)), rng.choice("<>")
    at = rng.randrange(min(len(body), _HEADER)) if body else 0
    value = rng.choice(_EDGES) & ((1 << 8 * size) - 1)
    body[at : at + size] = struct.pack(order + {1: "B", 2: "H", 4: "I"}[size], value)


def _cut(rng: random.Random, body: bytearray) -> None:
    if body:
        del body[rng.randrange(len(body)) :]


def _remove(rng: random.Random, body: bytearray) -> None:
    if body:
        at = rng.randrange(len(body))
        del body[at : at + rng.choice((1, 4, 64))]


def _insert(rng: random.Random, body: bytearray) -> None:
    at = rng.randrange(len(body) + 1)
    body[at:at] = rng.choice((b"\xff", b"\0" * 16, rng.randbytes(8), bytes(body[:64])))


def _splice(rng: random.Random, body: bytearray) -> None:
    """Append the end of another file to the beginning of this one."""
    other = rng.choice(sound_files())
    at = rng.randrange(len(body) + 1)
    body[at:] = other[min(at, rng.randrange(len(other))) :]


_DAMAGES = (_flip_bits, _flip_bits, _change_header, _change_header, _cut, _remove, _insert, _splice)


def _mend_png(body: bytearray) -> None:
    at = 8
    while at + 12 <= len(body):
        end = at + 8 + int.from_bytes(body[at : at + 4], "big")
        if end + 4 > len(body):
            return
        body[end : end + 4] = zlib.crc32(body[at + 4 : end]).to_bytes(4, "big")
        at = end + 4


def _sides(rng: random.Random) -> tuple[int, int]:
    """Return a height and width of up to 100 million pixels, the default limit, or just over it."""
    return rng.choice(
        ((9_999, 10_000), (2_000, 3_000), (50_000, 2_000), (10_001, 10_000), (1, 65_500), (30_000, 30_000))
    )


def _png_bomb(rng: random.Random) -> bytes:
    """Return a PNG of zeros, with 1 to 16 bits per sample, gray, palette or RGBA."""
    height, width = _sides(rng)
    bits, color, channels = rng.choice(((1, 0, 1), (8, 3, 1), (8, 2, 3), (16, 6, 4), (8, 6, 4)))
    stride = 1 + (width * bits * channels + 7) // 8
    packer = zlib.compressobj(1)
    rows = min(height, (16 << 20) // stride)  # cut off after 16 MiB, although the header announces all rows
    packed = packer.compress(bytes(stride * rows)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, rng.choice((0, 0, 1)))
    chunks = [(b"IHDR", header), (b"IDAT", packed), (b"IEND", b"")]
    if color == 3:
        chunks.insert(1, (b"PLTE", bytes(range(256)) * 3))
    if rng.random() < 0.2:
        chunks.insert(1, (b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(8 << 20))))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def _jpeg_bomb(rng: random.Random) -> bytes:
    """Return a progressive JPEG whose frame has another size than its data, with a repeated scan."""
    data = _saved(_picture("RGB", 16, 16), "JPEG", progressive=True)
    frame = data.index(b"\xff\xc2")
    height, width = (min(side, 65_500) for side in _sides(rng))
    last = data.rindex(b"\xff\xda")
    scans = data[last:-2] * rng.choice((1, 200, 5_000))
    return data[: frame + 5] + struct.pack(">HH", height, width) + data[frame + 9 : last] + scans + b"\xff\xd9"


def _bmp_bomb(rng: random.Random) -> bytes:
    """Return a run-length coded BMP of a kilobyte, whose runs and jumps cover the whole picture."""
    height, width = _sides(rng)
    body = rng.choice((b"\xff\x00" * 400, b"\x00\x02\xff\xff" * 200, b"\x00\x00" * 400)) + b"\x00\x01"
    offset = 14 + 40 + 1024
    header = struct.pack("<2sIHHI", b"BM", offset + len(body), 0, 0, offset)
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(body), 0, 0, 256, 0)
    return header + info + bytes(1024) + body


def _tiff_bomb(rng: random.Random) -> bytes:
    """Return a TIFF with a tile or strip of another size than the picture, in a compression with a high ratio."""
    height, width = _sides(rng)
    if rng.random() < 0.5:
        tile_height, tile_width, height, width = height, width, 16, 16
    else:
        tile_height, tile_width = 16, 16
    compression, body = rng.choice(((8, zlib.compress(bytes(1 << 20))), (32773, b"\x81\0" * 500), (1, bytes(768))))
    samples = rng.choice((1, 1, 1, 60))
    entries = [(256, width), (257, height), (258, 8), (259, compression), (262, 1), (277, samples)]
    entries += [(322, tile_width), (323, tile_height), (324, 8), (325, len(body))]
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", tag, 4, 1, v) for tag, v in entries)
    start = 8 + len(body) + len(body) % 2
    return struct.pack("<2sHI", b"II", 42, start) + body + bytes(len(body) % 2) + directory + bytes(4)


@functools.cache
def _large_webp() -> bytes:
    return _saved(Image.new("RGBA", (4_000, 4_000), (1, 2, 3, 4)), "WEBP", lossless=True, method=0, quality=0)


def _webp_bomb(rng: random.Random) -> bytes:
    """Return a WebP of 16 million pixels of one color, or with another size in its header."""
    data = bytearray(_large_webp())
    if rng.random() < 0.5:
        _change_header(rng, data)
    return bytes(data)


def _gif_bomb(rng: random.Random) -> bytes:
    """Return a GIF of a few bytes for each 4096 pixels, with a picture beyond its canvas, or with long comments."""
    height, width = (min(side, 65_535) for side in _sides(rng))
    data = bytearray(_saved(Image.new("P", (4_000, 4_000)), "GIF"))
    picture = data.index(b",", 13 + 768)
    struct.pack_into("<HH", data, rng.choice((6, picture + 5)), width, height)
    return bytes(data[:picture] + b"!\xfe" + b"\xff" * 256 * rng.choice((0, 1, 3_000)) + b"\0" + data[picture:])


@functools.cache
def _large_iso() -> tuple[bytes, ...]:
    white = Image.new("RGB", (4_000, 4_000), "white")
    formats = (("AVIF", {"speed": 10}),) * HAS_AVIF + (("HEIF", {}),) * (LIBHEIF is not None)
    return tuple(_saved(white, format, **options) for format, options in formats)


def _iso_bomb(rng: random.Random) -> bytes:
    """Return an AVIF or HEIC of 16 million pixels, or with another size in its header than in its codec's data."""
    if not _large_iso():
        return _gif_bomb(rng)
    data = bytearray(rng.choice(_large_iso()))
    if rng.random() < 0.7:
        struct.pack_into(">II", data, data.index(b"ispe") + 8, *reversed(_sides(rng)))
    return bytes(data)


_BOMBS = (_gif_bomb, _iso_bomb, _png_bomb, _png_bomb, _jpeg_bomb, _bmp_bomb, _tiff_bomb, _webp_bomb)
