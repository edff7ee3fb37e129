"""Decodes image files (`formats.py`) to RGB with Pillow.

The pixels equal those of `Image.open(file).convert("RGB")` in a training loader, except where that call destroys the
image (16-bit and floating-point grayscale). `docs/preprocessing.md` lists the result for every kind of file.

Thread-safe: nothing here keeps state, and Pillow releases the GIL while it decodes.
"""

from __future__ import annotations

import ctypes
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

# Plugins register themselves when imported. Import all of them here, not on a thread's first image.
from PIL import (
    BmpImagePlugin,  # noqa: F401
    ExifTags,
    GifImagePlugin,  # noqa: F401
    Image,
    ImageFile,
    JpegImagePlugin,  # noqa: F401
    PngImagePlugin,  # noqa: F401
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401
    _imaging,
)

from dinov3_server.errors import InvalidInput
from dinov3_server.images.formats import HAS_PILLOW, PILLOW_NAMES, READS_ALL_TIFF, describe, unidentified
from dinov3_serving.images import Color
from dinov3_serving.pillow import over, truncated_files

# Process-wide settings, which cannot be changed for one thread.
# Pillow's limit is global and only warns; ours is checked on every header and is an error.
Image.MAX_IMAGE_PIXELS = None
# Pillow warns of damaged metadata (EXIF, TIFF tags, MPO and APNG indices) of images that decode well. A fault of a
# client's file belongs in the client's error, not in our log. `warnings.catch_warnings` is not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)
# libtiff prints errors to stderr unless its handlers are removed, for which Pillow has no function. A statically linked
# libtiff cannot be reached and goes on printing.
with suppress(OSError, AttributeError):
    for _name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
        _set_handler = getattr(ctypes.CDLL(_imaging.__file__), _name)
        _set_handler.argtypes, _set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
        _set_handler(None)

# Exif 2.32, tag 0x0112: the transposition that turns the stored image upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_AXES = (5, 6, 7, 8)

# TIFF 6.0, sections 4 and 21
_PHOTOMETRIC_WHITE_IS_ZERO = 0
_PHOTOMETRIC_YCBCR = 6


class File(NamedTuple):
    """An encoded image, with the options for decoding it."""

    data: bytes | memoryview
    max_pixels: int  # height * width
    apply_exif_orientation: bool = False
    background: Color | None = None
    allow_truncated: bool = False

    def decode(self) -> Image.Image:
        """Decode the first (or only) image of the file, in mode RGB.

        Raises InvalidInput for any fault of the file: empty, truncated, corrupt, of another format, more than
        `max_pixels`, or samples without a documented meaning.
        """
        with self._errors():
            image = _open(bytes(self.data), self.max_pixels)
            image.load()
            orientation = _orientation(image) if self.apply_exif_orientation else None
            rgb = _to_rgb(image, self.background)
            return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb

    def read_size(self) -> tuple[int, int]:
        """Return (height, width) of the image that `decode` would return, from the header alone.

        Raises InvalidInput like `decode`, except for errors in the body. With `apply_exif_orientation` a PNG is
        decoded, as its EXIF chunk may follow the pixels.
        """
        with self._errors():
            image = _open(bytes(self.data), self.max_pixels)
            width, height = image.size
            orientation = _orientation(image) if self.apply_exif_orientation else None
            return (width, height) if orientation in _SWAPS_AXES else (height, width)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn any exception of Pillow into InvalidInput.

        Its plugins raise struct.error, ValueError, EOFError, SyntaxError, ZeroDivisionError, MemoryError and more for
        bad files.
        """
        try:
            with truncated_files(self.allow_truncated):
                yield
        except InvalidInput:
            raise
        except UnidentifiedImageError as error:
            raise InvalidInput(unidentified(self.data)) from error
        except Exception as error:
            reason = str(error) if isinstance(error, OSError | ValueError | SyntaxError) else repr(error)
            raise InvalidInput(f"{describe(self.data)} cannot be decoded: {reason}") from error


def _open(data: bytes, max_pixels: int) -> ImageFile.ImageFile:
    """Open a file: read the header and check the size, without decoding pixels."""
    image = Image.open(io.BytesIO(data), formats=PILLOW_NAMES)
    check_pixels(data, "the image", *image.size, max_pixels)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        photometric = image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION)
        if not READS_ALL_TIFF and photometric == _PHOTOMETRIC_YCBCR and image.info.get("compression") == "raw":
            raise InvalidInput(
                f"{describe(data)} stores YCbCr uncompressed, which Pillow before 13 decodes to wrong colors "
                f"({HAS_PILLOW}); send RGB, or YCbCr with compression, or install Pillow >= 13 on the server"
            )
        # libtiff decodes whole tiles, even if larger than the image: a 1 MB file of 16x16 pixels with a tile of
        # 20000x20000 takes 1.2 GB. (Strips end where the image ends.)
        tile = image.tag_v2.get(TiffImagePlugin.TILEWIDTH, 1), image.tag_v2.get(TiffImagePlugin.TILELENGTH, 1)
        check_pixels(data, "a tile", *tile, max_pixels)
    return image


def check_pixels(data: bytes | memoryview, what: str, width: int, height: int, max_pixels: int) -> None:
    """Raise InvalidInput if height * width is over `max_pixels`; `what` names the part of the file."""
    if height * width > max_pixels:
        raise InvalidInput(
            f"{describe(data)} is too large: {what} has {height}x{width} (height x width) = {height * width} pixels, "
            f"allowed are {max_pixels}"
        )


def _orientation(image: ImageFile.ImageFile) -> object:
    """Return the orientation by EXIF (or XMP): 1 to 8, None without one, anything else in a broken file."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        # In TIFF it is a tag of the format: Pillow always applies it when it loads, and reports the size after it.
        return None
    return image.getexif().get(ExifTags.Base.Orientation)


