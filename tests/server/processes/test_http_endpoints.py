"""/metrics, /healthz and /readyz over real connections."""

from __future__ import annotations

import http.client
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dinov3_server.errors import StartupError
from dinov3_server.processes import http_endpoints
from dinov3_server.processes.http_endpoints import MAX_CONNECTIONS, HttpEndpoints
from tests.support.waiting import LIMIT


class State:
    """The supervisor's answers."""

    page = b"dinov3_queue_images 3.0\n"
    ready = (True, "serving")
    healthy = (True, "the supervisor runs")


@pytest.fixture
def state() -> State:
    return State()


@pytest.fixture
def endpoints(state: State) -> Iterator[HttpEndpoints]:
    served = HttpEndpoints(
        "127.0.0.1", 0, render=lambda: state.page, ready=lambda: state.ready, healthy=lambda: state.healthy
    )
    served.start()
    yield served
    served.stop()


def ask(endpoints: HttpEndpoints, path: str, method: str = "GET") -> tuple[int, http.client.HTTPMessage, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", endpoints.port, timeout=LIMIT)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def test_pages(endpoints: HttpEndpoints) -> None:
    status, headers, body = ask(endpoints, "/metrics")
    assert (status, body) == (200, State.page)
    assert headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert ask(endpoints, "/healthz")[::2] == (200, b"the supervisor runs\n")
    assert ask(endpoints, "/readyz?verbose=1")[::2] == (200, b"serving\n")


def test_a_failed_check_answers_503_with_the_reason(endpoints: HttpEndpoints, state: State) -> None:
    state.ready = (False, "draining")
    assert ask(endpoints, "/readyz")[::2] == (503, b"draining\n")
    assert ask(endpoints, "/healthz")[0] == 200
    state.healthy = (False, "no heartbeat")
    assert ask(endpoints, "/healthz")[::2] == (503, b"no heartbeat\n")
    state.ready = (True, "serving")
    assert ask(endpoints, "/readyz")[0] == 200


@pytest.mark.parametrize("path", ["/metrics", "/readyz", "/nothing"])
def test_head_is_get_without_the_body(endpoints: HttpEndpoints, path: str) -> None:
    get, head = ask(endpoints, path), ask(endpoints, path, "HEAD")
    assert head[0] == get[0]
    assert head[1]["Content-Length"] == get[1]["Content-Length"] == str(len(get[2]))
    with socket.create_connection(("127.0.0.1", endpoints.port), timeout=LIMIT) as connection:
        connection.sendall(f"HEAD {path} HTTP/1.0\r\n\r\n".encode())
        assert connection.makefile("rb").read().endswith(b"\r\n\r\n")  # http.client would not return a body


@pytest.mark.parametrize("path", ["/", "/metricsx", "/metrics/", "/../metrics"])
def test_an_unknown_path_names_the_pages(endpoints: HttpEndpoints, path: str) -> None:
    status, _, body = ask(endpoints, path)
    assert status == 404
    assert all(known in body for known in (b"/metrics", b"/healthz", b"/readyz"))


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
def test_other_methods(endpoints: HttpEndpoints, method: str) -> None:
    status, headers, _ = ask(endpoints, "/metrics", method)
    assert (status, headers["Allow"]) == (405, "GET, HEAD")


def test_an_unknown_method_is_refused_in_plain_text(endpoints: HttpEndpoints) -> None:
    status, headers, body = ask(endpoints, "/metrics", "BREW")
    assert (status, headers["Content-Type"]) == (501, "text/plain; charset=utf-8")
    assert body == b"Unsupported method ('BREW')\n"


def test_a_page_that_fails_is_logged_and_the_others_work(
    endpoints: HttpEndpoints, state: State, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(State, "page")
    status, _, body = ask(endpoints, "/metrics")
    assert status == 500
    assert b"Traceback" not in body
    assert [record.getMessage() for record in caplog.records if record.exc_info] == ["/metrics failed"]
    assert ask(endpoints, "/healthz")[0] == 200


def test_requests_are_logged_at_debug_level(endpoints: HttpEndpoints, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="dinov3_server"):
        ask(endpoints, "/healthz")
        ask(endpoints, "/%s%d")
    assert {record.levelno for record in caplog.records} == {logging.DEBUG}
    assert any("/%s%d" in record.getMessage() for record in caplog.records)


def test_slow_clients_do_not_delay_others(endpoints: HttpEndpoints) -> None:
    slow = [socket.create_connection(("127.0.0.1", endpoints.port), timeout=LIMIT) for _ in range(20)]
    try:
        for connection in slow:
            connection.sendall(b"GET /met")
        assert ask(endpoints, "/metrics")[0] == 200
        slow[0].sendall(b"rics HTTP/1.0\r\n\r\n")
        assert slow[0].makefile("rb").read().endswith(State.page)
    finally:
        for connection in slow:
            connection.close()


def test_a_flood_of_slow_clients_holds_few_descriptors_and_delays_no_health_check(endpoints: HttpEndpoints) -> None:
    before, threads = len(descriptors()), threading.active_count()
    slow = []
    try:
        for count in range(1, 5 * MAX_CONNECTIONS):
            slow.append(socket.create_connection(("127.0.0.1", endpoints.port), timeout=LIMIT))
            slow[-1].sendall(b"GET /met")
            if count % 16 == 0:
                assert ask(endpoints, "/healthz")[0] == 200
        assert slow[0].recv(1) == b"", "the oldest connection is closed"
        assert len(descriptors()) - before <= len(slow) + MAX_CONNECTIONS
        assert threading.active_count() <= threads  # those of earlier tests may have ended
    finally:
        for connection in slow:
            connection.close()


def test_a_flood_from_one_address_closes_no_connection_of_another(endpoints: HttpEndpoints) -> None:
    address = ("127.0.0.1", endpoints.port)
    with socket.create_connection(address, timeout=LIMIT, source_address=("127.0.0.2", 0)) as other:
        other.sendall(b"GET /healthz HTTP/1.0\r\n")
        assert ask(endpoints, "/healthz")[0] == 200  # `other` was accepted before
        flood = [socket.create_connection(address, timeout=LIMIT) for _ in range(3 * MAX_CONNECTIONS)]
        assert ask(endpoints, "/healthz")[0] == 200
        other.sendall(b"\r\n")
        assert other.recv(100).startswith(b"HTTP/1.0 200 ")
        for connection in flood:
            connection.close()


@pytest.mark.parametrize("request_so_far", [b"", b"GET /metrics HTTP/1.0\r\n", b"GET /metrics HTTP/1.0\r\n\r\n"])
def test_a_connection_is_closed_in_time_despite_its_client(
    state: State, monkeypatch: pytest.MonkeyPatch, request_so_far: bytes
) -> None:
    """One client sends nothing, one sends a few bytes now and then, one never reads its answer."""
    monkeypatch.setattr(http_endpoints, "CONNECTION_SECONDS", 0.2)
    state.page = b"x" * (64 << 20)  # more than sockets hold
    endpoints = HttpEndpoints("127.0.0.1", 0, lambda: state.page, lambda: state.ready, lambda: state.healthy)
    accepted, drips, sock_accept = threading.Event(), threading.Event(), endpoints._loop.sock_accept

    async def accept(listener: socket.socket) -> tuple[socket.socket, Any]:
        connection = await sock_accept(listener)
        accepted.set()
        return connection

    monkeypatch.setattr(endpoints._loop, "sock_accept", accept)
    endpoints.start()
    before = len(descriptors())
    with socket.create_connection(("127.0.0.1", endpoints.port), timeout=LIMIT) as connection:
        connection.sendall(request_so_far)
        assert accepted.wait(LIMIT)
        while len(descriptors()) > before + 1:  # until the server's end is closed
            if request_so_far.endswith(b"\n") and not request_so_far.endswith(b"\r\n\r\n"):
                with suppress(OSError):
                    connection.send(b"X: y\r\n")
            drips.wait(0.01)
    endpoints.stop()


def test_an_endless_request_is_answered_from_its_first_bytes(endpoints: HttpEndpoints) -> None:
    with socket.create_connection(("127.0.0.1", endpoints.port), timeout=LIMIT) as connection:
        connection.sendall(b"GET /healthz HTTP/1.0\r\n" + b"X: " + b"y" * 20000)
        assert connection.recv(100).startswith(b"HTTP/1.0 ")


@pytest.mark.parametrize("request_bytes", [b"\r\n\r\n", b"\0\r\n\r\n", b"GET\r\n\r\n", b"\xff /\xff HTTP/9.9\r\n\r\n"])
def test_nonsense_is_hung_up_on_and_disturbs_nothing(endpoints: HttpEndpoints, request_bytes: bytes) -> None:
    with socket.create_connection(("127.0.0.1", endpoints.port), timeout=LIMIT) as connection:
        connection.sendall(request_bytes)
        while connection.recv(4096):
            pass
    assert ask(endpoints, "/healthz")[0] == 200


def test_a_client_that_resets_is_no_news(endpoints: HttpEndpoints, capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(3):
        connection = socket.create_connection(("127.0.0.1", endpoints.port), timeout=LIMIT)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # close() sends RST.
        connection.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        connection.close()
    assert ask(endpoints, "/metrics")[0] == 200
    endpoints.stop()
    assert capfd.readouterr().err == ""


def descriptors() -> set[str]:
    """Open sockets, by what /proc shows of them."""
    links = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            links.add(str(entry.readlink()))
        except FileNotFoundError:  # The descriptor that lists them.
            continue
    return {link for link in links if link.startswith("socket:")}


def test_stop_leaves_no_thread_and_no_socket(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_endpoints, "CONNECTION_SECONDS", 3600.0)  # Only `stop` ends the idle connection.
    threads, sockets = set(threading.enumerate()), descriptors()
    endpoints = HttpEndpoints("127.0.0.1", 0, lambda: state.page, lambda: state.ready, lambda: state.healthy)
    endpoints.start()
    with socket.create_connection(("127.0.0.1", endpoints.port), timeout=LIMIT) as idle:
        assert ask(endpoints, "/metrics")[0] == 200  # the idle connection was accepted before
        endpoints.stop()
        assert idle.recv(1) == b""
    assert set(threading.enumerate()) == threads
    assert descriptors() == sockets
    endpoints.stop()  # has no effect


def test_stop_waits_for_a_page_that_is_being_rendered() -> None:
    entered, release = threading.Event(), threading.Event()

    def render() -> bytes:
        entered.set()
        release.wait(LIMIT)
        return b""

    threads = set(threading.enumerate())
    endpoints = HttpEndpoints("127.0.0.1", 0, render, lambda: (True, ""), lambda: (True, ""))
    endpoints.start()
    with socket.create_connection(("127.0.0.1", endpoints.port), timeout=LIMIT) as connection:
        connection.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert entered.wait(LIMIT)
        stopping = threading.Thread(target=endpoints.stop)
        stopping.start()
        stopping.join(0.4)  # times out: the page is not rendered yet
        assert stopping.is_alive()
        release.set()
        stopping.join()
    assert set(threading.enumerate()) == threads


def test_stop_without_start(state: State) -> None:
    sockets = descriptors()
    HttpEndpoints("127.0.0.1", 0, lambda: state.page, lambda: state.ready, lambda: state.healthy).stop()
    assert descriptors() == sockets


def bind(host: str, port: int) -> Callable[[], HttpEndpoints]:
    return lambda: HttpEndpoints(host, port, lambda: b"", lambda: (True, ""), lambda: (True, ""))


def test_port_in_use_names_port_and_setting(endpoints: HttpEndpoints) -> None:
    sockets = descriptors()
    with pytest.raises(StartupError) as caught:
        bind("127.0.0.1", endpoints.port)()
    assert f"port {endpoints.port} of 127.0.0.1 is in use" in str(caught.value)
    assert "--http-port" in str(caught.value)
    assert descriptors() == sockets
    assert ask(endpoints, "/healthz")[0] == 200


def test_address_of_another_machine() -> None:
    with pytest.raises(
        StartupError, match=r"cannot listen for HTTP on 192\.0\.2\.1:0 \(http_host, http_port\): Cannot"
    ):
        bind("192.0.2.1", 0)()


def test_host_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(StartupError, match="http_host 'nowhere' is not an address of this machine: Name or service"):
        bind("nowhere", 0)()


@pytest.mark.parametrize("host", ["a..b", "a" * 80])
def test_invalid_host_name(host: str) -> None:
    with pytest.raises(StartupError, match=f"http_host '{host}' is not an address of this machine: not a host name"):
        bind(host, 0)()


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
def test_ipv6(state: State) -> None:
    try:
        endpoints = bind("::1", 0)()
    except StartupError as error:
        pytest.skip(str(error))
    endpoints.start()
    with socket.create_connection(("::1", endpoints.port), timeout=LIMIT) as connection:
        connection.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.0 200 OK")
    endpoints.stop()
