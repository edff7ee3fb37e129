"""Poolings, projections, layouts and int8 on CUDA: captured, replayed, in any order, and the same as on the CPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from dinov3_server.backbone.runners.cpu import CpuRunner
from dinov3_server.backbone.runners.cuda import CudaRunner
from dinov3_server.backbone.runners.cuda_graphs import CAPTURE_AT
from dinov3_server.backbone.runners.postprocessing import LinearMap
from dinov3_server.models.interface import (
    Batch,
    FeatureSpec,
    LaunchedBatch,
    Output,
    PixelShape,
    Pooling,
    Projection,
    Row,
)
from tests.server.backbone.arenas import Arena, serve
from tests.server.backbone.fake_cuda import FakeCuda
from tests.server.backbone.runners.test_cuda_graphs import INFO, Rig, tiny_vit

SHAPE = PixelShape(64, 96, "uint8")
MAPS = {"p": LinearMap(torch.randn(5, 64, generator=torch.Generator().manual_seed(0)), torch.arange(5.0))}
GIFTED = dataclasses.replace(INFO, projections=(Projection("p", 64, 5, ""),))
CLS, PATCHES, LAYER = Output("cls"), Output("patches"), Output("patches", 0, False)
SPECS = [
    FeatureSpec((CLS, PATCHES, LAYER), "int8", Pooling("bilinear", 2, 3), "p", True),
    FeatureSpec((CLS, PATCHES), "int8"),
    FeatureSpec((PATCHES, LAYER), "float16", Pooling("area", 3, 2), None, True),
    FeatureSpec((PATCHES,), "float32", Pooling("area", 3, 2), "p"),
    FeatureSpec((PATCHES, CLS), "bfloat16", channels_first=True),
]


class GiftedRig(Rig):
    """A CUDA runner with projections, compared with the CPU runner on the same pixels."""

    def __init__(self, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(cuda, monkeypatch)
        self.info = GIFTED
        self.runner.close()
        cuda._streams.clear()
        self.runner = CudaRunner(tiny_vit(), GIFTED, MAPS)
        self.runner.attach(0, memoryview(self.arena.memory))
        self.cpu = CpuRunner(tiny_vit(), GIFTED, MAPS)
        cuda.log.clear()

    def check(self, shape: PixelShape, rows: list[Row], pixels: Tensor) -> None:
        other = Arena(1, size=1 << 20)
        self.cpu.attach(1, memoryview(other.memory))
        twins = other.request(GIFTED, shape, pixels, rows[0].spec)
        serve(self.cpu, shape, twins)
        for row, twin in zip(rows, twins, strict=True):
            pairs = zip(self.arena.features(GIFTED, shape, row), other.features(GIFTED, shape, twin), strict=True)
            for actual, expected in pairs:
                # Another number of rows may be summed in another order, so a value may round to the other side.
                tolerance = {"float32": 1e-5, "int8": 2e-2}.get(row.spec.dtype, 2e-2)
                assert (actual - expected).norm() <= tolerance * expected.norm(), row.spec
        self.cpu.detach(1)


@pytest.mark.parametrize("seed", range(6))
def test_each_row_gets_its_own_outputs_in_any_order(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of rows with different specs for the same outputs, two in flight."""
    rig = GiftedRig(FakeCuda(seed), monkeypatch)
    flying: list[tuple[LaunchedBatch, list[tuple[list[Row], Tensor]]]] = []

    def land() -> None:
        launched, requests = flying.pop(0)
        assert rig.runner.finish(launched).finite == (True,) * 2 * len(requests)
        for rows, pixels in requests:
            rig.check(SHAPE, rows, pixels)

    for _ in range(CAPTURE_AT + 2):
        for specs in (SPECS, SPECS[:2]):
            if len(flying) == 2:
                land()
            requests = [rig.request(SHAPE, 2, spec) for spec in specs]
            batch = Batch(SHAPE, tuple(row for rows, _ in requests for row in rows))
            done = rig.cuda.done
            flying.append((rig.runner.launch(batch), requests))
            assert rig.cuda.done == done, "launch has waited for the device"
    while flying:
        land()
    assert (rig.cuda.log.count("capture begins"), rig.cuda.log.count("replay")) == (2, 4)


@pytest.mark.parametrize("spec", SPECS)
def test_a_replay_flags_only_the_row_that_is_not_finite(spec: FeatureSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = GiftedRig(FakeCuda(), monkeypatch)
    floats = PixelShape(64, 96, "float32")
    pixels = torch.zeros(3, 3, 64, 96)
    pixels[1, 0, 5, 5] = torch.nan
    for _ in range(CAPTURE_AT + 1):
        rows = rig.arena.request(GIFTED, floats, pixels, spec)
        assert rig.runner.finish(rig.runner.launch(Batch(floats, tuple(rows)))).finite == (True, False, True)
    assert rig.cuda.log.count("replay") == 1
