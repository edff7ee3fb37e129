"""Pooled, projected, laid out and quantized features, against transformers' features and torch's own functions."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3_server.backbone import runner
from dinov3_server.backbone.runners import cpu, postprocessing
from dinov3_server.backbone.runners.cpu import CpuRunner
from dinov3_server.backbone.runners.cuda_graphs import compute
from dinov3_server.backbone.runners.postprocessing import LinearMap, Postprocessing, pool, quantize
from dinov3_server.backbone.weights.random_weights import random_tensors
from dinov3_server.families.dinov3_convnext.model import ConvNext
from dinov3_server.families.registry import lookup
from dinov3_server.models.interface import (
    FeatureDtype,
    FeatureSpec,
    ModelInfo,
    Output,
    OutputSpec,
    PixelShape,
    Pooling,
    Projection,
)
from dinov3_server.nn.rope import default_periods
from tests.server.backbone.arenas import Arena, serve
from tests.server.backbone.convnext_files import NARROW
from tests.server.backbone.features import CPU, LVD, ModelOf, normalized, ours, picture
from tests.server.backbone.reference import (
    photographs,
    transformers_convnext,
    transformers_convnext_features,
    transformers_features,
    transformers_model,
)
from tests.support import numpy_postprocessing

VIT = dataclasses.replace(lookup("vits16"), depth=3)
SHAPE = PixelShape(96, 160, "uint8")
CLS, PATCHES, REGISTERS = Output("cls"), Output("patches"), Output("registers")
POOLINGS = (None, Pooling("area", 3, 5), Pooling("area", 4, 7), Pooling("bilinear", 4, 7), Pooling("bilinear", 9, 2))
DTYPES: tuple[FeatureDtype, ...] = ("float32", "float16", "bfloat16", "int8")
# Bounds of norm(a - b) / norm(b); for int8 relative to the largest value of a token.
TOLERANCE = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 2**-8}


@dataclasses.dataclass
class Case:
    runner: CpuRunner
    arena: Arena
    expected: dict[Output, Tensor]  # of `photographs`, by transformers
    maps: dict[str, LinearMap]


def linear_map(inputs: int, outputs: int) -> LinearMap:
    generator = torch.Generator().manual_seed(inputs)
    return LinearMap(torch.randn(outputs, inputs, generator=generator), torch.randn(outputs, generator=generator))


def info_of(variant: Any, maps: dict[str, LinearMap]) -> ModelInfo:
    return ModelInfo(
        name=variant.name,
        weights="random:7",
        random_weights=True,
        fingerprint="",
        dtype="float32",
        device="cpu",
        layer_dims=variant.layer_dims,
        layer_strides=variant.layer_strides,
        register_tokens=variant.registers,
        mean=LVD.mean,
        std=LVD.std,
        parameters=0,
        projections=tuple(Projection(name, *reversed(each.weight.shape), "") for name, each in maps.items()),
    )


@pytest.fixture(scope="module", params=["vit", "convnext"])
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    pixels = normalized(photographs(*SHAPE[:2]))
    model: Any
    if request.param == "vit":
        tensors, periods = random_tensors(VIT, 7), default_periods(VIT.head_dim, VIT.rope_base)
        model, variant = ours(VIT, tensors, periods), VIT
        expected = transformers_features(transformers_model(VIT, tensors, periods), pixels)
    else:
        tensors, variant = random_tensors(NARROW, 7), NARROW  # type: ignore[assignment]
        model = ConvNext(NARROW, tensors, LVD, dtype=torch.float32, device=CPU)
        expected = transformers_convnext_features(transformers_convnext(NARROW, tensors), pixels)
    maps = {f"p{width}": linear_map(width, 6) for width in set(variant.layer_dims)}
    served = CpuRunner(model, info_of(variant, maps), maps)
    arena = Arena(0, size=32 << 20)
    served.attach(0, memoryview(arena.memory))
    yield Case(served, arena, expected, maps)
    served.close()


@torch.inference_mode()
def by_torch(tokens: Tensor, spec: OutputSpec, grid: tuple[int, int], maps: dict[str, LinearMap]) -> Tensor:
    """Return the expected output for [D] or [tokens, D], in float32."""
    if spec.pooling:
        method, *size = spec.pooling
        cells = tokens.T.reshape(1, -1, *grid)
        if method == "area":
            cells = F.interpolate(cells, size, mode="area")
        else:
            cells = F.interpolate(cells, size, mode="bilinear", align_corners=False, antialias=False)
        tokens, grid = cells[0].flatten(1).T, (size[0], size[1])
    if spec.projection:
        weight, bias = maps[spec.projection].weight, maps[spec.projection].bias
        tokens = tokens @ weight.T + bias
    return tokens.T.reshape(-1, *grid) if spec.channels_first else tokens


def buffers(case: Case, row: Any) -> Iterator[tuple[Output, list[Tensor]]]:
    """Yield the buffers of each output of a row, from the arena."""
    info = case.runner.info
    found: dict[Output, list[Tensor]] = {}
    for buffer, start in zip(info.output_buffers(row.spec, SHAPE), row.output_offsets, strict=True):
        dtype = numpy_postprocessing.DTYPES.get(buffer.dtype, np.dtype("int8"))
        raw = np.frombuffer(case.arena.memory[start : start + buffer.nbytes], dtype).reshape(buffer.shape)
        found.setdefault(buffer.output, []).append(torch.from_numpy(raw.astype(np.float32)))
    yield from found.items()


def check(case: Case, specs: list[FeatureSpec]) -> None:
    """Serve one batch, with a photograph for each spec, and check its outputs."""
    case.arena.end = 0
    images = photographs(*SHAPE[:2])
    rows = []
    for i, spec in enumerate(specs):
        rows += case.arena.request(case.runner.info, SHAPE, images[i % 2 : i % 2 + 1], spec)
    assert serve(case.runner, SHAPE, rows).finite == (True,) * len(rows)
    for i, row in enumerate(rows):
        for output, (values, *scales) in buffers(case, row):
            spec = row.spec.output_spec(output)
            grid = case.runner.info.grid(SHAPE, output.layer)
            expected = by_torch(case.expected[output][i % 2], spec, grid, case.maps)
            assert values.shape == expected.shape, spec
            if scales:
                channels = 0 if spec.channels_first else -1
                scale = scales[0].reshape(values.shape[1:]) if spec.channels_first else scales[0]
                largest = expected.abs().amax(channels)
                torch.testing.assert_close(scale, largest / 127, rtol=1e-4, atol=1e-7)
                assert values.abs().amax(channels).eq(127).all(), spec
                step, values = scale.unsqueeze(channels), values * scale.unsqueeze(channels)
                assert ((values - expected).abs() <= 0.501 * step + 1e-4 * largest.max()).all(), spec
            else:
                error = (values - expected).norm() / expected.norm()
                assert error <= TOLERANCE[row.spec.dtype], (spec, float(error))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_first", [False, True])
def test_final_features_equal_transformers(case: Case, dtype: FeatureDtype, channels_first: bool) -> None:
    kinds = (CLS, PATCHES, REGISTERS) if case.runner.info.register_tokens else (CLS, PATCHES)
    name = f"p{case.runner.info.embed_dim}"
    # All poolings in one batch, to notice mix-ups.
    combinations = itertools.product(POOLINGS, (None, name))
    check(case, [FeatureSpec(kinds, dtype, pooling, name, channels_first) for pooling, name in combinations])


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_equal_transformers_with_and_without_norm(case: Case, dtype: FeatureDtype) -> None:
    specs = []
    for layer, norm in itertools.product(range(case.runner.info.depth), (False, True)):
        outputs = (Output("patches", layer, norm), Output("cls", layer, norm))
        name = f"p{case.runner.info.width(layer)}"
        specs += [FeatureSpec(outputs, dtype, pooling, name, layer % 2 == 0) for pooling in POOLINGS[1:4]]
    check(case, specs)


def test_large_results_are_computed_a_few_rows_at_a_time(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch with another pooling for each row would take the memory of rows x rows poolings."""
    pooled: list[int] = []

    def counted(*arguments: Any) -> Tensor:
        result = pool(*arguments)
        pooled.append(result.numel())
        return result

    monkeypatch.setattr(postprocessing, "pool", counted)
    row = 8 * 16 * case.runner.info.embed_dim
    monkeypatch.setattr(cpu, "_FLOATS", 2 * row)
    poolings = [Pooling("bilinear", 16, 8), *[Pooling("bilinear", 8, 16)] * 3, Pooling("area", 8, 16)]
    check(case, [FeatureSpec((PATCHES,), "int8", pooling) for pooling in poolings])
    assert max(pooled) <= 2 * row
    assert sum(pooled) == len(poolings) * row


