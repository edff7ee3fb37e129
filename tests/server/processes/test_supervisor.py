"""The supervisor's rules for its children, and its choices before it starts them."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import psutil
import pytest

from dinov3_server.config.settings import Settings
from dinov3_server.engine.channel import Channel, pair
from dinov3_server.engine.messages import Connected, NotConnected, StartFrontend
from dinov3_server.errors import StartupError
from dinov3_server.processes import child as children
from dinov3_server.processes import connections, supervisor, topology
from dinov3_server.processes.child import EARLY_SECONDS, Child
from dinov3_server.processes.child_main import Role
from dinov3_server.processes.supervisor import SILENT_SECONDS, STUCK_SECONDS, Supervisor
from tests.support.waiting import open_descriptors, until

FRONTEND = StartFrontend(Settings(), 0, 1, "127.0.0.1", 1)


def no_descriptors(*_: object, **__: object) -> NoReturn:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


class FakeProcess:
    pid = 1
    killed = 0

    def kill(self) -> None:
        self.killed += 1


@pytest.fixture
def watched() -> Iterator[tuple[Supervisor, Child, FakeProcess]]:
    """A supervisor with one worker whose last message came at 0."""
    boss, fake = Supervisor(Settings(), "unused:unused"), FakeProcess()
    child = Child("worker", 0, "cpu", process=fake, ready=True)  # type: ignore[arg-type]
    boss._workers = [child]
    yield boss, child, fake
    boss._selector.close()


def test_a_silent_child_is_killed_once(watched) -> None:
    boss, child, fake = watched
    for now in range(int(2 * SILENT_SECONDS)):
        boss._last_iteration = now - 1.0
        boss._kill_silent(float(now))
        assert fake.killed == (now > SILENT_SECONDS)
    child.ready = False  # while it loads its model it sends nothing
    child.last_message = 0.0
    boss._kill_silent(now + 1.0)
    assert fake.killed == 1


def test_silent_children_are_not_killed_if_the_supervisor_was_frozen_too(watched) -> None:
    boss, _, fake = watched
    boss._last_iteration = 0.0
    boss._kill_silent(10 * SILENT_SECONDS)
    boss._kill_silent(10 * SILENT_SECONDS + 1.0)
    assert fake.killed == 0


def test_a_stuck_supervisor_is_not_healthy(watched) -> None:
    boss, _, _ = watched
    assert boss._health()[0]
    boss._last_iteration = time.monotonic() - STUCK_SECONDS - 1
    healthy, reason = boss._health()
    assert not healthy
    assert reason == "last event-loop iteration 11 s ago"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.0.1"])
def test_a_loopback_address_gives_no_warning(host: str, caplog: pytest.LogCaptureFixture) -> None:
    topology.warn_if_open(Settings(host=host))
    assert caplog.records == []


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_an_open_port_without_tls_or_authentication_gives_a_warning(
    host: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    def warnings(**settings: str) -> str:
        caplog.clear()
        topology.warn_if_open(Settings(host=host, **settings))
        assert all(record.levelno == logging.WARNING for record in caplog.records)
        return caplog.text

    tls = {"tls_cert_file": "cert", "tls_key_file": "key"}
    assert "NOT ENCRYPTED" in warnings()
    assert "NO AUTHENTICATION" in warnings()
    assert "NOT ENCRYPTED" not in warnings(**tls)
    assert "NO AUTHENTICATION" in warnings(**tls)
    assert "NOT ENCRYPTED" in warnings(token_file="tokens")
    assert "NO AUTHENTICATION" not in warnings(token_file="tokens")
    assert warnings(**tls, tls_client_ca_file="ca") == ""


def test_the_arenas_of_all_frontends_must_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology, "available_memory", lambda: 1000)
    topology.check_memory(2, 500)
    with pytest.raises(StartupError, match=r"2 frontend.*1002 bytes.*--arena-bytes"):
        topology.check_memory(2, 501)


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


@pytest.mark.parametrize(
    "fails", ["dinov3_server.processes.child.pair", "os.pidfd_open", "register the channel", "register the pidfd"]
)
def test_a_spawn_that_fails_is_tried_again_for_ever(monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    boss = Supervisor(Settings(worker_restart_limit=1), "unused:unused")
    boss._port = 1
    boss._frontends = [child] = [Child("frontend", 0)]
    register, calls = boss._selector.register, 0

    def register_fails(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % 2 == (fails == "register the channel"):
            no_descriptors()
        return register(*arguments)

    monkeypatch.setattr(children.sys, "executable", "/bin/true")
    monkeypatch.setattr(supervisor, "time", SimpleNamespace(monotonic=lambda: 1000.0))
    with monkeypatch.context() as patched:
        if fails.startswith("register"):
            patched.setattr(boss._selector, "register", register_fails)
        else:
            patched.setattr(fails, no_descriptors)
        before = open_descriptors()
        pauses = []
        for _ in range(6):
            calls = 0
            boss._start(child)
            assert child.restart_at is not None
            pauses.append(child.restart_at - 1000.0)
        assert pauses == [0.5, 1.0, 2.0, 4.0, 4.0, 4.0]
        assert open_descriptors() == before
        assert boss._code is None
        boss._update_readiness()
        assert "frontend-0 is down: no process can be started: Too many open files" in boss._readiness[1]
    boss._start(child)
    assert (child.restart_at, child.failed_spawns) == (None, 0)
    assert child.process is not None
    assert child.release(boss._selector) == 0
    boss._selector.close()


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Supervisor, Child, Child]]:
    """A supervisor with a frontend and a worker that is ready. The test holds the other end of their channels."""
    monkeypatch.setattr(supervisor, "SNAPSHOT_SECONDS", 0.0)  # an iteration waits for nothing
    monkeypatch.setattr(connections, "RETRY_PAUSE", 0.0)
    boss = Supervisor(Settings(), "unused:unused")
    ends = [*pair(), *pair()]
    frontend = Child("frontend", 0, channel=Channel(ends[0]), ready=True)
    worker = Child("worker", 0, "cpu", channel=Channel(ends[2]), ready=True)
    boss._frontends, boss._workers = [frontend], [worker]
    frontend.other_end, worker.other_end = Channel(ends[1]), Channel(ends[3])  # type: ignore[attr-defined]
    yield boss, frontend, worker
    for child in (frontend, worker):
        child.other_end.close()  # type: ignore[attr-defined]
        if child.channel is not None:
            child.channel.close()
    boss._selector.close()


@pytest.mark.parametrize("fails", ["dinov3_server.processes.connections.pair", "os.dup"])
def test_connecting_is_tried_again_after_descriptors_ran_out(
    connected: tuple[Supervisor, Any, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fails: str,
) -> None:
    boss, frontend, worker = connected
    with monkeypatch.context() as patched:
        patched.setattr(fails, no_descriptors)
        for _ in range(3):
            boss._connections.connect(frontend, worker)
    assert [record.getMessage() for record in caplog.records] == [
        "frontend-0 and worker-0 cannot be connected yet: Too many open files"
    ]
    boss._iterate()
    for child in (frontend, worker):
        ((message, fds),) = child.other_end.receive()
        assert message == Connected(0)
        os.close(*fds)
    boss._iterate()
    assert frontend.other_end.receive() == [], "once is enough"


def test_a_frontend_without_a_descriptor_for_a_channel_gets_another(connected: tuple[Supervisor, Any, Any]) -> None:
    boss, frontend, worker = connected
    frontend.other_end.send(NotConnected(0))
    frontend.other_end.flush()
    boss._read(frontend)
    boss._iterate()
    ((message, fds),) = frontend.other_end.receive()
    assert message == Connected(0)
    os.close(*fds)
    frontend.other_end.send(NotConnected(0))
    frontend.other_end.flush()
    boss._read(frontend)
    worker.ready = False  # it died meanwhile: its successor will be connected anyway
    boss._iterate()
    assert boss._connections._retries == {}
    for _, unread in worker.other_end.receive():
        os.close(*unread)
    assert frontend.other_end.receive() == []


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


def test_a_driver_without_a_usable_device_gives_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(topology, "_DRIVER", tmp_path)
    monkeypatch.setattr(topology, "_COUNT_CUDA", "print(2)")
    assert topology.choose_devices(("auto",)) == ("cuda:0", "cuda:1")
    assert caplog.text == ""
    monkeypatch.setattr(topology, "_COUNT_CUDA", "raise ImportError('no torch here')")
    assert topology.choose_devices(("auto",)) == ("cpu",)
    assert "no torch here" in caplog.text
    monkeypatch.setattr(topology, "_DRIVER", tmp_path / "none")
    caplog.clear()
    assert topology.choose_devices(("auto",)) == ("cpu",)
    assert caplog.text == ""
