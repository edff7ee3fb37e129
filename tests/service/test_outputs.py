"""Only what a loss needs, through the whole service with a real model: photos in, and what comes back is what torch's
own functions make of the features that transformers computes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from dinov3_client import Client, ImageViews, Layer, Pooling, View
from dinov3_server.models.interface import Output
from dinov3_serving.v1 import feature_service_pb2 as pb
from dinov3_serving.v1.feature_service_pb2_grpc import FeatureServiceStub
from tests.service.test_real_model import PHOTOS, Reference, pixels
from tests.support.server import Server

# Of norm(a - b) / norm(b). int8: the rounding of a value is at most half a step of a 127th of its token's largest.
TOLERANCE = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 2**-8, "int8": 0.02}
WEIGHT = torch.randn(16, 384, generator=torch.Generator().manual_seed(0))
BIAS = torch.randn(16, generator=torch.Generator().manual_seed(1))
LAYERS = (Layer(3, "patches"), Layer(7, ("cls", "patches"), norm=False))
FILES = (PHOTOS[0], PHOTOS[2])  # a PNG and a JPEG
VIEWS = (
    View((11, 23, 201, 307), flip=True, size=224),
    View((150, 101, 67, 53), size=96),
    View((0, 0, 300, 400), size=224, interpolation="bicubic"),
    View((37, 200, 98, 97), flip=True, size=96, interpolation="lanczos"),
    View(size=96),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("projections")
    save_file({"weight": WEIGHT, "bias": BIAS}, folder / "p16.safetensors")
    np.save(folder / "bare.npy", WEIGHT.double().numpy())
    flags = ("--weights", "random:7", "--dtype", "float32", "--threads", "1")
    flags += ("--projections", f"p16={folder}/p16.safetensors,bare={folder}/bare.npy")
    with Server(*flags, module="dinov3_server.cli") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Client]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


@pytest.fixture(scope="module")
def expected(reference: Reference) -> dict[Output, Tensor]:
    """Of the photos at 256 x 256."""
    return computed(reference, np.stack([pixels(path, 256, 256) for path in PHOTOS]))


def computed(reference: Reference, images: NDArray[np.uint8]) -> dict[Output, Tensor]:
    return {output: torch.from_numpy(values) for output, values in reference(images).items()}


def made(patches: Tensor, pooling: Pooling | None, projected: bool, channels_first: bool) -> Tensor:
    """Of [N, P, D] on a square grid, as the user of torch would write it."""
    side = math.isqrt(patches.shape[1])
    maps = patches.transpose(1, 2).unflatten(2, (side, side))  # type: ignore[no-untyped-call]
    if pooling is not None and pooling.method == "area":
        maps = F.adaptive_avg_pool2d(maps, pooling.grid)
    elif pooling is not None:
        maps = F.interpolate(maps, pooling.grid, mode="bilinear", align_corners=False)
    if projected:
        maps = F.conv2d(maps, WEIGHT[:, :, None, None], BIAS)
    result: Tensor = maps if channels_first else maps.flatten(2).transpose(1, 2)
    return result


def error(actual: Any, expected: Tensor) -> float:
    assert actual.shape == tuple(expected.shape)
    return float(np.linalg.norm(actual.astype(np.float32) - expected.numpy()) / expected.norm())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("pooling", "projection", "channels_first"),
    [
        (None, None, True),
        (None, "p16", False),
        (Pooling((4, 4)), None, False),
        (Pooling((5, 7), "bilinear"), "p16", True),
    ],
)
def test_what_comes_back_is_what_torch_makes_of_transformers_features(
    dtype: Any,
    pooling: Pooling | None,
    projection: str | None,
    channels_first: bool,
    client: Client,
    expected: dict[Output, Tensor],
) -> None:
    features = client.extract(
        PHOTOS,
        layers=LAYERS,
        dtype=dtype,
        preset="dinov3",
        pooling=pooling,
        projection=projection,
        channels_first=channels_first,
    )

    def patches(output: Output) -> Tensor:
        return made(expected[output], pooling, projection is not None, channels_first)

    limit = TOLERANCE[dtype]
    assert error(features.cls, expected[Output("cls")]) <= limit
    assert error(features.patches, patches(Output("patches"))) <= limit
    assert error(features.layers[3].patches, patches(Output("patches", 3))) <= limit
    assert error(features.layers[7].patches, patches(Output("patches", 7, norm=False))) <= limit
    assert error(features.layers[7].cls, expected[Output("cls", 7, norm=False)]) <= limit
    assert features.grid == (pooling.grid if pooling else (16, 16))


def seen(path: Path, view: View) -> NDArray[np.uint8]:
    """The pixels of a view, as a user's own code would make them."""
    assert isinstance(view.size, int)
    with Image.open(path) as photo:
        top, left, height, width = view.crop or (0, 0, photo.height, photo.width)
        part = photo.convert("RGB").crop((left, top, left + width, top + height))
    filter = Image.Resampling[(view.interpolation or "bilinear").upper()]
    part = part.resize((view.size, view.size), filter)
    return np.asarray(part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flip else part)


