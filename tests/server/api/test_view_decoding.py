"""Images with many views in the decode pool: time slices, parked pictures, cancellation and memory."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinov3_server.api import sources
from dinov3_server.api.budget import ByteBudget
from dinov3_server.engine.shares import ANONYMOUS
from dinov3_server.errors import DeadlineExceeded
from dinov3_server.metrics import Metrics
from dinov3_serving.v1 import feature_service_pb2 as pb
from tests.server.api.rig import (
    AS_IS,
    FakeEngine,
    encoded,
    extraction,
    picture,
    request_memory,
    tensor,
)
from tests.server.api.views import V, at_the_client, cls_of, rows, with_views
from tests.support.waiting import LIMIT, until_async


async def test_views_that_are_only_copied_need_no_thread() -> None:
    engine = FakeEngine()
    service = extraction(engine, Metrics())
    service.decode_pool.close()  # no thread is left that could do it
    photo = picture(48, 64)
    views = [V((1, 2, 32, 32), flip=True), V((0, 0, 32, 32), size=(32, 32)), V(flip=True, size=(48, 64))]
    image = with_views(pb.Image(pixels=tensor(photo)), views)
    answer = await service.extract(
        pb.ExtractRequest(images=[image], preprocessing=AS_IS), None, ANONYMOUS, request_memory()
    )
    found = rows(pb.ExtractResponse.FromString(answer))
    for view, how in enumerate(views):
        assert found[0, view][1] == cls_of(at_the_client(Image.fromarray(photo), how, None))
    image.views.append(V((0, 0, 32, 32), size=(16, 16)).message)
    with pytest.raises(RuntimeError, match="after shutdown"):
        await service.extract(pb.ExtractRequest(images=[image], preprocessing=AS_IS), None, ANONYMOUS, request_memory())


class Gate:
    """Replaces `transform_into`: blocks a thread before its second row until the gate is open."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._write = sources.transform_into
        self.entered = asyncio.Event()
        self.open = threading.Event()
        self.calls = 0

    def __call__(self, *args: Any) -> None:
        self.calls += 1
        if self.calls == 2:
            self._loop.call_soon_threadsafe(self.entered.set)
            assert self.open.wait(LIMIT)
        self._write(*args)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Any:
    made: list[Gate] = []

    def make() -> Gate:
        made.append(Gate())
        monkeypatch.setattr(sources, "transform_into", made[0])
        return made[0]

    yield make
    for each in made:
        each.open.set()


FIVE = pb.ExtractRequest(images=[with_views(encoded(picture(40, 40, seed)), [V(size=(32, 32))] * 5) for seed in (0, 1)])


async def test_a_caller_leaves_between_two_views(gate: Any, decodes: Counter[bytes]) -> None:
    stop, engine, metrics = gate(), FakeEngine(), Metrics()
    service = extraction(engine, metrics)
    task = asyncio.create_task(service.extract(FIVE, None, ANONYMOUS, request_memory()))
    await stop.entered.wait()
    task.cancel()
    for _ in range(20):
        await asyncio.sleep(0)
    assert not task.done()
    assert len(engine.reservations) == 1
    stop.open.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert stop.calls == 2  # the row that was begun was ended, no other begun
    assert sum(decodes.values()) == 1
    assert engine.untouched()  # nothing was written after the release
    assert not engine.done_runs
    assert metrics.snapshot().series["dinov3_images_total"] == {("cancelled",): (10.0,)}
    service.decode_pool.close()


async def test_a_deadline_that_passes_between_two_views(gate: Any) -> None:
    stop, engine, metrics = gate(), FakeEngine(), Metrics()
    service = extraction(engine, metrics)
    deadline = time.monotonic() + 0.2
    task = asyncio.create_task(service.extract(FIVE, deadline, ANONYMOUS, request_memory()))
    await stop.entered.wait()
    await until_async(lambda: time.monotonic() >= deadline)
    stop.open.set()
    with pytest.raises(DeadlineExceeded, match="while the images of the request were being decoded"):
        await task
    assert stop.calls == 2
    assert engine.untouched()
    assert metrics.snapshot().series["dinov3_images_total"] == {("expired",): (10.0,)}
    service.decode_pool.close()


