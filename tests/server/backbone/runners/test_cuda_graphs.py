"""CUDA graphs: which batches get one, and that replays give each row its features in any order of the device's work."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov3_server.backbone.runners import cuda_graphs
from dinov3_server.backbone.runners.cuda import CudaRunner
from dinov3_server.backbone.runners.cuda_graphs import CAPTURE_AT, MAX_TOKENS, GraphCache, GraphKey, padded
from dinov3_server.backbone.runners.plan import OutputSpec
from dinov3_server.backbone.weights.random_weights import random_tensors
from dinov3_server.families.dinov3_convnext.model import ConvNext
from dinov3_server.families.registry import lookup
from dinov3_server.models.interface import (
    Batch,
    DeviceOutOfMemory,
    FeatureSpec,
    LaunchedBatch,
    ModelInfo,
    Output,
    PixelShape,
    Row,
)
from dinov3_server.nn.model import Model
from tests.server.backbone.arenas import Arena
from tests.server.backbone.convnext_files import NARROW as CONVNEXT
from tests.server.backbone.fake_cuda import FakeCuda
from tests.server.backbone.features import LVD, ours, picture

TINY = dataclasses.replace(lookup("vits16"), embed_dim=64, depth=2, heads=2, ffn_dim=128)
INFO = ModelInfo(
    name="tiny",
    weights="random:0",
    random_weights=True,
    fingerprint="",
    dtype="float32",
    device="cuda:0",
    layer_dims=TINY.layer_dims,
    layer_strides=TINY.layer_strides,
    register_tokens=4,
    mean=LVD.mean,
    std=LVD.std,
    parameters=0,
)
SQUARE, WIDE = PixelShape(32, 32, "uint8"), PixelShape(32, 48, "uint8")
CLS, PATCHES = Output("cls"), Output("patches")
BOTH = FeatureSpec((CLS, PATCHES), "float32")
NARROW = FeatureSpec((PATCHES, Output("registers", 0, False)), "bfloat16")


# --- which batches get a graph -------------------------------------------------------------------------


def test_batches_are_padded_by_less_than_an_eighth() -> None:
    assert [padded(n) for n in (1, 2, 7, 16, 17, 18, 31, 32, 33, 36, 37, 64, 65)] == [
        *(1, 2, 7, 16, 18, 18, 32, 32, 36, 36, 40, 64, 72)
    ]
    for images in range(1, 2000):
        assert images <= padded(images) < images * 9 / 8
        assert padded(padded(images)) == padded(images)


def key(number: int, images: int = 4) -> GraphKey:
    return GraphKey(PixelShape(16, 16 * number, "uint8"), images, (OutputSpec(CLS, "float32"),))


def stub(nbytes: int, pool: object = None) -> Any:
    return SimpleNamespace(nbytes=nbytes, pool=pool)


def use(cache: GraphCache, used: GraphKey, times: int = 1) -> Any:
    for _ in range(times):
        found = cache.find(used)
    return found


def test_a_key_is_due_from_its_third_use_until_it_has_a_graph() -> None:
    cache = GraphCache(max_bytes=100)
    for _ in range(CAPTURE_AT - 1):
        use(cache, key(1))
        assert not cache.is_due(key(1), tokens=5)
        use(cache, key(2))
    use(cache, key(1))
    assert cache.is_due(key(1), tokens=5)
    assert cache.pool() is None
    graph = stub(1, pool="memory")
    cache.keep(key(1), graph)
    assert cache.find(key(1)) is graph
    assert not cache.is_due(key(1), tokens=5)
    assert cache.pool() == "memory"
    use(cache, key(2))
    assert cache.is_due(key(2), tokens=5)


def test_batches_with_many_tokens_are_never_captured() -> None:
    cache = GraphCache(max_bytes=100)
    use(cache, key(1), CAPTURE_AT)
    assert cache.is_due(key(1), tokens=MAX_TOKENS // 4)
    assert not cache.is_due(key(1), tokens=MAX_TOKENS // 4 + 1)


def test_refused_keys_and_keys_after_stop_are_never_due() -> None:
    cache = GraphCache(max_bytes=100)
    use(cache, key(1), CAPTURE_AT)
    cache.refuse(key(1))
    use(cache, key(1), CAPTURE_AT)
    assert not cache.is_due(key(1), tokens=5)
    use(cache, key(2), CAPTURE_AT)
    cache.stop()
    assert not cache.is_due(key(2), tokens=5)


def test_the_least_recently_used_graph_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 2)
    cache = GraphCache(max_bytes=100)
    for number, nbytes in ((1, 10), (2, 20)):
        use(cache, key(number), CAPTURE_AT)
        cache.keep(key(number), stub(nbytes))
    use(cache, key(1))
    use(cache, key(3), CAPTURE_AT)
    cache.keep(key(3), stub(30))
    assert len(cache) == 2
    assert cache.find(key(2)) is None, "by number"
    assert not cache.is_due(key(2), tokens=5), "its uses are counted from 0 again"
    use(cache, key(1))
    use(cache, key(4), CAPTURE_AT)
    cache.keep(key(4), stub(95))
    assert len(cache) == 1
    assert cache.find(key(4)).nbytes == 95, "by memory"


def test_a_graph_over_the_limit_is_neither_kept_nor_captured_again() -> None:
    cache = GraphCache(max_bytes=100)
    for number, nbytes in ((1, 60), (2, 101)):
        use(cache, key(number), CAPTURE_AT)
        cache.keep(key(number), stub(nbytes))
    assert cache.find(key(1)) is not None
    assert use(cache, key(2), CAPTURE_AT) is None
    assert not cache.is_due(key(2), tokens=5)


def test_the_number_of_keys_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "MAX_KEYS", 3)
    cache = GraphCache(max_bytes=100)
    for number in range(100):
        use(cache, key(number))
    assert len(cache._entries) == 3


# --- replays, in any order -----------------------------------------------------------------------------


def tiny_vit() -> Model:
    return ours(TINY, random_tensors(TINY, 0))


class Rig:
    """A CUDA runner on a fake device, with the expected features."""

    def __init__(
        self,
        cuda: FakeCuda,
        monkeypatch: pytest.MonkeyPatch,
        make: Callable[[], Model] = tiny_vit,
        info: ModelInfo = INFO,
    ) -> None:
        cuda.install(monkeypatch)
        self.cuda = cuda
        self.info = info
        self.model = make()
        self.runner = CudaRunner(make(), info)
        self.arena = Arena(0, size=8 << 20)
        self.runner.attach(0, memoryview(self.arena.memory))
        self._seed = 0
        cuda.log.clear()

    def request(self, shape: PixelShape, count: int, spec: FeatureSpec) -> tuple[list[Row], Tensor]:
        """Return rows with distinct pixels."""
        self._seed += 1
        pixels = picture(shape.height, shape.width, count, seed=self._seed)
        return self.arena.request(self.info, shape, pixels, spec), pixels

    def check(self, shape: PixelShape, rows: list[Row], pixels: Tensor) -> None:
        outputs = rows[0].spec.outputs
        with torch.inference_mode():
            expected = self.model(pixels, outputs)
        for i, row in enumerate(rows):
            for output, actual in zip(outputs, self.arena.features(self.info, shape, row), strict=True):
                tolerance = 1e-5 if row.spec.dtype == "float32" else 2e-2
                close = torch.allclose(actual, expected[output][i].view(actual.shape), tolerance, tolerance)
                assert close, f"image {i} of {len(rows)} of {shape}: {output}"

    def serve(self, shape: PixelShape, count: int, spec: FeatureSpec = BOTH, times: int = 1) -> None:
        for _ in range(times):
            rows, pixels = self.request(shape, count, spec)
            assert self.runner.finish(self.runner.launch(Batch(shape, tuple(rows)))).finite == (True,) * count
            self.check(shape, rows, pixels)


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(FakeCuda(), monkeypatch)


@pytest.mark.parametrize("seed", range(12))
def test_two_batches_in_flight_stay_separate(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of two shapes and three sizes in turn, with and without graphs: each gets the features of its pixels."""
    rig = Rig(FakeCuda(seed), monkeypatch)
    kinds = [(SQUARE, 2, BOTH), (SQUARE, 2, BOTH), (WIDE, 3, NARROW), (SQUARE, 17, BOTH), (WIDE, 3, NARROW)]
    flying: list[tuple[LaunchedBatch, PixelShape, list[Row], Tensor]] = []

    def land() -> None:
        launched, shape, rows, pixels = flying.pop(0)
        assert rig.runner.finish(launched).finite == (True,) * len(rows)
        rig.check(shape, rows, pixels)

    for shape, count, spec in kinds * 5:
        if len(flying) == 2:
            land()
        rows, pixels = rig.request(shape, count, spec)
        done = rig.cuda.done
        flying.append((rig.runner.launch(Batch(shape, tuple(rows))), shape, rows, pixels))
        assert rig.cuda.done == done, "launch has waited for the device"
    while flying:
        land()
    assert rig.cuda.log.count("capture begins") == 3
    assert rig.cuda.log.count("replay") == 25 - (3 + 3 + 3)


