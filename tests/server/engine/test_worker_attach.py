"""Arenas are attached and detached on a thread of their own: only the frontend that owns the arena waits."""

from __future__ import annotations

import threading

import pytest

from dinov3_server.engine import worker as worker_module
from dinov3_server.engine.messages import Drain
from tests.support.waiting import LIMIT, open_descriptors, until


@pytest.fixture
def gate():
    """Return an event that is set at the end, so that a failed test does not hang."""
    gate = threading.Event()
    yield gate
    gate.set()


def blocks(running, gate, call):
    """Make the runner wait for `gate` in "attaching" or "detaching", and return an event that is set when it waits."""
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


def test_attaching_a_frontend_does_not_delay_others(start, gate, monkeypatch):
    monkeypatch.setattr(worker_module, "SNAPSHOT_SECONDS", 0.01)
    running = start()
    frontend = running.frontend()
    entered = blocks(running, gate, "attaching")
    coming = running.frontend(attached=False)
    assert entered.wait(LIMIT)
    for _ in range(5):
        assert set(frontend.answers(frontend.submit(2)).values()) == {"ok"}

    def load_received() -> bool:
        frontend.read()
        return frontend.backlog is not None

    until(load_received)
    coming.read()
    assert (coming.received, coming.backlog) == ([], None), "no message is sent to it before it is attached"
    gate.set()
    coming.receive_hello()
    submits = [coming.submit(1), coming.submit(3), frontend.submit(2)]
    assert set(coming.answers(*submits[:2]).values()) == {"ok"}
    assert set(frontend.answers(submits[2]).values()) == {"ok"}


def test_a_frontend_that_dies_while_being_attached_leaves_nothing_open(start, gate):
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


def test_detaching_a_frontend_does_not_delay_others(start, gate):
    running = start()
    frontend, dying = running.frontend(), running.frontend()
    entered = blocks(running, gate, "detaching")
    die(running, dying)
    assert entered.wait(LIMIT)
    assert set(frontend.answers(frontend.submit(2)).values()) == {"ok"}
    gate.set()
    until(lambda: running.runner.arenas == 1)


@pytest.mark.parametrize("in_time", [True, False])
def test_a_stopping_worker_waits_briefly_for_an_arena_that_is_being_attached(start, gate, monkeypatch, in_time):
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
