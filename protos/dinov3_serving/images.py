"""The pixels that a request gives a model: sizes, crops and transforms, and their checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from dinov3_serving.errors import InvalidInput
from dinov3_serving.presets import FitMethod, Interpolation

PixelFormat = Literal["uint8", "float32"]

_DINOV2_PATCH = 14


class PixelShape(NamedTuple):
    """Size and format of one model input: `uint8` is [H, W, 3] RGB, `float32` is [3, H, W], normalized already."""

    height: int
    width: int
    format: PixelFormat

    @property
    def nbytes(self) -> int:
        return self.height * self.width * 3 * (1 if self.format == "uint8" else 4)


class Box(NamedTuple):
    """A rectangle of an image, in pixels: the result of torchvision's RandomResizedCrop.get_params, in its order."""

    top: int
    left: int
    height: int
    width: int


class Color(NamedTuple):
    """An RGB color, 0 to 255 each."""

    red: int
    green: int
    blue: int


class Decoding(NamedTuple):
    """The options for decoding files: the fields of Preprocessing with these names."""

    apply_exif_orientation: bool = False
    background: Color | None = None
    allow_truncated: bool = False


class Fit(NamedTuple):
    """How a picture is brought to the size of the model's input: see `Fit` in feature_service.proto."""

    method: FitMethod = "stretch"
    pad_color: Color = Color(0, 0, 0)
    resize_shorter: int = 0
    """0: as little as covers the input."""

    def resized(self, picture: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
        """Return the size to which a picture is resized, before it is cropped or padded to `size`.

        All are (height, width). Rounds as torchvision's resize does.
        """
        (height, width), (out_height, out_width) = picture, size
        if self.method == "stretch":
            return size
        if self.resize_shorter:
            out_height = out_width = self.resize_shorter
        if (out_height * width >= out_width * height) == (self.method == "crop"):
            return out_height, max(1, int(out_height * width / height))
        return max(1, int(out_width * height / width)), out_width


STRETCH = Fit()


@dataclass(frozen=True, slots=True)
class Transform:
    """A transform of an image: crop, then resize and fit, then flip.

    In Pillow: `image.crop(...).resize(size, interpolation).transpose(FLIP_LEFT_RIGHT)`. `size` is (height, width) of
    the model's input in pixels; None does not resize. Unless `fit` says otherwise the aspect ratio is not kept, and
    nothing is cropped unless a view asks for it, as in Meta's transform. All filters but "nearest" widen with the scale
    when they shrink an image (antialias).
    """

    size: tuple[int, int] | None
    interpolation: Interpolation
    crop: Box | None = None
    flip: bool = False
    fit: Fit = STRETCH

    def changes_size(self, height: int, width: int) -> bool:
        """Return whether an image of that size must be resampled or padded."""
        picture = self.crop[2:] if self.crop else (height, width)
        return self.size is not None and not self.size == picture == self.fit.resized(picture, self.size)


class RowSpec(NamedTuple):
    """The input of one row of features: a whole image, or one of its views.

    `field` is its protobuf path, for errors. `shape` is None if it depends on the header of a file; if the image fails
    before the header is read, the answer has no such row.
    """

    view: int
    field: str
    transform: Transform
    shape: PixelShape | None


def check_size(height: int, width: int, patch: int, field: str) -> None:
    """Raise InvalidInput, naming `field`, unless both are positive multiples of the model's patch size (pixels)."""
    faults = [(name, value) for name, value in (("height", height), ("width", width)) if value <= 0 or value % patch]
    if not faults:
        return
    values = " and ".join(f"{name} {value} is not (nearest: {_nearest(value, patch)})" for name, value in faults)
    message = (
        f"the model takes heights and widths that are positive multiples of its patch size, {patch} pixels; "
        f"of {height}x{width} (height x width), {values}"
    )
    if any(value > 0 and value % _DINOV2_PATCH == 0 for _, value in faults):
        message += f". Patches of {_DINOV2_PATCH} pixels, and with them sizes such as 518, are DINOv2's"
    raise InvalidInput(message, field=field)


def _nearest(value: int, patch: int) -> str:
    below = value // patch * patch
    return f"{below} or {below + patch}" if below > 0 else str(patch)


def check_crops(rows: Sequence[RowSpec], picture: tuple[int, int]) -> None:
    """Raise InvalidInput unless the crops of all rows lie within their picture, given as (height, width)."""
    for row in rows:
        if row.transform.crop:
            check_box(row.transform.crop, picture, f"{row.field}.crop")


def check_box(box: Box, picture: tuple[int, int] | None, field: str) -> None:
    """Raise InvalidInput, naming `field`, unless `box` has pixels and lies within an image of size `picture`.

    `picture` is (height, width), or None if it is not known yet; then only the box itself is checked.
    """
    top, left, box_height, box_width = box
    given = f"the crop box with top {top}, left {left}, height {box_height}, width {box_width}"
    if not (box_height > 0 and box_width > 0):
        raise InvalidInput(f"{given} has no pixels: its height and width must be at least 1", field=field)
    if picture is None:
        return
    height, width = picture
    ends = (("top + height", top + box_height, height), ("left + width", left + box_width, width))
    beyond = [f"{name} is {end}, allowed are up to {most}" for name, end, most in ends if end > most]
    if beyond:
        raise InvalidInput(
            f"{given} reaches beyond the picture, which is {height}x{width} (height x width): {' and '.join(beyond)}",
            field=field,
        )