def test_each_distinct_step_runs_once_per_batch(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"pool": 0, "quantize": 0, "project": 0}

    def counted(name: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            counts[name] += 1
            return function(*arguments)

        return call

    monkeypatch.setattr(postprocessing, "pool", counted("pool", pool))
    monkeypatch.setattr(postprocessing, "quantize", counted("quantize", quantize))
    monkeypatch.setattr(LinearMap, "__call__", counted("project", LinearMap.__call__))
    name, pooling = f"p{case.runner.info.embed_dim}", POOLINGS[1]
    specs = [
        FeatureSpec((PATCHES,), dtype, pooling, projection, channels_first)
        for dtype, projection, channels_first in itertools.product(DTYPES, (None, name), (False, True))
    ]
    check(case, specs * 2)
    assert counts == {"pool": 1, "quantize": 2, "project": 1}


# --- non-finite features --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pooling", [*POOLINGS, Pooling("bilinear", 2, 2)])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_features_are_flagged_after_every_step(
    dtype: FeatureDtype, pooling: Pooling | None, bad: float
) -> None:
    """One value of the first patch, which bilinear pooling to few cells skips."""
    maps = {"p": linear_map(8, 3)}
    info = dataclasses.replace(info_of(VIT, maps), layer_dims=(8,), layer_strides=(16,))
    features = torch.randn(3, math.prod(info.grid(SHAPE)), 8)
    features[1, 0, 5] = bad
    model: Any = ModelOf(lambda pixels, outputs: {PATCHES: features})
    for projection in (None, "p"):
        served, arena = CpuRunner(model, info, maps), Arena(0)
        served.attach(0, memoryview(arena.memory))
        spec = FeatureSpec((PATCHES,), dtype, pooling, projection)
        requests = arena.request(info, SHAPE, picture(96, 160, count=3), spec)
        assert serve(served, SHAPE, requests).finite == (True, False, True)
        postprocessing = partial(Postprocessing, grid=partial(info.grid, SHAPE), projections=maps)
        on_device = compute(model, features, [spec.output_spec(PATCHES)], postprocessing)
        assert on_device.finite.tolist() == [[True], [False], [True]], "on CUDA"
        served.close()


