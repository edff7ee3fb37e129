"""Preprocesses RGB images to model input: presets, size rules, and crop, resampling and flip by Pillow.

The result is uint8; mean and std are applied on the device. `docs/preprocessing.md` states how close it is to Meta's
transform.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple, cast, get_args

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image, features

from dinov3_server.errors import InvalidInput
from dinov3_serving import presets
from dinov3_serving.presets import Interpolation

_RESAMPLING: Mapping[str, Image.Resampling] = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

# Part of the model's fingerprint, as it determines the pixels: Pillow resamples and converts, its libjpeg decodes (the
# JPEG standard leaves the last bit of the inverse DCT open). Increment the last number, our own, with every change to
# images/ that changes a pixel.
PREPROCESSING_ID = f"pillow-{PIL.__version__}/libjpeg-turbo-{features.version_feature('libjpeg_turbo')}/1"

_DINOV2_PATCH = 14


class Box(NamedTuple):
    """A rectangle of an image, in pixels: the result of torchvision's RandomResizedCrop.get_params, in its order."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class Transform:
    """A transform of an image: crop, then resize, then flip.

    In Pillow: `image.crop(...).resize(size, interpolation).transpose(FLIP_LEFT_RIGHT)`. `size` is (height, width) of
    the model's input in pixels; None does not resize. The aspect ratio is not kept, and nothing is cropped unless a
    view asks for it, as in Meta's transform. All filters but "nearest" widen with the scale when they shrink an image
    (antialias).
    """

    size: tuple[int, int] | None
    interpolation: Interpolation
    crop: Box | None = None
    flip: bool = False

    def resizes(self, height: int, width: int) -> bool:
        """Return whether an image of that size must be resampled."""
        return self.size not in (None, self.crop[2:] if self.crop else (height, width))


PRESETS: Mapping[str, Transform] = MappingProxyType(
    {preset.name: Transform(preset.size, preset.interpolation) for preset in presets.PRESETS}
)


def transform(preset: str, size: tuple[int, int] | None, interpolation: str | None) -> Transform:
    """Return the preset's transform, with its size (height, width) and interpolation replaced if given.

    Raises InvalidInput for an unknown preset or interpolation. `check_size` checks whether the model accepts the size.
    """
    if preset not in PRESETS:
        allowed = ", ".join(
            f"{name} ({f'{known.size[0]}x{known.size[1]}' if known.size else 'size as given'})"
            for name, known in PRESETS.items()
        )
        raise InvalidInput(f"there is no preset {preset!r}; allowed are {allowed}", field="preprocessing.preset")
    base = PRESETS[preset]
    if interpolation is not None and interpolation not in get_args(Interpolation):
        raise InvalidInput(
            f"there is no interpolation {interpolation!r}; allowed are {', '.join(get_args(Interpolation))}",
            field="preprocessing.interpolation",
        )
    return replace(
        base,
        size=size or base.size,
        interpolation=cast("Interpolation", interpolation or base.interpolation),
    )


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


def transform_into(image: Image.Image, transform: Transform, out: memoryview) -> None:
    """Transform `image` (mode RGB), and write the result into `out` as [H, W, 3] uint8.

    `out` is exactly H * W * 3 contiguous bytes. The crop box must lie within the image (`check_box`).
    """
    if transform.crop is not None:
        top, left, height, width = transform.crop
        image = image.crop((left, top, left + width, top + height))
    if transform.resizes(image.height, image.width):
        assert transform.size is not None
        height, width = transform.size
        # Resize the cropped image: `resize(box=...)` would mix pixels outside the box into its borders.
        image = image.resize((width, height), _RESAMPLING[transform.interpolation])
    if transform.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    out[:] = image.tobytes()


def transform_pixels_into(pixels: npt.NDArray[np.uint8], transform: Transform, out: memoryview) -> None:
    """Transform raw pixels, [H, W, 3] RGB, like `transform_into`. Without resizing, they are only copied."""
    if transform.crop is not None:
        top, left, height, width = transform.crop
        pixels = pixels[top : top + height, left : left + width]
    if transform.resizes(*pixels.shape[:2]):
        # This copy cannot be avoided: Pillow resamples four bytes a pixel.
        image = Image.fromarray(pixels)
        transform_into(image, replace(transform, crop=None), out)
        return
    if len(out) != pixels.size:
        raise ValueError(f"{pixels.size} bytes of pixels do not go into {len(out)}")
    to = np.frombuffer(out, np.uint8).reshape(pixels.shape)
    if transform.flip:
        for channel in range(3):  # four times as fast as one copy, whose inner loop would be three bytes long
            to[..., channel] = pixels[:, ::-1, channel]
    else:
        to[...] = pixels
