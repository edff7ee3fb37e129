"""The model alone, in images a second: our runner beside three baselines, one batch of each in turn per round.

- `ours`: pixels gathered from an arena as uint8, normalized, the forward pass, CLS and patches written into the arena
  as bfloat16, the check that they are finite.
- `eager`: transformers' DINOv3ViTModel with its sdpa attention; `compiled`: the same with torch.compile for the one
  shape; `upstream`: Meta's own model, if DINOV3_UPSTREAM names a copy of its repository. Of these only the forward
  pass, on normalized pixels in the model's dtype.

All run in one thread of one process and share its malloc, which our runner sets to keep freed memory; eager gains from
that, too. Seeded random weights. A configuration is measured for SECONDS after one batch of each as a warm-up, for at
least MINIMUM rounds unless the first takes LONG; the HEAVIEST only beside eager. Rates are of the median batch;
`ours/x` is the median over rounds of x's time over ours.

`linears` is the limit set by the matrix products: all dense layers of a forward pass as our model has them, packed,
each with its own weights, one after another on prepared inputs, without attention, GELU or residuals.
"""

from __future__ import annotations

import itertools
import mmap
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.record import table
from bench.reference import transformers_model, upstream_checkout, upstream_commit, upstream_model
from dinov3_server.backbone.runner import build
from dinov3_server.backbone.runners.base import TORCH_DTYPES, TorchRunner
from dinov3_server.engine.block import Block
from dinov3_server.families.dinov3_vit.variants import VITS, VitVariant
from dinov3_server.models.interface import Batch, FeatureSpec, Output, PixelShape, Row
from dinov3_server.nn.linear import linear

MODELS = ("vits16", "vitb16")
DTYPES = ("float32", "bfloat16")
SIZES = (224, 512)
BATCHES = (1, 8, 32)
BASELINES = ("eager", "compiled", "upstream")
SECONDS = 6.0
MINIMUM = 2
LONG = 20.0
HEAVIEST = ("vitb16", 512, 32)

SPEC = FeatureSpec((Output("cls"), Output("patches")), "bfloat16")
Work = Callable[[], None]


def measure() -> dict[str, Any]:
    absent = absent_baselines()
    rows: list[dict[str, Any]] = []
    limits: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        checkout = None if "upstream" in absent else upstream_checkout(Path(scratch))
        for name, dtype in itertools.product(MODELS, DTYPES):
            runner = build(name, "random:0", dtype=dtype, device="cpu")
            variant, torch_dtype = VITS[f"dinov3_{name}"], TORCH_DTYPES[runner.info.dtype]
            baselines = baseline_models(variant, torch_dtype, checkout)
            for size, images in itertools.product(SIZES, BATCHES):
                where = {"model": name, "dtype": dtype, "size": size, "batch": images}
                ours = our_batch(runner, size, images)
                theirs = baseline_batches(baselines, torch_dtype, size, images, compiled="compiled" not in absent)
                if (name, size, images) == HEAVIEST:
                    theirs = {"eager": theirs["eager"]}
                rows.append(where | in_turn({"ours": ours, **theirs}, images))
                print(rows[-1], flush=True)
                if (size, images) == (224, 8):
                    limit = linears(variant, torch_dtype, size, images)
                    limits.append(where | in_turn({"ours": ours, "linears": limit}, images))
                    print(limits[-1], flush=True)
    return {"absent": absent, "upstream_commit": upstream_commit(), "rows": rows, "linears": limits}


def absent_baselines() -> dict[str, str]:
    """Return the baselines that cannot run here, and why."""
    absent: dict[str, str] = {}
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        absent["compiled"] = f"torch.compile needs a C++ compiler, and there is no {compiler}"
    if "DINOV3_UPSTREAM" not in os.environ:
        absent["upstream"] = "DINOV3_UPSTREAM names no copy of Meta's repository"
    return absent


