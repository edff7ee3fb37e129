"""/metrics, /healthz and /readyz over HTTP, for Prometheus and for probes.

One thread a connection, one request a connection: few ask, and one that is slow keeps no other waiting.
"""

from __future__ import annotations

import errno
import logging
import socket
import socketserver
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from dinov3_server.errors import StartupError

log = logging.getLogger(__name__)

Probe = Callable[[], tuple[bool, str]]

_READ_SECONDS = 5.0  # A client that sends or takes nothing for this long is hung up on.
_TEXT = "text/plain; charset=utf-8"
_EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"


class HttpEndpoints:
    """The HTTP side of the supervisor.

    `render` gives the page of /metrics. `ready` and `healthy` tell whether /readyz and /healthz answer 200 or 503, and
    the line they answer. All are called from threads of their own, several at once. Port 0 takes a free one. The
    constructor binds and raises StartupError where it cannot; `start` begins to answer.
    """

    def __init__(self, host: str, port: int, render: Callable[[], bytes], ready: Probe, healthy: Probe) -> None:
        def probe(ask: Probe) -> Callable[[], tuple[HTTPStatus, str, bytes]]:
            def page() -> tuple[HTTPStatus, str, bytes]:
                good, reason = ask()
                return HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE, _TEXT, f"{reason}\n".encode()

            return page

        pages = {
            "/metrics": lambda: (HTTPStatus.OK, _EXPOSITION, render()),
            "/healthz": probe(healthy),
            "/readyz": probe(ready),
        }
        self._server = _bind(host, port, pages)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="http", daemon=True)

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Hang up on everybody; when it returns, no socket and no thread is left. May be called without `start`."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.hang_up()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # Only threads that are no daemons are joined by server_close.
    allow_reuse_port = False  # Newer Pythons would let two servers share a port, silently.
    request_queue_size = 128

    def __init__(self, family: socket.AddressFamily, address: Any, pages: dict[str, Any]) -> None:
        self.address_family = family
        self.pages = pages
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own asks the DNS for our name, which can hang.

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """Wake every thread that waits for its client."""
        with self._lock:
            for connection in self._open:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:  # The client was faster.
                    continue

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("HTTP client %s went away", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _READ_SECONDS
    server_version = "dinov3-server"
    sys_version = ""
    error_message_format = "%(message)s\n"
    error_content_type = _TEXT

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        page = self.server.pages.get(path)
        if page is None:
            self._answer(HTTPStatus.NOT_FOUND, _TEXT, b"not here; there are /metrics, /healthz and /readyz\n")
            return
        try:
            status, content_type, body = page()
        except Exception:
            log.exception("%s failed", path)
            status, content_type, body = HTTPStatus.INTERNAL_SERVER_ERROR, _TEXT, b"failed; the server's log has why\n"
        self._answer(status, content_type, body)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._answer(HTTPStatus.METHOD_NOT_ALLOWED, _TEXT, b"only GET and HEAD\n")

    do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_CONNECT = do_POST

    def _answer(self, status: HTTPStatus, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("HTTP %s: " + format, self.client_address[0], *args)


def _bind(host: str, port: int, pages: dict[str, Any]) -> _Server:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return _Server(family, address, pages)
    except (socket.gaierror, UnicodeError) as error:  # UnicodeError: "a..b" is no name at all
        why = error.strerror if isinstance(error, OSError) else "not a host name"
        raise StartupError(f"http_host {host!r} is not an address of this machine: {why}") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise StartupError(
                f"port {port} of {host} is in use; choose another for HTTP with --http-port "
                "(DINOV3_HTTP_PORT, http_port), 0 for any free one"
            ) from None
        raise StartupError(
            f"cannot listen for HTTP on {host}:{port} (http_host, http_port): {error.strerror}"
        ) from None
