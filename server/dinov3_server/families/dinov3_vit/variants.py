"""The DINOv3 vision transformers. Imports no torch.

Sources: the official repository's `dinov3/hub/backbones.py` and its model card. Parameter counts are exact
(they include `mask_token` and the masked third of the qkv biases, which inference does not use).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from dinov3_server.families.dinov3_vit import key_maps
from dinov3_server.models.key_map import KeyMap, Shape
from dinov3_server.models.variant import Variant, known_hashes


@dataclass(frozen=True, kw_only=True)
class VitVariant(Variant):
    """A DINOv3 vision transformer. Its layers are its blocks."""

    heads: int
    ffn: Literal["mlp", "swiglu"]
    ffn_dim: int
    qkv_bias: bool
    rope_base: float = 100.0

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.heads

    @property
    def architecture(self) -> str:
        return f"ViT: {self.heads} heads, {self.ffn} {self.ffn_dim}"

    def canonical_shapes(self) -> dict[str, Shape]:
        return key_maps.canonical_shapes(self)

    def key_maps(self) -> tuple[KeyMap, ...]:
        return key_maps.key_maps(self)


def _vit(
    arch: str,
    dimensions: tuple[int, int, int],
    ffn: Literal["mlp", "swiglu"],
    ffn_dim: int,
    parameters: int,
    qkv_bias: bool = True,
    **hashes: str,
) -> VitVariant:
    embed_dim, depth, heads = dimensions
    return VitVariant(
        name=f"dinov3_{arch}",
        embed_dim=embed_dim,
        depth=depth,
        patch_size=16,
        registers=4,
        norm_eps=1e-5,
        parameters=parameters,
        hashes=known_hashes(hashes),
        heads=heads,
        ffn=ffn,
        ffn_dim=ffn_dim,
        qkv_bias=qkv_bias,
    )


VITS: Mapping[str, VitVariant] = MappingProxyType(
    {
        variant.name: variant
        for variant in (
            _vit("vits16", (384, 12, 6), "mlp", 1536, 21_601_152, lvd1689m="08c60483"),
            _vit("vits16plus", (384, 12, 6), "swiglu", 1536, 28_697_472, lvd1689m="4057cbaa"),
            _vit("vitb16", (768, 12, 12), "mlp", 3072, 85_669_632, lvd1689m="73cec8be"),
            _vit("vitl16", (1024, 24, 16), "mlp", 4096, 303_154_176, lvd1689m="8aa4cbdd", sat493m="eadcf0ff"),
            _vit("vitl16plus", (1024, 24, 16), "swiglu", 4096, 403_915_776, lvd1689m="46503df0"),
            _vit("vith16plus", (1280, 32, 20), "swiglu", 5120, 840_633_600, lvd1689m="7c1da9a5"),
            _vit(
                "vit7b16", (4096, 40, 32), "swiglu", 8192, 6_716_043_264, False, lvd1689m="a955f4ea", sat493m="a6675841"
            ),
        )
    }
)
