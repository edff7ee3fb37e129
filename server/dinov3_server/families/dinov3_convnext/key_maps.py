"""Names and shapes of a DINOv3 ConvNeXt's tensors: canonical, and as a key map for each checkpoint format.

Canonical names are the official repository's (`dinov3/models/convnext.py`), without `norms.3`, its second name for
`norm`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dinov3_server.models.key_map import FileTensor, KeyMap, Shape

if TYPE_CHECKING:
    from dinov3_server.families.dinov3_convnext.variants import ConvNextVariant


def canonical_shapes(variant: ConvNextVariant) -> dict[str, Shape]:
    """Return name and shape of every canonical tensor, in a fixed order.

    With C channels: a convolution is [C_out, C_in, kernel, kernel] (depthwise: C_in 1), a linear layer [C_out, C_in].
    """
    shapes: dict[str, Shape] = {}
    before = 3
    for i, (channels, depth) in enumerate(zip(variant.dims, variant.depths, strict=True)):
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


def key_maps(variant: ConvNextVariant) -> tuple[KeyMap, ...]:
    """Return the key map of every format that a file of `variant` may have."""
    return (
        KeyMap("official", _official(variant)),
        KeyMap("transformers", _transformers(variant), _normalize_transformers_key),
        KeyMap("timm", _timm(variant)),
    )


def _official(variant: ConvNextVariant) -> dict[str, FileTensor]:
    entries = {name: FileTensor(shape, (name,)) for name, shape in canonical_shapes(variant).items()}
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
    for name, shape in canonical_shapes(variant).items():
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
    for name, shape in canonical_shapes(variant).items():
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
