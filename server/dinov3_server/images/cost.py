"""Predicts what decoding a file costs, from its bytes, before any decoder reads them.

Pillow and its libraries do whatever a file says: 34 bytes of WebP allocate a canvas of 268 million pixels, every scan
of 11 bytes in a JPEG walks the whole image, text in a PNG inflates a thousandfold. So our own readers look at each file
first, in a bounded number of steps. A file is *plain* if they show that decoding takes a known amount of memory and at
most some tenths of a second. Nearly all files are plain, and are decoded by threads. All others are decoded by a
process with a limit of memory and time that can be killed (`images/decoders.py`). A file that a reader does not
understand is not an error here, but not plain.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from dinov3_server.errors import InvalidInput
from dinov3_server.images.decode import File, check_pixels
from dinov3_server.images.formats import DECODED, describe, format_name, unidentified
from dinov3_serving.images import Transform

# Limits of a plain file. Decoding takes 2 to 55 ns a pixel (most for WebP and progressive JPEG of noise) and less than
# 20 ns a byte.
PLAIN_PIXELS = 1 << 22
PLAIN_BYTES = 1 << 24
# For resampling and fitting a plain file: some tenths of a second.
_PLAIN_TRANSFORM_BYTES = 1 << 28
# Compressed bytes of text and color profiles in a plain PNG; zlib inflates at most 1032-fold.
_PLAIN_PACKED_BYTES = 1 << 15
_MAX_INFLATION = 1032
# Segments, chunks or tags that a reader looks at. A PNG has a chunk for every 8 KiB of pixels.
_MAX_STEPS = 2048
# libjpeg walks the whole image for every scan. Encoders write about 10; the finest useful division of a progressive
# file has some dozens.
MAX_SCANS = 200
_PLAIN_SCANS = 32
_SEGMENTS_PER_SCAN = 16

# Memory of decoders and Python beside the pixels. For files that are not plain, with the libraries' tables: 52 MB for
# a lossless WebP by a common encoder, 8 MB for the window of zstd and LZMA.
_PLAIN_EXTRA_BYTES = 1 << 20
_EXTRA_BYTES = 1 << 26

# Peak memory of Pillow in bytes a pixel: the image in its own mode, and the RGB image that it is converted to, 4 bytes.
_RGB, _NARROW, _WIDE, _SIXTEEN, _INT_OR_FLOAT = 4, 5, 8, 13, 22
# What alpha over a color adds: the image and the color in RGBA, and their composite.
_COMPOSITE = 12


class Cost(NamedTuple):
    """The cost of decoding one file and transforming its image.

    `height` and `width` are those of the header, 0 if it could not be read; `nbytes` is the peak memory. If the file is
    not `plain`, `nbytes` and `seconds` (of processor time) are limits, which files of common encoders do not reach.
    """

    height: int
    width: int
    nbytes: int
    plain: bool

    @property
    def seconds(self) -> int:
        """Return the limit of CPU seconds: several times what the slowest real files need.

        These are BMP with runs of one pixel, LZMA and arithmetic coding.
        """
        return 5 + self.height * self.width // 1_000_000

    def with_transforms(self, transforms: Iterable[Transform]) -> Cost:
        """Return the cost with the memory of the largest transform; they run one after the other."""
        height, width, nbytes, plain = self
        most = max(_transform_bytes(height, width, each) for each in transforms)
        # An elongated picture can be resized to many pixels before its center is cropped.
        if plain and most > _PLAIN_TRANSFORM_BYTES:
            return Cost(height, width, nbytes + most + _EXTRA_BYTES, False)
        return Cost(height, width, nbytes + most, plain)


class _Header(NamedTuple):
    """Result of a format's reader: size, memory in bytes a pixel, further bytes, and whether the file can be plain."""

    height: int
    width: int
    bytes_per_pixel: int
    extra: int = 0
    plain: bool = True