def show(result: dict[str, Any]) -> str:
    present = [baseline for baseline in BASELINES if baseline not in result["absent"]]
    where = ("model", "dtype", "size", "batch")
    figures = [*present, *(f"ours/{baseline}" for baseline in present)]
    return "\n\n".join(
        (
            table([dict.fromkeys(figures, "") | row for row in result["rows"]], *where, "ours", *figures),
            table(result["linears"], *where, "ours", "linears", "ours/linears"),
            *(f"no {baseline}: {reason}" for baseline, reason in result["absent"].items()),
        )
    )


def in_turn(works: Mapping[str, Work], images: int) -> dict[str, Any]:
    """Measure rounds of one batch of each work. Return the images/s of each, and the median ratio of the first to
    each."""
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    first, *others = works
    begun = time.perf_counter()
    while (elapsed := time.perf_counter() - begun) < SECONDS or (len(times[first]) < MINIMUM and elapsed < LONG):
        for name, work in works.items():
            since = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - since)
    ratios = {
        f"{first}/{other}": statistics.median(b / a for a, b in zip(times[first], times[other], strict=True))
        for other in others
    }
    return {
        "rounds": len(times[first]),
        **{name: round(images / statistics.median(taken), 3) for name, taken in times.items()},
        **{name: round(ratio, 3) for name, ratio in ratios.items()},
    }


def our_batch(runner: TorchRunner, size: int, images: int) -> Work:
    """Return a work that runs one batch through the runner, from its own arena and back into it."""
    shape = PixelShape(size, size, "uint8")
    block = Block.plan(runner.info, shape, images, SPEC)
    memory = mmap.mmap(-1, block.end)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images * shape.nbytes,), dtype=torch.uint8, generator=generator)
    memory[: images * shape.nbytes] = pixels.numpy().tobytes()
    arena = size * 1000 + images
    runner.attach(arena, memoryview(memory))
    batch = Batch(
        shape, tuple(Row(arena, block.row_pixel_offset(i), block.row_output_offsets(i), SPEC) for i in range(images))
    )

    def work() -> None:
        assert all(runner.finish(runner.launch(batch)).finite)

    return work


def baseline_models(
    variant: VitVariant, dtype: torch.dtype, checkout: Path | None
) -> dict[str, Callable[[Tensor], object]]:
    """Return eager forward passes that compute CLS and patches of the last layer."""
    models: dict[str, Callable[[Tensor], object]] = {"eager": transformers_model(variant, dtype)}
    if checkout is not None:
        models["upstream"] = upstream_model(checkout, variant, dtype).forward_features
    return models


def baseline_batches(
    models: Mapping[str, Callable[[Tensor], object]], dtype: torch.dtype, size: int, images: int, *, compiled: bool
) -> dict[str, Work]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(images, 3, size, size, generator=generator).to(dtype)

    def forward(model: Callable[[Tensor], object]) -> Work:
        def work() -> None:
            with torch.inference_mode():
                model(pixels)

        return work

    works = {name: forward(model) for name, model in models.items()}
    if compiled:
        # Reset for each shape: after eight shapes torch.compile would silently fall back to eager mode.
        torch.compiler.reset()
        works["compiled"] = forward(torch.compile(models["eager"], dynamic=False))
    return {baseline: works[baseline] for baseline in BASELINES if baseline in works}


def linears(variant: VitVariant, dtype: torch.dtype, size: int, images: int) -> Work:
    """Return a work that runs the dense layers of one forward pass and discards their outputs."""
    width, hidden, patches = variant.embed_dim, variant.ffn_dim, (size // variant.patch_size) ** 2
    tokens = 1 + variant.registers + patches
    block = [(width, 3 * width), (width, width), (width, hidden), (hidden, width)]
    embedding = (3 * variant.patch_size**2, width)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    inputs = {inside: random(images, tokens, inside) for inside, _ in block}
    layers = [(linear(random(*reversed(embedding)), random(width)), random(images, patches, embedding[0]))]
    for inside, outside in block * variant.depth:
        layers.append((linear(random(outside, inside), random(outside)), inputs[inside]))

    def work() -> None:
        with torch.inference_mode():
            for layer, x in layers:
                layer(x)

    return work
