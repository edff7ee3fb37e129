"""The decisions of the worker's loop, with a runner that the test controls batch by batch."""

from __future__ import annotations

import threading
import time

import pytest

from dinov3_server.engine import worker as worker_module
from dinov3_server.engine.messages import Cancel, JobRows, Started
from dinov3_server.models.interface import DeviceLost, DeviceOutOfMemory, PixelShape
from tests.server.engine.worker_rig import SHAPE
from tests.support.waiting import LIMIT, until


def test_a_batch_is_announced_before_it_runs_and_answered_after(start):
    running = start()
    running.runner.stepping = True
    frontend = running.frontend()
    submit = frontend.submit(3)
    assert frontend.receive() == Started((JobRows(submit.job, (0, 1, 2)),))
    assert frontend.received == []
    running.runner.steps.put(None)
    assert set(frontend.answers(submit).values()) == {"ok"}


def test_while_the_device_is_busy_the_next_batch_grows(start):
    running = start()
    running.runner.stepping = True
    frontend = running.frontend()
    submits = [frontend.submit(1)]
    until(lambda: running.runner.batches)
    submits += [frontend.submit(2) for _ in range(5)]
    for _ in range(2):
        running.runner.steps.put(None)
    frontend.answers(*submits)
    assert [len(batch.rows) for batch in running.runner.batches] == [1, 10]


def test_a_device_with_pipeline_depth_two_has_at_most_two_batches(start):
    running = start(depth=2)
    running.runner.stepping = True
    frontend = running.frontend()
    submits = []
    for expected_batches in (1, 2):
        submits.append(frontend.submit(1))
        until(lambda count=expected_batches: len(running.runner.batches) == count)
    submits += [frontend.submit(1), frontend.submit(1)]
    for _ in range(3):
        running.runner.steps.put(None)
    frontend.answers(*submits)
    assert [len(batch.rows) for batch in running.runner.batches] == [1, 1, 2]


def test_the_busy_time_of_a_device_that_is_never_idle_is_counted(start):
    """When a batch ends, the next one is already on the device; its time is still counted, batch by batch."""
    running = start(depth=2)
    running.runner.stepping = True
    frontend = running.frontend()
    first = frontend.submit(1)
    until(lambda: len(running.runner.batches) == 1)
    rest = [frontend.submit(1)]
    until(lambda: len(running.runner.batches) == 2)
    running.runner.steps.put(None)
    frontend.answers(first)  # the second batch is still there
    (busy,) = running.metrics.device_busy_seconds.snapshot()["cpu",]
    assert busy > 0
    running.runner.steps.put(None)
    frontend.answers(*rest)


def test_a_quarantined_row_has_the_device_to_itself(start):
    running = start(depth=2)
    running.runner.stepping = True
    frontend = running.frontend()
    normal = [frontend.submit(1) for _ in range(3)]
    suspect = frontend.submit(2, quarantined=True)
    after = [frontend.submit(1) for _ in range(3)]
    for _ in range(10):
        running.runner.steps.put(None)
    assert set(frontend.answers(*normal, suspect, *after).values()) == {"ok"}
    alone = {suspect.block.row_pixel_offset(row) for row in suspect.rows}
    with_suspect = [together for together in running.runner.together if together & alone]
    assert with_suspect == [{pixels} for pixels in sorted(alone)]


def test_a_batch_that_runs_out_of_memory_is_halved_and_lowers_the_ceiling_of_its_shape(start):
    running = start()
    running.runner.failing = lambda batch: DeviceOutOfMemory("scripted") if len(batch.rows) > 3 else None
    frontend = running.frontend()
    first = frontend.submit(10)
    assert set(frontend.answers(first).values()) == {"ok"}
    sizes = [len(batch.rows) for batch in running.runner.batches]
    assert sizes[0] == 10
    second = frontend.submit(10)
    assert set(frontend.answers(second).values()) == {"ok"}
    assert max(len(batch.rows) for batch in running.runner.batches[len(sizes) :]) <= 3


def test_an_image_too_large_for_the_device_alone_fails_alone(start):
    running = start()
    running.runner.failing = lambda batch: (
        DeviceOutOfMemory("scripted") if batch.shape != SHAPE or len(batch.rows) > 1 else None
    )
    frontend = running.frontend()
    large, small = frontend.submit(1, shape=PixelShape(64, 64, "uint8")), frontend.submit(1)
    answers = frontend.answers(large, small)
    assert "memory" in answers[large.job, 0]
    assert answers[small.job, 0] == "ok"


