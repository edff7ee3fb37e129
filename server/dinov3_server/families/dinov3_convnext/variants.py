"""The DINOv3 ConvNeXts. Imports no torch.

Sources: the official repository's `dinov3/hub/backbones.py` and its model card. Parameter counts are exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from dinov3_server.families.dinov3_convnext import key_maps
from dinov3_server.models.key_map import KeyMap, Shape
from dinov3_server.models.variant import Variant, known_hashes


@dataclass(frozen=True, kw_only=True)
class ConvNextVariant(Variant):
    """A DINOv3 ConvNeXt. Its layers are its four stages: `dims` are their channels, `depths` their blocks.

    Stage i has the stride 4 * 2^i.
    """

    dims: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]

    @property
    def layer_dims(self) -> tuple[int, ...]:
        return self.dims

    @property
    def layer_strides(self) -> tuple[int, ...]:
        return tuple(4 << stage for stage in range(self.depth))

    @property
    def architecture(self) -> str:
        blocks, channels = ("/".join(map(str, each)) for each in (self.depths, self.dims))
        return f"ConvNeXt: blocks {blocks}, channels {channels}"

    def canonical_shapes(self) -> dict[str, Shape]:
        return key_maps.canonical_shapes(self)

    def key_maps(self) -> tuple[KeyMap, ...]:
        return key_maps.key_maps(self)


def _convnext(
    size: str, dims: tuple[int, int, int, int], depths: tuple[int, int, int, int], parameters: int, **hashes: str
) -> ConvNextVariant:
    return ConvNextVariant(
        name=f"dinov3_convnext_{size}",
        embed_dim=dims[-1],
        depth=len(dims),
        patch_size=32,
        registers=0,
        norm_eps=1e-6,
        parameters=parameters,
        hashes=known_hashes(hashes),
        dims=dims,
        depths=depths,
    )


CONVNEXTS: Mapping[str, ConvNextVariant] = MappingProxyType(
    {
        variant.name: variant
        for variant in (
            _convnext("tiny", (96, 192, 384, 768), (3, 3, 9, 3), 27_820_128, lvd1689m="21b726bb"),
            _convnext("small", (96, 192, 384, 768), (3, 3, 27, 3), 49_454_688, lvd1689m="296db49d"),
            _convnext("base", (128, 256, 512, 1024), (3, 3, 27, 3), 87_566_464, lvd1689m="801f2ba9"),
            _convnext("large", (192, 384, 768, 1536), (3, 3, 27, 3), 196_230_336, lvd1689m="61fa432d"),
        )
    }
)
