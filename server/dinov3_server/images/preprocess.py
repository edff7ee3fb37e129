"""RGB pictures of any size to the model's input pixels: presets, size rules and resampling by Pillow.

The result is uint8; mean and std are applied on the device. `docs/preprocessing.md` states how near it comes to
upstream's transform.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, cast, get_args

import PIL
from PIL import Image, features

from dinov3_server.errors import InvalidInput

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]

_RESAMPLING: Mapping[str, Image.Resampling] = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

# Identifies the numbers, and so is part of the model's fingerprint: Pillow resamples and converts, its libjpeg decodes
# (the JPEG standard leaves the last bit of the inverse DCT open). The last figure is this package's own: it rises with
# every change to images/ that changes a pixel.
PREPROCESSING_ID = f"pillow-{PIL.__version__}/libjpeg-turbo-{features.version_feature('libjpeg_turbo')}/1"

_DINOV2_PATCH = 14


@dataclass(frozen=True, slots=True)
class Transform:
    """What is to be done with every image of a request.

    `size` is (height, width) of the model's input in pixels; None leaves images as they are. The aspect ratio is not
    kept and nothing is cropped, as in upstream's transform. All filters but "nearest" widen with the scale when they
    shrink an image (antialias).
    """

    size: tuple[int, int] | None
    interpolation: Interpolation
    apply_exif_orientation: bool


PRESETS: Mapping[str, Transform] = MappingProxyType(
    {
        "dinov3": Transform((256, 256), "bilinear", apply_exif_orientation=False),
        "hf": Transform((224, 224), "bilinear", apply_exif_orientation=False),
        "none": Transform(None, "bilinear", apply_exif_orientation=False),
    }
)


def transform(preset: str, size: tuple[int, int] | None, interpolation: str | None, exif: bool) -> Transform:
    """`preset` with its size (height, width) and interpolation replaced where they are given.

    Raises InvalidInput for a preset or interpolation that does not exist. Whether the model can take the size is
    `check_size`'s to say.
    """
    if preset not in PRESETS:
        presets = ", ".join(
            f"{name} ({f'{known.size[0]}x{known.size[1]}' if known.size else 'size as given'})"
            for name, known in PRESETS.items()
        )
        raise InvalidInput(f"there is no preset {preset!r}; allowed are {presets}", field="preprocessing.preset")
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
        apply_exif_orientation=exif,
    )


def check_size(height: int, width: int, patch: int, field: str) -> None:
    """Raises InvalidInput, naming `field`, unless both are positive multiples of the model's patch size (pixels)."""
    faults = [(name, value) for name, value in (("height", height), ("width", width)) if value <= 0 or value % patch]
    if not faults:
        return
    told = " and ".join(f"{name} {value} is not (nearest: {_nearest(value, patch)})" for name, value in faults)
    message = (
        f"the model takes heights and widths that are positive multiples of its patch size, {patch} pixels; "
        f"of {height}x{width} (height x width), {told}"
    )
    if any(value > 0 and value % _DINOV2_PATCH == 0 for _, value in faults):
        message += f". Patches of {_DINOV2_PATCH} pixels, and with them sizes such as 518, are DINOv2's"
    raise InvalidInput(message, field=field)


def _nearest(value: int, patch: int) -> str:
    below = value // patch * patch
    return f"{below} or {below + patch}" if below > 0 else str(patch)


def resize_into(image: Image.Image, transform: Transform, out: memoryview) -> None:
    """Write `image` (mode RGB) into `out` as [H, W, 3] uint8, resized to `transform.size` where that is set.

    `out` is contiguous bytes, exactly H * W * 3 of them.
    """
    if transform.size is not None:
        height, width = transform.size
        if image.size != (width, height):
            image = image.resize((width, height), _RESAMPLING[transform.interpolation])
    out[:] = image.tobytes()


def resize_pixels_into(
    pixels: memoryview | bytes, height: int, width: int, transform: Transform, out: memoryview
) -> None:
    """The same for raw pixels, [height, width, 3] uint8 RGB of exactly that many bytes."""
    if transform.size in (None, (height, width)):
        out[:] = pixels
    else:
        # One pass over the pixels that cannot be saved: Pillow resamples four bytes a pixel.
        resize_into(Image.frombytes("RGB", (width, height), pixels), transform, out)
