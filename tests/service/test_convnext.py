"""The whole service with a ConvNeXt: layers of widths and grids of their own, from outside."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage
import torch
from numpy.typing import NDArray
from PIL import Image

from dinov3_client import Client, InvalidRequest
from dinov3_client.cli import main
from dinov3_server.backbone.weights.random_weights import random_tensors
from dinov3_server.families.dinov3_convnext.variants import CONVNEXTS
from dinov3_server.models.interface import Output
from tests.server.backbone.features import normalized
from tests.server.backbone.reference import transformers_convnext, transformers_convnext_features
from tests.support.server import Server

VARIANT = CONVNEXTS["dinov3_convnext_tiny"]
PHOTOS = [Path(skimage.__file__).parent / "data" / name for name in ("chelsea.png", "rocket.jpg")]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    flags = ("--model", "convnext-tiny", "--weights", "random:7", "--dtype", "float32", "--threads", "1")
    with Server(*flags, module="dinov3_server.cli") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Client]:
    with server.client() as client:
        yield client


def error(actual: Any, expected: NDArray[np.float32]) -> float:
    assert actual.shape == expected.shape
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def test_photos_come_back_as_the_features_that_transformers_computes(client: Client) -> None:
    features = client.extract(PHOTOS, dtype="float32", layers=(0, 1, 2, -1), size=(128, 192))
    photos = [Image.open(path).convert("RGB").resize((192, 128), Image.Resampling.BILINEAR) for path in PHOTOS]
    pixels = torch.from_numpy(np.stack([np.asarray(photo) for photo in photos]))
    model = transformers_convnext(VARIANT, random_tensors(VARIANT, 7))
    expected = {o: t.numpy() for o, t in transformers_convnext_features(model, normalized(pixels)).items()}
    for kind in ("cls", "patches"):
        assert error(getattr(features, kind), expected[Output(kind)]) <= TOLERANCE
        for asked, stage in ((0, 0), (1, 1), (2, 2), (-1, 3)):
            assert error(getattr(features.layers[asked], kind), expected[Output(kind, stage)]) <= TOLERANCE
            assert error(getattr(features[1].layers[asked], kind), expected[Output(kind, stage)][1]) <= TOLERANCE
    assert features.grid == (4, 6)
    assert [layer.grid for layer in features.layers.values()] == [(32, 48), (16, 24), (8, 12), (4, 6)]
    assert features[0].layers[0].grid == (32, 48)


def test_the_model_tells_its_layers(client: Client) -> None:
    model = client.model()
    assert (model.name, model.embed_dim, model.depth, model.patch_size) == ("dinov3_convnext_tiny", 768, 4, 32)
    assert (model.layer_dims, model.layer_strides) == ((96, 192, 384, 768), (4, 8, 16, 32))
    assert model.register_tokens == 0


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"size": 240}, "its patch size, 32 pixels; .* height 240 is not .nearest: 224 or 256."),
        ({"outputs": ("cls", "registers")}, "dinov3_convnext_tiny has no register tokens"),
    ],
)
def test_what_a_convnext_does_not_have_is_explained(client: Client, asked: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidRequest, match=told):
        client.extract(PHOTOS[0], **asked)


def test_a_stage_that_it_does_not_have_is_explained(client: Client) -> None:
    with pytest.raises(ValueError, match="layers has 4; the model has 4 layers: allowed are -4 to 3"):
        client.extract(PHOTOS[0], layers=4)


def test_the_client_command_writes_every_stage(server: Server, tmp_path: Path) -> None:
    arguments = ["extract", *map(str, PHOTOS), "--out", str(tmp_path), "--layers", "0,3"]
    arguments += ["--format", "npz", "--target", server.grpc]
    assert main(arguments) == 0
    with np.load(tmp_path / "rocket.npz") as file:
        assert file["patches"].shape == (64, 768)
        assert (file["layer0_patches"].shape, file["layer0_grid"].tolist()) == ((4096, 96), [64, 64])
        assert (file["layer3_patches"].shape, file["layer3_grid"].tolist()) == ((64, 768), [8, 8])
    assert main(["pca", str(PHOTOS[0]), "-o", str(tmp_path / "pca.png"), "--size", "128", "--target", server.grpc]) == 0
    assert (tmp_path / "pca.png").exists()
