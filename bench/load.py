"""A load generator of closed loops: every caller sends its next request when it has the answer to its last one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

MINIMUM_CALLS = 6


@dataclass(frozen=True)
class Load:
    """The result of a closed loop: `latencies` (seconds, ascending) and `answers` (in order of arrival) of the calls
    that ended in the measured time."""

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


def closed_loop(callers: Sequence[Callable[[], Any]], seconds: float, warm_up: float = 3.0) -> Load:
    """Call each caller repeatedly in its own thread, for `warm_up` seconds and then the measured `seconds`.

    A caller makes one blocking request; its result, which should be small, is kept in `answers`. An error of a caller
    is raised.

    Answers arrive a batch at a time. So that the measured time has whole batches, it is cut within `seconds`: from the
    widest gap between answers in their first third to that in their last third.
    """
    calls: list[tuple[float, float, Any]] = []  # end, duration, result
    lock, stop = threading.Lock(), threading.Event()

    def run(call: Callable[[], Any]) -> None:
        try:
            while not stop.is_set():
                since = time.perf_counter()
                answer = call()
                until = time.perf_counter()
                with lock:
                    calls.append((until, until - since, answer))
        finally:
            stop.set()

    with ThreadPoolExecutor(len(callers)) as pool:
        running = [pool.submit(run, call) for call in callers]
        stop.wait(warm_up)
        with lock:
            calls.clear()
        stop.wait(seconds)
        with lock:
            ended = sorted(calls, key=lambda call: call[0])
        stop.set()
        for one in running:
            one.result()
    first, last = whole_batches([until for until, _, _ in ended])
    measured = ended[first + 1 : last + 1]
    return Load(ended[last][0] - ended[first][0], sorted(call[1] for call in measured), [call[2] for call in measured])


def whole_batches(ends: list[float]) -> tuple[int, int]:
    """Return the indices of the last answers of two batches, given the times of all answers."""
    if len(ends) < MINIMUM_CALLS:
        raise ValueError(
            f"{len(ends)} calls ended in the measured time, {MINIMUM_CALLS} are needed; measure for longer"
        )
    third = len(ends) // 3

    def widest(indices: range) -> int:
        return max(indices, key=lambda i: ends[i + 1] - ends[i])

    return widest(range(third)), widest(range(len(ends) - 1 - third, len(ends) - 1))
