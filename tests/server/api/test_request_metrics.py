"""Bytes and requests in flight, as the metrics count them."""

from __future__ import annotations

import grpc
import pytest

from dinov3_serving.v1 import feature_service_pb2 as pb
from tests.server.api.rig import encoded, picture, serving
from tests.support.waiting import until_async

REQUEST = pb.ExtractRequest(images=[encoded(picture(16, 16))])


async def test_a_unary_call() -> None:
    async with serving() as rig:
        assert rig.metrics.requests_in_flight.snapshot() == {
            ("Extract",): (0,),
            ("ExtractStream",): (0,),
            ("GetModel",): (0,),
        }
        rig.engine.hold = True
        call = rig.stub.Extract(REQUEST)
        run = await rig.engine.runs.get()
        assert rig.count("dinov3_requests_in_flight", "Extract") == 1
        assert rig.count("dinov3_request_bytes_total", "Extract") == len(REQUEST.SerializeToString())
        assert rig.count("dinov3_response_bytes_total", "Extract") == 0
        run.go.set_result(None)
        answer = await call
        await until_async(lambda: rig.count("dinov3_requests_in_flight", "Extract") == 0)
        assert rig.count("dinov3_response_bytes_total", "Extract") == len(answer.SerializeToString())


async def test_a_cancelled_call_is_not_in_flight() -> None:
    async with serving() as rig:
        rig.engine.hold = True
        call = rig.stub.Extract(REQUEST)
        await until_async(lambda: rig.count("dinov3_requests_in_flight", "Extract") == 1)
        call.cancel()
        await until_async(lambda: rig.count("dinov3_requests_in_flight", "Extract") == 0)


async def test_each_message_of_a_stream() -> None:
    async with serving() as rig:
        rig.engine.hold = True
        messages = [pb.ExtractStreamRequest(id=index, request=REQUEST) for index in range(3)]
        call = rig.stub.ExtractStream(iter(messages))
        await until_async(lambda: rig.count("dinov3_requests_in_flight", "ExtractStream") == 3)
        assert rig.count("dinov3_request_bytes_total", "ExtractStream") == sum(map(_size, messages))
        for _ in messages:
            (await rig.engine.runs.get()).go.set_result(None)
        answers = [await call.read() for _ in messages]
        assert await call.read() is grpc.aio.EOF
        await until_async(lambda: rig.count("dinov3_requests_in_flight", "ExtractStream") == 0)
        assert rig.count("dinov3_response_bytes_total", "ExtractStream") == sum(map(_size, answers))


async def test_an_unknown_method_is_counted_from_0() -> None:
    async with serving() as rig:
        assert rig.metrics.requests.snapshot() == {("other", "UNIMPLEMENTED"): (0,)}
        method = rig.channel.unary_unary("/dinov3_serving.v1.FeatureService/Nothing")
        with pytest.raises(grpc.aio.AioRpcError, match="UNIMPLEMENTED"):
            await method(b"")
        assert rig.metrics.requests.snapshot() == {("other", "UNIMPLEMENTED"): (1,)}


def _size(one: pb.ExtractStreamRequest | pb.ExtractStreamResponse) -> int:
    return len(one.SerializeToString())
