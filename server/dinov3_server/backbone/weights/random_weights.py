"""Draws seeded weights, for demonstrations and tests: the features mean nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from dinov3_server.models.variant import Variant

# With queries and keys as small as the rest, attention would be uniform and a wrong RoPE would not be noticed.
_QUERY_KEY_STD = 0.08
_STD = 0.02
_GAMMA = 0.5
_NORM_STD = 0.1


def random_tensors(variant: Variant, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Draw canonical tensors in a fixed order: the same for the same variant, seed and dtype."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in variant.canonical_shapes().items():
        if name.endswith(".gamma"):
            tensors[name] = torch.full(shape, _GAMMA, dtype=dtype)
            continue
        is_norm_weight = name.endswith(".weight") and len(shape) == 1
        is_query_key = name.endswith(("attn.q.weight", "attn.k.weight"))
        std = _NORM_STD if is_norm_weight else _QUERY_KEY_STD if is_query_key else _STD
        drawn = torch.empty(shape, dtype=dtype).normal_(0.0, std, generator=generator)
        tensors[name] = drawn.add_(1.0) if is_norm_weight else drawn
    return tensors
