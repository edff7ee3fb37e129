"""A child process as the supervisor sees it: how it is started, its state, and the pause before its successor.

Back-off is for starts that fail. A process that was ready has shown that it can start, so it is replaced at once,
however often it dies. The exception is a worker that dies early, soon after it was ready and with nothing to do.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from selectors import EVENT_READ, BaseSelector
from typing import Literal, NamedTuple

from dinov3_server.engine.channel import Channel, pair
from dinov3_server.engine.messages import StartFrontend, StartProvisioner, StartWorker
from dinov3_server.errors import StartupError
from dinov3_server.host import worker_environment
from dinov3_server.processes.child_main import Role
from dinov3_server.signals import blocked_in_children

log = logging.getLogger(__name__)

Start = StartProvisioner | StartFrontend | StartWorker
Event = Callable[["Child"], None]

# Seconds before the next start, by the number of failed starts in a row.
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
# Before the next start of a child that has failed as often as allowed, while others of its role serve.
LONG_PAUSE = 30.0
# Before the next try after the machine had no descriptor, process or memory for one: a try costs nothing.
SPAWN_PAUSES = PAUSES[:4]
# A worker that dies sooner than this after it was ready, without a batch, could not have served.
EARLY_SECONDS = 10.0
# How long to wait for a killed process to die before leaving it to the kernel.
KILL_SECONDS = 5.0
STATES = ("serving", "starting", "failed")


class Spawned(NamedTuple):
    """A started child; `pidfd` becomes readable when it has died."""

    process: subprocess.Popen[bytes]
    channel: Channel
    pidfd: int


def spawn(role: Role, start: Start) -> Spawned:
    """Start a child process. Call it on the main thread: PDEATHSIG is tied to the thread that spawned the child, and
    the main thread lives as long as the process.

    Raises:
        OSError: there are not enough descriptors, processes or memory. Nothing is left behind.
    """
    with ExitStack() as undo:
        ours, theirs = pair()
        undo.callback(ours.close)
        with theirs, blocked_in_children():
            module = "dinov3_server.processes.child_main"
            process = subprocess.Popen(
                [sys.executable, "-m", module, role, str(theirs.fileno()), str(os.getpid())],
                env=worker_environment(os.environ) if role == "worker" else None,
                stdin=subprocess.PIPE,
                stdout=sys.stderr,  # stdout is for the supervisor's one line
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        undo.callback(process.wait)
        undo.callback(process.kill)  # runs before the wait: callbacks run in reverse order
        assert process.stdin is not None
        with suppress(BrokenPipeError), process.stdin:  # a child that is dead already is found by its pidfd
            pickle.dump(start, process.stdin)
        spawned = Spawned(process, Channel(ours), os.pidfd_open(process.pid))
        undo.pop_all()
        return spawned


@dataclass(eq=False)
class Child:
    """A role and index, and the process that fills it at present. Times are seconds of the monotonic clock."""

    role: Role
    index: int
    device: str = ""
    process: subprocess.Popen[bytes] | None = None
    channel: Channel | None = None
    pidfd: int = -1
    ready: bool = False
    reached: Literal["", "attached", "batch"] = ""  # by this process, see messages.Reached
    since: float = 0.0  # start of the process; once it is ready, the time when it became ready
    last_message: float = 0.0
    load_seconds: float = 10.0  # of the last successful start; a guess before the first
    failed_starts: int = 0  # in a row
    failed_spawns: int = 0  # in a row; not the child's fault
    restart_at: float | None = None
    start_error: StartupError | None = None  # as the process itself reported it
    last_words: str = ""
    reason: str = ""  # why the last process ended, or could not be started

    @property
    def name(self) -> str:
        return self.role if self.role == "provisioner" else f"{self.role}-{self.index}"

    @property
    def place(self) -> str:
        """The name with the device, for operators."""
        return f"{self.name} on {self.device}" if self.device else self.name

    def spawn(self, start: Start, selector: BaseSelector, on_message: Event, on_death: Event) -> None:
        """Start a process and register it with `selector`; the `data` of its keys calls `on_message` or `on_death`.

        Raises:
            OSError: there are not enough descriptors, processes or memory. Nothing is left behind.
        """
        self.restart_at = None
        self.ready, self.reached, self.start_error, self.last_words = False, "", None, ""
        self.since = time.monotonic()
        self.process, self.channel, self.pidfd = spawn(self.role, start)
        try:
            selector.register(self.channel, EVENT_READ, lambda: on_message(self))
            selector.register(self.pidfd, EVENT_READ, lambda: on_death(self))
        except OSError:
            self.process.kill()
            self.release(selector)
            raise
        self.failed_spawns = 0
        log.debug("%s started, pid %d", self.name, self.process.pid)

    def close_channel(self, selector: BaseSelector) -> None:
        if self.channel is not None:
            with suppress(KeyError):  # it was never registered
                selector.unregister(self.channel)
            self.channel.close()
            self.channel = None

    def release(self, selector: BaseSelector) -> int:
        """Wait for a process that has died or been killed, free everything of it, and return its exit status."""
        assert self.process is not None
        self.close_channel(selector)
        code = self.process.wait()
        with suppress(KeyError):
            selector.unregister(self.pidfd)
        os.close(self.pidfd)
        self.process, self.pidfd = None, -1
        return code

    def state(self, limit: int) -> str:
        """Return one of STATES."""
        return "serving" if self.ready else "failed" if self.has_failed(limit) else "starting"

    def has_failed(self, limit: int) -> bool:
        """Return whether it failed to start `limit` times in a row and was not ready since."""
        return not self.ready and self.failed_starts >= limit

    def on_exit(self, code: int, now: float, limit: int) -> float:
        """Record that its process ended with `code`. Return the seconds to wait before its successor starts."""
        self.reason = str(self.start_error or self.last_words or _describe_exit(code))
        was_ready, self.ready = self.ready, False
        if was_ready and not self._died_early(code, now):
            self.failed_starts = 0
            return 0.0
        if was_ready:
            self.reason += f", {now - self.since:.1f} s after it was ready and before its first batch"
        self.failed_starts += 1
        if self.failed_starts >= limit:
            return LONG_PAUSE
        return 0.0 if was_ready else PAUSES[min(self.failed_starts, len(PAUSES)) - 1]

    def on_spawn_failed(self, error: OSError) -> float:
        """Record that no process could be started. Return the seconds to wait before the next try."""
        self.reason = f"no process can be started: {error.strerror}"
        self.failed_spawns += 1
        return SPAWN_PAUSES[min(self.failed_spawns, len(SPAWN_PAUSES)) - 1]

    def _died_early(self, code: int, now: float) -> bool:
        if self.role != "worker" or self.reached == "batch" or now - self.since > EARLY_SECONDS:
            return False
        # A SIGKILL of a worker that waits for work comes from outside, such as from an operator.
        return not (code == -signal.SIGKILL and self.reached == "attached")


def kill(children: Sequence[Child]) -> None:
    """Kill every process that still runs, wait up to KILL_SECONDS for each, and close what belongs to them."""
    living = [(child.name, child.process) for child in children if child.process is not None]
    for _, process in living:
        process.kill()
    for name, process in living:
        try:
            process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            log.error("%s (pid %d) was killed and does not die: the kernel holds it", name, process.pid)
    for child in children:
        if child.pidfd >= 0:
            os.close(child.pidfd)
        if child.channel is not None:
            child.channel.close()


def _describe_exit(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    with suppress(ValueError):  # most real-time signals have no name
        return f"killed by {signal.Signals(-code).name}"
    return f"killed by signal {-code}"