@pytest.fixture(scope="module")
def expected_of_views(reference: Reference) -> dict[int, dict[Output, Tensor]]:
    """By input size."""
    return {
        side: computed(reference, np.stack([seen(path, view) for path in FILES for view in VIEWS if view.size == side]))
        for side in (224, 96)
    }


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_views_come_back_as_what_transformers_makes_of_their_pixels(
    dtype: Any, client: Client, expected_of_views: dict[int, dict[Output, Tensor]]
) -> None:
    given = [ImageViews(path, VIEWS) for path in FILES]
    pooling = Pooling((3, 2))
    whole = client.extract(given, ("cls", "patches", "registers"), layers=LAYERS, dtype=dtype)
    reduced = client.extract(given, "patches", layers=3, dtype=dtype, pooling=pooling, projection="p16")
    limit = TOLERANCE[dtype]
    for side, expected in expected_of_views.items():
        features, few = whole.at_size(side), reduced.at_size(side)
        numbers = [number for number, view in enumerate(VIEWS) if view.size == side]
        assert features.views.tolist() == numbers * len(FILES)
        assert features.images.tolist() == [image for image in range(len(FILES)) for _ in numbers]
        for kind in ("cls", "patches", "registers"):
            assert error(getattr(features, kind), expected[Output(kind)]) <= limit
        assert error(features.layers[3].patches, expected[Output("patches", 3)]) <= limit
        assert error(features.layers[7].patches, expected[Output("patches", 7, norm=False)]) <= limit
        assert error(features.layers[7].cls, expected[Output("cls", 7, norm=False)]) <= limit
        for holder, output in ((few, Output("patches")), (few.layers[3], Output("patches", 3))):
            assert error(holder.patches, made(expected[output], pooling, True, False)) <= limit


def test_int8_is_the_rounded_float32(client: Client) -> None:
    wide = client.extract(PHOTOS, dtype="float32", pooling=(8, 8))
    narrow = client.extract(PHOTOS, dtype="int8", pooling=(8, 8))
    for kind in ("cls", "patches"):
        values, scales = narrow.quantized(kind)
        exact = getattr(wide, kind)
        np.testing.assert_array_equal(scales, np.abs(exact).max(-1) / np.float32(127))
        np.testing.assert_array_equal(values, np.rint(exact / scales[..., None]).astype(np.int8))


def test_a_projection_has_a_fingerprint_and_the_model_keeps_its_own(client: Client) -> None:
    model = client.model()
    assert [(each.name, each.input_channels, each.output_channels) for each in model.projections] == [
        ("p16", 384, 16),
        ("bare", 384, 16),
    ]
    of_p16, of_bare = (each.fingerprint for each in model.projections)
    assert of_p16 != of_bare, "one has a bias"
    assert client.extract(PHOTOS[0]).fingerprint == model.fingerprint
    assert client.extract(PHOTOS[0], projection="bare").fingerprint == f"{model.fingerprint}+{of_bare}"


def test_a_pinned_projection_is_that_or_none(server: Server, client: Client) -> None:
    model = client.model()
    whole = f"{model.fingerprint}+{model.projections[0].fingerprint}"
    image = pb.Tensor(dtype=pb.DATA_TYPE_UINT8, shape=[1, 32, 32, 3], data=bytes(32 * 32 * 3))
    with grpc.insecure_channel(server.grpc) as channel:
        extract = FeatureServiceStub(channel).Extract

        def answered(pin: str, projection: str) -> str:
            outputs = pb.Outputs(projection=projection)
            preprocessing = pb.Preprocessing(preset=pb.PRESET_NONE)
            request = pb.ExtractRequest(pixels=image, preprocessing=preprocessing, outputs=outputs, fingerprint=pin)
            return str(extract(request).fingerprint)

        assert answered(whole, "p16") == answered(model.fingerprint, "p16") == whole
        with pytest.raises(grpc.RpcError, match=re.escape(whole)) as caught:
            answered(whole, "bare")
        assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION


def test_a_projection_of_no_layer_ends_the_start_with_what_to_do(tmp_path: Path) -> None:
    np.save(tmp_path / "p.npy", WEIGHT.T.numpy())
    with pytest.raises(AssertionError, match="it is transposed") as caught:
        Server("--weights", "random:7", "--projections", f"p={tmp_path}/p.npy", module="dinov3_server.cli")
    assert "no ready line but ''" in str(caught.value)
