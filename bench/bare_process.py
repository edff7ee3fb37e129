"""Our runner in a loop in a separate process, to be measured between rounds of the service.

In the load generator's process, its threads and the generator's would share one interpreter. Between two calls the
process waits without using CPU.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context

from bench.bare import our_batch
from dinov3_server.backbone.runner import build


@dataclass(frozen=True)
class Bare:
    """The result of batches that ran one after another: their images, the wall time of each, and the CPU time of
    all."""

    images: int
    seconds: list[float]
    cpu_seconds: float

    @property
    def images_per_second(self) -> float:
        return self.images / sum(self.seconds)


Replay = Callable[[int, Sequence[int], float], Bare]


@contextmanager
def bare_process(model: str, weights: str) -> Iterator[Replay]:
    """Yield `replay(size, batches, seconds)`, which runs batches of these numbers of images, of size x size pixels with
    CLS and bfloat16 patches out, one after another, until all have run or `seconds` have passed."""
    with ProcessPoolExecutor(1, get_context("spawn"), _build, (model, weights)) as pool:
        yield lambda size, batches, seconds: pool.submit(_replay, size, tuple(batches), seconds).result()


def _build(model: str, weights: str) -> None:
    global _work
    runner = build(model, weights, dtype="auto", device="cpu")

    @functools.cache
    def work(size: int, images: int) -> Callable[[], None]:
        batch = our_batch(runner, size, images)
        batch()  # the first use fills oneDNN's cache for the shape
        return batch

    _work = work


_work: Callable[[int, int], Callable[[], None]]


def _replay(size: int, batches: Sequence[int], seconds: float) -> Bare:
    works = [_work(size, images) for images in batches]
    ran: list[float] = []
    cpu, end = time.process_time(), time.perf_counter() + seconds
    for work in works:
        since = time.perf_counter()
        if since >= end:
            break
        work()
        ran.append(time.perf_counter() - since)
    return Bare(sum(batches[: len(ran)]), ran, time.process_time() - cpu)
