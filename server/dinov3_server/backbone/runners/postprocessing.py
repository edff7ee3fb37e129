"""Postprocessing of features: pooling, projection, layout and int8 quantization, in float32 on the device.

Each distinct step runs once per batch: requests with the same pooling share its result.

Shapes: B rows, P patches of h x w, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3_server.models.interface import Output, OutputSpec, Pooling

_INT8_MAX = 127  # symmetric: -128 is not used
_Step: TypeAlias = tuple[Output, Pooling | None, str | None]  # the last is the name of a projection


@dataclass(frozen=True)
class LinearMap:
    """y = weight x + bias for x [..., D], with weight [K, D] and bias [K] in float32."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def to(self, device: torch.device) -> LinearMap:
        return LinearMap(self.weight.to(device), self.bias.to(device))


@dataclass(eq=False)
class Postprocessing:
    """Computes output buffers from one batch's `features` (as returned by `Model`). Never waits for the device.

    `grid` returns h and w of a layer's patches (the layer is as in Output); `projections` are on the features' device.
    """

    features: Mapping[Output, Tensor]
    grid: Callable[[int | None], tuple[int, int]]
    projections: Mapping[str, LinearMap]
    _tokens: dict[_Step, Tensor] = field(default_factory=dict)
    _quantized: dict[_Step, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def buffers(self, spec: OutputSpec) -> list[Tensor]:
        """Return the output buffers of all rows for `spec` (see `ModelInfo.output_buffers`).

        All but int8 values are float32, whatever `spec.dtype`, and may be views: the caller's copy converts them.
        """
        tokens = self._projected(spec.output, spec.pooling, spec.projection)
        if spec.dtype != "int8":
            return [self._laid_out(tokens, spec)]
        key = (spec.output, spec.pooling, spec.projection)
        if key not in self._quantized:
            self._quantized[key] = quantize(tokens)
        values, scales = self._quantized[key]
        return [self._laid_out(values, spec), scales]

    def before_pooling(self, spec: OutputSpec) -> list[Tensor]:
        """Return the features that `spec` pools: they must be finite too, as pooling may skip patches."""
        return [self.features[spec.output]] if spec.pooling else []

    def _projected(self, output: Output, pooling: Pooling | None, projection: str | None) -> Tensor:
        """Return pooled and projected tokens: [B, D] (cls) or [B, tokens, D]."""
        if pooling is None and projection is None:
            return self.features[output]
        key = (output, pooling, projection)
        if key not in self._tokens:
            if projection is not None:
                self._tokens[key] = self.projections[projection](self._projected(output, pooling, None))
            else:
                assert pooling is not None
                self._tokens[key] = pool(self.features[output], self.grid(output.layer), pooling)
        return self._tokens[key]

    def _laid_out(self, tokens: Tensor, spec: OutputSpec) -> Tensor:
        if not spec.channels_first:
            return tokens
        grid = spec.pooling[1:] if spec.pooling else self.grid(spec.output.layer)
        return tokens.transpose(1, 2).reshape(len(tokens), -1, *grid)


def pool(patches: Tensor, grid: tuple[int, int], pooling: Pooling) -> Tensor:
    """Resample [B, h w, D] patches to [B, rows columns, D]; `grid` is h, w."""
    cells = patches.transpose(1, 2).reshape(len(patches), -1, *grid)
    size = (pooling.rows, pooling.columns)
    if pooling.method == "area":
        cells = F.adaptive_avg_pool2d(cells, size)
    else:
        cells = F.interpolate(cells, size, mode="bilinear", align_corners=False)
    return cells.flatten(2).transpose(1, 2)


def quantize(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Convert [..., D] to int8 values [..., D] and float32 scales [...], as OutputSpec defines them.

    The scale of a token that is not finite is not finite.
    """
    scales = tokens.abs().amax(dim=-1) / _INT8_MAX
    # Divide instead of multiplying by 1 / scale, which overflows for tiny scales. For a token of zeros, divide by 1.
    steps = scales.masked_fill(scales == 0, 1.0).unsqueeze(-1)
    return (tokens / steps).round_().clamp_(-_INT8_MAX, _INT8_MAX).to(torch.int8), scales