def cost_of(file: File) -> Cost:
    """Return the cost of decoding a file.

    Raises InvalidInput for empty data, another format, more than `file.max_pixels`, and a JPEG with more than MAX_SCANS
    scans.
    """
    data = file.data
    # Pillow knows more TIFF signatures than `format_name`.
    reader = _READERS.get(bytes(data[:2]))
    if reader is None or (format_name(data) not in DECODED and reader is not _tiff):
        raise InvalidInput(unidentified(data))
    try:
        header = reader(data)
    except (struct.error, IndexError, OverflowError):  # truncated or corrupt
        header = None
    if header is None or not (header.height and header.width):
        return Cost(0, 0, len(data) + _EXTRA_BYTES, False)
    check_pixels(data, "the image", header.width, header.height, file.max_pixels)
    pixels = header.height * header.width
    composite = 0 if file.background is None else _COMPOSITE
    plain = header.plain and pixels <= PLAIN_PIXELS and len(data) <= PLAIN_BYTES
    per_pixel = header.bytes_per_pixel + _RGB * file.apply_exif_orientation + composite
    nbytes = pixels * per_pixel + header.extra + 2 * len(data)
    return Cost(header.height, header.width, nbytes + (_PLAIN_EXTRA_BYTES if plain else _EXTRA_BYTES), plain)


def transform_cost(height: int, width: int, transforms: Iterable[Transform]) -> Cost:
    """Return the cost of transforming raw pixels."""
    return Cost(height, width, _RGB * height * width, True).with_transforms(transforms)


def _transform_bytes(height: int, width: int, transform: Transform) -> int:
    cropped = 0
    if transform.crop is not None:  # a box that exceeds the image is refused later
        height, width = min(transform.crop.height, height), min(transform.crop.width, width)
        cropped = _RGB * height * width
    out_height, out_width = transform.size or (height, width)
    resized = transform.fit.resized((height, width), (out_height, out_width)) if height and width else (0, 0)
    # The two passes of resampling, the fitted and the flipped image, and its bytes twice.
    resampling = _RGB * resized[1] * height + _RGB * resized[0] * resized[1]
    return cropped + resampling + (_RGB + _RGB + 3 + 3) * out_height * out_width


def _jpeg(data: bytes | memoryview) -> _Header | None:
    """Read JPEG segments up to the first scan (ITU-T T.81, annex B), and count the scans if there can be several."""
    at, unpack = 2, _SEGMENT.unpack_from
    frame: tuple[int, bytes | memoryview] | None = None
    for _ in range(_MAX_STEPS):
        begin, marker, length = unpack(data, at)
        if begin != 0xFF or marker < 0xC0 or 0xD0 <= marker <= 0xD9:
            return None
        if marker == 0xFF:  # a fill byte
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
    return _Header(
        height, width, per_pixel, extra, plain=huffman and scans <= _PLAIN_SCANS and extra <= 8 * PLAIN_PIXELS
    )


_SEGMENT, _FRAME = struct.Struct(">BBH"), struct.Struct(">BHHB")
_FACTORS = frozenset(across << 4 | down for across in range(1, 5) for down in range(1, 5))
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL = (0xC0, 0xC1, 0xC9)
# A marker that ends entropy-coded data: any but restart markers. (0xFF 0x00 is a data byte.)
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")


def _count_scans(data: bytes | memoryview, at: int) -> int:
    """Count a JPEG's scans from the first on. Raises InvalidInput for more than MAX_SCANS, or too many segments."""
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
        f"{describe(data)} takes too much work: it has more than {MAX_SCANS} scans, or more than "
        f"{_SEGMENTS_PER_SCAN * MAX_SCANS} segments between them; a progressive file has about 10. Save the image again"
    )


