"""Our runner in a loop, as a worker drives it: how far copies overlap with forward passes."""

from __future__ import annotations

import mmap
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from bench.gpu import models
from bench.gpu.plan import SPECS, Config, Plan
from dinov3_server.backbone.runners.base import TorchRunner
from dinov3_server.backbone.runners.cpu import CpuRunner
from dinov3_server.backbone.runners.cuda import CudaRunner
from dinov3_server.backbone.runners.cuda_graphs import CAPTURE_AT
from dinov3_server.engine.block import Block
from dinov3_server.families.dinov3_vit.model import VisionTransformer
from dinov3_server.models.interface import Batch, BatchResult, FeatureSpec, ModelInfo, PixelShape, Row

Add = Callable[[dict[str, Any]], None]
ARENA = 0


def pipeline(plan: Plan, add: Add) -> None:
    """Run batches of one request each, as many in flight as the runner allows. The runner's stage times (by the
    device's clock) are given as shares of the wall time: a sum above one, with a forward share near one, shows the
    overlap."""
    model = models.native_model(plan, plan.service.variant)
    for name, spec in SPECS.items():
        runner = (CudaRunner if plan.device.type == "cuda" else CpuRunner)(model, _info(plan, model))
        add({"outputs": name, **_loop(plan, runner, plan.service, spec)})
        runner.close()


def _loop(plan: Plan, runner: TorchRunner, config: Config, spec: FeatureSpec) -> dict[str, Any]:
    shape = PixelShape(config.size, config.size, "uint8")
    blocks = [Block.plan(runner.info, shape, config.batch, spec)]
    for _ in range(runner.pipeline_depth):  # one more than in flight, so that none is written while it is read
        blocks.append(Block.plan(runner.info, shape, config.batch, spec, base=blocks[-1].end))
    memory = mmap.mmap(-1, blocks[-1].end)
    generator = torch.Generator().manual_seed(0)
    for block in blocks:
        pixels = torch.randint(0, 256, (config.batch * shape.nbytes,), dtype=torch.uint8, generator=generator)
        memory[block.pixel_offset : block.pixel_offset + len(pixels)] = pixels.numpy().tobytes()
    runner.attach(ARENA, memoryview(memory))
    batches = [
        Batch(
            shape,
            tuple(
                Row(ARENA, block.row_pixel_offset(i), block.row_output_offsets(i), spec) for i in range(config.batch)
            ),
        )
        for block in blocks
    ]
    for _ in range(CAPTURE_AT):
        runner.finish(runner.launch(batches[0]))
    flying = deque(runner.launch(batches[i]) for i in range(runner.pipeline_depth))
    finished: list[BatchResult] = []
    since = time.perf_counter()
    while (elapsed := time.perf_counter() - since) < 10 * plan.seconds or len(finished) < 3:
        finished.append(runner.finish(flying.popleft()))
        flying.append(runner.launch(batches[(len(finished) + runner.pipeline_depth - 1) % len(batches)]))
    while flying:
        runner.finish(flying.popleft())
    shares = {
        f"{stage}_share": round(sum(getattr(one, stage) for one in finished) / elapsed, 4)
        for stage in ("copy_in", "forward", "copy_out")
    }
    return {
        "model": config.model,
        "size": config.size,
        "batch": config.batch,
        "images_per_second": round(len(finished) * config.batch / elapsed, 1),
        "copied_in_bytes": config.batch * shape.nbytes,
        "copied_out_bytes": config.batch * sum(blocks[0].strides),
        **shares,
        "sum_of_shares": round(sum(shares.values()), 4),
    }


def _info(plan: Plan, model: VisionTransformer) -> ModelInfo:
    variant = model.variant
    return ModelInfo(
        name=variant.name,
        weights="random:0",
        random_weights=True,
        fingerprint="",
        dtype="bfloat16" if plan.dtype == torch.bfloat16 else "float32",
        device=str(plan.device),
        layer_dims=variant.layer_dims,
        layer_strides=variant.layer_strides,
        register_tokens=variant.registers,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        parameters=variant.parameters,
    )
