"""The claim of docs/preprocessing.md: preset `dinov3` is within one level of Meta's transform, on real photos."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from dinov3_server.images.decode import File
from dinov3_server.images.preprocess import PRESETS, transform_into

SIZE = (256, 256)


def photo(name: str) -> bytes:
    skimage = importlib.util.find_spec("skimage")
    assert skimage is not None
    assert skimage.origin is not None
    return (Path(skimage.origin).parent / "data" / name).read_bytes()


@pytest.mark.parametrize("name", ["astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg"])
def test_the_dinov3_preset_is_near_metas_transform(name: str) -> None:
    image = File(photo(name), 10_000_000).decode()
    out = bytearray(SIZE[0] * SIZE[1] * 3)
    transform_into(image, PRESETS["dinov3"], memoryview(out))
    ours = np.frombuffer(out, np.uint8).reshape(*SIZE, 3).astype(int)

    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(pixels, SIZE, mode="bilinear", antialias=True)
    in_float = torch.nn.functional.interpolate(pixels.float(), SIZE, mode="bilinear", antialias=True).round()
    by_uint8 = np.abs(ours - resized[0].permute(1, 2, 0).numpy().astype(int))
    by_float = np.abs(ours - in_float[0].permute(1, 2, 0).numpy().astype(int))

    assert by_float.max() <= 1
    assert (by_float > 0).mean() < 0.25
    assert by_uint8.max() <= 1
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):  # with which torchvision resizes in uint8
        assert (by_uint8 > 0).mean() < 0.005
