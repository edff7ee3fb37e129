"""Observe a server from outside: its processes, their memory and descriptors, its gauges and its log."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from bench.server import Server, memory_of, pss

SETTLE_SECONDS = 30.0
# Gauges that are zero when the server is idle: the name of a metric and the values of its labels.
IDLE = (("dinov3_queue_images",), ("dinov3_arena_bytes", "used"))
# Lines that no input may cause in a log. A traceback is an unexpected error.
_WRONG_LINE = re.compile(rb"Traceback|Error in sys\.excepthook|Exception ignored|\bcritical\b|Segmentation fault", re.I)


@dataclass(frozen=True)
class Process:
    """A process of the server. `memory` is its proportional set size (PSS), `private` its anonymous memory (RssAnon),
    in bytes."""

    pid: int
    memory: int
    private: int
    descriptors: int


def processes(server: Server) -> dict[str, Process]:
    """Return the processes by role and index: supervisor-0, frontend-0, worker-0."""
    found = {}
    for role, group in server.processes().items():
        for index, process in enumerate(sorted(group, key=lambda each: each.pid)):
            found[f"{role}-{index}"] = Process(
                process.pid, pss(process.pid), memory_of(process.pid)["private"], process.num_fds()
            )
    return found


COLUMNS = ("process", "pss_before", "pss_after", "private_before", "private_after", "open_before", "open_after")


def rows(before: Mapping[str, Process], after: Mapping[str, Process]) -> list[dict[str, Any]]:
    """Return rows under COLUMNS: memory in MiB and open descriptors of each process, before and after; "-" if it
    ended."""

    def figures(process: Process | None) -> tuple[Any, ...]:
        if process is None:
            return ("-",) * 3
        return round(process.memory / 2**20, 1), round(process.private / 2**20, 1), process.descriptors

    return [
        dict(zip(COLUMNS, (name, *chain(*zip(figures(first), figures(after.get(name)), strict=True))), strict=True))
        for name, first in before.items()
    ]


def busy_gauges(server: Server) -> dict[str, float]:
    """Return the gauges of IDLE that are not zero."""
    metrics = server.metrics()
    return {" ".join(name): value for name in IDLE if (value := metrics.get(name, 0.0))}


def wrong_lines(log: Path, limit: int = 5) -> list[str]:
    """Return the first `limit` lines of the log that no input may cause, each with the line after it."""
    lines = log.read_bytes().splitlines()
    found = [index for index, line in enumerate(lines) if _WRONG_LINE.search(line)]
    return [b" | ".join(lines[index : index + 2]).decode(errors="replace")[:500] for index in found[:limit]]


def settled(condition: Callable[[], bool], seconds: float = SETTLE_SECONDS) -> bool:
    """Return whether the condition becomes true within `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True
