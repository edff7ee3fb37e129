"""The CUDA runner: its features, its streams and its memory."""

from __future__ import annotations

import dataclasses
import gc
import mmap
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from dinov3_server.backbone.runner import build  # noqa: E402
from dinov3_server.backbone.runners.cuda import CudaRunner  # noqa: E402
from dinov3_server.backbone.runners.cuda_graphs import CAPTURE_AT  # noqa: E402
from dinov3_server.backbone.weights.random_weights import random_tensors  # noqa: E402
from dinov3_server.families.dinov3_convnext.model import ConvNext  # noqa: E402
from dinov3_server.families.dinov3_convnext.variants import CONVNEXTS  # noqa: E402
from dinov3_server.families.dinov3_vit.variants import VitVariant  # noqa: E402
from dinov3_server.families.registry import lookup  # noqa: E402
from dinov3_server.models.interface import (  # noqa: E402
    Batch,
    DeviceOutOfMemory,
    FeatureDtype,
    FeatureSpec,
    Output,
    PixelShape,
)
from tests.server.backbone.arenas import Arena, serve  # noqa: E402
from tests.server.backbone.features import (  # noqa: E402
    CPU,
    LVD,
    every_output,
    normalized,
    ours,
    picture,
    worst_cosine,
    worst_error,
)

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
CONVNEXT = CONVNEXTS["dinov3_convnext_tiny"]
SWIGLU = dataclasses.replace(lookup("vits16plus"), depth=6)
FINAL = (Output("cls"), Output("registers"), Output("patches"))
SHAPE = PixelShape(224, 224, "uint8")


@pytest.fixture(scope="module")
def runner() -> Iterator[CudaRunner]:
    built = build("vits16", "random:7", dtype="bfloat16", device="cuda:0")
    assert isinstance(built, CudaRunner)
    yield built
    built.close()


@pytest.fixture
def arena(runner: CudaRunner) -> Iterator[Arena]:
    lent = Arena(0, size=64 << 20)
    runner.attach(0, memoryview(lent.memory))
    yield lent
    runner.detach(0)
    lent.memory.close()


def on_cpu(variant: VitVariant, pixels: torch.Tensor, outputs: list[Output]) -> dict[Output, torch.Tensor]:
    model = ours(variant, random_tensors(variant, 7))
    with torch.inference_mode():
        return model(pixels, outputs)


@pytest.mark.parametrize("variant", [lookup("vits16"), SWIGLU], ids=["mlp", "swiglu"])
@pytest.mark.parametrize("size", [(224, 224), (384, 512)])
def test_fp32_equals_the_cpu(variant: VitVariant, size: tuple[int, int]) -> None:
    model = ours(variant, random_tensors(variant, 7), device=DEVICE)
    images = picture(*size, count=2)
    expected = {output: t.to(DEVICE) for output, t in on_cpu(variant, images, every_output(variant.depth)).items()}
    assert worst_error(model, images.to(DEVICE), expected) <= 1e-5
    assert worst_error(model, normalized(images).to(DEVICE), expected) <= 1e-5


@pytest.mark.parametrize("variant", [lookup("vits16"), SWIGLU], ids=["mlp", "swiglu"])
@pytest.mark.parametrize("size", [(224, 224), (384, 512)])
def test_bf16_is_near_the_cpus_fp32(variant: VitVariant, size: tuple[int, int]) -> None:
    model = ours(variant, random_tensors(variant, 7), dtype=torch.bfloat16, device=DEVICE)
    images = picture(*size, count=2)
    expected = on_cpu(variant, images, list(FINAL))
    with torch.inference_mode():
        actual = model(images.to(DEVICE), FINAL)
    cosines = {output.kind: worst_cosine(actual[output].cpu(), expected[output]) for output in FINAL}
    assert min(cosines.values()) >= 0.9995, cosines


