"""Several targets, in every spelling; proxies."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import grpc
import pytest

from dinov3_client import Client, ModelMismatch, Unavailable
from dinov3_client._transport import proxy
from dinov3_client._transport.targets import check_targets, host_of
from dinov3_client.testing import MODEL, Failure, FakeServer
from tests.client.adapters import EXACT, Adapter, check, photos
from tests.support.waiting import LIMIT

SPELLINGS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "list": (["a:1", "b:2"], ("a:1", "b:2")),
    "commas": ("a:1, b:2", ("a:1", "b:2")),
    "ipv4": ("ipv4:10.0.0.1:1,10.0.0.2:2", ("ipv4:10.0.0.1:1", "ipv4:10.0.0.2:2")),
    "ipv6": ("ipv6:[::1]:1,[fd00::2]:2", ("ipv6:[::1]:1", "ipv6:[fd00::2]:2")),
    "list of lists": (["a:1,b:2", "unix:/tmp/a,b"], ("a:1", "b:2", "unix:/tmp/a,b")),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_server_of_a_list_is_a_target(spelling: str) -> None:
    given, targets = SPELLINGS[spelling]
    assert check_targets(given) == targets


@pytest.mark.parametrize("target", ["a:1,b", "ipv4:10.0.0.1", "ipv4:[::1]:1", "ipv6:10.0.0.1:1", "ipv4:host:1", ","])
def test_a_wrong_server_of_a_list_is_named(target: str) -> None:
    with pytest.raises(ValueError, match=r"^target is "):
        check_targets(target)


@pytest.mark.parametrize("spelling", ["ipv4:{},{}", "{},{}", "list"])
def test_the_servers_of_a_list_share_the_calls(adapter: type[Adapter], spelling: str) -> None:
    with FakeServer() as first, FakeServer() as second:
        targets = [first.target, second.target]
        with adapter(targets if spelling == "list" else spelling.format(*targets)) as one:
            for _ in range(6):
                check(one.extract(photos(1), **EXACT), photos(1))
        assert len(first.requests) == len(second.requests) == 3


def test_a_failover_is_logged_once_until_the_target_answers_again(
    adapter: type[Adapter], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dinov3_client")
    with FakeServer() as gone, FakeServer() as server, adapter([gone.target, server.target]) as one:
        now = 0.0
        one.client._session.now = lambda: now

        def call() -> None:
            nonlocal now
            now += 3.0  # so that every back-off is over
            one.extract(photos(1), deadline=LIMIT, **EXACT)

        gone.stop()
        for _ in range(10):
            call()
        (warning,) = caplog.records
        assert warning.getMessage().startswith(f"cannot reach {gone.target} in plain text")
        assert "; using the other targets for" in warning.getMessage()
        caplog.clear()
        gone.start()
        while not caplog.records:  # gRPC connects again in a while
            call()
        assert caplog.records[0].getMessage() == f"{gone.target} answers again"
        gone.stop()
        while len(caplog.records) < 2:
            call()
        assert caplog.records[1].levelname == "WARNING"


OTHER = replace(MODEL, fingerprint="cafe")


def test_different_models_behind_a_list_are_an_error(adapter: type[Adapter]) -> None:
    with FakeServer() as first, FakeServer(OTHER) as second, adapter([first.target, second.target]) as one:
        with pytest.raises(ModelMismatch, match=r"the targets serve different models: .* mixed_models=True") as caught:
            one.extract(photos(1), **EXACT)
        for text in (first.target, second.target, "f00d", "cafe"):
            assert text in str(caught.value)
        second.model = MODEL
        for _ in range(4):
            one.extract(photos(1), **EXACT)
        # All change, one after the other: what the one said last is asked again before it counts.
        first.model = second.model = OTHER
        for _ in range(4):
            one.extract(photos(1), **EXACT)


def test_equal_models_cost_no_call() -> None:
    with FakeServer() as first, FakeServer() as second, Client([first.target, second.target]) as one:
        for _ in range(6):
            one.extract(photos(1), **EXACT)
        assert sum(call.method == "GetModel" for call in first.calls + second.calls) == 1


def test_different_models_may_be_asked_for(adapter: type[Adapter]) -> None:
    with FakeServer() as first, FakeServer(OTHER) as second:
        targets = [first.target, second.target]
        with adapter(targets, mixed_models=True) as one:
            assert {one.extract(photos(1), **EXACT).fingerprint for _ in range(4)} == {"f00d", "cafe"}


def test_the_models_of_targets_that_are_gone_do_not_matter(adapter: type[Adapter]) -> None:
    with FakeServer() as first, FakeServer(OTHER) as second, adapter([first.target, second.target]) as one:
        second.script = second.model_script = [Failure(grpc.StatusCode.UNAVAILABLE, "loading")] * 99
        for _ in range(4):
            assert one.extract(photos(1), **EXACT).fingerprint == "f00d"


# Proxies.


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*proxy._PROXIES, *proxy._EXCEPTIONS):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@contextmanager
def running_proxy(upstream: str) -> Iterator[tuple[str, list[str]]]:
    """An HTTP proxy that connects to `upstream` whatever it is asked for, and the targets that it was asked for."""
    asked: list[str] = []
    open_sockets: list[socket.socket] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def pipe(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def serve() -> None:
        while True:
            try:
                connection = listener.accept()[0]
            except OSError:
                return
            head = b""
            while b"\r\n\r\n" not in head:
                head += connection.recv(4096)
            asked.append(head.split()[1].decode())
            host, port = upstream.rsplit(":", 1)
            server = socket.create_connection((host, int(port)))
            open_sockets.extend((connection, server))
            connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            for pair in ((connection, server), (server, connection)):
                threads.submit(pipe, *pair)

    with ThreadPoolExecutor(8) as threads:
        threads.submit(serve)
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}", asked
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
            for one in open_sockets:
                _shutdown(one)


def _shutdown(one: socket.socket) -> None:
    with suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()


@pytest.mark.parametrize("variable", ["http_proxy", "HTTPS_PROXY", "grpc_proxy", "GRPC_PROXY"])
def test_a_proxy_is_used_for_other_hosts(
    adapter: type[Adapter], server: FakeServer, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    with running_proxy(server.target) as (address, asked):
        monkeypatch.setenv(variable, f"http://{address}")
        with adapter("features.invalid:50051") as one:
            check(one.extract(photos(1), **EXACT), photos(1))
        with adapter(server.target) as one:
            check(one.extract(photos(1), **EXACT), photos(1))
    assert set(asked) == {"features.invalid:50051"}


def test_a_proxy_is_named_in_errors(adapter: type[Adapter], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://user:secret@127.0.0.1:1")
    with adapter("features.invalid:50051") as one, pytest.raises(Unavailable) as caught:
        one.model(deadline=0.3)
    assert "through the proxy http://127.0.0.1:1 (from HTTP_PROXY; no_proxy" in str(caught.value)
    assert "secret" not in str(caught.value)


FOUND: list[tuple[str, dict[str, str], bool]] = [
    ("host:1", {"http_proxy": "http://p:1"}, True),
    ("host:1", {"http_proxy": "p:1"}, True),
    ("host:1", {}, False),
    ("host:1", {"http_proxy": ""}, False),
    ("host:1", {"http_proxy": "socks5://p:1"}, False),
    ("localhost:1", {"http_proxy": "http://p:1"}, False),
    ("127.1.2.3:1", {"http_proxy": "http://p:1"}, False),
    ("[::1]:1", {"http_proxy": "http://p:1"}, False),
    ("ipv4:127.0.0.1:1", {"http_proxy": "http://p:1"}, False),
    ("ipv6:[::1]:1", {"http_proxy": "http://p:1"}, False),
    ("dns:///localhost:1", {"http_proxy": "http://p:1"}, False),
    ("unix:/tmp/socket", {"http_proxy": "http://p:1"}, False),
    ("dns:///host:1", {"http_proxy": "http://p:1"}, True),
    ("host:1", {"http_proxy": "http://p:1", "no_proxy": "*"}, False),
    ("host:1", {"HTTP_PROXY": "http://p:1", "NO_PROXY": "other, HOST"}, False),
    ("a.host.lan:1", {"http_proxy": "http://p:1", "no_proxy": ".host.lan"}, False),
    ("a.host.lan:1", {"http_proxy": "http://p:1", "no_proxy": "*.lan"}, False),
    ("a.host.lan:1", {"http_proxy": "http://p:1", "no_proxy": "host.org"}, True),
    ("10.1.2.3:1", {"http_proxy": "http://p:1", "no_proxy": "10.0.0.0/8"}, False),
    ("11.1.2.3:1", {"http_proxy": "http://p:1", "no_proxy": "10.0.0.0/8"}, True),
    ("host:1", {"http_proxy": "http://p:1", "no_proxy": "host", "no_grpc_proxy": "other"}, True),
]


@pytest.mark.parametrize(("target", "environment", "found"), FOUND)
def test_which_targets_have_a_proxy(
    monkeypatch: pytest.MonkeyPatch, target: str, environment: dict[str, str], found: bool
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (proxy.find(target) is not None) == found


def test_hosts_of_targets() -> None:
    hosts = {"a:1": "a", "[::1]:2": "::1", "dns:a:1": "a", "dns://8.8.8.8/a:1": "a", "ipv4:1.2.3.4:5": "1.2.3.4"}
    assert {target: host_of(target) for target in hosts} == hosts
