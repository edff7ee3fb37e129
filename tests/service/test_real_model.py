"""The whole service with a real model, from outside: photos in by the client, features equal to transformers'."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import ml_dtypes
import numpy as np
import pytest
import skimage
import torch
from numpy.typing import NDArray
from PIL import Image

from dinov3_client import Client
from dinov3_server.backbone.weights.random_weights import random_tensors
from dinov3_server.families.registry import lookup
from dinov3_server.models.interface import Output
from dinov3_server.nn.rope import default_periods
from dinov3_serving.v1 import feature_service_pb2 as pb
from dinov3_serving.v1.feature_service_pb2_grpc import FeatureServiceStub
from tests.server.backbone.features import normalized
from tests.server.backbone.reference import transformers_features, transformers_model
from tests.support.server import Server

PHOTOS = [Path(skimage.__file__).parent / "data" / name for name in ("chelsea.png", "coffee.png", "rocket.jpg")]
LAYERS = (3, 11)
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server("--weights", "random:7", "--dtype", "float32", "--threads", "1", module="dinov3_server.cli") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Client]:
    with server.client() as client:
        yield client


class Reference:
    """transformers' model with the weights that the server drew from the same seed."""

    def __init__(self) -> None:
        variant = lookup("vits16")
        periods = default_periods(variant.head_dim, variant.rope_base)
        self._model = transformers_model(variant, random_tensors(variant, 7), periods)

    def __call__(self, images: NDArray[np.uint8]) -> dict[Output, NDArray[np.float32]]:
        """Features of images [N, H, W, 3]."""
        features = transformers_features(self._model, normalized(torch.from_numpy(images.copy())))
        return {output: tensor.numpy() for output, tensor in features.items()}


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


def error(actual: Any, expected: NDArray[np.float32]) -> float:
    assert actual.shape == expected.shape
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def pixels(path: Path, height: int, width: int) -> NDArray[np.uint8]:
    """A photo as a user's own code would resize it."""
    with Image.open(path) as photo:
        return np.asarray(photo.convert("RGB").resize((width, height), Image.Resampling.BILINEAR))


def test_photos_come_back_as_the_features_that_transformers_computes(client: Client, reference: Reference) -> None:
    features = client.extract(
        PHOTOS, outputs=("cls", "patches", "registers"), dtype="float32", layers=LAYERS, preset="dinov3"
    )
    expected = reference(np.stack([pixels(path, 256, 256) for path in PHOTOS]))
    assert features.grid == (16, 16)
    for kind in ("cls", "patches", "registers"):
        assert error(getattr(features, kind), expected[Output(kind)]) <= TOLERANCE
        for layer in LAYERS:
            assert error(getattr(features.layers[layer], kind), expected[Output(kind, layer)]) <= TOLERANCE


def test_sizes_mixed_in_one_request_and_among_callers(client: Client, reference: Reference) -> None:
    """Batches are shared and split by shape; every image still gets the features of its own pixels."""
    sizes = ((224, 224), (96, 160), (256, 128))
    images = [pixels(path, *size) for path in PHOTOS for size in sizes]
    expected = [reference(image[None]) for image in images]

    def ask(index: int) -> None:
        order = [(index + i) % len(images) for i in range(2)]
        features = client.extract([images[i] for i in order], preset="none", dtype="float32")
        for one, i in zip(features, order, strict=True):
            assert error(one.cls, expected[i][Output("cls")][0]) <= TOLERANCE
            assert error(one.patches, expected[i][Output("patches")][0]) <= TOLERANCE

    with ThreadPoolExecutor(4) as callers:
        for done in [callers.submit(ask, index) for index in range(len(images))]:
            done.result()


def test_normalized_floats_are_the_bytes_they_were_made_of(client: Client) -> None:
    image = pixels(PHOTOS[0], 128, 128)
    floats = normalized(torch.from_numpy(image[None].copy())).numpy()
    from_floats = client.extract(floats, preset="none", dtype="float32")
    from_bytes = client.extract(image, preset="none", dtype="float32")
    assert error(from_floats.patches, from_bytes.patches) <= TOLERANCE


@pytest.mark.parametrize(("name", "dtype"), [("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)])
def test_narrow_dtypes_are_the_rounded_float32(client: Client, name: str, dtype: Any) -> None:
    wide = client.extract(PHOTOS[0], preset="hf", dtype="float32")
    narrow = client.extract(PHOTOS[0], preset="hf", dtype=name)
    assert narrow.patches.dtype == dtype
    np.testing.assert_array_equal(narrow.patches, wide.patches.astype(dtype))


def test_what_is_served_is_said_loudly_when_it_is_random(server: Server, client: Client) -> None:
    model = client.model()
    assert (model.name, model.weights, model.random_weights) == ("dinov3_vits16", "random:7", True)
    assert any("RANDOM WEIGHTS" in line for line in server.log)
    assert server.metric("dinov3_model_info", weights="random:7", fingerprint=model.fingerprint) == 1
    assert client.extract(PHOTOS[0]).fingerprint == model.fingerprint


def test_a_pinned_model_may_go_by_its_short_name(server: Server) -> None:
    with grpc.insecure_channel(server.grpc) as channel:
        extract = FeatureServiceStub(channel).Extract
        pixels = pb.Tensor(dtype=pb.DATA_TYPE_UINT8, shape=[1, 32, 32, 3], data=bytes(32 * 32 * 3))
        preprocessing = pb.Preprocessing(preset=pb.PRESET_NONE)
        for name in ("vits16", "small", "dinov3_vits16"):
            assert extract(pb.ExtractRequest(pixels=pixels, preprocessing=preprocessing, model=name)).blocks
        with pytest.raises(grpc.RpcError, match="dinov3_vits16"):
            extract(pb.ExtractRequest(pixels=pixels, preprocessing=preprocessing, model="vitb16"))
