"""Runs single images through a runner, before it serves requests."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

from dinov3_server.backbone.runners.base import TORCH_DTYPES, TorchRunner
from dinov3_server.engine.block import Block
from dinov3_server.models.interface import Batch, FeatureSpec, PixelShape, Row

_ARENA = -1


def run_image(runner: TorchRunner, pixels: Tensor, spec: FeatureSpec) -> list[Tensor]:
    """Return the output buffers of `spec` for one image, [H, W, 3] uint8 or [3, H, W] fp32.

    The image takes the whole path of a batch: pixels in an arena, launch, finish, features in an arena.
    """
    if pixels.dtype == torch.uint8:
        shape = PixelShape(pixels.shape[0], pixels.shape[1], "uint8")
    else:
        shape = PixelShape(pixels.shape[1], pixels.shape[2], "float32")
    block = Block.plan(runner.info, shape, 1, spec)
    with mmap.mmap(-1, block.end) as arena:
        arena[: shape.nbytes] = pixels.numpy().tobytes()
        runner.attach(_ARENA, memoryview(arena))
        try:
            row = Row(_ARENA, block.pixel_offset, block.output_offsets, spec)
            runner.finish(runner.launch(Batch(shape, (row,))))
        finally:
            runner.detach(_ARENA)
        return [
            torch.frombuffer(bytearray(arena[start : start + buffer.nbytes]), dtype=TORCH_DTYPES[buffer.dtype]).view(
                buffer.shape
            )
            for start, buffer in zip(block.output_offsets, runner.info.output_buffers(spec, shape), strict=True)
        ]
