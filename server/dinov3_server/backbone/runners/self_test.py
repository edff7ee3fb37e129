"""Runs single images through a runner, before it serves requests."""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

from dinov3_server.backbone.runners.base import TORCH_DTYPES, TorchRunner
from dinov3_server.models.interface import Batch, FeatureSpec, PixelShape, Row

_ARENA = -1
_ALIGNMENT = 64


def run_image(runner: TorchRunner, pixels: Tensor, spec: FeatureSpec) -> list[Tensor]:
    """Return the output buffers of `spec` for one image, [H, W, 3] uint8 or [3, H, W] fp32.

    The image takes the whole path of a batch: pixels in an arena, launch, finish, features in an arena.
    """
    if pixels.dtype == torch.uint8:
        shape = PixelShape(pixels.shape[0], pixels.shape[1], "uint8")
    else:
        shape = PixelShape(pixels.shape[1], pixels.shape[2], "float32")
    buffers = runner.info.output_buffers(spec, shape)
    sizes = [shape.nbytes, *(buffer.nbytes for buffer in buffers)]
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + math.ceil(size / _ALIGNMENT) * _ALIGNMENT)
    with mmap.mmap(-1, offsets[-1]) as arena:
        arena[: shape.nbytes] = pixels.numpy().tobytes()
        runner.attach(_ARENA, memoryview(arena))
        try:
            row = Row(_ARENA, pixel_offset=0, output_offsets=tuple(offsets[1:-1]), spec=spec)
            runner.finish(runner.launch(Batch(shape, (row,))))
        finally:
            runner.detach(_ARENA)
        copies = [bytearray(arena[start : start + size]) for start, size in zip(offsets[1:-1], sizes[1:], strict=True)]
    return [
        torch.frombuffer(copy, dtype=TORCH_DTYPES[buffer.dtype]).view(buffer.shape)
        for copy, buffer in zip(copies, buffers, strict=True)
    ]
