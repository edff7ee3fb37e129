"""Extract over the wire: every image gets the features of its own pixels, in every form that a request can take."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from dinov3_server.errors import InternalError
from dinov3_server.models.interface import Output, OutputParity, ParityCheck
from dinov3_serving.v1 import feature_service_pb2 as pb
from tests.server.api.rig import AS_IS, MODEL, encoded, failure_of_status, features, picture, png, serving, tensor

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {
    pb.DATA_TYPE_FLOAT32: np.dtype("float32"),
    pb.DATA_TYPE_FLOAT16: np.dtype("float16"),
    pb.DATA_TYPE_BFLOAT16: BF16,
}


def expected(
    pixels: np.ndarray, output: Output, tokens: int, dtype: np.dtype = BF16, channels: int = MODEL.embed_dim
) -> bytes:
    return features(pixels.tobytes(), output, tokens * channels * dtype.itemsize)


def rows_of(message: pb.Tensor) -> list[bytes]:
    assert len(message.data) == np.prod(message.shape) * DTYPES[message.dtype].itemsize
    step = len(message.data) // message.shape[0]
    return [message.data[start : start + step] for start in range(0, len(message.data), step)]


async def test_listed_files_are_resized_by_the_preset() -> None:
    photos = [picture(40, 50, seed) for seed in range(5)]
    async with serving() as rig:
        answer = await rig.stub.Extract(pb.ExtractRequest(images=[encoded(photo) for photo in photos]))
        [block] = answer.blocks
        assert (block.input_size.height, block.input_size.width) == (256, 256)
        assert (block.grid_height, block.grid_width) == (16, 16)
        assert list(block.image_indices) == [0, 1, 2, 3, 4]
        assert list(block.cls.shape) == [5, 24]
        assert list(block.patches.shape) == [5, 256, 24]
        assert not block.HasField("registers")
        assert not block.layers
        resized = [np.asarray(Image.fromarray(p).resize((256, 256), Image.Resampling.BILINEAR)) for p in photos]
        assert rows_of(block.cls) == [expected(p, Output("cls"), 1) for p in resized]
        assert rows_of(block.patches) == [expected(p, Output("patches"), 256) for p in resized]
        assert not answer.errors
        assert answer.fingerprint == MODEL.fingerprint
        assert answer.frontend == 1
        assert answer.timings.decode_seconds > 0
        assert (answer.timings.queue_seconds, answer.timings.inference_seconds) == (0.25, 0.5)
        assert (answer.timings.batch_images, answer.timings.batches) == (8, 2)
        assert rig.count("dinov3_images_total", "ok") == 5
        assert rig.count("dinov3_stage_seconds", "decode") == 5
        assert rig.count("dinov3_stage_seconds", "respond") == 1
        assert rig.count("dinov3_requests_total", "Extract", "OK") == 1
        assert rig.count("dinov3_request_seconds", "Extract") == 1


@pytest.mark.parametrize("dtype", DTYPES)
async def test_packed_pixels_all_outputs_and_dtypes(dtype: pb.DataType) -> None:
    photos = np.stack([picture(32, 48, seed) for seed in range(7)])
    outputs = pb.Outputs(cls=True, patches=True, registers=True, dtype=dtype)
    outputs.layers.add(layer=5, patches=True)
    outputs.layers.add(layer=0, cls=True, registers=True, skip_norm=True)
    outputs.layers.add(layer=0, patches=True)
    async with serving() as rig:
        request = pb.ExtractRequest(pixels=tensor(photos), preprocessing=AS_IS, outputs=outputs)
        answer = await rig.stub.Extract(request)
        [block] = answer.blocks
        numpy_dtype = DTYPES[dtype]
        layers = [(entry.layer, entry) for entry in block.layers]
        assert [layer for layer, _ in layers] == [5, 0, 0]
        # Layer 0 has fewer channels than the others, and a finer grid.
        assert [(entry.grid_height, entry.grid_width) for entry in block.layers] == [(2, 3), (4, 6), (4, 6)]
        for message, output, tokens, channels in (
            (block.cls, Output("cls"), 1, 24),
            (block.patches, Output("patches"), 6, 24),
            (block.registers, Output("registers"), 4, 24),
            (block.layers[0].patches, Output("patches", 5), 6, 24),
            (block.layers[1].cls, Output("cls", 0, norm=False), 1, 8),
            (block.layers[1].registers, Output("registers", 0, norm=False), 4, 8),
            (block.layers[2].patches, Output("patches", 0), 24, 8),
        ):
            assert message.dtype == dtype
            assert list(message.shape) == ([7, channels] if output.kind == "cls" else [7, tokens, channels])
            assert rows_of(message) == [expected(photo, output, tokens, numpy_dtype, channels) for photo in photos]
        assert not block.layers[0].HasField("cls")


async def test_with_layers_only_there_are_no_final_features() -> None:
    outputs = pb.Outputs(layers=[pb.LayerOutputs(layer=3, cls=True)])
    async with serving() as rig:
        request = pb.ExtractRequest(images=[encoded(picture(9, 9))], outputs=outputs)
        [block] = (await rig.stub.Extract(request)).blocks
        assert not block.HasField("cls")
        assert not block.HasField("patches")
        assert [entry.layer for entry in block.layers] == [3]


async def test_packed_floats_are_not_resized() -> None:
    pixels = np.stack([picture(32, 16, seed) for seed in range(3)]).transpose(0, 3, 1, 2).astype(np.float32) / 255
    pixels = np.ascontiguousarray(pixels)
    async with serving() as rig:
        # The preset, which would resize, does not apply to them.
        [block] = (await rig.stub.Extract(pb.ExtractRequest(pixels=tensor(pixels)))).blocks
        assert (block.input_size.height, block.input_size.width) == (32, 16)
        assert rows_of(block.cls) == [expected(one, Output("cls"), 1) for one in pixels]
        [run] = rig.engine.done_runs
        assert run.block.shape == (32, 16, "float32")


async def test_packed_pixels_of_another_size_are_resized() -> None:
    photos = np.stack([picture(60, 90, seed) for seed in range(3)])
    size = pb.Preprocessing(size=pb.Size(height=32, width=64), interpolation=pb.INTERPOLATION_NEAREST)
    async with serving() as rig:
        [block] = (await rig.stub.Extract(pb.ExtractRequest(pixels=tensor(photos), preprocessing=size))).blocks
        resized = [np.asarray(Image.fromarray(p).resize((64, 32), Image.Resampling.NEAREST)) for p in photos]
        assert rows_of(block.cls) == [expected(p, Output("cls"), 1) for p in resized]


async def test_each_size_is_a_block_in_order_of_first_use() -> None:
    sizes = [(32, 32), (16, 48), (32, 32), (48, 16), (16, 48), (32, 32)]
    photos = [picture(*size, seed) for seed, size in enumerate(sizes)]
    images = [encoded(p) if i % 2 else pb.Image(pixels=tensor(p)) for i, p in enumerate(photos)]
    async with serving() as rig:
        answer = await rig.stub.Extract(pb.ExtractRequest(images=images, preprocessing=AS_IS))
        assert [list(block.image_indices) for block in answer.blocks] == [[0, 2, 5], [1, 4], [3]]
        for block in answer.blocks:
            assert rows_of(block.cls) == [expected(photos[i], Output("cls"), 1) for i in block.image_indices]
            assert rows_of(block.patches) == [
                expected(photos[i], Output("patches"), block.grid_height * block.grid_width)
                for i in block.image_indices
            ]
        assert answer.timings.batches == 6
        assert answer.timings.inference_seconds == 1.5


async def test_uint8_and_float_of_one_size_share_a_block() -> None:
    photos = [picture(32, 32, seed) for seed in range(5)]
    floats = {1: photos[1], 2: photos[2], 4: photos[4]}
    pixels = [
        np.ascontiguousarray(p.transpose(2, 0, 1), dtype=np.float32) if i in floats else p for i, p in enumerate(photos)
    ]
    async with serving() as rig:
        request = pb.ExtractRequest(images=[pb.Image(pixels=tensor(p)) for p in pixels], preprocessing=AS_IS)
        [block] = (await rig.stub.Extract(request)).blocks
        assert list(block.image_indices) == [0, 1, 2, 3, 4]
        assert rows_of(block.patches) == [expected(p, Output("patches"), 4) for p in pixels]
        assert len(rig.engine.done_runs) == 2


async def test_a_bad_image_fails_alone_and_its_row_is_zero() -> None:
    photos = [picture(20, 20, seed) for seed in range(6)]
    images = [encoded(p) for p in photos]
    images[1] = pb.Image(encoded=png(photos[1])[:60])
    images[3] = pb.Image()
    images[4] = pb.Image(pixels=pb.Tensor(dtype=pb.DATA_TYPE_UINT8, shape=[4, 4, 3], data=b"short"))
    async with serving() as rig:
        answer = await rig.stub.Extract(pb.ExtractRequest(images=images))
        assert [error.image_index for error in answer.errors] == [1, 3, 4]
        failures = [failure_of_status(error.status) for error in answer.errors]
        assert [each.code.name for each in failures] == ["INVALID_ARGUMENT"] * 3
        assert [each.field for each in failures] == ["images[1].encoded", "images[3]", "images[4].pixels.data"]
        [block] = answer.blocks
        assert list(block.image_indices) == [0, 1, 2, 3, 4, 5]
        good = [0, 2, 5]
        resized = [np.asarray(Image.fromarray(p).resize((256, 256), Image.Resampling.BILINEAR)) for p in photos]
        for tensor_of, output, tokens in (
            (block.cls, Output("cls"), 1),
            (block.patches, Output("patches"), 256),
        ):
            rows = rows_of(tensor_of)
            for image in range(6):
                if image in good:
                    assert rows[image] == expected(resized[image], output, tokens)
                else:
                    assert not any(rows[image])
        [run] = rig.engine.done_runs
        assert run.rows == good  # the others never went to the device
        assert rig.count("dinov3_images_total", "ok") == 3
        assert rig.count("dinov3_images_total", "invalid") == 3


async def test_a_bad_image_of_unknown_size_has_no_row() -> None:
    images = [pb.Image(encoded=b"no image"), encoded(picture(32, 32)), encoded(picture(33, 32))]
    async with serving() as rig:
        answer = await rig.stub.Extract(pb.ExtractRequest(images=images, preprocessing=AS_IS))
        assert [list(block.image_indices) for block in answer.blocks] == [[1]]
        failures = {error.image_index: failure_of_status(error.status) for error in answer.errors}
        assert failures[0].field == "images[0].encoded"
        assert "33x32" in failures[2].message
        assert "nearest: 32 or 48" in failures[2].message


@pytest.mark.parametrize("preprocessing", [AS_IS, pb.Preprocessing()])
async def test_a_request_of_bad_images_only_is_answered(preprocessing: pb.Preprocessing) -> None:
    images = [pb.Image(encoded=b"no image")] * 3
    async with serving() as rig:
        answer = await rig.stub.Extract(pb.ExtractRequest(images=images, preprocessing=preprocessing))
        assert [error.image_index for error in answer.errors] == [0, 1, 2]
        assert [len(block.image_indices) for block in answer.blocks] == ([] if preprocessing == AS_IS else [3])
        assert rig.count("dinov3_requests_total", "Extract", "OK") == 1


async def test_a_row_that_the_engine_fails_is_an_error_of_its_image() -> None:
    photos = [picture(32, 32, seed) for seed in range(4)]
    async with serving() as rig:
        error = InternalError("features are not finite")
        rig.engine.bad_rows = {2: error}
        request = pb.ExtractRequest(pixels=tensor(np.stack(photos)), preprocessing=AS_IS)
        answer = await rig.stub.Extract(request)
        [failed] = answer.errors
        assert failed.image_index == 2
        failure = failure_of_status(failed.status)
        assert failure.code.name == "INTERNAL"
        assert error.error_id in failure.message
        rows = rows_of(answer.blocks[0].cls)
        assert [any(row) for row in rows] == [True, True, False, True]
        assert rig.count("dinov3_images_total", "failed") == 1


async def test_rows_that_the_engine_fails_have_the_index_of_their_image() -> None:
    sizes = [(16, 16), (32, 16), (16, 16), (32, 16)]
    photos = [pb.Image(pixels=tensor(picture(*size, seed))) for seed, size in enumerate(sizes)]
    async with serving() as rig:
        rig.engine.bad_rows = {1: InternalError("features are not finite")}
        answer = await rig.stub.Extract(pb.ExtractRequest(images=photos, preprocessing=AS_IS))
        assert [error.image_index for error in answer.errors] == [2, 3]
        for block, bad in zip(answer.blocks, (2, 3), strict=True):
            assert [any(row) for row in rows_of(block.cls)] == [True, False]
            assert block.image_indices[1] == bad


async def test_an_invalid_float_tensor_has_no_row() -> None:
    """It would be its own input size; the preset's, which files have, is not its."""
    images = [encoded(picture(9, 9)), pb.Image(pixels=pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=[3, 16, 15]))]
    async with serving() as rig:
        answer = await rig.stub.Extract(pb.ExtractRequest(images=images))
        assert [list(block.image_indices) for block in answer.blocks] == [[0]]
        assert [error.image_index for error in answer.errors] == [1]


