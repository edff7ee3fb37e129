"""A numpy reference of postprocessing, from the definitions alone: pooling as matrices, quantization by token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from dinov3_server.models.interface import OutputSpec

Floats = NDArray[np.float32]
DTYPES = {"float32": np.dtype("float32"), "float16": np.dtype("float16"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def postprocess(
    features: Floats, spec: OutputSpec, grid: tuple[int, int], projections: Mapping[str, Floats]
) -> list[NDArray[Any]]:
    """Return the output buffers of one row; `features` are [D] (cls) or [tokens, D], `grid` is that of the patches."""
    if spec.pooling:
        method, rows, columns = spec.pooling
        weights = _area if method == "area" else _bilinear
        cells = features.reshape(*grid, -1)
        pooled = np.einsum("ih,jw,hwd->ijd", weights(grid[0], rows), weights(grid[1], columns), cells)
        features, grid = pooled.astype(np.float32).reshape(rows * columns, -1), (rows, columns)
    if spec.projection:
        features = features @ projections[spec.projection].T
    if spec.dtype == "int8":
        scales = np.abs(features).max(-1) / np.float32(127)
        values = np.rint(features / np.where(scales == 0, 1, scales)[..., None]).astype(np.int8)
        return [_laid_out(values, spec, grid), scales]
    return [_laid_out(features.astype(DTYPES[spec.dtype]), spec, grid)]


def _laid_out(tokens: NDArray[Any], spec: OutputSpec, grid: tuple[int, int]) -> NDArray[Any]:
    return tokens.T.reshape(-1, *grid) if spec.channels_first else tokens


def _area(size: int, cells: int) -> Floats:
    """Return [cells, size] weights: each cell is the mean of the pixels that it covers, in whole or in part."""
    weights = np.zeros((cells, size), np.float32)
    for cell in range(cells):
        covered = slice(cell * size // cells, math.ceil((cell + 1) * size / cells))
        weights[cell, covered] = 1
    return weights / weights.sum(1, keepdims=True)


def _bilinear(size: int, cells: int) -> Floats:
    """Return [cells, size] weights: each cell interpolates between the two neighbors of its center."""
    weights = np.zeros((cells, size), np.float32)
    for cell in range(cells):
        place = max((cell + 0.5) * size / cells - 0.5, 0)
        before = int(place)
        weights[cell, before] += 1 - (place - before)
        weights[cell, min(before + 1, size - 1)] += place - before
    return weights
