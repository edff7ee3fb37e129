"""Start servers for a measurement, and observe them from outside."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil
from prometheus_client.parser import text_string_to_metric_families

from bench.memory_limit import MemoryLimit
from bench.record import ROOT


@dataclass(frozen=True)
class Server:
    """A running server: its addresses HOST:PORT of gRPC and HTTP, and the supervisor's process."""

    grpc: str
    http: str
    process: psutil.Process

    def processes(self) -> dict[str, list[psutil.Process]]:
        """Return the processes by role: supervisor, frontend, worker."""
        found: dict[str, list[psutil.Process]] = {"supervisor": [self.process], "frontend": [], "worker": []}
        for child in self.process.children():
            found[next(role for role in ("frontend", "worker") if role in child.cmdline())].append(child)
        return found

    def cpu_seconds(self) -> dict[str, float]:
        """Return user and system time by role, each the sum over its processes."""
        return {role: sum(sum(p.cpu_times()[:2]) for p in group) for role, group in self.processes().items()}

    def memory(self) -> dict[str, dict[str, int]]:
        """Return `memory_of` each process by name: supervisor-0, frontend-0, worker-0."""
        return {
            f"{role}-{index}": memory_of(process.pid)
            for role, group in self.processes().items()
            for index, process in enumerate(group)
        }

    def metrics(self) -> dict[tuple[str, ...], float]:
        """Return the samples of /metrics by name and label values. They are up to a second old."""
        with urllib.request.urlopen(f"http://{self.http}/metrics", timeout=10) as page:
            families = text_string_to_metric_families(page.read().decode())
            return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def quantile_ms(grown: Mapping[tuple[str, ...], float], histogram: str, part: float) -> float | None:
    """Return a quantile of a histogram of seconds as the upper bound of its bucket, in ms; None if it counted nothing.

    `grown` is the difference of two `Server.metrics`.
    """
    buckets = sorted((float(key[1]), value) for key, value in grown.items() if key[0] == f"{histogram}_bucket")
    if not buckets or not buckets[-1][1]:
        return None
    return 1e3 * next(bound for bound, value in buckets if value >= part * buckets[-1][1])


def memory_of(pid: int) -> dict[str, int]:
    """Return the memory of a process in bytes, from /proc/PID/status.

    `private`: anonymous memory (RssAnon), which no other process shares if none was forked.
    `shared`: pages of arenas that this process has touched (RssShmem); a frontend and a worker count the same page.
    `peak`: the most that was ever resident (VmHWM): private, shared, and mapped files (libraries, weights).
    """
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    fields = {"private": "RssAnon", "shared": "RssShmem", "peak": "VmHWM"}
    return {name: int(status[field].split()[0]) * 1024 for name, field in fields.items()}


def pss(pid: int) -> int:
    """Return the proportional set size of a process in bytes: a shared page counts once in the sum over processes.

    Raises:
        OSError: the process has ended.
    """
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def total_pss(process: psutil.Process) -> int:
    """Return the sum of `pss` over a process and its descendants; those that end meanwhile count 0."""
    total = 0
    for each in [process, *process.children(recursive=True)]:
        with suppress(OSError):
            total += pss(each.pid)
    return total


@contextmanager
def ready_process(
    command: Sequence[str], ready: str, environ: Mapping[str, str] = {}, log: IO[bytes] | None = None
) -> Iterator[tuple[psutil.Process, re.Match[str]]]:
    """Start a process, wait for its first line of output, yield it with the match of `ready`, and end it by SIGTERM."""
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | environ, stdout=subprocess.PIPE, stderr=log, text=True
    ) as process:
        try:
            assert process.stdout is not None
            match = re.fullmatch(ready, process.stdout.readline().rstrip("\n"))
            assert match is not None, f"the process did not start: {' '.join(command)}"
            yield psutil.Process(process.pid), match
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


@contextmanager
def serving(
    *flags: str,
    module: str = "dinov3_server",
    environ: Mapping[str, str] = {},
    log: IO[bytes] | None = None,
    limit: MemoryLimit | None = None,
) -> Iterator[Server]:
    """Run `python -m MODULE serve FLAGS` on free ports until the end of the block.

    `environ` is added to the environment; log lines go to `log`, by default to this process's stderr.
    """
    command = [sys.executable, "-m", module, "serve", "--port", "0", "--http-port", "0", *flags]
    if limit:
        command = limit.command(command)
    with ready_process(command, r"ready grpc=(\S+) http=(\S+)", environ, log) as (process, ready):
        yield Server(ready[1], ready[2], process)
