"""One request from parsed message to response bytes: reserve, decode into the arena, compute, answer.

What a request holds (its lease) is let go on every way out. One way out needs care: a caller that leaves while threads
write pixels. The lease stays until they are through, or they would write over the request that has the range next.

Images are decoded and resized by threads. Pixels that are only copied are copied in the event loop: a copy keeps the
interpreter's lock, so in a thread it would hold the loop up all the same, and the way there and back costs more than
the copy of an image.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from dinov3_server.api.convert import Query, Source, count_images, read_request
from dinov3_server.api.outputs import check_answer, too_large
from dinov3_server.api.response import PlacedBlock, response_pieces, stream_answer
from dinov3_server.api.status import kept
from dinov3_server.backbone.interface import ModelInfo
from dinov3_server.config import Settings
from dinov3_server.engine.admission import Lease
from dinov3_server.engine.block import Block
from dinov3_server.engine.client import Engine, JobResult
from dinov3_server.errors import DeadlineExceeded, InvalidInput, ServingError, Unavailable
from dinov3_server.metrics import Metrics
from dinov3_serving.v1 import feature_service_pb2 as pb

# How long a thread stays with one request, so that a large one does not hold up a small one behind it.
SLICE_SECONDS = 0.01
# How long the event loop stays with the copies of one request.
COPY_SECONDS = 0.001

# `outcome` of dinov3_images_total, by the status that a request failed with. Expired and cancelled ones are counted
# where they are dropped: here while they are decoded, later by the engine.
_OUTCOMES = {
    "INVALID_ARGUMENT": "invalid",
    "FAILED_PRECONDITION": "invalid",
    "RESOURCE_EXHAUSTED": "rejected",
    "UNAVAILABLE": "rejected",
    "INTERNAL": "failed",
}


class _Work(NamedTuple):
    """One image, and the range of the arena that its pixels go to."""

    source: Source
    out: memoryview


class Extraction:
    """What every request of a frontend goes through, whether it came alone or in a stream."""

    def __init__(self, engine: Engine, settings: Settings, metrics: Metrics, index: int, threads: int) -> None:
        self._engine = engine
        self._settings = settings
        self._metrics = metrics
        self._index = index
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def close(self) -> None:
        """To be called when no request is left."""
        self._pool.shutdown()

    @property
    def model(self) -> ModelInfo:
        """Raises Unavailable until a worker has been ready."""
        if self._engine.model is None:
            raise Unavailable("the server is starting: its model is still being loaded", reason="starting")
        return self._engine.model

    async def extract(self, request: pb.ExtractRequest, deadline: float | None, message_id: int | None = None) -> bytes:
        """The ExtractResponse or, given a `message_id`, the ExtractStreamResponse that holds it.

        `deadline` is in seconds of time.monotonic(). Raises ServingError where the request as a whole fails.
        """
        images = min(count_images(request), self._settings.max_images_per_request)
        try:
            model = self.model
            query = read_request(request, model, self._settings)
            del request  # and later `query.sources`: what was sent need not wait in memory for the device
            if query.unmeasured:
                await asyncio.get_running_loop().run_in_executor(self._pool, query.measure)
            placed = _plan(query, model, base=0)
            if not placed:
                return self._respond(memoryview(b""), model, placed, query.failures, pb.Timings(), message_id)
            check_answer([one.block for one in placed], model, self._settings.max_message_bytes)
            lease = self._engine.reserve(sum(one.block.count for one in placed), placed[-1].block.end)
            try:
                return await self._extract(query, model, lease, deadline, message_id)
            finally:
                lease.release()
        except ServingError as error:
            if not isinstance(error, DeadlineExceeded):
                self._metrics.images.inc(_OUTCOMES[error.status], value=images)
            raise

    async def _extract(
        self, query: Query, model: ModelInfo, lease: Lease, deadline: float | None, message_id: int | None
    ) -> bytes:
        placed = _plan(query, model, base=lease.offset)
        failures = query.failures
        started = time.perf_counter()
        await self._fill(_works(query, placed, lease.memory), failures, deadline)
        decode_seconds = time.perf_counter() - started
        query.sources.clear()

        results = await self._run(lease, placed, failures, deadline, query.bulk)
        for (_, images), result in zip(placed, results, strict=True):
            failures |= {images[row]: error for row, error in result.failed.items()}
        timings = pb.Timings(
            decode_seconds=decode_seconds,
            queue_seconds=max(result.queue_seconds for result in results),
            inference_seconds=sum(result.inference_seconds for result in results),
            batch_images=max(result.batch_images for result in results),
            batches=sum(result.batches for result in results),
        )
        return self._respond(lease.memory, model, placed, failures, timings, message_id)

    async def _fill(self, works: deque[_Work], failures: dict[int, ServingError], deadline: float | None) -> None:
        """Pixels of all `works` into the arena. Returns or raises when no thread writes any more."""
        images = len(works)
        try:
            if all(work.source.quick for work in works):
                await self._copy(works, failures, deadline)
            else:
                lanes = range(min(self._threads, images))
                await _finish([asyncio.create_task(self._lane(works, failures, deadline)) for _ in lanes], works)
        except asyncio.CancelledError:
            self._metrics.images.inc("cancelled", value=images)
            raise
        if deadline is not None and time.monotonic() >= deadline:
            self._metrics.images.inc("expired", value=images)
            raise DeadlineExceeded("the deadline passed while the images of the request were being decoded")

    async def _copy(self, works: deque[_Work], failures: dict[int, ServingError], deadline: float | None) -> None:
        self._write_some(works, failures, deadline, COPY_SECONDS)
        while works:
            await asyncio.sleep(0)
            self._write_some(works, failures, deadline, COPY_SECONDS)

    async def _lane(self, works: deque[_Work], failures: dict[int, ServingError], deadline: float | None) -> None:
        loop = asyncio.get_running_loop()
        while works:
            await loop.run_in_executor(self._pool, self._write_some, works, failures, deadline, SLICE_SECONDS)

    def _write_some(
        self, works: deque[_Work], failures: dict[int, ServingError], deadline: float | None, seconds: float
    ) -> None:
        """For about `seconds`, an image at least. Threads run it several at a time on the same `works`."""
        now = time.monotonic()
        end = now + seconds
        while True:
            if deadline is not None and now >= deadline:
                works.clear()
            try:
                source, out = works.popleft()
            except IndexError:
                return
            assert source.write is not None, "a failed image has no work"
            try:
                source.write(out)
            except Exception as error:
                failures[source.image] = kept(error)
            before, now = now, time.monotonic()
            self._metrics.stage_seconds.observe(now - before, "decode")
            if now >= end:
                return

    async def _run(
        self,
        lease: Lease,
        placed: Sequence[PlacedBlock],
        failures: dict[int, ServingError],
        deadline: float | None,
        bulk: bool,
    ) -> list[JobResult]:
        runs = []
        for block, images in placed:
            rows = [row for row, image in enumerate(images) if image not in failures]
            runs.append(self._engine.run(lease, block, rows, deadline, bulk))
        if len(runs) == 1:
            return [await runs[0]]
        try:
            async with asyncio.TaskGroup() as group:  # one that fails cancels the others
                tasks = [group.create_task(run) for run in runs]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    def _respond(
        self,
        memory: memoryview,
        model: ModelInfo,
        placed: Sequence[PlacedBlock],
        failures: dict[int, ServingError],
        timings: pb.Timings,
        message_id: int | None,
    ) -> bytes:
        started = time.perf_counter()
        for block, images in placed:
            for row, image in enumerate(images):
                if image in failures:
                    _zero(memory, block, row)
        pieces = response_pieces(memory, model, placed, failures, timings, self._index)
        if message_id is not None:
            pieces = stream_answer(message_id, pieces)
        answer = b"".join(pieces)
        limit = self._settings.max_message_bytes
        if len(answer) > limit:  # the errors of many images can take it there
            raise too_large(f"{len(answer)} bytes, with the errors of {len(failures)} images", limit)
        self._metrics.stage_seconds.observe(time.perf_counter() - started, "respond")
        self._count(placed, failures)
        return answer

    def _count(self, placed: Sequence[PlacedBlock], failures: dict[int, ServingError]) -> None:
        good = sum(image not in failures for _, images in placed for image in images)
        invalid = sum(isinstance(error, InvalidInput) for error in failures.values())
        for outcome, images in (("ok", good), ("invalid", invalid), ("failed", len(failures) - invalid)):
            if images:
                self._metrics.images.inc(outcome, value=images)


async def _finish(lanes: Sequence[asyncio.Task[None]], works: deque[_Work]) -> None:
    """Wait for all lanes, also where the waiting task is cancelled: then they only end what they have begun."""
    cancelled: asyncio.CancelledError | None = None
    pending = set(lanes)
    while pending:
        try:
            _, pending = await asyncio.wait(pending)
        except asyncio.CancelledError as error:
            works.clear()
            cancelled = error
    if cancelled is not None:
        raise cancelled
    for lane in lanes:
        lane.result()


def _plan(query: Query, model: ModelInfo, base: int) -> list[PlacedBlock]:
    """A block a shape, one behind the other from `base` on."""
    placed = []
    for shape, sources in query.by_shape().items():
        block = Block.plan(model, shape, len(sources), query.spec, base)
        placed.append(PlacedBlock(block, [source.image for source in sources]))
        base = block.end
    return placed


def _works(query: Query, placed: Sequence[PlacedBlock], memory: memoryview) -> deque[_Work]:
    works: deque[_Work] = deque()
    for (block, _), sources in zip(placed, query.by_shape().values(), strict=True):
        for row, source in enumerate(sources):
            if source.write is not None:
                start = block.row_pixels(row)
                works.append(_Work(source, memory[start : start + block.shape.nbytes]))
    return works


def _zero(memory: memoryview, block: Block, row: int) -> None:
    for start, nbytes in zip(block.row_outputs(row), block.strides, strict=True):
        memory[start : start + nbytes] = bytes(nbytes)
