"""The engine of a frontend, with fake workers that send and receive messages one by one."""

from __future__ import annotations

import asyncio
import errno
import os
import time

import pytest

from dinov3_server.engine.arena import PAGE
from dinov3_server.engine.channel import pair
from dinov3_server.engine.engine import SPREAD_IMAGES, Engine
from dinov3_server.engine.messages import (
    NO_LOAD,
    Cancel,
    Dropped,
    Load,
    LoadReport,
    Results,
    Submit,
)
from dinov3_server.engine.shares import Caller
from dinov3_server.errors import DeadlineExceeded, InternalError, InvalidInput, Overloaded, Unavailable
from tests.server.engine.engine_rig import FakeWorker, demand, run
from tests.support.waiting import open_descriptors, until_async


async def test_before_the_first_worker_requests_are_unavailable(engine):
    with pytest.raises(Unavailable, match="loaded") as refused:
        engine.reserve(demand(1), None)
    assert refused.value.retry_after > 0


async def test_a_run_returns_the_results_of_its_rows_and_release_frees_the_range(engine):
    worker = await FakeWorker(engine).hello()
    reservation, task = run(engine, 3, deadline=time.monotonic() + 60, bulk=True)
    submit = await worker.receive(Submit)
    assert submit.rows == (0, 1, 2)
    assert submit.bulk
    assert submit.block.pixel_offset == reservation.offset
    worker.start(submit, 0)
    worker.finish(submit, 0, images=7)
    worker.finish(submit, 1, 2, failed={2: "the model failed on this image"}, images=2)
    result = await task
    assert list(result.failed) == [2]
    assert isinstance(result.failed[2], InternalError)
    assert [(batch.rows, batch.batch_images) for batch in result.batches] == [((0,), 7), ((1, 2), 2)]
    assert all(batch.queue_seconds and batch.inference_seconds for batch in result.batches)
    assert submit.enqueued == result.enqueued
    assert engine.admission.arena.used_bytes
    reservation.release()
    reservation.release()
    assert engine.admission.arena.used_bytes == 0


async def test_admission_counts_images_and_bytes_until_the_reservation_ends(engine):
    await FakeWorker(engine).hello()
    with pytest.raises(InvalidInput, match="max-queue-images"):
        engine.reserve(demand(50), None)
    with pytest.raises(InvalidInput, match="arena-bytes"):
        engine.reserve(demand(1, 50 * PAGE), None)
    held = engine.reserve(demand(45, PAGE), None)
    with pytest.raises(Overloaded, match="this connection holds 45 images, and 5 more") as refused:
        engine.reserve(demand(5), None)
    assert refused.value.reason == "share"
    assert refused.value.retry_after > 0
    other = engine.reserve(demand(2, 40 * PAGE, Caller("other", "")), None)
    with pytest.raises(Overloaded) as refused:
        engine.reserve(demand(1, 24 * PAGE, Caller("third", "")), None)
    assert refused.value.reason == "arena"
    held.release()
    other.release()
    engine.reserve(demand(49, 49 * PAGE), None).release()


async def test_while_requests_are_refused_a_lower_estimate_is_enough_to_refuse(engine):
    worker = await FakeWorker(engine).hello()
    least = demand(1)._replace(tokens=1)
    soon = time.monotonic() + 0.05
    reservation, task = run(engine, 40)  # by the initial estimate of the pace, this takes longer than 0.05 s
    submit = await worker.receive(Submit)
    worker.start(submit, *range(40))
    await until_async(lambda: engine.forecast(least).wait)
    engine.refuse_early(least, soon)  # not checked while no request is refused
    with pytest.raises(Overloaded) as refused:
        engine.reserve(demand(1), soon)
    assert refused.value.reason == "deadline"
    with pytest.raises(Overloaded):
        engine.refuse_early(least, soon)
    engine.refuse_early(least, time.monotonic() + 3600)
    engine.refuse_early(least, soon)  # nor after a request that was not refused
    worker.finish(submit)
    await task
    reservation.release()


