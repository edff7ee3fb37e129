"""The frontend's side of the engine against a worker that the test plays by hand, message by message."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import AsyncIterator
from typing import Any, ClassVar

import pytest
import pytest_asyncio

from dinov3_server.config.settings import Settings
from dinov3_server.engine.admission import Reservation
from dinov3_server.engine.arena import PAGE, Arena
from dinov3_server.engine.block import Block
from dinov3_server.engine.channel import Channel, pair
from dinov3_server.engine.engine import SPREAD_IMAGES, Engine
from dinov3_server.engine.forecast import Demand
from dinov3_server.engine.messages import (
    NO_LOAD,
    Attach,
    Cancel,
    Dropped,
    Hello,
    JobResult,
    JobRows,
    Load,
    LoadReport,
    Results,
    Started,
    Submit,
)
from dinov3_server.engine.shares import ANONYMOUS, Caller
from dinov3_server.engine.worker_connection import BlockResult
from dinov3_server.errors import DeadlineExceeded, InternalError, InvalidInput, Overloaded, Unavailable
from dinov3_server.metrics import Metrics
from dinov3_server.models.interface import FeatureSpec, Output, PixelShape
from tests.support.numpy_runner import NumpyRunner
from tests.support.waiting import open_descriptors, until_async

SHAPE = PixelShape(32, 32, "uint8")
SPEC = FeatureSpec((Output("cls"), Output("patches")), "float32")
INFO = NumpyRunner("cpu").info


class PlayedWorker:
    """The other end of a channel, in the test's hands."""

    played: ClassVar[list[PlayedWorker]] = []  # closed by the engine fixture

    def __init__(self, engine: Engine, index: int = 0) -> None:
        ours, theirs = pair()
        self.engine, self.index = engine, index
        self.channel = Channel(theirs)
        self.heard: list[Any] = []
        self.played.append(self)
        engine.connect(index, ours.detach())

    async def hello(self) -> PlayedWorker:
        before = len(self.engine.devices)
        self.say(Hello(INFO))
        await until_async(lambda: len(self.engine.devices) > before)
        return self

    def say(self, message: object) -> None:
        self.channel.send(message)
        self.channel.flush()

    async def hear(self, kind: type) -> Any:
        """The next message, which must be of `kind`."""

        def arrived() -> bool:
            for message, fds in self.channel.receive():
                assert len(fds) == isinstance(message, Attach)
                if fds:
                    os.close(fds[0])
                else:
                    self.heard.append(message)
            return bool(self.heard)

        await until_async(arrived, f"a {kind.__name__}")
        message = self.heard.pop(0)
        assert isinstance(message, kind)
        return message

    def start(self, submit: Submit, *rows: int) -> None:
        self.say(Started((JobRows(submit.job, rows or submit.rows),)))

    def finish(self, submit: Submit, *rows: int, failed: dict[int, str] | None = None, images: int = 1) -> None:
        self.say(Results((JobResult(submit.job, rows or submit.rows, failed or {}, 0.5, 0.25, images),), NO_LOAD, None))

    def die(self) -> None:
        self.channel.close()

    def reaped(self, back_in: float = 0.0, killed: bool = False) -> None:
        self.engine.worker_gone(self.index, back_in, killed)


@pytest_asyncio.fixture
async def engine() -> AsyncIterator[Engine]:
    engine = Engine(Arena(64 * PAGE), Settings(max_queue_images=64, max_images_per_request=48), Metrics())
    yield engine
    engine.close()
    while PlayedWorker.played:
        PlayedWorker.played.pop().channel.close()


def demand(images: int, nbytes: int = 1, caller: Caller = ANONYMOUS, bulk: bool = False) -> Demand:
    return Demand(images, nbytes, images * INFO.tokens(SHAPE), caller, bulk)


def reserve(engine: Engine, images: int) -> tuple[Reservation, Block]:
    reservation = engine.reserve(demand(images, Block.plan(INFO, SHAPE, images, SPEC).end), None)
    return reservation, Block.plan(INFO, SHAPE, images, SPEC, reservation.offset)


