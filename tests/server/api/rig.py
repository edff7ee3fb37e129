"""A frontend's gRPC server in this process, over an engine that computes features from the bytes of the pixels."""

from __future__ import annotations

import asyncio
import io
import time
import zlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from google.protobuf.any_pb2 import Any as AnyDetail
from google.rpc.error_details_pb2 import BadRequest, RetryInfo
from grpc_status import rpc_status
from PIL import Image

from dinov3_server.api.budget import ByteBudget, RequestMemory
from dinov3_server.api.decode_pool import DecodePool
from dinov3_server.api.extraction import Extraction
from dinov3_server.api.server import FrontendServer
from dinov3_server.config.settings import Settings
from dinov3_server.engine.block import Block
from dinov3_server.engine.forecast import Demand
from dinov3_server.engine.messages import JobResult
from dinov3_server.engine.worker_connection import BlockResult
from dinov3_server.errors import ServingError
from dinov3_server.metrics import Metrics
from dinov3_server.models.interface import ModelInfo, Output
from dinov3_serving.v1 import feature_service_pb2 as pb
from dinov3_serving.v1 import feature_service_pb2_grpc as pb_grpc
from tests.support.paths import ROOT

MODEL = ModelInfo(
    name="dinov3_test16",
    weights="random:7",
    random_weights=True,
    fingerprint="f00d" * 16,
    dtype="bfloat16",
    device="cpu",
    layer_dims=(8, 24, 24, 24, 24, 24),
    layer_strides=(8, 16, 16, 16, 16, 16),
    register_tokens=4,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    parameters=12345,
)
ARENA_BYTES = 12 << 20
FREE = 0xEE  # fills the unreserved bytes of the arena


def features(pixels: bytes, output: Output, nbytes: int) -> bytes:
    """Return fake features of one row. They differ for different pixels and outputs."""
    seed = [zlib.crc32(pixels), zlib.crc32(repr(output).encode())]
    return np.random.default_rng(seed).bytes(nbytes)


class FakeReservation:
    def __init__(self, engine: FakeEngine, images: int, offset: int, nbytes: int) -> None:
        self._engine = engine
        self.images = images
        self.memory = engine.memory
        self.offset = offset
        self.nbytes = nbytes

    def release(self) -> None:
        if self in self._engine.reservations:
            self._engine.reservations.remove(self)
            self.memory[self.offset : self.offset + self.nbytes] = bytes([FREE]) * self.nbytes
            if not self._engine.reservations:
                self._engine.idle.set()