@pytest.mark.parametrize("value", [np.inf, -np.inf, 1e30, -1e30, 1001.0])
async def test_floats_that_are_not_pixels_fail_their_image(value: float) -> None:
    pixels = np.zeros((3, 3, 16, 16), np.float32)
    pixels[0, 0, 0, 0], pixels[2, 0, 0, 0] = 1000, -1000
    pixels[1, 0, 3, 3] = np.nan
    pixels[1, 2, 0, 0] = value
    async with serving() as rig:
        answer = await rig.stub.Extract(pb.ExtractRequest(pixels=tensor(pixels)))
        [error] = answer.errors
        assert error.image_index == 1
        failure = failure_of_status(error.status)
        assert failure.field == "pixels.data"
        assert "2 of 768 pixel values are NaN or beyond 1000" in failure.message
        assert [any(row) for row in rows_of(answer.blocks[0].cls)] == [True, False, True]


async def test_priority_and_deadline_reach_the_engine() -> None:
    loop = asyncio.get_running_loop()
    async with serving() as rig:
        image = encoded(picture(16, 16))
        before = loop.time()
        await rig.stub.Extract(pb.ExtractRequest(images=[image], priority=pb.PRIORITY_BULK), timeout=1000)
        await rig.stub.Extract(pb.ExtractRequest(images=[image]))
        bulk, other = rig.engine.done_runs
        assert bulk.bulk
        assert bulk.deadline is not None
        # gRPC sends a timeout with three digits, rounded up: a little over 1000 s arrives as 1010.
        assert before + 990 < bulk.deadline <= loop.time() + 1010
        assert not other.bulk
        assert other.deadline is None