def run(
    engine: Engine, images: int, deadline: float | None = None, bulk: bool = False
) -> tuple[Reservation, asyncio.Task[BlockResult]]:
    reservation, block = reserve(engine, images)
    return reservation, asyncio.create_task(engine.run(reservation, block, range(images), deadline, bulk))


async def test_before_the_first_worker_everything_is_unavailable(engine):
    with pytest.raises(Unavailable, match="loaded") as refused:
        engine.reserve(demand(1), None)
    assert refused.value.retry_after > 0


async def test_rows_in_features_out_and_the_range_comes_back(engine):
    worker = await PlayedWorker(engine).hello()
    reservation, task = run(engine, 3, deadline=time.monotonic() + 60, bulk=True)
    submit = await worker.hear(Submit)
    assert submit.rows == (0, 1, 2)
    assert submit.bulk
    assert submit.block.pixel_offset == reservation.offset
    worker.start(submit, 0)
    worker.finish(submit, 0, images=7)
    worker.finish(submit, 1, 2, failed={2: "the model failed on this image"}, images=2)
    result = await task
    assert list(result.failed) == [2]
    assert isinstance(result.failed[2], InternalError)
    assert (result.queue_seconds, result.inference_seconds) == (0.5, 0.5)
    assert (result.batch_images, result.batches) == (7, 2)
    assert engine.admission.arena.used_bytes
    reservation.release()
    reservation.release()
    assert engine.admission.arena.used_bytes == 0


async def test_admission_counts_images_and_bytes_until_the_reservation_ends(engine):
    await PlayedWorker(engine).hello()
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


async def test_while_requests_are_refused_an_estimate_from_below_is_enough_to_refuse(engine):
    worker = await PlayedWorker(engine).hello()
    least = demand(1)._replace(tokens=1)
    soon = time.monotonic() + 0.05
    reservation, task = run(engine, 40)  # at the pace of a device that is not known yet, this takes longer than that
    submit = await worker.hear(Submit)
    worker.start(submit, *range(40))
    await until_async(lambda: engine.forecast(least).wait)
    engine.check_time(least, soon)  # not asked while nothing is refused
    with pytest.raises(Overloaded) as refused:
        engine.reserve(demand(1), soon)
    assert refused.value.reason == "deadline"
    with pytest.raises(Overloaded):
        engine.check_time(least, soon)
    engine.check_time(least, time.monotonic() + 3600)
    engine.check_time(least, soon)  # until the next one is refused
    worker.finish(submit)
    await task
    reservation.release()


