"""What may be given as an image, and what is sent of it."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from dinov3_client import _views
from dinov3_client._dtypes import Array
from dinov3_client._views import ImageViews
from dinov3_serving.v1 import feature_service_pb2 as pb

PictureLike = bytes | bytearray | memoryview | str | os.PathLike[str] | Image.Image | Array
ImageLike = PictureLike | ImageViews

_ALLOWED = (
    "allowed are encoded bytes, a path, a PIL image, a uint8 array [H, W, 3] (RGB), a float32 array [3, H, W] "
    "(normalised by the model's mean and std) and ImageViews"
)


class Source(NamedTuple):
    """One image as it will be sent: the bytes of a file, or pixels in one of the two layouts."""

    data: bytes | Array
    label: str | None = None
    """The path that it was read from."""
    views: tuple[pb.View, ...] = ()

    @property
    def nbytes(self) -> int:
        return len(self.data) if isinstance(self.data, bytes) else self.data.nbytes

    @property
    def rows(self) -> int:
        """Of features."""
        return max(1, len(self.views))

    def pixel_size(self) -> tuple[int, int] | None:
        """(height, width) of the picture as the file's header or the array has it; None of a file without a header."""
        if isinstance(self.data, bytes):
            try:
                with Image.open(io.BytesIO(self.data)) as image:
                    return image.height, image.width
            except Exception:  # of Pillow's many: the server says what is wrong with it
                return None
        height, width = self.data.shape[:2] if self.data.dtype == np.uint8 else self.data.shape[1:]
        return height, width


def load(images: ImageLike | Iterable[ImageLike], exif: bool) -> list[Source]:
    """The images of one call, with the files among them read.

    `exif` turns PIL images by their EXIF orientation, which their pixels alone no longer tell the server.
    """
    several: Iterable[ImageLike]
    if isinstance(images, np.ndarray):
        several = [images] if images.ndim == 3 else _unpack(images)
    elif isinstance(images, bytes | bytearray | memoryview | str | os.PathLike | Image.Image | ImageViews):
        several = [images]
    elif isinstance(images, Iterable):
        several = images
    else:
        raise TypeError(f"images is a {type(images).__name__}; {_ALLOWED}, or a sequence of these")
    sources = [_load_one(image, index, exif) for index, image in enumerate(several)]
    if not sources:
        raise ValueError("images is empty; give at least one")
    return sources


def _unpack(images: Array) -> Iterable[Array]:
    if images.ndim != 4:
        raise ValueError(
            f"images is an array of {_described(images)}; allowed are uint8 [H, W, 3] or [N, H, W, 3] and "
            "float32 [3, H, W] or [N, 3, H, W]"
        )
    return images


def _load_one(image: ImageLike, index: int, exif: bool) -> Source:
    if isinstance(image, bytes | bytearray | memoryview):
        return Source(bytes(image))
    if isinstance(image, str | os.PathLike):
        return Source(Path(image).read_bytes(), os.fspath(image))
    if isinstance(image, Image.Image):
        image = np.asarray(_rgb(image, index, exif))
    if isinstance(image, np.ndarray):
        _check(image, index)
        return Source(image)
    if isinstance(image, ImageViews):
        return _load_views(image, index, exif)
    raise TypeError(f"images[{index}] is a {type(image).__name__}; {_ALLOWED}")


def _load_views(image: ImageViews, index: int, exif: bool) -> Source:
    if isinstance(image.image, ImageViews):
        raise TypeError(f"images[{index}] is ImageViews of ImageViews; give the picture, and all views of it together")
    source = _load_one(image.image, index, exif)
    if isinstance(source.data, np.ndarray) and source.data.dtype == np.float32:
        raise ValueError(
            f"images[{index}] has views of a float32 array: pixels that are normalised already are never cropped, "
            "resized or flipped; give views of the picture (a file, a PIL image, a uint8 array), or the pixels of each "
            "view as an image of its own"
        )
    return source._replace(views=tuple(map(_views.message, image.views)))


def _rgb(image: Image.Image, index: int, exif: bool) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        raise ValueError(
            f"images[{index}] is a PIL image of mode {image.mode}, which has no 8-bit values; "
            "scale it to 0..255 and convert it to RGB, or send the file itself"
        )
    turned = ImageOps.exif_transpose(image) if exif else image
    if "transparency" in turned.info:  # Pillow warns of a palette with transparency that goes straight to RGB
        turned = turned.convert("RGBA")
    return turned.convert("RGB")


def _check(image: Array, index: int) -> None:
    """By dtype and shape, strictly: a layout is never guessed."""
    channels = {np.dtype(np.uint8): 2, np.dtype(np.float32): 0}.get(image.dtype)
    if channels is None or image.ndim != 3 or image.shape[channels] != 3 or 0 in image.shape:
        raise ValueError(
            f"images[{index}] is an array of {_described(image)}; allowed are uint8 [H, W, 3] (RGB) and "
            "float32 [3, H, W] (normalised by the model's mean and std)"
        )


def _described(image: Array) -> str:
    order = "" if image.dtype.isnative else " of foreign byte order"
    return f"{image.dtype.name}{order} [{', '.join(map(str, image.shape))}]"
