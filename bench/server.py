"""Our server, started for a measurement and watched from outside."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

from bench.record import ROOT


@dataclass(frozen=True)
class Server:
    """Addresses HOST:PORT of gRPC and HTTP, and the supervisor's process."""

    grpc: str
    http: str
    process: psutil.Process

    def processes(self) -> dict[str, list[psutil.Process]]:
        """By role: supervisor, frontend, worker."""
        found: dict[str, list[psutil.Process]] = {"supervisor": [self.process], "frontend": [], "worker": []}
        for child in self.process.children():
            found[next(role for role in ("frontend", "worker") if role in child.cmdline())].append(child)
        return found

    def cpu_seconds(self) -> dict[str, float]:
        """User and system time by role, of all its processes together."""
        return {role: sum(sum(p.cpu_times()[:2]) for p in group) for role, group in self.processes().items()}


@contextmanager
def serving(*flags: str, module: str = "dinov3_server") -> Iterator[Server]:
    """`python -m MODULE serve FLAGS` on free ports, until the block is left."""
    command = [sys.executable, "-m", module, "serve", "--port", "0", "--http-port", "0", *flags]
    started = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert started.stdout is not None
        ready = re.fullmatch(r"ready grpc=(\S+) http=(\S+)\n", started.stdout.readline())
        assert ready is not None, f"the server did not start: {' '.join(command)}"
        yield Server(ready[1], ready[2], psutil.Process(started.pid))
    finally:
        started.send_signal(signal.SIGTERM)
        started.wait(60)
