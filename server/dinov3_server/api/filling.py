"""Pixels of requests into their ranges of the arena: decoded and resized by threads, in turns.

Pixels that are only copied are copied in the event loop: a copy keeps the interpreter's lock, so in a thread it would
hold the loop up all the same, and the way there and back costs more than the copy of an image.

An image is decoded once, however many rows it feeds, and one thread writes them all. At the end of the thread's turn
with rows still to come, its picture is put aside for the next turn; of pictures that are put aside there is no more in
memory than of the largest image that is allowed, in all requests together. Where there is no room the turn goes on to
the image's last row. So a frontend holds a picture a thread, and `max_image_pixels` (of 4 bytes) besides.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from dinov3_server.api.sources import Source
from dinov3_server.api.status import kept
from dinov3_server.errors import DeadlineExceeded, ServingError
from dinov3_server.metrics import Metrics

# How long a thread stays with one request, so that a large one does not hold up a small one behind it.
SLICE_SECONDS = 0.01
# How long the event loop stays with the copies of one request.
COPY_SECONDS = 0.001


class Work:
    """One image, and the ranges of the arena that the pixels of its rows go to."""

    def __init__(self, source: Source, outs: Sequence[memoryview]) -> None:
        assert source.write is not None, "a failed image has no work"
        self.image = source.image
        self.quick = source.quick
        self.rows_left = len(outs)
        self.steps: Iterator[int] = source.write(outs)
        self.seconds = 0.0
        self.put_aside = 0  # pixels of the picture that waits for the next turn


@dataclass
class _Job:
    """What is left to do for one request. Threads work on it, several at a time; `over` tells them to leave it."""

    works: deque[Work]
    failures: dict[int, ServingError]
    deadline: float | None
    cancelled: bool = False

    @property
    def over(self) -> bool:
        return self.cancelled or self.expired

    @property
    def expired(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline


class Filler:
    """The threads of a frontend, and who has them when."""

    def __init__(self, threads: int, max_image_pixels: int, metrics: Metrics) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._threads = threads
        self._metrics = metrics
        self._room = max_image_pixels  # for pictures that are put aside
        self._lock = threading.Lock()

    def close(self) -> None:
        """To be called when no request is left."""
        self._pool.shutdown()

    async def in_thread(self, function: Callable[[], None]) -> None:
        """For what is too short to be done in turns."""
        await asyncio.get_running_loop().run_in_executor(self._pool, function)

    async def fill(self, works: Sequence[Work], failures: dict[int, ServingError], deadline: float | None) -> None:
        """Write all `works`; `failures` learns which images are at fault.

        Returns or raises when no thread writes any more. Raises DeadlineExceeded once `deadline` (of time.monotonic())
        has passed.
        """
        job = _Job(deque(works), failures, deadline)
        rows = sum(work.rows_left for work in works)
        del works
        try:
            if all(work.quick for work in job.works):
                await self._copy(job)
            else:
                lanes = range(min(self._threads, len(job.works)))
                await _finish([asyncio.create_task(self._lane(job)) for _ in lanes], job)
        except asyncio.CancelledError:
            self._metrics.images.inc("cancelled", value=rows)
            raise
        if job.expired:
            self._metrics.images.inc("expired", value=rows)
            raise DeadlineExceeded("the deadline passed while the images of the request were being decoded")

    async def _copy(self, job: _Job) -> None:
        self._take_turn(job, COPY_SECONDS)
        while job.works:
            await asyncio.sleep(0)
            self._take_turn(job, COPY_SECONDS)

    async def _lane(self, job: _Job) -> None:
        loop = asyncio.get_running_loop()
        while job.works:
            await loop.run_in_executor(self._pool, self._take_turn, job, SLICE_SECONDS)

    def _take_turn(self, job: _Job, seconds: float) -> None:
        """For about `seconds`, a row at least. Of a job that is over, all that is left is dropped."""
        end = time.monotonic() + seconds
        while (work := self._next(job)) is not None:
            self._write(job, work, end)
            if time.monotonic() >= end and not job.over:
                return

    def _next(self, job: _Job) -> Work | None:
        """None when none is left."""
        try:
            work = job.works.popleft()
        except IndexError:
            return None
        if work.put_aside:
            with self._lock:
                self._room += work.put_aside
            work.put_aside = 0
        return work

    def _write(self, job: _Job, work: Work, end: float) -> None:
        """Rows of `work` up to its last; or to `end`, if it can be put back."""
        started = now = time.monotonic()
        try:
            while work.rows_left:
                if job.over:
                    return
                pixels = next(work.steps)
                work.rows_left -= 1
                now = time.monotonic()
                if work.rows_left and now >= end and self._put_aside(work, pixels):
                    work.seconds += now - started
                    job.works.appendleft(work)
                    return
        except Exception as error:
            job.failures[work.image] = kept(error)
            now = time.monotonic()
        self._metrics.stage_seconds.observe(work.seconds + now - started, "decode")

    def _put_aside(self, work: Work, pixels: int) -> bool:
        """False where there is no room for the picture."""
        with self._lock:
            if pixels > self._room:
                return False
            self._room -= pixels
        work.put_aside = pixels
        return True


async def _finish(lanes: Sequence[asyncio.Task[None]], job: _Job) -> None:
    """Wait for all lanes, also where the waiting task is cancelled: then they only end the row they have begun."""
    cancelled: asyncio.CancelledError | None = None
    pending = set(lanes)
    while pending:
        try:
            _, pending = await asyncio.wait(pending)
        except asyncio.CancelledError as error:
            job.cancelled = True
            cancelled = error
    if cancelled is not None:
        raise cancelled
    for lane in lanes:
        lane.result()
