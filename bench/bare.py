"""The model alone: our runner in a loop beside transformers' eager model, batch by batch in turn.

In ours: pixels gathered from an arena as uint8, normalised, the forward pass, CLS and patches written into the arena
as bfloat16, the check that they are finite. In transformers': the forward pass on pixels that are normalised already,
nothing else. Seeded random weights; the clock is wall time; a ratio is taken of each pair of neighbouring batches, and
the median of them reported.
"""

from __future__ import annotations

import mmap
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import DINOv3ViTModel

from bench.record import table
from bench.reference import transformers_model
from dinov3_server.backbone.interface import Batch, FeatureSpec, Output, PixelShape, Row
from dinov3_server.backbone.registry import lookup
from dinov3_server.backbone.runner import build
from dinov3_server.backbone.torch_runner import TORCH_DTYPES, TorchRunner
from dinov3_server.engine.block import Block

SPEC = FeatureSpec((Output("cls"), Output("patches")), "bfloat16")
SECONDS = 6.0  # of batches a leg and configuration, at least MINIMUM pairs
MINIMUM = 5


MODELS = ("vits16",)
SIZES = (224, 512)
BATCHES = (1, 8, 32)


def measure() -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for model in MODELS:
        for dtype in ("float32", "bfloat16"):
            runner = build(model, "random:0", dtype=dtype, device="cpu")
            rival = transformers_model(lookup(model), TORCH_DTYPES[runner.info.dtype])
            for size in SIZES:
                for images in BATCHES:
                    rows.append(
                        {"model": model, "dtype": dtype, "size": size, "batch": images}
                        | pairs(our_batch(runner, size, images), their_batch(rival, size, images), images)
                    )
                    print(rows[-1], flush=True)
    return {"rows": rows}


def show(result: dict[str, Any]) -> str:
    return table(result["rows"], "model", "dtype", "size", "batch", "ours", "transformers_eager", "ratio")


def pairs(ours: Callable[[], None], theirs: Callable[[], None], images: int) -> dict[str, Any]:
    """Images a second of both, and the median ratio of neighbouring batches."""
    for warm_up in (ours, theirs, ours, theirs):
        warm_up()
    mine: list[float] = []
    rivals: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(mine) < MINIMUM or time.perf_counter() < end:
        for work, times in ((ours, mine), (theirs, rivals)):
            since = time.perf_counter()
            work()
            times.append(time.perf_counter() - since)
    return {
        "ours": round(images / statistics.median(mine), 2),
        "transformers_eager": round(images / statistics.median(rivals), 2),
        "ratio": round(statistics.median(theirs / our for theirs, our in zip(rivals, mine, strict=True)), 3),
        "pairs": len(mine),
    }


def our_batch(runner: TorchRunner, size: int, images: int) -> Callable[[], None]:
    shape = PixelShape(size, size, "uint8")
    block = Block.plan(runner.info, shape, images, SPEC)
    memory = mmap.mmap(-1, block.end)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images * shape.nbytes,), dtype=torch.uint8, generator=generator)
    memory[: images * shape.nbytes] = pixels.numpy().tobytes()
    arena = size * 1000 + images
    runner.attach(arena, memoryview(memory))
    batch = Batch(shape, tuple(Row(arena, block.row_pixels(i), block.row_outputs(i), SPEC) for i in range(images)))

    def work() -> None:
        assert all(runner.finish(runner.launch(batch)).finite)

    return work


def their_batch(model: DINOv3ViTModel, size: int, images: int) -> Callable[[], None]:
    pixels = torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(0)).to(model.dtype)

    def work() -> None:
        with torch.inference_mode():
            model(pixels)

    return work
