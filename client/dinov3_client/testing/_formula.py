"""Features by a formula of the pixels, with the service's pooling, projection and quantization."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinov3_client._model import Model
from dinov3_client._request import Pooling
from dinov3_client.testing._model import MODEL
from dinov3_client.testing._projection import GivenProjection, read_projection
from dinov3_serving.features import TokenKind

Array = NDArray[Any]


def expected(
    pixels: Array,
    kind: TokenKind,
    *,
    layer: int | None = None,
    norm: bool = True,
    pooling: Pooling | tuple[int, int] | None = None,
    projection: GivenProjection | None = None,
    model: Model = MODEL,
) -> NDArray[np.float32]:
    """Return the features of a `FakeServer` for one model input: [D] for "cls", else [tokens, D], row-major.

    pixels: the model's input, after crop, resize and flip: uint8 [H, W, 3], or float32 [3, H, W].
    layer: 0-based; None is the last one. norm: with the final norm.
    pooling, projection: applied to patches; the projection as it was given to the FakeServer.

    Let x be the pixels in 0..1 (float32 ones as they are), and s[p] the six numbers of a patch p (a square of
    `model.layer_strides[layer]` pixels): the means of its R, G and B, then their standard deviations. With g =
    (layer + 1) / depth, twice that without norm,

        patches[p, d] = g * sum over k = 0..5 of s[p, k] * cos((k + 1) * (d + 1))
        cls[d] = mean over p of patches[p, d]
        registers[r, d] = (r + 1) * cls[d]

    computed in float64.
    """
    index = model.depth - 1 if layer is None else layer
    side = model.layer_strides[index]
    image = pixels / 255 if pixels.dtype == np.uint8 else pixels.transpose(1, 2, 0).astype(np.float64)
    rows, columns = image.shape[0] // side, image.shape[1] // side
    cells = image.reshape(rows, side, columns, side, 3).transpose(0, 2, 1, 3, 4).reshape(rows * columns, -1, 3)
    statistics = np.concatenate([cells.mean(1), cells.std(1)], 1)
    mix = np.cos(np.outer(np.arange(1, 7), np.arange(1, model.layer_dims[index] + 1)))
    gain = (index + 1) / model.depth * (1 if norm else 2)
    patches: NDArray[np.float64] = gain * (statistics @ mix)
    cls: NDArray[np.float64] = patches.mean(0)
    if kind == "cls":
        return cls.astype(np.float32)
    if kind == "registers":
        return np.outer(np.arange(1, model.register_tokens + 1), cls).astype(np.float32)
    tokens = patches.astype(np.float32)
    if pooling is not None:
        tokens = _pooled(tokens.reshape(rows, columns, -1), pooling)
    return tokens if projection is None else read_projection(projection)(tokens)


def _pooled(cells: NDArray[np.float32], pooling: Pooling | tuple[int, int]) -> NDArray[np.float32]:
    """Pool patches [rows, columns, D] to [cells of the grid, D]."""
    pooling = pooling if isinstance(pooling, Pooling) else Pooling(pooling)
    weights = _area if pooling.method == "area" else _bilinear
    down, across = (weights(size, to) for size, to in zip(cells.shape, pooling.grid, strict=False))
    resampled: Array = np.einsum("ih,jw,hwd->ijd", down, across, cells, dtype=np.float64)
    return resampled.reshape(-1, cells.shape[-1]).astype(np.float32)


def quantized(values: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return int8 values and one scale per token, with channels on the last axis: feature = value * scale."""
    scales = np.abs(values).max(-1) / np.float32(127)
    steps = np.divide(values, scales[..., None], out=np.zeros_like(values), where=scales[..., None] > 0)
    return np.rint(steps).astype(np.int8), scales.astype(np.float32)


def _area(size: int, cells: int) -> NDArray[np.float64]:
    """Return weights [cells, size] as of torch's adaptive_avg_pool2d: the mean of what a cell covers, even partly."""
    weights = np.zeros((cells, size))
    for cell in range(cells):
        start, end = cell * size // cells, -(-(cell + 1) * size // cells)
        weights[cell, start:end] = 1 / (end - start)
    return weights


def _bilinear(size: int, cells: int) -> NDArray[np.float64]:
    """Return weights [cells, size] as of torch's interpolate(mode="bilinear", align_corners=False)."""
    weights = np.zeros((cells, size))
    for cell in range(cells):
        at = max((cell + 0.5) * size / cells - 0.5, 0.0)
        before = int(at)
        weights[cell, before] += 1 - (at - before)
        weights[cell, min(before + 1, size - 1)] += at - before
    return weights
