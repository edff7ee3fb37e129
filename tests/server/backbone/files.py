"""ViT checkpoints in each format, written like Meta, transformers and timm do."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dinov3_server.families.dinov3_vit.variants import VitVariant
from dinov3_server.families.registry import lookup
from dinov3_server.nn.rope import default_periods
from tests.server.backbone.reference import transformers_names

# vits16 at a quarter of its depth.
SHALLOW = dataclasses.replace(lookup("vits16"), depth=3)
SHALLOW_SWIGLU = dataclasses.replace(lookup("vits16plus"), depth=3)


def official_state(variant: VitVariant, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Meta's layout: fused qkv with a masked key bias that is not zero (or a key bias without a mask), periods,
    mask_token."""
    state = {name: tensor for name, tensor in tensors.items() if not any(f".attn.{p}." in name for p in "qkv")}
    width = variant.embed_dim
    if not variant.registers:
        del state["storage_tokens"]
    state["mask_token"] = torch.zeros(1, width)
    state["rope_embed.periods"] = default_periods(variant.head_dim, variant.rope_base)
    for i in range(variant.depth):
        attn = f"blocks.{i}.attn"
        state[f"{attn}.qkv.weight"] = torch.cat([tensors[f"{attn}.{p}.weight"] for p in "qkv"])
        if variant.qkv_bias:
            key_bias = tensors[f"{attn}.k.bias"] if variant.key_bias else torch.full((width,), 3.0)
            state[f"{attn}.qkv.bias"] = torch.cat([tensors[f"{attn}.q.bias"], key_bias, tensors[f"{attn}.v.bias"]])
        if variant.qkv_bias and not variant.key_bias:
            state[f"{attn}.qkv.bias_mask"] = torch.cat([torch.ones(width), torch.zeros(width), torch.ones(width)])
    return state


def transformers_state(variant: VitVariant, tensors: dict[str, Tensor], *, older: bool) -> dict[str, Tensor]:
    """transformers' layout, in the older spelling (`layer.0`) of the hub's files or the newer (`model.layer.0`)."""
    names = transformers_names(variant)
    state = {names[name].removeprefix("model." if older else ""): tensor for name, tensor in tensors.items()}
    return state | {"embeddings.mask_token": torch.zeros(1, 1, variant.embed_dim)}


_TIMM_BLOCK = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "attn.q.bias": "attn.q_bias",
    "attn.v.bias": "attn.v_bias",
    "attn.proj.weight": "attn.proj.weight",
    "attn.proj.bias": "attn.proj.bias",
    "ls1.gamma": "gamma_1",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "ls2.gamma": "gamma_2",
}
_TIMM_MLP = {"fc1": "fc1", "fc2": "fc2"}
_TIMM_SWIGLU = {"w1": "fc1_g", "w2": "fc1_x", "w3": "fc2"}


def timm_state(variant: VitVariant, tensors: dict[str, Tensor], *, biases: bool) -> dict[str, Tensor]:
    """timm's layout, with biases of queries and values (`vit_*_patch16_dinov3_qkvb`) or without them.

    The names are those of timm 1.0.31, with which test_timm.py compares where timm is installed.
    """
    state = {
        "cls_token": tensors["cls_token"],
        "reg_token": tensors["storage_tokens"],
        "patch_embed.proj.weight": tensors["patch_embed.proj.weight"],
        "patch_embed.proj.bias": tensors["patch_embed.proj.bias"],
        "norm.weight": tensors["norm.weight"],
        "norm.bias": tensors["norm.bias"],
    }
    inner = dict(_TIMM_BLOCK)
    for ours, theirs in (_TIMM_MLP if variant.ffn == "mlp" else _TIMM_SWIGLU).items():
        inner |= {f"mlp.{ours}.{leaf}": f"mlp.{theirs}.{leaf}" for leaf in ("weight", "bias")}
    if not biases:
        del inner["attn.q.bias"], inner["attn.v.bias"]
    for i in range(variant.depth):
        state |= {f"blocks.{i}.{theirs}": tensors[f"blocks.{i}.{ours}"] for ours, theirs in inner.items()}
        fused = torch.cat([tensors[f"blocks.{i}.attn.{p}.weight"] for p in "qkv"])
        state[f"blocks.{i}.attn.qkv.weight"] = fused
    return state