def color(of: int) -> pb.Image:
    """Return an image of one color, by which its rows are recognized."""
    return encoded(np.full((20, 20, 3), of, np.uint8))


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make each time slice end after one row; return the colors of the rows in the order of writing."""
    monkeypatch.setattr("dinov3_server.api.decode_pool.SLICE_SECONDS", 0.0)
    order: list[int] = []
    write = sources.transform_into

    def recorded(image: Image.Image, *rest: Any) -> None:
        order.append(image.getpixel((0, 0))[0])  # type: ignore[index,arg-type]
        write(image, *rest)

    monkeypatch.setattr(sources, "transform_into", recorded)
    return order


SIXTEEN = V(size=(16, 16))


async def test_an_image_with_many_views_does_not_block_others(turns: list[int], decodes: Counter[bytes]) -> None:
    engine = FakeEngine()
    service = extraction(engine, Metrics())
    large = pb.ExtractRequest(images=[with_views(color(1), [SIXTEEN] * 20)])
    small = pb.ExtractRequest(images=[with_views(color(2), [SIXTEEN])])
    answers = await asyncio.gather(
        service.extract(large, None, ANONYMOUS, request_memory()),
        service.extract(small, None, ANONYMOUS, request_memory()),
    )
    assert sorted(turns) == [1] * 20 + [2]
    assert turns.index(2) <= 2
    assert sorted(decodes.values()) == [1, 1]  # its picture waited, and was not decoded again
    pixels = at_the_client(Image.new("RGB", (20, 20), (1, 1, 1)), SIXTEEN)
    assert {cls for _, cls in rows(pb.ExtractResponse.FromString(answers[0])).values()} == {cls_of(pixels)}
    service.decode_pool.close()


def room_for_one_picture() -> ByteBudget:
    """Return a budget for one picture: the cost of a small file is 1 MiB and its pixels."""
    budget = ByteBudget(3 << 20, 3 << 19 >> 1)
    assert 1 << 20 < budget.pictures.limit < 2 << 20
    return budget


async def test_a_picture_has_its_memory_until_its_last_row_is_written(
    turns: list[int], decodes: Counter[bytes]
) -> None:
    engine, budget = FakeEngine(), room_for_one_picture()
    service = extraction(engine, Metrics(), threads=2, budget=budget)
    requests = [pb.ExtractRequest(images=[with_views(color(of), [SIXTEEN] * 6)]) for of in (1, 2, 3)]
    for times in (1, 2):
        turns.clear()
        await asyncio.gather(*(service.extract(request, None, ANONYMOUS, request_memory()) for request in requests))
        assert sorted(turns) == [1] * 6 + [2] * 6 + [3] * 6
        assert sum(before != after for before, after in itertools.pairwise(turns)) == 2  # one after the other
        assert set(decodes.values()) == {times}
        assert budget.pictures.used == 0
    service.decode_pool.close()


async def test_the_memory_of_a_picture_is_released_when_its_caller_leaves(turns: list[int]) -> None:
    engine, budget = FakeEngine(), room_for_one_picture()
    service = extraction(engine, Metrics(), budget=budget)
    request = pb.ExtractRequest(images=[with_views(color(1), [SIXTEEN] * 400)], outputs=pb.Outputs(cls=True))
    waiting = pb.ExtractRequest(images=[with_views(color(2), [SIXTEEN])])
    for _ in range(2):
        task = asyncio.create_task(service.extract(request, None, ANONYMOUS, request_memory()))
        await until_async(lambda: len(turns) >= 3)
        other = asyncio.create_task(service.extract(waiting, None, ANONYMOUS, request_memory()))
        await until_async(lambda: budget.pictures.waiters)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await other
        assert engine.untouched()
        assert budget.pictures.used == 0
        assert turns.count(1) < 400
        assert turns[-1] == 2
        turns.clear()
    service.decode_pool.close()


async def test_a_caller_leaves_while_it_waits_for_memory(turns: list[int]) -> None:
    engine, budget = FakeEngine(), room_for_one_picture()
    service = extraction(engine, Metrics(), budget=budget)
    held = budget.pictures.try_acquire(budget.pictures.limit)
    assert held
    request = pb.ExtractRequest(images=[with_views(color(1), [SIXTEEN])])
    task = asyncio.create_task(service.extract(request, None, ANONYMOUS, request_memory()))
    await until_async(lambda: budget.pictures.waiters)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not turns
    assert not budget.pictures.waiters
    assert engine.untouched()
    held.release()
    service.decode_pool.close()
