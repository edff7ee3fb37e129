"""Arenas, filled like a frontend does. Needs only torch."""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

from dinov3_server.backbone.runners.base import TORCH_DTYPES
from dinov3_server.models.interface import Batch, BatchResult, FeatureSpec, ModelInfo, PixelShape, Row, Runner


class Arena:
    """Memory that hands out consecutive ranges, and reads features back."""

    def __init__(self, number: int, size: int = 1 << 20) -> None:
        self.number = number
        self.memory = mmap.mmap(-1, size)
        self.memory[:] = b"\xee" * size
        self.end = 0

    def take(self, nbytes: int) -> int:
        start = self.end
        self.end += -(-nbytes // 64) * 64
        return start

    def request(self, info: ModelInfo, shape: PixelShape, pixels: Tensor, spec: FeatureSpec) -> list[Row]:
        """Rows for [n, ...] pixels, with contiguous pixels and output buffers."""
        count = pixels.shape[0]
        start = self.take(count * shape.nbytes)
        self.memory[start : start + count * shape.nbytes] = pixels.contiguous().numpy().tobytes()
        sizes = [buffer.nbytes for buffer in info.output_buffers(spec, shape)]
        places = [self.take(count * size) for size in sizes]
        return [
            Row(
                self.number,
                start + i * shape.nbytes,
                tuple(place + i * size for place, size in zip(places, sizes, strict=True)),
                spec,
            )
            for i in range(count)
        ]

    def features(self, info: ModelInfo, shape: PixelShape, row: Row) -> list[Tensor]:
        """A copy of a row's outputs, each [tokens, D] fp32 (or [D rows, columns]), dequantized."""
        found: list[Tensor] = []
        for buffer, offset in zip(info.output_buffers(row.spec, shape), row.output_offsets, strict=True):
            dtype = TORCH_DTYPES[buffer.dtype]
            values = torch.frombuffer(self.memory, dtype=dtype, count=math.prod(buffer.shape), offset=offset)
            if row.spec.dtype == "int8" and buffer.dtype == "float32":  # the scales of the values before them
                first = row.spec.output_spec(buffer.output).channels_first
                found[-1] *= values.view(found[-1].shape[1:]) if first else values.view(buffer.shape).unsqueeze(-1)
            else:
                found.append(values.view(buffer.shape).float())
        return [values.reshape(-1, values.shape[-1]).clone() for values in found]


def serve(served: Runner, shape: PixelShape, rows: list[Row]) -> BatchResult:
    return served.finish(served.launch(Batch(shape, tuple(rows))))
