"""/metrics, /healthz and /readyz over HTTP, for Prometheus and for health checks.

One thread and one event loop serve all connections, one request per connection. The port never holds more than
MAX_CONNECTIONS descriptors, each for at most CONNECTION_SECONDS; when one more connection arrives, the oldest one of
the address with the most connections is closed. So a flood of slow clients takes nothing from the rest of the server,
and a health check, which sends its request at once, is answered during it.
"""

from __future__ import annotations

import asyncio
import errno
import io
import logging
import socket
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
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
        self._connections: dict[asyncio.Task[None], str] = {}  # to the client's address, the oldest first
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)
        self.port = int(self._listener.getsockname()[1])

    def start(self) -> None:
        self._serving = self._loop.create_task(self._serve())
        self._thread.start()

    def stop(self) -> None:
        """Close all connections; on return no socket and no thread is left. It may be called without `start`, and more
        than once."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._serving.cancel)
            self._thread.join()
        self._listener.close()
        self._loop.close()

    def _run(self) -> None:
        with suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._serving)

    async def _serve(self) -> None:
        async with asyncio.TaskGroup() as connections:  # ends them when this is cancelled
            while True:
                if len(self._connections) == MAX_CONNECTIONS:
                    await self._make_room()  # before accepting, so that the limit is never exceeded
                try:
                    sock, address = await self._loop.sock_accept(self._listener)
                except ConnectionError:
                    continue  # the client is gone already
                except OSError as error:
                    log.debug("an HTTP connection cannot be accepted: %s", error.strerror)
                    if self._connections:
                        await self._make_room()
                    else:  # the process has no descriptor left, and none can be freed here
                        await asyncio.sleep(_PAUSE)
                    continue
                connection = connections.create_task(self._answer(sock, address[0]))
                self._connections[connection] = address[0]
                connection.add_done_callback(self._connections.pop)
                await asyncio.sleep(0)  # most clients have sent their request by now: it is answered here

    async def _make_room(self) -> None:
        ((busiest, _),) = Counter(self._connections.values()).most_common(1)
        oldest = next(connection for connection, address in self._connections.items() if address == busiest)
        oldest.cancel()
        await asyncio.wait([oldest])

    async def _answer(self, sock: socket.socket, address: str) -> None:
        """Read one request, send the answer, and close the connection."""
        try:
            with sock:
                async with asyncio.timeout(CONNECTION_SECONDS):
                    request = b""
                    while not (b"\r\n\r\n" in request or b"\n\n" in request or len(request) >= _MAX_REQUEST):
                        data = await self._loop.sock_recv(sock, _MAX_REQUEST)
                        if not data:
                            raise ConnectionResetError
                        request += data
                    await self._loop.sock_sendall(sock, _Handler(request, address, self._pages).answer)
        except OSError:
            log.debug("HTTP client %s went away, or was too slow", address)
        except Exception:
            log.exception("a request over HTTP failed")


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
