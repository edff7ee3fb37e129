"""Views: crops of a picture, resized and flipped."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

from dinov3_client import _fit
from dinov3_client._checks import UINT32_MAX, check_bool, lookup, pixel_size
from dinov3_client._fit import Fit
from dinov3_serving.presets import FitMethod, Interpolation
from dinov3_serving.v1 import feature_service_pb2 as pb
from dinov3_serving.v1.enums import INTERPOLATIONS


@dataclass(unsafe_hash=True)  # not frozen: Lightning copies the data classes in a batch field by field
class View:
    """A part of a picture: cropped, then resized, then flipped, as Pillow does it to the decoded picture.

    Pixel for pixel it equals `image.crop((left, top, left + width, top + height))`, `.resize(size, interpolation)` (or
    what its `fit` says) and, with `flip`, `.transpose(Image.Transpose.FLIP_LEFT_RIGHT)`; this is what torchvision's
    RandomResizedCrop and RandomHorizontalFlip do to PIL images.

    Raises ValueError or TypeError for impossible values. The server checks whether a crop lies within its picture.
    """

    crop: tuple[int, int, int, int] | None = None
    """(top, left, height, width) in pixels of the picture (with `exif`, of the upright picture), in the order of
    torchvision's RandomResizedCrop.get_params. None: the whole picture."""
    flip: bool = False
    """Flip horizontally."""
    size: int | tuple[int, int] | None = None
    """Size of the model's input in pixels, one number or (height, width). None: that of the call."""
    interpolation: Interpolation | None = None
    """None: that of the call."""
    fit: Fit | FitMethod | None = None
    """How the crop is brought to the size if its aspect ratio differs. None: that of the call."""

    def __post_init__(self) -> None:
        message(self)


def message(view: View) -> pb.View:
    """Return a view as it is sent. Raises ValueError or TypeError for impossible values."""
    sent = pb.View(horizontal_flip=check_bool("flip", view.flip))
    if view.crop is not None:
        top, left, height, width = _box(view.crop)
        sent.crop.CopyFrom(pb.Box(top=top, left=left, height=height, width=width))
    if view.size is not None:
        height, width = pixel_size("size", view.size)
        sent.size.CopyFrom(pb.Size(height=height, width=width))
    if view.interpolation is not None:
        sent.interpolation = lookup("interpolation", view.interpolation, INTERPOLATIONS)
    if view.fit is not None:
        sent.fit.CopyFrom(_fit.message(view.fit))
    return sent


def _box(crop: Sequence[int]) -> tuple[int, int, int, int]:
    try:
        top, left, height, width = map(operator.index, crop)
    except (TypeError, ValueError):
        top = left = height = width = -1
    if not (
        0 <= top <= UINT32_MAX and 0 <= left <= UINT32_MAX and 0 < height <= UINT32_MAX and 0 < width <= UINT32_MAX
    ):
        raise ValueError(
            f"crop is {crop!r}; it must be (top, left, height, width) in whole pixels, with a height and width of at "
            "least 1, as torchvision's RandomResizedCrop.get_params returns it"
        )
    return top, left, height, width
