"""Memory of messages and answers is counted from when they are received until they are read."""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest

from dinov3_server.api import budget
from dinov3_server.api.budget import ByteBudget
from dinov3_server.api.receiving import Receiver
from dinov3_server.api.stream import Stream
from dinov3_server.config.settings import Settings
from dinov3_server.engine.shares import ANONYMOUS
from dinov3_server.metrics import Metrics
from dinov3_serving.v1 import feature_service_pb2 as pb
from tests.server.api.rig import AS_IS, FakeEngine, Rig, extraction, failure_of_status, picture, serving, tensor
from tests.server.api.test_bursts import DATA, END_HEADERS, END_STREAM, HEADERS, SETTINGS, frame, headers
from tests.support.waiting import until_async

EXTRACT = "dinov3_serving.v1.FeatureService/Extract"
PING, WINDOW_UPDATE, ACK = 6, 8, 1
INITIAL_WINDOW_SIZE = 4  # a setting
SMALL = pb.ExtractRequest(pixels=tensor(picture(16, 16)[np.newaxis]), preprocessing=AS_IS)
# Room for one answer to this at a time: it counts twice, as gRPC copies it.
LIMITS = {"max_message_bytes": 6 << 20, "frontend_bytes": 24 << 20}
OUTPUTS = pb.Outputs(cls=True, patches=True, registers=True, dtype=pb.DATA_TYPE_FLOAT32)
OUTPUTS.layers.extend(pb.LayerOutputs(layer=layer, patches=True) for layer in range(6))
LARGE = pb.ExtractRequest(
    pixels=tensor(np.zeros((5, 256, 1280, 3), np.uint8)), preprocessing=AS_IS, outputs=OUTPUTS
)  # fmt: skip


@asynccontextmanager
async def deaf(rig: Rig, request: pb.ExtractRequest) -> AsyncIterator[asyncio.StreamWriter]:
    """Open a connection whose answer is computed but not read. Window updates sent by the writer let it be read."""
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    body = request.SerializeToString()
    message = struct.pack(">?I", False, len(body)) + body
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    writer.write(frame(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW_SIZE, 0)))
    writer.write(frame(HEADERS, END_HEADERS, 1, headers(EXTRACT)))
    initial = [65535]
    windows = [65535, 65535]  # of the connection, and of the stream

    async def read() -> None:
        while True:
            head = await reader.readexactly(9)
            payload = await reader.readexactly(int.from_bytes(head[:3], "big"))
            if head[3] == WINDOW_UPDATE:
                windows[int.from_bytes(head[5:], "big")] += int.from_bytes(payload, "big")
            elif head[3] == SETTINGS and not head[4] & ACK:
                settings = dict(struct.iter_unpack(">HI", payload))
                windows[1] += settings.get(INITIAL_WINDOW_SIZE, initial[0]) - initial[0]
                initial[0] = settings.get(INITIAL_WINDOW_SIZE, initial[0])
                writer.write(frame(SETTINGS, ACK, 0))
            elif head[3] == PING and not head[4] & ACK:
                writer.write(frame(PING, ACK, 0, payload))
            more.set()

    more = asyncio.Event()
    reading = asyncio.create_task(read())
    while message:
        size = min(*windows, 16384, len(message))
        if not size:
            more.clear()
            await more.wait()
            continue
        windows[:] = (window - size for window in windows)
        writer.write(frame(DATA, 0 if message[size:] else END_STREAM, 1, message[:size]))
        message = message[size:]
    await until_async(lambda: rig.server.budget.answers.used)
    try:
        yield writer
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        writer.close()


async def test_an_answer_is_counted_until_it_is_read() -> None:
    async with serving() as rig:
        used = rig.server.budget.answers
        async with deaf(rig, SMALL) as writer:
            await rig.stub.Extract(SMALL)  # others are answered
            assert used.used
            for stream in (0, 1):
                writer.write(frame(WINDOW_UPDATE, 0, stream, struct.pack(">I", 1 << 30)))
            await until_async(lambda: not used.used)


async def test_the_memory_of_an_answer_is_released_when_its_caller_leaves() -> None:
    async with serving() as rig:
        async with deaf(rig, SMALL):
            assert rig.server.budget.answers.used
        await until_async(lambda: not rig.server.budget.answers.used)


