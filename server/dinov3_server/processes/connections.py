"""Channels between frontends and workers, which the supervisor makes and passes to both."""

from __future__ import annotations

import logging
import time

from dinov3_server.engine.channel import pair
from dinov3_server.engine.messages import Connected
from dinov3_server.processes.child import Child

log = logging.getLogger(__name__)

# Seconds before another try after there was no descriptor for a channel.
RETRY_PAUSE = 1.0


class Connections:
    """Connect frontends with workers, and try again later where no descriptor is left for the channel."""

    def __init__(self) -> None:
        self._retries: dict[tuple[Child, Child], float] = {}  # by frontend and worker: when to try again

    def connect(self, frontend: Child, worker: Child) -> None:
        """Give a frontend and a worker that is ready a channel of their own."""
        if frontend.channel is None or worker.channel is None or not worker.ready:
            self._retries.pop((frontend, worker), None)  # its successor will be connected
            return
        try:
            ours, theirs = pair()
            with ours, theirs:
                # First to the worker: it forgets a frontend whose channel is closed.
                worker.channel.send(Connected(frontend.index), [theirs.fileno()])
                frontend.channel.send(Connected(worker.index), [ours.fileno()])
        except OSError as error:
            if (frontend, worker) not in self._retries:
                log.error("%s and %s cannot be connected yet: %s", frontend.name, worker.name, error.strerror)
            self.retry_later(frontend, worker)
            return
        self._retries.pop((frontend, worker), None)
        frontend.channel.flush_within(1.0)
        worker.channel.flush_within(1.0)

    def retry_later(self, frontend: Child, worker: Child) -> None:
        self._retries[frontend, worker] = time.monotonic() + RETRY_PAUSE

    def retry(self, now: float) -> None:
        """Connect the pairs that are due."""
        for (frontend, worker), at in tuple(self._retries.items()):
            if at <= now:
                self.connect(frontend, worker)

    def forget(self, child: Child) -> None:
        """Drop the retries of a child whose process has ended."""
        self._retries = {both: at for both, at in self._retries.items() if child not in both}
