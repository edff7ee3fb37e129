"""Check the tensors of pixels in a request."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dinov3_server.errors import InvalidInput
from dinov3_server.models.interface import PixelFormat, PixelShape
from dinov3_serving.v1 import feature_service_pb2 as pb
from dinov3_serving.v1.enums import PIXEL_DTYPES

_PIXEL_FORMATS = {number: name for name, number in PIXEL_DTYPES.items()}
LARGEST_FLOAT = 1000.0
"""Limit of normalised pixels, which lie within about -3 to 3. The squares of larger ones may be infinite."""
_MOST_AXES = 8  # in an error message


class Pixels(NamedTuple):
    """The pixels of `images` images of one size: [H, W, 3] uint8 each, or [3, H, W] float32."""

    format: PixelFormat
    images: int
    height: int
    width: int
    data: bytes | memoryview


def read_pixels(tensor: pb.Tensor, data: bytes | memoryview, field: str, packed: bool = False) -> Pixels:
    """Return the pixels of `tensor`, whose content is `data`: of one image, or of N `packed` ones.

    Raises InvalidInput if dtype, shape and length do not match.
    """
    layouts = ("[N, H, W, 3]", "[N, 3, H, W]") if packed else ("[H, W, 3]", "[3, H, W]")
    allowed = f"allowed are DATA_TYPE_UINT8 as {layouts[0]} and DATA_TYPE_FLOAT32 as {layouts[1]}"
    if tensor.dtype not in _PIXEL_FORMATS:
        known = tensor.dtype in pb.DataType.values()
        given = pb.DataType.Name(tensor.dtype) if known else str(tensor.dtype)
        raise InvalidInput(f"pixels cannot be {given}; {allowed}", field=f"{field}.dtype")
    format = _PIXEL_FORMATS[tensor.dtype]
    channels_last = format == "uint8"
    axes = list(tensor.shape[:_MOST_AXES])
    if len(tensor.shape) != 3 + packed or axes[packed + 2 * channels_last] != 3 or min(axes) < 1:
        raise InvalidInput(
            f"{pb.DataType.Name(tensor.dtype)} pixels of shape {axes}; {allowed}", field=f"{field}.shape"
        )
    images, *image = axes if packed else (1, *axes)
    height, width = image[:2] if channels_last else image[1:]
    expected = images * PixelShape(height, width, format).nbytes
    if len(data) != expected:
        raise InvalidInput(
            f"{format} pixels of shape {axes} are {expected} bytes; {len(data)} were sent", field=f"{field}.data"
        )
    return Pixels(format, images, height, width, data)


def copy_floats(data: bytes | memoryview, field: str, out: memoryview) -> None:
    """Copy float32 pixels. Raises InvalidInput, naming `field`, for NaN and values beyond LARGEST_FLOAT."""
    values = np.frombuffer(data, "<f4")
    if not (values.min() >= -LARGEST_FLOAT and values.max() <= LARGEST_FLOAT):  # false for NaN too
        wrong = values.size - np.count_nonzero(np.abs(values) <= LARGEST_FLOAT)
        raise InvalidInput(
            f"{wrong} of {values.size} pixel values are NaN or beyond {LARGEST_FLOAT:g}; float pixels are normalised "
            "by the model's mean and std, which leaves them within about -3 to 3",
            field=field,
        )
    out[:] = data
