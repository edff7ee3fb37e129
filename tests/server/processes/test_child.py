"""How a child is started, and the pause before its successor starts."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from selectors import DefaultSelector
from typing import Any, NoReturn

import psutil
import pytest

from dinov3_server.config.settings import Settings
from dinov3_server.engine.messages import StartFrontend
from dinov3_server.processes import child as children
from dinov3_server.processes.child import EARLY_SECONDS, Child
from dinov3_server.processes.child_main import Role
from tests.support.waiting import open_descriptors, until

FRONTEND = StartFrontend(Settings(), 0, 1, "127.0.0.1", 1)


def no_descriptors(*_: object, **__: object) -> NoReturn:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_a_child_may_die_before_it_reads_its_start_message(monkeypatch: pytest.MonkeyPatch) -> None:
    dump = children.pickle.dump
    others = set(psutil.Process().children())  # of earlier tests, such as multiprocessing's resource tracker

    def dump_late(start: object, stdin: object) -> None:
        (child,) = set(psutil.Process().children()) - others
        until(lambda: child.status() == psutil.STATUS_ZOMBIE)
        dump(start, stdin)

    monkeypatch.setattr(children.sys, "executable", "/bin/true")
    monkeypatch.setattr(children.pickle, "dump", dump_late)
    child, channel, pidfd = children.spawn("frontend", FRONTEND)
    channel.close()
    os.close(pidfd)
    assert child.wait() == 0


@pytest.mark.parametrize(
    "fails",
    [
        "dinov3_server.processes.child.pair",
        "subprocess.Popen",
        "os.pidfd_open",
        "dinov3_server.processes.child.pickle.dump",
    ],
)
def test_a_spawn_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    monkeypatch.setattr(fails, no_descriptors)
    monkeypatch.setattr(children.sys, "executable", "/bin/true")
    before, processes = open_descriptors(), psutil.Process().children()
    with pytest.raises(OSError, match="Too many open files"):
        children.spawn("frontend", FRONTEND)
    assert open_descriptors() == before
    assert psutil.Process().children() == processes


class Selector(DefaultSelector):
    """A selector without memory for the registration number `fails`."""

    fails = 0

    def register(self, *arguments: Any) -> Any:
        self.fails -= 1
        if self.fails == 0:
            no_descriptors()
        return super().register(*arguments)


@pytest.mark.parametrize("registration", [1, 2])
def test_a_child_that_cannot_be_watched_is_ended(monkeypatch: pytest.MonkeyPatch, registration: int) -> None:
    monkeypatch.setattr(children.sys, "executable", "/bin/true")
    nothing: Callable[[Child], None] = lambda child: None  # noqa: E731
    with Selector() as selector:
        child, before = Child("frontend", 0), open_descriptors()
        selector.fails = registration
        with pytest.raises(OSError, match="Too many open files"):
            child.spawn(FRONTEND, selector, nothing, nothing)
        assert open_descriptors() == before
        child.spawn(FRONTEND, selector, nothing, nothing)
        assert child.release(selector) == 0
        assert open_descriptors() == before


def test_pauses_after_spawns_that_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children.sys, "executable", "/bin/true")
    child, error = Child("frontend", 0), OSError(errno.EMFILE, "Too many open files")
    assert [child.on_spawn_failed(error) for _ in range(6)] == [0.5, 1.0, 2.0, 4.0, 4.0, 4.0]
    assert child.reason == "no process can be started: Too many open files"
    assert not child.has_failed(1), "it is tried again for ever"
    with DefaultSelector() as selector:
        child.spawn(FRONTEND, selector, lambda child: None, lambda child: None)
        assert child.failed_spawns == 0
        assert child.release(selector) == 0


def lives(child: Child, *lives: tuple[bool, str, float, int], limit: int = 5) -> list[float]:
    """Return the pauses after lives of a child. A life is (ready, reached, seconds since it was ready, exit code)."""
    pauses = []
    for ready, reached, seconds, code in lives:
        child.ready, child.reached, child.since = ready, reached, 1000.0  # type: ignore[assignment]
        pauses.append(child.on_exit(code, 1000.0 + seconds, limit))
    return pauses


NOT_READY, EARLY = (False, "", 1.0, 1), (True, "attached", 1.0, 1)
IN_A_BATCH, KILLED_IDLE = (True, "batch", 0.1, -9), (True, "attached", 0.1, -9)
LATE, KILLED_WHILE_ATTACHING = (True, "", EARLY_SECONDS + 1, 1), (True, "", 0.1, -9)


def test_back_off_is_for_starts_that_fail() -> None:
    child = Child("worker", 0, "cpu")
    assert lives(child, *[NOT_READY] * 9, limit=1000) == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    for healthy in (IN_A_BATCH, KILLED_IDLE, LATE):
        assert lives(child, healthy, NOT_READY, healthy, NOT_READY, NOT_READY) == [0, 0.5, 0, 0.5, 1]
        assert lives(child, *[healthy] * 100) == [0.0] * 100
        assert not child.has_failed(5)
    frontend = Child("frontend", 0)
    assert lives(frontend, *[EARLY] * 100) == [0.0] * 100


@pytest.mark.parametrize("early", [EARLY, KILLED_WHILE_ATTACHING])
def test_a_worker_that_always_dies_before_its_first_batch_has_failed(
    early: tuple[bool, str, float, int],
) -> None:
    child = Child("worker", 0, "cpu")
    assert lives(child, early, early, early, early) == [0, 0, 0, 0]
    assert not child.has_failed(5)
    assert lives(child, early, early) == [30, 30]
    assert child.has_failed(5)
    assert "before its first batch" in child.reason
    lives(child, IN_A_BATCH)
    assert not child.has_failed(5)


@pytest.mark.parametrize("code", [-9, -34, -40, 3])
def test_the_reason_names_the_signal_or_exit_status(code: int) -> None:
    child = Child("worker", 0, "cpu")
    child.on_exit(code, 0.0, 5)
    assert child.reason == {-9: "killed by SIGKILL", 3: "exit status 3"}.get(code, child.reason)
    assert "killed by" in child.reason or code > 0


@pytest.mark.parametrize(("role", "values"), [("worker", ["1000", "256", "256"]), ("frontend", [])])
def test_only_workers_have_the_environment_for_shared_cpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, role: Role, values: list[str]
) -> None:
    names = ("GOMP_SPINCOUNT", "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    executable = tmp_path / "python"
    executable.write_text(f"#!/bin/sh\necho {' '.join(f'${name}' for name in names)} > {tmp_path}/values\n")
    executable.chmod(0o755)
    for name in (*names, "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(children.sys, "executable", str(executable))
    child, channel, pidfd = children.spawn(role, FRONTEND)
    channel.close()
    os.close(pidfd)
    assert child.wait() == 0
    assert (tmp_path / "values").read_text().split() == values
