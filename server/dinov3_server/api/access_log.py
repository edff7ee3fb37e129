"""Write the access log: one JSON object a line for each request, by a thread of its own.

A line is written with one system call, so those of several frontends do not mix. `logging.handlers.WatchedFileHandler`
opens the file anew when it was renamed or removed, so logrotate needs no signal.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import queue
import threading
import time
from contextlib import suppress
from typing import NamedTuple

from dinov3_server.errors import StartupError

log = logging.getLogger(__name__)

# Lines that wait for a slow disk or reader; more are dropped, since requests must not wait for the log.
MOST_WAITING = 10_000
# How long the end of a frontend waits for the lines that are not written yet.
CLOSE_SECONDS = 2.0
# Characters of an error message in a line.
_MOST_TEXT = 1000


class Access(NamedTuple):
    """The facts about one request. `milliseconds` begin when its message has arrived."""

    request_id: str
    method: str
    peer: str
    status: str
    images: int
    request_bytes: int
    response_bytes: int
    milliseconds: float
    error: str | None
    trace_id: str | None = None


class AccessLog:
    """The access log in the file `path`. Raises StartupError if it cannot be opened."""

    def __init__(self, path: str) -> None:
        try:
            self._file = logging.handlers.WatchedFileHandler(path)
        except OSError as error:
            raise StartupError(f"cannot open {path} (access_log): {error.strerror}") from None
        self._lines: queue.Queue[tuple[float, Access] | None] = queue.Queue(MOST_WAITING)
        self._lost = 0
        self._thread = threading.Thread(target=self._write_lines, name="access-log", daemon=True)
        self._thread.start()

    def write(self, access: Access) -> None:
        """Queue a line. Never waits: if MOST_WAITING lines wait, this one is lost, with a warning."""
        try:
            self._lines.put_nowait((time.time(), access))
        except queue.Full:
            self._lose("the disk or the reader is too slow")

    def close(self) -> None:
        """Write the lines that wait, and close the file. Gives up after CLOSE_SECONDS."""
        with suppress(queue.Full):
            self._lines.put(None, timeout=CLOSE_SECONDS)
            self._thread.join(CLOSE_SECONDS)

    def _write_lines(self) -> None:
        while (queued := self._lines.get()) is not None:
            line = _line(*queued).encode() + b"\n"
            try:
                self._file.reopenIfNeeded()
                assert self._file.stream is not None
                os.write(self._file.stream.fileno(), line)
            except OSError as error:
                self._lose(str(error))
        self._file.close()

    def _lose(self, reason: str) -> None:
        """Warn of the 1st, 2nd, 4th ... line that is lost: a full disk would otherwise fill the log as well."""
        self._lost += 1
        if self._lost & (self._lost - 1) == 0:
            log.warning("%d lines of the access log are lost: %s", self._lost, reason)


def _line(at: float, access: Access) -> str:
    if access.error is not None:
        access = access._replace(error=access.error[:_MOST_TEXT])
    second = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at))
    return json.dumps({"ts": f"{second}.{int(at % 1 * 1000):03d}Z", **access._asdict()})
