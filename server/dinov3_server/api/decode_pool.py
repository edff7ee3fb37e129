"""Write the pixels of requests into the arena, with the decode threads and decode processes of a frontend.

- Pixels that are only copied are copied in the event loop. A copy holds the interpreter's lock, so in a thread it would
  block the loop all the same, and the way to a thread and back costs more than the copy of an image.
- Threads decode and resize what is cheap (`images/cost.py`): a thread cannot be killed.
- Decode processes do the rest: what is expensive, and what does not show its cost.

A picture has a memory grant from before it is decoded until its last row is written. An image without one waits for it
in the event loop.

An image is decoded once, however many rows it has, and one thread at a time writes them. If its time slice ends before
the last row, the decoded picture is parked until the next slice, which may be another thread's.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import TypeVar

from dinov3_server.api.budget import MemoryGrant, Quota
from dinov3_server.api.response import PlacedBlock
from dinov3_server.api.sources import Source
from dinov3_server.api.status import failure_of
from dinov3_server.errors import DeadlineExceeded, InvalidInput, ServingError
from dinov3_server.images.cost import Cost
from dinov3_server.images.decoders import Decoders
from dinov3_server.metrics import Metrics

# Time slice of a thread for one request: a large request does not block a small one behind it.
SLICE_SECONDS = 0.01
# Time slice of the event loop for the copies of one request.
COPY_SECONDS = 0.001

_EXPIRED = "the deadline passed while the images of the request were being decoded"

T = TypeVar("T")


@dataclass(eq=False)
class DecodeTask:
    """One image to decode, and the ranges of the arena for the pixels of its rows."""

    source: Source
    outs: Sequence[memoryview]
    writer: Generator[None, None, None]  # writes one row per step
    rows_left: int
    cost: Cost | None = None  # set when a thread has read the file's header
    grant: MemoryGrant | None = None
    seconds: float = 0.0  # spent so far

    def release(self) -> None:
        """Drop the decoded picture and its memory grant."""
        self.writer.close()
        if self.grant:
            self.grant.release()


def decode_tasks(
    sources: Sequence[Source],
    failures: Mapping[int, ServingError],
    placed: Sequence[PlacedBlock],
    arena: memoryview,
) -> list[DecodeTask]:
    """Return a task for each image that has not failed. Rows fill their block in the order of the request."""
    starts = {one.block.shape: count(one.block.pixel_offset, one.block.shape.nbytes) for one in placed}
    tasks = []
    for source in sources:
        outs = []
        for row in source.rows:
            if row.shape is not None:
                start = next(starts[row.shape])
                outs.append(arena[start : start + row.shape.nbytes])
        if source.image not in failures:
            assert source.write is not None, "only a failed image has none"
            tasks.append(DecodeTask(source, outs, source.write(outs), len(outs)))
    return tasks


@dataclass
class _RequestTasks:
    """The unfinished tasks of one request. Several threads may take from `tasks`; they leave a request that `is_over`.

    `waiting` are the decode loops that wait for memory or for a decode process.
    """

    tasks: deque[DecodeTask]
    failures: dict[int, ServingError]
    deadline: float | None
    cancelled: bool = False
    waiting: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def is_over(self) -> bool:
        return self.cancelled or self.is_expired

    @property
    def is_expired(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def cancel(self) -> None:
        self.cancelled = True
        for decode_loop in self.waiting:
            decode_loop.cancel()

    @contextmanager
    def cancellable(self) -> Iterator[None]:
        """Let `cancel` interrupt the current decode loop, and cancel the request if the loop fails."""
        decode_loop = asyncio.current_task()
        assert decode_loop is not None
        self.waiting.add(decode_loop)
        try:
            yield
        except DeadlineExceeded:
            pass  # the request is over anyway
        except BaseException:
            self.cancel()
            raise
        finally:
            self.waiting.discard(decode_loop)
            del decode_loop  # a cycle with its own traceback would keep pixels alive


class DecodePool:
    """The decode threads and processes of a frontend, divided between its requests. Create it in the event loop."""

    def __init__(self, threads: int, pictures: Quota, metrics: Metrics) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._threads = threads
        self._decoders = Decoders(threads)
        self._pictures = pictures
        self._metrics = metrics

    def close(self) -> None:
        """Stop the threads and processes. Call it when no request is left."""
        self._executor.shutdown()
        self._decoders.close()

    async def read_sizes(
        self, sources: list[Source], failures: dict[int, ServingError], deadline: float | None
    ) -> None:
        """Read the size of the files whose size decides the shape of a row, and set their rows.

        Images that fail are added to `failures`. Raises like `decode`.
        """
        loop = asyncio.get_running_loop()
        for index, cost in await loop.run_in_executor(self._executor, self._read_plain_sizes, sources, failures):
            file = sources[index].file
            assert file is not None
            try:
                read_size = partial(self._decoders.read_size, file, cost)
                _set_size(sources, index, await self._in_process(read_size, cost, deadline))
            except InvalidInput as error:
                _fail(failures, sources[index], error)
            except DeadlineExceeded:
                self._metrics.images.inc("expired", value=sum(len(source.rows) for source in sources))
                raise

    def _read_plain_sizes(self, sources: list[Source], failures: dict[int, ServingError]) -> list[tuple[int, Cost]]:
        """Read the sizes of plain files; return index and cost of the others. Takes up to a millisecond per file."""
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
                        _set_size(sources, index, source.file.read_size())
                except InvalidInput as error:
                    _fail(failures, source, error)
        return others

    async def decode(
        self, tasks: Sequence[DecodeTask], failures: dict[int, ServingError], deadline: float | None
    ) -> None:
        """Write the pixels of all `tasks`. Images that fail are added to `failures`.

        Returns or raises only when no thread writes any more.

        Raises:
            DeadlineExceeded: `deadline` (of time.monotonic()) has passed.
            Overloaded: there was no memory for an image in time.
            Unavailable: there was no decode process for an image.
        """
        request = _RequestTasks(deque(tasks), failures, deadline)
        rows = sum(task.rows_left for task in tasks)
        del tasks
        try:
            if all(task.source.cost is None for task in request.tasks):
                await self._copy(request)
            else:
                loops = range(min(self._threads, len(request.tasks)))
                await _join([asyncio.create_task(self._decode_loop(request)) for _ in loops], request)
        except asyncio.CancelledError:
            self._metrics.images.inc("cancelled", value=rows)
            raise
        finally:
            for task in request.tasks:
                task.release()
        if request.is_expired:
            self._metrics.images.inc("expired", value=rows)
            raise DeadlineExceeded(_EXPIRED)

    async def _copy(self, request: _RequestTasks) -> None:
        self._run_slice(request, COPY_SECONDS)
        while request.tasks:
            await asyncio.sleep(0)
            self._run_slice(request, COPY_SECONDS)

    async def _decode_loop(self, request: _RequestTasks) -> None:
        loop = asyncio.get_running_loop()
        while request.tasks:
            task = await loop.run_in_executor(self._executor, self._run_slice, request, SLICE_SECONDS)
            if task is None or request.is_over:
                continue
            with request.cancellable():
                await self._continue_in_loop(request, task)
            del task  # an error that ends this loop would keep it alive

    async def _continue_in_loop(self, request: _RequestTasks, task: DecodeTask) -> None:
        """Wait for what a thread must not wait for: memory for the picture, or a decode process and its result."""
        cost, file = task.cost, task.source.file
        assert cost is not None
        started = time.monotonic()
        try:
            if cost.plain or file is None:
                task.grant = await self._pictures.acquire(cost.nbytes, request.deadline)
                request.tasks.appendleft(task)
                return
            write = partial(self._decoders.write, file, cost, task.source.rows, task.outs)
            await self._in_process(write, cost, request.deadline)
        except InvalidInput as error:
            _fail(request.failures, task.source, error)
        self._metrics.stage_seconds.observe(task.seconds + time.monotonic() - started, "decode")

    async def _in_process(self, use_decoder: Callable[[], Awaitable[T]], cost: Cost, deadline: float | None) -> T:
        """Return the result of `use_decoder`, called when a decode process and memory for its picture are free."""
        try:
            async with asyncio.timeout_at(deadline), self._decoders.slots:
                with await self._pictures.acquire(cost.nbytes, deadline):
                    return await use_decoder()
        except TimeoutError:
            raise DeadlineExceeded(_EXPIRED) from None

    def _run_slice(self, request: _RequestTasks, seconds: float) -> DecodeTask | None:
        """Write rows for about `seconds`, at least one. Drop all tasks of a request that is over.

        Returns a task that has to wait, which only the event loop can do; else None.
        """
        end = time.monotonic() + seconds
        while True:
            try:
                task = request.tasks.popleft()
            except IndexError:
                return None
            if not self._write_rows(request, task, end):
                return task
            if time.monotonic() >= end and not request.is_over:
                return None

    def _write_rows(self, request: _RequestTasks, task: DecodeTask, end: float) -> bool:
        """Write the rows of `task`, or park it at the time `end`. Return False if it cannot be started here."""
        started = now = time.monotonic()
        try:
            if not (task.grant or task.source.cost is None or request.is_over or self._try_start(task)):
                task.seconds += time.monotonic() - started
                return False
            while task.rows_left:
                if request.is_over:
                    break
                next(task.writer)
                task.rows_left -= 1
                now = time.monotonic()
                if task.rows_left and now >= end:
                    task.seconds += now - started
                    request.tasks.appendleft(task)
                    return True
        except Exception as error:
            _fail(request.failures, task.source, error)
            now = time.monotonic()
        task.release()
        self._metrics.stage_seconds.observe(task.seconds + now - started, "decode")
        return True

    def _try_start(self, task: DecodeTask) -> bool:
        """Set the cost of `task`; return whether a thread may decode it now, with a memory grant."""
        assert task.source.cost is not None
        task.cost = task.source.cost()
        if task.cost.plain:
            task.grant = self._pictures.try_acquire(task.cost.nbytes, overtake=True)
        return task.grant is not None


def _set_size(sources: list[Source], index: int, size: tuple[int, int]) -> None:
    source = sources[index]
    assert source.rows_with_size is not None
    sources[index] = source._replace(rows=source.rows_with_size(size), rows_with_size=None)


def _fail(failures: dict[int, ServingError], source: Source, error: Exception) -> None:
    """Store why an image failed; an error of its file names that field."""
    if isinstance(error, InvalidInput) and source.file and not error.field:
        error.field = f"images[{source.image}].encoded"
    failures[source.image] = failure_of(error)


async def _join(loops: Sequence[asyncio.Task[None]], request: _RequestTasks) -> None:
    """Wait for all decode loops. If cancelled, wait until each thread has written the row that it has begun."""
    cancelled: asyncio.CancelledError | None = None
    pending = set(loops)
    while pending:
        try:
            _, pending = await asyncio.wait(pending)
        except asyncio.CancelledError as error:
            request.cancel()
            cancelled = error
    if cancelled is not None:
        try:
            raise cancelled
        finally:
            cancelled = None  # avoids a cycle with its own traceback
    for decode_loop in loops:
        if not decode_loop.cancelled():
            decode_loop.result()
