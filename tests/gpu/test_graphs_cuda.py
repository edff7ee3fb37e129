"""CUDA graphs on a device: replays equal eager passes, and no batch gets another one's features."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from dinov3_server.backbone.runner import build  # noqa: E402
from dinov3_server.backbone.runners.cuda import CudaRunner  # noqa: E402
from dinov3_server.backbone.runners.cuda_graphs import CAPTURE_AT, ForwardGraph, GraphKey, padded  # noqa: E402
from dinov3_server.backbone.runners.plan import batch_output_specs  # noqa: E402
from dinov3_server.models.interface import (  # noqa: E402
    Batch,
    DeviceOutOfMemory,
    FeatureSpec,
    LaunchedBatch,
    Output,
    PixelShape,
    Row,
)
from tests.server.backbone.arenas import Arena, serve  # noqa: E402
from tests.server.backbone.features import picture, worst_cosine  # noqa: E402

pytestmark = pytest.mark.gpu

SHAPES = (PixelShape(224, 224, "uint8"), PixelShape(96, 160, "uint8"))
FINAL = FeatureSpec((Output("cls"), Output("patches")), "float32")
LAYER = FeatureSpec((Output("registers", 3, False), Output("cls")), "bfloat16")


@pytest.fixture
def runner() -> Iterator[CudaRunner]:
    built = build("vits16", "random:7", dtype="bfloat16", device="cuda:0", warm_up=())
    assert isinstance(built, CudaRunner)
    yield built
    built.close()


@pytest.fixture
def arena(runner: CudaRunner) -> Iterator[Arena]:
    lent = Arena(0, size=512 << 20)
    runner.attach(0, memoryview(lent.memory))
    yield lent
    runner.detach(0)
    lent.memory.close()


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the number of rows of each replay so far."""
    counts: list[int] = []
    original = ForwardGraph.replay

    def counted(self: ForwardGraph, pixels: torch.Tensor, count: int) -> object:
        counts.append(count)
        return original(self, pixels, count)

    monkeypatch.setattr(ForwardGraph, "replay", counted)
    return counts


class Request:
    """Rows with distinct pixels, whose features are compared with an eager pass on the device."""

    def __init__(self, runner: CudaRunner, arena: Arena, shape: PixelShape, count: int, spec: FeatureSpec, seed: int):
        self._runner, self._arena, self.shape = runner, arena, shape
        self._pixels = picture(shape.height, shape.width, count, seed)
        self.rows: list[Row] = arena.request(runner.info, shape, self._pixels, spec)

    @property
    def batch(self) -> Batch:
        return Batch(self.shape, tuple(self.rows))

    @torch.inference_mode()
    def check(self) -> None:
        specs = batch_output_specs(self.batch)
        features = self._runner._forward(GraphKey(self.shape, len(self.rows), specs), self._pixels.to("cuda:0"))
        expected = {one.output: values.float().cpu() for one, (values,) in zip(specs, features.buffers, strict=True)}
        for i, row in enumerate(self.rows):
            for output, actual in zip(
                row.spec.outputs, self._arena.features(self._runner.info, self.shape, row), strict=True
            ):
                # Other batch sizes may use other kernels, so features differ in the last bit.
                assert worst_cosine(actual, expected[output][i].view(actual.shape)) >= 0.9999, (i, output)


@pytest.mark.parametrize("spec", [FINAL, LAYER], ids=["final", "layer"])
def test_replays_equal_eager_passes_on_both_sides_of_every_padded_size(
    spec: FeatureSpec, runner: CudaRunner, arena: Arena, replays: list[int]
) -> None:
    counts = (1, 3, 16, 17, 18, 19, 32, 33, 36, 37, 64)
    for shape in SHAPES:
        for size in sorted({padded(count) for count in counts}):
            rows = Request(runner, arena, shape, size, spec, seed=0).rows
            for _ in range(CAPTURE_AT):
                serve(runner, shape, rows)
        replays.clear()
        for count in counts:
            request = Request(runner, arena, shape, count, spec, seed=count)
            assert runner.finish(runner.launch(request.batch)).finite == (True,) * count
            request.check()
        assert replays == list(counts)
        arena.end = 0


