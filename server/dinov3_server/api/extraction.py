"""Process one request, from the parsed message to the bytes of the answer: reserve, decode, compute, respond.

The reservation of the arena is released however the request ends. If the caller leaves while threads write pixels, it
is kept until they have stopped: they would write into the next request that gets the range. This is soon, as threads
decode only what is cheap; decode processes are killed.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass

from dinov3_server.api.budget import RequestMemory
from dinov3_server.api.convert import Query, count_images, read_request
from dinov3_server.api.decode_pool import DecodePool, decode_tasks
from dinov3_server.api.outputs import check_answer_size
from dinov3_server.api.requests import note_images
from dinov3_server.api.response import PlacedBlock, response_pieces, stream_answer
from dinov3_server.api.tracing import RequestTrace
from dinov3_server.config.settings import Settings
from dinov3_server.engine.admission import Reservation
from dinov3_server.engine.block import Block
from dinov3_server.engine.engine import Engine
from dinov3_server.engine.forecast import Demand
from dinov3_server.engine.shares import Caller
from dinov3_server.engine.worker_connection import BlockResult
from dinov3_server.errors import DeadlineExceeded, InvalidInput, Overloaded, ServingError, Unavailable
from dinov3_server.metrics import Metrics
from dinov3_server.models.interface import ModelInfo
from dinov3_serving.framing import BytesResolver
from dinov3_serving.v1 import feature_service_pb2 as pb
from dinov3_serving.v1.request import too_large

# Label `outcome` of dinov3_images_total for a request that fails as a whole. Expired and cancelled images are counted
# where they are dropped: by the decode pool, later by the engine.
_OUTCOMES = {
    "INVALID_ARGUMENT": "invalid",
    "FAILED_PRECONDITION": "invalid",
    "RESOURCE_EXHAUSTED": "refused",
    "UNAVAILABLE": "refused",
    "INTERNAL": "failed",
}


@dataclass
class _Call:
    """A checked request, its blocks in the arena (none if no image has a known size), and its call."""

    query: Query
    model: ModelInfo
    placed: list[PlacedBlock]
    deadline: float | None
    request_memory: RequestMemory
    message_id: int | None
    trace: RequestTrace | None


@dataclass(eq=False)
class Extraction:
    """Processes the requests of a frontend, those of unary calls and of streams alike."""

    engine: Engine
    settings: Settings
    metrics: Metrics
    decode_pool: DecodePool
    index: int  # of this frontend

    @property
    def model(self) -> ModelInfo:
        """The served model. Raises Unavailable until a worker has been ready."""
        if self.engine.model is None:
            raise Unavailable("the server is starting: its model is still being loaded", reason="starting")
        return self.engine.model

    async def extract(
        self,
        request: pb.ExtractRequest,
        deadline: float | None,
        caller: Caller,
        request_memory: RequestMemory,
        message_id: int | None = None,
        resolve_bytes: BytesResolver = bytes,
    ) -> bytes:
        """Return a serialized ExtractResponse, or the ExtractStreamResponse around it if there is a `message_id`.

        The memory of the message is released when it is decoded; that of the answer is acquired before it is built.

        Args:
            deadline: in seconds of time.monotonic().
            resolve_bytes: of the request, see wire.ParsedMessage.

        Raises ServingError if the request fails as a whole.
        """
        images = min(count_images(request), self.settings.max_images_per_request)
        trace = note_images(images)
        try:
            model = self.model
            if trace is not None:
                trace.note({"dinov3.model": model.name, "dinov3.fingerprint": model.fingerprint})
            bulk = request.priority == pb.PRIORITY_BULK
            least = Demand(images=max(1, images), nbytes=0, tokens=images, caller=caller, bulk=bulk)
            self.engine.refuse_early(least, deadline)
            query = read_request(request, resolve_bytes, model, self.settings)
            # Here, and `query.sources` later: so that the message is freed while the request waits for the device.
            del request, resolve_bytes
            if query.needs_sizes:
                await self.decode_pool.read_sizes(query.sources, query.failures, deadline)
            call = _Call(query, model, plan_blocks(query, model), deadline, request_memory, message_id, trace)
            if not call.placed:
                return await self._respond(call, memoryview(b""), pb.Timings())
            blocks = [one.block for one in call.placed]
            check_answer_size(blocks, model, query.fingerprint, self.settings.max_message_bytes)
            demand = Demand(
                images=sum(block.count for block in blocks),
                nbytes=blocks[-1].end,
                tokens=sum(block.count * model.tokens(block.shape) for block in blocks),
                caller=caller,
                bulk=query.bulk,
            )
            reservation = self.engine.reserve(demand, deadline)
            try:
                call.placed = [one._replace(block=one.block.moved(reservation.offset)) for one in call.placed]
                return await self._extract(call, reservation)
            finally:
                reservation.release()
        except ServingError as error:
            if not isinstance(error, DeadlineExceeded):
                self.metrics.images.inc(_OUTCOMES[error.status], value=images)
            if isinstance(error, Overloaded):
                self.metrics.refused_images.inc(error.reason, value=images)
            raise

    async def _extract(self, call: _Call, reservation: Reservation) -> bytes:
        query, failures = call.query, call.query.failures
        started = time.monotonic()
        tasks = decode_tasks(query.sources, failures, call.placed, reservation.memory)
        decoding = self.decode_pool.decode(tasks, failures, call.deadline)
        del tasks
        await decoding
        decode_seconds = time.monotonic() - started
        if call.trace is not None:
            call.trace.stage("decode", started, started + decode_seconds, {"dinov3.images": len(query.row_counts)})
        query.sources.clear()
        call.request_memory.message.release()

        if call.trace is not None:
            call.trace.event("rows submitted")  # the only sign of a wait that is cancelled or too long
        results = await self._run(call, reservation)
        for one, result in zip(call.placed, results, strict=True):
            for row, error in result.failed.items():
                failures.setdefault(one.images[row], error)
        batches = [batch for result in results for batch in result.batches]
        timings = pb.Timings(
            decode_seconds=decode_seconds,
            queue_seconds=max((batch.queue_seconds for batch in batches), default=0.0),
            inference_seconds=sum(batch.inference_seconds for batch in batches),
            batch_images=max((batch.batch_images for batch in batches), default=0),
            batches=len(batches),
        )
        if call.trace is not None:
            _trace_batches(call.trace, results)
        return await self._respond(call, reservation.memory, timings)

    async def _run(self, call: _Call, reservation: Reservation) -> list[BlockResult]:
        runs = []
        for one in call.placed:
            rows = [row for row, image in enumerate(one.images) if image not in call.query.failures]
            runs.append(self.engine.run(reservation, one.block, rows, call.deadline, call.query.bulk))
        if len(runs) == 1:
            return [await runs[0]]
        try:
            async with asyncio.TaskGroup() as group:  # the first error cancels the other runs
                tasks = [group.create_task(run) for run in runs]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _respond(self, call: _Call, memory: memoryview, timings: pb.Timings) -> bytes:
        started = time.monotonic()
        query, failures = call.query, call.query.failures
        for one in call.placed:
            for row, image in enumerate(one.images):
                if image in failures:
                    one.block.zero_features(memory, row)
        pieces = response_pieces(memory, call.model, call.placed, failures, timings, self.index, query.fingerprint)
        if call.message_id is not None:
            pieces = stream_answer(call.message_id, pieces)
        nbytes = sum(map(len, pieces))
        limit = self.settings.max_message_bytes
        if nbytes > limit:  # possible with the errors of many images
            raise too_large(f"{nbytes} bytes, with the errors of {len(failures)} images", limit)
        await call.request_memory.acquire_answer(nbytes, call.deadline)
        answer = b"".join(pieces)
        ended = time.monotonic()
        self.metrics.stage_seconds.observe(ended - started, "respond")
        if call.trace is not None:
            call.trace.stage("respond", started, ended)
            if failures:
                call.trace.note({"dinov3.failed_images": len(failures)})
        outcomes = Counter[str]()
        for image, rows in enumerate(query.row_counts):
            error = failures.get(image)
            outcomes["ok" if error is None else "invalid" if isinstance(error, InvalidInput) else "failed"] += rows
        for outcome, rows in outcomes.items():
            self.metrics.images.inc(outcome, value=rows)
        return answer


def _trace_batches(trace: RequestTrace, results: list[BlockResult]) -> None:
    """Add a span of each block's time in the queue, until its first batch began, and of each batch on the device."""
    for result in results:
        if result.batches:
            first = result.enqueued + min(batch.queue_seconds for batch in result.batches)
            trace.stage("queue", result.enqueued, first)
        for batch in result.batches:
            launched = result.enqueued + batch.queue_seconds
            attributes = {"dinov3.rows": len(batch.rows), "dinov3.batch_images": batch.batch_images}
            trace.stage("device", launched, launched + batch.inference_seconds, attributes)


def plan_blocks(query: Query, model: ModelInfo) -> list[PlacedBlock]:
    """Return a block for each shape, one after the other from offset 0."""
    placed, base = [], 0
    for shape, rows in query.by_shape().items():
        block = Block.plan(model, shape, len(rows), query.spec, base)
        images, views = zip(*rows, strict=True)
        placed.append(PlacedBlock(block, images, views if query.has_views else ()))
        base = block.end
    return placed