async def test_a_cancelled_run_keeps_its_range_until_the_worker_has_answered(engine):
    worker = await FakeWorker(engine).hello()
    reservation, task = run(engine, 2)
    submit = await worker.receive(Submit)
    worker.start(submit, 0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    reservation.release()
    assert await worker.receive(Cancel) == Cancel(submit.job)
    assert engine.admission.arena.used_bytes, "a running batch still writes to the range"
    worker.send(Dropped(submit.job, (1,), "cancelled"))
    worker.finish(submit, 0)
    await until_async(lambda: engine.admission.arena.used_bytes == 0)


async def test_a_passed_deadline_fails_the_run_and_the_error_says_where_it_waited(engine):
    worker = await FakeWorker(engine).hello()
    for start, where in ((False, "waiting for the device"), (True, "on the device")):
        reservation, task = run(engine, 2, deadline=time.monotonic() + 0.05)
        submit = await worker.receive(Submit)
        if start:
            worker.start(submit)
            await until_async(lambda job=submit.job: engine._workers[0].jobs[job].started)
        with pytest.raises(DeadlineExceeded, match=where):
            await task
        reservation.release()
        await worker.receive(Cancel)
        assert engine.admission.arena.used_bytes
        worker.send(Dropped(submit.job, submit.rows, "expired"))
        await until_async(lambda: engine.admission.arena.used_bytes == 0)


async def test_rows_that_the_worker_reports_as_expired_fail_the_run(engine):
    worker = await FakeWorker(engine).hello()
    reservation, task = run(engine, 1, deadline=time.monotonic() + 60)
    submit = await worker.receive(Submit)
    worker.send(Dropped(submit.job, submit.rows, "expired"))
    with pytest.raises(DeadlineExceeded):
        await task
    reservation.release()
    assert engine.admission.arena.used_bytes == 0


async def test_rows_go_to_the_least_loaded_worker_and_large_requests_are_spread(engine):
    workers = [await FakeWorker(engine, index).hello() for index in range(2)]
    small = run(engine, 2)
    submit = await workers[0].receive(Submit)
    workers[0].finish(submit)
    workers[0].send(Results((), Load(interactive=10_000), None))  # of other frontends
    await small[1]
    second = run(engine, 1)
    submit = await workers[1].receive(Submit)
    workers[1].finish(submit)
    await second[1]
    workers[0].send(Results((), NO_LOAD, None))
    await until_async(lambda: not engine._workers[0].others.tokens)
    for reservation, _ in (small, second):
        reservation.release()
    large = run(engine, SPREAD_IMAGES + 5)
    submits = [await worker.receive(Submit) for worker in workers]
    assert sorted(len(submit.rows) for submit in submits) == [5, SPREAD_IMAGES]
    for worker, submit in zip(workers, submits, strict=True):
        worker.finish(submit)
    await large[1]
    large[0].release()
    assert engine.admission.arena.used_bytes == 0


async def test_a_load_report_replaces_the_one_before(engine):
    workers = [await FakeWorker(engine, index).hello() for index in range(2)]
    workers[0].send(LoadReport(Load(bulk=10_000), None))
    await until_async(lambda: engine._workers[0].others.tokens)
    for busy, free in ((0, 1), (1, 0)):
        reservation, task = run(engine, 1)
        workers[free].finish(await workers[free].receive(Submit))
        await task
        reservation.release()
        workers[busy].send(LoadReport(NO_LOAD, None))
        workers[free].send(LoadReport(Load(bulk=10_000), None))
        await until_async(lambda now=busy: not engine._workers[now].others.tokens)
        await until_async(lambda now=free: engine._workers[now].others.tokens)


async def test_a_connection_that_failed_for_lack_of_descriptors_can_be_made_later(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_descriptors()
    with pytest.raises(OSError, match="Too many open files"):
        engine.connect(0, -1)

    def no_descriptor(_: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patched:
        patched.setattr(os, "dup", no_descriptor)
        ours, theirs = pair()
        with theirs, pytest.raises(OSError, match="Too many open files"):
            engine.connect(0, ours.detach())
    assert open_descriptors() == before
    await FakeWorker(engine).hello()
    second, other = pair()
    with other:
        engine.connect(0, second.detach())  # requested twice
    assert engine._channels[0].fileno() >= 0
    assert len(open_descriptors() - before) == 2  # both ends of the first
    assert engine.devices == ("cpu",)
