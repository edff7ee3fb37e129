"""The supervisor's rules, and what it decides before it starts anything."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import psutil
import pytest

from dinov3_server import process, topology
from dinov3_server.child import Child
from dinov3_server.config import Settings
from dinov3_server.engine.messages import StartFrontend
from dinov3_server.errors import StartupError
from dinov3_server.supervisor import SILENT_SECONDS, STUCK_SECONDS, Supervisor
from tests.support.waiting import until


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
    child, channel = process.spawn("frontend", StartFrontend(Settings(), 0, 1, "127.0.0.1", 1))
    channel.close()
    assert child.wait() == 0


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
