"""An HTTP server on loopback that serves files, also ranges of them, with scripted faults.

with FileServer() as server:
    server.put("/weights.pth", data, {"ETag": '"1"'})
    server.script("/weights.pth", Answer(cut_after=1000), Answer(status=503))  # then without faults
    server.always("/gone", Answer(status=404))
    ... server.url("/weights.pth?Policy=secret") ...
    assert server.ranges("/weights.pth") == [None, "bytes=1000-", "bytes=1000-"]
"""

from __future__ import annotations

import re
import socket
import ssl
import struct
import sys
import threading
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Answer:
    """How to answer one request. Each field changes one thing of a regular answer.

    `status` and `body` replace those of the file; `headers` are added to the answer's or replace them (None removes
    one). Numbers of bytes count in this answer's body.
    """

    status: int | None = None
    body: bytes | None = None
    headers: Mapping[str, str | None] = field(default_factory=dict)
    cut_after: int | None = None  # the connection is closed after this many bytes
    reset: bool = False  # closed by RST
    hold_after: int | None = None  # this many bytes, then none until `release`
    ignore_range: bool = False
    ignore_if_range: bool = False
    hang_up: bool = False  # closed without an answer
    chunked: bool = False  # Transfer-Encoding instead of Content-Length


@dataclass(frozen=True)
class Seen:
    """A received request."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]  # names in lower case


@dataclass(frozen=True)
class _File:
    data: bytes
    headers: Mapping[str, str]


class FileServer:
    """Serves at `url(path)` from its own threads inside its `with` block; over TLS with a `certificate`, a PEM file
    with its key."""

    def __init__(self, certificate: Path | None = None) -> None:
        self.requests: list[Seen] = []  # in order of arrival
        self._files: dict[str, _File] = {}
        self._scripts: defaultdict[str, list[Answer]] = defaultdict(list)
        self._always: dict[str, Answer] = {}
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._server = _Server(self)
        self._scheme = "http"
        if certificate:
            self._scheme = "https"
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            # The thread of the connection does the handshake, at its first read.
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> FileServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self.release()
        self._server.hang_up()
        self._server.server_close()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def url(self, path: str) -> str:
        return f"{self._scheme}://127.0.0.1:{self.port}{path}"

    def put(self, path: str, data: bytes, headers: Mapping[str, str] | None = None) -> None:
        """Serve `data` at `path`, with these headers."""
        self._files[path] = _File(data, dict(headers or {}))

    def script(self, path: str, *answers: Answer) -> None:
        """Answer the next requests for `path` with these, one each."""
        with self._lock:
            self._scripts[path] += answers

    def always(self, path: str, answer: Answer) -> None:
        """Answer every request for `path` that has no scripted answer with this."""
        self._always[path] = answer

    def release(self) -> None:
        """Let held answers go on."""
        self._released.set()

    def ranges(self, path: str) -> list[str | None]:
        """Return the `Range` of each request for `path` so far."""
        return [seen.headers.get("range") for seen in self.requests if seen.path == path]

    def _next(self, path: str) -> Answer:
        with self._lock:
            if self._scripts[path]:
                return self._scripts[path].pop(0)
        return self._always.get(path, Answer())


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # joined at the end, so that a test leaves nothing behind
    request_queue_size = 64

    def __init__(self, files: FileServer) -> None:
        self.files = files
        self._open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Handler)

    def process_request(self, request: socket.socket, client_address: tuple[str, int]) -> None:  # type: ignore[override]
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        self._open.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """Close the connections that clients keep open."""
        for each in list(self._open):
            with suppress(OSError):  # closed already
                each.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):  # clients may disconnect
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        files = self.server.files
        files.requests.append(Seen(self.command, parts.path, parts.query, headers))
        answer = files._next(parts.path)
        if answer.hang_up:
            self._end(answer)
            return
        status, said, body = self._proper(answer, parts.path, headers)
        said = {**said, **({"Transfer-Encoding": "chunked"} if answer.chunked else {"Content-Length": str(len(body))})}
        said = {name: value for name, value in {**said, **answer.headers}.items() if value is not None}
        self.send_response(status)
        for name, value in said.items():
            self.send_header(name, value)
        if "Content-Length" not in said and not answer.chunked:
            self.close_connection = True
        self.end_headers()
        if self.command != "HEAD":
            self._send(answer, memoryview(body))

    do_HEAD = do_GET

    def _proper(self, answer: Answer, path: str, headers: Mapping[str, str]) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body of a regular answer."""
        file = self.server.files._files.get(path)
        if answer.status is not None or file is None:
            status = answer.status or 404
            return status, {"Content-Type": "text/plain"}, answer.body if answer.body is not None else b""
        data = file.data if answer.body is None else answer.body
        said = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **file.headers}
        current = {**said, **answer.headers}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("range", ""))
        condition = headers.get("if-range")
        if condition is not None and condition not in (current.get("ETag"), current.get("Last-Modified")):
            asked = asked if answer.ignore_if_range else None
        if not asked or answer.ignore_range:
            return 200, said, data
        first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
        if first >= len(data):
            return 416, {**said, "Content-Range": f"bytes */{len(data)}"}, b""
        return 206, {**said, "Content-Range": f"bytes {first}-{last}/{len(data)}"}, data[first : last + 1]

    def _send(self, answer: Answer, body: memoryview) -> None:
        whole = len(body)
        if answer.cut_after is not None:
            body = body[: answer.cut_after]
        if answer.hold_after is not None:
            self._write(answer, body[: answer.hold_after])
            self.server.files._released.wait()
            body = body[answer.hold_after :]
        self._write(answer, body)
        if (answer.cut_after is not None and answer.cut_after < whole) or "Content-Length" in answer.headers:
            self._end(answer)
        elif answer.chunked:
            self.wfile.write(b"0\r\n\r\n")

    def _write(self, answer: Answer, data: memoryview) -> None:
        if answer.chunked and data:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
        elif data:
            self.wfile.write(data)
        self.wfile.flush()

    def _end(self, answer: Answer) -> None:
        self.close_connection = True
        if answer.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close()
            self.connection.close()

    def log_message(self, format: str, *args: object) -> None:
        """The requests are in `FileServer.requests`."""
