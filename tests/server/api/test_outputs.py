"""Options of outputs: pooling, projections, layout, int8, fingerprints, and their errors."""

from __future__ import annotations

import dataclasses
from typing import Any

import grpc
import numpy as np
import pytest

from dinov3_server.models.interface import Output, Projection
from dinov3_serving.v1 import feature_service_pb2 as pb
from tests.server.api.rig import AS_IS, MODEL, Rig, encoded, features, picture, serving, tensor

NARROW, WIDE = Projection("narrow", 8, 3, "aaaa"), Projection("wide", 24, 5, "bbbb")
GIFTED = dataclasses.replace(MODEL, projections=(NARROW, WIDE))
PHOTO = picture(32, 48)
PATCHES = Output("patches")


def request(fingerprint: str = "", **outputs: Any) -> pb.ExtractRequest:
    return pb.ExtractRequest(
        pixels=tensor(PHOTO[None]),
        preprocessing=AS_IS,
        outputs=pb.Outputs(**outputs),
        fingerprint=fingerprint,
    )


async def block(rig: Rig, **outputs: Any) -> pb.FeatureBlock:
    [answered] = (await rig.stub.Extract(request(**outputs))).blocks
    return answered


async def test_pooling_changes_patches_and_grids_only() -> None:
    async with serving() as rig:
        layers = [pb.LayerOutputs(layer=0, patches=True, cls=True)]
        pooling = pb.Pooling(grid_height=3, grid_width=1)
        answer = await block(rig, cls=True, patches=True, registers=True, layers=layers, pooling=pooling)
        assert (answer.grid_height, answer.grid_width) == (3, 1)
        assert [list(t.shape) for t in (answer.cls, answer.patches, answer.registers)] == [
            [1, 24],
            [1, 3, 24],
            [1, 4, 24],
        ]
        [layer] = answer.layers
        assert (layer.grid_height, layer.grid_width, list(layer.patches.shape)) == (3, 1, [1, 3, 8])
        assert rig.engine.done_runs[-1].block.spec.pooling == ("area", 3, 1)
        pooling.method = pb.POOLING_METHOD_BILINEAR
        await block(rig, pooling=pooling)
        assert rig.engine.done_runs[-1].block.spec.pooling == ("bilinear", 3, 1)


async def test_a_projection_and_channels_first_change_patches_only() -> None:
    async with serving() as rig:
        rig.engine.model = GIFTED
        answer = await block(rig, projection="wide", patch_layout=pb.PATCH_LAYOUT_CHANNELS_FIRST)
        assert (list(answer.cls.shape), list(answer.patches.shape)) == ([1, 24], [1, 5, 2, 3])
        assert (answer.grid_height, answer.grid_width) == (2, 3)
        [layer] = (await block(rig, layers=[pb.LayerOutputs(layer=0, patches=True)], projection="narrow")).layers
        assert list(layer.patches.shape) == [1, 4 * 6, 3]


async def test_int8_has_one_scale_per_token() -> None:
    async with serving() as rig:
        answer = await block(rig, cls=True, patches=True, registers=True, dtype=pb.DATA_TYPE_INT8)
        assert len(answer.patches.data) == 6 * 24
        for sent, tokens in ((answer.cls, 1), (answer.patches, 6), (answer.registers, 4)):
            assert (sent.dtype, len(sent.scales)) == (pb.DATA_TYPE_INT8, 4 * tokens)
        pixels = PHOTO.tobytes()
        assert answer.patches.data == features(pixels, PATCHES, 6 * 24)
        assert answer.patches.scales == features(pixels, PATCHES, 6 * 4)


async def test_a_failed_image_has_zero_scales() -> None:
    async with serving() as rig:
        images = [encoded(PHOTO), pb.Image(encoded=b"no image"), encoded(PHOTO)]
        preprocessing = pb.Preprocessing(size=pb.Size(height=32, width=48))
        asked = pb.ExtractRequest(
            images=images, preprocessing=preprocessing, outputs=pb.Outputs(dtype=pb.DATA_TYPE_INT8)
        )
        [answer] = (await rig.stub.Extract(asked)).blocks
        scales = np.frombuffer(answer.patches.scales, np.uint8).reshape(3, -1)
        assert (scales.any(1).tolist(), scales.shape) == ([True, False, True], (3, 6 * 4))


async def test_get_model_lists_the_projections() -> None:
    async with serving() as rig:
        rig.engine.model = GIFTED
        model = await rig.stub.GetModel(pb.GetModelRequest())
        assert model.fingerprint == MODEL.fingerprint
        assert list(model.projections) == [
            pb.Projection(name="narrow", input_channels=8, output_channels=3, fingerprint="aaaa"),
            pb.Projection(name="wide", input_channels=24, output_channels=5, fingerprint="bbbb"),
        ]


async def test_a_request_may_pin_the_fingerprint_of_the_model_or_of_the_answer() -> None:
    async with serving() as rig:
        rig.engine.model = GIFTED
        whole = f"{MODEL.fingerprint}+bbbb"
        for pin in ("", MODEL.fingerprint, whole):
            assert (await rig.stub.Extract(request(pin, projection="wide"))).fingerprint == whole
        assert (await rig.stub.Extract(request(MODEL.fingerprint))).fingerprint == MODEL.fingerprint
        for pin, outputs in (
            (whole, {}),
            (f"{MODEL.fingerprint}+aaaa", {"projection": "wide"}),
            (f"{MODEL.fingerprint}+cccc", {"projection": "gone"}),
            ("other", {"projection": "gone"}),
        ):
            error = await rig.error(request(pin, **outputs))
            assert error.code == grpc.StatusCode.FAILED_PRECONDITION
            assert MODEL.fingerprint in error.message
            assert pin in error.message


