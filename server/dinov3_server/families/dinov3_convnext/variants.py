"""The DINOv3 ConvNeXts: their dimensions, files, and names of tensors. Imports no torch.

Canonical names are the official repository's (`dinov3/models/convnext.py`), without `norms.3`, its second name for
`norm`.

Sources: the official repository's `dinov3/hub/backbones.py` and its model card. Parameter counts are exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from dinov3_server.models.variant import Dataset, FileTensor, KeyMap, Shape, Variant, known_hashes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dinov3_server.families.dinov3_convnext.model import ConvNext


@dataclass(frozen=True, kw_only=True)
class ConvNextVariant(Variant):
    """A DINOv3 ConvNeXt. Its layers are its four stages: `dims` are their channels, `depths` their blocks.

    Stage i has the stride 4 * 2^i.
    """

    patch_size: int = 32
    registers: int = 0
    norm_eps: float = 1e-6
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
        # A convolution is [C_out, C_in, kernel, kernel] (depthwise: C_in 1), a linear layer [C_out, C_in].
        shapes: dict[str, Shape] = {}
        before = 3
        for i, (channels, depth) in enumerate(zip(self.dims, self.depths, strict=True)):
            # The stem is a convolution and its norm; every later stage begins with the norm of the one before.
            convolution, norm, normed, kernel = (0, 1, channels, 4) if i == 0 else (1, 0, before, 2)
            downsample: dict[int, dict[str, Shape]] = {
                convolution: {"weight": (channels, before, kernel, kernel), "bias": (channels,)},
                norm: {"weight": (normed,), "bias": (normed,)},
            }
            for j, leaves in sorted(downsample.items()):
                shapes |= {f"downsample_layers.{i}.{j}.{leaf}": shape for leaf, shape in leaves.items()}
            for j in range(depth):
                block: dict[str, Shape] = {
                    "dwconv.weight": (channels, 1, 7, 7),
                    "dwconv.bias": (channels,),
                    "norm.weight": (channels,),
                    "norm.bias": (channels,),
                    "pwconv1.weight": (4 * channels, channels),
                    "pwconv1.bias": (4 * channels,),
                    "pwconv2.weight": (channels, 4 * channels),
                    "pwconv2.bias": (channels,),
                    "gamma": (channels,),
                }
                shapes |= {f"stages.{i}.{j}.{name}": shape for name, shape in block.items()}
            before = channels
        return shapes | {"norm.weight": (before,), "norm.bias": (before,)}

    def build(
        self, tensors: Mapping[str, Tensor], dataset: Dataset, *, dtype: torch.dtype, device: torch.device
    ) -> ConvNext:
        from dinov3_server.families.dinov3_convnext.model import ConvNext

        return ConvNext(self, tensors, dataset, dtype=dtype, device=device)

    def key_maps(self) -> tuple[KeyMap, ...]:
        return (
            KeyMap("official", _official(self)),
            KeyMap("transformers", _transformers(self), _normalize_transformers_key),
            KeyMap("timm", _timm(self)),
        )


def _official(variant: ConvNextVariant) -> dict[str, FileTensor]:
    entries = {name: FileTensor(shape, (name,)) for name, shape in variant.canonical_shapes().items()}
    width = (variant.embed_dim,)
    return entries | {
        f"norms.3.{leaf}": FileTensor(width, required=False, same_as=f"norm.{leaf}") for leaf in ("weight", "bias")
    }


_TRANSFORMERS_BLOCK = {
    "dwconv": "depthwise_conv",
    "norm": "layer_norm",
    "pwconv1": "pointwise_conv1",
    "pwconv2": "pointwise_conv2",
}


def _transformers(variant: ConvNextVariant) -> dict[str, FileTensor]:
    """Return the tensors of `DINOv3ConvNextModel`, with the keys of files on the hub."""
    entries = {}
    for name, shape in variant.canonical_shapes().items():
        match name.split("."):
            case ["downsample_layers", stage, index, leaf]:
                key = f"stages.{stage}.downsample_layers.{index}.{leaf}"
            case ["stages", stage, block, "gamma"]:
                key = f"stages.{stage}.layers.{block}.gamma"
            case ["stages", stage, block, module, leaf]:
                key = f"stages.{stage}.layers.{block}.{_TRANSFORMERS_BLOCK[module]}.{leaf}"
            case [*_, leaf]:
                key = f"layer_norm.{leaf}"
        entries[key] = FileTensor(shape, (name,))
    return entries


def _normalize_transformers_key(key: str) -> str:
    """Return the key as in files on the hub, `stages.0`; newer transformers classes save `model.stages.0`."""
    return key.removeprefix("model.") if key.startswith("model.stages.") else key


_TIMM_BLOCK = {"dwconv": "conv_dw", "norm": "norm", "pwconv1": "mlp.fc1", "pwconv2": "mlp.fc2"}


def _timm(variant: ConvNextVariant) -> dict[str, FileTensor]:
    """Return the tensors of timm's `convnext_*.dinov3_lvd1689m` (`models/convnext.py`)."""
    entries = {}
    for name, shape in variant.canonical_shapes().items():
        match name.split("."):
            case ["downsample_layers", "0", index, leaf]:
                key = f"stem.{index}.{leaf}"
            case ["downsample_layers", stage, index, leaf]:
                key = f"stages.{stage}.downsample.{index}.{leaf}"
            case ["stages", stage, block, "gamma"]:
                key = f"stages.{stage}.blocks.{block}.gamma"
            case ["stages", stage, block, module, leaf]:
                key = f"stages.{stage}.blocks.{block}.{_TIMM_BLOCK[module]}.{leaf}"
            case [*_, leaf]:
                key = f"head.norm.{leaf}"
        entries[key] = FileTensor(shape, (name,))
    return entries


def _convnext(
    size: str, dims: tuple[int, int, int, int], depths: tuple[int, int, int, int], parameters: int, **hashes: str
) -> ConvNextVariant:
    return ConvNextVariant(
        name=f"dinov3_convnext_{size}",
        embed_dim=dims[-1],
        depth=len(dims),
        parameters=parameters,
        hashes=known_hashes(hashes),
        repositories=(
            f"facebook/dinov3-convnext-{size}-pretrain-{{dataset}}",
            f"timm/convnext_{size}.dinov3_{{dataset}}",
        ),
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
