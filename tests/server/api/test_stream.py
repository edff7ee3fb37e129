"""ExtractStream: answers as they complete, backpressure, errors of one message, and the ways a stream ends."""

from __future__ import annotations

import asyncio
import math

import grpc
import numpy as np
import pytest

from dinov3_server.api.budget import ByteBudget
from dinov3_server.api.receiving import Receiver
from dinov3_server.api.stream import Stream
from dinov3_server.config.settings import Settings
from dinov3_server.engine.shares import ANONYMOUS
from dinov3_server.errors import InternalError, Overloaded
from dinov3_server.metrics import Metrics
from dinov3_server.models.interface import Output
from dinov3_serving.v1 import feature_service_pb2 as pb
from tests.server.api.rig import (
    AS_IS,
    FakeEngine,
    Rig,
    extraction,
    failure_of,
    failure_of_status,
    features,
    picture,
    serving,
    tensor,
)
from tests.support.waiting import until_async

CLS = pb.Outputs(cls=True)
PHOTOS = [picture(16, 16, seed) for seed in range(40)]


def message(index: int, photo: int | None = None, **fields: object) -> pb.ExtractStreamRequest:
    pixels = tensor(PHOTOS[index if photo is None else photo][np.newaxis])
    request = pb.ExtractRequest(pixels=pixels, preprocessing=AS_IS, outputs=CLS)
    return pb.ExtractStreamRequest(id=index, request=request, **fields)  # type: ignore[arg-type]


def is_of(answer: pb.ExtractStreamResponse, photo: int) -> bool:
    return answer.response.blocks[0].cls.data == features(PHOTOS[photo].tobytes(), Output("cls"), 48)


async def read(call: grpc.aio.StreamStreamCall) -> pb.ExtractStreamResponse:
    answer = await call.read()
    assert answer is not grpc.aio.EOF
    return answer


async def drained(call: grpc.aio.StreamStreamCall) -> list[pb.ExtractStreamResponse]:
    answers = []
    while (answer := await call.read()) is not grpc.aio.EOF:
        answers.append(answer)
    return answers


async def test_every_message_gets_its_own_features() -> None:
    async with serving(stream_window=4) as rig:
        call = rig.stub.ExtractStream(message(index) for index in range(40))
        answers = await drained(call)
        assert sorted(answer.id for answer in answers) == list(range(40))
        assert all(is_of(answer, answer.id) for answer in answers)
        assert await call.code() == grpc.StatusCode.OK
        assert rig.count("dinov3_requests_total", "ExtractStream", "OK") == 40
        assert rig.count("dinov3_request_seconds", "ExtractStream") == 40


async def test_answers_come_as_they_complete() -> None:
    async with serving() as rig:
        rig.engine.hold = True
        call = rig.stub.ExtractStream()
        runs = []
        for index in range(3):
            await call.write(message(index))
            runs.append(await rig.engine.runs.get())
        for index in (2, 0, 1):
            runs[index].go.set_result(None)
            answer = await read(call)
            assert answer.id == index
            assert is_of(answer, index)
        await call.done_writing()
        assert await drained(call) == []


async def test_no_more_messages_than_the_window_are_read() -> None:
    async with serving(stream_window=3) as rig:
        rig.engine.hold = True
        call = rig.stub.ExtractStream(message(index) for index in range(10))
        answered = 0
        runs = [await rig.engine.runs.get() for _ in range(3)]
        while runs:
            # As many messages as the window allows are read, and no more.
            for _ in range(50):
                await asyncio.sleep(0)
            assert rig.engine.runs.empty()
            assert len(rig.engine.reservations) == len(runs)
            runs.pop(0).go.set_result(None)
            await read(call)
            answered += 1
            if answered + len(runs) < 10:
                runs.append(await rig.engine.runs.get())
        assert answered == 10
        assert await drained(call) == []


class SlowCaller:
    """The context of a call whose transport accepts no answer until `reads_on` is set."""

    def __init__(self, messages: int) -> None:
        self.unread = [message(index).SerializeToString() for index in range(messages)]
        self.reads_on = asyncio.Event()
        self.answers: list[bytes] = []

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def time_remaining(self) -> None:
        return None

    async def read(self) -> object:
        return self.unread.pop() if self.unread else grpc.aio.EOF

    async def write(self, answer: bytes) -> None:
        await self.reads_on.wait()
        self.answers.append(answer)


