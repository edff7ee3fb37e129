"""The DINOv3 vision transformer, for inference only.

Written from the paper (arXiv:2508.10104) and the layout of the published checkpoints. Some algebra is done once, at
load, in fp32: LayerScale is folded into the projection before it, the attention scale into the queries, mean, std
and the division by 255 into the patch embedding of bytes; keys have no bias; query and key channels are interleaved
for RoPE (see rope.py). Only what the requested outputs need is computed.

The residual stream and the norms are always fp32; the matrix products are in the model's dtype. In bfloat16 that nearly
halves the angle between the patch features and the fp32 ones: rounding of the stream would be the largest error.

Shapes: B images, H x W pixels, T = 1 + G + P tokens (CLS, registers, patches), D channels, h heads of d channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dinov3_server.families.dinov3_vit.variants import PERIODS, VitVariant
from dinov3_server.models.interface import Output
from dinov3_server.models.variant import Dataset
from dinov3_server.nn.attention import attention
from dinov3_server.nn.linear import Linear, linear
from dinov3_server.nn.model import Model, source_layer
from dinov3_server.nn.norm import Norm
from dinov3_server.nn.patch_embedding import PatchEmbedding
from dinov3_server.nn.rope import Rope, interleave


class VisionTransformer(Model):
    """A ViT.

    `tensors` are canonical (see variants.py), in any floating dtype and on any device; the model keeps none of them.
    On the meta device it can be built and run without memory.
    """

    def __init__(
        self,
        variant: VitVariant,
        tensors: Mapping[str, Tensor],
        dataset: Dataset,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.variant = variant
        self.dtype = dtype
        self.device = device

        def exact(name: str) -> Tensor:
            return tensors[name].to(device, torch.float32)

        projection = exact("patch_embed.proj.weight"), exact("patch_embed.proj.bias")
        self._patch_embedding = PatchEmbedding(*projection, dataset, multiple=variant.patch_size, dtype=dtype)
        self._prefix = torch.cat((exact("cls_token"), exact("storage_tokens")), dim=1)  # [1, 1 + G, D]
        self._norm = Norm(exact("norm.weight"), exact("norm.bias"), variant.norm_eps)
        self._rope = Rope(exact(PERIODS))
        self._blocks = [_block(variant, dtype, f"blocks.{i}.", exact) for i in range(variant.depth)]
        self._ranges = {
            "cls": slice(0, 1),
            "registers": slice(1, 1 + variant.registers),
            "patches": slice(1 + variant.registers, None),
        }

    def features(self, pixels: Tensor, outputs: Iterable[Output]) -> Iterator[tuple[Output, Tensor]]:
        """Yield the features as `Model` says: [B, D] (cls), [B, G, D] (registers) or [B, P, D] (patches, row-major)."""
        by_layer: dict[tuple[int, bool], list[Output]] = {}
        for output in outputs:
            norm = output.layer is None or output.norm
            by_layer.setdefault((source_layer(output, self.variant), norm), []).append(output)
        if not by_layer:
            return
        last = max(layer for layer, _ in by_layer)
        # The last block computes only the tokens that are requested of it; earlier blocks feed the next one.
        kept = {o.kind for (layer, _), group in by_layer.items() if layer == last for o in group}
        keep = None if "patches" in kept else max(self._ranges[kind].stop for kind in kept)

        x, rows, columns = self._embed(pixels)
        rotations = self._rope.rotations(rows, columns)
        for layer, block in enumerate(self._blocks[: last + 1]):
            x = block(x, rotations, keep if layer == last else None)
            for norm in (False, True):
                if group := by_layer.get((layer, norm)):
                    yield from self._pick(x, group, norm)

    def cached_tensors(self, height: int, width: int) -> tuple[Tensor, ...]:
        """Return the rotations for pixels of this size, which Rope keeps in an LRU cache."""
        return (self._rope.rotations(height // self.variant.patch_size, width // self.variant.patch_size),)

    def _embed(self, pixels: Tensor) -> tuple[Tensor, int, int]:
        """Return the [B, T, D] tokens that enter the first block, and the patch grid."""
        patches = self._patch_embedding(pixels)
        batch, rows, columns, _ = patches.shape
        stream = torch.cat((self._prefix.expand(batch, -1, -1), patches.flatten(1, 2).float()), dim=1)
        return stream, rows, columns

    def _pick(self, x: Tensor, group: list[Output], norm: bool) -> Iterator[tuple[Output, Tensor]]:
        """Yield the outputs of one layer, from its [B, T, D] tokens (fewer than T if not all were computed)."""
        start = min(self._ranges[output.kind].start for output in group)
        if norm:
            # Normalize the smallest range of tokens with all requested outputs, in one pass.
            stops = [self._ranges[output.kind].stop for output in group]
            x = self._norm(x[:, start : None if None in stops else max(stops)])
        else:
            start = 0
        for output in group:
            tokens = self._ranges[output.kind]
            part = x[:, tokens.start - start : None if tokens.stop is None else tokens.stop - start]
            yield output, part[:, 0] if output.kind == "cls" else part


@dataclass(eq=False)
class _Mlp:
    """residual + fc2(gelu(fc1 x))."""

    fc1: Linear
    fc2: Linear

    def __call__(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.fc2.add(self.fc1.gelu(x), residual)


@dataclass(eq=False)
class _SwiGlu:
    """residual + w3(silu(w1 x) * w2 x)."""

    w1: Linear
    w2: Linear
    w3: Linear

    def __call__(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.w3.add(self.w2.mul(x, self.w1.silu(x)), residual)


@dataclass(eq=False)
class _Block:
    """Pre-norm attention and feed-forward, LayerScale already in the projections."""

    heads: int
    dtype: torch.dtype
    norm1: Norm
    qkv: Linear
    proj: Linear
    norm2: Norm
    ffn: _Mlp | _SwiGlu

    def __call__(self, x: Tensor, rotations: Tensor, keep: int | None) -> Tensor:
        """Map [B, T, D] to [B, T, D], or to the first `keep` tokens; `rotations` are for the last P of the T tokens."""
        qkv = self.qkv(self.norm1(x).to(self.dtype)).view(*x.shape[:2], 3, self.heads, -1)
        if keep is not None:
            x = x[:, :keep].contiguous()
        x = self.proj.add(attention(qkv, rotations, keep), x)
        return self.ffn(self.norm2(x).to(self.dtype), x)


def _block(
    variant: VitVariant,
    dtype: torch.dtype,
    prefix: str,
    exact: Callable[[str], Tensor],
) -> _Block:
    """Build a block: `exact` returns a canonical tensor in fp32."""

    def norm(name: str) -> Norm:
        return Norm(exact(f"{prefix}{name}.weight"), exact(f"{prefix}{name}.bias"), variant.norm_eps)

    def plain(name: str) -> Linear:
        return linear(exact(f"{prefix}{name}.weight"), exact(f"{prefix}{name}.bias"), dtype)

    def scaled(name: str, gamma: str) -> Linear:
        scale = exact(f"{prefix}{gamma}.gamma")
        return linear(scale[:, None] * exact(f"{prefix}{name}.weight"), scale * exact(f"{prefix}{name}.bias"), dtype)

    def qkv() -> Linear:
        heads, scale = variant.heads, variant.head_dim**-0.5
        q, k, v = (exact(f"{prefix}attn.{part}.weight") for part in "qkv")
        weight = torch.cat((interleave(q, heads) * scale, interleave(k, heads), v))
        if not variant.qkv_bias:
            return linear(weight, None, dtype)
        q, v = (exact(f"{prefix}attn.{part}.bias") for part in "qv")
        k = interleave(exact(f"{prefix}attn.k.bias"), heads) if variant.key_bias else torch.zeros_like(q)
        return linear(weight, torch.cat((interleave(q, heads) * scale, k, v)), dtype)

    ffn: _Mlp | _SwiGlu
    if variant.ffn == "mlp":
        ffn = _Mlp(plain("mlp.fc1"), scaled("mlp.fc2", "ls2"))
    else:
        ffn = _SwiGlu(plain("mlp.w1"), plain("mlp.w2"), scaled("mlp.w3", "ls2"))
    return _Block(variant.heads, dtype, norm("norm1"), qkv(), scaled("attn.proj", "ls1"), norm("norm2"), ffn)