def _png(data: bytes | memoryview) -> _Header | None:
    """Read PNG chunks up to IEND (PNG specification, 3rd edition, section 5)."""
    length, kind, width, height, bits, color = struct.unpack_from(">I4sIIBB", data, 8)
    if (length, kind) != (13, b"IHDR"):
        return None
    at, packed, plain = 33, 0, True
    for _ in range(_MAX_STEPS):
        try:
            length, kind = struct.unpack_from(">I4s", data, at)
        except struct.error:  # truncated
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
    per_pixel = _SIXTEEN if bits == 16 and color == 0 else {0: _NARROW, 2: _RGB, 3: _NARROW}.get(color, _WIDE)
    return _Header(height, width, per_pixel, packed * _MAX_INFLATION, plain)


def _webp(data: bytes | memoryview) -> _Header | None:
    """Read a WebP header (container specification; RFC 6386, 9.1; lossless bitstream specification, 3).

    The memory is two canvases and a copy of one. Only simple lossy files are plain: a lossless one can allocate a
    thousand bytes of tables a pixel.
    """
    kind = data[12:16]
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
        return _Header(height, width, 20)
    if kind == b"VP8L" and data[20] == 0x2F:
        sides = int.from_bytes(data[21:25], "little")
        return _Header((sides >> 14 & 0x3FFF) + 1, (sides & 0x3FFF) + 1, 24, plain=False)
    if kind == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
        return _Header(height, width, 28, plain=False)
    return None


def _bmp(data: bytes | memoryview) -> _Header | None:
    """Read a BMP header: BITMAPCOREHEADER, BITMAPINFOHEADER and its successors.

    Run lengths are not plain: Pillow decodes them in Python, byte by byte.
    """
    header = int.from_bytes(data[14:18], "little")
    if header == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
        return _Header(height, width, _NARROW if bits <= 8 else _RGB)
    width, height, _, bits, compression = struct.unpack_from("<IIHHI", data, 18)
    if data[25] == 0xFF:  # Pillow's rule for top-down rows
        height = (1 << 32) - height
    if compression in (0, 3):
        return _Header(height, width, _NARROW if bits <= 8 else _WIDE)
    return _Header(height, width, _NARROW + 4, plain=False)


