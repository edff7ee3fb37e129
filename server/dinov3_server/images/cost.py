"""What a file asks of a decoder, told from its bytes before any decoder sees them.

Pillow and the libraries under it do what a file says: 34 bytes of WebP take the memory of a canvas of 268 million
pixels, a JPEG has the whole picture walked for every scan of 11 bytes, text in a PNG inflates a thousandfold. So a
reader of our own looks at each file first, in few steps whatever the file holds. A file is *plain* where it shows that
decoding takes a known amount of memory and no more than some tenths of a second. Nearly all files are; they are
decoded by threads. All others are decoded by a process that has a limit of memory and time, and can be ended
(`images/decoders.py`). Not to see through a file is no error here: it is then not plain.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from dinov3_server.errors import InvalidInput
from dinov3_server.images.decode import ALLOWED_NAMES, check_pixels, describe, format_name, unidentified
from dinov3_server.images.preprocess import Transform

# Of a plain file. Decoding takes 2 to 55 ns a pixel (WebP and progressive JPEG of noise take longest) and less than
# 20 ns a byte.
PLAIN_PIXELS = 1 << 22
PLAIN_BYTES = 1 << 24
# Text and colour profiles, as they lie in a PNG: zlib inflates at most 1032-fold.
_PLAIN_PACKED_BYTES = 1 << 15
_INFLATES = 1032
# Segments, chunks or tags that are looked at. A PNG has a chunk for every 8 KiB of pixels.
_STEPS = 2048
# libjpeg walks the whole picture for every scan. Encoders write 10 or so; the finest division of a progressive file
# that makes any sense has some dozens.
MAX_SCANS = 200
_PLAIN_SCANS = 32
_SEGMENTS_PER_SCAN = 16

# What decoders and Python take beside the pixels. Of a file that is not plain, libraries' tables too: those of a
# lossless WebP of a usual encoder come to 52 MB, the window of zstd and LZMA to 8 MB.
_PLAIN_EXTRA_BYTES = 1 << 20
_EXTRA_BYTES = 1 << 26

# What Pillow holds, in bytes a pixel, at the moment at which it holds most: the picture in a mode of its own, and the
# RGB that it is converted to, which has 4.
_RGB, _NARROW, _WIDE, _SIXTEEN, _INT_OR_FLOAT = 4, 5, 8, 13, 22


class Cost(NamedTuple):
    """Of decoding one file, and of what is made of its picture.

    `height` and `width` are those that the header promises, 0 where it could not be read; `nbytes` is the most memory
    that is taken at any time. Where the file is not `plain`, `nbytes` and `seconds`, of processor time, are limits:
    what a usual encoder wrote stays within them, and what passes them is to be ended.
    """

    height: int
    width: int
    nbytes: int
    plain: bool

    @property
    def seconds(self) -> int:
        """Several times what the slowest files take: a BMP of single runs, LZMA, arithmetic coding."""
        return 5 + self.height * self.width // 1_000_000

    def with_transforms(self, transforms: Iterable[Transform]) -> Cost:
        """With that of the transforms, one after the other."""
        height, width, nbytes, plain = self
        return Cost(height, width, nbytes + max(_transform_bytes(height, width, each) for each in transforms), plain)


class _Look(NamedTuple):
    """What a format's reader saw: size, bytes of memory a pixel, bytes beside them, and whether that is all."""

    height: int
    width: int
    bytes_per_pixel: int
    extra: int = 0
    plain: bool = True


def cost_of(data: bytes | memoryview, *, max_pixels: int, apply_exif_orientation: bool = False) -> Cost:
    """Raises InvalidInput for what is empty or of no allowed format, for more than `max_pixels` (height * width), and
    for a JPEG of more than MAX_SCANS scans."""
    reader = _READERS.get(bytes(data[:2]))
    if reader is None or (format_name(data) not in ALLOWED_NAMES and reader is not _tiff):  # Pillow has more of these
        raise InvalidInput(unidentified(data))
    try:
        look = reader(data)
    except (struct.error, IndexError, OverflowError):  # cut off, or nonsense
        look = None
    if look is None or not (look.height and look.width):
        return Cost(0, 0, len(data) + _EXTRA_BYTES, False)
    check_pixels(data, "the image", look.width, look.height, max_pixels)
    pixels = look.height * look.width
    plain = look.plain and pixels <= PLAIN_PIXELS and len(data) <= PLAIN_BYTES
    nbytes = pixels * (look.bytes_per_pixel + _RGB * apply_exif_orientation) + look.extra + 2 * len(data)
    return Cost(look.height, look.width, nbytes + (_PLAIN_EXTRA_BYTES if plain else _EXTRA_BYTES), plain)