async def test_a_cancelled_call_keeps_its_range_until_the_worker_has_answered(engine):
    worker = await PlayedWorker(engine).hello()
    reservation, task = run(engine, 2)
    submit = await worker.hear(Submit)
    worker.start(submit, 0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    reservation.release()
    assert await worker.hear(Cancel) == Cancel(submit.job)
    assert engine.admission.arena.used_bytes, "a batch that runs still writes to the range"
    worker.say(Dropped(submit.job, (1,), "cancelled"))
    worker.finish(submit, 0)
    await until_async(lambda: engine.admission.arena.used_bytes == 0)


async def test_a_passed_deadline_fails_the_call_and_says_where_it_waited(engine):
    worker = await PlayedWorker(engine).hello()
    for start, where in ((False, "waiting for the device"), (True, "on the device")):
        reservation, task = run(engine, 2, deadline=time.monotonic() + 0.05)
        submit = await worker.hear(Submit)
        if start:
            worker.start(submit)
            await until_async(lambda job=submit.job: engine._workers[0].jobs[job].started)
        with pytest.raises(DeadlineExceeded, match=where):
            await task
        reservation.release()
        await worker.hear(Cancel)
        assert engine.admission.arena.used_bytes
        worker.say(Dropped(submit.job, submit.rows, "expired"))
        await until_async(lambda: engine.admission.arena.used_bytes == 0)


async def test_the_workers_own_expiry_ends_the_call_too(engine):
    worker = await PlayedWorker(engine).hello()
    reservation, task = run(engine, 1, deadline=time.monotonic() + 60)
    submit = await worker.hear(Submit)
    worker.say(Dropped(submit.job, submit.rows, "expired"))
    with pytest.raises(DeadlineExceeded):
        await task
    reservation.release()
    assert engine.admission.arena.used_bytes == 0


async def test_queued_rows_of_a_dead_worker_go_to_its_successor_in_their_order(engine):
    worker = await PlayedWorker(engine).hello()
    calls = [run(engine, 1) for _ in range(3)]
    first = [await worker.hear(Submit) for _ in calls]
    worker.die()
    worker.reaped()
    later = run(engine, 1)  # while nobody lives: it queues
    successor = await PlayedWorker(engine).hello()
    again = [await successor.hear(Submit) for _ in range(4)]
    assert [submit.block.pixel_offset for submit in again[:3]] == [submit.block.pixel_offset for submit in first]
    assert [submit.enqueued for submit in again[:3]] == [submit.enqueued for submit in first]
    assert not any(submit.quarantined for submit in again)
    for submit in again:
        successor.finish(submit)
    for reservation, task in (*calls, later):
        assert (await task).failed == {}
        reservation.release()
    assert engine.admission.arena.used_bytes == 0


async def test_nothing_is_taken_back_before_the_worker_is_reaped(engine):
    """A closed channel is not death: until the process is reaped it may still write to the arena."""
    worker = await PlayedWorker(engine).hello()
    reservation, task = run(engine, 1)
    submit = await worker.hear(Submit)
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


async def test_announced_rows_run_again_alone_and_only_the_one_that_kills_alone_fails(engine):
    worker = await PlayedWorker(engine).hello()
    calls = [run(engine, 3), run(engine, 2)]
    submits = [await worker.hear(Submit) for _ in calls]
    worker.start(submits[0], 1, 2)
    worker.start(submits[1], 0)
    worker.die()
    worker.reaped()
    worker = await PlayedWorker(engine).hello()
    healthy = [await worker.hear(Submit) for _ in range(2)]
    suspects = [await worker.hear(Submit) for _ in range(2)]
    assert [(submit.rows, submit.quarantined) for submit in healthy] == [((0,), False), ((1,), False)]
    assert [(submit.rows, submit.quarantined) for submit in suspects] == [((1, 2), True), ((0,), True)]
    for submit in healthy:
        worker.finish(submit)
    worker.start(suspects[0], 1)
    worker.finish(suspects[0], 1)
    worker.start(suspects[0], 2)  # this one kills it again, all alone
    worker.die()
    worker.reaped()
    worker = await PlayedWorker(engine).hello()
    last = await worker.hear(Submit)
    assert (last.rows, last.quarantined) == ((0,), True)
    worker.finish(last)
    results = [await task for _, task in calls]
    assert list(results[0].failed) == [2]
    assert results[1].failed == {}
    for reservation, _ in calls:
        reservation.release()
    assert engine.admission.arena.used_bytes == 0


async def kill_with_the_row_on_the_device(engine: Engine, worker: PlayedWorker, killed: bool) -> PlayedWorker:
    """Kill the worker of a single row, and return its successor."""
    worker.start(await worker.hear(Submit))
    worker.die()
    worker.reaped(killed=killed)
    return await PlayedWorker(engine).hello()


@pytest.mark.parametrize("last_killed", [True, False])
async def test_one_sigkill_of_a_worker_alone_with_a_row_may_have_come_from_outside(engine, last_killed):
    worker = await PlayedWorker(engine).hello()
    reservation, task = run(engine, 1)
    for killed in (True, True, last_killed):
        assert not task.done()
        worker = await kill_with_the_row_on_the_device(engine, worker, killed)
    assert list((await task).failed) == [0]
    reservation.release()


async def test_a_row_whose_worker_was_killed_twice_from_outside_is_answered(engine):
    worker = await PlayedWorker(engine).hello()
    reservation, task = run(engine, 1)
    for _ in range(2):
        worker = await kill_with_the_row_on_the_device(engine, worker, killed=True)
    worker.finish(await worker.hear(Submit))
    assert (await task).failed == {}
    reservation.release()


async def test_results_that_a_worker_sent_before_it_died_count(engine):
    worker = await PlayedWorker(engine).hello()
    reservation, task = run(engine, 1)
    submit = await worker.hear(Submit)
    worker.start(submit)
    worker.finish(submit)
    worker.die()
    worker.reaped()
    assert (await task).failed == {}
    reservation.release()
    assert engine.admission.arena.used_bytes == 0


async def test_no_worker_before_the_deadline_is_unavailable_at_once_with_the_time_to_wait(engine):
    worker = await PlayedWorker(engine).hello()
    worker.die()
    worker.reaped(back_in=20.0)
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


async def test_a_call_that_waits_for_a_worker_ends_at_its_deadline(engine):
    worker = await PlayedWorker(engine).hello()
    worker.die()
    worker.reaped()
    reservation, task = run(engine, 1, deadline=time.monotonic() + 0.05)
    with pytest.raises(DeadlineExceeded, match="waiting for a worker"):
        await task
    reservation.release()
    assert engine.admission.arena.used_bytes == 0


async def test_rows_go_to_the_worker_with_the_least_to_do_and_large_requests_are_spread(engine):
    workers = [await PlayedWorker(engine, index).hello() for index in range(2)]
    small = run(engine, 2)
    submit = await workers[0].hear(Submit)
    workers[0].finish(submit)
    workers[0].say(Results((), Load(interactive=10_000), None))  # others keep it busy
    await small[1]
    second = run(engine, 1)
    submit = await workers[1].hear(Submit)
    workers[1].finish(submit)
    await second[1]
    workers[0].say(Results((), NO_LOAD, None))
    await until_async(lambda: not engine._workers[0].others.tokens)
    for reservation, _ in (small, second):
        reservation.release()
    large = run(engine, SPREAD_IMAGES + 5)
    submits = [await worker.hear(Submit) for worker in workers]
    assert sorted(len(submit.rows) for submit in submits) == [5, SPREAD_IMAGES]
    for worker, submit in zip(workers, submits, strict=True):
        worker.finish(submit)
    await large[1]
    large[0].release()
    assert engine.admission.arena.used_bytes == 0


async def test_a_worker_that_this_frontend_never_met_may_go_too(engine):
    """It died before it was connected; its successor's time still counts."""
    engine.worker_gone(3, 20.0)
    worker = await PlayedWorker(engine).hello()
    worker.die()
    worker.reaped(back_in=30.0)
    reservation, task = run(engine, 1, deadline=time.monotonic() + 10)
    with pytest.raises(Unavailable) as refused:
        await task
    assert 15 < refused.value.retry_after <= 20
    reservation.release()


async def test_of_several_dead_workers_the_first_one_back_counts(engine):
    workers = [await PlayedWorker(engine, index).hello() for index in range(2)]
    for worker, back_in in zip(workers, (1.0, 30.0), strict=True):
        worker.die()
        worker.reaped(back_in=back_in)
    reservation, task = run(engine, 1, deadline=time.monotonic() + 10)
    await asyncio.sleep(0)
    assert not task.done(), "a worker is expected in time: the call waits for it"
    worker = await PlayedWorker(engine).hello()
    worker.finish(await worker.hear(Submit))
    assert (await task).failed == {}
    reservation.release()


async def test_a_backlog_of_others_that_is_gone_is_forgotten(engine):
    workers = [await PlayedWorker(engine, index).hello() for index in range(2)]
    workers[0].say(LoadReport(Load(bulk=10_000), None))
    await until_async(lambda: engine._workers[0].others.tokens)
    for busy, free in ((0, 1), (1, 0)):
        reservation, task = run(engine, 1)
        workers[free].finish(await workers[free].hear(Submit))
        await task
        reservation.release()
        workers[busy].say(LoadReport(NO_LOAD, None))
        workers[free].say(LoadReport(Load(bulk=10_000), None))
        await until_async(lambda now=busy: not engine._workers[now].others.tokens)
        await until_async(lambda now=free: engine._workers[now].others.tokens)


async def test_without_a_descriptor_for_it_a_worker_is_connected_another_time(
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
    await PlayedWorker(engine).hello()
    second, other = pair()
    with other:
        engine.connect(0, second.detach())  # asked for twice
    assert engine._channels[0].fileno() >= 0
    assert len(open_descriptors() - before) == 2  # both ends of the first
    assert engine.devices == ("cpu",)
