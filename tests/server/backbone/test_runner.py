"""The CPU runner on arenas, and `build`."""

from __future__ import annotations

import dataclasses
import logging
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dinov3_server import host
from dinov3_server.backbone import runner
from dinov3_server.backbone.runner import build
from dinov3_server.backbone.runners import cpu
from dinov3_server.backbone.runners.base import TorchRunner
from dinov3_server.backbone.runners.cpu import CpuRunner
from dinov3_server.backbone.weights.random_weights import random_tensors
from dinov3_server.errors import CheckpointError, ConfigError
from dinov3_server.families.dinov3_vit.model import VisionTransformer
from dinov3_server.families.registry import lookup
from dinov3_server.models.interface import (
    DeviceLost,
    DeviceOutOfMemory,
    FeatureDtype,
    FeatureSpec,
    Output,
    PixelShape,
    Row,
)
from tests.server.backbone.arenas import Arena, serve
from tests.server.backbone.features import ModelOf, normalized, ours, picture
from tests.server.backbone.files import official_state

TINY = dataclasses.replace(lookup("vits16"), embed_dim=64, depth=3, heads=2, ffn_dim=128)
BYTES, FLOATS = PixelShape(32, 48, "uint8"), PixelShape(32, 48, "float32")
CLS, REGISTERS, PATCHES = Output("cls"), Output("registers"), Output("patches")


