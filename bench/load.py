"""The load generator: closed loops. Every caller sends its next request when the answer to its last one is there."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Load:
    """What a closed loop saw in its measured time. `latencies` (seconds, ascending) and `answers` are of the calls
    that ended in it."""

    seconds: float
    latencies: list[float]
    answers: list[Any]

    def figures(self, images_per_request: int = 1) -> dict[str, Any]:
        return {
            "requests": len(self.latencies),
            "images_per_second": round(len(self.latencies) * images_per_request / self.seconds, 2),
            "p50_ms": round(self.percentile(50) * 1e3, 2),
            "p99_ms": round(self.percentile(99) * 1e3, 2),
        }

    def percentile(self, percent: float) -> float:
        return self.latencies[min(len(self.latencies) - 1, int(len(self.latencies) * percent / 100))]


def closed_loop(
    callers: Sequence[Callable[[], Any]],
    seconds: float,
    warm_up: float = 3.0,
    *,
    begin: Callable[[], None] = lambda: None,
    end: Callable[[], None] = lambda: None,
) -> Load:
    """Run every caller in a thread of its own, again and again: `warm_up` seconds that do not count, then `seconds`.

    A caller is one blocking request; what it returns is kept in `answers`, so let it be small. `begin` and `end` are
    called where the measured time begins and ends: to read clocks and counters. An error of a caller is raised.
    """
    latencies: list[float] = []
    answers: list[Any] = []
    lock, stop = threading.Lock(), threading.Event()

    def run(call: Callable[[], Any]) -> None:
        try:
            while not stop.is_set():
                since = time.perf_counter()
                answer = call()
                elapsed = time.perf_counter() - since
                with lock:
                    latencies.append(elapsed)
                    answers.append(answer)
        finally:
            stop.set()

    with ThreadPoolExecutor(len(callers)) as pool:
        running = [pool.submit(run, call) for call in callers]
        stop.wait(warm_up)
        with lock:
            latencies.clear()
            answers.clear()
        begin()
        since = time.perf_counter()
        stop.wait(seconds)
        elapsed = time.perf_counter() - since
        with lock:
            measured = Load(elapsed, sorted(latencies), list(answers))
        end()
        stop.set()
        for one in running:
            one.result()
    return measured
