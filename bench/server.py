"""Our server, started for a measurement and watched from outside."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil
from prometheus_client.parser import text_string_to_metric_families

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

    def memory(self) -> dict[str, dict[str, int]]:
        """`memory_of` each process, by its name: supervisor-0, frontend-0, worker-0."""
        return {
            f"{role}-{index}": memory_of(process.pid)
            for role, group in self.processes().items()
            for index, process in enumerate(group)
        }

    def metrics(self) -> dict[tuple[str, ...], float]:
        """What /metrics says, by name and label values. It is up to a second old."""
        with urllib.request.urlopen(f"http://{self.http}/metrics", timeout=10) as page:
            families = text_string_to_metric_families(page.read().decode())
            return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def quantile_ms(grown: Mapping[tuple[str, ...], float], histogram: str, part: float) -> float | None:
    """Return the upper bound, in ms, of the bucket that holds this quantile of what a histogram of seconds counted.

    `grown` is the difference of two `Server.metrics`. Returns None where nothing was counted.
    """
    buckets = sorted((float(key[1]), value) for key, value in grown.items() if key[0] == f"{histogram}_bucket")
    if not buckets or not buckets[-1][1]:
        return None
    return 1e3 * next(bound for bound, value in buckets if value >= part * buckets[-1][1])


def memory_of(pid: int) -> dict[str, int]:
    """Of a process, in bytes, as /proc/PID/status has it.

    `private`: anonymous memory (RssAnon); no other process has it where each is an interpreter of its own.
    `shared`: pages of arenas that this process has touched (RssShmem); a frontend and a worker count the same page.
    `peak`: most that was ever resident (VmHWM), both of these and mapped files (libraries, weights).
    """
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    fields = {"private": "RssAnon", "shared": "RssShmem", "peak": "VmHWM"}
    return {name: int(status[field].split()[0]) * 1024 for name, field in fields.items()}


@contextmanager
def serving(
    *flags: str, module: str = "dinov3_server", environ: Mapping[str, str] = {}, log: IO[bytes] | None = None
) -> Iterator[Server]:
    """`python -m MODULE serve FLAGS` on free ports, until the block is left.

    `environ` is added to the environment; log lines go to `log`, or to where this process's go.
    """
    command = [sys.executable, "-m", module, "serve", "--port", "0", "--http-port", "0", *flags]
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | environ, stdout=subprocess.PIPE, stderr=log, text=True
    ) as started:
        try:
            assert started.stdout is not None
            ready = re.fullmatch(r"ready grpc=(\S+) http=(\S+)\n", started.stdout.readline())
            assert ready is not None, f"the server did not start: {' '.join(command)}"
            yield Server(ready[1], ready[2], psutil.Process(started.pid))
        finally:
            started.send_signal(signal.SIGTERM)
            started.wait(60)
