"""Real connections: how many, to whom, over TLS, and what happens when a server goes and comes back."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from dinov3_client import Client, DeadlineExceeded, Features, Unavailable
from dinov3_client.testing import MODEL, Failure, FakeServer, expected
from tests.client.adapters import Adapter
from tests.client.conftest import FakeClock
from tests.support.waiting import LIMIT

HERE = Path(__file__).parent
OPTIONS: Any = {"outputs": "cls", "preset": "none", "dtype": "float32"}
FRONTENDS = replace(MODEL, frontends=3)


def photo(index: int) -> np.ndarray[Any, Any]:
    return np.full((16, 32, 3), index % 256, np.uint8)


def check(features: Features, index: int) -> None:
    np.testing.assert_array_equal(features.cls, [expected(photo(index), "cls")])


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(12) as threads:
        yield threads


@pytest.mark.parametrize(("connections", "expected_frontends"), [(None, {0, 1, 2}), (1, {0}), (2, {0, 1})])
def test_connections_to_one_server(
    adapter: type[Adapter], threads: ThreadPoolExecutor, connections: int | None, expected_frontends: set[int]
) -> None:
    """A fake server's connections are on a frontend each, in their order."""
    with FakeServer(FRONTENDS) as server, adapter(server.target, connections=connections) as one:
        assert one.model().frontends == 3
        server.gate.clear()
        calls = [threads.submit(one.extract, photo(index), **OPTIONS) for index in range(9)]
        server.wait_for_calls(9)
        server.gate.set()
        frontends = [call.result().frontend for call in calls]
    assert set(frontends) == expected_frontends
    assert max(map(frontends.count, expected_frontends)) == 9 // len(expected_frontends) + bool(
        9 % len(expected_frontends)
    )


def test_calls_one_after_the_other_take_one_connection() -> None:
    with FakeServer(FRONTENDS) as server, Client(server.target) as client:
        assert {client.extract(photo(0)).frontend for _ in range(5)} == {0}


def test_targets_share_the_calls(adapter: type[Adapter], threads: ThreadPoolExecutor) -> None:
    with FakeServer() as one_server, FakeServer() as other, adapter([one_server.target, other.target]) as one:
        for server in (one_server, other):
            server.gate.clear()
        one.client._session._model = MODEL
        calls = [threads.submit(one.extract, photo(index), **OPTIONS) for index in range(8)]
        for server in (one_server, other):
            server.wait_for_calls(4)
        for server in (one_server, other):
            server.gate.set()
        for index, call in enumerate(calls):
            check(call.result(), index)


def test_a_target_that_is_not_there_is_passed_over(adapter: type[Adapter]) -> None:
    """At once: nothing is waited for while another lives."""
    with FakeServer() as gone, FakeServer() as server, adapter([gone.target, server.target]) as one:
        gone.stop()
        one.client._sleep = None  # a pause would be a TypeError
        for index, features in enumerate(one.many(map(photo, range(20)), in_flight=4, **OPTIONS)):
            check(features, index)
        server.stop()
        gone.start()
        # Both rested or failed by now: the client finds the one that is there.
        del one.client._sleep
        check(one.extract(photo(7), **OPTIONS), 7)


def test_a_busy_target_is_left_for_another(adapter: type[Adapter]) -> None:
    with FakeServer() as busy, FakeServer() as idle, adapter([busy.target, idle.target]) as one:
        one.client._sleep = None
        one.client._session._model = MODEL
        for server in (busy, idle):
            server.script = [Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry_after=30.0)]
        busy.script *= 50
        idle.script.clear()
        for index in range(6):
            check(one.extract(photo(index), **OPTIONS), index)
        assert len(idle.requests) == 6
        assert 0 < len(busy.requests) <= 6


@pytest.mark.parametrize("scheme", ["dns:///", "ipv4:", ""])
def test_names(adapter: type[Adapter], scheme: str) -> None:
    with FakeServer() as server:
        target = server.target.replace("localhost", "127.0.0.1") if scheme == "ipv4:" else server.target
        with adapter(scheme + target) as one:
            check(one.extract(photo(1), **OPTIONS), 1)


