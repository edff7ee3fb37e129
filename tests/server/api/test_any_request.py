"""Requests with arbitrary fields: the answer is features or an error of the caller, never INTERNAL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import Message
from grpc_reflection.v1alpha import reflection_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from dinov3_server.api.convert import count_images, read_request
from dinov3_server.api.extraction import plan_blocks
from dinov3_server.api.outputs import check_answer_size
from dinov3_server.api.reflection import reflection_handlers
from dinov3_server.config.settings import Settings
from dinov3_server.errors import InternalError, InvalidInput, ModelMismatch
from dinov3_serving.v1 import feature_service_pb2 as pb
from tests.server.api.messages import messages, mutated
from tests.server.api.rig import AS_IS, MODEL, encoded, failure_of, picture, serving, tensor

LIMITS = Settings(max_images_per_request=8)
VALID = pb.ExtractRequest(
    images=[
        pb.Image(
            encoded=encoded(picture(40, 40)).encoded,
            views=[
                pb.View(crop=pb.Box(top=1, left=2, height=16, width=32), size=pb.Size(height=16, width=16)),
                pb.View(horizontal_flip=True, interpolation=pb.INTERPOLATION_BICUBIC),
            ],
        ),
        pb.Image(pixels=tensor(picture(16, 16))),
        pb.Image(pixels=tensor(np.zeros((3, 16, 16), np.float32))),
    ],
    preprocessing=pb.Preprocessing(preset=pb.PRESET_HF, size=pb.Size(height=32, width=32)),
    outputs=pb.Outputs(
        cls=True,
        layers=[pb.LayerOutputs(layer=2, patches=True)],
        dtype=pb.DATA_TYPE_INT8,
        pooling=pb.Pooling(grid_height=2, grid_width=3),
    ),
    model=MODEL.name,
    fingerprint=MODEL.fingerprint,
)
PACKED = pb.ExtractRequest(
    pixels=tensor(picture(16, 16)[np.newaxis]), preprocessing=AS_IS, outputs=pb.Outputs(patches=True)
)


@st.composite
def mutants(draw: st.DrawFn, of: Message) -> Any:
    message = type(of)()
    message.CopyFrom(of)
    for _ in range(draw(st.integers(1, 3))):
        mutated(draw, message)
    return message


def read(request: pb.ExtractRequest) -> None:
    """Do what a frontend does with a request before it reserves memory."""
    assert count_images(request) >= 0
    with suppress(InvalidInput, ModelMismatch):
        query = read_request(request, bytes, MODEL, LIMITS)
        for index, source in enumerate(query.sources):
            if source.rows_with_size and source.file:
                try:
                    assert source.cost
                    source.cost()
                    query.sources[index] = source._replace(rows=source.rows_with_size(source.file.read_size()))
                except InvalidInput as error:
                    query.failures[source.image] = error
        placed = plan_blocks(query, MODEL)
        if placed:
            check_answer_size([one.block for one in placed], MODEL, query.fingerprint, LIMITS.max_message_bytes)
        assert not any(isinstance(error, InternalError) for error in query.failures.values())


@settings(max_examples=400, deadline=None)
@given(messages(pb.ExtractRequest.DESCRIPTOR))
def test_any_fields_together(request: pb.ExtractRequest) -> None:
    read(request)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from([VALID, PACKED]).flatmap(mutants))
def test_a_valid_request_with_some_fields_changed(request: pb.ExtractRequest) -> None:
    read(request)


@pytest.mark.parametrize("shape", [(), (1,), (0, 0, 0, 0), (-1, 16, 16, 3), (2**63 - 1,) * 3 + (3,), (1, 16, 16, 3, 1)])
@pytest.mark.parametrize("dtype", [pb.DATA_TYPE_UINT8, pb.DATA_TYPE_FLOAT32])
def test_invalid_packed_pixels_are_refused(shape: tuple[int, ...], dtype: pb.DataType) -> None:
    with pytest.raises(InvalidInput) as error:
        read_request(pb.ExtractRequest(pixels=pb.Tensor(dtype=dtype, shape=shape)), bytes, MODEL, LIMITS)
    assert error.value.field in ("pixels.shape", "pixels.data")


async def test_a_tensor_without_a_shape_is_invalid() -> None:
    async with serving() as rig:
        call = rig.channel.unary_unary("/dinov3_serving.v1.FeatureService/Extract")(bytes.fromhex("12020801"))
        error = await failure_of(call)
        assert (error.code.name, error.field) == ("INVALID_ARGUMENT", "pixels.shape")


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"timeout_seconds": float("nan")}, 3),
        ({"timeout_seconds": float("inf")}, 3),
        ({"timeout_seconds": -1.0}, 3),
        ({"timeout_seconds": 3.4e38}, 0),
        ({"timeout_seconds": -0.0}, 0),
        ({"id": 2**64 - 1}, 0),
    ],
)
async def test_stream_messages_with_values_at_the_edge(fields: dict[str, Any], code: int) -> None:
    async with serving() as rig:
        call = rig.stub.ExtractStream(iter([pb.ExtractStreamRequest(request=PACKED, **fields)]))
        answer = await call.read()
        assert (answer.id, answer.error.code) == (fields.get("id", 0), code)


@settings(max_examples=200, deadline=None)
@given(messages(reflection_pb2.ServerReflectionRequest.DESCRIPTOR))
def test_reflection_answers_any_request(question: reflection_pb2.ServerReflectionRequest) -> None:
    details = SimpleNamespace(method="/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")
    method = reflection_handlers(("a.Service",))[0].service(details)

    async def ask() -> None:
        async def data() -> AsyncIterator[bytes]:
            yield question.SerializeToString()

        [answer] = [each async for each in method.stream_stream(data(), None)]
        assert answer.original_request == question

    asyncio.run(ask())
