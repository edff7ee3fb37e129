"""Views for the tests: their messages, and the pixels that they stand for, computed with Pillow."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from dinov3_server.models.interface import Output
from dinov3_serving.v1 import feature_service_pb2 as pb
from tests.server.api.rig import (
    features,
)

RESAMPLING = {
    pb.INTERPOLATION_NEAREST: Image.Resampling.NEAREST,
    pb.INTERPOLATION_BILINEAR: Image.Resampling.BILINEAR,
    pb.INTERPOLATION_BICUBIC: Image.Resampling.BICUBIC,
    pb.INTERPOLATION_LANCZOS: Image.Resampling.LANCZOS,
}
Size = tuple[int, int]
Crop = tuple[int, int, int, int]


class V(NamedTuple):
    """A view, as a client describes it. `crop` is (top, left, height, width), `size` is (height, width)."""

    crop: Crop | None = None
    flip: bool = False
    size: Size | None = None
    interpolation: pb.Interpolation = pb.INTERPOLATION_UNSPECIFIED

    @property
    def message(self) -> pb.View:
        view = pb.View(horizontal_flip=self.flip, interpolation=self.interpolation)
        if self.crop is not None:
            view.crop.CopyFrom(pb.Box(top=self.crop[0], left=self.crop[1], height=self.crop[2], width=self.crop[3]))
        if self.size is not None:
            view.size.CopyFrom(pb.Size(height=self.size[0], width=self.size[1]))
        return view


def at_the_client(image: Image.Image, view: V, size: Size | None = (256, 256)) -> np.ndarray:
    """Compute a view with Pillow. `size` and bilinear are the defaults of the request."""
    if view.crop is not None:
        top, left, height, width = view.crop
        image = image.crop((left, top, left + width, top + height))
    size = view.size or size
    if size is not None:
        image = image.resize(size[::-1], RESAMPLING[view.interpolation or pb.INTERPOLATION_BILINEAR])
    if view.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image)


def with_views(image: pb.Image, views: Sequence[V]) -> pb.Image:
    image.views.extend(view.message for view in views)
    return image


def jpeg(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=85)
    return file.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def cls_of(pixels: np.ndarray) -> bytes:
    return features(pixels.tobytes(), Output("cls"), 48)


def rows(answer: pb.ExtractResponse) -> dict[tuple[int, int], tuple[Size, bytes]]:
    """Return input size and CLS by image and view, after checking the order of rows and blocks."""
    found: dict[tuple[int, int], tuple[Size, bytes]] = {}
    for block in answer.blocks:
        keys = list(zip(block.image_indices, block.view_indices or [0] * len(block.image_indices), strict=True))
        assert keys == sorted(keys)
        size = (block.input_size.height, block.input_size.width)
        step = len(block.cls.data) // len(keys)
        assert list(block.cls.shape) == [len(keys), 24]
        for row, key in enumerate(keys):
            assert key not in found
            found[key] = size, block.cls.data[row * step : (row + 1) * step]
    firsts = [min(zip(b.image_indices, b.view_indices or b.image_indices, strict=True)) for b in answer.blocks]
    assert firsts == sorted(firsts)
    return found


SMALL = pb.Preprocessing(size=pb.Size(height=16, width=16))