def test_a_capture_follows_its_batch_and_a_replay_replaces_the_forward_pass(rig: Rig) -> None:
    rig.serve(SQUARE, 2, times=CAPTURE_AT - 1)
    whole = [
        "copy_in begin",
        "copy_in end",
        "compute waits for copy_in end",
        "compute begin",
        "compute end",
        "copy_out waits for compute end",
        "copy_out begin",
        "copy_out end",
    ]
    end = ["host waits for copy_out end"]
    rig.cuda.log.clear()
    rig.serve(SQUARE, 2)
    assert rig.cuda.log == [*whole, "capture begins", "capture ends", *end]
    rig.cuda.log.clear()
    rig.serve(SQUARE, 2)
    assert rig.cuda.log == [*whole[:4], "replay", *whole[4:], *end]


def test_a_padded_graph_serves_every_size_up_to_its_own(rig: Rig) -> None:
    rig.serve(SQUARE, 17, times=CAPTURE_AT)
    rig.cuda.log.clear()
    for count in (17, 18, 17):
        rig.serve(SQUARE, count)
    assert rig.cuda.log.count("replay") == 3
    rig.serve(SQUARE, 16)
    rig.serve(SQUARE, 19)
    assert rig.cuda.log.count("replay") == 3


def test_a_convnext_is_captured_with_its_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no cached tensors, and its layers differ in width and grid."""

    def make() -> Model:
        return ConvNext(CONVNEXT, random_tensors(CONVNEXT, 0), LVD, dtype=torch.float32, device=torch.device("cpu"))

    dims, strides = CONVNEXT.layer_dims, CONVNEXT.layer_strides
    info = dataclasses.replace(INFO, layer_dims=dims, layer_strides=strides, register_tokens=0)
    rig = Rig(FakeCuda(), monkeypatch, make, info)
    stages = FeatureSpec((CLS, PATCHES, Output("patches", 0), Output("cls", 1, norm=False)), "float32")
    rig.serve(PixelShape(32, 64, "uint8"), 3, stages, times=CAPTURE_AT + 2)
    assert rig.cuda.log.count("capture begins") == 1
    assert rig.cuda.log.count("replay") == 2


def test_a_captured_pass_has_just_run_with_the_same_shape(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """So no kernel, workspace or cached tensor is created in a capture."""
    model, sizes = rig.runner.model, []

    def noted(pixels: Tensor, outputs: Iterable[Output]) -> dict[Output, Tensor]:
        sizes.append((len(pixels), rig.cuda.capturing is not None))
        return model(pixels, outputs)

    monkeypatch.setattr(noted, "cached_tensors", model.cached_tensors, raising=False)
    monkeypatch.setattr(rig.runner, "model", noted)
    rig.serve(SQUARE, 17, times=CAPTURE_AT + 1)
    assert sizes == [*[(17, False)] * (CAPTURE_AT - 1), (18, False), (18, True)]


def test_rows_with_different_outputs_share_a_graph_in_any_order(rig: Rig) -> None:
    for turn in range(CAPTURE_AT + 1):
        requests = [rig.request(SQUARE, 1, spec) for spec in (BOTH, NARROW)[:: 1 if turn % 2 else -1]]
        batch = Batch(SQUARE, tuple(row for rows, _ in requests for row in rows))
        assert rig.runner.finish(rig.runner.launch(batch)).finite == (True, True)
        for rows, pixels in requests:
            rig.check(SQUARE, rows, pixels)
    assert rig.cuda.log.count("replay") == 1


def test_a_replay_flags_only_the_row_that_is_not_finite(rig: Rig) -> None:
    shape = PixelShape(32, 32, "float32")
    pixels = torch.zeros(3, 3, 32, 32)
    rig.serve(SQUARE, 3)
    for _ in range(CAPTURE_AT + 1):
        pixels[1, 0, 5, 5] = torch.nan
        rows = rig.arena.request(INFO, shape, pixels, BOTH)
        assert rig.runner.finish(rig.runner.launch(Batch(shape, tuple(rows)))).finite == (True, False, True)
    assert rig.cuda.log.count("replay") == 1


def test_a_graph_keeps_the_cached_rotations_alive(rig: Rig) -> None:
    (table,) = rig.runner.model.cached_tensors(32, 32)
    rig.serve(SQUARE, 2, times=CAPTURE_AT)
    rig.runner.model._rope.rotations.cache_clear()
    (entry,) = rig.runner.graphs._entries.values()
    assert any(held is table for held in entry.graph._cached)
    rig.serve(SQUARE, 2)


def test_batches_run_without_a_graph_if_it_does_not_fit(rig: Rig) -> None:
    rig.cuda.capture_fails = torch.OutOfMemoryError("CUDA out of memory.")
    rig.serve(SQUARE, 2, times=CAPTURE_AT + 3)
    assert rig.cuda.log.count("capture begins") == 1
    rig.cuda.capture_fails = None
    rig.serve(SQUARE, 2)
    rig.serve(WIDE, 2, times=CAPTURE_AT + 1)
    assert rig.cuda.log.count("capture begins") == 2
    assert rig.cuda.log.count("replay") == 1


def test_after_another_capture_error_no_more_are_captured(rig: Rig) -> None:
    rig.serve(SQUARE, 2, times=CAPTURE_AT)
    rig.cuda.capture_fails = RuntimeError("CUDA error: operation not permitted when stream is capturing")
    rig.serve(WIDE, 2, times=CAPTURE_AT + 1)
    rig.cuda.capture_fails = None
    rig.serve(WIDE, 3, times=CAPTURE_AT + 1)
    assert rig.cuda.log.count("capture begins") == 2
    rig.serve(SQUARE, 2)
    assert rig.cuda.log.count("replay") == 1, "earlier graphs are kept"


def test_graphs_are_freed_when_a_batch_runs_out_of_memory(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.serve(SQUARE, 2, times=CAPTURE_AT)
    assert len(rig.runner.graphs) == 1
    rows, _ = rig.request(WIDE, 2, BOTH)

    def out_of_memory(pixels: Tensor, outputs: list[Output]) -> dict[Output, Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr(rig.runner, "model", out_of_memory)
        with pytest.raises(DeviceOutOfMemory):
            rig.runner.launch(Batch(WIDE, tuple(rows)))
    assert len(rig.runner.graphs) == 0
    rig.serve(SQUARE, 2, times=CAPTURE_AT + 1)
    assert rig.cuda.log.count("replay") == 1
