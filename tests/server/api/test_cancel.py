"""Cancelled calls: their resources are released, but not before threads have stopped writing into the arena."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

from dinov3_server.engine.shares import ANONYMOUS
from dinov3_server.errors import DeadlineExceeded
from dinov3_server.images.decode import File
from dinov3_server.metrics import Metrics
from dinov3_serving.v1 import feature_service_pb2 as pb
from tests.server.api.rig import (
    AS_IS,
    FakeEngine,
    encoded,
    extraction,
    failure_of,
    picture,
    request_memory,
    serving,
    tensor,
)
from tests.support.waiting import LIMIT, until_async

TWO = pb.ExtractRequest(images=[encoded(picture(16, 16, 1)), encoded(picture(16, 16, 2))])


class Gate:
    """Replaces `decode`: sets `entered` when a thread calls it, and blocks the thread until `open` is set."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.entered = asyncio.Event()
        self.open = threading.Event()
        self.calls = 0

    def __call__(self) -> Image.Image:
        self.calls += 1
        self._loop.call_soon_threadsafe(self.entered.set)
        assert self.open.wait(LIMIT)
        return Image.new("RGB", (256, 256), (1, 2, 3))


@pytest.fixture
async def gate(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Gate]:
    gate = Gate()
    monkeypatch.setattr(File, "decode", lambda file: gate())
    yield gate
    gate.open.set()


async def turn_the_loop() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.mark.parametrize("threads", [1, 2])
async def test_the_reservation_stays_while_threads_write(gate: Gate, threads: int) -> None:
    engine, metrics = FakeEngine(), Metrics()
    service = extraction(engine, metrics, threads)
    task = asyncio.create_task(service.extract(TWO, None, ANONYMOUS, request_memory()))
    await gate.entered.wait()
    for _ in range(3):  # a task may be cancelled several times
        task.cancel()
        await turn_the_loop()
        assert not task.done()
        assert len(engine.reservations) == 1
    gate.open.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert gate.calls == threads  # other images are not decoded any more
    assert engine.untouched()  # nothing was written after the release
    assert not engine.done_runs
    assert metrics.snapshot().series["dinov3_images_total"] == {("cancelled",): (2.0,)}
    service.decode_pool.close()


