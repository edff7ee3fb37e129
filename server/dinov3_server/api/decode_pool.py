"""Pixels of requests into their ranges of the arena: decoded and resized by threads, in turns, or by decode processes.

Pixels that are only copied are copied in the event loop: a copy keeps the interpreter's lock, so in a thread it would
hold the loop up all the same, and the way there and back costs more than the copy of an image.

Threads cannot be ended, so they take only what is cheap (`images/cost.py`); what is not, or does not show it, is a
decode process's. Each picture has a grant for its memory from before it is decoded until its last row is written.
Where there is no room the image waits for it in the event loop.

An image is decoded once, however many rows it feeds, and one thread writes them all. At the end of the thread's turn
with rows still to come, its picture is put aside for the next turn.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from dinov3_server.api.budget import MemoryGrant, Quota
from dinov3_server.api.sources import Source
from dinov3_server.api.status import without_traceback
from dinov3_server.errors import DeadlineExceeded, InvalidInput, ServingError
from dinov3_server.images.cost import Cost
from dinov3_server.images.decoders import Decoders
from dinov3_server.metrics import Metrics

# How long a thread stays with one request, so that a large one does not hold up a small one behind it.
SLICE_SECONDS = 0.01
# How long the event loop stays with the copies of one request.
COPY_SECONDS = 0.001

T = TypeVar("T")


class DecodeTask:
    """One image, and the ranges of the arena that the pixels of its rows go to."""

    def __init__(self, source: Source, outs: Sequence[memoryview]) -> None:
        assert source.write is not None, "a failed image has no work"
        self.source = source
        self.outs = outs
        self.rows_left = len(outs)
        self.steps = source.write(outs)
        self.cost: Cost | None = None  # known once a thread has looked
        self.grant: MemoryGrant | None = None
        self.seconds = 0.0

    @property
    def image(self) -> int:
        return self.source.image

    def release(self) -> None:
        """Let its picture go."""
        self.steps.close()
        if self.grant:
            self.grant.release()


@dataclass
class _Job:
    """What is left to do for one request. Threads work on it, several at a time; `over` tells them to leave it.

    `waiting` are the lanes that wait for something else than a thread.
    """

    works: deque[DecodeTask]
    failures: dict[int, ServingError]
    deadline: float | None
    cancelled: bool = False
    waiting: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def over(self) -> bool:
        return self.cancelled or self.expired

    @property
    def expired(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def cancel(self) -> None:
        self.cancelled = True
        for lane in self.waiting:
            lane.cancel()

    @contextmanager
    def may_be_cancelled(self) -> Iterator[None]:
        """Around what this task, a lane, waits for. Its error ends the job."""
        lane = asyncio.current_task()
        assert lane is not None
        self.waiting.add(lane)
        try:
            yield
        except DeadlineExceeded:
            pass  # the job is over by itself
        except BaseException:
            self.cancel()
            raise
        finally:
            self.waiting.discard(lane)
            del lane  # or it would be in a cycle with its own traceback, and pixels with them


class DecodePool:
    """Divide the decode threads and processes of a frontend between requests. Must be made in the event loop."""

    def __init__(self, threads: int, pictures: Quota, metrics: Metrics) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._threads = threads
        self._decoders = Decoders(threads)
        self._pictures = pictures
        self._metrics = metrics

    def close(self) -> None:
        """To be called when no request is left."""
        self._pool.shutdown()
        self._decoders.close()

    async def read_sizes(
        self, sources: list[Source], failures: dict[int, ServingError], deadline: float | None
    ) -> None:
        """Read the headers of files whose size counts; `failures` learns which images are at fault.

        Raises like `decode`.
        """
        loop = asyncio.get_running_loop()
        for index, cost in await loop.run_in_executor(self._pool, self._probe, sources, failures):
            file, image = sources[index].file, sources[index].image
            assert file is not None
            try:
                probe = partial(self._decoders.probe, file, cost)
                _set_size(sources, index, await self._in_process(probe, cost, deadline))
            except InvalidInput as error:
                failures[image] = without_traceback(file.blamed(error))
            except DeadlineExceeded:
                self._metrics.images.inc("expired", value=sum(len(source.rows) for source in sources))
                raise

    def _probe(self, sources: list[Source], failures: dict[int, ServingError]) -> list[tuple[int, Cost]]:
        """The plain ones; the others are returned. Takes up to a millisecond a file."""
        others = []
        for index, source in enumerate(sources):
            if source.rows_with_size and source.file and source.cost:
                try:
                    cost = source.cost()
                    grant = self._pictures.try_acquire(cost.nbytes, overtake=True) if cost.plain else None
                    if grant is None:
                        others.append((index, cost))
                        continue
                    with grant:
                        _set_size(sources, index, source.file.probe())
                except InvalidInput as error:
                    failures[source.image] = without_traceback(error)
        return others

    async def decode(
        self, works: Sequence[DecodeTask], failures: dict[int, ServingError], deadline: float | None
    ) -> None:
        """Write all `works`; `failures` learns which images are at fault.

        Returns or raises when no thread writes any more. Raises DeadlineExceeded once `deadline` (of time.monotonic())
        has passed; Overloaded or Unavailable where there was no memory or no process for an image.
        """
        job = _Job(deque(works), failures, deadline)
        rows = sum(work.rows_left for work in works)
        del works
        try:
            if all(work.source.cost is None for work in job.works):
                await self._copy(job)
            else:
                lanes = range(min(self._threads, len(job.works)))
                await _finish([asyncio.create_task(self._lane(job)) for _ in lanes], job)
        except asyncio.CancelledError:
            self._metrics.images.inc("cancelled", value=rows)
            raise
        finally:
            for work in job.works:
                work.release()
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
            work = await loop.run_in_executor(self._pool, self._take_turn, job, SLICE_SECONDS)
            if work is None or job.over:
                continue
            with job.may_be_cancelled():
                await self._serve(job, work)
            del work  # or an error that ends this would keep it

    async def _serve(self, job: _Job, work: DecodeTask) -> None:
        """Give a work what no thread can wait for: room for its picture, or a decode process."""
        cost, file = work.cost, work.source.file
        assert cost is not None
        started = time.monotonic()
        try:
            if cost.plain or file is None:
                work.grant = await self._pictures.acquire(cost.nbytes, job.deadline)
                job.works.appendleft(work)
                return
            rows = [(row.field, row.transform) for row in work.source.rows]
            write = partial(self._decoders.write, file, cost, rows, work.outs)
            await self._in_process(write, cost, job.deadline)
        except InvalidInput as error:
            job.failures[work.image] = without_traceback(file.blamed(error) if file else error)
        self._metrics.stage_seconds.observe(work.seconds + time.monotonic() - started, "decode")

    async def _in_process(self, ask: Callable[[], Awaitable[T]], cost: Cost, deadline: float | None) -> T:
        """What `ask` returns, which uses a decode process: once one is free, and memory for what it will hold."""
        try:
            async with asyncio.timeout_at(deadline), self._decoders.slots:
                with await self._pictures.acquire(cost.nbytes, deadline):
                    return await ask()
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed while the images of the request were being decoded") from None

    def _take_turn(self, job: _Job, seconds: float) -> DecodeTask | None:
        """For about `seconds`, a row at least. Of a job that is over, all that is left is dropped.

        Ends with a work that the event loop must see to.
        """
        end = time.monotonic() + seconds
        while True:
            try:
                work = job.works.popleft()
            except IndexError:
                return None
            if not self._write(job, work, end):
                return work
            if time.monotonic() >= end and not job.over:
                return None

    def _write(self, job: _Job, work: DecodeTask, end: float) -> bool:
        """Rows of `work` up to its last; or to `end`, where it is put back. False where it cannot be begun here."""
        started = now = time.monotonic()
        try:
            if not (work.grant or work.source.cost is None or job.over or self._begin(work)):
                work.seconds += time.monotonic() - started
                return False
            while work.rows_left:
                if job.over:
                    break
                next(work.steps)
                work.rows_left -= 1
                now = time.monotonic()
                if work.rows_left and now >= end:
                    work.seconds += now - started
                    job.works.appendleft(work)
                    return True
        except Exception as error:
            job.failures[work.image] = without_traceback(error)
            now = time.monotonic()
        work.release()
        self._metrics.stage_seconds.observe(work.seconds + now - started, "decode")
        return True

    def _begin(self, work: DecodeTask) -> bool:
        """Whether a thread may decode it now."""
        assert work.source.cost is not None
        work.cost = work.source.cost()
        if work.cost.plain:
            work.grant = self._pictures.try_acquire(work.cost.nbytes, overtake=True)
        return work.grant is not None


def _set_size(sources: list[Source], index: int, size: tuple[int, int]) -> None:
    source = sources[index]
    assert source.rows_with_size is not None
    sources[index] = source._replace(rows=source.rows_with_size(size), rows_with_size=None)


async def _finish(lanes: Sequence[asyncio.Task[None]], job: _Job) -> None:
    """Wait for all lanes, also where the waiting task is cancelled: then threads only end the row they have begun."""
    cancelled: asyncio.CancelledError | None = None
    pending = set(lanes)
    while pending:
        try:
            _, pending = await asyncio.wait(pending)
        except asyncio.CancelledError as error:
            job.cancel()
            cancelled = error
    if cancelled is not None:
        try:
            raise cancelled
        finally:
            cancelled = None  # or it would be in a cycle with its own traceback
    for lane in lanes:
        if not lane.cancelled():
            lane.result()
