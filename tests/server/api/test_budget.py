"""ByteBudget: floors, queues, and grants that are released from any thread."""

from __future__ import annotations

import asyncio
import time

import pytest

from dinov3_server.api.budget import ByteBudget, MemoryGrant, Quota
from dinov3_server.errors import InvalidInput, Overloaded
from dinov3_server.metrics import Metrics

# Of 100 bytes 10 are the floor of messages, 10 of answers and 40 of pictures; 40 are free for any use.
TOTAL, MESSAGE = 100, 10


async def start_acquiring(quota: Quota, nbytes: int) -> asyncio.Task[MemoryGrant]:
    """Return a task that has its grant, or waits in the queue."""
    task = asyncio.create_task(quota.acquire(nbytes, None))
    await asyncio.sleep(0)
    return task


async def test_a_use_gets_its_floor_and_the_free_rest() -> None:
    budget = ByteBudget(TOTAL, MESSAGE)
    assert [each.limit for each in (budget.messages, budget.pictures, budget.answers)] == [50, 80, 50]
    assert budget.messages.try_acquire(50)
    assert budget.messages.try_acquire(1) is None
    assert budget.pictures.try_acquire(41) is None
    assert budget.pictures.try_acquire(40)
    assert budget.answers.try_acquire(10)
    assert budget.answers.try_acquire(1) is None


async def test_a_request_that_does_not_fit_waits_in_the_queue() -> None:
    budget = ByteBudget(TOTAL, MESSAGE)
    first = await budget.pictures.acquire(60, None)
    large = await start_acquiring(budget.pictures, 50)
    small = await start_acquiring(budget.pictures, 5)
    assert [large.done(), small.done()] == [False, False], "20 are free, and the small one is behind the large one"
    assert budget.pictures.try_acquire(1) is None, "waiters are served first"
    first.release()
    assert [(await large).nbytes, (await small).nbytes] == [50, 5]
    assert budget.pictures.used == 55


async def test_uses_do_not_wait_for_each_other() -> None:
    budget = ByteBudget(TOTAL, MESSAGE)
    held = await budget.pictures.acquire(80, None)
    waiting = await start_acquiring(budget.pictures, 1)
    with await budget.messages.acquire(10, None), await budget.answers.acquire(10, None):
        other = await start_acquiring(budget.answers, 1)
        assert not other.done()
        held.release()
        await other
    await waiting


async def test_a_request_over_the_limit_is_invalid() -> None:
    budget = ByteBudget(TOTAL, MESSAGE)
    with pytest.raises(InvalidInput, match=r"81 bytes for its pictures; allowed are 80 \(--frontend-bytes\)"):
        await budget.pictures.acquire(81, None)


async def test_a_request_without_time_to_wait_is_refused() -> None:
    budget = ByteBudget(TOTAL, MESSAGE)
    held = budget.answers.try_acquire(50)
    assert held
    with pytest.raises(Overloaded, match="50 of 50 bytes are in use") as refused:
        await budget.answers.acquire(1, time.monotonic())
    assert refused.value.reason == "answers_bytes"
    assert refused.value.retry_after > 0
    with pytest.raises(Overloaded):
        await budget.answers.acquire(1, time.monotonic() + 0.002)
    held.release()
    assert budget.answers.try_acquire(50), "a refused request holds nothing"


async def test_a_cancelled_waiter_lets_the_next_one_through() -> None:
    budget = ByteBudget(TOTAL, MESSAGE)
    assert budget.pictures.try_acquire(70)
    large = await start_acquiring(budget.pictures, 20)
    small = await start_acquiring(budget.pictures, 10)
    large.cancel()
    assert (await small).nbytes == 10
    assert large.cancelled() or large.cancelling()


async def test_a_grant_to_a_waiter_that_is_being_cancelled_is_released() -> None:
    budget = ByteBudget(TOTAL, MESSAGE)
    held = await budget.pictures.acquire(80, None)
    waiting = await start_acquiring(budget.pictures, 80)
    held.release()
    asyncio.get_running_loop().call_soon(waiting.cancel)  # after the grant was given, before the task goes on
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert budget.pictures.used == 0


async def test_a_waiter_that_is_cancelled_before_memory_is_free_takes_none() -> None:
    budget = ByteBudget(TOTAL, MESSAGE)
    held = await budget.pictures.acquire(80, None)
    waiting = await start_acquiring(budget.pictures, 80)
    waiting.cancel()
    held.release()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert budget.pictures.used == 0


async def test_grants_may_be_released_from_threads_and_again() -> None:
    budget = ByteBudget(TOTAL, MESSAGE)
    grant = await budget.pictures.acquire(80, None)
    waiting = await start_acquiring(budget.pictures, 30)
    await asyncio.to_thread(grant.release)
    grant.release()
    await waiting
    assert budget.pictures.used == 30


async def test_gauges_have_the_bytes_of_each_use() -> None:
    budget, metrics = ByteBudget(TOTAL, MESSAGE), Metrics()
    with await budget.messages.acquire(7, None):
        budget.update_gauges(metrics)
    assert metrics.frontend_bytes.snapshot() == {("messages",): (7.0,), ("pictures",): (0.0,), ("answers",): (0.0,)}
