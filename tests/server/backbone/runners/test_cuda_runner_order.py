"""The CUDA runner's order of work, on a machine without CUDA (fake_cuda.py).

What it shows is which stream does what after which event, that slots come back and that arenas are registered and
unregistered; not CUDA's own behavior (tests/gpu does).
"""

from __future__ import annotations

import dataclasses
import mmap
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov3_server.backbone.runner import build
from dinov3_server.backbone.runners.cuda import CudaRunner
from dinov3_server.backbone.weights.random_weights import random_tensors
from dinov3_server.families.registry import lookup
from dinov3_server.models.interface import Batch, DeviceLost, DeviceOutOfMemory, FeatureSpec, Output, PixelShape, Row
from tests.server.backbone.arenas import Arena
from tests.server.backbone.fake_cuda import FakeCuda
from tests.server.backbone.features import ours, picture

TINY = dataclasses.replace(lookup("vits16"), embed_dim=64, depth=2, heads=2, ffn_dim=128)
SHAPE = PixelShape(32, 32, "uint8")
SPEC = FeatureSpec((Output("cls"), Output("patches")), "float32")
PAGE_LOCK_FAILS = 801


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    noted = FakeCuda()
    noted.install(monkeypatch)
    return noted


@pytest.fixture
def runner(notes: FakeCuda) -> CudaRunner:
    model = ours(TINY, random_tensors(TINY, 0))
    info = dataclasses.replace(
        build("vits16", "random:0", dtype="float32", threads=1, warm_up=()).info,
        layer_dims=TINY.layer_dims,
        layer_strides=TINY.layer_strides,
    )
    made = CudaRunner(model, info)
    notes.log.clear()
    return made


def request(runner: CudaRunner, arena: Arena, count: int = 2) -> list[Row]:
    return arena.request(runner.info, SHAPE, picture(32, 32, count), SPEC)


def test_a_batch_uses_three_streams_and_waits_once(runner: CudaRunner, notes: FakeCuda) -> None:
    arena = Arena(0)
    runner.attach(0, memoryview(arena.memory))
    rows = request(runner, arena)
    launched = runner.launch(Batch(SHAPE, tuple(rows)))
    assert notes.log == [
        "copy_in begin",
        "copy_in end",
        "compute waits for copy_in end",
        "compute begin",
        "compute end",
        "copy_out waits for compute end",
        "copy_out begin",
        "copy_out end",
    ]
    notes.log.clear()
    finished = runner.finish(launched)
    assert notes.log == ["host waits for copy_out end"]
    assert finished.finite == (True, True)
    assert (finished.copy_in, finished.forward, finished.copy_out) == (1.0, 1.0, 1.0)
    for i, row in enumerate(rows):
        with torch.inference_mode():
            expected = runner.model(picture(32, 32, 2), SPEC.outputs)
        for output, actual in zip(SPEC.outputs, arena.features(runner.info, SHAPE, row), strict=True):
            torch.testing.assert_close(actual, expected[output][i].view(actual.shape))


def test_each_batch_in_flight_has_a_slot_of_its_own(runner: CudaRunner) -> None:
    arena = Arena(0)
    runner.attach(0, memoryview(arena.memory))
    batches = [Batch(SHAPE, tuple(request(runner, arena, count))) for count in (1, 3, 2)]
    first, second = runner.launch(batches[0]), runner.launch(batches[1])
    with pytest.raises(IndexError):
        runner.launch(batches[2])
    assert runner.finish(first).finite == (True,)
    third = runner.launch(batches[2])
    assert runner.finish(second).finite == (True,) * 3
    assert runner.finish(third).finite == (True,) * 2


def test_a_failed_batch_returns_its_slot_after_the_device_is_idle(
    runner: CudaRunner, notes: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    arena = Arena(0)
    runner.attach(0, memoryview(arena.memory))
    batch = Batch(SHAPE, tuple(request(runner, arena)))
    model = runner.model

    def failing(error: Exception) -> Any:
        def call(pixels: Tensor, outputs: list[Output]) -> dict[Output, Tensor]:
            raise error

        return call

    freed = ["host waits for everything", "cache emptied"]
    for error, expected, after in [
        (torch.OutOfMemoryError("CUDA out of memory."), DeviceOutOfMemory, freed),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), DeviceOutOfMemory, freed),
        (ValueError("no such layer"), ValueError, freed),
        (RuntimeError("CUDA error: device-side assert triggered"), DeviceLost, []),
        (torch.AcceleratorError("an illegal memory access"), DeviceLost, []),
    ]:
        monkeypatch.setattr(runner, "model", failing(error))
        notes.log.clear()
        with pytest.raises(expected):
            runner.launch(batch)
        assert [line for line in notes.log if line in freed] == after
        assert not any(line.startswith("copy_out") for line in notes.log)
    monkeypatch.setattr(runner, "model", model)
    for launched in [runner.launch(batch), runner.launch(batch)]:
        assert runner.finish(launched).finite == (True, True)


def test_an_error_while_freeing_memory_means_the_device_is_lost(
    runner: CudaRunner, notes: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    arena = Arena(0)
    runner.attach(0, memoryview(arena.memory))

    def out_of_memory(pixels: Tensor, outputs: list[Output]) -> dict[Output, Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def lost(device: torch.device) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(runner, "model", out_of_memory)
    monkeypatch.setattr(notes, "synchronize", lost)
    with pytest.raises(DeviceLost, match="unspecified launch failure"):
        runner.launch(Batch(SHAPE, tuple(request(runner, arena))))


def test_arenas_are_registered_while_attached(runner: CudaRunner, notes: FakeCuda) -> None:
    memory = mmap.mmap(-1, 4096)
    runner.attach(3, memoryview(memory))
    assert notes.registered == {runner._arenas[3].data_ptr()}
    runner.close()
    assert notes.registered == set()
    memory.close()


def test_an_arena_that_cannot_be_page_locked_is_used_with_a_warning(
    runner: CudaRunner, notes: FakeCuda, caplog: pytest.LogCaptureFixture
) -> None:
    """CUDA's error is not attributed to the next kernel."""
    arena = Arena(3)
    notes.register_result = PAGE_LOCK_FAILS
    runner.attach(3, memoryview(arena.memory))
    (warning,) = [record for record in caplog.records if "page-locked" in record.message]
    assert warning.levelname == "WARNING"
    assert f"CUDA error {PAGE_LOCK_FAILS}" in warning.message
    assert notes.last_error == 0
    rows = arena.request(runner.info, SHAPE, picture(32, 32, 2), SPEC)
    assert runner.finish(runner.launch(Batch(SHAPE, tuple(rows)))).finite == (True, True)
    runner.close()
    assert notes.registered == set()
    notes.register_result = 0
    runner.attach(3, memoryview(arena.memory))
    assert len(notes.registered) == 1
    runner.close()