@pytest.mark.parametrize("size", [(224, 224), (256, 384)])
def test_convnext_features_are_near_the_cpus(size: tuple[int, int]) -> None:
    tensors, images = random_tensors(CONVNEXT, 7), picture(*size, count=2)
    outputs = [Output(kind, layer) for layer in (None, 0, 1, 2, 3) for kind in ("cls", "patches")]
    with torch.inference_mode():
        expected = ConvNext(CONVNEXT, tensors, LVD, dtype=torch.float32, device=CPU)(images, outputs)
        exact = ConvNext(CONVNEXT, tensors, LVD, dtype=torch.float32, device=DEVICE)
        near = ConvNext(CONVNEXT, tensors, LVD, dtype=torch.bfloat16, device=DEVICE)(images.to(DEVICE), outputs)
    on_device = {output: values.to(DEVICE) for output, values in expected.items()}
    assert worst_error(exact, images.to(DEVICE), on_device) <= 1e-5
    cosines = {output: worst_cosine(near[output].cpu(), values) for output, values in expected.items()}
    assert min(cosines.values()) >= 0.9995, cosines


def test_a_convnext_is_captured_as_a_graph() -> None:
    built = build("convnext_tiny", "random:7", dtype="bfloat16", device="cuda:0", warm_up=())
    arena = Arena(0, size=64 << 20)
    built.attach(0, memoryview(arena.memory))
    spec = FeatureSpec((Output("cls"), Output("patches"), Output("patches", 0)), "float32")
    rows = arena.request(built.info, SHAPE, picture(224, 224, count=3), spec)
    answers = []
    for _ in range(CAPTURE_AT + 2):
        assert serve(built, SHAPE, rows).finite == (True,) * 3
        answers.append([values for row in rows for values in arena.features(built.info, SHAPE, row)])
    assert len(built._graphs) == 1
    for first, last in zip(answers[0], answers[-1], strict=True):
        assert worst_cosine(last, first) > 0.99999
    built.close()
    arena.memory.close()


def test_build_describes_the_model(runner: CudaRunner) -> None:
    assert (runner.info.dtype, runner.info.device, runner.pipeline_depth) == ("bfloat16", "cuda:0", 2)
    memory = runner.memory()
    assert 0 < memory["allocated"] <= memory["reserved"] < memory["total"]
    assert build("vits16", "random:7", dtype="auto", device="cuda", warm_up=()).info.dtype == "bfloat16"


def test_mixed_requests_in_one_batch(runner: CudaRunner, arena: Arena) -> None:
    requested: list[tuple[Output, ...]] = [
        (Output("cls"), Output("patches")),
        (Output("patches"), Output("registers")),
        (Output("patches", 3, False), Output("cls", 0)),
    ]
    dtypes: list[FeatureDtype] = ["float32", "bfloat16", "float16"]
    images = picture(224, 224, count=6)
    expected = on_cpu(lookup("vits16"), images, list(dict.fromkeys(o for outputs in requested for o in outputs)))
    rows = []
    for i, (outputs, dtype) in enumerate(zip(requested, dtypes, strict=True)):
        rows += arena.request(runner.info, SHAPE, images[2 * i : 2 * i + 2], FeatureSpec(outputs, dtype))
    finished = serve(runner, SHAPE, rows)
    assert finished.finite == (True,) * 6
    assert min(finished.copy_in, finished.forward, finished.copy_out) > 0
    for i, row in enumerate(rows):
        for output, actual in zip(row.spec.outputs, arena.features(runner.info, SHAPE, row), strict=True):
            assert worst_cosine(actual, expected[output][i].view(actual.shape)) >= 0.9995, (i, output)


def test_two_batches_in_flight(runner: CudaRunner, arena: Arena) -> None:
    spec = FeatureSpec((Output("cls"), Output("patches")), "float32")
    requests = [arena.request(runner.info, SHAPE, picture(224, 224, count=4, seed=seed), spec) for seed in range(4)]
    alone = []
    for rows in requests:
        serve(runner, SHAPE, rows)
        alone.append([arena.features(runner.info, SHAPE, row) for row in rows])
    for rows in requests:
        for offset, buffer in zip(rows[0].output_offsets, runner.info.output_buffers(spec, SHAPE), strict=True):
            size = len(rows) * buffer.nbytes
            arena.memory[offset : offset + size] = b"\xee" * size
    batches = [Batch(SHAPE, tuple(rows)) for rows in requests]
    launched = [runner.launch(batches[0]), runner.launch(batches[1])]
    for following in (batches[2], batches[3], None, None):
        assert runner.finish(launched.pop(0)).finite == (True,) * 4
        if following:
            launched.append(runner.launch(following))
    for rows, features in zip(requests, alone, strict=True):
        for row, expected in zip(rows, features, strict=True):
            for actual, other in zip(arena.features(runner.info, SHAPE, row), expected, strict=True):
                assert torch.equal(actual, other)