def _to_rgb(image: ImageFile.ImageFile, background: Color | None) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        rgb = _gray_to_rgb(_integers_to_uint8(image), image)
        transparent = image.info.get("transparency")
        if background and isinstance(transparent, int):  # a gray level of a PNG
            rgb.paste(background, mask=Image.fromarray(np.asarray(image) == transparent))
        return rgb
    if background and image.has_transparency_data:
        return over(image, background).convert("RGB")
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        return _gray_to_rgb(_floats_to_uint8(image), image)
    # The transparent color of a palette or a tRNS chunk: alpha is dropped, and converting it can fail.
    image.info.pop("transparency", None)
    if image.mode == "La":  # grayscale premultiplied by alpha: Pillow converts it only to LA
        return image.convert("LA").convert("RGB")
    return image.convert("RGB")


def _integers_to_uint8(image: ImageFile.ImageFile) -> npt.NDArray[np.uint8]:
    """Return the eight highest bits of 16- or 12-bit samples, as Pillow does for 16-bit RGB.

    `convert("RGB")` would clip at 255, to nearly all white. Raises InvalidInput for other samples.
    """
    samples: npt.NDArray[np.integer] = np.asarray(image)
    bits = 16
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE) == (12,):
        bits = 12
    low, high = int(samples.min()), int(samples.max())
    if low < 0 or high >= 1 << bits:
        raise InvalidInput(
            f"grayscale of integers from {low} to {high}: allowed are 0 to {(1 << bits) - 1}; send 8- or 16-bit samples"
        )
    return (samples >> (bits - 8)).astype(np.uint8)


def _floats_to_uint8(image: ImageFile.ImageFile) -> npt.NDArray[np.uint8]:
    """Map 0.0 to black and 1.0 to white (Adobe's TIFF Technical Note 3); `convert("RGB")` would make both black."""
    samples: npt.NDArray[np.float32] = np.asarray(image)
    low, high = float(samples.min()), float(samples.max())
    if not (low >= 0 and high <= 1):  # NaN too
        raise InvalidInput(f"grayscale of floats from {low:g} to {high:g}: allowed are 0.0 (black) to 1.0 (white)")
    return np.rint(samples * 255).astype(np.uint8)


def _gray_to_rgb(gray: npt.NDArray[np.uint8], source: ImageFile.ImageFile) -> Image.Image:
    if isinstance(source, TiffImagePlugin.TiffImageFile):
        photometric = source.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION)
        if photometric == _PHOTOMETRIC_WHITE_IS_ZERO:  # Pillow inverts only samples of up to 8 bits
            gray = 255 - gray
    return Image.fromarray(gray).convert("RGB")