@dataclass
class Run:
    """One `Engine.run` that waits for `go`."""

    block: Block
    rows: list[int]
    deadline: float | None
    bulk: bool
    go: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class FakeEngine:
    """`hold` makes every run wait for its `go`; they are to be had from `runs`. `refuse` is raised by `reserve`,
    `early_refusal` by `refuse_early`, `fail` by `run`, `bad_rows` fail alone."""

    def __init__(self) -> None:
        self.model: ModelInfo | None = MODEL
        self.devices = ("cpu", "cpu")
        self.buffer = bytearray([FREE]) * ARENA_BYTES
        self.memory = memoryview(self.buffer)
        self.reservations: list[FakeReservation] = []
        self.idle = asyncio.Event()
        self.hold = False
        self.runs: asyncio.Queue[Run] = asyncio.Queue()
        self.done_runs: list[Run] = []
        self.cancelled_runs = 0
        self.refuse: ServingError | None = None
        self.early_refusal: ServingError | None = None
        self.fail: Exception | None = None
        self.bad_rows: dict[int, ServingError] = {}

    def refuse_early(self, demand: Demand, deadline: float | None) -> None:
        if self.early_refusal is not None:
            raise self.early_refusal

    def reserve(self, demand: Demand, deadline: float | None) -> FakeReservation:
        images, nbytes = demand.images, demand.nbytes
        if self.refuse is not None:
            raise self.refuse
        offset = 4096
        for reservation in sorted(self.reservations, key=lambda reservation: reservation.offset):
            if offset + nbytes <= reservation.offset:
                break
            offset = reservation.offset + -(-reservation.nbytes // 4096) * 4096
        assert offset + nbytes <= ARENA_BYTES, "the test needs a larger arena"
        reservation = FakeReservation(self, images, offset, nbytes)
        self.reservations.append(reservation)
        self.idle.clear()
        return reservation

    async def run(
        self, reservation: FakeReservation, block: Block, rows: Sequence[int], deadline: float | None, bulk: bool
    ) -> BlockResult:
        assert reservation in self.reservations
        assert reservation.offset <= block.pixel_offset
        assert block.end <= reservation.offset + reservation.nbytes
        run = Run(block, list(rows), deadline, bulk)
        if self.hold:
            self.runs.put_nowait(run)
            try:
                await run.go
            except asyncio.CancelledError:
                self.cancelled_runs += 1
                raise
        if self.fail is not None:
            raise self.fail
        self.done_runs.append(run)
        assert self.model is not None
        buffers = self.model.output_buffers(block.spec, block.shape)
        for row in rows:
            if row in self.bad_rows:
                continue
            pixels = bytes(self.memory[block.row_pixel_offset(row) :][: block.shape.nbytes])
            for buffer, start in zip(buffers, block.row_output_offsets(row), strict=True):
                self.memory[start : start + buffer.nbytes] = features(pixels, buffer.output, buffer.nbytes)
        failed = {row: error for row, error in self.bad_rows.items() if row in rows}
        batches = [JobResult(0, tuple(part), {}, 0.25, 0.25, 3 + len(rows)) for part in (rows[:1], rows[1:])]
        return BlockResult(failed, time.monotonic() - 0.75, batches)

    def untouched(self) -> bool:
        """Return whether nothing is reserved, and nothing was written outside of reservations."""
        return not self.reservations and self.buffer.count(FREE) == len(self.buffer)


@dataclass
class Rig:
    engine: FakeEngine
    server: FrontendServer
    metrics: Metrics
    port: int
    channel: grpc.aio.Channel
    stub: pb_grpc.FeatureServiceStub

    def count(self, name: str, *labels: str) -> float:
        """Return the value of a counter, or the number of observations of a histogram."""
        numbers = self.metrics.snapshot().series[name].get(labels, (0.0,))
        return numbers[0] if len(numbers) == 1 else sum(numbers[1:])

    async def error(self, request: pb.ExtractRequest, **call: Any) -> Failure:
        return await failure_of(self.stub.Extract(request, **call))


@dataclass
class Failure:
    code: grpc.StatusCode
    message: str
    field: str | None
    retry_seconds: float | None


def failure(code: grpc.StatusCode, message: str, details: Sequence[AnyDetail]) -> Failure:
    parsed = Failure(code, message, None, None)
    for detail in details:
        bad_request, retry = BadRequest(), RetryInfo()
        if detail.Unpack(bad_request):
            [violation] = bad_request.field_violations
            assert violation.description == message
            parsed.field = violation.field
        elif detail.Unpack(retry):
            parsed.retry_seconds = retry.retry_delay.ToNanoseconds() / 1e9
        else:
            raise AssertionError(f"unexpected detail: {detail}")
    return parsed


def failure_of_status(status: pb.Status) -> Failure:
    [code] = [code for code in grpc.StatusCode if code.value[0] == status.code]
    return failure(code, status.message, status.details)


async def failure_of(call: Any) -> Failure:
    """Return the error of a call, after checking that its details agree with its code and message."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        status = await rpc_status.aio.from_call(call)
        return failure(error.code(), error.details() or "", status.details if status else ())
    raise AssertionError("the call did not fail")


def extraction(
    engine: FakeEngine, metrics: Metrics, threads: int = 1, budget: ByteBudget | None = None, **settings: Any
) -> Extraction:
    """Return an Extraction, which the gRPC methods call. Call it in the event loop."""
    known = Settings(**settings)
    budget = budget or ByteBudget(known.frontend_bytes, known.max_message_bytes)
    return Extraction(engine, known, metrics, DecodePool(threads, budget.pictures, metrics), 0)  # type: ignore[arg-type]


def request_memory() -> RequestMemory:
    """Return the memory of a request in a new budget. Call it in the event loop."""
    budget = ByteBudget(64 << 20, 16 << 20)
    grant = budget.messages.try_acquire(1)
    assert grant is not None
    return RequestMemory(budget, grant)


@asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[Rig]:
    engine, metrics = FakeEngine(), Metrics()
    server = FrontendServer(engine, Settings(**{"decode_threads": 2, **settings}), metrics, 1, 3)  # type: ignore[arg-type]
    port = await server.start("127.0.0.1", 0)
    server.health.set_serving(True)
    try:
        async with open_channel(port) as channel:
            yield Rig(engine, server, metrics, port, channel, pb_grpc.FeatureServiceStub(channel))
    finally:
        await server.drain(0)
    assert engine.untouched()
    engine.memory.release()
    engine.buffer.append(0)  # BufferError if any view of the arena outlived the calls


def open_channel(port: int) -> grpc.aio.Channel:
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    options.append(("grpc.use_local_subchannel_pool", 1))
    return grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return random [H, W, 3] uint8 pixels."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def png(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def encoded(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> pb.Image:
    return pb.Image(encoded=png(pixels))


def tensor(array: np.ndarray[Any, Any]) -> pb.Tensor:
    dtype = {"uint8": pb.DATA_TYPE_UINT8, "float32": pb.DATA_TYPE_FLOAT32}[str(array.dtype)]
    return pb.Tensor(dtype=dtype, shape=array.shape, data=array.tobytes())


AS_IS = pb.Preprocessing(preset=pb.PRESET_NONE)
REQUEST = pb.ExtractRequest(pixels=tensor(picture(16, 16)[np.newaxis]), preprocessing=AS_IS)
CERTIFICATES = ROOT / "tests" / "client"


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)
