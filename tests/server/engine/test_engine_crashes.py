"""The engine of a frontend, when workers die."""

from __future__ import annotations

import asyncio
import time

import pytest

from dinov3_server.engine.engine import Engine
from dinov3_server.engine.messages import (
    Submit,
)
from dinov3_server.errors import DeadlineExceeded, Unavailable
from tests.server.engine.engine_rig import FakeWorker, run


async def test_queued_rows_of_a_dead_worker_go_to_its_successor_in_order(engine):
    worker = await FakeWorker(engine).hello()
    calls = [run(engine, 1) for _ in range(3)]
    first = [await worker.receive(Submit) for _ in calls]
    worker.die()
    worker.reaped()
    later = run(engine, 1)  # queued while there is no worker
    successor = await FakeWorker(engine).hello()
    again = [await successor.receive(Submit) for _ in range(4)]
    assert [submit.block.pixel_offset for submit in again[:3]] == [submit.block.pixel_offset for submit in first]
    assert [submit.enqueued for submit in again[:3]] == [submit.enqueued for submit in first]
    assert not any(submit.quarantined for submit in again)
    for submit in again:
        successor.finish(submit)
    for reservation, task in (*calls, later):
        assert (await task).failed == {}
        reservation.release()
    assert engine.admission.arena.used_bytes == 0


async def test_ranges_are_not_freed_before_the_worker_is_reaped(engine):
    """A worker whose channel is closed may still write to the arena until it has been reaped."""
    worker = await FakeWorker(engine).hello()
    reservation, task = run(engine, 1)
    submit = await worker.receive(Submit)
    worker.start(submit)
    worker.die()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    reservation.release()
    await asyncio.sleep(0)
    assert engine.admission.arena.used_bytes
    worker.reaped()
    assert engine.admission.arena.used_bytes == 0


async def test_announced_rows_run_again_in_quarantine_and_only_the_row_that_kills_a_worker_alone_fails(engine):
    worker = await FakeWorker(engine).hello()
    calls = [run(engine, 3), run(engine, 2)]
    submits = [await worker.receive(Submit) for _ in calls]
    worker.start(submits[0], 1, 2)
    worker.start(submits[1], 0)
    worker.die()
    worker.reaped()
    worker = await FakeWorker(engine).hello()
    healthy = [await worker.receive(Submit) for _ in range(2)]
    suspects = [await worker.receive(Submit) for _ in range(2)]
    assert [(submit.rows, submit.quarantined) for submit in healthy] == [((0,), False), ((1,), False)]
    assert [(submit.rows, submit.quarantined) for submit in suspects] == [((1, 2), True), ((0,), True)]
    for submit in healthy:
        worker.finish(submit)
    worker.start(suspects[0], 1)
    worker.finish(suspects[0], 1)
    worker.start(suspects[0], 2)  # kills the worker again, alone
    worker.die()
    worker.reaped()
    worker = await FakeWorker(engine).hello()
    last = await worker.receive(Submit)
    assert (last.rows, last.quarantined) == ((0,), True)
    worker.finish(last)
    results = [await task for _, task in calls]
    assert list(results[0].failed) == [2]
    assert results[1].failed == {}
    for reservation, _ in calls:
        reservation.release()
    assert engine.admission.arena.used_bytes == 0


async def kill_with_the_row_on_the_device(engine: Engine, worker: FakeWorker, killed: bool) -> FakeWorker:
    """Kill the worker of a single row, and return its successor."""
    worker.start(await worker.receive(Submit))
    worker.die()
    worker.reaped(killed=killed)
    return await FakeWorker(engine).hello()


@pytest.mark.parametrize("last_killed", [True, False])
async def test_a_row_fails_only_with_the_second_death_of_a_worker_alone_with_it_if_the_first_was_a_sigkill(
    engine, last_killed
):
    worker = await FakeWorker(engine).hello()
    reservation, task = run(engine, 1)
    for killed in (True, True, last_killed):
        assert not task.done()
        worker = await kill_with_the_row_on_the_device(engine, worker, killed)
    assert list((await task).failed) == [0]
    reservation.release()


async def test_a_row_whose_workers_were_killed_twice_is_answered_by_the_third(engine):
    worker = await FakeWorker(engine).hello()
    reservation, task = run(engine, 1)
    for _ in range(2):
        worker = await kill_with_the_row_on_the_device(engine, worker, killed=True)
    worker.finish(await worker.receive(Submit))
    assert (await task).failed == {}
    reservation.release()


async def test_results_that_a_worker_sent_before_it_died_are_used(engine):
    worker = await FakeWorker(engine).hello()
    reservation, task = run(engine, 1)
    submit = await worker.receive(Submit)
    worker.start(submit)
    worker.finish(submit)
    worker.die()
    worker.reaped()
    assert (await task).failed == {}
    reservation.release()
    assert engine.admission.arena.used_bytes == 0


async def test_a_run_is_unavailable_at_once_if_no_worker_is_expected_before_its_deadline(engine):
    worker = await FakeWorker(engine).hello()
    worker.die()
    worker.reaped(restart_seconds=20.0)
    reservation, task = run(engine, 1, deadline=time.monotonic() + 10)
    with pytest.raises(Unavailable) as refused:
        await task
    assert 15 < refused.value.retry_after <= 20
    reservation.release()
    reservation, task = run(engine, 1, deadline=time.monotonic() + 60)
    await asyncio.sleep(0)
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    reservation.release()
    assert engine.admission.arena.used_bytes == 0


async def test_a_run_that_waits_for_a_worker_fails_at_its_deadline(engine):
    worker = await FakeWorker(engine).hello()
    worker.die()
    worker.reaped()
    reservation, task = run(engine, 1, deadline=time.monotonic() + 0.05)
    with pytest.raises(DeadlineExceeded, match="waiting for a worker"):
        await task
    reservation.release()
    assert engine.admission.arena.used_bytes == 0


async def test_the_death_of_a_worker_that_was_never_connected_is_accepted(engine):
    """A worker that died before it was connected still counts as expected to restart."""
    engine.worker_gone(3, 20.0)
    worker = await FakeWorker(engine).hello()
    worker.die()
    worker.reaped(restart_seconds=30.0)
    reservation, task = run(engine, 1, deadline=time.monotonic() + 10)
    with pytest.raises(Unavailable) as refused:
        await task
    assert 15 < refused.value.retry_after <= 20
    reservation.release()


async def test_with_several_dead_workers_a_run_waits_for_the_first_one_expected(engine):
    workers = [await FakeWorker(engine, index).hello() for index in range(2)]
    for worker, restart_seconds in zip(workers, (1.0, 30.0), strict=True):
        worker.die()
        worker.reaped(restart_seconds=restart_seconds)
    reservation, task = run(engine, 1, deadline=time.monotonic() + 10)
    await asyncio.sleep(0)
    assert not task.done(), "the run waits for a worker that is expected in time"
    worker = await FakeWorker(engine).hello()
    worker.finish(await worker.receive(Submit))
    assert (await task).failed == {}
    reservation.release()
