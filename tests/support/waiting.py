"""Wait for a condition, and list the open descriptors."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path

# Seconds, for a machine that is busy with other things: of waits that normally end within one.
LIMIT = 120.0
_pause = threading.Event()


def until(condition: Callable[[], object], what: str = "", limit: float = LIMIT) -> None:
    """Poll until `condition()` is true; fail after `limit` seconds. For conditions in other processes."""
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, f"still not true after {limit} s: {what or condition}"
        _pause.wait(0.01)


async def until_async(condition: Callable[[], object], what: str = "", limit: float = LIMIT) -> None:
    """Poll until `condition()` is true, as `until` does, without blocking the event loop."""
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, f"still not true after {limit} s: {what or condition}"
        await asyncio.sleep(0.001)


def open_descriptors() -> set[str]:
    """Return the open descriptors of this process."""
    return {path.name for path in Path("/proc/self/fd").iterdir()}
