"""What is seen of a server from outside: its processes, their memory and descriptors, its gauges and its log."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import psutil

from bench.server import Server

SETTLE_SECONDS = 30.0
# Zero when nothing is asked of the server. Each is the name of a metric and the values of its labels.
IDLE = (("dinov3_queue_images",), ("dinov3_arena_bytes", "used"))
# Of a log: what no input may bring about. A traceback is an error that nothing has foreseen.
_WRONG_LINE = re.compile(rb"Traceback|Error in sys\.excepthook|Exception ignored|\bcritical\b|Segmentation fault", re.I)


@dataclass(frozen=True)
class Process:
    """`memory` is its proportional part of what is resident (PSS), in bytes; `private` its own of it (RssAnon)."""

    pid: int
    memory: int
    private: int
    descriptors: int


def processes(server: Server) -> dict[str, Process]:
    """By role and index: supervisor-0, frontend-0, worker-0."""
    found = {}
    for role, group in server.processes().items():
        for index, process in enumerate(sorted(group, key=lambda each: each.pid)):
            found[f"{role}-{index}"] = Process(process.pid, pss(process.pid), _private(process.pid), process.num_fds())
    return found


def pss(pid: int) -> int:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("Pss:")).split()[1]) * 1024


def total_memory(server: Server) -> int:
    """Of all processes, as PSS; those that end meanwhile count nothing."""
    total = 0
    for process in [server.process, *server.process.children(recursive=True)]:
        try:
            total += pss(process.pid)
        except (OSError, StopIteration, psutil.NoSuchProcess):
            continue
    return total


COLUMNS = ("process", "pss_before", "pss_after", "private_before", "private_after", "open_before", "open_after")


def rows(before: Mapping[str, Process], after: Mapping[str, Process]) -> list[dict[str, Any]]:
    """Under COLUMNS: memory in MiB and open descriptors of each process, before and after; "-" where it is gone."""

    def figures(process: Process | None) -> tuple[Any, ...]:
        if process is None:
            return ("-",) * 3
        return round(process.memory / 2**20, 1), round(process.private / 2**20, 1), process.descriptors

    return [
        dict(zip(COLUMNS, (name, *chain(*zip(figures(first), figures(after.get(name)), strict=True))), strict=True))
        for name, first in before.items()
    ]


def busy_gauges(server: Server) -> dict[str, float]:
    """Those of IDLE that are not zero."""
    metrics = server.metrics()
    return {" ".join(name): value for name in IDLE if (value := metrics.get(name, 0.0))}


def wrong_lines(log: Path, limit: int = 5) -> list[str]:
    """Lines of the log that no input may bring about, each with the line behind it, the first `limit` of them."""
    lines = log.read_bytes().splitlines()
    found = [index for index, line in enumerate(lines) if _WRONG_LINE.search(line)]
    return [b" | ".join(lines[index : index + 2]).decode(errors="replace")[:500] for index in found[:limit]]


def settled(condition: Callable[[], bool], seconds: float = SETTLE_SECONDS) -> bool:
    """Whether the condition becomes true within so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def _private(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("RssAnon:")).split()[1]) * 1024
