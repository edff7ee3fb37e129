"""Attach arenas to the runner and detach them, beside the worker's loop.

Page-locking an arena takes as long as touching all of its pages, and unlocking it about as long. Only the frontend that
owns the arena waits for that.
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
from dinov3_server.engine.peer import Frontend
from dinov3_server.models.interface import Runner

log = logging.getLogger(__name__)


class Attacher:
    """One thread that attaches and detaches arenas, in the order in which that is asked for.

    All methods belong to the worker's loop. `fileno` becomes readable when `collect` has something.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._todo: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._done: deque[Frontend | Exception] = deque()
        self._closing = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._work, name="attacher", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        return self._wake

    def attach(self, frontend: Frontend, fd: int, nbytes: int) -> None:
        """Map the arena `fd`, which is the attacher's from now on, and make it known to the runner."""
        self._todo.put(partial(self._attach, frontend, fd, nbytes))

    def detach(self, frontend: Frontend) -> None:
        """Undo it. No batch uses the arena any more."""
        self._todo.put(partial(self._detach, frontend))

    def collect(self) -> list[Frontend]:
        """Those that were attached since the last call. Raises what went wrong with one."""
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
        """Attach no more, detach what is to be detached, end. False where that takes longer than `seconds`: the thread
        is left to the end of the process."""
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
                self._tell(error)

    def _attach(self, frontend: Frontend, fd: int, nbytes: int) -> None:
        try:
            if self._closing or frontend.gone:
                return
            mapping = ArenaMapping(fd, nbytes)
        finally:
            os.close(fd)
        self._runner.attach(frontend.key, mapping.memory)
        frontend.mapping = mapping
        self._tell(frontend)

    def _detach(self, frontend: Frontend) -> None:
        if frontend.mapping is not None:
            self._runner.detach(frontend.key)
            frontend.mapping.close()
            frontend.mapping = None

    def _tell(self, what: Frontend | Exception) -> None:
        self._done.append(what)
        os.eventfd_write(self._wake, 1)