async def test_concurrent_requests_get_their_own_features() -> None:
    async with serving() as rig:
        photos = [picture(32, 32, seed) for seed in range(24)]

        async def one(index: int) -> None:
            mine = [photos[index], photos[(index * 7 + 1) % 24]]
            request = pb.ExtractRequest(images=[encoded(p) for p in mine], preprocessing=AS_IS)
            [block] = (await rig.stub.Extract(request)).blocks
            assert rows_of(block.cls) == [expected(p, Output("cls"), 1) for p in mine]

        await asyncio.gather(*map(one, range(24)))


async def test_get_model() -> None:
    async with serving(max_message_bytes=2**20, max_batch_tokens=300, stream_window=5) as rig:
        model = await rig.stub.GetModel(pb.GetModelRequest())
        assert (model.model, model.weights, model.random_weights) == ("dinov3_test16", "random:7", True)
        assert model.fingerprint == MODEL.fingerprint
        assert model.dtype == pb.DATA_TYPE_BFLOAT16
        assert list(model.devices) == ["cpu", "cpu"]
        assert (model.embed_dim, model.depth, model.patch_size, model.register_tokens) == (24, 6, 16, 4)
        assert list(model.layer_dims) == [8, 24, 24, 24, 24, 24]
        assert list(model.layer_strides) == [8, 16, 16, 16, 16, 16]
        assert list(model.mean) == pytest.approx(MODEL.mean)
        assert list(model.std) == pytest.approx(MODEL.std)
        assert model.parameters == 12345
        assert model.limits == pb.ServerLimits(
            max_message_bytes=2**20,
            max_images_per_request=512,
            max_image_pixels=100_000_000,
            max_image_tokens=300,
            stream_window=5,
        )
        assert (model.frontends, model.frontend) == (3, 1)
        assert model.server_version
        assert rig.count("dinov3_requests_total", "GetModel", "OK") == 1