async def test_messages_of_a_caller_that_does_not_read_answers_are_not_read() -> None:
    engine, caller, receiver = FakeEngine(), SlowCaller(10), Receiver(ByteBudget(64 << 20, 16 << 20), 1 << 20)
    service, settings = extraction(engine, Metrics()), Settings(stream_window=3)
    serve = asyncio.create_task(Stream(caller, service, receiver, Metrics(), settings, ANONYMOUS).serve())  # type: ignore[arg-type]
    await until_async(lambda: len(engine.done_runs) == 3)
    for _ in range(50):
        await asyncio.sleep(0)
    assert len(caller.unread) == 7  # three are computed and not accepted: no more are read
    assert engine.untouched()  # and their ranges of the arena are released
    caller.reads_on.set()
    await serve
    assert len(caller.answers) == 10
    service.decode_pool.close()


async def test_an_error_of_one_message_leaves_the_stream_open() -> None:
    async with serving() as rig:
        call = rig.stub.ExtractStream()

        async def ask(asked: pb.ExtractStreamRequest) -> pb.ExtractStreamResponse:
            await call.write(asked)
            answer = await read(call)
            assert answer.id == asked.id
            return answer

        bad = message(1)
        bad.request.outputs.dtype = pb.DATA_TYPE_UINT8
        failure = failure_of_status((await ask(bad)).error)
        assert (failure.code.name, failure.field) == ("INVALID_ARGUMENT", "outputs.dtype")

        failure = failure_of_status((await ask(pb.ExtractStreamRequest(id=2))).error)
        assert (failure.code.name, failure.field) == ("INVALID_ARGUMENT", "request")

        rig.engine.refuse = Overloaded("full", reason="queue", retry_after=0.5)
        failure = failure_of_status((await ask(message(3))).error)
        assert (failure.code.name, failure.retry_seconds) == ("RESOURCE_EXHAUSTED", 0.5)
        rig.engine.refuse = None

        rig.engine.fail = InternalError("the device failed")
        failure = failure_of_status((await ask(message(4))).error)
        assert (failure.code.name, failure.message) == ("INTERNAL", str(rig.engine.fail))
        rig.engine.fail = None

        assert is_of(await ask(message(5)), 5)
        await call.done_writing()
        assert await drained(call) == []
        assert await call.code() == grpc.StatusCode.OK
        for code, count in (("INVALID_ARGUMENT", 2), ("RESOURCE_EXHAUSTED", 1), ("INTERNAL", 1), ("OK", 1)):
            assert rig.count("dinov3_requests_total", "ExtractStream", code) == count
        assert rig.count("dinov3_refused_requests_total", "queue") == 1


async def test_an_unexpected_error_fails_one_message_only(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as rig:
        rig.engine.fail = KeyError("bug")
        answers = await drained(rig.stub.ExtractStream(iter([message(0), message(1)])))
        assert [failure_of_status(answer.error).code.name for answer in answers] == ["INTERNAL"] * 2
        assert caplog.text.count("unexpected error") == 2
        assert rig.count("dinov3_requests_total", "ExtractStream", "INTERNAL") == 2


async def test_an_unanswered_id_is_refused_and_an_answered_one_is_not() -> None:
    async with serving() as rig:
        rig.engine.hold = True
        call = rig.stub.ExtractStream()
        await call.write(message(7))
        run = await rig.engine.runs.get()
        await call.write(message(7, photo=8))
        refused = await read(call)
        assert refused.id == 7
        failure = failure_of_status(refused.error)
        assert (failure.code.name, failure.field) == ("INVALID_ARGUMENT", "id")
        assert "a message with id 7 is still unanswered" in failure.message
        # The refusal is not the answer: the id is still taken.
        await call.write(message(7, photo=8))
        assert (await read(call)).WhichOneof("result") == "error"
        run.go.set_result(None)
        assert is_of(await read(call), 7)
        await call.write(message(7, photo=9))
        (await rig.engine.runs.get()).go.set_result(None)
        assert is_of(await read(call), 9)
        await call.done_writing()
        assert await drained(call) == []


@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf])
async def test_invalid_timeouts_are_refused(seconds: float) -> None:
    async with serving() as rig:
        [answer] = await drained(rig.stub.ExtractStream(iter([message(0, timeout_seconds=seconds)])))
        failure = failure_of_status(answer.error)
        assert (failure.code.name, failure.field) == ("INVALID_ARGUMENT", "timeout_seconds")
        assert f"{seconds:g}" in failure.message


