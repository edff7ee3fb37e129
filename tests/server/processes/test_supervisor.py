"""The supervisor's rules, and what it decides before it starts anything."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import psutil
import pytest

from dinov3_server.config.settings import Settings
from dinov3_server.engine.channel import Channel, pair
from dinov3_server.engine.messages import Connected, NotConnected, StartFrontend
from dinov3_server.errors import StartupError
from dinov3_server.processes import process, supervisor, topology
from dinov3_server.processes.child import EARLY_SECONDS, Child
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
def watched() -> tuple[Supervisor, Child, FakeProcess]:
    """A supervisor with one worker that was last heard at 0."""
    boss, fake = Supervisor(Settings(), "unused:unused"), FakeProcess()
    child = Child("worker", 0, "cpu", process=fake, ready=True)  # type: ignore[arg-type]
    boss._workers = [child]
    return boss, child, fake


def test_a_child_that_is_silent_too_long_is_killed_once(watched) -> None:
    boss, child, fake = watched
    for now in range(int(2 * SILENT_SECONDS)):
        boss._turned = now - 1.0
        boss._kill_the_silent(float(now))
        assert fake.killed == (now > SILENT_SECONDS)
    child.ready = False  # while it loads its model it says nothing
    child.heard = 0.0
    boss._kill_the_silent(now + 1.0)
    assert fake.killed == 1


def test_children_are_not_to_blame_where_the_supervisor_was_frozen_too(watched) -> None:
    boss, _, fake = watched
    boss._turned = 0.0
    boss._kill_the_silent(10 * SILENT_SECONDS)
    boss._kill_the_silent(10 * SILENT_SECONDS + 1.0)
    assert fake.killed == 0


def test_a_stuck_supervisor_is_not_healthy(watched) -> None:
    boss, _, _ = watched
    assert boss._health()[0]
    boss._turned = time.monotonic() - STUCK_SECONDS - 1
    healthy, reason = boss._health()
    assert not healthy
    assert "11 s ago" in reason


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.0.1"])
def test_on_this_machine_alone_nothing_is_warned_of(host: str, caplog: pytest.LogCaptureFixture) -> None:
    topology.warn_if_open(Settings(host=host))
    assert caplog.records == []


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_an_open_port_without_tls_or_credentials_is_warned_of(
    host: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    def warnings(**settings: str) -> str:
        caplog.clear()
        topology.warn_if_open(Settings(host=host, **settings))
        assert all(record.levelno == logging.WARNING for record in caplog.records)
        return caplog.text

    tls = {"tls_cert_file": "cert", "tls_key_file": "key"}
    assert "NOT ENCRYPTED" in warnings()
    assert "ANYBODY" in warnings()
    assert "NOT ENCRYPTED" not in warnings(**tls)
    assert "ANYBODY" in warnings(**tls)
    assert "NOT ENCRYPTED" in warnings(token_file="tokens")
    assert "ANYBODY" not in warnings(token_file="tokens")
    assert warnings(**tls, tls_client_ca_file="ca") == ""


def test_arenas_must_fit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology, "available_memory", lambda: 1000)
    topology.check_memory(2, 500)
    with pytest.raises(StartupError, match=r"2 frontend.*1002 bytes.*--arena-bytes"):
        topology.check_memory(2, 501)


def test_a_child_that_is_dead_before_it_has_read_how_to_start_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    dump = process.pickle.dump
    others = set(psutil.Process().children())  # of tests that ran before, such as multiprocessing's resource tracker

    def dump_late(start: object, stdin: object) -> None:
        (child,) = set(psutil.Process().children()) - others
        until(lambda: child.status() == psutil.STATUS_ZOMBIE)
        dump(start, stdin)

    monkeypatch.setattr(process.sys, "executable", "/bin/true")
    monkeypatch.setattr(process.pickle, "dump", dump_late)
    child, channel, pidfd = process.spawn("frontend", FRONTEND)
    channel.close()
    os.close(pidfd)
    assert child.wait() == 0


@pytest.mark.parametrize(
    "fails",
    [
        "dinov3_server.processes.process.pair",
        "subprocess.Popen",
        "os.pidfd_open",
        "dinov3_server.processes.process.pickle.dump",
    ],
)
def test_a_spawn_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    monkeypatch.setattr(fails, no_descriptors)
    monkeypatch.setattr(process.sys, "executable", "/bin/true")
    before, children = open_descriptors(), psutil.Process().children()
    with pytest.raises(OSError, match="Too many open files"):
        process.spawn("frontend", FRONTEND)
    assert open_descriptors() == before
    assert psutil.Process().children() == children


@pytest.mark.parametrize(
    "fails", ["dinov3_server.processes.process.pair", "os.pidfd_open", "watch the channel", "watch the pidfd"]
)
def test_a_spawn_that_fails_is_tried_again_for_ever(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fails: str
) -> None:
    boss = Supervisor(Settings(worker_restart_limit=1), "unused:unused")
    boss._port = 1
    boss._frontends = [child] = [Child("frontend", 0)]
    register, calls = boss._selector.register, 0

    def register_fails(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % 2 == (fails == "watch the channel"):
            no_descriptors()
        return register(*arguments)

    monkeypatch.setattr(process.sys, "executable", "/bin/true")
    with monkeypatch.context() as patched:
        if fails.startswith("watch"):
            patched.setattr(boss._selector, "register", register_fails)
        else:
            patched.setattr(fails, no_descriptors)
        before = open_descriptors()
        pauses = []
        for _ in range(6):
            calls = 0
            boss._start(child)
            assert child.restart_at is not None
            pauses.append(child.restart_at - time.monotonic())
        assert [round(pause, 1) for pause in pauses] == [0.5, 1.0, 2.0, 4.0, 4.0, 4.0]
        assert open_descriptors() == before
        assert boss._code is None
        boss._update_readiness()
        assert "frontend-0 is down: no process can be started: Too many open files" in boss._readiness[1]
    boss._start(child)
    assert (child.restart_at, child.failed_spawns) == (None, 0)
    assert child.process is not None
    assert child.clear(boss._selector) == 0
    boss._selector.close()


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Supervisor, Child, Child]]:
    """A frontend and a worker that is ready; the test plays both."""
    monkeypatch.setattr(supervisor, "SNAPSHOT_SECONDS", 0.0)  # a turn waits for nothing
    monkeypatch.setattr(supervisor, "CONNECT_PAUSE", 0.0)
    boss = Supervisor(Settings(), "unused:unused")
    ends = [*pair(), *pair()]
    frontend = Child("frontend", 0, channel=Channel(ends[0]), ready=True)
    worker = Child("worker", 0, "cpu", channel=Channel(ends[2]), ready=True)
    boss._frontends, boss._workers = [frontend], [worker]
    frontend.heard_by, worker.heard_by = Channel(ends[1]), Channel(ends[3])  # type: ignore[attr-defined]
    yield boss, frontend, worker
    for child in (frontend, worker):
        child.heard_by.close()  # type: ignore[attr-defined]
        if child.channel is not None:
            child.channel.close()
    boss._selector.close()


@pytest.mark.parametrize("fails", ["dinov3_server.processes.supervisor.pair", "os.dup"])
def test_who_cannot_be_connected_for_want_of_descriptors_is_later(
    connected: tuple[Supervisor, Any, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fails: str,
) -> None:
    boss, frontend, worker = connected
    with monkeypatch.context() as patched:
        patched.setattr(fails, no_descriptors)
        for _ in range(3):
            boss._connect(frontend, worker)
    assert [record.getMessage() for record in caplog.records] == [
        "frontend-0 and worker-0 cannot be connected yet: Too many open files"
    ]
    boss._turn()
    for child in (frontend, worker):
        ((message, fds),) = child.heard_by.receive()
        assert message == Connected(0)
        os.close(*fds)
    boss._turn()
    assert frontend.heard_by.receive() == [], "once is enough"


def test_a_frontend_that_had_no_room_for_a_channel_gets_another(connected: tuple[Supervisor, Any, Any]) -> None:
    boss, frontend, worker = connected
    frontend.heard_by.send(NotConnected(0))
    frontend.heard_by.flush()
    boss._read(frontend)
    boss._turn()
    ((message, fds),) = frontend.heard_by.receive()
    assert message == Connected(0)
    os.close(*fds)
    frontend.heard_by.send(NotConnected(0))
    frontend.heard_by.flush()
    boss._read(frontend)
    worker.ready = False  # it died meanwhile: its successor will be connected anyway
    boss._turn()
    assert boss._unconnected == {}
    for _, unread in worker.heard_by.receive():
        os.close(*unread)
    assert frontend.heard_by.receive() == []


def lives(child: Child, *lives: tuple[bool, str, float, int], limit: int = 5) -> list[float]:
    """The pauses after lives of a child: whether it was ready, what it reached, how long it lived since, exit code."""
    pauses = []
    for ready, reached, seconds, code in lives:
        child.ready, child.reached, child.since = ready, reached, 1000.0  # type: ignore[assignment]
        pauses.append(child.ended(code, 1000.0 + seconds, limit))
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
def test_a_worker_that_never_comes_to_work_has_failed_like_one_that_never_starts(
    early: tuple[bool, str, float, int],
) -> None:
    child = Child("worker", 0, "cpu")
    assert lives(child, early, early, early, early) == [0, 0, 0, 0]
    assert not child.has_failed(5)
    assert lives(child, early, early) == [30, 30]
    assert child.has_failed(5)
    assert "before its first batch" in child.why
    lives(child, IN_A_BATCH)
    assert not child.has_failed(5)


@pytest.mark.parametrize("code", [-9, -34, -40, 3])
def test_every_way_to_die_has_a_name(code: int) -> None:
    child = Child("worker", 0, "cpu")
    child.ended(code, 0.0, 5)
    assert child.why == {-9: "killed by SIGKILL", 3: "exit status 3"}.get(code, child.why)
    assert "killed by" in child.why or code > 0


@pytest.mark.parametrize(("role", "told"), [("worker", ["1000", "256", "256"]), ("frontend", [])])
def test_workers_alone_are_told_how_to_share_a_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, role: process.Role, told: list[str]
) -> None:
    names = ("GOMP_SPINCOUNT", "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    executable = tmp_path / "python"
    executable.write_text(f"#!/bin/sh\necho {' '.join(f'${name}' for name in names)} > {tmp_path}/told\n")
    executable.chmod(0o755)
    for name in (*names, "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(process.sys, "executable", str(executable))
    child, channel, pidfd = process.spawn(role, FRONTEND)
    channel.close()
    os.close(pidfd)
    assert child.wait() == 0
    assert (tmp_path / "told").read_text().split() == told


def test_a_gpu_machine_whose_torch_finds_no_device_is_told_so(
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