async def test_get_model_has_the_parity_check() -> None:
    proofs = (OutputParity("cls", "float32", 0.999999, 2e-6), OutputParity("cls", "bfloat16", 0.9995, 0.0125))
    parity_check = ParityCheck(
        verified=True,
        reason="",
        upstream_revision="6876159a",
        outputs=proofs,
        time="2026-01-02T03:04:05Z",
        not_covered="The size of the moon.",
    )
    async with serving() as rig:
        unchecked = (await rig.stub.GetModel(pb.GetModelRequest())).parity_check
        assert (unchecked.verified, unchecked.reason) == (False, "no comparison was run")
        rig.engine.model = replace(MODEL, parity_check=parity_check)
        parity = (await rig.stub.GetModel(pb.GetModelRequest())).parity_check
    assert parity.verified
    assert (parity.upstream_revision, parity.time) == ("6876159a", "2026-01-02T03:04:05Z")
    assert parity.not_covered == "The size of the moon."
    assert [
        (proof.output, proof.dtype, pytest.approx(proof.least_cosine), pytest.approx(proof.relative_error))
        for proof in parity.outputs
    ] == [("cls", pb.DATA_TYPE_FLOAT32, 0.999999, 2e-6), ("cls", pb.DATA_TYPE_BFLOAT16, 0.9995, 0.0125)]
