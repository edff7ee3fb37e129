"""Turns the images of a request into model inputs, with Pillow."""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from dinov3_client.testing._model import HAS_AVIF
from dinov3_serving.errors import InvalidInput
from dinov3_serving.images import Decoding, Fit, Transform, check_crops
from dinov3_serving.pillow import over, truncated_files
from dinov3_serving.v1.images import ImageReader, Pixels, RequestedImage, check_floats

Array = NDArray[Any]

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", *(("AVIF",) if HAS_AVIF else ()))


class FeatureRow(NamedTuple):
    """One row of features: of a view of an image, or of the whole image (`view` 0)."""

    image: int
    view: int
    size: tuple[int, int]
    """(height, width) of the model's input."""
    pixels: Array | None
    """uint8 [H, W, 3] or float32 [3, H, W]; None of an image that failed."""


def feature_rows(reader: ImageReader, max_pixels: int) -> list[FeatureRow]:
    """Return the rows of all images that `reader` has read. Images that fail are added to its `failures`.

    max_pixels: the most pixels of a file's picture.
    """
    found = []
    for image in reader.images:
        rows, inputs = image.rows, dict[int, Array]()
        with reader.record_failure(image.index):
            if isinstance(image.content, Pixels) and image.content.format == "float32":
                check_floats(image.content.data, f"{image.field}.data")
                pixels = image.content
                inputs[0] = np.frombuffer(pixels.data, "<f4").reshape(3, pixels.height, pixels.width)
            elif image.content is not None:
                picture = _picture(image, max_pixels, reader.decoding)
                rows = reader.complete_rows(rows, picture.shape[:2])
                check_crops(rows, picture.shape[:2])
                inputs = {row.view: _transformed(picture, row.transform) for row in rows}
        found += [FeatureRow(image.index, row.view, row.shape[:2], inputs.get(row.view)) for row in rows if row.shape]
    return found


def _picture(image: RequestedImage, max_pixels: int, decoding: Decoding) -> Array:
    """Return the picture [H, W, 3] of uint8 pixels or of a file. Raises InvalidInput."""
    content, field = image.content, image.field
    if isinstance(content, Pixels):
        return np.frombuffer(content.data, np.uint8).reshape(content.height, content.width, 3)
    assert content is not None
    try:
        picture: Image.Image = Image.open(io.BytesIO(content), formats=_FORMATS)
        pixels = picture.height * picture.width
        if pixels > max_pixels:
            raise InvalidInput(f"the image has {pixels} pixels, allowed are {max_pixels}", field)
        with truncated_files(decoding.allow_truncated):
            picture.load()
        if decoding.apply_exif_orientation:
            picture = ImageOps.exif_transpose(picture)
        return np.asarray(over(picture, decoding.background).convert("RGB"))
    except InvalidInput:
        raise
    except UnidentifiedImageError:  # its message contains a memory address
        raise InvalidInput(f"the file of {len(content)} bytes is of no known format", field) from None
    except Exception as error:  # Pillow raises many kinds of errors for broken files
        raise InvalidInput(f"the file of {len(content)} bytes cannot be decoded: {error}", field) from None


def _transformed(picture: Array, transform: Transform) -> Array:
    image = Image.fromarray(picture)
    if transform.crop:
        top, left, height, width = transform.crop
        image = image.crop((left, top, left + width, top + height))
    if transform.size:
        size = transform.fit.resized((image.height, image.width), transform.size)
        image = image.resize(size[::-1], Image.Resampling[transform.interpolation.upper()])
        image = _fitted(image, transform.size, transform.fit)
    return np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if transform.flip else image)


def _fitted(image: Image.Image, size: tuple[int, int], fit: Fit) -> Image.Image:
    """Crop or pad a resized image to (height, width), around its center."""
    height, width = size
    if fit.method == "crop":
        top, left = round((image.height - height) / 2), round((image.width - width) / 2)
        return image.crop((left, top, left + width, top + height))
    if fit.method == "pad":
        canvas = Image.new("RGB", (width, height), fit.pad_color)
        canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
        return canvas
    return image
