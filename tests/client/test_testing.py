"""dinov3_client.testing: a server whose features are a formula, and whose failures are scripted."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from PIL import Image

from dinov3_client import (
    Client,
    InvalidRequest,
    Pooling,
)
from dinov3_client.testing import MODEL, FakeServer, expected
from dinov3_client.testing._formula import quantized
from dinov3_serving.v1 import feature_service_pb2 as pb
from dinov3_serving.v1.feature_service_pb2_grpc import FeatureServiceStub

Code = grpc.StatusCode
UINT8, FLOAT32, INT8 = pb.DATA_TYPE_UINT8, pb.DATA_TYPE_FLOAT32, pb.DATA_TYPE_INT8
AS_IS = pb.Preprocessing(preset=pb.PRESET_NONE)
WEIGHT = np.random.default_rng(1).normal(size=(8, 24)).astype(np.float32)
BIAS = np.arange(8, dtype=np.float32)


def picture(height: int = 64, width: int = 96, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def png(pixels: np.ndarray[Any, Any], **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", **options)
    return file.getvalue()


def tensor(pixels: np.ndarray[Any, Any]) -> pb.Tensor:
    return pb.Tensor(dtype=UINT8 if pixels.dtype == np.uint8 else FLOAT32, shape=pixels.shape, data=pixels.tobytes())


def array(message: pb.Tensor, dtype: type = np.float32) -> np.ndarray[Any, Any]:
    return np.frombuffer(message.data, dtype).reshape(tuple(message.shape))


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    with FakeServer(projections={"p8": (WEIGHT, BIAS), "plain": WEIGHT}) as server:
        yield server


@pytest.fixture(scope="module")
def stub(server: FakeServer) -> Iterator[FeatureServiceStub]:
    with grpc.insecure_channel(server.target, [("grpc.max_receive_message_length", -1)]) as channel:
        yield FeatureServiceStub(channel)


def test_the_formula() -> None:
    """As its docstring has it, one number at a time."""
    pixels = picture(32, 48)
    model = replace(MODEL, layer_dims=(5,) + (24,) * 11, layer_strides=(8,) + (16,) * 11)
    for layer, norm, side, channels, gain in (
        (None, True, 16, 24, 1.0),
        (0, True, 8, 5, 1 / 12),
        (3, False, 16, 24, 8 / 12),
    ):
        patches = []
        for top in range(0, 32, side):
            for left in range(0, 48, side):
                cell = pixels[top : top + side, left : left + side].reshape(-1, 3) / 255
                s = [*cell.mean(0), *cell.std(0)]
                patches.append(
                    [gain * sum(s[k] * np.cos((k + 1) * (d + 1)) for k in range(6)) for d in range(channels)]
                )
        found = expected(pixels, "patches", layer=layer, norm=norm, model=model)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, patches, rtol=1e-5, atol=1e-6)
        cls = expected(pixels, "cls", layer=layer, norm=norm, model=model)
        np.testing.assert_allclose(cls, np.mean(patches, 0), rtol=1e-5, atol=1e-6)
        registers = expected(pixels, "registers", layer=layer, norm=norm, model=model)
        np.testing.assert_allclose(registers, [np.mean(patches, 0) * (r + 1) for r in range(4)], rtol=1e-5, atol=1e-6)
    floats = (pixels / 255).transpose(2, 0, 1).astype(np.float32)
    np.testing.assert_allclose(expected(floats, "patches"), expected(pixels, "patches"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("to", [(4, 4), (1, 1), (3, 2), (5, 7), (14, 14), (20, 9)])
def test_pooling_is_torchs(to: tuple[int, int]) -> None:
    pixels = picture(14 * 16, 14 * 16)
    maps = torch.from_numpy(expected(pixels, "patches")).T.reshape(1, 24, 14, 14)
    area = torch.nn.functional.adaptive_avg_pool2d(maps, to)
    bilinear = torch.nn.functional.interpolate(maps, to, mode="bilinear", align_corners=False)
    for method, theirs in (("area", area), ("bilinear", bilinear)):
        ours = expected(pixels, "patches", pooling=Pooling(to, method))  # type: ignore[arg-type]
        np.testing.assert_allclose(ours, theirs[0].flatten(1).T.numpy(), rtol=1e-5, atol=1e-6)


def test_int8_is_within_half_a_step() -> None:
    values = np.random.default_rng(0).normal(size=(3, 5, 24)).astype(np.float32)
    values[1, 2] = 0
    steps, scales = quantized(values)
    assert steps.shape == values.shape
    assert scales.shape == (3, 5)
    assert np.abs(steps).max(-1)[scales > 0].tolist() == [127] * 14
    assert scales[1, 2] == 0
    assert (np.abs(steps * scales[..., None] - values) <= scales[..., None] * 0.5001).all()


def test_views_are_cropped_resized_and_flipped_by_pillow(stub: Any) -> None:
    pixels = picture(70, 90)
    whole = Image.fromarray(pixels)
    crop = pb.Box(top=5, left=7, height=40, width=31)
    part = whole.crop((7, 5, 38, 45))
    flip = Image.Transpose.FLIP_LEFT_RIGHT
    small = pb.Size(height=32, width=48)
    views = [
        (pb.View(), whole.resize((64, 64), Image.Resampling.BILINEAR)),
        (pb.View(crop=crop), part.resize((64, 64), Image.Resampling.BILINEAR)),
        (
            pb.View(crop=crop, horizontal_flip=True, size=small),
            part.resize((48, 32), Image.Resampling.BILINEAR).transpose(flip),
        ),
        (
            pb.View(horizontal_flip=True, interpolation=pb.INTERPOLATION_NEAREST),
            whole.resize((64, 64), Image.Resampling.NEAREST).transpose(flip),
        ),
    ]
    images = [
        pb.Image(encoded=png(pixels), views=[view for view, _ in views]),
        pb.Image(pixels=tensor(pixels), views=[views[2][0], views[0][0]]),
        pb.Image(encoded=png(pixels)),
    ]
    pixels_of = {(0, v): one for v, (_, one) in enumerate(views)}
    pixels_of |= {(1, 0): views[2][1], (1, 1): views[0][1], (2, 0): views[0][1]}
    answer = stub.Extract(
        pb.ExtractRequest(
            images=images,
            preprocessing=pb.Preprocessing(size=pb.Size(height=64, width=64)),
            outputs=pb.Outputs(cls=True, patches=True, dtype=FLOAT32),
        )
    )
    rows = [list(zip(block.image_indices, block.view_indices, strict=True)) for block in answer.blocks]
    assert rows == [[(0, 0), (0, 1), (0, 3), (1, 1), (2, 0)], [(0, 2), (1, 0)]]
    assert [(block.input_size.height, block.input_size.width) for block in answer.blocks] == [(64, 64), (32, 48)]
    for block, its in zip(answer.blocks, rows, strict=True):
        for row, key in enumerate(its):
            wanted = np.asarray(pixels_of[key])
            np.testing.assert_array_equal(array(block.cls)[row], expected(wanted, "cls"))
            np.testing.assert_array_equal(array(block.patches)[row], expected(wanted, "patches"))


def test_exif_turns_a_file_before_it_is_cropped(stub: Any) -> None:
    pixels = picture(32, 48)
    exif = Image.Exif()
    exif[0x0112] = 6
    request = pb.ExtractRequest(
        images=[pb.Image(encoded=png(pixels, exif=exif), views=[pb.View(crop=pb.Box(top=16, height=32, width=32))])],
        preprocessing=pb.Preprocessing(preset=pb.PRESET_NONE, apply_exif_orientation=True),
        outputs=pb.Outputs(cls=True, dtype=FLOAT32),
    )
    upright = np.ascontiguousarray(np.rot90(pixels, -1))
    np.testing.assert_array_equal(array(stub.Extract(request).blocks[0].cls)[0], expected(upright[16:], "cls"))


def test_patches_are_pooled_projected_and_laid_out(stub: Any, server: FakeServer) -> None:
    pixels = picture()
    outputs = pb.Outputs(
        cls=True,
        patches=True,
        layers=[pb.LayerOutputs(layer=2, patches=True, registers=True, skip_norm=True)],
        dtype=FLOAT32,
        pooling=pb.Pooling(grid_height=2, grid_width=3, method=pb.POOLING_METHOD_BILINEAR),
        projection="p8",
        patch_layout=pb.PATCH_LAYOUT_CHANNELS_FIRST,
    )
    answer = stub.Extract(pb.ExtractRequest(pixels=tensor(pixels[None]), preprocessing=AS_IS, outputs=outputs))
    [block] = answer.blocks
    layer = block.layers[0]
    for holder, options in ((block, {}), (layer, {"layer": 2, "norm": False})):
        assert (holder.grid_height, holder.grid_width) == (2, 3)
        small = expected(pixels, "patches", pooling=Pooling((2, 3), "bilinear"), projection=(WEIGHT, BIAS), **options)
        np.testing.assert_array_equal(array(holder.patches)[0], small.reshape(2, 3, 8).transpose(2, 0, 1))
        whole = torch.from_numpy(expected(pixels, "patches", **options).reshape(1, 4, 6, 24)).permute(0, 3, 1, 2)
        theirs = torch.nn.functional.interpolate(whole, (2, 3), mode="bilinear").permute(0, 2, 3, 1).reshape(6, 24)
        np.testing.assert_allclose(small, theirs.numpy() @ WEIGHT.T + BIAS, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(array(block.cls)[0], expected(pixels, "cls"))
    np.testing.assert_array_equal(array(layer.registers)[0], expected(pixels, "registers", layer=2, norm=False))
    told = {projection.name: projection for projection in stub.GetModel(pb.GetModelRequest()).projections}
    assert {name: (one.input_channels, one.output_channels) for name, one in told.items()} == {
        "p8": (24, 8),
        "plain": (24, 8),
    }
    assert told["p8"].fingerprint != told["plain"].fingerprint
    assert answer.fingerprint == f"f00d+{told['p8'].fingerprint}"


def test_failed_rows_are_zeros_whatever_the_bias(stub: Any) -> None:
    request = pb.ExtractRequest(
        images=[pb.Image(encoded=b"broken"), pb.Image(pixels=tensor(picture()))],
        outputs=pb.Outputs(patches=True, projection="p8", dtype=FLOAT32),
    )
    patches = array(stub.Extract(request).blocks[0].patches)
    assert not patches[0].any()
    assert patches[1].all()


def test_int8_has_scales_in_the_order_of_the_tokens(stub: Any) -> None:
    pixels = picture()
    tokens = expected(pixels, "patches")
    answers = {
        layout: stub.Extract(
            pb.ExtractRequest(
                images=[pb.Image(pixels=tensor(pixels)), pb.Image(encoded=b"broken")],
                preprocessing=pb.Preprocessing(size=pb.Size(height=64, width=96)),
                outputs=pb.Outputs(patches=True, cls=True, dtype=INT8, patch_layout=layout),
            )
        ).blocks[0]
        for layout in (pb.PATCH_LAYOUT_TOKENS, pb.PATCH_LAYOUT_CHANNELS_FIRST)
    }
    for layout, block in answers.items():
        values = array(block.patches, np.int8)
        if layout == pb.PATCH_LAYOUT_CHANNELS_FIRST:
            assert values.shape == (2, 24, 4, 6)
            values = values.reshape(2, 24, 24).transpose(0, 2, 1)
        scales = np.frombuffer(block.patches.scales, "<f4").reshape(2, 24)
        np.testing.assert_allclose(values[0] * scales[0, :, None], tokens, atol=scales.max() * 0.51)
        assert not scales[1].any()
        assert not values[1].any()
        assert len(block.cls.scales) == 2 * 4


def test_a_model_of_other_dimensions_round_trips() -> None:
    model = replace(
        MODEL,
        fingerprint="cafe",
        random_weights=True,
        layer_dims=(4, 8, 16, 32),
        layer_strides=(4, 8, 16, 32),
        register_tokens=0,
        mean=(0.5, 0.25, 0.125),
        std=(0.5, 0.25, 0.125),
    )
    with FakeServer(model) as server, Client(server.target) as client:
        assert client.model() == model
        pixels = picture(64, 64)
        features = client.extract(pixels, preset="none", dtype="float32", layers=(0, -1))
        np.testing.assert_array_equal(features.patches[0], expected(pixels, "patches", model=model))
        np.testing.assert_array_equal(features.layers[0].cls[0], expected(pixels, "cls", layer=0, model=model))
        np.testing.assert_array_equal(features.layers[-1].cls[0], features.cls[0])
        assert features.layers[0].patches.shape == (1, 256, 4)
        with pytest.raises(InvalidRequest, match="no register tokens"):
            client.extract(pixels, "registers", preset="none")