async def test_a_request_can_be_cancelled_between_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies run in the event loop. A request of many images yields to the loop, and can be cancelled there."""
    monkeypatch.setattr("dinov3_server.api.decode_pool.COPY_SECONDS", 0.0)  # no time at all: one image a turn
    engine, metrics = FakeEngine(), Metrics()
    service = extraction(engine, metrics)
    images = np.stack([picture(16, 16, seed) for seed in range(5)])
    request = pb.ExtractRequest(pixels=tensor(images), preprocessing=AS_IS)
    task = asyncio.create_task(service.extract(request, None, ANONYMOUS, request_memory()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    [reservation] = engine.reservations
    size = images[0].nbytes
    copied = [
        bytes(reservation.memory[reservation.offset + row * size :][:size]) == images[row].tobytes() for row in range(5)
    ]
    assert copied == [True, True, False, False, False]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.untouched()
    assert not engine.done_runs
    assert metrics.snapshot().series["dinov3_images_total"] == {("cancelled",): (5.0,)}
    service.decode_pool.close()


async def test_pixels_are_copied_without_a_thread() -> None:
    engine = FakeEngine()
    service = extraction(engine, Metrics())
    service.decode_pool.close()  # no thread is left that could do it
    floats = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    for pixels in (picture(32, 32)[None], floats):
        await service.extract(
            pb.ExtractRequest(pixels=tensor(pixels), preprocessing=AS_IS), None, ANONYMOUS, request_memory()
        )
    resized = pb.ExtractRequest(pixels=tensor(picture(32, 32)[None]))  # to the preset's 256x256
    with pytest.raises(RuntimeError, match="after shutdown"):
        await service.extract(resized, None, ANONYMOUS, request_memory())


async def test_the_client_cancels_while_images_are_decoded(gate: Gate) -> None:
    async with serving(decode_threads=1) as rig:
        call = rig.stub.Extract(TWO)
        await gate.entered.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        # A second request while the first one's thread is in its range.
        second = asyncio.create_task(rig.error(pb.ExtractRequest(pixels=tensor(np.zeros((1, 16, 16, 4), np.uint8)))))
        assert (await second).code == grpc.StatusCode.INVALID_ARGUMENT
        assert len(rig.engine.reservations) == 1
        gate.open.set()
        await rig.engine.idle.wait()
        await until_async(lambda: rig.count("dinov3_requests_total", "Extract", "CANCELLED") == 1)
        assert rig.engine.untouched()
        assert not rig.engine.done_runs


async def test_the_client_cancels_while_the_request_waits_for_the_device() -> None:
    async with serving() as rig:
        rig.engine.hold = True
        images = [encoded(picture(16, 16)), encoded(picture(16, 32))]
        call = rig.stub.Extract(pb.ExtractRequest(images=images, preprocessing=AS_IS))
        for _ in images:
            await rig.engine.runs.get()
        call.cancel()
        await rig.engine.idle.wait()
        assert rig.engine.cancelled_runs == 2
        await until_async(lambda: rig.count("dinov3_requests_total", "Extract", "CANCELLED") == 1)


async def test_a_call_that_waits_ends_at_its_deadline() -> None:
    async with serving() as rig:
        rig.engine.hold = True
        for timeout in (0.2, 2.0, 20.0):  # longer ones for a machine so slow that the call did not get so far
            error = await failure_of(rig.stub.Extract(TWO, timeout=timeout))
            assert error.code == grpc.StatusCode.DEADLINE_EXCEEDED
            if not rig.engine.runs.empty():
                break
        await rig.engine.idle.wait()
        await until_async(lambda: rig.count("dinov3_requests_total", "Extract", "DEADLINE_EXCEEDED") > 0)
        assert rig.engine.cancelled_runs > 0


async def test_a_deadline_that_passes_while_images_are_decoded(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, metrics = FakeEngine(), Metrics()
    service = extraction(engine, metrics)
    deadline = time.monotonic() + 3600
    task = asyncio.create_task(service.extract(TWO, deadline, ANONYMOUS, request_memory()))
    await gate.entered.wait()
    monkeypatch.setattr("dinov3_server.api.decode_pool.time", SimpleNamespace(monotonic=lambda: deadline))
    gate.open.set()
    with pytest.raises(DeadlineExceeded, match="while the images of the request were being decoded"):
        await task
    assert gate.calls == 1
    assert engine.untouched()
    assert not engine.done_runs
    assert metrics.snapshot().series["dinov3_images_total"] == {("expired",): (2.0,)}
    service.decode_pool.close()


async def test_a_large_request_does_not_block_a_small_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads work in time slices; the small request gets the second or third one."""
    monkeypatch.setattr("dinov3_server.api.decode_pool.SLICE_SECONDS", 0.0)  # no time at all: one image a turn
    order: list[bytes] = []
    monkeypatch.setattr(File, "decode", lambda file: recorded(bytes(file.data)))

    def recorded(data: bytes) -> Any:
        order.append(data)
        return Image.new("RGB", (256, 256))

    engine = FakeEngine()
    service = extraction(engine, Metrics())
    large = pb.ExtractRequest(images=[encoded(picture(16, 16, 1))] * 20, outputs=pb.Outputs(cls=True))
    small = pb.ExtractRequest(images=[encoded(picture(16, 16, 2))], outputs=pb.Outputs(cls=True))
    await asyncio.gather(
        service.extract(large, None, ANONYMOUS, request_memory()),
        service.extract(small, None, ANONYMOUS, request_memory()),
    )
    assert order.index(small.images[0].encoded) <= 2
    service.decode_pool.close()
