"""Parts of a picture as the model is to see them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dinov3_client._checks import UINT32_MAX, check_bool, choice, pixel_size
from dinov3_serving.presets import Interpolation
from dinov3_serving.v1 import feature_service_pb2 as pb
from dinov3_serving.v1.enums import INTERPOLATIONS

if TYPE_CHECKING:
    from dinov3_client._images import PictureLike


@dataclass(frozen=True)
class View:
    """A part of a picture, cropped, then resized, then flipped, as Pillow does each on the decoded picture.

    Pixel for pixel it is `image.crop((left, top, left + width, top + height))`, `.resize(size, interpolation)` and,
    with `flip`, `.transpose(Image.Transpose.FLIP_LEFT_RIGHT)`; so torchvision's RandomResizedCrop and
    RandomHorizontalFlip do it to PIL images.

    Raises ValueError or TypeError for what no picture has. Whether a crop lies within its picture, the server sees.
    """

    crop: tuple[int, int, int, int] | None = None
    """(top, left, height, width) in pixels of the picture (with `exif`, of the upright one): the four numbers of
    torchvision's RandomResizedCrop.get_params, in its order. None: the whole picture."""
    flip: bool = False
    """Left and right change places."""
    size: int | tuple[int, int] | None = None
    """Pixels of the model's input, one number or (height, width). None: that of the call."""
    interpolation: Interpolation | None = None
    """None: that of the call."""

    def __post_init__(self) -> None:
        message(self)


@dataclass(frozen=True)
class ImageViews:
    """A picture that is sent (and decoded) once, and its views: a row of features for each of them."""

    image: PictureLike
    """Encoded bytes, a path, a PIL image or a uint8 array [H, W, 3] (RGB)."""
    views: Sequence[View]
    """At least one."""

    def __post_init__(self) -> None:
        if not isinstance(self.views, Sequence) or not all(isinstance(view, View) for view in self.views):
            raise TypeError(f"views is {self.views!r}; it must be a sequence of View")
        if not self.views:
            raise ValueError("views is empty; give at least one, or the image itself for one row of the whole")


def message(view: View) -> pb.View:
    """A view as it travels; raises ValueError or TypeError for one that no picture has."""
    sent = pb.View(horizontal_flip=check_bool("flip", view.flip))
    if view.crop is not None:
        top, left, height, width = _box(view.crop)
        sent.crop.CopyFrom(pb.Box(top=top, left=left, height=height, width=width))
    if view.size is not None:
        height, width = pixel_size("size", view.size)
        sent.size.CopyFrom(pb.Size(height=height, width=width))
    if view.interpolation is not None:
        sent.interpolation = choice("interpolation", view.interpolation, INTERPOLATIONS)
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
