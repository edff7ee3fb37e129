"""Requests that several benchmarks send, as bytes."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinov3_serving.v1 import feature_service_pb2 as pb


def pixels_request(pixels: NDArray[np.uint8], outputs: pb.Outputs) -> bytes:
    """Return an ExtractRequest of images of the model's input size, [N, H, W, 3]."""
    return pb.ExtractRequest(
        pixels=pb.Tensor(dtype=pb.DATA_TYPE_UINT8, shape=pixels.shape, data=pixels.tobytes()),
        preprocessing=pb.Preprocessing(preset=pb.PRESET_NONE),
        outputs=outputs,
    ).SerializeToString()


def random_pixels(images: int, size: int) -> NDArray[np.uint8]:
    """Return noise [N, size, size, 3]."""
    return np.random.default_rng(0).integers(0, 256, (images, size, size, 3), np.uint8)


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    """Return an image file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()
