"""Restarts: how fast a dead process is replaced, when the supervisor gives up, and what it survives."""

from __future__ import annotations

import resource
import socket
from pathlib import Path

import pytest

from tests.server.processes.test_crashes import Load, ask, photo
from tests.server.processes.test_lifecycle import SCRIPTED, start
from tests.support.numpy_runner import DIE
from tests.support.server import Server
from tests.support.waiting import until


def pauses(server: Server, role: str = "worker") -> list[str]:
    """Return the pauses before each successor, from the log."""
    return [line.split("starts in ")[1].strip() for line in server.log if f"{role}-0 died" in line]


@pytest.mark.parametrize("role", ["worker", "frontend"])
def test_a_process_that_was_ready_is_replaced_at_once_however_often_it_is_killed(role: str) -> None:
    kills, sign = 4, {"worker": "frontend 0 is attached", "frontend": "frontend-0 serves"}[role]
    with Server("--worker-restart-limit", "2", "--log-level", "debug") as server, server.client() as client:
        for killed in range(kills):
            until(lambda: len([line for line in server.log if sign in line]) == 1 + killed)  # noqa: B023
            server.children(role)[0].kill()  # idle: a worker has had no batch
        ask(client, 1)
        until(lambda: len(pauses(server, role)) == kills)
        assert pauses(server, role) == ["0 s"] * kills


def test_poisonous_images_never_end_the_server() -> None:
    with Server("--worker-restart-limit", "1") as server, server.client() as client:
        poison = photo(1, 32, 32)
        poison[0, 0] = DIE
        for _ in range(2):
            features = client.extract([poison], preset="none", on_error="return")
            assert "died" in str(features.errors[0])
        until(lambda: len(pauses(server)) == 4)  # the log comes by a pipe, and may be behind the answer
        assert pauses(server) == ["0 s"] * 4
        ask(client, 1)


@pytest.mark.parametrize(
    ("runner", "expected"), [("fails_to_attach", "scripted: no page can be locked"), ("dies_idle", "exit status 3")]
)
def test_a_worker_that_always_dies_idle_ends_the_server(runner: str, expected: str) -> None:
    ended = start(runner=f"{SCRIPTED}:{runner}")
    assert ended.returncode == 1
    reason = [line for line in ended.stderr.splitlines() if "worker-0 on cpu failed to start 5 times in a row" in line]
    assert expected in reason[0]
    assert "before its first batch" in reason[0]
    assert "second line" not in reason[0]


def test_a_dead_device_leaves_the_others_serving_and_may_come_back(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    flags = ("--devices", "cpu,cuda:1,cuda:2", "--worker-restart-limit", "2")
    runner = {"TEST_RUNNER": f"{SCRIPTED}:one_dead_device", "TEST_GATE_FILE": str(gate), "TEST_LONG_PAUSE": "0.5"}
    with Server(*flags, **runner) as server, server.client() as client:
        # worker-2 becomes ready before it fails: it may still be about to when the server is ready.
        until(lambda: "worker-2 on cuda:2 is down" in server.get("/readyz")[1])
        code, text = server.get("/readyz")
        assert code == 200
        assert text.startswith("serving; worker-1 on cuda:1 is down: RuntimeError: scripted: uncorrectable ECC error")
        assert "worker-2 on cuda:2 is down: RuntimeError: scripted: no page can be locked" in text
        workers = {
            (device, state): server.metric("dinov3_workers", device=device, state=state)
            for device in ("cpu", "cuda:1", "cuda:2")
            for state in ("serving", "failed")
        }
        assert workers == {(d, s): (d == "cpu") == (s == "serving") for d, s in workers}
        with Load(server) as load:
            load.more(4)
            server.children("worker")[0].kill()  # any of them
            load.more(4)
            gate.touch()
            until(lambda: server.metric("dinov3_workers", device="cuda:1", state="serving") == 1)
            load.more(4)
        assert "cuda:1" not in server.get("/readyz")[1]
        ask(client, 1)


def test_a_restarted_frontend_does_not_stall_others_while_it_is_attached(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    runner = {"TEST_RUNNER": f"{SCRIPTED}:attaches_slowly", "TEST_GATE_FILE": str(gate)}
    with Server("--frontends", "2", **runner) as server, Load(server) as load:
        server.children("frontend")[0].kill()
        until(lambda: len(server.children("frontend")) == 2)
        load.more(20)
        assert len([line for line in server.log if "frontend-" in line and "serves" in line]) == 2
        gate.touch()
        until(lambda: len([line for line in server.log if "frontend-" in line and "serves" in line]) == 3)
        load.more()


def test_the_server_survives_running_out_of_descriptors() -> None:
    """Slow connections to the HTTP port, and a limit that leaves no descriptor for a new process for a while."""
    with Server("--frontends", "2") as server, server.client() as client:
        host, port = server.http.rsplit(":", 1)
        slow = [socket.create_connection((host, int(port))) for _ in range(200)]
        supervisor = server.process.pid
        soft, hard = resource.prlimit(supervisor, resource.RLIMIT_NOFILE)
        resource.prlimit(supervisor, resource.RLIMIT_NOFILE, (4, hard))
        for role in ("worker", "frontend"):
            server.children(role)[0].kill()
        until(
            lambda: len([line for line in server.log if "no process can be started: Too many open files" in line]) > 3
        )
        assert server.process.poll() is None
        resource.prlimit(supervisor, resource.RLIMIT_NOFILE, (soft, hard))
        ask(client, 1)
        until(lambda: len(server.children("frontend")) == 2)
        assert server.get("/readyz")[1] == "serving\n"
        for connection in slow:
            connection.close()


def test_a_frontend_without_descriptors_keeps_its_connections_and_gets_its_worker_later() -> None:
    with Server() as server, server.client() as client:
        ask(client, 1)
        (frontend,) = server.children("frontend")
        soft, hard = resource.prlimit(frontend.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(frontend.pid, resource.RLIMIT_NOFILE, (4, hard))  # as if callers held all of them
        server.children("worker")[0].kill()
        until(lambda: [line for line in server.log if "worker 0 cannot be connected yet: Too many open files" in line])
        resource.prlimit(frontend.pid, resource.RLIMIT_NOFILE, (soft, hard))
        ask(client, 1)
        assert server.children("frontend") == [frontend]


def test_a_small_limit_and_a_flood_of_connections_cost_no_request() -> None:
    """Room for its own descriptors and what HTTP may hold, and no more."""
    with Server(TEST_NOFILE="80") as server, Load(server, threads=2) as load:
        host, port = server.http.rsplit(":", 1)
        slow = []
        for _ in range(3):
            slow += [socket.create_connection((host, int(port))) for _ in range(100)]
            load.more()
            server.children("worker")[0].kill()
            load.more()
            assert server.get("/healthz")[0] == 200
        assert pauses(server) == ["0 s"] * 3
        for connection in slow:
            connection.close()
