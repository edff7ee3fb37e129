"""The images of a call: what `extract` accepts, and how it is loaded to be sent."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from dinov3_client import _views
from dinov3_client._dtypes import Array
from dinov3_client._views import View
from dinov3_serving.v1 import feature_service_pb2 as pb

PictureLike = bytes | bytearray | memoryview | str | os.PathLike[str] | Image.Image | Array


@dataclass(frozen=True)
class ImageViews:
    """A picture that is sent and decoded once, and views of it: one row of features for each view."""

    image: PictureLike
    """Encoded bytes, a path, a PIL image or a uint8 array [H, W, 3] (RGB)."""
    views: Sequence[View]
    """At least one."""

    def __post_init__(self) -> None:
        if not isinstance(self.views, Sequence) or not all(isinstance(view, View) for view in self.views):
            raise TypeError(f"views is {self.views!r}; it must be a sequence of View")
        if not self.views:
            raise ValueError("views is empty; give at least one, or the image itself for one row of all of it")


ImageLike = PictureLike | ImageViews

_ALLOWED = (
    "allowed are encoded bytes, a path, a PIL image, a uint8 array [H, W, 3] (RGB), a float32 array [3, H, W] "
    "(normalized by the model's mean and std) and ImageViews"
)


class LoadedImage(NamedTuple):
    """An image as it is sent: the bytes of a file, or pixels (uint8 [H, W, 3] or float32 [3, H, W])."""

    data: bytes | Array
    label: str | None = None
    """The path of its file, for messages."""
    views: tuple[pb.View, ...] = ()

    @property
    def nbytes(self) -> int:
        return len(self.data) if isinstance(self.data, bytes) else self.data.nbytes

    @property
    def rows(self) -> int:
        """Number of rows of features."""
        return max(1, len(self.views))

    def pixel_size(self) -> tuple[int, int] | None:
        """Return (height, width) from the file's header or the array; None if the header cannot be read."""
        if isinstance(self.data, bytes):
            try:
                with Image.open(io.BytesIO(self.data)) as image:
                    return image.height, image.width
            except Exception:  # Pillow raises many kinds; the server will report what is wrong
                return None
        height, width = self.data.shape[:2] if self.data.dtype == np.uint8 else self.data.shape[1:]
        return height, width


def as_list(batch: ImageLike | Iterable[ImageLike]) -> ImageLike | Iterable[ImageLike]:
    """Return `batch`, as a list if it is an iterator.

    Some iterators, such as itertools.groupby's groups, are empty once the next batch was read.
    """
    return list(batch) if isinstance(batch, Iterator) else batch


def load(images: ImageLike | Iterable[ImageLike], exif: bool) -> list[LoadedImage]:
    """Load the images of a call, reading files.

    exif: rotate PIL images by their EXIF orientation here, as their pixels no longer carry it.
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


def _load_one(image: ImageLike, index: int, exif: bool) -> LoadedImage:
    if isinstance(image, bytes | bytearray | memoryview):
        return LoadedImage(bytes(image))
    if isinstance(image, str | os.PathLike):
        return LoadedImage(Path(image).read_bytes(), os.fspath(image))
    if isinstance(image, Image.Image):
        image = np.asarray(_rgb(image, index, exif))
    if isinstance(image, np.ndarray):
        _check(image, index)
        return LoadedImage(image)
    if isinstance(image, ImageViews):
        return _load_views(image, index, exif)
    raise TypeError(f"images[{index}] is a {type(image).__name__}; {_ALLOWED}")


def _load_views(image: ImageViews, index: int, exif: bool) -> LoadedImage:
    if isinstance(image.image, ImageViews):
        raise TypeError(f"images[{index}] is ImageViews of ImageViews; give the picture, and all views of it together")
    source = _load_one(image.image, index, exif)
    if isinstance(source.data, np.ndarray) and source.data.dtype == np.float32:
        raise ValueError(
            f"images[{index}] has views of a float32 array: normalized pixels are never cropped, resized or "
            "flipped; give views of the picture (a file, a PIL image, a uint8 array), or the pixels of each "
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
    if "transparency" in turned.info:  # Pillow warns when such an image is converted to RGB directly
        turned = turned.convert("RGBA")
    return turned.convert("RGB")


def _check(image: Array, index: int) -> None:
    """Raise ValueError unless dtype and shape are one of the two layouts; a layout is never guessed."""
    channels = {np.dtype(np.uint8): 2, np.dtype(np.float32): 0}.get(image.dtype)
    if channels is None or image.ndim != 3 or image.shape[channels] != 3 or 0 in image.shape:
        raise ValueError(
            f"images[{index}] is an array of {_described(image)}; allowed are uint8 [H, W, 3] (RGB) and "
            "float32 [3, H, W] (normalized by the model's mean and std)"
        )


def _described(image: Array) -> str:
    order = "" if image.dtype.isnative else " of foreign byte order"
    return f"{image.dtype.name}{order} [{', '.join(map(str, image.shape))}]"
