"""What may be given as an image, and how it travels."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from dinov3_client._dtypes import Array, wire_of
from dinov3_serving.v1 import feature_service_pb2 as pb

ImageLike = bytes | bytearray | memoryview | str | os.PathLike[str] | Image.Image | Array

_ALLOWED = (
    "allowed are encoded bytes, a path, a PIL image, a uint8 array [H, W, 3] (RGB) and a float32 array [3, H, W] "
    "(normalised by the model's mean and std)"
)


class Source(NamedTuple):
    """One image as it will be sent: the bytes of a file, or pixels in one of the two layouts."""

    data: bytes | Array
    label: str | None
    """The path that it was read from."""


def load(images: ImageLike | Iterable[ImageLike], exif: bool) -> list[Source]:
    """The images of one call, with the files among them read.

    `exif` turns PIL images by their EXIF orientation, which their pixels alone no longer tell the server.
    """
    several: Iterable[ImageLike]
    if isinstance(images, np.ndarray):
        several = [images] if images.ndim == 3 else _unpack(images)
    elif isinstance(images, bytes | bytearray | memoryview | str | os.PathLike | Image.Image):
        several = [images]
    elif isinstance(images, Iterable):
        several = images
    else:
        raise TypeError(f"images is a {type(images).__name__}; {_ALLOWED}, or a sequence of these")
    sources = [_load_one(image, index, exif) for index, image in enumerate(several)]
    if not sources:
        raise ValueError("images is empty; give at least one")
    return sources


def message(sources: Sequence[Source]) -> pb.ExtractRequest:
    """A request with these images: packed into one tensor where all are pixels of one dtype and shape."""
    layouts = {(s.data.dtype, s.data.shape) if isinstance(s.data, np.ndarray) else None for s in sources}
    if len(layouts) == 1 and None not in layouts:
        return pb.ExtractRequest(pixels=_tensor([s.data for s in sources if isinstance(s.data, np.ndarray)], True))
    return pb.ExtractRequest(
        images=[
            pb.Image(pixels=_tensor([s.data], False)) if isinstance(s.data, np.ndarray) else pb.Image(encoded=s.data)
            for s in sources
        ]
    )


def _tensor(arrays: Sequence[Array], packed: bool) -> pb.Tensor:
    shape = (len(arrays), *arrays[0].shape) if packed else arrays[0].shape
    data = b"".join(np.ascontiguousarray(array).data for array in arrays)
    return pb.Tensor(dtype=wire_of(arrays[0].dtype.name), shape=shape, data=data)


def _unpack(images: Array) -> Iterable[Array]:
    if images.ndim != 4:
        raise ValueError(
            f"images is an array of {_described(images)}; allowed are uint8 [H, W, 3] or [N, H, W, 3] and "
            "float32 [3, H, W] or [N, 3, H, W]"
        )
    return images


def _load_one(image: ImageLike, index: int, exif: bool) -> Source:
    if isinstance(image, bytes | bytearray | memoryview):
        return Source(bytes(image), None)
    if isinstance(image, str | os.PathLike):
        return Source(Path(image).read_bytes(), os.fspath(image))
    if isinstance(image, Image.Image):
        return Source(np.asarray(_rgb(image, index, exif)), None)
    if isinstance(image, np.ndarray):
        _check(image, index)
        return Source(image, None)
    raise TypeError(f"images[{index}] is a {type(image).__name__}; {_ALLOWED}")


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
