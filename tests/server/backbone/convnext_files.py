"""ConvNeXt checkpoints in each format, written like Meta, transformers and timm do.

The key maps are written out here, independently of those in variants.py, which they check. timm's names are those
of timm 1.0.31, with which test_timm.py compares where timm is installed.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from dinov3_server.families.dinov3_convnext.variants import CONVNEXTS, ConvNextVariant

# Four stages that differ in width and depth, small enough to be written many times.
NARROW = dataclasses.replace(CONVNEXTS["dinov3_convnext_tiny"], dims=(8, 16, 24, 32), depths=(1, 2, 3, 1), embed_dim=32)

_TRANSFORMERS_BLOCK = {
    "dwconv.weight": "depthwise_conv.weight",
    "dwconv.bias": "depthwise_conv.bias",
    "norm.weight": "layer_norm.weight",
    "norm.bias": "layer_norm.bias",
    "pwconv1.weight": "pointwise_conv1.weight",
    "pwconv1.bias": "pointwise_conv1.bias",
    "pwconv2.weight": "pointwise_conv2.weight",
    "pwconv2.bias": "pointwise_conv2.bias",
    "gamma": "gamma",
}
_TIMM_BLOCK = {
    "dwconv.weight": "conv_dw.weight",
    "dwconv.bias": "conv_dw.bias",
    "norm.weight": "norm.weight",
    "norm.bias": "norm.bias",
    "pwconv1.weight": "mlp.fc1.weight",
    "pwconv1.bias": "mlp.fc1.bias",
    "pwconv2.weight": "mlp.fc2.weight",
    "pwconv2.bias": "mlp.fc2.bias",
    "gamma": "gamma",
}


def convnext_official_state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Meta's layout: the final norm is there under two names."""
    return tensors | {"norms.3.weight": tensors["norm.weight"], "norms.3.bias": tensors["norm.bias"]}


def convnext_transformers_state(
    variant: ConvNextVariant, tensors: dict[str, Tensor], *, older: bool
) -> dict[str, Tensor]:
    """transformers' layout, in the older spelling (`stages.0`) or the newer (`model.stages.0`)."""
    prefix = "" if older else "model."
    state = {"layer_norm.weight": tensors["norm.weight"], "layer_norm.bias": tensors["norm.bias"]}
    for i, depth in enumerate(variant.depths):
        for leaf in ("0.weight", "0.bias", "1.weight", "1.bias"):
            state[f"{prefix}stages.{i}.downsample_layers.{leaf}"] = tensors[f"downsample_layers.{i}.{leaf}"]
        for j in range(depth):
            for ours, theirs in _TRANSFORMERS_BLOCK.items():
                state[f"{prefix}stages.{i}.layers.{j}.{theirs}"] = tensors[f"stages.{i}.{j}.{ours}"]
    return state


def convnext_timm_state(variant: ConvNextVariant, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's layout: a separate stem, the final norm in the head."""
    state = {"head.norm.weight": tensors["norm.weight"], "head.norm.bias": tensors["norm.bias"]}
    for i, depth in enumerate(variant.depths):
        for leaf in ("0.weight", "0.bias", "1.weight", "1.bias"):
            key = f"stem.{leaf}" if i == 0 else f"stages.{i}.downsample.{leaf}"
            state[key] = tensors[f"downsample_layers.{i}.{leaf}"]
        for j in range(depth):
            for ours, theirs in _TIMM_BLOCK.items():
                state[f"stages.{i}.blocks.{j}.{theirs}"] = tensors[f"stages.{i}.{j}.{ours}"]
    return state
