"""The byte budget of a frontend: floors, lines, and grants from any thread."""

from __future__ import annotations

import asyncio
import time

import pytest

from dinov3_server.api.budget import ByteBudget, MemoryGrant, Quota
from dinov3_server.errors import InvalidInput, Overloaded
from dinov3_server.metrics import Metrics

# Of 100 bytes 10 are kept for messages, 10 for answers and 40 for pictures; 40 are anybody's.
TOTAL, MESSAGE = 100, 10


async def taking(quota: Quota, nbytes: int) -> asyncio.Task[MemoryGrant]:
    """A task that has come to wait, or has its grant."""
    task = asyncio.create_task(quota.acquire(nbytes, None))
    await asyncio.sleep(0)
    return task


async def test_a_use_has_its_floor_and_what_nobody_else_has() -> None:
    budget = ByteBudget(TOTAL, MESSAGE)
    assert [each.limit for each in (budget.messages, budget.pictures, budget.answers)] == [50, 80, 50]
    assert budget.messages.try_acquire(50)
    assert budget.messages.try_acquire(1) is None
    assert budget.pictures.try_acquire(41) is None
    assert budget.pictures.try_acquire(40)
    assert budget.answers.try_acquire(10)
    assert budget.answers.try_acquire(1) is None


async def test_what_does_not_fit_waits_in_line() -> None:
    budget = ByteBudget(TOTAL, MESSAGE)
    first = await budget.pictures.acquire(60, None)
    large = await taking(budget.pictures, 50)
    small = await taking(budget.pictures, 5)
    assert [large.done(), small.done()] == [False, False], "20 are free, and the small one stands behind"
    assert budget.pictures.try_acquire(1) is None, "nothing overtakes those that wait"
    first.release()
    assert [(await large).nbytes, (await small).nbytes] == [50, 5]
    assert budget.pictures.used == 55


async def test_another_use_does_not_wait_behind_it() -> None:
    budget = ByteBudget(TOTAL, MESSAGE)
    held = await budget.pictures.acquire(80, None)
    waiting = await taking(budget.pictures, 1)
    with await budget.messages.acquire(10, None), await budget.answers.acquire(10, None):
        other = await taking(budget.answers, 1)
        assert not other.done()
        held.release()
        await other
    await waiting


async def test_what_could_never_fit_is_the_callers_fault() -> None:
    budget = ByteBudget(TOTAL, MESSAGE)
    with pytest.raises(InvalidInput, match=r"81 bytes for its pictures; .* has 80 \(--frontend-bytes\)"):
        await budget.pictures.acquire(81, None)


async def test_no_time_is_a_refusal() -> None:
    budget = ByteBudget(TOTAL, MESSAGE)
    held = budget.answers.try_acquire(50)
    assert held
    with pytest.raises(Overloaded, match="50 of at most 50 are in use") as refused:
        await budget.answers.acquire(1, time.monotonic())
    assert refused.value.reason == "answers_bytes"
    assert refused.value.retry_after > 0
    with pytest.raises(Overloaded):
        await budget.answers.acquire(1, time.monotonic() + 0.002)
    held.release()
    assert budget.answers.try_acquire(50), "who gave up holds nothing"


async def test_who_gives_up_lets_those_behind_through() -> None:
    budget = ByteBudget(TOTAL, MESSAGE)
    assert budget.pictures.try_acquire(70)
    large = await taking(budget.pictures, 20)
    small = await taking(budget.pictures, 10)
    large.cancel()
    assert (await small).nbytes == 10
    assert large.cancelled() or large.cancelling()


async def test_a_permit_that_comes_as_its_waiter_leaves_is_not_lost() -> None:
    budget = ByteBudget(TOTAL, MESSAGE)
    held = await budget.pictures.acquire(80, None)
    waiting = await taking(budget.pictures, 80)
    held.release()
    asyncio.get_running_loop().call_soon(waiting.cancel)  # after the grant was given, before the task goes on
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert budget.pictures.used == 0


async def test_a_waiter_that_is_cancelled_before_room_comes_takes_none() -> None:
    budget = ByteBudget(TOTAL, MESSAGE)
    held = await budget.pictures.acquire(80, None)
    waiting = await taking(budget.pictures, 80)
    waiting.cancel()
    held.release()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert budget.pictures.used == 0


async def test_permits_are_resized_and_released_from_threads() -> None:
    budget = ByteBudget(TOTAL, MESSAGE)
    grant = await budget.pictures.acquire(80, None)
    waiting = await taking(budget.pictures, 30)
    await asyncio.to_thread(grant.resize, 50)
    await waiting
    assert budget.pictures.used == 80
    grant.resize(90)
    assert budget.pictures.used == 120, "what is there is counted"
    assert budget.messages.try_acquire(10), "each use has its floor all the same"
    assert budget.messages.try_acquire(1) is None
    await asyncio.to_thread(grant.release)
    grant.release()
    assert budget.pictures.used == 30


async def test_the_gauges_show_bytes_by_use() -> None:
    budget, metrics = ByteBudget(TOTAL, MESSAGE), Metrics()
    with await budget.messages.acquire(7, None):
        budget.update_gauges(metrics)
    assert metrics.frontend_bytes.snapshot() == {("messages",): (7.0,), ("pictures",): (0.0,), ("answers",): (0.0,)}
