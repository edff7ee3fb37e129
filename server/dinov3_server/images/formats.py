"""The file formats that the server decodes, and those that it can name in an error."""

from __future__ import annotations

import PIL
from PIL import features

LIBHEIF: str | None = None
try:
    import pillow_heif
except ImportError:  # the extra "heif" is not installed
    pass
else:
    LIBHEIF = pillow_heif.libheif_version()
    pillow_heif.register_heif_opener()
    # A decode process has memory for one thread and one picture.
    pillow_heif.options.DECODE_THREADS = 1
    pillow_heif.options.THUMBNAILS = pillow_heif.options.DEPTH_IMAGES = pillow_heif.options.AUX_IMAGES = False

HAS_AVIF: bool = features.check_module("avif")
if HAS_AVIF:
    from PIL import AvifImagePlugin

    AvifImagePlugin.DEFAULT_MAX_THREADS = 1

# Names of the server, each with that of Pillow's plugin.
_PLUGINS = {
    "JPEG": "JPEG",
    "PNG": "PNG",
    "WebP": "WEBP",
    "BMP": "BMP",
    "TIFF": "TIFF",
    "GIF": "GIF",
    **({"AVIF": "AVIF"} if HAS_AVIF else {}),
    **({"HEIC": "HEIF"} if LIBHEIF else {}),
}
DECODED = tuple(_PLUGINS)
"""The formats that are decoded."""
PILLOW_NAMES = tuple(_PLUGINS.values())
_ALLOWED = f"allowed are {', '.join(DECODED[:-1])} and {DECODED[-1]} files"
HAS_PILLOW = f"this server has Pillow {PIL.__version__}"
# Earlier versions read fewer kinds of TIFF, and one kind in wrong colors. They are allowed because gradio needs them.
READS_ALL_TIFF = int(PIL.__version__.partition(".")[0]) >= 13

# (name, offset, bytes at it) of the formats, and of others that are often sent by mistake.
_SIGNATURES: tuple[tuple[str, int, *tuple[bytes, ...]], ...] = (
    ("JPEG", 0, b"\xff\xd8\xff"),
    ("PNG", 0, b"\x89PNG\r\n\x1a\n"),
    ("WebP", 8, b"WEBP"),
    ("BMP", 0, b"BM"),
    ("TIFF", 0, b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    ("GIF", 0, b"GIF87a", b"GIF89a"),
    ("AVIF", 4, b"ftypavif", b"ftypavis"),
    ("HEIC", 4, b"ftyphei", b"ftyphev"),
    ("HEIF", 4, b"ftypmif1", b"ftypmsf1"),
    ("MP4-like", 4, b"ftyp"),
    ("JPEG 2000", 0, b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"),
    ("JPEG XL", 0, b"\0\0\0\x0cJXL ", b"\xff\x0a"),
    ("Photoshop", 0, b"8BPS"),
    ("PDF", 0, b"%PDF"),
    ("SVG", 0, b"<svg"),
    ("XML", 0, b"<?xml"),
    ("HTML", 0, b"<!DOCTYPE", b"<!doctype", b"<html"),
    ("npy", 0, b"\x93NUMPY"),
    ("zip (or npz)", 0, b"PK\x03\x04"),
    ("gzip", 0, b"\x1f\x8b"),
    ("ICO", 0, b"\0\0\x01\0"),
    ("PPM", 0, b"P6"),
    ("PGM", 0, b"P5"),
)
# Brands after the first one, of a file whose first brand is that of the container (HEIF, ISO/IEC 23008-12).
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"hevc": "HEIC", b"hevx": "HEIC"}
_BRANDS_END = 128


def format_name(data: bytes | memoryview) -> str | None:
    """Return the name of a file's format by its signature, None if unknown."""
    head = bytes(data[:_BRANDS_END])
    name = next((name for name, at, *signatures in _SIGNATURES if head.startswith(tuple(signatures), at)), None)
    if name == "HEIF":
        end = min(len(head), int.from_bytes(head[:4]))
        brands = (head[at : at + 4] for at in range(16, end - 3, 4))
        return next((_BRANDS[brand] for brand in brands if brand in _BRANDS), name)
    return name


def describe(data: bytes | memoryview) -> str:
    """Return format and size of a file, for messages."""
    return f"the {format_name(data) or 'image'} file of {len(data)} bytes"


def unidentified(data: bytes | memoryview) -> str:
    """Return the error message for a file of no allowed format."""
    if not data:
        return f"the file is empty (0 bytes); {_ALLOWED}"
    name = format_name(data)
    if name in DECODED:
        message = f"{describe(data)} has no readable header: it is truncated, corrupt or of an unsupported kind"
        if name == "TIFF" and not READS_ALL_TIFF:
            message += (
                f" ({HAS_PILLOW}; some kinds, such as gray that is premultiplied by alpha, need Pillow >= 13); "
                "send RGB without alpha, or install Pillow >= 13 on the server"
            )
        return message
    looks = f"looks like {name}" if name else "is not an image of a known format"
    message = f"the file of {len(data)} bytes {looks} (it begins with {data[:8].hex(' ')}); {_ALLOWED}"
    if name == "AVIF":
        message += f" ({HAS_PILLOW}, without AVIF; Pillow >= 11.3 has it)"
    elif name == "HEIC":
        message += " (for HEIC install dinov3-serving[heif] on the server)"
    return message
