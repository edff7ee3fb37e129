"""What the client makes of its options, against a real server with the numpy runner."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinov3_client import Client, ImageErrors, ImageViews, InvalidRequest, Layer, Pooling, View
from dinov3_server.models.interface import Output
from tests.support.numpy_runner import expected
from tests.support.server import Server

MOST = 6  # images of a request
WEIGHT = np.random.default_rng(3).normal(size=(5, 64)).astype(np.float32)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    file = tmp_path_factory.mktemp("projections") / "narrow.npy"
    np.save(file, WEIGHT)
    with Server("--max-images-per-request", str(MOST), "--projections", f"narrow={file}") as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with server.client() as client:
        yield client


def photo(height: int = 64, width: int = 96, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 250, (height, width, 3), np.uint8)


def png(pixels: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def features_of(pixels: np.ndarray[Any, Any], kind: Any, layer: int | None = None, norm: bool = True) -> Any:
    return expected(pixels, Output(kind, layer, norm=norm))


def test_views_of_a_call_that_is_split(client: Client) -> None:
    views = [
        View((3, 5, 40, 50), size=64),
        View((0, 10, 64, 64), flip=True, interpolation="bicubic"),
        View((9, 9, 20, 30), True, 32),
        View((0, 0, 10, 10), size=(32, 32)),
    ]
    pictures = [photo(seed=seed) for seed in range(5)]
    given = [ImageViews(png(pixels) if seed % 2 else pixels, views) for seed, pixels in enumerate(pictures)]
    features = client.extract(given, ("cls", "patches", "registers"), size=64, dtype="float32", layers=1)
    assert np.array_equal(features.images, np.repeat(range(5), 4))
    assert np.array_equal(features.views, np.tile(range(4), 5))
    for side, numbers in ((64, (0, 1)), (32, (2, 3))):
        part = features.at_size(side)
        assert len(part) == 10
        for row, (image, view) in enumerate(zip(part.images, part.views, strict=True)):
            assert view in numbers
            top, left, height, width = views[view].crop or ()
            seen = Image.fromarray(pictures[image]).crop((left, top, left + width, top + height))
            filter = Image.Resampling[(views[view].interpolation or "bilinear").upper()]
            seen = seen.resize((side, side), filter)
            pixels = np.asarray(seen.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if views[view].flip else seen)
            for kind in ("cls", "patches", "registers"):
                assert np.array_equal(getattr(part, kind)[row], features_of(pixels, kind))
            assert np.array_equal(part.layers[1].patches[row], features_of(pixels, "patches", 1))


@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_pooled_and_projected(client: Client, dtype: Any, channels_first: bool) -> None:
    pictures = [photo(), photo(32, 64, seed=1)]
    features = client.extract(
        pictures,
        preset="none",
        dtype=dtype,
        pooling=Pooling((2, 2)),
        projection="narrow",
        channels_first=channels_first,
        layers=(Layer(2, "patches", norm=False), Layer(-1, "cls")),
    )
    assert features.grid == (2, 2)
    for holder, layer, norm in ((features, None, True), (features.layers[2], 2, False)):
        assert holder.patches is not None
        assert holder.patches.shape == ((2, 5, 2, 2) if channels_first else (2, 4, 5))
        rows = holder.patches.reshape(2, 5, 4).transpose(0, 2, 1) if channels_first else holder.patches
        for pixels, found in zip(pictures, rows, strict=True):
            height, width = pixels.shape[0] // 32, pixels.shape[1] // 32
            patches = features_of(pixels, "patches", layer, norm).reshape(2, height, 2, width, 64)
            true = patches.mean((1, 3)).reshape(4, 64) @ WEIGHT.T
            # int8 is off by half a step, and a step is 1/127 of a token's largest.
            most = 1e-5 * np.abs(true).max() if dtype == "float32" else np.abs(true).max(-1, keepdims=True) / 250
            assert np.all(np.abs(found - true) <= most)
    cls = features.layers[-1].cls
    assert cls is not None
    assert np.allclose(cls[1], features_of(pictures[1], "cls", 3), rtol=1e-2 if dtype == "int8" else 1e-6)
    [projection] = client.model().projections
    assert (projection.name, projection.input_channels, projection.output_channels) == ("narrow", 64, 5)
    assert features.fingerprint == f"{client.model().fingerprint}+{projection.fingerprint}"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_a_split_call_is_what_its_images_are_alone(client: Client, dtype: Any) -> None:
    pictures = [photo(seed=seed) for seed in range(MOST + 1)]
    features = client.extract(pictures, ("cls", "patches"), preset="none", dtype=dtype, projection="narrow")
    for row, pixels in zip(features, pictures, strict=True):
        alone = client.extract(pixels, ("cls", "patches"), preset="none", dtype=dtype, projection="narrow")
        assert np.array_equal(row.cls, alone.cls[0])
        assert np.array_equal(row.patches, alone.patches[0])


def test_calls_over_the_limit_of_messages() -> None:
    """Requests by their size (large pixels, tiny answers), and answers by theirs."""
    with Server("--max-message-bytes", "1MiB") as server, server.client() as client:
        large = [photo(400, 600, seed) for seed in range(4)]  # 720 KB each
        features = client.extract(large, "cls", size=32, dtype="float32")
        assert len(features) == 4
        small = [png(np.full((32, 32, 3), shade, np.uint8)) for shade in range(12)]
        features = client.extract(small, size=(512, 256), dtype="float32", layers=0)  # 394 KB a row
        for shade, patches in enumerate(features.patches):
            assert np.array_equal(patches, features_of(np.full((512, 256, 3), shade, np.uint8), "patches"))
        views = ImageViews(small[5], [View(size=32)] * 10)
        assert len(client.extract([views] * 9, "cls")) == 90
        with pytest.raises(InvalidRequest, match="over the limit of 1048576 bytes"):
            client.extract(small[:2], size=768, dtype="float32", layers=0)  # 1.8 MB a row


def test_errors_are_counted_over_the_call(client: Client) -> None:
    images: list[Any] = [png(photo(seed=seed)) for seed in range(MOST + 2)]
    images[MOST] = b"broken"
    images[MOST + 1] = ImageViews(images[0], [View(), View((0, 0, 99, 99))])
    with pytest.raises(ImageErrors) as caught:
        client.extract(images)
    errors = caught.value.errors
    assert set(errors) == {MOST, MOST + 1}
    assert errors[MOST].violations[0].field.startswith(f"images[{MOST}]")
    assert errors[MOST + 1].violations[0].field.startswith(f"images[{MOST + 1}].views[1]")
    features = client.extract(images, on_error="return", dtype="float32")
    assert len(features) == MOST + 3
    assert features.cls is not None
    assert features.cls.any(axis=1).tolist() == [True] * MOST + [False] * 3
    with pytest.raises(InvalidRequest, match="there is no projection 'wide'"):
        client.extract(images[:1], projection="wide")
