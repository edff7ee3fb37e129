"""Attach arenas to the runner and detach them, on a thread beside the worker's loop.

Page-locking an arena takes as long as touching all of its pages, and unlocking it takes about as long. Only the
frontend that owns the arena waits for that.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections import deque
from collections.abc import Callable
from functools import partial

from dinov3_server.engine.arena import ArenaMapping
from dinov3_server.engine.frontend_connection import FrontendConnection
from dinov3_server.models.interface import Runner

log = logging.getLogger(__name__)


class Attacher:
    """A thread that attaches and detaches arenas, in the order of the calls.

    Public methods must be called on the worker's loop. `fileno` becomes readable when `collect` has a result.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._todo: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._done: deque[FrontendConnection | Exception] = deque()
        self._closing = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._work, name="attacher", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        return self._wake

    def attach(self, frontend: FrontendConnection, fd: int, nbytes: int) -> None:
        """Map the arena `fd` and attach it to the runner. The attacher closes `fd`."""
        self._todo.put(partial(self._attach, frontend, fd, nbytes))

    def detach(self, frontend: FrontendConnection) -> None:
        """Detach the frontend's arena, which no batch uses any more, and unmap it."""
        self._todo.put(partial(self._detach, frontend))

    def collect(self) -> list[FrontendConnection]:
        """Return the frontends that were attached since the last call. Raises the error of one that failed."""
        try:
            os.eventfd_read(self._wake)
        except BlockingIOError:
            return []
        frontends = []
        while self._done:
            done = self._done.popleft()
            if isinstance(done, Exception):
                raise done
            frontends.append(done)
        return frontends

    def close(self, seconds: float) -> bool:
        """End the thread after its pending detachments, without attaching any more.

        Returns False if that takes longer than `seconds`; the thread then ends with the process.
        """
        self._closing = True
        self._todo.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            log.warning("an arena is still being attached to the device; this process ends without waiting for it")
            return False
        os.close(self._wake)
        return True

    def _work(self) -> None:
        while (step := self._todo.get()) is not None:
            try:
                step()
            except Exception as error:
                self._notify(error)

    def _attach(self, frontend: FrontendConnection, fd: int, nbytes: int) -> None:
        try:
            if self._closing or frontend.gone:
                return
            mapping = ArenaMapping(fd, nbytes)
        finally:
            os.close(fd)
        self._runner.attach(frontend.key, mapping.memory)
        frontend.mapping = mapping
        self._notify(frontend)

    def _detach(self, frontend: FrontendConnection) -> None:
        if frontend.mapping is not None:
            self._runner.detach(frontend.key)
            frontend.mapping.close()
            frontend.mapping = None

    def _notify(self, outcome: FrontendConnection | Exception) -> None:
        self._done.append(outcome)
        os.eventfd_write(self._wake, 1)
