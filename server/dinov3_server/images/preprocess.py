"""Preprocesses RGB images to model input: presets, and crop, resampling and flip by Pillow.

The result is uint8; mean and std are applied on the device. `docs/preprocessing.md` states how close it is to Meta's
transform.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image, features

from dinov3_server.images.formats import HAS_AVIF, LIBHEIF
from dinov3_serving import presets
from dinov3_serving.images import Fit, Transform

# Part of the model's fingerprint, as it determines the pixels: Pillow resamples and converts, its libjpeg decodes (the
# JPEG standard leaves the last bit of the inverse DCT open), libavif and libheif convert colors. Increment the last
# number, our own, with every change to images/ that changes a pixel.
_LIBRARIES = {
    "pillow": PIL.__version__,
    "libjpeg-turbo": features.version_feature("libjpeg_turbo"),
    "libavif": features.version_module("avif") if HAS_AVIF else None,
    "libheif": LIBHEIF,
}
PREPROCESSING_ID = "/".join([*(f"{name}-{version}" for name, version in _LIBRARIES.items() if version), "1"])

PRESETS: Mapping[str, Transform] = MappingProxyType(
    {preset.name: Transform(preset.size, preset.interpolation) for preset in presets.PRESETS}
)


def transform_into(image: Image.Image, transform: Transform, out: memoryview) -> None:
    """Transform `image` (mode RGB), and write the result into `out` as [H, W, 3] uint8.

    `out` is exactly H * W * 3 contiguous bytes. The crop box must lie within the image (`check_crops`).
    """
    if transform.crop is not None:
        top, left, height, width = transform.crop
        image = image.crop((left, top, left + width, top + height))
    if transform.changes_size(image.height, image.width):
        assert transform.size is not None
        height, width = transform.fit.resized((image.height, image.width), transform.size)
        # Resize the cropped image: `resize(box=...)` would mix pixels outside the box into its borders.
        image = image.resize((width, height), Image.Resampling[transform.interpolation.upper()])
        image = _centered(image, *transform.size, transform.fit)
    if transform.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    out[:] = image.tobytes()


def _centered(image: Image.Image, height: int, width: int, fit: Fit) -> Image.Image:
    """Crop the center of an image, or put the image into the center of a larger one, as torchvision's center_crop."""
    if fit.method == "crop":
        top, left = round((image.height - height) / 2), round((image.width - width) / 2)  # halves to even
        return image.crop((left, top, left + width, top + height))
    if fit.method == "pad":
        canvas = Image.new("RGB", (width, height), fit.pad_color)
        canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
        return canvas
    return image


def transform_pixels_into(pixels: npt.NDArray[np.uint8], transform: Transform, out: memoryview) -> None:
    """Transform raw pixels, [H, W, 3] RGB, like `transform_into`. Without resizing, they are only copied."""
    if transform.crop is not None:
        top, left, height, width = transform.crop
        pixels = pixels[top : top + height, left : left + width]
    if transform.changes_size(*pixels.shape[:2]):
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