@pytest.fixture(autouse=True)
def _small_vits16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add the model name `tiny`, and keep `build` from changing the number of threads."""
    monkeypatch.setattr(runner, "lookup", lambda name: TINY if name == "tiny" else lookup(name))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


def tiny_model(dtype: torch.dtype = torch.float32) -> VisionTransformer:
    return ours(TINY, random_tensors(TINY, 0), dtype=dtype)


def tiny_runner(**changes: str) -> TorchRunner:
    return build("tiny", "random:0", **{"dtype": "float32", **changes}, warm_up=())


def expected(pixels: Tensor, row: int, output: Output) -> Tensor:
    with torch.inference_mode():
        features = tiny_model()(pixels, [output])[output][row]
    return features.reshape(-1, TINY.embed_dim)


SPECS = [
    FeatureSpec((CLS, PATCHES), "float32"),
    FeatureSpec((PATCHES, REGISTERS, CLS), "bfloat16"),
    FeatureSpec((Output("patches", 1, False), Output("cls", 0, True)), "float16"),
    FeatureSpec((CLS,), "float16"),
]
TOLERANCE: dict[FeatureDtype, float] = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 2**-8}


@pytest.mark.parametrize("shape", [BYTES, FLOATS])
def test_mixed_requests_of_two_arenas_in_one_batch(shape: PixelShape) -> None:
    served = tiny_runner()
    arenas = [Arena(7), Arena(8)]
    for arena in arenas:
        served.attach(arena.number, memoryview(arena.memory))
    images = picture(32, 48, count=8)
    pixels = images if shape.format == "uint8" else normalized(images)
    rows = []
    for i, spec in enumerate(SPECS):
        rows += arenas[i % 2].request(served.info, shape, pixels[2 * i : 2 * i + 2], spec)
    finished = serve(served, shape, rows)
    assert finished.finite == (True,) * 8
    assert min(finished.copy_in, finished.forward, finished.copy_out) >= 0
    for i, row in enumerate(rows):
        arena = arenas[row.arena - 7]
        for output, actual in zip(row.spec.outputs, arena.features(served.info, shape, row), strict=True):
            wanted = expected(pixels, i, output)
            assert actual.shape == wanted.shape
            error = (actual - wanted).norm() / wanted.norm()
            assert error <= TOLERANCE[row.spec.dtype], (i, output)


def test_only_the_requested_ranges_are_written() -> None:
    served, arena = tiny_runner(), Arena(0)
    served.attach(0, memoryview(arena.memory))
    arena.take(64)
    row, *_ = arena.request(served.info, BYTES, picture(32, 48), FeatureSpec((CLS, PATCHES), "bfloat16"))
    before = bytearray(arena.memory[:])
    serve(served, BYTES, [row])
    after = arena.memory[:]
    sizes = [buffer.nbytes for buffer in served.info.output_buffers(row.spec, BYTES)]
    for offset, size in zip(row.output_offsets, sizes, strict=True):
        assert after[offset : offset + size] != before[offset : offset + size]
        before[offset : offset + size] = after[offset : offset + size]
    assert after == before


def test_only_the_row_with_bad_features_is_flagged() -> None:
    served, arena = tiny_runner(), Arena(0)
    served.attach(0, memoryview(arena.memory))
    pixels = normalized(picture(32, 48, count=5))
    pixels[1, 0, 3, 4] = torch.nan
    pixels[3, 2, 30, 40] = torch.inf
    rows = arena.request(served.info, FLOATS, pixels[:2], SPECS[0])
    rows += arena.request(served.info, FLOATS, pixels[2:], SPECS[1])
    assert serve(served, FLOATS, rows).finite == (True, False, True, False, True)


def test_overflow_of_the_requested_dtype_flags_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    served, arena = tiny_runner(), Arena(0)
    served.attach(0, memoryview(arena.memory))
    model = served.model

    def louder(pixels: Tensor, outputs: list[Output]) -> dict[Output, Tensor]:
        return {output: features * 1e5 for output, features in model(pixels, outputs).items()}

    monkeypatch.setattr(served, "model", ModelOf(louder))
    rows: list[Row] = []
    dtypes: tuple[FeatureDtype, ...] = ("float32", "float16", "bfloat16")
    for dtype in dtypes:
        rows += arena.request(served.info, BYTES, picture(32, 48), FeatureSpec((CLS,), dtype))
    assert serve(served, BYTES, rows).finite == (True, False, True)


@pytest.mark.parametrize("output", SPECS[1].outputs)
def test_one_bad_output_of_several_flags_the_row(monkeypatch: pytest.MonkeyPatch, output: Output) -> None:
    served, arena = tiny_runner(), Arena(0)
    served.attach(0, memoryview(arena.memory))
    model = served.model

    def poisoned(pixels: Tensor, outputs: list[Output]) -> dict[Output, Tensor]:
        features = dict(model(pixels, outputs))
        features[output] = features[output].clone()
        features[output][1].view(-1)[5] = -torch.inf
        return features

    monkeypatch.setattr(served, "model", ModelOf(poisoned))
    rows = arena.request(served.info, BYTES, picture(32, 48, count=3), SPECS[1])
    assert serve(served, BYTES, rows).finite == (True, False, True)


def test_detach_releases_the_arena() -> None:
    served, arena = tiny_runner(), Arena(0)
    view = memoryview(arena.memory)
    reference = weakref.ref(view)
    served.attach(0, view)
    del view
    serve(served, BYTES, arena.request(served.info, BYTES, picture(32, 48), SPECS[0]))
    with pytest.raises(BufferError):
        arena.memory.close()
    served.detach(0)
    assert reference() is None
    arena.memory.close()


def test_detach_releases_the_arena_after_a_failed_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    served, arena = tiny_runner(), Arena(0)
    served.attach(0, memoryview(arena.memory))
    (row,) = arena.request(served.info, BYTES, picture(32, 48), SPECS[0])
    model = served.model
    monkeypatch.setattr(served, "model", ModelOf(lambda pixels, outputs: model(pixels, [Output("cls", 99)])))
    with pytest.raises(ValueError, match="no layer 99"):
        serve(served, BYTES, [row])
    served.close()
    arena.memory.close()


def test_ranges_outside_the_arena_and_unknown_arenas_are_refused() -> None:
    served, arena = tiny_runner(), Arena(0, size=1 << 16)
    served.attach(0, memoryview(arena.memory))
    (row,) = arena.request(served.info, BYTES, picture(32, 48), SPECS[3])
    for wrong, reason in [
        (dataclasses.replace(row, pixel_offset=(1 << 16) - 10), "outside arena 0 of 65536"),
        (dataclasses.replace(row, output_offsets=((1 << 16) - 2,)), "outside arena 0 of 65536"),
        (dataclasses.replace(row, output_offsets=(-2,)), "outside arena 0"),
        (dataclasses.replace(row, arena=5), "no arena 5 is attached"),
    ]:
        with pytest.raises(ValueError, match=reason):
            serve(served, BYTES, [wrong])
    with pytest.raises(ValueError, match="attached already"):
        served.attach(0, memoryview(arena.memory))
    assert serve(served, BYTES, [row]).finite == (True,)


def test_device_errors_are_translated(monkeypatch: pytest.MonkeyPatch) -> None:
    served, arena = tiny_runner(), Arena(0)
    served.attach(0, memoryview(arena.memory))
    rows = arena.request(served.info, BYTES, picture(32, 48), SPECS[0])
    model = served.model

    def asks_for_an_exabyte(pixels: Tensor, outputs: list[Output]) -> dict[Output, Tensor]:
        return {CLS: torch.empty(1 << 60, dtype=torch.uint8)}

    def loses_the_device(pixels: Tensor, outputs: list[Output]) -> dict[Output, Tensor]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def is_wrong(pixels: Tensor, outputs: list[Output]) -> dict[Output, Tensor]:
        raise RuntimeError("shapes do not match")

    for broken, error in [
        (asks_for_an_exabyte, DeviceOutOfMemory),
        (loses_the_device, DeviceLost),
        (is_wrong, RuntimeError),
    ]:
        monkeypatch.setattr(served, "model", ModelOf(broken))
        with pytest.raises(error) as caught:
            serve(served, BYTES, rows)
        assert type(caught.value) is error
    monkeypatch.setattr(served, "model", model)
    assert serve(served, BYTES, rows).finite == (True,)


def test_memory_of_a_failed_batch_is_freed_before_its_error_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    served, arena = tiny_runner(), Arena(0)
    served.attach(0, memoryview(arena.memory))
    activations: list[weakref.ref[Tensor]] = []

    def runs_out_half_way(pixels: Tensor, outputs: list[Output]) -> dict[Output, Tensor]:
        half = torch.zeros(1000)
        activations.append(weakref.ref(half))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(served, "model", ModelOf(runs_out_half_way))
    with pytest.raises(DeviceOutOfMemory):
        serve(served, BYTES, arena.request(served.info, BYTES, picture(32, 48), SPECS[0]))
    assert [reference() for reference in activations] == [None]


def test_a_layer_is_freed_when_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    served, arena = tiny_runner(), Arena(0)
    served.attach(0, memoryview(arena.memory))
    model, kept = served.model, []

    def one_by_one(pixels: Tensor, outputs: list[Output]) -> Iterator[tuple[Output, Tensor]]:
        features: list[weakref.ref[Tensor]] = []
        for output in outputs:
            values = model(pixels, [output])[output].clone()
            features.append(weakref.ref(values))
            yield output, values
            del values
            kept.append(sum(each() is not None for each in features))

    monkeypatch.setattr(served, "model", SimpleNamespace(features=one_by_one))
    spec = FeatureSpec(tuple(Output("patches", layer) for layer in range(TINY.depth)), "int8")
    assert serve(served, BYTES, arena.request(served.info, BYTES, picture(32, 48), spec)).finite == (True,)
    assert kept == [1] * TINY.depth


def test_freed_memory_is_returned_every_64_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    served, arena = tiny_runner(), Arena(0)
    served.attach(0, memoryview(arena.memory))
    rows = arena.request(served.info, BYTES, picture(32, 48), SPECS[0])
    served_when_given_back: list[int] = []
    served_count = 0
    monkeypatch.setattr(cpu, "give_back_freed_memory", lambda: served_when_given_back.append(served_count))
    while served_count < 2 * cpu.RETURN_EVERY:
        serve(served, BYTES, rows)
        served_count += 1
    assert served_when_given_back == [cpu.RETURN_EVERY - 1, 2 * cpu.RETURN_EVERY - 1]


def test_build_describes_the_model(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        built = build("tiny", "random:3", dtype="bfloat16", warm_up=(BYTES, FLOATS), preprocessing="p")
    info = built.info
    assert isinstance(built, CpuRunner)
    assert (info.name, info.weights, info.random_weights) == (TINY.name, "random:3", True)
    assert (info.dtype, info.device, built.pipeline_depth, built.memory()) == ("bfloat16", "cpu", 1, {})
    assert (info.embed_dim, info.depth, info.patch_size, info.register_tokens) == (64, 3, 16, 4)
    assert (info.mean, info.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert list(built.load_seconds) == ["read", "fingerprint", "build", "warm_up"]
    assert all(seconds >= 0 for seconds in built.load_seconds.values())
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert any("RANDOM WEIGHTS (random:3)" in warning for warning in warnings)
    for step in built.load_seconds:
        assert f"load: {step} took" in caplog.text
    other = build("tiny", "random:3", dtype="bfloat16", warm_up=(), preprocessing="q").info
    assert other.fingerprint != info.fingerprint
    assert dataclasses.replace(other, fingerprint=info.fingerprint) == info


def test_build_from_a_file(tmp_path: Path) -> None:
    torch.save(official_state(TINY, random_tensors(TINY, 0)), tmp_path / "tiny.pth")
    built = build("tiny", str(tmp_path / "tiny.pth"), dtype="float32", warm_up=())
    assert (built.info.weights, built.info.random_weights) == ("tiny.pth", False)
    assert built.info.fingerprint == tiny_runner().info.fingerprint


def test_weights_that_give_nan_are_refused(tmp_path: Path) -> None:
    state = official_state(TINY, random_tensors(TINY, 0))
    state["blocks.1.mlp.fc1.weight"][3, 4] = torch.nan
    torch.save(state, tmp_path / "tiny.pth")
    with pytest.raises(CheckpointError, match=r"NaN or infinite features for a gray 32x48 image .* 'tiny\.pth'"):
        build("tiny", str(tmp_path / "tiny.pth"), warm_up=(BYTES,))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model": "giant2"}, "DINOv3 has no giant2"),
        ({"weights": "random:x"}, "seed must be a whole number"),
        ({"weights": "random:-1"}, "seed must be a whole number"),
        ({"weights": "random:99999999999999999999"}, "below 2.63"),
        ({"dtype": "float16"}, "overflows.*use 'bfloat16' or 'float32'"),
        ({"dtype": "int8"}, "'int8' is not one of 'auto', 'float32', 'bfloat16'"),
        ({"device": "gpu"}, "'gpu' is neither 'cpu' nor 'cuda:N'"),
        ({"device": "cuda:x"}, "neither"),
        ({"device": "cuda:99"}, "'cuda:99' is not available: torch .* sees [0-9]+ CUDA devices"),
        ({"threads": -1}, "threads is -1"),
        ({"warm_up": (PixelShape(30, 32, "uint8"),)}, "30x32: not multiples of 16"),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, object], reason: str) -> None:
    arguments = {"model": "tiny", "weights": "random:0", **settings}
    with pytest.raises(ConfigError, match=reason):
        build(**arguments)


@pytest.mark.parametrize(("native", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_auto_dtype_is_bfloat16_only_if_native(monkeypatch: pytest.MonkeyPatch, native: bool, dtype: str) -> None:
    monkeypatch.setattr(host, "has_native_bf16", lambda: native)
    assert tiny_runner(dtype="auto").info.dtype == dtype


def test_emulated_bfloat16_logs_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(host, "has_native_bf16", lambda: False)
    assert tiny_runner(dtype="bfloat16").info.dtype == "bfloat16"
    assert "no native bfloat16" in caplog.text