def test_launch_neither_waits_nor_synchronizes(runner: CudaRunner, arena: Arena) -> None:
    rows = arena.request(runner.info, SHAPE, picture(224, 224, count=4), FeatureSpec(FINAL, "bfloat16"))
    serve(runner, SHAPE, rows)  # allocates what a first batch needs
    with torch.cuda.stream(runner._compute):
        torch.cuda._sleep(2_000_000_000)  # about a second
    try:
        torch.cuda.set_sync_debug_mode("error")
        launched = runner.launch(Batch(SHAPE, tuple(rows)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not runner._compute.query(), "launch has waited for the device"
    assert runner.finish(launched).finite == (True,) * 4


def test_only_the_row_with_bad_features_is_flagged(runner: CudaRunner, arena: Arena) -> None:
    shape = PixelShape(64, 64, "float32")
    pixels = normalized(picture(64, 64, count=4))
    pixels[2, 1, 5, 5] = torch.nan
    rows = arena.request(runner.info, shape, pixels[:1], FeatureSpec((Output("cls"),), "float16"))
    rows += arena.request(runner.info, shape, pixels[1:], FeatureSpec(FINAL, "bfloat16"))
    assert serve(runner, shape, rows).finite == (True, True, False, True)


def test_arenas_are_page_locked_while_attached(runner: CudaRunner) -> None:
    memory = mmap.mmap(-1, 1 << 20)
    runner.attach(5, memoryview(memory))
    assert runner._arenas[5].is_pinned()
    with pytest.raises(BufferError):
        memory.close()
    runner.detach(5)
    gc.collect()
    memory.close()
    again = mmap.mmap(-1, 1 << 20)
    runner.attach(5, memoryview(again))  # the number and, likely, the address are free again
    runner.detach(5)


def test_an_arena_that_cannot_be_page_locked_gives_the_same_features(
    runner: CudaRunner, arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = arena.request(runner.info, SHAPE, picture(224, 224, count=4), FeatureSpec(FINAL, "float32"))
    serve(runner, SHAPE, rows)
    expected = [arena.features(runner.info, SHAPE, row) for row in rows]
    cudart = torch.cuda.cudart()

    def cannot(address: int, size: int, flags: int) -> object:
        return cudart.cudaHostRegister(0, size, flags)  # a real CUDA error, which CUDA also stores as its last one

    with monkeypatch.context() as patched:
        patched.setattr(
            torch.cuda,
            "cudart",
            lambda: SimpleNamespace(cudaHostRegister=cannot, cudaHostUnregister=cudart.cudaHostUnregister),
        )
        pageable = Arena(5, len(arena.memory))
        runner.attach(5, memoryview(pageable.memory))
    try:
        assert not runner._arenas[5].is_pinned()
        torch.ones(1, device="cuda")  # raises if the error is still stored
        again = pageable.request(runner.info, SHAPE, picture(224, 224, count=4), FeatureSpec(FINAL, "float32"))
        serve(runner, SHAPE, again)
        for row, features in zip(again, expected, strict=True):
            for actual, other in zip(pageable.features(runner.info, SHAPE, row), features, strict=True):
                assert torch.equal(actual, other)
    finally:
        runner.detach(5)


def test_a_batch_that_does_not_fit_leaves_the_memory_for_a_smaller_one(runner: CudaRunner, arena: Arena) -> None:
    large = PixelShape(1024, 1024, "uint8")
    rows = arena.request(runner.info, large, picture(1024, 1024, count=8), FeatureSpec((Output("cls"),), "float32"))
    torch.cuda.empty_cache()
    total = runner.memory()["total"]
    before = runner.memory()["allocated"]
    # Room for one image's activations but not for eight: their hidden values, before and after GELU, are 202 MB.
    torch.cuda.set_per_process_memory_fraction((runner.memory()["reserved"] + (200 << 20)) / total)
    try:
        with pytest.raises(DeviceOutOfMemory):
            serve(runner, large, rows)
        # What stays is the slot's pixel buffer, 24 MB.
        assert runner.memory()["allocated"] <= before + large.nbytes * len(rows)
        assert serve(runner, large, rows[:1]).finite == (True,)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert serve(runner, large, rows).finite == (True,) * 8
