"""From a model's features to what is sent of them: pooled, projected, laid out, quantised; in float32, on the device.

Every step is done once for a batch, whoever wants it: requests that share a pooling share its result.

Shapes: B rows, P patches of h x w, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3_server.models.interface import Output, Pooling, Wanted

_MOST = 127  # of an int8 value, either way: -128 has no counterpart


@dataclass(frozen=True)
class LinearMap:
    """y = weight x + bias, for x [..., D]: weight [K, D] and bias [K] in float32."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def to(self, device: torch.device) -> LinearMap:
        return LinearMap(self.weight.to(device), self.bias.to(device))


class Postprocessing:
    """What is sent of one batch's `features`, which are as `Model` gives them. Nothing here waits for the device.

    `grid` gives h and w of a layer's patches (the layer is as in Output); `projections` are on the features' device.
    """

    def __init__(
        self,
        features: Mapping[Output, Tensor],
        grid: Callable[[int | None], tuple[int, int]],
        projections: Mapping[str, LinearMap],
    ) -> None:
        self._features = features
        self._grid = grid
        self._projections = projections
        self._tokens: dict[tuple[Output, Pooling | None, str | None], Tensor] = {}
        self._quantised: dict[tuple[Output, Pooling | None, str | None], tuple[Tensor, Tensor]] = {}

    def sections(self, wanted: Wanted) -> list[Tensor]:
        """The sections of `wanted` (`ModelInfo.sections`) of all rows. What is no int8 is still float32, whatever the
        dtype wanted, and any of them may be a view: they are converted by the copy to where they go."""
        tokens = self._projected(wanted.output, wanted.pooling, wanted.projection)
        if wanted.dtype != "int8":
            return [self._laid_out(tokens, wanted)]
        key = (wanted.output, wanted.pooling, wanted.projection)
        if key not in self._quantised:
            self._quantised[key] = quantised(tokens)
        values, scales = self._quantised[key]
        return [self._laid_out(values, wanted), scales]

    def unseen(self, wanted: Wanted) -> list[Tensor]:
        """What must be finite beside the sections: a pooling can pass over patches, and so over what is wrong."""
        return [self._features[wanted.output]] if wanted.pooling else []

    def _projected(self, output: Output, pooling: Pooling | None, projection: str | None) -> Tensor:
        """[B, D] (cls) or [B, tokens, D]."""
        if pooling is None and projection is None:
            return self._features[output]
        key = (output, pooling, projection)
        if key not in self._tokens:
            if projection is not None:
                self._tokens[key] = self._projections[projection](self._projected(output, pooling, None))
            else:
                assert pooling is not None
                self._tokens[key] = pooled(self._features[output], self._grid(output.layer), pooling)
        return self._tokens[key]

    def _laid_out(self, tokens: Tensor, wanted: Wanted) -> Tensor:
        if not wanted.channels_first:
            return tokens
        grid = wanted.pooling[1:] if wanted.pooling else self._grid(wanted.output.layer)
        return tokens.transpose(1, 2).reshape(len(tokens), -1, *grid)


def pooled(patches: Tensor, grid: tuple[int, int], pooling: Pooling) -> Tensor:
    """[B, h w, D] to [B, rows columns, D]; `grid` is h, w."""
    cells = patches.transpose(1, 2).reshape(len(patches), -1, *grid)
    size = (pooling.rows, pooling.columns)
    if pooling.method == "area":
        cells = F.adaptive_avg_pool2d(cells, size)
    else:
        cells = F.interpolate(cells, size, mode="bilinear", align_corners=False)
    return cells.flatten(2).transpose(1, 2)


def quantised(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """[..., D] to int8 values [..., D] and float32 scales [...]; as Wanted has it.

    A token that is not finite has a scale that is not finite.
    """
    scales = tokens.abs().amax(dim=-1) / _MOST
    # A scale can be too small for its inverse; and where all is zero, so is 0 / 1.
    steps = scales.masked_fill(scales == 0, 1.0).unsqueeze(-1)
    return (tokens / steps).round_().clamp_(-_MOST, _MOST).to(torch.int8), scales
