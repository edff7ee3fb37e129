"""The overload leg's arithmetic, and its generator before a server that refuses what it cannot take."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from bench import overload
from dinov3_serving.v1 import feature_service_pb2 as pb


def use(images: float, beside: float, seconds: float = 10.0, **more: Any) -> dict[str, Any]:
    none = {"generator": 0.0, "late": 0.0, "busy": 9.0, "computed": images, "batches": 10.0, "refused_ms": [1.0, 5.0]}
    return none | {"images": images, "beside": beside, "seconds": seconds} | more


def row(sent: overload.Sent, of: dict[str, Any], closed: dict[str, Any], capacity: float) -> dict[str, Any]:
    loop = {"model": "vits16", "load": 2.0, "deadline": 2.0, "sent": sent, "use": of}
    return overload._row(loop, closed, capacity, "224", 1)


def test_goodput_is_what_was_answered_of_the_capacity_that_refusals_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overload, "CORES", 2)
    sent = overload.Sent(10.0)
    sent.codes.update({grpc.StatusCode.OK: 450, grpc.StatusCode.RESOURCE_EXHAUSTED: 540})
    sent.codes[grpc.StatusCode.DEADLINE_EXCEEDED] = 10
    # 500 images took 1 s beside the device in the closed loop. Of 3 s here, 2.1 s are for what was refused.
    got = row(sent, use(450, beside=3.0, late=0.09), use(500, beside=1.0), capacity=50.0)
    assert (got["load"], got["of_capacity"], got["of_offered"], got["expired"]) == (2.0, 0.9, 0.45, 10)
    assert got["of_left"] == pytest.approx(45 / (50 * (1 - 2.1 / 20)), abs=1e-3)
    assert got["late"] == 0.01


def test_a_quantile_is_the_bound_of_its_bucket() -> None:
    name = "dinov3_refusal_seconds_bucket"
    grown = {(name, "0.001"): 90.0, (name, "0.005"): 98.0, (name, "0.01"): 100.0, (name, "+Inf"): 100.0}
    assert [overload._quantile(grown, part) for part in (0.5, 0.98, 0.99)] == [1.0, 5.0, 10.0]
    assert overload._quantile(dict.fromkeys(grown, 0.0), 0.99) is None


async def test_the_open_loop_sends_on_whatever_becomes_of_its_requests() -> None:
    async def extract(data: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        if data == b"bad":
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        return b""

    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(extract)
    service, _, method = overload.METHOD[1:].partition("/")
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    generator = overload.Generator(f"127.0.0.1:{port}", [b"good", b"bad"])
    sent = await generator.open(rate=2000.0, deadline=5.0, seconds=-4.95, seed=0)
    assert sent.codes == {}  # nothing was sent after the warm-up
    sent = await generator.open(rate=200.0, deadline=0.01, seconds=0.2, seed=0)
    assert sent.offered > 10
    assert set(sent.codes) <= {
        grpc.StatusCode.OK,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    }
    await generator.close()
    await server.stop(None)


def test_requests_are_what_the_server_reads() -> None:
    messages = [pb.ExtractRequest.FromString(data) for data in overload._requests((224, 256))]
    assert [len(message.images) for message in messages] == [1, 1]
    assert all(message.images[0].encoded[:2] == b"\xff\xd8" for message in messages)
