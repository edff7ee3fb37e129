"""Writers of lossless files that Pillow can read but not write."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[Any]

ORIENTATION = 0x0112


def photo(height: int = 5, width: int = 7, channels: int = 3) -> npt.NDArray[np.uint8]:
    """Return [height, width, channels] (or [height, width] for one channel) in which nearly all values differ."""
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(7).integers(0, 256, shape, dtype=np.uint8)


def encode(image: Image.Image | Pixels, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, format, **options)
    return file.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, bits: int, color: int, rows: bytes, *chunks: bytes, after: bytes = b"") -> bytes:
    """Write a PNG of packed `rows` without filter bytes; `chunks` precede the pixels, `after` follows them."""
    stride = len(rows) // height
    filtered = b"".join(b"\0" + rows[i * stride : (i + 1) * stride] for i in range(height))
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            png_chunk(b"IHDR", header),
            *chunks,
            png_chunk(b"IDAT", zlib.compress(filtered)),
            after,
            png_chunk(b"IEND", b""),
        )
    )


PNG_GRAY, PNG_RGB, PNG_PALETTE, PNG_LA, PNG_RGBA = 0, 2, 3, 4, 6


def png16(samples: npt.NDArray[np.uint16]) -> bytes:
    """Write [H, W] or [H, W, 2 to 4] as 16-bit gray, LA, RGB or RGBA."""
    height, width, *channels = samples.shape
    color = {0: PNG_GRAY, 2: PNG_LA, 3: PNG_RGB, 4: PNG_RGBA}[channels[0] if channels else 0]
    return png(width, height, 16, color, samples.astype(">u2").tobytes())


def tiff(
    width: int,
    height: int,
    photometric: int,
    bits: Sequence[int],
    body: bytes,
    *,
    order: Literal["<", ">"] = "<",
    tags: Mapping[int, Sequence[int]] | None = None,
) -> bytes:
    """Write a TIFF with `body` in one uncompressed strip, or one tile if `tags` have its sides (322, 323)."""
    tags = tags or {}
    offset, size, rows = (324, 325, 323) if 322 in tags else (273, 279, 278)
    entries: dict[int, Sequence[int]] = {
        256: [width],
        257: [height],
        258: bits,
        259: [1],
        262: [photometric],
        277: [len(bits)],
        offset: [8],
        size: [len(body)],
        rows: [height],
        **tags,
    }
    body += b"\0" * (len(body) % 2)
    directory = 8 + len(body)
    overflow = directory + 2 + 12 * len(entries) + 4
    table, values = b"", b""
    for tag, numbers in sorted(entries.items()):
        long = max(numbers) > 0xFFFF or tag in (offset, size)
        data = struct.pack(f"{order}{len(numbers)}{'I' if long else 'H'}", *numbers)
        where = data.ljust(4, b"\0") if len(data) <= 4 else struct.pack(f"{order}I", overflow + len(values))
        table += struct.pack(f"{order}HHI", tag, 4 if long else 3, len(numbers)) + where
        values += data if len(data) > 4 else b""
    return b"".join(
        (
            {"<": b"II*\0", ">": b"MM\0*"}[order],
            struct.pack(f"{order}I", directory),
            body,
            struct.pack(f"{order}H", len(entries)),
            table,
            bytes(4),
            values,
        )
    )