async def test_the_connection_of_an_unread_answer_is_closed_if_others_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "SLOW_READER_SECONDS", 0.0)
    async with serving(**LIMITS) as rig, deaf(rig, LARGE):
        held = rig.server.budget.answers.used
        answer = await rig.stub.Extract(LARGE)
        assert held + 2 * answer.ByteSize() > rig.server.budget.answers.limit
        await until_async(lambda: not rig.server.budget.answers.used)


async def test_an_answer_without_memory_in_time_is_refused_with_a_retry_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "LONGEST_WAIT_SECONDS", 0.05)
    async with serving(**LIMITS) as rig:
        async with deaf(rig, LARGE):
            error = await rig.error(LARGE)
            assert error.code == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert error.retry_seconds == 1.0
            assert rig.count("dinov3_refused_requests_total", "answers_bytes") == 1
            call = rig.stub.ExtractStream(iter([pb.ExtractStreamRequest(id=1, request=LARGE)]))
            failure = failure_of_status((await call.read()).error)
            assert (failure.code, failure.retry_seconds) == (grpc.StatusCode.RESOURCE_EXHAUSTED, 1.0)
        await until_async(lambda: not rig.server.budget.answers.used)
        await rig.stub.Extract(LARGE)


async def test_a_message_without_memory_waits_or_is_refused_with_a_retry_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(**LIMITS) as rig:
        messages = rig.server.budget.messages
        others = messages.try_acquire(messages.limit)
        assert others is not None
        call = rig.stub.Extract(SMALL)
        await until_async(lambda: messages.waiters)
        others.release()
        await call

        others = messages.try_acquire(messages.limit)
        assert others is not None
        monkeypatch.setattr(budget, "LONGEST_WAIT_SECONDS", 0.05)
        error = await rig.error(SMALL)
        assert (error.code, error.retry_seconds) == (grpc.StatusCode.RESOURCE_EXHAUSTED, 1.0)
        stream = rig.stub.ExtractStream(iter([pb.ExtractStreamRequest(request=SMALL)]))
        assert await stream.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        others.release()
        await rig.stub.Extract(SMALL)
        assert not messages.used


async def test_a_message_is_counted_until_it_is_decoded() -> None:
    async with serving() as rig:
        rig.engine.hold = True
        call = rig.stub.Extract(SMALL)
        stream = rig.stub.ExtractStream(iter([pb.ExtractStreamRequest(request=SMALL)]))
        runs = [await rig.engine.runs.get() for _ in range(2)]
        assert not rig.server.budget.messages.used
        for run in runs:
            run.go.set_result(None)
        await call
        assert (await stream.read()).HasField("response")
        await until_async(lambda: not rig.server.budget.answers.used)


async def test_a_message_with_a_removed_token_is_not_counted(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text("secret\n")
    async with serving(token_file=str(path)) as rig:
        stream = rig.stub.ExtractStream(metadata=(("authorization", "Bearer secret"),))
        await stream.write(pb.ExtractStreamRequest(request=SMALL))
        await stream.read()
        path.write_text("another\n")
        rig.server.credentials.reload(True)
        await stream.write(pb.ExtractStreamRequest(request=SMALL))
        assert await stream.code() == grpc.StatusCode.UNAUTHENTICATED
        assert not rig.server.budget.messages.used


async def test_the_memory_of_messages_is_released_if_their_tasks_never_start() -> None:
    """Messages are read, and their tasks are cancelled before their first step."""
    room = ByteBudget(64 << 20, 16 << 20)
    message = pb.ExtractStreamRequest(request=SMALL).SerializeToString()

    class Leaving:
        def time_remaining(self) -> None:
            return None

        async def read(self) -> bytes:
            serve.cancel()
            return message

    receiver = Receiver(room, 1 << 20)
    service = extraction(FakeEngine(), Metrics())
    stream = Stream(Leaving(), service, receiver, Metrics(), Settings(), ANONYMOUS)  # type: ignore[arg-type]
    serve = asyncio.create_task(stream.serve())
    with pytest.raises(asyncio.CancelledError):
        await serve
    await until_async(lambda: not room.messages.used)
    service.decode_pool.close()


async def test_event_loop_lag_is_measured() -> None:
    async with serving() as rig:
        await until_async(lambda: rig.count("dinov3_event_loop_lag_seconds"))  # it checks

        def held() -> float:
            """Return how often the loop was late by more than 0.1 s."""
            return sum(rig.metrics.snapshot().series["dinov3_event_loop_lag_seconds"][()][-5:])

        before = held()
        time.sleep(0.2)  # noqa: ASYNC251 - makes the lag to be measured
        await until_async(lambda: held() > before)
