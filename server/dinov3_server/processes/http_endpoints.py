"""/metrics, /healthz and /readyz over HTTP, for Prometheus and for health checks.

One thread and one selector serve all connections, one request per connection. The port never holds more than
MAX_CONNECTIONS descriptors, each for at most CONNECTION_SECONDS; when one more connection arrives, the oldest one of
the address with the most connections is closed. So a flood of slow clients takes nothing from the rest of the server,
and a health check, which sends its request at once, is answered during it.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any

from dinov3_server.errors import StartupError

log = logging.getLogger(__name__)

Check = Callable[[], tuple[bool, str]]
Page = Callable[[], tuple[HTTPStatus, str, bytes]]

MAX_CONNECTIONS = 32
# From accepting a connection to closing it, whatever its client does.
CONNECTION_SECONDS = 5.0
# How long to accept nothing when the process has no descriptor left and no connection here holds one.
_PAUSE = 0.1
# Of the first line and headers of a request. A longer one is answered from its first bytes.
_MAX_REQUEST = 16384
_TEXT = "text/plain; charset=utf-8"
_EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(eq=False)
class _Connection:
    sock: socket.socket
    address: str
    ends: float  # when it is closed
    request: bytearray = field(default_factory=bytearray)
    answer: memoryview | None = None  # the part still to be sent; None until the request is complete


class HttpEndpoints:
    """The HTTP server of the supervisor.

    `render` returns the page of /metrics. `ready` and `healthy` return whether /readyz and /healthz answer 200 or 503,
    and the line that they answer. All are called from the HTTP thread. Port 0 takes a free one. The constructor binds
    the port; `start` begins to answer.

    Raises:
        StartupError: the address cannot be bound.
    """

    def __init__(self, host: str, port: int, render: Callable[[], bytes], ready: Check, healthy: Check) -> None:
        def page_of(check: Check) -> Page:
            def page() -> tuple[HTTPStatus, str, bytes]:
                good, reason = check()
                return HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE, _TEXT, f"{reason}\n".encode()

            return page

        self._pages: dict[str, Page] = {
            "/metrics": lambda: (HTTPStatus.OK, _EXPOSITION, render()),
            "/healthz": page_of(healthy),
            "/readyz": page_of(ready),
        }
        self._listener = _listen(host, port)
        self._connections: dict[int, _Connection] = {}  # by descriptor, the oldest first
        self._selector = selectors.DefaultSelector()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._stopping = False
        self._thread = threading.Thread(target=self._serve, name="http", daemon=True)
        self.port = int(self._listener.getsockname()[1])

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Close all connections; on return no socket and no thread is left. It may be called without `start`, and more
        than once."""
        if self._stopping:
            return
        self._stopping = True
        os.eventfd_write(self._wake, 1)
        if self._thread.is_alive():
            self._thread.join()
        while self._connections:
            self._make_room()
        self._selector.close()
        self._listener.close()
        os.close(self._wake)

    def _serve(self) -> None:
        while not self._stopping:
            ends = next((oldest.ends for oldest in self._connections.values()), None)
            for key, _ in self._selector.select(None if ends is None else max(0.0, ends - time.monotonic())):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fd in self._connections:  # else it was closed in this iteration
                    self._progress(self._connections[key.fd])
            now = time.monotonic()
            for connection in [each for each in self._connections.values() if each.ends <= now]:
                self._close(connection)

    def _accept(self) -> None:
        if len(self._connections) == MAX_CONNECTIONS:
            self._make_room()  # before accepting, so that the limit is never exceeded
        try:
            sock, address = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return  # the client is gone already
        except OSError as error:
            log.debug("an HTTP connection cannot be accepted: %s", error.strerror)
            if self._connections:
                self._make_room()
            else:  # the process has no descriptor left, and none can be freed here
                time.sleep(_PAUSE)
            return
        sock.setblocking(False)
        try:
            self._selector.register(sock, selectors.EVENT_READ)
        except OSError:  # the kernel has no memory for it
            sock.close()
            return
        connection = _Connection(sock, address[0], time.monotonic() + CONNECTION_SECONDS)
        self._connections[sock.fileno()] = connection
        self._progress(connection)  # most clients have sent their request by now

    def _progress(self, connection: _Connection) -> None:
        """Read the available part of the request, or send as much of the answer as the socket takes."""
        try:
            if connection.answer is None and not self._read(connection):
                return
            assert connection.answer is not None
            connection.answer = connection.answer[connection.sock.send(connection.answer) :]
            if connection.answer:
                self._selector.modify(connection.sock, selectors.EVENT_WRITE)
                return
        except BlockingIOError:
            return
        except OSError:
            log.debug("HTTP client %s went away", connection.address)
        except Exception:
            log.exception("a request over HTTP failed")
        self._close(connection)

    def _read(self, connection: _Connection) -> bool:
        """Read from the socket. Return whether the request is complete and its answer is set.

        Raises:
            BlockingIOError: there is nothing to read yet.
            ConnectionResetError: the client closed the connection without a request.
        """
        data = connection.sock.recv(_MAX_REQUEST)
        if not data:
            raise ConnectionResetError
        request = connection.request
        request += data
        if not (b"\r\n\r\n" in request or b"\n\n" in request or len(request) >= _MAX_REQUEST):
            return False
        connection.answer = memoryview(_Handler(bytes(request), connection.address, self._pages).answer)
        return True

    def _make_room(self) -> None:
        connections = self._connections.values()
        ((busiest, _),) = Counter(connection.address for connection in connections).most_common(1)
        self._close(next(connection for connection in connections if connection.address == busiest))

    def _close(self, connection: _Connection) -> None:
        del self._connections[connection.sock.fileno()]
        self._selector.unregister(connection.sock)
        with suppress(OSError):  # the client has closed it already
            connection.sock.shutdown(socket.SHUT_RDWR)
        connection.sock.close()


class _Handler(BaseHTTPRequestHandler):
    """Parse one complete request; its `answer` is the bytes to send."""

    server_version = "dinov3-server"
    sys_version = ""
    error_message_format = "%(message)s\n"
    error_content_type = _TEXT

    def __init__(self, request: bytes, address: str, pages: dict[str, Page]) -> None:
        self.client_address = (address, 0)
        self.rfile = io.BytesIO(request)
        self.wfile = io.BytesIO()
        self._pages = pages
        self.handle_one_request()
        self.answer = self.wfile.getvalue()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        page = self._pages.get(path)
        if page is None:
            self._answer(HTTPStatus.NOT_FOUND, _TEXT, b"not found; the pages are /metrics, /healthz and /readyz\n")
            return
        try:
            status, content_type, body = page()
        except Exception:
            log.exception("%s failed", path)
            status, content_type, body = HTTPStatus.INTERNAL_SERVER_ERROR, _TEXT, b"failed; see the server's log\n"
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


def _listen(host: str, port: int) -> socket.socket:
    """Return a non-blocking socket that listens."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(1024)  # a connection that is not accepted yet takes no descriptor
        except OSError:
            listener.close()
            raise
        listener.setblocking(False)
        return listener
    except (socket.gaierror, UnicodeError) as error:  # UnicodeError: "a..b" is not a host name
        reason = error.strerror if isinstance(error, OSError) else "not a host name"
        raise StartupError(f"http_host {host!r} is not an address of this machine: {reason}") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise StartupError(
                f"port {port} of {host} is in use; choose another for HTTP with --http-port "
                "(DINOV3_HTTP_PORT, http_port), 0 for any free one"
            ) from None
        raise StartupError(
            f"cannot listen for HTTP on {host}:{port} (http_host, http_port): {error.strerror}"
        ) from None
