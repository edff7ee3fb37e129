"""`extract_many` of both clients: order, how far it reads ahead, errors in their place, and what is left behind."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
import weakref
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from dinov3_client import AsyncClient, Client, Features, ImageErrors, ServerError
from dinov3_client.testing import Failure, FakeServer, expected
from tests.client.adapters import ADAPTERS, Adapter
from tests.support.waiting import LIMIT

Code = grpc.StatusCode
OPTIONS: Any = {"outputs": "cls", "preset": "none", "dtype": "float32"}


def photo(index: int) -> np.ndarray[Any, Any]:
    return np.full((16, 32, 3), index, np.uint8)


def check(features: Features, *images: np.ndarray[Any, Any]) -> None:
    np.testing.assert_array_equal(features.cls, [expected(image, "cls") for image in images])


@pytest.fixture(params=ADAPTERS, ids=lambda adapter: adapter.__name__)
def adapter(request: pytest.FixtureRequest, server: FakeServer) -> Iterator[Adapter]:
    with request.param(server.target) as one:
        one.model()
        yield one


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


@pytest.mark.parametrize("in_flight", [1, 3, 50])
def test_order_is_kept_whatever_comes_first(adapter: Adapter, server: FakeServer, in_flight: int) -> None:
    """Later batches are answered before earlier ones."""
    turns = itertools.count()

    def hold_every_third(_: object) -> None:
        if next(turns) % 3 == 0:
            threading.Event().wait(0.02)

    server.edit = hold_every_third
    answers = list(adapter.many(([photo(i), photo(i + 1)] for i in range(20)), in_flight=in_flight, **OPTIONS))
    assert len(answers) == 20
    for index, features in enumerate(answers):
        check(features, photo(index), photo(index + 1))


@pytest.mark.parametrize("in_flight", [1, 3])
def test_it_reads_no_further_than_it_may(adapter: Adapter, server: FakeServer, in_flight: int) -> None:
    taken = 0

    def batches() -> Iterator[np.ndarray[Any, Any]]:
        nonlocal taken
        for index in range(10):
            taken += 1
            yield photo(index)

    for yielded, features in enumerate(adapter.many(batches(), in_flight=in_flight, **OPTIONS)):
        check(features, photo(yielded))
        assert taken - (yielded + 1) <= in_flight - 1
    assert taken == 10


def test_calls_are_in_flight_while_the_first_is_waited_for(server: FakeServer, adapter: Adapter) -> None:
    server.gate.clear()

    def release() -> None:
        server.wait_for_calls(4)
        server.gate.set()

    releaser = threading.Thread(target=release)
    releaser.start()
    assert len(list(adapter.many(map(photo, range(9)), in_flight=4, **OPTIONS))) == 9
    releaser.join()


def test_an_error_comes_in_its_place_and_ends_the_rest(adapter: Adapter, server: FakeServer) -> None:
    def refuse(response: Any) -> None:
        # The second batch, whichever call it came in.
        if len(response.blocks[0].image_indices) == 2:
            raise Failure(Code.INTERNAL, "broken")

    server.edit = refuse
    answers = adapter.many(
        [[photo(0)], [photo(1), photo(1)], *([photo(i)] for i in range(2, 9))], in_flight=3, **OPTIONS
    )
    check(next(answers), photo(0))
    with pytest.raises(ServerError, match=r"^broken$"):
        next(answers)
    with pytest.raises(StopIteration):
        next(answers)
    assert len(server.requests) <= 4


def test_an_invalid_batch_raises_in_its_place(adapter: Adapter, server: FakeServer) -> None:
    answers = adapter.many([photo(0), 17, photo(1)], in_flight=3, **OPTIONS)
    check(next(answers), photo(0))
    with pytest.raises(TypeError, match="images is a int"):
        next(answers)


def test_images_that_fail(adapter: Adapter, server: FakeServer) -> None:
    answers = adapter.many([photo(0), b"no image"], **OPTIONS)
    check(next(answers), photo(0))
    with pytest.raises(ImageErrors):
        next(answers)
    [good, bad] = adapter.many([photo(0), b"no image"], on_error="return", **OPTIONS)
    assert (sorted(good.errors), sorted(bad.errors)) == ([], [0])


class Surprise(Exception):
    pass


def test_an_error_of_the_iterable_comes_in_its_place(adapter: Adapter) -> None:
    def batches() -> Iterator[np.ndarray[Any, Any]]:
        yield photo(0)
        yield photo(1)
        raise Surprise

    answers = adapter.many(batches(), in_flight=8, **OPTIONS)
    check(next(answers), photo(0))
    check(next(answers), photo(1))
    with pytest.raises(Surprise):
        next(answers)


def test_an_interrupt_is_not_kept_waiting(server: FakeServer) -> None:
    """In the iterable, or wherever it meets the main thread."""

    def batches() -> Iterator[np.ndarray[Any, Any]]:
        yield photo(0)
        server.wait_for_calls(1)
        raise KeyboardInterrupt

    with Client(server.target) as client:
        client.model()
        server.gate.clear()
        with pytest.raises(KeyboardInterrupt):
            next(client.extract_many(batches(), in_flight=8, **OPTIONS))
        assert client._session._pool.acquire().in_flight == 1


def test_batches_of_iterators_that_move_on(adapter: Adapter) -> None:
    """A group of itertools.groupby is gone once the next one is asked for."""
    groups = itertools.groupby(map(photo, range(12)), key=lambda image: int(image[0, 0, 0]) // 4)
    for index, features in enumerate(adapter.many((group for _, group in groups), in_flight=3, **OPTIONS)):
        check(features, *(photo(4 * index + i) for i in range(4)))


def test_nothing(adapter: Adapter, server: FakeServer) -> None:
    assert list(adapter.many([], **OPTIONS)) == []
    assert server.requests == []


def threads_of_ours() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("dinov3-client")]


@pytest.mark.parametrize("held", ["call", "pause"])
def test_left_early_nothing_is_left_behind(adapter: Adapter, server: FakeServer, held: str) -> None:
    """Neither a call that is not answered, nor one that would be tried again in an hour, holds up who leaves."""
    answers = adapter.many(map(photo, itertools.count()), in_flight=4, deadline=7200, **OPTIONS)
    check(next(answers), photo(0))
    server.wait_for_calls(4)
    if held == "call":
        server.gate.clear()
    else:
        server.script = [Failure(Code.RESOURCE_EXHAUSTED, "full", retry_after=3600)] * 9
    check(next(answers), photo(1))
    server.wait_for_calls(5)
    answers.close()
    assert threads_of_ours() == []
    server.script = []
    server.gate.set()
    check(adapter.extract(photo(5), **OPTIONS), photo(5))
    assert adapter.client._session._pool.acquire().in_flight == 1  # none but this


def test_answers_are_not_held(server: FakeServer) -> None:
    """Memory is that of what is in flight: an answer is gone once its user lets go."""
    with Client(server.target) as client:
        answers = client.extract_many(map(photo, range(6)), in_flight=2, **OPTIONS)
        last: weakref.ref[Features] | None = None
        for features in answers:
            gc.collect()
            assert last is None or last() is None
            last = weakref.ref(features)
            del features


# What is asyncio's own.


async def test_an_asynchronous_iterable(server: FakeServer) -> None:
    async def batches() -> AsyncIterator[np.ndarray[Any, Any]]:
        for index in range(7):
            await asyncio.sleep(0)
            yield photo(index)

    async with AsyncClient(server.target) as client:
        index = 0
        async for features in client.extract_many(batches(), in_flight=3, **OPTIONS):
            check(features, photo(index))
            index += 1
    assert index == 7


async def test_a_cancelled_task_cancels_its_call(server: FakeServer) -> None:
    async with AsyncClient(server.target) as client:
        await client.model()
        server.gate.clear()
        for call in (lambda: client.extract(photo(0)), lambda: anext(client.extract_many([photo(0)] * 3, in_flight=3))):
            seen = len(server.requests)
            task = asyncio.ensure_future(call())
            await asyncio.to_thread(server.wait_for_calls, seen + 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert client._session._pool.acquire().in_flight == 1  # none but this
        server.gate.set()


async def test_many_tasks_share_a_client(server: FakeServer) -> None:
    async with AsyncClient(server.target, connections=3) as client:
        answers = await asyncio.gather(*(client.extract(photo(index), **OPTIONS) for index in range(40)))
        for index, features in enumerate(answers):
            check(features, photo(index))


async def test_close_ends_the_calls_under_way(server: FakeServer) -> None:
    client = AsyncClient(server.target)
    await client.model()
    server.gate.clear()
    call = asyncio.ensure_future(client.extract(photo(0)))
    await asyncio.to_thread(server.wait_for_calls, 1)
    await client.close()
    with pytest.raises(ServerError) as caught:
        await call
    assert caught.value.code is Code.CANCELLED


async def test_the_loop_goes_on_while_images_are_read(server: FakeServer) -> None:
    """Files and pixels are read in a thread."""
    reading, seen = threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow() -> Iterator[np.ndarray[Any, Any]]:
        loop.call_soon_threadsafe(seen.set)
        assert reading.wait(LIMIT)
        yield photo(3)

    class Slow:
        def __iter__(self) -> Iterator[np.ndarray[Any, Any]]:
            return slow()

    async with AsyncClient(server.target) as client:
        call = asyncio.ensure_future(client.extract(Slow(), **OPTIONS))
        await seen.wait()  # were the loop held up, this would never come
        reading.set()
        check(await call, photo(3))


def test_invalid_iterables(server: FakeServer) -> None:
    with Client(server.target) as client, pytest.raises(TypeError, match="not iterable"):
        client.extract_many(5)  # type: ignore[arg-type]