def test_a_projection_beyond_the_range_of_the_dtype_is_an_error() -> None:
    maps = {"p": LinearMap(torch.full((1, 8), 1e4), torch.zeros(1))}
    info = dataclasses.replace(info_of(VIT, maps), layer_dims=(8,), layer_strides=(16,))
    model: Any = ModelOf(lambda pixels, outputs: {PATCHES: torch.ones(1, 60, 8)})
    for dtype, finite in (("float16", False), ("bfloat16", True), ("int8", True)):
        served, arena = CpuRunner(model, info, maps), Arena(0)
        served.attach(0, memoryview(arena.memory))
        requests = arena.request(info, SHAPE, picture(96, 160), FeatureSpec((PATCHES,), dtype, None, "p"))  # type: ignore[arg-type]
        assert serve(served, SHAPE, requests).finite == (finite,)
        served.close()


# --- the definitions -----------------------------------------------------------------------------------------------


def test_quantization_rounds_half_to_even_and_maps_zeros_to_scale_0() -> None:
    tokens = torch.tensor(
        [
            [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0],
            [0.0, -0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            [-254.0, 1.0, 3.0, 5.0, 0.0, 253.0, 7.0],
            [1e-44, -1e-44, 0.0, 5e-45, 0.0, 0.0, 0.0],  # its scale would underflow
            [3.4e38, -3.4e38, 1.7e38, 0.0, 1.0, 0.0, 0.0],
        ]
    )
    values, scales = quantize(tokens)
    assert (values.dtype, scales.dtype) == (torch.int8, torch.float32)
    assert values[0].tolist() == [127, 0, 2, 2, 0, -2, -127]
    assert values[1].tolist() == [0] * 7
    assert values[2].tolist() == [-127, 0, 2, 2, 0, 126, 4]
    assert values[4].tolist() == [127, -127, 64, 0, 0, 0, 0]
    assert scales[:3].tolist() == [1.0, 0.0, 2.0]
    restored = values * scales[:, None]
    assert (restored - tokens).abs().amax(1).le(0.5 * scales + 1e-43).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_token_that_is_not_finite_has_no_finite_scale(bad: float) -> None:
    tokens = torch.ones(3, 4)
    tokens[1, 2] = bad
    assert quantize(tokens)[1].isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("pooling", [p for p in POOLINGS if p] + [Pooling("area", 1, 1), Pooling("bilinear", 12, 20)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_postprocessing_equals_the_numpy_reference(pooling: Pooling, dtype: FeatureDtype) -> None:
    """The numpy runner of other tests computes the same."""
    patches = torch.randn(1, 60, 8)
    maps = {"p": linear_map(8, 3)}
    bare = {name: each.weight.numpy() for name, each in maps.items()}
    maps["p"].bias.zero_()
    for projection, channels_first in itertools.product((None, "p"), (False, True)):
        spec = OutputSpec(PATCHES, dtype, pooling, projection, channels_first)
        made = Postprocessing({PATCHES: patches}, lambda layer: (6, 10), maps).buffers(spec)
        expected = numpy_postprocessing.postprocess(patches[0].numpy(), spec, (6, 10), bare)
        for buffer, other in zip(made, expected, strict=True):
            atol = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2, "int8": 1}[other.dtype.name]
            np.testing.assert_allclose(buffer[0].float().numpy(), other.astype(np.float32), rtol=0, atol=atol)


def test_build_reads_and_logs_projections(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "lookup", lambda name: VIT)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    np.save(tmp_path / "p.npy", np.ones((2, 384), np.float32))
    built = runner.build("vits16", "random:0", dtype="float32", warm_up=(), projections=[("p", f"{tmp_path}/p.npy")])
    [projection] = built.info.projections
    assert (projection.name, projection.input_channels, projection.output_channels) == ("p", 384, 2)
    plain = runner.build("vits16", "random:0", dtype="float32", warm_up=())
    assert built.info.fingerprint == plain.info.fingerprint, "clients that pin the model are not affected"
