"""Rotary position embedding of DINOv3: axial, on patch tokens only, from coordinates normalized to [-1, 1].

With P patches of a grid of h rows and w columns, head dimension d and d/4 periods, a patch centered at
(y, x) in [-1, 1]^2 has d/2 angles, `2 pi y / periods` then `2 pi x / periods`; channel j of a query or
key head is rotated against channel j + d/2 by angle j (the DINOv3 paper, section 3.2; RoFormer,
arXiv:2104.09864). `interleave` makes the two channels of each pair adjacent, so that a rotation is one
complex multiplication; the same permutation of queries and keys leaves their products unchanged.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

# Grids whose rotations are cached; those of the largest common one (ViT-7B at 1024 px: 4096 patches) take 2 MB.
_CACHED_GRIDS = 64


def default_periods(head_dim: int, base: float) -> Tensor:
    """Return the [d/4] fp32 periods of the official checkpoints, which store them rounded to bfloat16."""
    exponents = 2 * torch.arange(head_dim // 4, dtype=torch.float32) / (head_dim // 2)
    return (base**exponents).bfloat16().float()


class Rope:
    """Rotations for any grid, on the device of `periods` [d/4] fp32, with an LRU cache."""

    def __init__(self, periods: Tensor) -> None:
        self.periods = periods
        self.rotations = functools.lru_cache(maxsize=_CACHED_GRIDS)(self._rotations)

    def _rotations(self, rows: int, columns: int) -> Tensor:
        """Return [P, 1, 1, d/2] complex64 numbers of modulus 1, patches in row-major order."""
        # Computed on the device: a copy from the host would delay the first batch of a shape.
        y = _centres(rows, self.periods)[:, None, None] / self.periods  # [h, 1, d/4]
        x = _centres(columns, self.periods)[None, :, None] / self.periods  # [1, w, d/4]
        shape = (rows, columns, self.periods.numel())
        angles = torch.cat((y.expand(shape), x.expand(shape)), dim=-1).flatten(0, 1)
        return torch.polar(torch.ones_like(angles), angles)[:, None, None]


def _centres(count: int, like: Tensor) -> Tensor:
    """Return 2 pi times the centres of `count` equal parts of [-1, 1]."""
    centres = torch.arange(0.5, count, dtype=torch.float32, device=like.device) / count
    return 2 * math.pi * (2.0 * centres - 1.0)


def interleave(projection: Tensor, heads: int) -> Tensor:
    """Reorder the rows of a [D, ...] query or key projection: channels j and j + d/2 of a head become 2j and 2j + 1."""
    pairs = projection.view(heads, 2, -1, *projection.shape[1:])
    return pairs.transpose(1, 2).reshape(projection.shape)


def rotate_into(out: Tensor, vectors: Tensor, rotations: Tensor) -> None:
    """Rotate interleaved [B, P, ..., d] queries or keys into `out`, of the same shape and dtype, or `vectors` itself.

    Computes in fp32 whatever their dtype, like Meta's code. The last axis of both must be contiguous.
    """
    if out.dtype == torch.float32:
        torch.mul(_complex(vectors), rotations, out=_complex(out))
    else:
        exact = vectors.float()
        _complex(exact).mul_(rotations)
        out.copy_(exact)


def _complex(pairs: Tensor) -> Tensor:
    return torch.view_as_complex(pairs.view(*pairs.shape[:-1], -1, 2))
