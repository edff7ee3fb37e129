"""Softmax attention, by the kernel that is fastest for where the tensors are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Scores held at a time, in elements: 8 MB in bfloat16, so that they stay in the cache of a core complex.
_SCORES = 1 << 22


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T) v of [B, h, t, d] queries, scaled already, and [B, h, T, d] keys and values: [B, t, h d]."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return _by_products(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2).flatten(2)


def _by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """An image at a time by oneDNN's matrix products, where torch's fused CPU kernel is half as fast in bfloat16.

    Scores and probabilities are rounded to bfloat16 in between; the softmax itself is computed in fp32.
    """
    images, heads, queries, width = q.shape
    tokens = k.shape[2]
    attended = q.new_empty(images, queries, heads, width)
    step = min(queries, max(1, _SCORES // (heads * tokens)))
    buffer = q.new_empty(heads * step * tokens)
    for image in range(images):
        keys = k[image].transpose(1, 2)
        for first in range(0, queries, step):
            chunk = q[image, :, first : first + step]
            scores = buffer[: heads * chunk.shape[1] * tokens].view(heads, -1, tokens)
            torch.bmm(chunk, keys, out=scores)
            torch.softmax(scores, -1, out=scores)
            attended[image, first : first + step] = torch.bmm(scores, v[image]).transpose(0, 1)
    return attended.flatten(2)
