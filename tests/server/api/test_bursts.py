"""Many calls at one moment, and calls that are ended as soon as they begin."""

from __future__ import annotations

import asyncio
import os
import struct
from collections import Counter
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from dinov3_server.api import server
from dinov3_server.api.peers import OpenCalls
from dinov3_serving.v1 import feature_service_pb2 as pb
from tests.server.api.rig import REQUEST, Rig, serving
from tests.support.waiting import until_async

# Frames of HTTP/2 and their flags, RFC 9113 section 6.
DATA, HEADERS, RST_STREAM, SETTINGS = 0, 1, 3, 4
END_STREAM, END_HEADERS = 1, 4
CANCEL = 8


async def test_a_burst_of_calls_is_answered_by_the_service() -> None:
    """gRPC's own limits on calls that no handler has taken yet would end many of them as CANCELLED."""
    async with serving() as rig:
        calls = [rig.stub.GetModel(pb.GetModelRequest()) for _ in range(4000)]
        assert Counter([await call.code() for call in calls]) == {grpc.StatusCode.OK: 4000}


@pytest.mark.parametrize("sent", ["headers", "half a message", "a message"])
@pytest.mark.parametrize(
    "method",
    ["dinov3_serving.v1.FeatureService/Extract", "dinov3_serving.v1.FeatureService/ExtractStream",
     "dinov3_serving.v1.FeatureService/GetModel", "grpc.health.v1.Health/Watch"],
)  # fmt: skip
async def test_calls_that_are_reset_at_once_leave_nothing(method: str, sent: str) -> None:
    async with serving() as rig:
        await rig.stub.Extract(REQUEST)
        before = held(rig)
        for _ in range(2):
            await reset(rig.port, method, sent, count=500)
        # Fewer where the task of the first call had not ended yet.
        await until_async(lambda: all(held(rig)[kind] <= count for kind, count in before.items()))
        await rig.stub.Extract(REQUEST)


def held(rig: Rig) -> dict[str, int]:
    return {
        "tasks": len(asyncio.all_tasks()),
        "descriptors": len(os.listdir("/proc/self/fd")),  # noqa: PTH208
        "bytes": sum(
            quota.used for quota in (rig.server.budget.messages, rig.server.budget.pictures, rig.server.budget.answers)
        ),
        "reservations": len(rig.engine.reservations),
        "calls": len(rig.server.calls.active),
        "streams": len(rig.server.service.streams),
    }


async def reset(port: int, method: str, sent: str, count: int) -> None:
    """Open `count` streams of one connection and reset each of them at once, without waiting for a word."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = REQUEST.SerializeToString()
    message = struct.pack(">?I", False, len(body)) + body
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0))
    for stream in range(1, 2 * count, 2):
        writer.write(frame(HEADERS, END_HEADERS, stream, headers(method)))
        if sent == "half a message":
            writer.write(frame(DATA, 0, stream, message[: len(message) // 2]))
        elif sent == "a message":
            writer.write(frame(DATA, END_STREAM, stream, message))
        writer.write(frame(RST_STREAM, 0, stream, struct.pack(">I", CANCEL)))
    await writer.drain()
    writer.write_eof()
    await reader.read()  # until the server has read all of it, and closes
    writer.close()
    await writer.wait_closed()


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def headers(method: str) -> bytes:
    """HPACK, each a literal without index (RFC 7541, section 6.2.2)."""
    fields = {
        ":method": "POST", ":scheme": "http", ":path": f"/{method}", ":authority": "test", "te": "trailers",
        "content-type": "application/grpc",
    }  # fmt: skip
    return b"".join(
        b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in fields.items()
    )


class Context:
    def __init__(self, peer: str) -> None:
        self._peer = peer
        self.ended: list[Callable[[object], None]] = []

    def peer(self) -> str:
        return self._peer

    def add_done_callback(self, callback: Callable[[object], None]) -> None:
        self.ended.append(callback)


def test_connections_of_the_address_with_the_most_calls_are_closed_first() -> None:
    calls = OpenCalls(most=5)
    contexts = [Context(f"ipv4:10.0.0.{address}") for address in ("1:1", "1:1", "1:1", "2:1", "2:2", "2:2", "2:3")]
    for context in contexts[:5]:
        calls.add(context)
        assert calls.connections_to_close() == []
    for context in contexts[5:]:
        calls.add(context)
    assert calls.connections_to_close() == ["ipv4:10.0.0.2:2"]
    calls.add(contexts[3])
    assert set(calls.connections_to_close()) == {"ipv4:10.0.0.2:1", "ipv4:10.0.0.2:2"}
    for context in contexts:
        for ended in context.ended:
            ended(None)
    assert calls.connections_to_close() == []


@pytest.mark.parametrize("method", ["Watch", "ExtractStream"])
async def test_a_connection_with_too_many_silent_calls_is_closed(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_MOST_CALLS", 20)
    async with serving(max_queue_images=10, max_images_per_request=4) as rig:
        target = f"127.0.0.1:{rig.port}"
        async with grpc.aio.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            if method == "Watch":
                watch: Any = channel.unary_stream("/grpc.health.v1.Health/Watch")
                calls = [watch(b"") for _ in range(21)]
            else:
                stream: Any = channel.stream_stream("/dinov3_serving.v1.FeatureService/ExtractStream")
                calls = [stream() for _ in range(21)]
            assert {await call.code() for call in calls} == {grpc.StatusCode.UNAVAILABLE}
        await rig.stub.Extract(REQUEST)
