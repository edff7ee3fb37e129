"""A place for a child process, and what the supervisor remembers of the processes that were in it.

Back-off is for starts that fail. A process that was ready has shown that it can start: it is replaced at once, however
often it dies. But for a worker that dies of what its start left broken: soon after it was ready, with nothing to do.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from selectors import EVENT_READ, BaseSelector
from typing import Literal

from dinov3_server.engine.channel import Channel
from dinov3_server.errors import StartupError
from dinov3_server.processes.process import Role, Start, spawn

log = logging.getLogger(__name__)

Event = Callable[["Child"], None]

# Before the next start, after so many in a row that failed.
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
# Before the next start of a child that has failed as often as it may, for as long as others do its work.
LONG_PAUSE = 30.0
# Before the next try where the machine had no descriptor, process or memory for one: a try costs nothing.
SPAWN_PAUSES = PAUSES[:4]
# A worker that dies sooner than this after it was ready, without a batch, could not have served.
EARLY_SECONDS = 10.0
# How long a killed process may take to die before it is left to the kernel.
KILL_SECONDS = 5.0
STATES = ("serving", "starting", "failed")


@dataclass(eq=False)
class Child:
    """Which child, and the process in it at present. Times are of the monotonic clock, in seconds."""

    role: Role
    index: int
    device: str = ""
    process: subprocess.Popen[bytes] | None = None
    channel: Channel | None = None
    pidfd: int = -1
    ready: bool = False
    reached: Literal["", "attached", "batch"] = ""  # by the process, see messages.Reached
    since: float = 0.0  # start of the process; once ready, of being ready
    heard: float = 0.0  # when it last said something
    load_seconds: float = 10.0  # of the last successful start; a guess before the first
    failed_starts: int = 0  # in a row
    failed_spawns: int = 0  # in a row; they say nothing of the child
    restart_at: float | None = None
    complaint: StartupError | None = None  # why the last start failed, in its own words
    last_words: str = ""
    why: str = ""  # the last process is no more, or was not to be had

    @property
    def name(self) -> str:
        return self.role if self.role == "provisioner" else f"{self.role}-{self.index}"

    @property
    def place(self) -> str:
        """Its name for those who look after devices."""
        return f"{self.name} on {self.device}" if self.device else self.name

    def spawn(self, start: Start, selector: BaseSelector, on_message: Event, on_death: Event) -> None:
        """Start a process in it, and have `selector` watch that: `data` of its keys calls `on_message` or `on_death`.

        Raises:
            OSError: there are not enough descriptors, processes or memory. Nothing is left behind.
        """
        self.restart_at = None
        self.ready, self.reached, self.complaint, self.last_words = False, "", None, ""
        self.since = time.monotonic()
        self.process, self.channel, self.pidfd = spawn(self.role, start)
        try:
            selector.register(self.channel, EVENT_READ, lambda: on_message(self))
            selector.register(self.pidfd, EVENT_READ, lambda: on_death(self))
        except OSError:
            self.process.kill()
            self.clear(selector)
            raise
        self.failed_spawns = 0
        log.debug("%s started, pid %d", self.name, self.process.pid)

    def hang_up(self, selector: BaseSelector) -> None:
        if self.channel is not None:
            with suppress(KeyError):  # it never was watched
                selector.unregister(self.channel)
            self.channel.close()
            self.channel = None

    def clear(self, selector: BaseSelector) -> int:
        """Let go of a process that has died or is about to; its exit status."""
        assert self.process is not None
        self.hang_up(selector)
        code = self.process.wait()
        with suppress(KeyError):
            selector.unregister(self.pidfd)
        os.close(self.pidfd)
        self.process, self.pidfd = None, -1
        return code

    def state(self, limit: int) -> str:
        """One of STATES."""
        return "serving" if self.ready else "failed" if self.has_failed(limit) else "starting"

    def has_failed(self, limit: int) -> bool:
        """Whether it failed to start `limit` times in a row, and was not ready since."""
        return not self.ready and self.failed_starts >= limit

    def ended(self, code: int, now: float, limit: int) -> float:
        """Its process ended with `code`. Seconds to wait before its successor starts."""
        self.why = str(self.complaint or self.last_words or _status(code))
        was_ready, self.ready = self.ready, False
        if was_ready and not self._was_early(code, now):
            self.failed_starts = 0
            return 0.0
        if was_ready:
            self.why += f", {now - self.since:.1f} s after it was ready and before its first batch"
        self.failed_starts += 1
        if self.failed_starts >= limit:
            return LONG_PAUSE
        return 0.0 if was_ready else PAUSES[min(self.failed_starts, len(PAUSES)) - 1]

    def not_spawned(self, error: OSError) -> float:
        """No process could be had. Seconds to wait before the next try."""
        self.why = f"no process can be started: {error.strerror}"
        self.failed_spawns += 1
        return SPAWN_PAUSES[min(self.failed_spawns, len(SPAWN_PAUSES)) - 1]

    def _was_early(self, code: int, now: float) -> bool:
        if self.role != "worker" or self.reached == "batch" or now - self.since > EARLY_SECONDS:
            return False
        # One that waits for work is SIGKILLed by others, such as the operator.
        return not (code == -signal.SIGKILL and self.reached == "attached")


def kill(children: Sequence[Child]) -> None:
    """Kill all that still runs; what does not die in time is left to the kernel."""
    living = [(child.name, child.process) for child in children if child.process is not None]
    for _, process in living:
        process.kill()
    for name, process in living:
        try:
            process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            log.error("%s (pid %d) is killed and does not die: the kernel holds it", name, process.pid)
    for child in children:
        if child.pidfd >= 0:
            os.close(child.pidfd)
        if child.channel is not None:
            child.channel.close()


def _status(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    with suppress(ValueError):  # most real-time signals have no name
        return f"killed by {signal.Signals(-code).name}"
    return f"killed by signal {-code}"
