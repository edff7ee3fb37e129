"""Features as torch tensors: the same numbers, writable, and no longer tied to the bytes that came."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch

from dinov3_client import Client, Features, ImageViews, MixedSizes, View
from dinov3_client.testing import MODEL, FakeServer
from tests.support.waiting import LIMIT

KINDS: Any = ("cls", "patches", "registers")
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.float32,
}


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


@pytest.fixture
def client(server: FakeServer) -> Iterator[Client]:
    with Client(server.target, deadline=LIMIT) as client:
        yield client


def photo(height: int = 64, width: int = 96, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def same(tensor: torch.Tensor | None, array: np.ndarray[Any, Any] | None) -> None:
    assert tensor is not None
    assert array is not None
    assert tuple(tensor.shape) == array.shape
    assert np.array_equal(tensor.float().numpy(), array.astype(np.float32))


@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(client: Client, dtype: Any, channels_first: bool) -> None:
    pictures = [photo(seed=seed) for seed in range(3)]
    features = client.extract(
        pictures, KINDS, preset="none", dtype=dtype, channels_first=channels_first, layers=(3, -1)
    )
    tensors = features.torch()
    for found, expected in ((tensors, features), (tensors.layers[-1], features.layers[-1])):
        for kind in KINDS:
            tensor = getattr(found, kind)
            assert tensor.dtype == DTYPES[dtype]
            assert tensor.is_contiguous()
            same(tensor, getattr(expected, kind))
        assert found.grid == expected.grid
    assert list(tensors.layers) == [3, -1]
    assert (tensors.input_size, tensors.input_sizes, len(tensors)) == ((64, 96), ((64, 96),), 3)
    assert (tensors.images.tolist(), tensors.views.tolist()) == ([0, 1, 2], [0, 0, 0])
    assert (tensors.timings, tensors.frontend, tensors.fingerprint) == (features.timings, features.frontend, "f00d")
    assert tensors.errors == {}
    patches = str(list(features.patches.shape))
    assert repr(tensors).startswith(
        f"<TorchFeatures of 3 images (3 of 64x96): cls [3, 24], patches {patches}, registers [3, 4, 24], layers [3, -1]"
    )


def test_outputs_that_were_not_requested_are_none(client: Client) -> None:
    tensors = client.extract(photo(), "cls", layers=2).torch()
    assert tensors.patches is tensors.registers is tensors.layers[2].patches is None


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_tensors_are_writable_and_keep_nothing_that_came(client: Client, dtype: Any) -> None:
    features: Features = client.extract([photo(), photo(seed=1)], preset="none", dtype=dtype)
    before = features.patches.copy()
    tensors = features.torch()
    assert tensors.patches is tensors.patches
    tensors.patches.zero_()
    tensors.cls.add_(1)
    assert np.array_equal(features.patches, before)
    packing = weakref.ref(features._packing)
    gc.disable()
    try:
        del features
        assert packing() is None
    finally:
        gc.enable()
    assert not tensors.patches.any()


def test_bits_survive(client: Client, server: FakeServer) -> None:
    """Whatever they are: no conversion lies between."""
    bits = np.arange(2 * 24 * 24, dtype=np.uint16) * 57

    def scramble(response: Any) -> None:
        response.blocks[0].patches.data = bits.tobytes()

    server.edit = scramble
    tensors = client.extract([photo(), photo(seed=1)], "patches", preset="none", dtype="bfloat16").torch()
    assert np.array_equal(tensors.patches.view(torch.int16).numpy().view(np.uint16).ravel(), bits)


@pytest.mark.parametrize("shift", range(8))
def test_contents_may_lie_anywhere_in_the_message(client: Client, server: FakeServer, shift: int) -> None:
    """A fingerprint's length moves nothing that comes before it; a block's row numbers do."""
    server.model = replace(MODEL, limits=replace(MODEL.limits, max_images_per_request=100))
    images: list[Any] = [ImageViews(photo(32, 32), [View()] * (1 + shift))]
    features = client.extract(images, preset="none", dtype="float32")
    tensors = features.torch()
    same(tensors.patches, features.patches)
    tensors.patches.mul_(2)
    assert np.array_equal(tensors.patches.numpy(), features.patches * 2)


def mixed(client: Client, **options: Any) -> Features:
    views = [View(size=64), View((0, 0, 20, 20), size=32), View(size=32)]
    images: list[Any] = [ImageViews(photo(seed=seed), views) for seed in range(3)]
    images[1] = ImageViews(b"broken", views)
    return client.extract(images, KINDS, on_error="return", layers=5, **options)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("most", [64, 3])
def test_several_sizes_and_parts(server: FakeServer, dtype: Any, most: int) -> None:
    server.model = replace(MODEL, limits=replace(MODEL.limits, max_images_per_request=most))
    with Client(server.target, deadline=LIMIT) as client:
        features = mixed(client, dtype=dtype)
    assert len(server.requests) == (1 if most == 64 else 3)
    for tensors in (features.torch(), features.torch().to("cpu")):
        assert tensors.input_sizes == ((64, 64), (32, 32))
        for kind in ("cls", "registers"):
            same(getattr(tensors, kind), getattr(features, kind))
            same(getattr(tensors.layers[5], kind), getattr(features.layers[5], kind))
        for size in (64, 32):
            part, expected = tensors.at_size(size), features.at_size(size)
            assert part.images.tolist() == expected.images.tolist()
            assert part.views.tolist() == expected.views.tolist()
            assert (part.grid, part.input_size) == (expected.grid, expected.input_size)
            for kind in KINDS:
                same(getattr(part, kind), getattr(expected, kind))
                same(getattr(part.layers[5], kind), getattr(expected.layers[5], kind))
        assert set(tensors.errors) == {1}
        with pytest.raises(MixedSizes, match=r"2 input sizes \(64x64, 32x32\).*no one patches"):
            assert tensors.patches is None
        for field in ("grid", "input_size"):
            with pytest.raises(MixedSizes, match=f"no one {field}"):
                getattr(tensors, field)
        with pytest.raises(ValueError, match="no features have the input size 16x16; there are 64x64, 32x32"):
            tensors.at_size(16)


def test_tensors_of_one_size_are_shared_with_all(client: Client) -> None:
    tensors = mixed(client, dtype="float16").torch()
    tensors.at_size(64).patches.fill_(7)
    again = tensors.at_size(64).at_size(64)
    assert bool((again.patches == 7).all())
    assert again.images.tolist() == [0, 1, 2]


def test_several_sizes_are_put_together_where_they_were_moved(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = mixed(client, dtype="float16").torch().to("cpu", torch.bfloat16).to("cpu")
    assert moved.cls.dtype == moved.at_size(32).cls.dtype == torch.bfloat16
    moved = moved.to("meta")
    waited_for: list[bool] = []
    to = torch.Tensor.to

    def watched(tensor: torch.Tensor, *given: Any, non_blocking: bool = False) -> torch.Tensor:
        waited_for.append(not non_blocking)
        return to(tensor, *given, non_blocking=non_blocking)

    monkeypatch.setattr(torch.Tensor, "to", watched)
    assert moved.cls.device.type == moved.at_size(32).images.device.type == "meta"
    assert waited_for == [False] * 3  # a GPU goes on with what it does


def test_a_failed_image_without_a_row_is_zeros(client: Client) -> None:
    features = client.extract([photo(), b"x", photo(seed=2)], preset="none", on_error="return", dtype="int8")
    tensors = features.torch()
    same(tensors.patches, features.patches)
    same(tensors.to("cpu").patches, features.patches)
    assert not tensors.patches[1].any()
    nothing = client.extract([b"x"], preset="none", on_error="return").torch()
    assert (tuple(nothing.patches.shape), nothing.patches.dtype) == ((1, 0, 0), torch.float16)
    assert (nothing.grid, nothing.input_size) == ((0, 0), (0, 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("asked", [None, torch.float32, torch.bfloat16])
def test_moved_and_converted(client: Client, dtype: Any, asked: torch.dtype | None) -> None:
    features = client.extract([photo(), photo(seed=1)], KINDS, preset="none", dtype=dtype, layers=3)
    moved = features.torch().to(torch.device("cpu"), asked, non_blocking=True)
    wanted = asked or DTYPES[dtype]
    for tensor, array in ((moved.patches, features.patches), (moved.layers[3].cls, features.layers[3].cls)):
        assert tensor.dtype == wanted
        assert torch.equal(tensor, torch.from_numpy(array.astype(np.float32)).to(wanted))
    assert moved.to("meta").patches.device.type == "meta"
    with pytest.raises(TypeError, match=r"device is torch\.float32: name a device first"):
        moved.to(cast(Any, torch.float32))


def test_int8_travels_as_int8(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = client.extract([photo(), photo(seed=1)], "patches", preset="none", dtype="int8").torch()
    sent: list[tuple[torch.dtype, int]] = []
    to = torch.Tensor.to

    def watched(tensor: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
        if given and given[0] == "meta":
            assert named == {"non_blocking": True}
            sent.append((tensor.dtype, tensor.numel()))
        return to(tensor, *given, **named)

    monkeypatch.setattr(torch.Tensor, "to", watched)
    moved = tensors.to("meta", torch.float16, non_blocking=True)
    assert moved.patches is not None
    assert (moved.patches.dtype, tuple(moved.patches.shape)) == (torch.float16, (2, 24, 24))
    assert sorted(sent, key=str) == [(torch.float32, 48), (torch.int64, 2), (torch.int64, 2), (torch.int8, 1152)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_page_locked_memory_needs_a_device(client: Client) -> None:
    with pytest.raises(RuntimeError, match="pin_memory=True needs a CUDA device, and torch sees none here"):
        client.extract(photo()).torch(pin_memory=True)


def test_the_error_without_torch_names_what_to_install() -> None:
    code = """
import sys
sys.modules["torch"] = None
import dinov3_client
from tests.support.waiting import LIMIT
try:
    dinov3_client.Features.torch(None)
except ImportError as error:
    sys.exit(0 if "pip install 'dinov3-serving[torch]'" in str(error) else str(error))
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