async def test_an_answer_without_rows_has_the_fingerprint_of_the_answer() -> None:
    async with serving() as rig:
        rig.engine.model = GIFTED
        asked = pb.ExtractRequest(
            images=[pb.Image(encoded=b"?")], preprocessing=AS_IS, outputs=pb.Outputs(projection="wide")
        )
        answer = await rig.stub.Extract(asked)
        assert (len(answer.blocks), answer.fingerprint) == (0, f"{MODEL.fingerprint}+bbbb")


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"pooling": pb.Pooling()}, "pooling.grid_height", "grid_height is 0"),
    ({"pooling": pb.Pooling(grid_height=2)}, "pooling.grid_width", "grid_width is 0"),
    (
        {"pooling": pb.Pooling(grid_height=20, grid_width=16)},
        "pooling",
        "20x16 is 320 patches an image; allowed are 300",
    ),
    ({"pooling": pb.Pooling(grid_height=2**32 - 1, grid_width=2**32 - 1)}, "pooling", "allowed are 300"),
    (
        {"pooling": pb.Pooling(grid_height=1, grid_width=1, method=9)},  # type: ignore[arg-type]
        "pooling.method",
        "method is 9; allowed are POOLING_METHOD_AREA, POOLING_METHOD_BILINEAR",
    ),
    (
        {"patch_layout": 7},
        "patch_layout",
        "patch_layout is 7; allowed are PATCH_LAYOUT_TOKENS, PATCH_LAYOUT_CHANNELS_FIRST",
    ),
    ({"dtype": 99}, "dtype", "dtype is 99; allowed are .*DATA_TYPE_INT8"),
    ({"dtype": pb.DATA_TYPE_UINT8}, "dtype", "dtype is DATA_TYPE_UINT8; allowed are"),
    ({"projection": "none"}, "projection", "there is no projection 'none': allowed are narrow, wide"),
    (
        {"projection": "narrow"},
        "projection",
        "'narrow' takes 8 channels, and the patches have 24; projections for 24 channels: wide",
    ),
    (
        {"projection": "wide", "layers": [pb.LayerOutputs(layer=0, patches=True)]},
        "projection",
        "'wide' takes 24 channels, and the patches of layer 0 have 8; projections for 8 channels: narrow",
    ),
]


@pytest.mark.parametrize(("outputs", "field", "message"), BAD)
async def test_invalid_outputs_are_explained(outputs: dict[str, Any], field: str, message: str) -> None:
    async with serving(max_batch_tokens=300) as rig:
        rig.engine.model = GIFTED
        error = await rig.error(request(**outputs))
        assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, f"outputs.{field}")
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(error.message)


async def test_a_pooled_grid_may_be_as_large_as_an_image() -> None:
    async with serving(max_batch_tokens=300) as rig:
        answer = await block(rig, patches=True, pooling=pb.Pooling(grid_height=20, grid_width=15))
        assert list(answer.patches.shape) == [1, 300, 24]


async def test_projections_of_a_server_without_any_are_refused() -> None:
    async with serving() as rig:
        error = await rig.error(request(projection="wide"))
        assert error.message == "there is no projection 'wide': the server was started with none (--projections)"


async def test_a_projection_does_not_concern_layers_without_patches() -> None:
    """A projection applies to all requested patches; a layer without patches does not need to fit it."""
    async with serving() as rig:
        rig.engine.model = GIFTED
        layers = [pb.LayerOutputs(layer=0, cls=True)]
        answer = await block(rig, patches=True, layers=layers, projection="wide")
        assert (list(answer.patches.shape), list(answer.layers[0].cls.shape)) == ([1, 6, 5], [1, 8])


async def test_the_size_of_a_too_large_answer_includes_scales() -> None:
    async with serving(max_message_bytes=2**20) as rig:
        outputs = pb.Outputs(
            cls=True,
            patches=True,
            pooling=pb.Pooling(grid_height=100, grid_width=100),
            dtype=pb.DATA_TYPE_INT8,
        )
        pixels = tensor(np.stack([PHOTO] * 8))
        error = await rig.error(pb.ExtractRequest(pixels=pixels, preprocessing=AS_IS, outputs=outputs))
        assert error.field == "outputs"
        assert "8 image(s) of 32x48 at 280028 bytes (cls 28, patches 280000)" in error.message
        assert error.message.endswith("in int8)")


@pytest.mark.parametrize("field", ["pixels", "images"])
async def test_int8_pixels_are_refused(field: str) -> None:
    given = pb.Tensor(dtype=pb.DATA_TYPE_INT8, shape=[32, 48, 3], data=PHOTO.tobytes())
    if field == "pixels":
        given.shape.insert(0, 1)
        asked = pb.ExtractRequest(pixels=given, preprocessing=AS_IS)
    else:
        asked = pb.ExtractRequest(images=[pb.Image(pixels=given)], preprocessing=AS_IS)
    async with serving() as rig:
        if field == "pixels":
            assert "pixels cannot be DATA_TYPE_INT8" in (await rig.error(asked)).message
        else:
            [error] = (await rig.stub.Extract(asked)).errors
            assert "pixels cannot be DATA_TYPE_INT8" in error.status.message