def test_a_batch_that_fails_is_bisected_so_that_one_poisoned_row_fails_alone(start):
    running = start()
    running.runner.stepping = True
    frontend = running.frontend()
    submit = frontend.submit(7)
    poison = submit.block.row_pixel_offset(4)
    running.runner.failing = lambda batch: (
        RuntimeError("scripted") if any(row.pixel_offset == poison for row in batch.rows) else None
    )
    other = frontend.submit(7)
    for _ in range(20):
        running.runner.steps.put(None)
    answers = frontend.answers(submit, other)
    assert [key for key, answer in answers.items() if answer != "ok"] == [(submit.job, 4)]


def test_cancelled_and_expired_rows_never_reach_the_device(start):
    running = start()
    running.runner.stepping = True
    frontend = running.frontend()
    busy = frontend.submit(1)
    until(lambda: running.runner.batches)
    cancelled, kept = frontend.submit(2), frontend.submit(1)
    expired = frontend.submit(2, deadline=time.monotonic() + 0.02)
    frontend.send(Cancel(cancelled.job))
    answers = {**frontend.answers(cancelled), **frontend.answers(expired)}  # while the device is busy
    assert set(answers.values()) == {"dropped: cancelled", "dropped: expired"}
    for _ in range(2):
        running.runner.steps.put(None)
    frontend.answers(busy, kept)
    assert [len(batch.rows) for batch in running.runner.batches] == [1, 1]


def test_cancelled_rows_of_a_failed_batch_are_not_run_again(start):
    running = start()
    running.runner.stepping = True
    frontend = running.frontend()
    gone, kept = frontend.submit(1), None
    until(lambda: running.runner.batches)
    gone2, kept = frontend.submit(2), frontend.submit(2)
    running.runner.steps.put(None)
    until(lambda: len(running.runner.batches) == 2)
    frontend.send(Cancel(gone2.job))
    barrier = frontend.submit(1)  # submitted after the cancel: once it is queued, the cancel was read
    running.runner.steps.put(RuntimeError("scripted"))
    for _ in range(8):
        running.runner.steps.put(None)
    answers = frontend.answers(gone, gone2, kept, barrier)
    rows_after = [row.pixel_offset for batch in running.runner.batches[2:] for row in batch.rows]
    ran_again = {gone2.block.row_pixel_offset(row) for row in gone2.rows} & set(rows_after)
    dropped = {row for row in gone2.rows if answers[gone2.job, row] == "dropped: cancelled"}
    assert ran_again == {gone2.block.row_pixel_offset(row) for row in gone2.rows if row not in dropped}
    assert all(answers[kept.job, row] == "ok" for row in kept.rows)
    assert dropped == set(gone2.rows)


def test_the_arena_of_a_dead_frontend_is_detached_once_no_batch_uses_it(start):
    running = start()
    running.runner.stepping = True
    dying, living = running.frontend(), running.frontend()
    first = dying.submit(1)
    until(lambda: running.runner.batches)
    dying.submit(3)
    kept = living.submit(2)
    assert dying.receive() == Started((JobRows(first.job, (0,)),))
    dying.channel.close()
    running.frontends.remove(dying)
    assert running.runner.arenas == 2
    for _ in range(2):
        running.runner.steps.put(None)
    assert set(living.answers(kept).values()) == {"ok"}
    until(lambda: running.runner.arenas == 1)
    assert [len(batch.rows) for batch in running.runner.batches] == [1, 2]
    dying.arena.close()


@pytest.mark.parametrize("how", ["lost", "hung"])
def test_a_lost_or_hung_device_ends_the_process(start, monkeypatch, how):
    exits: list[int] = []
    ended = threading.Event()

    def fake_exit(status: int) -> None:
        exits.append(status)
        running.runner.stepping = False
        running.runner.steps.put(None)
        ended.set()

    monkeypatch.setattr(worker_module.os, "_exit", fake_exit)
    running = start(batch_timeout_seconds=0.05 if how == "hung" else 60.0)
    running.runner.stepping = how == "hung"
    running.runner.failing = lambda batch: DeviceLost("scripted") if how == "lost" else None
    running.frontend().submit(1)
    assert ended.wait(LIMIT)
    assert exits[0] == worker_module.DEVICE_LOST
