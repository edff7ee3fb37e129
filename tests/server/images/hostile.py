"""Small files that are expensive to decode."""

from __future__ import annotations

import io
import struct

from PIL import Image


def jpeg_scans(scans: int, side: int) -> bytes:
    """Write a progressive gray JPEG with `scans` scans, all but the first empty: libjpeg walks the image for each."""
    out = b"\xff\xd8\xff\xdb" + struct.pack(">HB", 67, 0) + bytes([1] * 64)
    out += b"\xff\xc2" + struct.pack(">HBHHB", 11, 8, side, side, 1) + bytes([1, 0x11, 0])
    for table in (0, 0x10):
        out += b"\xff\xc4" + struct.pack(">HB", 20, table) + bytes([1] + [0] * 15) + b"\0"

    def scan(first: int, last: int, low: int) -> bytes:
        return b"\xff\xda" + struct.pack(">HB", 8, 1) + bytes([1, 0, first, last, low])

    return out + scan(0, 0, 1) + b"\0\0\0" + (scan(1, 63, 0) + b"\0") * (scans - 1) + b"\xff\xd9"


def one_bit_png(side: int) -> bytes:
    """An eighth of a bit a pixel."""
    file = io.BytesIO()
    Image.new("1", (side, side)).save(file, "PNG")
    return file.getvalue()


def lossless_webp(height: int, width: int) -> bytes:
    """Write only the header of a lossless WebP of that size."""
    head = b"\x2f" + struct.pack("<I", width - 1 | height - 1 << 14)
    return b"RIFF" + struct.pack("<I", 12 + len(head) + 1) + b"WEBPVP8L" + struct.pack("<I", len(head)) + head + b"\0"


def bmp_runs(side: int) -> bytes:
    """Write a BMP of 8 bits with one row of one-pixel runs and then a skip to the end."""
    head = struct.pack("<IIIHHIIIIII", 40, side, side, 1, 8, 1, 0, 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 54 + 1024) + head + bytes(range(256)) * 4 + b"\1\7" * side + b"\0\1"
