"""Stuck children are killed, and a stuck supervisor is unhealthy."""

from __future__ import annotations

import time

import pytest

from dinov3_server.processes.child import Child
from dinov3_server.processes.watchdog import SILENT_SECONDS, STUCK_SECONDS, Watchdog


class FakeProcess:
    pid = 1
    killed = 0

    def kill(self) -> None:
        self.killed += 1


@pytest.fixture
def fake() -> FakeProcess:
    return FakeProcess()


@pytest.fixture
def child(fake: FakeProcess) -> Child:
    """A worker whose last message came at 0."""
    return Child("worker", 0, "cpu", process=fake, ready=True)  # type: ignore[arg-type]


@pytest.fixture
def watchdog(monkeypatch: pytest.MonkeyPatch) -> Watchdog:
    """A watchdog that is made at 0."""
    with monkeypatch.context() as patched:
        patched.setattr(time, "monotonic", lambda: 0.0)
        return Watchdog()


def test_a_silent_child_is_killed_once(watchdog: Watchdog, child: Child, fake: FakeProcess) -> None:
    for now in range(int(2 * SILENT_SECONDS)):
        watchdog.iterate([child], float(now))
        assert fake.killed == (now > SILENT_SECONDS)
    child.ready = False  # while it loads its model it sends nothing
    child.last_message = 0.0
    watchdog.iterate([child], now + 1.0)
    assert fake.killed == 1


def test_silent_children_are_not_killed_if_the_supervisor_was_frozen_too(
    watchdog: Watchdog, child: Child, fake: FakeProcess
) -> None:
    watchdog.iterate([child], 10 * SILENT_SECONDS)
    watchdog.iterate([child], 10 * SILENT_SECONDS + 1.0)
    assert fake.killed == 0


def test_a_stuck_supervisor_is_not_healthy() -> None:
    watchdog = Watchdog()
    assert watchdog.health()[0]
    watchdog.iterate([], time.monotonic() - STUCK_SECONDS - 1)
    assert watchdog.health() == (False, "last event-loop iteration 11 s ago")
