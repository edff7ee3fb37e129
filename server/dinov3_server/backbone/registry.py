"""The DINOv3 variants that can be served: plain data, looked up by name. Imports no torch.

Sources: the official repository's `dinov3/hub/backbones.py` and its model card. Parameter counts are exact
(they include `mask_token` and the masked third of the qkv biases, which inference does not use).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from dinov3_server.errors import ConfigError

DatasetName = Literal["lvd1689m", "sat493m"]


@dataclass(frozen=True)
class Dataset:
    """What a checkpoint was trained on, and the per-channel RGB statistics that its input is normalised with."""

    name: DatasetName
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


DATASETS: Mapping[DatasetName, Dataset] = MappingProxyType(
    {
        "lvd1689m": Dataset("lvd1689m", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        "sat493m": Dataset("sat493m", mean=(0.430, 0.411, 0.296), std=(0.213, 0.156, 0.143)),
    }
)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What the service knows of any model.

    Height and width of its inputs are multiples of `patch_size`, which is also the stride of its last layer's patches;
    `depth` is how many layers can be asked for. `hashes` has, for each dataset with an official file, the first 8 hex
    digits of its sha256.
    """

    name: str
    embed_dim: int
    depth: int
    patch_size: int
    registers: int
    norm_eps: float
    parameters: int
    hashes: Mapping[DatasetName, str]

    @property
    def layer_dims(self) -> tuple[int, ...]:
        """Channels of each layer's tokens."""
        return (self.embed_dim,) * self.depth

    @property
    def layer_strides(self) -> tuple[int, ...]:
        """Pixels of the input, in height and in width, to a patch of each layer."""
        return (self.patch_size,) * self.depth

    def official_file(self, dataset: DatasetName) -> str:
        """The name under which Meta publishes the weights."""
        return f"{self.name}_pretrain_{dataset}-{self.hashes[dataset]}.pth"


@dataclass(frozen=True, kw_only=True)
class VitVariant(Variant):
    """A vision transformer's dimensions; its layers are its blocks."""

    heads: int
    ffn: Literal["mlp", "swiglu"]
    ffn_dim: int
    qkv_bias: bool
    rope_base: float = 100.0

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.heads


@dataclass(frozen=True, kw_only=True)
class ConvNextVariant(Variant):
    """A ConvNeXt's dimensions: channels and blocks of its four stages, which are its layers.

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


def _known(hashes: Mapping[str, str]) -> Mapping[DatasetName, str]:
    return MappingProxyType({name: hashes[name] for name in DATASETS if name in hashes})


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
        hashes=_known(hashes),
        heads=heads,
        ffn=ffn,
        ffn_dim=ffn_dim,
        qkv_bias=qkv_bias,
    )


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
        hashes=_known(hashes),
        dims=dims,
        depths=depths,
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

VARIANTS: Mapping[str, Variant] = MappingProxyType({**VITS, **CONVNEXTS})

ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "small": "dinov3_vits16",
        "base": "dinov3_vitb16",
        "large": "dinov3_vitl16",
        "huge": "dinov3_vith16plus",
        "7b": "dinov3_vit7b16",
        "vit_small": "dinov3_vits16",
        "vit_base": "dinov3_vitb16",
        "vit_large": "dinov3_vitl16",
    }
)


def lookup(name: str) -> Variant:
    """The variant called `name`: `dinov3_vits16`, or short `vits16`, or an alias such as `small`.
    Hyphens are as good as underscores.

    Raises ConfigError for a name that is not one, saying which are.
    """
    key = name.strip().lower().replace("-", "_")
    key = ALIASES.get(key, key)
    variant = VARIANTS.get(key) or VARIANTS.get(f"dinov3_{key}")
    if variant is None:
        raise ConfigError(f"model {name!r} {_why_unknown(key)} Known models: {', '.join(VARIANTS)}.")
    return variant


def _why_unknown(key: str) -> str:
    if "giant" in key or "vitg" in key:
        return (
            "is DINOv2's: DINOv3 has no giant2. The nearest in DINOv3 are dinov3_vith16plus (width 1280) and "
            "dinov3_vit7b16 (width 4096)."
        )
    if key.endswith("14") or "patch14" in key or "dinov2" in key:
        return (
            "is DINOv2's: every DINOv3 vision transformer has a patch of 16, not 14 (so an input of 518 pixels, which "
            "is no multiple of 16, becomes 512 or 528)."
        )
    shorts = [full.removeprefix("dinov3_") for full in VARIANTS]
    nearest = difflib.get_close_matches(key.removeprefix("dinov3_"), [*shorts, *ALIASES], n=1, cutoff=0.6)
    return f"is not known; did you mean {nearest[0]!r}?" if nearest else "is not known."
