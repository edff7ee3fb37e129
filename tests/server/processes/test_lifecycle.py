"""Start and end of a server: clear errors, a drain on the first signal, an immediate end on the second."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import grpc
import psutil
import pytest

from dinov3_client import Client, Dinov3Error, Unauthenticated
from dinov3_server.errors import CheckpointError
from tests.server.processes.test_crashes import ask, held_call, photo
from tests.support.serve import RUNNER
from tests.support.server import ROOT, Server
from tests.support.waiting import LIMIT, until


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_requests_in_flight_and_refuses_new_ones(tmp_path: Path, number: int) -> None:
    gate = tmp_path / "gate"
    with Server(TEST_GATE_FILE=str(gate)) as server, held_call(server, gate) as held:
        server.signal(number)
        until(lambda: server.get("/readyz") == (503, "draining\n"))
        assert server.get("/healthz")[0] == 200
        with pytest.raises(Dinov3Error):
            server.client().extract(photo(2, 32, 32), preset="none", deadline=0.3)
        assert not held.done()
        gate.touch()
        assert held.exception() is None
        assert server.wait() == 0


def test_requests_over_the_drain_time_are_cut_off_and_the_exit_code_is_0(tmp_path: Path) -> None:
    gate = tmp_path / "never"
    with Server("--drain-seconds", "0.2", TEST_GATE_FILE=str(gate)) as server, held_call(server, gate) as held:
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert isinstance(held.exception(), grpc.RpcError)


def test_sighup_reloads_the_tokens_and_unused_signals_end_nothing(tmp_path: Path) -> None:
    """Signals go to every process of the server, as `systemctl reload` sends them."""
    tokens = tmp_path / "tokens"
    tokens.write_text("old")
    with Server("--token-file", str(tokens), "--frontends", "2") as server:
        with Client(server.grpc, token="old") as client:
            assert client.model().frontends == 2
        tokens.write_text("new")
        processes = [psutil.Process(server.process.pid), *server.family()]
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE):
            for process in processes:
                process.send_signal(number)
        until(lambda: sum("reloaded " in line for line in server.log) == 2)  # one line of each frontend
        until(lambda: any("SIGUSR2 is ignored" in line for line in server.log))
        with Client(server.grpc, token="old") as client, pytest.raises(Unauthenticated):
            client.model()
        with Client(server.grpc, token="new") as client:
            assert client.model().frontends == 2
        assert {process.pid for process in server.family()} == {process.pid for process in processes[1:]}


def send_sighup(server: Server) -> None:
    server.signal(signal.SIGHUP)
    until(lambda: any("SIGHUP" in line for line in server.log))


def kill_worker(server: Server) -> None:
    server.children("worker")[0].kill()


@pytest.mark.parametrize("disturb", [send_sighup, kill_worker])
def test_a_drain_finishes_requests_in_flight_despite(disturb: Callable[[Server], None], tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with Server(TEST_GATE_FILE=str(gate)) as server, held_call(server, gate) as held:
        server.signal(signal.SIGTERM)
        until(lambda: server.get("/readyz")[0] == 503)
        disturb(server)
        gate.touch()
        assert held.exception() is None
        assert server.wait() == 0


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    gate = tmp_path / "never"
    with Server(TEST_GATE_FILE=str(gate)) as server, held_call(server, gate) as held:
        server.signal(signal.SIGTERM)
        until(lambda: server.get("/readyz")[0] == 503)
        server.signal(signal.SIGTERM)
        assert server.wait() == 128 + signal.SIGTERM
        assert isinstance(held.exception(), grpc.RpcError)


COMMAND = (sys.executable, "-m", "tests.support.serve", "serve", "--port", "0", "--http-port", "0")
SCRIPTED = "tests.server.processes.scripted_runners"


def environment(runner: str) -> dict[str, str]:
    return {**os.environ, "DINOV3_WEIGHTS": "random:0", "TEST_RUNNER": runner}


def start(*flags: str, runner: str = RUNNER) -> subprocess.CompletedProcess[str]:
    """Run a server that is expected not to start."""
    return subprocess.run(
        [*COMMAND, *flags],
        cwd=ROOT,
        env=environment(runner),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )


def test_a_port_in_use_is_an_error_even_if_it_could_be_shared() -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        ended = start("--port", str(port))
        assert ended.returncode == 2
        assert ended.stdout == ""
        assert str(port) in ended.stderr
        assert "--port 0" in ended.stderr
        assert "Traceback" not in ended.stderr
    with Server() as server:  # another server of this kind would share it silently
        port = int(server.grpc.rpartition(":")[2])
        assert start("--port", str(port)).returncode == 2
        with server.client() as client:
            ask(client, 1)


def test_a_model_that_cannot_be_loaded_ends_the_server_with_the_reason() -> None:
    ended = start(runner=f"{SCRIPTED}:bad_weights")
    assert ended.returncode == CheckpointError.exit_code
    assert "scripted: no such key" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("runner", ["dies", "fails_beside_a_thread", "leaves_a_child"])
def test_a_worker_that_never_starts_ends_the_server(
    runner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_GATE_FILE", str(tmp_path / "gate"))
    try:
        ended = start("--worker-restart-limit", "2", runner=f"{SCRIPTED}:{runner}")
    finally:
        (tmp_path / "gate").touch()
    assert ended.returncode == 1
    assert "failed to start 2 times in a row" in ended.stderr
    assert ended.stdout == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_start_ends_the_server_without_waiting_for_the_model(number: int) -> None:
    with subprocess.Popen(
        COMMAND,
        cwd=ROOT,
        env=environment(f"{SCRIPTED}:hangs"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        assert "probes on" in process.stderr.readline()
        process.send_signal(number)
        ready, log = process.communicate(timeout=LIMIT)
    assert (process.returncode, ready) == (0, "")
    assert "drained" in log
    assert "killed" not in log, "it waited for a model that never loads"


def test_a_worker_that_fails_at_its_end_is_not_started_again() -> None:
    with Server(TEST_RUNNER=f"{SCRIPTED}:closes_badly") as server:
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
    assert not [line for line in server.log if "successor" in line]


def test_too_little_memory_for_the_arenas_is_an_error() -> None:
    ended = start("--arena-bytes", "900GiB")
    assert ended.returncode == 2
    assert "--arena-bytes" in ended.stderr


def test_endpoints_while_serving() -> None:
    with Server("--log-format", "json") as server:
        assert server.get("/readyz") == (200, "serving\n")
        assert server.get("/healthz")[0] == 200
        with server.client() as client:
            ask(client, 3)
            assert client.model().frontends == 1
        until(lambda: server.metric("dinov3_images_total", outcome="ok") == 4)
        until(lambda: server.metric("dinov3_stage_seconds_count", stage="forward") == 1)
        assert server.metric("dinov3_requests_total", method="Extract", code="OK") == 1
        assert server.metric("dinov3_model_info", model="numpy") == 1
        assert server.metric("dinov3_batch_images_sum") == 4
        assert server.get("/nothing")[0] == 404
    assert all(re.match(r'\{"ts": ', line) for line in server.log)
