"""Process one request, from the parsed message to the bytes of the answer: reserve, decode, compute, respond.

The reservation of the arena is released however the request ends. If the caller leaves while threads write pixels, it
is kept until they have stopped: they would write into the next request that gets the range. This is soon, as threads
decode only what is cheap; decode processes are killed.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence

from dinov3_server.api.budget import ByteBudget, RequestMemory
from dinov3_server.api.convert import Query, count_images, read_request
from dinov3_server.api.decode_pool import DecodePool, decode_tasks
from dinov3_server.api.outputs import check_answer_size
from dinov3_server.api.response import PlacedBlock, response_pieces, stream_answer
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


class Extraction:
    """Processes the requests of a frontend, those of unary calls and of streams alike."""

    def __init__(
        self, engine: Engine, settings: Settings, metrics: Metrics, index: int, threads: int, budget: ByteBudget
    ) -> None:
        """Create it in the event loop."""
        self._engine = engine
        self._settings = settings
        self._metrics = metrics
        self._index = index
        self._decode_pool = DecodePool(threads, budget.pictures, metrics)

    def close(self) -> None:
        """Stop the decode pool. Call it when no request is left."""
        self._decode_pool.close()

    @property
    def model(self) -> ModelInfo:
        """The served model. Raises Unavailable until a worker has been ready."""
        if self._engine.model is None:
            raise Unavailable("the server is starting: its model is still being loaded", reason="starting")
        return self._engine.model

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
        images = min(count_images(request), self._settings.max_images_per_request)
        try:
            model = self.model
            bulk = request.priority == pb.PRIORITY_BULK
            least = Demand(images=max(1, images), nbytes=0, tokens=images, caller=caller, bulk=bulk)
            self._engine.refuse_early(least, deadline)
            query = read_request(request, resolve_bytes, model, self._settings)
            # Here, and `query.sources` later: so that the message is freed while the request waits for the device.
            del request, resolve_bytes
            if query.needs_sizes:
                await self._decode_pool.read_sizes(query.sources, query.failures, deadline)
            placed = _plan(query, model)
            if not placed:
                answering = self._respond(
                    memoryview(b""), model, query, placed, pb.Timings(), message_id, deadline, request_memory
                )
                return await answering
            check_answer_size([one.block for one in placed], model, query.fingerprint, self._settings.max_message_bytes)
            demand = Demand(
                images=sum(one.block.count for one in placed),
                nbytes=placed[-1].block.end,
                tokens=sum(one.block.count * model.tokens(one.block.shape) for one in placed),
                caller=caller,
                bulk=query.bulk,
            )
            reservation = self._engine.reserve(demand, deadline)
            try:
                placed = [one._replace(block=one.block.moved(reservation.offset)) for one in placed]
                return await self._extract(query, placed, model, reservation, deadline, message_id, request_memory)
            finally:
                reservation.release()
        except ServingError as error:
            if not isinstance(error, DeadlineExceeded):
                self._metrics.images.inc(_OUTCOMES[error.status], value=images)
            if isinstance(error, Overloaded):
                self._metrics.refused_images.inc(error.reason, value=images)
            raise

    async def _extract(
        self,
        query: Query,
        placed: Sequence[PlacedBlock],
        model: ModelInfo,
        reservation: Reservation,
        deadline: float | None,
        message_id: int | None,
        request_memory: RequestMemory,
    ) -> bytes:
        failures = query.failures
        started = time.perf_counter()
        await self._decode_pool.decode(
            decode_tasks(query.sources, failures, placed, reservation.memory), failures, deadline
        )
        decode_seconds = time.perf_counter() - started
        query.sources.clear()
        request_memory.release_message()

        results = await self._run(reservation, placed, failures, deadline, query.bulk)
        for one, result in zip(placed, results, strict=True):
            for row, error in result.failed.items():
                failures.setdefault(one.images[row], error)
        timings = pb.Timings(
            decode_seconds=decode_seconds,
            queue_seconds=max(result.queue_seconds for result in results),
            inference_seconds=sum(result.inference_seconds for result in results),
            batch_images=max(result.batch_images for result in results),
            batches=sum(result.batches for result in results),
        )
        return await self._respond(
            reservation.memory, model, query, placed, timings, message_id, deadline, request_memory
        )

    async def _run(
        self,
        reservation: Reservation,
        placed: Sequence[PlacedBlock],
        failures: dict[int, ServingError],
        deadline: float | None,
        bulk: bool,
    ) -> list[BlockResult]:
        runs = []
        for one in placed:
            rows = [row for row, image in enumerate(one.images) if image not in failures]
            runs.append(self._engine.run(reservation, one.block, rows, deadline, bulk))
        if len(runs) == 1:
            return [await runs[0]]
        try:
            async with asyncio.TaskGroup() as group:  # the first error cancels the other runs
                tasks = [group.create_task(run) for run in runs]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _respond(
        self,
        memory: memoryview,
        model: ModelInfo,
        query: Query,
        placed: Sequence[PlacedBlock],
        timings: pb.Timings,
        message_id: int | None,
        deadline: float | None,
        request_memory: RequestMemory,
    ) -> bytes:
        started = time.perf_counter()
        failures = query.failures
        for one in placed:
            for row, image in enumerate(one.images):
                if image in failures:
                    one.block.zero_features(memory, row)
        pieces = response_pieces(memory, model, placed, failures, timings, self._index, query.fingerprint)
        if message_id is not None:
            pieces = stream_answer(message_id, pieces)
        nbytes = sum(map(len, pieces))
        limit = self._settings.max_message_bytes
        if nbytes > limit:  # possible with the errors of many images
            raise too_large(f"{nbytes} bytes, with the errors of {len(failures)} images", limit)
        await request_memory.acquire_answer(nbytes, deadline)
        answer = b"".join(pieces)
        self._metrics.stage_seconds.observe(time.perf_counter() - started, "respond")
        self._count(query)
        return answer

    def _count(self, query: Query) -> None:
        if not query.failures:
            self._metrics.images.inc("ok", value=sum(query.row_counts))
            return
        outcomes = Counter[str]()
        for image, rows in enumerate(query.row_counts):
            error = query.failures.get(image)
            outcome = "ok" if error is None else "invalid" if isinstance(error, InvalidInput) else "failed"
            outcomes[outcome] += rows
        for outcome, rows in outcomes.items():
            self._metrics.images.inc(outcome, value=rows)


def _plan(query: Query, model: ModelInfo) -> list[PlacedBlock]:
    """Return a block for each shape, one after the other from offset 0."""
    placed, base = [], 0
    for shape, rows in query.by_shape().items():
        block = Block.plan(model, shape, len(rows), query.spec, base)
        images, views = zip(*rows, strict=True)
        placed.append(PlacedBlock(block, images, views if query.has_views else ()))
        base = block.end
    return placed
