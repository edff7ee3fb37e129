"""Account for each request: its id, its place in the metrics, the debug log and the access log."""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterable
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from urllib.parse import unquote

from dinov3_server.api.access_log import Access, AccessLog
from dinov3_server.api.tracing import RequestTrace
from dinov3_server.errors import InternalError, Overloaded, ServingError, Unauthenticated, Unavailable
from dinov3_server.metrics import Metrics

log = logging.getLogger(__name__)

# Metadata that carries the id of a request: from the caller, if it gives one, and back to it.
REQUEST_ID = "x-request-id"
# Ids go into logs: a caller's id that could forge or garble a line is replaced.
_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_PREFIX = secrets.token_hex(4)
_numbers = itertools.count(1)


def request_id(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """Return the id of a call: the caller's from `metadata`, or else a new one."""
    for key, value in metadata:
        if key == REQUEST_ID and isinstance(value, str) and _SANE_ID.fullmatch(value):
            return value
    return f"{_PREFIX}-{next(_numbers)}"


@dataclass(slots=True)
class RequestRecord:
    """A context manager that counts, times and logs one request: a unary call, or a message of a stream.

    `expired` returns whether a cancellation was caused by the deadline. `trace` is None if requests are not traced.
    """

    metrics: Metrics
    access_log: AccessLog | None
    method: str
    peer: str  # by gRPC's name
    id: str
    expired: Callable[[], bool]
    images: int = 0
    request_bytes: int = 0
    response_bytes: int = 0
    trace: RequestTrace | None = None
    started: float = field(default_factory=time.perf_counter)
    _token: Token[RequestRecord | None] | None = None

    def received(self, nbytes: int) -> None:
        """Note that the message has arrived. Time is measured from now on: until here it was the caller's."""
        self.request_bytes = nbytes
        self.metrics.request_bytes.inc(self.method, value=nbytes)
        self.started = time.perf_counter()
        if self.trace is not None:
            self.trace.event("message received")

    def answered(self, nbytes: int) -> None:
        """Note the size of the answer."""
        self.response_bytes = nbytes
        self.metrics.response_bytes.inc(self.method, value=nbytes)

    def __enter__(self) -> RequestRecord:
        self.metrics.requests_in_flight.add(1, self.method)
        self._token = _current.set(self)
        return self

    def __exit__(self, kind: object, error: BaseException | None, frames: object) -> None:
        seconds = time.perf_counter() - self.started
        assert self._token is not None
        _current.reset(self._token)
        self.metrics.requests_in_flight.add(-1, self.method)
        code = "OK"
        if isinstance(error, ServingError):
            code = error.status
            if isinstance(error, Overloaded | Unavailable):
                self.metrics.refused_requests.inc(error.reason)
            if isinstance(error, Overloaded) and error.reason != "late":
                self.metrics.refusal_seconds.observe(seconds)
        elif isinstance(error, asyncio.CancelledError):
            code = "DEADLINE_EXCEEDED" if self.expired() else "CANCELLED"
        elif error is not None:
            code = InternalError.status
        self.metrics.requests.inc(self.method, code)
        if not isinstance(error, Unauthenticated):  # refused before its message is read
            self.metrics.request_seconds.observe(seconds, self.method)
        if self.trace is not None:
            self.trace.end(code, error, {"dinov3.images": self.images})
        if error is not None or self.access_log is not None:
            self.log(code, error, seconds)

    def log(self, code: str, error: BaseException | None, seconds: float) -> None:
        """Write the request to the access log, and to the debug log if it failed."""
        peer = unquote(self.peer)
        text = None if error is None else str(error)
        if error is not None:
            log.debug(
                "request %s failed: %s %s from %s, %d images, %.1f ms: %r",
                self.id, self.method, code, peer, self.images, seconds * 1e3, text,
            )  # fmt: skip
        if self.access_log is not None:
            self.access_log.write(
                Access(
                    self.id, self.method, peer, code, self.images, self.request_bytes, self.response_bytes,
                    round(seconds * 1e3, 3), text, None if self.trace is None else self.trace.trace_id,
                )
            )  # fmt: skip


_current: ContextVar[RequestRecord | None] = ContextVar("request", default=None)


def note_images(images: int) -> RequestTrace | None:
    """Note the images of the request that the current task serves, and return its trace."""
    record = _current.get()
    if record is None:
        return None
    record.images = images
    return record.trace
