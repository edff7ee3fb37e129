"""Features in page-locked memory, and from there on the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from dinov3_client import Client, ImageViews, View  # noqa: E402
from dinov3_client.testing import FakeServer  # noqa: E402

pytestmark = pytest.mark.gpu

VIEWS = [View(size=64), View((0, 0, 20, 20), size=32), View(size=32)]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_features_are_page_locked_and_moved_to_the_device(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    images = [ImageViews(rng.integers(0, 256, (64, 96, 3), np.uint8), VIEWS) for _ in range(3)]
    with FakeServer() as server, Client(server.target, deadline=60) as client:
        features = client.extract(images, ("cls", "patches"), dtype=dtype)
    tensors = features.torch(pin_memory=True)
    assert tensors.images.is_pinned()
    for size in (64, 32):
        assert dtype == "int8" or tensors.at_size(size).patches.is_pinned()
        for asked in (None, torch.bfloat16):
            moved = tensors.to("cuda", asked, non_blocking=True).at_size(size)
            assert moved.patches.device.type == moved.images.device.type == "cuda"
            expected = torch.from_numpy(features.at_size(size).patches.astype(np.float32))
            assert torch.equal(moved.patches.cpu(), expected.to(moved.patches.dtype))
    all_rows = torch.from_numpy(features.cls.astype(np.float32))
    assert torch.equal(tensors.to("cuda").cls.float().cpu(), all_rows)