def resizing(height: int, width: int, transforms: Iterable[Transform]) -> Cost:
    """Of transforms of raw pixels."""
    return Cost(height, width, _RGB * height * width, True).with_transforms(transforms)


def _transform_bytes(height: int, width: int, transform: Transform) -> int:
    cropped = 0
    if transform.crop is not None:  # one that reaches beyond the picture is refused later
        height, width = min(transform.crop.height, height), min(transform.crop.width, width)
        cropped = _RGB * height * width
    out_height, out_width = transform.size or (height, width)
    # The two passes of resampling, the picture turned, its bytes and once more its bytes.
    return cropped + _RGB * out_width * height + (_RGB + _RGB + 3 + 3) * out_height * out_width


def _jpeg(data: bytes | memoryview) -> _Look | None:
    """ITU-T T.81, annex B: segments up to the first scan, and whether there can be more scans."""
    at, unpack = 2, _SEGMENT.unpack_from
    frame: tuple[int, bytes | memoryview] | None = None
    for _ in range(_STEPS):
        begin, marker, length = unpack(data, at)
        if begin != 0xFF or marker < 0xC0 or 0xD0 <= marker <= 0xD9:
            return None
        if marker == 0xFF:  # a filling byte
            at += 1
            continue
        if marker == 0xDA:
            break
        if marker in _FRAMES:
            if frame:
                return None
            frame = marker, data[at + 4 : at + 2 + length]
        at += 2 + length
    else:
        return None
    if not frame or at > 1 << 22:  # Pillow joins segments of metadata, the longer the slower
        return None
    marker, head = frame
    bits, height, width, layers = _FRAME.unpack_from(head)
    factors = bytes(head[7 : 7 + 3 * layers : 3])
    if bits != 8 or len(factors) != layers or layers not in (1, 3, 4) or not _FACTORS.issuperset(factors):
        return None
    single = marker in _SEQUENTIAL and data[at + 4] == layers
    scans = 1 if single else _count_scans(data, at)
    per_pixel = _RGB if layers == 3 else _NARROW if layers == 1 else _WIDE
    extra = 0
    if not single:  # libjpeg keeps two bytes a coefficient, in whole blocks
        across, down = max(f >> 4 for f in factors), max(f & 15 for f in factors)
        blocks = -(-height // (8 * down)) * -(-width // (8 * across)) * sum((f >> 4) * (f & 15) for f in factors)
        extra = 128 * blocks
    huffman = marker < 0xC8
    return _Look(height, width, per_pixel, extra, plain=huffman and scans <= _PLAIN_SCANS and extra <= 8 * PLAIN_PIXELS)


_SEGMENT, _FRAME = struct.Struct(">BBH"), struct.Struct(">BHHB")
_FACTORS = frozenset(across << 4 | down for across in range(1, 5) for down in range(1, 5))
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL = (0xC0, 0xC1, 0xC9)
# What ends coded pixels: any marker but those of restarts. (0xFF 0x00 is a byte of the pixels.)
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")


def _count_scans(data: bytes | memoryview, at: int) -> int:
    """Of a JPEG, from its first scan on. Raises InvalidInput for more than MAX_SCANS, or segments without end."""
    scans = 0
    for _ in range(_SEGMENTS_PER_SCAN * MAX_SCANS):
        found = _MARKER.search(data, at)
        if not found:
            return scans
        at, marker = found.end(), data[found.end() - 1]
        if marker == 0xD9:
            return scans
        if marker == 0xDA:
            scans += 1
            if scans > MAX_SCANS:
                break
        if marker not in (0x01, 0xD8):
            if at + 2 > len(data):
                return scans
            at += int.from_bytes(data[at : at + 2])
    raise InvalidInput(
        f"{describe(data)} asks for too much work: it has more than {MAX_SCANS} scans, or more than "
        f"{_SEGMENTS_PER_SCAN * MAX_SCANS} segments between them; a progressive file has about 10. Save it anew"
    )


def _png(data: bytes | memoryview) -> _Look | None:
    """The PNG specification, 3rd edition, section 5: chunks up to IEND."""
    length, kind, width, height, bits, colour = struct.unpack_from(">I4sIIBB", data, 8)
    if (length, kind) != (13, b"IHDR"):
        return None
    at, packed, plain = 33, 0, True
    for _ in range(_STEPS):
        try:
            length, kind = struct.unpack_from(">I4s", data, at)
        except struct.error:  # cut off
            break
        if kind == b"IEND":
            break
        if kind in (b"zTXt", b"iTXt", b"iCCP"):
            packed += length
        elif kind in (b"acTL", b"fcTL", b"fdAT", b"IHDR"):
            plain = False
        at += 12 + length
    else:
        plain = False
    if packed > _PLAIN_PACKED_BYTES:
        packed, plain = 0, False
    per_pixel = _SIXTEEN if bits == 16 and colour == 0 else {0: _NARROW, 2: _RGB, 3: _NARROW}.get(colour, _WIDE)
    return _Look(height, width, per_pixel, packed * _INFLATES, plain)


def _webp(data: bytes | memoryview) -> _Look | None:
    """The WebP container specification; RFC 6386, 9.1; the lossless bitstream's, 3. Two canvases and a copy of one.

    Only simple files of lossy pixels are plain: a lossless one can ask for a thousand bytes of tables a pixel.
    """
    kind = data[12:16]
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
        return _Look(height, width, 20)
    if kind == b"VP8L" and data[20] == 0x2F:
        sides = int.from_bytes(data[21:25], "little")
        return _Look((sides >> 14 & 0x3FFF) + 1, (sides & 0x3FFF) + 1, 24, plain=False)
    if kind == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
        return _Look(height, width, 28, plain=False)
    return None


def _bmp(data: bytes | memoryview) -> _Look | None:
    """BITMAPCOREHEADER, BITMAPINFOHEADER and its successors. Run lengths are decoded in Python, byte by byte."""
    header = int.from_bytes(data[14:18], "little")
    if header == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
        return _Look(height, width, _NARROW if bits <= 8 else _RGB)
    width, height, _, bits, compression = struct.unpack_from("<IIHHI", data, 18)
    if data[25] == 0xFF:  # Pillow's rule for rows that run from top to bottom
        height = (1 << 32) - height
    if compression in (0, 3):
        return _Look(height, width, _NARROW if bits <= 8 else _WIDE)
    return _Look(height, width, _NARROW + 4, plain=False)


def _tiff(data: bytes | memoryview) -> _Look | None:
    """TIFF 6.0, section 2; BigTIFF. Never plain: tags without number, and a codec for every taste."""
    order = "<" if data[:2] == b"II" else ">"
    if data[2:4] in (b"+\0", b"\0+"):
        at, form, counted = struct.unpack_from(order + "Q", data, 8)[0], order + "HHQ", "Q"
    else:
        at, form, counted = struct.unpack_from(order + "I", data, 4)[0], order + "HHI", "H"
    (count,) = struct.unpack_from(order + counted, data, at)
    at += struct.calcsize(order + counted)
    step = 20 if counted == "Q" else 12
    tags: dict[int, int] = {}
    for entry in range(at, at + step * min(count, _STEPS), step):
        tag, kind, values = struct.unpack_from(form, data, entry)
        if tag in _TIFF_TAGS and kind in _TIFF_KINDS and (values == 1 or tag == 258):
            where = entry + struct.calcsize(form)
            value = _TIFF_KINDS[kind]
            if values * struct.calcsize(value) > step - where + entry:  # too many to stand here
                (where,) = struct.unpack_from(order + form[-1], data, where)
            tags.setdefault(tag, struct.unpack_from(order + value, data, where)[0])
    width, height = tags.get(256, 0), tags.get(257, 0)
    bits, samples, photometric = tags.get(258, 1), tags.get(277, 1), tags.get(262, 0)
    # What libtiff decodes at once, a tile or a strip; in four bytes a pixel where it converts colours itself.
    # Larger tiles than the picture are `decode`'s to refuse.
    tile = tags[322] * tags[323] if {322, 323} <= tags.keys() else width * min(tags.get(278, height), height)
    buffer = min(tile, max(4 * width * height, PLAIN_PIXELS))
    buffer *= max(samples * bits // 8, 4 if photometric == 6 or tags.get(259) in (6, 7) else 1)
    if samples == 1:
        per_pixel = _NARROW if bits <= 8 else _SIXTEEN if bits == 16 else _INT_OR_FLOAT
    else:
        per_pixel = _RGB if samples == 3 and photometric == 2 else _WIDE
    if tags.get(274, 1) > 1:
        per_pixel += _RGB
    return _Look(height, width, per_pixel, buffer, plain=False)


# Width, height, bits, compression, photometric interpretation, orientation, samples, rows of a strip, tile's sides.
_TIFF_TAGS = frozenset((256, 257, 258, 259, 262, 274, 277, 278, 322, 323))
_TIFF_KINDS: Mapping[int, str] = {1: "B", 3: "H", 4: "I", 16: "Q"}

# By the first two bytes.
_READERS: Mapping[bytes, Callable[[bytes | memoryview], _Look | None]] = {
    b"\xff\xd8": _jpeg,
    b"\x89P": _png,
    b"RI": _webp,
    b"BM": _bmp,
    b"II": _tiff,
    b"MM": _tiff,
}
