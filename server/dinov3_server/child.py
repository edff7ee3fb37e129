"""A place for a child process, and what the supervisor remembers of the processes that were in it."""

from __future__ import annotations

import signal
import subprocess
from dataclasses import dataclass

from dinov3_server.engine.channel import Channel
from dinov3_server.errors import StartupError
from dinov3_server.process import Role

PAUSES = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
# A child that has served this long is healthy: its next death is a first one.
HEALTHY_SECONDS = 60.0


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
    since: float = 0.0  # start of the process; once ready, of being ready
    heard: float = 0.0  # when it last said something
    load_seconds: float = 10.0  # of the last successful start; a guess before the first
    deaths: int = 0  # in a row, without HEALTHY_SECONDS of service between them
    failed_starts: int = 0  # in a row
    restart_at: float | None = None
    complaint: StartupError | None = None  # why the last start failed, in its own words

    @property
    def name(self) -> str:
        return self.role if self.role == "provisioner" else f"{self.role}-{self.index}"

    def how_it_died(self, code: int) -> str:
        if self.complaint:
            return str(self.complaint)
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"

    def count_death(self, was_ready: bool, now: float) -> float:
        """Seconds to wait before its successor starts."""
        if was_ready:
            self.deaths = 1 if now - self.since > HEALTHY_SECONDS else self.deaths + 1
        else:
            self.failed_starts += 1
            self.deaths += 1
        return PAUSES[min(self.deaths - 1 if was_ready else self.deaths, len(PAUSES) - 1)]