def test_two_batches_in_flight_stay_separate_while_graphs_are_captured(
    runner: CudaRunner, arena: Arena, replays: list[int]
) -> None:
    """From two threads, as in a worker: one launches, and captures, while the other waits for batches' ends."""
    kinds = [(SHAPES[0], 8, FINAL), (SHAPES[0], 8, FINAL), (SHAPES[1], 5, LAYER), (SHAPES[0], 3, FINAL)]
    requests = [Request(runner, arena, *kinds[i % len(kinds)], seed=i) for i in range(15 * len(kinds))]
    todo: queue.SimpleQueue[LaunchedBatch | None] = queue.SimpleQueue()
    room = threading.Semaphore(runner.pipeline_depth)
    finite: list[bool] = []

    def finish() -> None:
        while (launched := todo.get()) is not None:
            try:
                finite.extend(runner.finish(launched).finite)
            finally:
                room.release()

    thread = threading.Thread(target=finish)
    thread.start()
    try:
        for request in requests:
            room.acquire()
            todo.put(runner.launch(request.batch))
    finally:
        todo.put(None)
        thread.join()
    assert len(finite) == sum(len(request.rows) for request in requests)
    assert all(finite)
    assert len(runner.graphs) == 3
    assert len(replays) == len(requests) - 3 * CAPTURE_AT
    for request in requests:
        request.check()


def test_a_replay_neither_waits_nor_synchronizes(runner: CudaRunner, arena: Arena, replays: list[int]) -> None:
    request = Request(runner, arena, SHAPES[0], 4, FINAL, seed=0)
    for _ in range(CAPTURE_AT + 1):
        serve(runner, request.shape, request.rows)
    with torch.cuda.stream(runner._compute):
        torch.cuda._sleep(2_000_000_000)  # about a second
    try:
        torch.cuda.set_sync_debug_mode("error")
        launched = runner.launch(request.batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not runner._compute.query(), "launch has waited for the device"
    assert runner.finish(launched).finite == (True,) * 4
    assert replays == [4, 4]


def test_a_capture_does_not_wait_for_the_batch_before_it(runner: CudaRunner, arena: Arena) -> None:
    request = Request(runner, arena, SHAPES[0], 4, FINAL, seed=0)
    for _ in range(CAPTURE_AT - 1):
        serve(runner, request.shape, request.rows)
    with torch.cuda.stream(runner._compute):
        torch.cuda._sleep(6_000_000_000)  # some seconds; a capture takes some hundredths
    launched = runner.launch(request.batch)
    assert len(runner.graphs) == 1
    assert not runner._compute.query(), "the capture has waited for the device"
    assert runner.finish(launched).finite == (True,) * 4
    request.check()


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # it failed at its first allocation
def test_batches_run_without_a_graph_if_it_does_not_fit(
    runner: CudaRunner, arena: Arena, replays: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    request = Request(runner, arena, SHAPES[0], 32, FINAL, seed=0)
    for _ in range(CAPTURE_AT - 1):
        serve(runner, request.shape, request.rows)
    memory = runner.memory()
    # Memory of an eager pass is already reserved; a capture needs its own.
    torch.cuda.set_per_process_memory_fraction(memory["reserved"] / memory["total"])
    try:
        serve(runner, request.shape, request.rows)
        assert "no memory for a CUDA graph of 32 images" in caplog.text
        serve(runner, request.shape, request.rows)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    request.check()
    other = Request(runner, arena, SHAPES[1], 2, FINAL, seed=1)
    for _ in range(CAPTURE_AT + 1):
        serve(runner, other.shape, other.rows)
    other.check()
    assert replays == [2], "the device and other graphs are none the worse"


def test_graphs_are_freed_for_a_batch_that_does_not_fit(runner: CudaRunner, arena: Arena, replays: list[int]) -> None:
    small = Request(runner, arena, SHAPES[0], 8, FINAL, seed=0)
    for _ in range(CAPTURE_AT + 1):
        serve(runner, small.shape, small.rows)
    large = Request(runner, arena, PixelShape(1024, 1024, "uint8"), 8, FeatureSpec((Output("cls"),), "float32"), seed=1)
    memory = runner.memory()
    torch.cuda.set_per_process_memory_fraction((memory["reserved"] + (100 << 20)) / memory["total"])
    try:
        with pytest.raises(DeviceOutOfMemory):
            serve(runner, large.shape, large.rows)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(runner.graphs) == 0
    for _ in range(CAPTURE_AT + 1):
        serve(runner, small.shape, small.rows)
    assert replays == [8, 8]
    small.check()
