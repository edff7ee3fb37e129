"""The worker's loop when a frontend or the device is slow, hung or lost."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

from dinov3_server.engine import worker as worker_module
from dinov3_server.engine.messages import Results
from dinov3_server.models.interface import DeviceLost, PixelShape
from tests.support.waiting import LIMIT, until

OTHER_SHAPE = PixelShape(32, 32, "uint8")


def test_a_frontend_that_does_not_read_delays_no_other_and_loses_nothing(start):
    running = start(max_batch_images=1)
    frozen, other = running.frontend(buffer=4096), running.frontend()
    unread = [frozen.submit(1) for _ in range(30)]
    for _ in range(5):
        assert set(other.answers(other.submit(1)).values()) == {"ok"}
    until(lambda: len(running.runner.batches) == 35)
    assert set(frozen.answers(*unread).values()) == {"ok"}


def test_rows_that_expire_while_a_batch_is_launched_are_dropped_at_once(start, monkeypatch):
    monkeypatch.setattr(worker_module, "SNAPSHOT_SECONDS", 3600.0)  # so that nothing else wakes the loop
    running = start()
    running.runner.stepping = True
    frontend = running.frontend()
    busy = frontend.submit(1)
    until(lambda: running.runner.batches)
    deadline = time.monotonic() + 0.3
    expiring = frontend.submit(2, deadline=deadline, shape=OTHER_SHAPE)
    following = frontend.submit(1)  # the shorter job goes first
    running.runner.launching = lambda batch: until(lambda: time.monotonic() > deadline)
    running.runner.steps.put(None)
    assert set(frontend.answers(busy).values()) == {"ok"}
    assert set(frontend.answers(expiring).values()) == {"dropped: expired"}
    running.runner.steps.put(None)
    frontend.answers(following)


def test_a_batch_that_waits_behind_a_long_one_does_not_count_as_hung(start, monkeypatch):
    offset = [0.0]
    monkeypatch.setattr(worker_module, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + offset[0]))
    exits: list[int] = []
    monkeypatch.setattr(worker_module.os, "_exit", exits.append)
    running = start(depth=2, batch_timeout_seconds=60.0)
    running.runner.stepping = True
    frontend = running.frontend()
    first = frontend.submit(1)
    until(lambda: len(running.runner.batches) == 1)
    second = frontend.submit(1)
    until(lambda: len(running.runner.batches) == 2)
    offset[0] += 50.0
    running.runner.steps.put(None)
    frontend.answers(first)
    offset[0] += 50.0  # the second batch has waited for 50 s and run for 50 s
    frontend.answers(frontend.submit(1, deadline=time.monotonic()))  # dropped, so the loop has run an iteration
    assert exits == []
    running.runner.steps.put(None)
    assert set(frontend.answers(second).values()) == {"ok"}


def test_finished_rows_are_answered_before_a_lost_device_ends_the_process(start, monkeypatch):
    received: list[object] = []
    exited = threading.Event()

    def fake_exit(status: int) -> None:
        frontend.read()
        received.extend(frontend.received)
        exited.set()

    monkeypatch.setattr(worker_module.os, "_exit", fake_exit)
    running = start(depth=3, max_batch_images=1)
    running.runner.stepping = True
    frontend = running.frontend()
    good = frontend.submit(1)
    frontend.submit(1)
    until(lambda: len(running.runner.batches) == 2)

    def both_leave_the_device(_: object) -> None:
        running.runner.launching = lambda batch: None
        running.runner.steps.put(None)
        running.runner.steps.put(DeviceLost("scripted"))
        until(lambda: not running.runner.in_flight)

    running.runner.launching = both_leave_the_device  # so that the loop collects both at once
    frontend.submit(1)
    assert exited.wait(LIMIT)
    finished = [job.job for message in received if isinstance(message, Results) for job in message.jobs]
    assert finished == [good.job]


def test_every_frontend_is_sent_the_load_of_the_others(start, monkeypatch):
    monkeypatch.setattr(worker_module, "SNAPSHOT_SECONDS", 0.01)
    running = start()
    running.runner.stepping = True
    busy, idle = running.frontend(), running.frontend()

    def received(tokens: int) -> bool:
        idle.read()
        return idle.backlog == tokens

    submit = busy.submit(3)
    until(lambda: received(3 * (1 + 4 + 6)))
    running.runner.steps.put(None)
    busy.answers(submit)
    until(lambda: received(0))


def test_each_batch_is_reported_to_each_frontend_once(start, monkeypatch):
    """Repeats would keep the pace of an idle device trusted: after one slow batch, the server would refuse requests
    with short deadlines for ever."""
    monkeypatch.setattr(worker_module, "SNAPSHOT_SECONDS", 0.01)
    running = start()
    busy, idle = running.frontend(), running.frontend()
    for rows in (3, 2):
        busy.answers(busy.submit(rows))
        wanted = busy.reports + 3, idle.reports + 3

        def reported(wanted: tuple[int, int] = wanted) -> bool:
            busy.read()
            idle.read()
            return busy.reports >= wanted[0] and idle.reports >= wanted[1]

        until(reported)
    assert [batch.rows for batch in busy.batches] == [3, 2]
    assert [batch.rows for batch in idle.batches] == [3, 2]
