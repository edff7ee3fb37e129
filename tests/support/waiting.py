"""Waiting for something to become true, without guessing how long it takes."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

LIMIT = 30.0
_pause = threading.Event()


def until(condition: Callable[[], object], what: str = "", limit: float = LIMIT) -> None:
    """Poll until `condition()` is true; fail after `limit` seconds. For other processes, which cannot notify us."""
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, f"still not true after {limit} s: {what or condition}"
        _pause.wait(0.01)


async def until_async(condition: Callable[[], object], what: str = "", limit: float = LIMIT) -> None:
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, f"still not true after {limit} s: {what or condition}"
        await asyncio.sleep(0.001)
