"""Arenas are attached and detached beside the loop: only the frontend that owns the arena waits."""

from __future__ import annotations

import threading

import pytest

from dinov3_server.engine import worker as worker_module
from dinov3_server.engine.messages import Drain
from tests.support.waiting import LIMIT, open_descriptors, until


@pytest.fixture
def gate():
    """Opened at the end, or a failed test would hang."""
    gate = threading.Event()
    yield gate
    gate.set()


def blocks(running, gate, call):
    """Have the runner wait for `gate` in "attaching" or "detaching"; the event is set when it does."""
    entered = threading.Event()

    def wait() -> None:
        entered.set()
        gate.wait(LIMIT)

    setattr(running.runner, call, wait)
    return entered


def die(running, *frontends):
    for frontend in frontends:
        running.frontends.remove(frontend)
        frontend.close()


def test_a_frontend_that_is_being_attached_holds_nobody_up(start, gate, monkeypatch):
    monkeypatch.setattr(worker_module, "SNAPSHOT_SECONDS", 0.01)
    running = start()
    frontend = running.frontend()
    entered = blocks(running, gate, "attaching")
    coming = running.frontend(attached=False)
    assert entered.wait(LIMIT)
    for _ in range(5):
        assert set(frontend.answers(frontend.submit(2)).values()) == {"ok"}

    def hears_of_others() -> bool:
        frontend.listen()
        return frontend.backlog is not None

    until(hears_of_others)
    coming.listen()
    assert (coming.heard, coming.backlog) == ([], None), "nothing is said to it before it is attached"
    gate.set()
    coming.hear_hello()
    submits = [coming.submit(1), coming.submit(3), frontend.submit(2)]
    assert set(coming.answers(*submits[:2]).values()) == {"ok"}
    assert set(frontend.answers(submits[2]).values()) == {"ok"}


def test_a_frontend_that_dies_while_it_is_attached_leaves_nothing(start, gate):
    running = start()
    frontend = running.frontend()
    before = open_descriptors()
    entered = blocks(running, gate, "attaching")
    dying, queued = running.frontend(attached=False), running.frontend(attached=False)
    assert entered.wait(LIMIT)
    die(running, dying, queued)
    assert set(frontend.answers(frontend.submit(1)).values()) == {"ok"}
    gate.set()
    until(lambda: open_descriptors() == before)
    assert running.runner.arenas == 1
    die(running, running.frontend())


def test_a_frontend_that_is_being_detached_holds_nobody_up(start, gate):
    running = start()
    frontend, dying = running.frontend(), running.frontend()
    entered = blocks(running, gate, "detaching")
    die(running, dying)
    assert entered.wait(LIMIT)
    assert set(frontend.answers(frontend.submit(2)).values()) == {"ok"}
    gate.set()
    until(lambda: running.runner.arenas == 1)


@pytest.mark.parametrize("in_time", [True, False])
def test_a_worker_that_is_told_to_stop_waits_briefly_for_what_is_being_attached(start, gate, monkeypatch, in_time):
    if not in_time:
        monkeypatch.setattr(worker_module, "ATTACHER_SECONDS", 0.05)
    running = start()
    running.frontend()
    entered = blocks(running, gate, "attaching")
    running.frontend(attached=False)
    running.frontend(attached=False)
    assert entered.wait(LIMIT)
    running.control.send(Drain(0.0))
    running.control.flush()
    if in_time:
        gate.set()
    running.thread.join(LIMIT)
    assert not running.thread.is_alive()
    gate.set()
    until(lambda: not running.runner.arenas)
