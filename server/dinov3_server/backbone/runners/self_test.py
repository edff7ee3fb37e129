"""One image through a runner, the way that a batch goes, before anybody is served."""

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
    """Features of one image, [H, W, 3] uint8 or [3, H, W] fp32: the sections of `spec` (see
    ModelInfo), each in its dtype."""
    if pixels.dtype == torch.uint8:
        shape = PixelShape(pixels.shape[0], pixels.shape[1], "uint8")
    else:
        shape = PixelShape(pixels.shape[1], pixels.shape[2], "float32")
    sections = runner.info.sections(spec, shape)
    sizes = [shape.nbytes, *(section.nbytes for section in sections)]
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + math.ceil(size / _ALIGNMENT) * _ALIGNMENT)
    with mmap.mmap(-1, offsets[-1]) as arena:
        arena[: shape.nbytes] = pixels.numpy().tobytes()
        runner.attach(_ARENA, memoryview(arena))
        try:
            row = Row(_ARENA, pixels=0, sections=tuple(offsets[1:-1]), spec=spec)
            runner.finish(runner.launch(Batch(shape, (row,))))
        finally:
            runner.detach(_ARENA)
        return [
            torch.frombuffer(bytearray(arena[start : start + size]), dtype=TORCH_DTYPES[section.dtype]).view(
                section.shape
            )
            for section, start, size in zip(sections, offsets[1:-1], sizes[1:], strict=True)
        ]