def test_a_socket_of_this_machine(adapter: type[Adapter], tmp_path: Path) -> None:
    with FakeServer(address=f"unix:{tmp_path}/socket") as server, adapter(server.target) as one:
        check(one.extract(photo(1), **OPTIONS), 1)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ([], "target is empty"),
        (["a:1", "b:1", "a:1"], "target names 'a:1' twice"),
        (["a:1", "b"], "target is 'b'; it must be"),
    ],
)
def test_invalid_sequences_of_targets(target: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Client(target)


# Servers that go and come back.


def test_a_server_that_restarts_between_calls(adapter: type[Adapter]) -> None:
    with FakeServer() as server, adapter(server.target) as one:
        for index in range(3):
            check(one.extract(photo(index), **OPTIONS), index)
            server.stop()
            server.start()
        check(one.extract(photo(9), **OPTIONS), 9)


def test_a_server_that_restarts_under_calls(adapter: type[Adapter], threads: ThreadPoolExecutor) -> None:
    """What was in flight is sent again; nothing is lost, doubled or out of place."""
    with FakeServer(FRONTENDS) as server, adapter(server.target, deadline=LIMIT) as one:
        answers = one.many(map(photo, range(60)), in_flight=6, **OPTIONS)
        for index in range(20):
            check(next(answers), index)
        server.gate.clear()
        waiting = threads.submit(next, answers)
        server.wait_for_calls(24)
        server.stop()
        server.gate.set()
        server.start()
        check(waiting.result(), 20)
        for index in range(21, 60):
            check(next(answers), index)
        assert next(answers, None) is None


def test_ready_by_way_of_all_that_may_be_in_between(adapter: type[Adapter], threads: ThreadPoolExecutor) -> None:
    """Nobody there, then a server that starts, then its model."""
    with FakeServer() as server:
        server.stop()
        server.model_script = [Failure(grpc.StatusCode.UNAVAILABLE, "loading", retry_after=600.0)] * 2
        with adapter(server.target) as one, warned() as nobody_there:
            ready = threads.submit(one.wait_ready, 60.0)
            assert nobody_there.wait(LIMIT)
            server.start()
            assert ready.result().fingerprint == MODEL.fingerprint
    assert server.model_script == []


@contextlib.contextmanager
def warned() -> Iterator[threading.Event]:
    """Set once a client says that it found nobody."""
    event = threading.Event()
    handler = logging.Handler()
    handler.emit = lambda _: event.set()  # type: ignore[method-assign]
    logger = logging.getLogger("dinov3_client")
    logger.addHandler(handler)
    try:
        yield event
    finally:
        logger.removeHandler(handler)


def test_not_ready_in_time(adapter: type[Adapter]) -> None:
    with FakeServer() as server:
        server.stop()
        with adapter(server.target) as one:
            one.ruled_by(FakeClock())
            with pytest.raises(Unavailable, match=r"^cannot reach .*refused.*\(attempt "):
                one.wait_ready(10)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        target = f"127.0.0.1:{mute.getsockname()[1]}"
        with adapter(target) as one, pytest.raises(DeadlineExceeded, match=rf"no answer from {target} within 0\.[01]"):
            one.wait_ready(0.1)


def test_another_service_at_the_port(adapter: type[Adapter], threads: ThreadPoolExecutor) -> None:
    """It takes connections and says nothing that gRPC understands."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with listener.accept()[0] as connection:
                connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")

        serving = threads.submit(serve)
        with adapter(f"127.0.0.1:{listener.getsockname()[1]}") as one, pytest.raises((Unavailable, DeadlineExceeded)):
            one.model(deadline=1)
        serving.result()


# TLS.


def credentials(client_ca: bool) -> grpc.ServerCredentials:
    key, certificate = (HERE / "localhost.key").read_bytes(), (HERE / "localhost.pem").read_bytes()
    authorities = (HERE / "client.pem").read_bytes() if client_ca else None
    return grpc.ssl_server_credentials([(key, certificate)], authorities, require_client_auth=client_ca)


MUTUAL = {"tls_ca": HERE / "localhost.pem", "tls_cert": HERE / "client.pem", "tls_key": HERE / "client.key"}


def test_tls(adapter: type[Adapter]) -> None:
    with FakeServer(address="localhost:0", credentials=credentials(False)) as server:
        with adapter(server.target, tls_ca=HERE / "localhost.pem", token="t") as one:
            check(one.extract(photo(3), **OPTIONS), 3)
        assert {call.metadata["authorization"] for call in server.calls} == {"Bearer t"}
        refused(
            adapter(server.target, tls_ca=HERE / "client.pem"),
            r"with TLS: its certificate is not trusted \(self.*tls_ca",
        )
        refused(adapter(server.target), r"in plain text \(is it up, and without TLS\?\)")
        assert len(server.calls) == 2
    with FakeServer() as server:
        refused(
            adapter(server.target, tls_ca=HERE / "localhost.pem"),
            r"with TLS: something answers, but without TLS; leave tls_ca, ",
        )


def test_mutual_tls(adapter: type[Adapter]) -> None:
    with FakeServer(address="localhost:0", credentials=credentials(True)) as server:
        with adapter(server.target, **MUTUAL) as one:
            check(one.extract(photo(3), **OPTIONS), 3)
        refused(adapter(server.target, tls_ca=HERE / "localhost.pem"), "with TLS")
        assert len(server.calls) == 2


def refused(adapter: Adapter, how: str) -> None:
    with adapter as one:
        one.ruled_by(FakeClock())
        with pytest.raises(Unavailable, match=rf"^cannot reach {one.client._settings.target} {how}"):
            one.model()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tls_cert": "client.pem"}, "tls_cert is given without tls_key"),
        ({"tls_key": "client.key"}, "tls_key is given without tls_cert"),
        ({"tls_ca": "client.key"}, r"tls_ca is '.*client\.key', which contains no PEM certificate"),
        (
            {"tls_cert": "client.pem", "tls_key": "localhost.key"},
            r"tls_cert '.*client\.pem' and tls_key '.*localhost\.key' are no PEM .* private key .*KEY_VALUES_MISMATCH",
        ),
        ({"tls_cert": "client.key", "tls_key": "client.key"}, "are no PEM certificate with its private key"),
    ],
)
def test_unusable_tls_files(adapter: type[Adapter], given: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        adapter("localhost:1", **{name: HERE / file for name, file in given.items()})
    assert "PRIVATE" not in str(caught.value)


def test_tls_files_that_are_not_there(adapter: type[Adapter], tmp_path: Path) -> None:
    for name in MUTUAL:
        with pytest.raises(FileNotFoundError):
            adapter("localhost:1", **{**MUTUAL, name: tmp_path / "none.pem"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"connections": 0}, "connections is 0; it must be a number of connections to each target, at least 1"),
        ({"connections": 1.5}, r"connections is 1\.5; it must be a number"),
        ({"keepalive": 1}, "keepalive is 1; it must be at least 5 seconds"),
        ({"keepalive": float("inf")}, "keepalive is inf"),
        ({"keepalive": "30"}, "keepalive is '30'"),
        ({"fingerprint": ""}, "fingerprint is ''"),
        ({"fingerprint": 3}, "fingerprint is 3"),
    ],
)
def test_invalid_arguments(adapter: type[Adapter], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        adapter("localhost:1", **arguments)


@pytest.mark.parametrize("keepalive", [None, 5, 30.0])
def test_keepalive(adapter: type[Adapter], keepalive: float | None) -> None:
    with FakeServer() as server, adapter(server.target, keepalive=keepalive) as one:
        check(one.extract(photo(3), **OPTIONS), 3)