def _tiff(data: bytes | memoryview) -> _Header | None:
    """Read TIFF (TIFF 6.0, section 2) or BigTIFF tags. Never plain: tags are unlimited, and codecs are many."""
    order = "<" if data[:2] == b"II" else ">"
    if data[2:4] in (b"+\0", b"\0+"):
        at, form, counted = struct.unpack_from(order + "Q", data, 8)[0], order + "HHQ", "Q"
    else:
        at, form, counted = struct.unpack_from(order + "I", data, 4)[0], order + "HHI", "H"
    (count,) = struct.unpack_from(order + counted, data, at)
    at += struct.calcsize(order + counted)
    step = 20 if counted == "Q" else 12
    tags: dict[int, int] = {}
    for entry in range(at, at + step * min(count, _MAX_STEPS), step):
        tag, kind, values = struct.unpack_from(form, data, entry)
        if tag in _TIFF_TAGS and kind in _TIFF_KINDS and (values == 1 or tag == 258):
            where = entry + struct.calcsize(form)
            value = _TIFF_KINDS[kind]
            if values * struct.calcsize(value) > step - where + entry:  # the entry has their offset
                (where,) = struct.unpack_from(order + form[-1], data, where)
            tags.setdefault(tag, struct.unpack_from(order + value, data, where)[0])
    width, height = tags.get(256, 0), tags.get(257, 0)
    bits, samples, photometric = tags.get(258, 1), tags.get(277, 1), tags.get(262, 0)
    # libtiff decodes a tile or strip at once, in four bytes a pixel if it converts colors itself. `decode` refuses
    # tiles that are larger than the image.
    tile = tags[322] * tags[323] if {322, 323} <= tags.keys() else width * min(tags.get(278, height), height)
    buffer = min(tile, max(4 * width * height, PLAIN_PIXELS))
    buffer *= max(samples * bits // 8, 4 if photometric == 6 or tags.get(259) in (6, 7) else 1)
    if samples == 1:
        per_pixel = _NARROW if bits <= 8 else _SIXTEEN if bits == 16 else _INT_OR_FLOAT
    else:
        per_pixel = _RGB if samples == 3 and photometric == 2 else _WIDE
    if tags.get(274, 1) > 1:
        per_pixel += _RGB
    return _Header(height, width, per_pixel, buffer, plain=False)


# Width, height, bits, compression, photometric interpretation, orientation, samples, rows of a strip, sides of a tile.
_TIFF_TAGS = frozenset((256, 257, 258, 259, 262, 274, 277, 278, 322, 323))
_TIFF_KINDS: Mapping[int, str] = {1: "B", 3: "H", 4: "I", 16: "Q"}


def _gif(data: bytes | memoryview) -> _Header | None:
    """Read a GIF up to its first picture (GIF89a, sections 18 to 25): Pillow takes a canvas that has room for it."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + (3 << (flags & 7) + 1) * (flags >> 7)
    for _ in range(_MAX_STEPS):
        block = data[at]
        if block == 0x2C:
            left, top, across, down = struct.unpack_from("<HHHH", data, at + 1)
            return _Header(max(height, top + down), max(width, left + across), _NARROW + 2)
        if block == 0x3B:
            return None
        at += 2 if block == 0x21 else 1
        while block == 0x21 and (length := data[at]):
            at += 1 + length
            if at > _MAX_GIF_HEAD:
                return None
        at += block == 0x21
    return None


# Comments are joined by Pillow, block by block.
_MAX_GIF_HEAD = 1 << 18


def _iso(data: bytes | memoryview) -> _Header | None:
    """Read the sizes of all pictures of an AVIF or HEIC file (ISO/IEC 14496-12 and 23008-12), and return the largest.

    Never plain. The memory is the picture of the codec in up to 16 bits a sample, a copy with film grain or without
    padding, that of the library in RGBA, and two of Pillow.
    """
    largest = 0, 0
    ends = [(0, len(data))]
    for _ in range(_MAX_STEPS):
        while ends and ends[-1][0] + 8 > ends[-1][1]:
            ends.pop()
        if not ends:
            break
        at, end = ends.pop()
        length, kind = struct.unpack_from(">I4s", data, at)
        body = at + 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, body)
            body += 8
        stop = at + length if length else end
        if not body <= stop <= end:  # cut off, as mdat may be, or damaged
            if kind in _ISO_CONTAINERS or kind in _ISO_SIZES:
                return None
            break
        ends.append((stop, end))
        if kind in _ISO_CONTAINERS:
            ends.append((body + _ISO_CONTAINERS[kind], stop))
        elif kind in _ISO_SIZES:
            width, height = (side >> _ISO_SIZES[kind] for side in struct.unpack_from(">II", data, stop - 8))
            largest = max(largest, (height, width), key=lambda size: size[0] * size[1])
    else:
        return None
    return _Header(*largest, 32, plain=False)


# The size of an item, and of a track in numbers of 16.16 bits: each with the bits after the point.
_ISO_SIZES: Mapping[bytes, int] = {b"ispe": 0, b"tkhd": 16}
# Each with the length of what precedes its inner boxes.
_ISO_CONTAINERS: Mapping[bytes, int] = {b"meta": 4, b"iprp": 0, b"ipco": 0, b"moov": 0, b"trak": 0}

# By the first two bytes.
_READERS: Mapping[bytes, Callable[[bytes | memoryview], _Header | None]] = {
    b"\xff\xd8": _jpeg,
    b"\x89P": _png,
    b"RI": _webp,
    b"BM": _bmp,
    b"II": _tiff,
    b"MM": _tiff,
    b"GI": _gif,
    b"\0\0": _iso,
}
