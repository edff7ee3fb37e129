"""Find processes that are stuck: children that send nothing, and the supervisor itself."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

from dinov3_server.processes.child import Child

log = logging.getLogger(__name__)

# A child that is ready sends something every SNAPSHOT_SECONDS. After this long without a message it is stuck where it
# cannot end itself (stopped, swapped out, deadlocked), and is killed.
SILENT_SECONDS = 30.0
# The supervisor's own loop iterates every SNAPSHOT_SECONDS. After this long without an iteration it is unhealthy. If
# the whole service was frozen, as by `docker pause`, silent children are not killed.
STUCK_SECONDS = 10.0


class Watchdog:
    """The watch over the children and the event loop; `iterate` is called in each iteration of the loop."""

    def __init__(self) -> None:
        self._last_iteration = time.monotonic()  # read by the HTTP thread

    def iterate(self, children: Iterable[Child], now: float) -> None:
        """Kill children that are ready and have sent nothing for SILENT_SECONDS."""
        previous, self._last_iteration = self._last_iteration, now
        for child in children:
            if now - previous > STUCK_SECONDS:
                child.last_message = now
            silence = now - child.last_message
            if child.process is not None and child.ready and silence > SILENT_SECONDS:
                log.error("%s has sent nothing for %.0f s: it is stuck and is killed", child.name, silence)
                child.last_message = now
                child.process.kill()

    def health(self) -> tuple[bool, str]:
        """Return whether the event loop runs, and the line for /healthz."""
        age = time.monotonic() - self._last_iteration
        return age <= STUCK_SECONDS, f"last event-loop iteration {age:.0f} s ago"