async def test_the_earlier_of_both_deadlines_counts() -> None:
    now = asyncio.get_running_loop().time()
    async with serving() as rig:
        asked = [message(0), message(1, timeout_seconds=50), message(2, timeout_seconds=5000)]
        await drained(rig.stub.ExtractStream(iter(asked), timeout=500))
        await drained(rig.stub.ExtractStream(iter([message(3), message(4, timeout_seconds=50)])))
        seconds = [None if run.deadline is None else run.deadline - now for run in rig.engine.done_runs]
        assert sorted(10 * round(each / 10) for each in seconds if each is not None) == [50, 50, 500, 500]
        assert len(seconds) == 5


async def test_half_closed_streams_are_answered_to_the_end() -> None:
    async with serving() as rig:
        rig.engine.hold = True
        call = rig.stub.ExtractStream(message(index) for index in range(3))
        runs = [await rig.engine.runs.get() for _ in range(3)]
        for run in runs:
            run.go.set_result(None)
        assert sorted(answer.id for answer in await drained(call)) == [0, 1, 2]
        assert await call.code() == grpc.StatusCode.OK


async def test_cancelling_a_stream_releases_everything() -> None:
    async with serving(stream_window=5) as rig:
        rig.engine.hold = True
        call = rig.stub.ExtractStream(message(index) for index in range(9))
        for _ in range(5):
            await rig.engine.runs.get()
        call.cancel()
        await rig.engine.idle.wait()
        assert rig.engine.cancelled_runs == 5
        await until_async(lambda: rig.count("dinov3_requests_total", "ExtractStream", "CANCELLED") == 5)


async def test_a_stream_ends_at_its_deadline() -> None:
    async with serving() as rig:
        rig.engine.hold = True
        for timeout in (0.2, 2.0, 20.0):  # longer ones for a machine so slow that the message did not get so far
            call = rig.stub.ExtractStream(iter([message(0)]), timeout=timeout)
            error = await failure_of(drained_or_raise(call))
            assert error.code == grpc.StatusCode.DEADLINE_EXCEEDED
            if not rig.engine.runs.empty():
                break
        await rig.engine.idle.wait()
        await until_async(lambda: rig.count("dinov3_requests_total", "ExtractStream", "DEADLINE_EXCEEDED") > 0)


async def test_an_invalid_message_ends_the_stream_after_earlier_answers() -> None:
    async with serving() as rig:
        rig.engine.hold = True
        raw = rig.channel.stream_stream("/dinov3_serving.v1.FeatureService/ExtractStream")
        call = raw()
        await call.write(message(0).SerializeToString())
        run = await rig.engine.runs.get()
        await call.write(b"\xff\xff\xff")
        run.go.set_result(None)
        answer = pb.ExtractStreamResponse.FromString(await call.read())
        assert is_of(answer, 0)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call.read()
        assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "3 bytes" in str(raised.value.details())
        assert rig.count("dinov3_requests_total", "ExtractStream", "INVALID_ARGUMENT") == 1


async def test_a_drain_answers_messages_that_were_read_and_ends_the_stream() -> None:
    async with serving() as rig:
        rig.engine.hold = True
        call = rig.stub.ExtractStream()
        await call.write(message(0))
        run = await rig.engine.runs.get()
        drain = asyncio.create_task(rig.server.drain(60))
        await until_async(lambda: reading_has_ended(rig))
        assert not drain.done()
        run.go.set_result(None)
        assert is_of(await read(call), 0)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call.read()
        assert raised.value.code() == grpc.StatusCode.UNAVAILABLE
        assert "shutting down" in str(raised.value.details())
        await drain
        assert rig.count("dinov3_requests_total", "ExtractStream", "OK") == 1
        assert rig.count("dinov3_requests_total", "ExtractStream", "UNAVAILABLE") == 1


async def test_a_drain_without_grace_cancels_streams() -> None:
    async with serving() as rig:
        rig.engine.hold = True
        call = rig.stub.ExtractStream()
        await call.write(message(0))
        await rig.engine.runs.get()
        await rig.server.drain(0)
        assert rig.engine.untouched()
        assert rig.engine.cancelled_runs == 1
        with pytest.raises(grpc.aio.AioRpcError):
            await call.read()


def reading_has_ended(rig: Rig) -> bool:
    return all(not stream.is_read for stream in rig.server.service.streams)


class drained_or_raise:
    """A stream's call, awaitable like a unary one."""

    def __init__(self, call: grpc.aio.StreamStreamCall) -> None:
        self._call = call

    def __await__(self):  # type: ignore[no-untyped-def]
        return drained(self._call).__await__()

    def __getattr__(self, name: str) -> object:
        return getattr(self._call, name)
