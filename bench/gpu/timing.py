"""Measure the time of works on a device in turn, so that a slower device affects all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

ROUND = 0.05  # seconds of one work before the next one's turn: long compared with waiting for its end
MINIMUM = 3  # rounds


def seconds_per_call(
    works: Mapping[str, Callable[[], object]], device: torch.device, seconds: float
) -> dict[str, float]:
    """Return the median seconds per call over rounds, by name. Works enqueue on the current stream; a round ends when
    the device is idle."""

    def round_of(work: Callable[[], object], calls: int) -> float:
        since = time.perf_counter()
        for _ in range(calls):
            work()
        wait(device)
        return (time.perf_counter() - since) / calls

    calls = {}
    for name, work in works.items():
        round_of(work, 2)
        calls[name] = max(1, int(ROUND / round_of(work, 1)))
    rounds: dict[str, list[float]] = {name: [] for name in works}
    end = time.perf_counter() + seconds * len(works)
    while time.perf_counter() < end or min(map(len, rounds.values())) < MINIMUM:
        for name, work in works.items():
            rounds[name].append(round_of(work, calls[name]))
    return {name: statistics.median(times) for name, times in rounds.items()}


def wait(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
