"""Multi-head softmax attention with rotary positions, with the fastest kernels for the tensors' device and dtype.

Shapes: B images, T tokens of which the last P are patches, h heads of d channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3_server.nn.linear import packs
from dinov3_server.nn.rope import rotate_into

# Attention scores held at a time, in elements: 8 MB in bfloat16, so that they stay in the cache of a core complex.
_SCORES = 1 << 22


def attention(qkv: Tensor, rotations: Tensor, queries: int | None = None) -> Tensor:
    """Compute softmax(q k^T) v of the first `queries` tokens, or of all: [B, T, 3, h, d] to [B, queries, h d].

    `qkv` holds queries (already scaled) and keys before rotation, with interleaved channels (see rope.py), and values;
    it may be overwritten. `rotations` [P, 1, 1, d/2] are those of the last P tokens.
    """
    if qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16:
        return _matmul_attention(qkv, rotations, queries)
    if packs(qkv):
        return _convolution_attention(qkv, rotations, queries)
    patches = qkv[:, -rotations.shape[0] :, :2]
    rotate_into(patches, patches, rotations)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, h, T, d]
    return F.scaled_dot_product_attention(q[:, :, :queries], k, v, scale=1.0).transpose(1, 2).flatten(2)


def _matmul_attention(qkv: Tensor, rotations: Tensor, queries: int | None) -> Tensor:
    """Compute attention with oneDNN's matrix products; torch's fused CPU kernel is half as fast in bfloat16.

    Scores and probabilities are rounded to bfloat16; the softmax itself is computed in fp32.
    """
    images, tokens, _, heads, width = qkv.shape
    count = tokens if queries is None else queries
    prefix = tokens - rotations.shape[0]
    # One block per head, as the matrix products need it; the rotation writes into it, so this takes no extra copy.
    by_head = qkv.new_empty(3, images, heads, tokens, width)
    by_token = by_head.permute(1, 3, 0, 2, 4)
    by_token[:, :prefix] = qkv[:, :prefix]
    by_token[:, prefix:, 2] = qkv[:, prefix:, 2]
    rotate_into(by_token[:, prefix:, :2], qkv[:, prefix:, :2], rotations)
    q, k, v = by_head.flatten(1, 2)  # each [B h, T, d]

    attended = qkv.new_empty(images, count, heads, width)
    together, step = _chunk_sizes(heads, count, tokens)
    buffer = qkv.new_empty(min(together, images) * heads * step * tokens)
    for image in range(0, images, together):
        those = slice(image * heads, (image + together) * heads)
        keys, values = k[those].transpose(1, 2), v[those]
        for first in range(0, count, step):
            some = q[those, first : min(first + step, count)]
            scores = buffer[: some.shape[0] * some.shape[1] * tokens].view(*some.shape[:2], tokens)
            torch.bmm(some, keys, out=scores)
            torch.softmax(scores, -1, out=scores)
            products = torch.bmm(scores, values).view(-1, heads, some.shape[1], width)
            attended[image : image + together, first : first + step] = products.transpose(1, 2)
    return attended.flatten(2)


def _convolution_attention(qkv: Tensor, rotations: Tensor, queries: int | None) -> Tensor:
    """Compute attention with oneDNN's 1x1 convolutions, one group per head.

    They are oneDNN's operator for products of many small fp32 matrices. torch's own products use a BLAS that takes 1.5
    times as long on the CPU of docs/performance.md. With channels last, queries, scores and results are token-major.
    """
    images, tokens, _, heads, width = qkv.shape
    count = tokens if queries is None else queries
    k = qkv.new_empty(images, heads, tokens, width)
    _rotate_patches(qkv[:, :, 1], rotations, k.transpose(1, 2))
    v = qkv[:, :, 2].permute(0, 2, 3, 1).contiguous()  # [B, h, d, T]

    attended = qkv.new_empty(images, count, heads, width)
    together, step = _chunk_sizes(heads, count, tokens)
    for image in range(0, images, together):
        those = slice(image, image + together)
        keys, values = k[those].view(-1, width, 1, 1), v[those].view(-1, tokens, 1, 1)
        q = qkv.new_empty(tokens, len(k[those]), heads, width)
        _rotate_patches(qkv[those, :, 0], rotations, q.transpose(0, 1))
        for first in range(0, count, step):
            scores = _grouped_product(q[first : min(first + step, count)].flatten(1, 2), keys)
            torch.softmax(scores, -1, out=scores)
            products = _grouped_product(scores, values).view(-1, len(k[those]), heads, width)
            attended[those, first : first + step] = products.transpose(0, 1)
    return attended.flatten(2)


def _rotate_patches(vectors: Tensor, rotations: Tensor, out: Tensor) -> None:
    """Write queries or keys [B, T, h, d] into `out`, with the last P tokens rotated."""
    prefix = vectors.shape[1] - rotations.shape[0]
    out[:, :prefix] = vectors[:, :prefix]
    rotate_into(out[:, prefix:], vectors[:, prefix:], rotations[:, 0])


def _chunk_sizes(heads: int, queries: int, tokens: int) -> tuple[int, int]:
    """Return how many images to process together, and how many queries of each at a time."""
    return max(1, _SCORES // (heads * queries * tokens)), min(queries, max(1, _SCORES // (heads * tokens)))


def _grouped_product(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply [t, n, i] by the n [o, i] matrices of a [n o, i, 1, 1] weight: [t, n, o]."""
    count, groups, _ = x.shape
    pixels = x.reshape(1, count, 1, -1).permute(0, 3, 1, 2)  # [1, n i, t, 1], channels last
    return torch.conv2d(pixels, weight, groups=groups).permute(0, 2, 3, 1).reshape(count, groups, -1)
