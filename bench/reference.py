"""The reference that we did not write: transformers' DINOv3ViTModel, at the dimensions of our registry."""

from __future__ import annotations

import torch
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from dinov3_server.backbone.registry import VitVariant


def transformers_config(variant: VitVariant) -> DINOv3ViTConfig:
    return DINOv3ViTConfig(
        patch_size=variant.patch_size,
        hidden_size=variant.embed_dim,
        intermediate_size=variant.ffn_dim,
        num_hidden_layers=variant.depth,
        num_attention_heads=variant.heads,
        num_register_tokens=variant.registers,
        use_gated_mlp=variant.ffn == "swiglu",
        hidden_act="silu" if variant.ffn == "swiglu" else "gelu",
        layer_norm_eps=variant.norm_eps,
        rope_theta=variant.rope_base,
        query_bias=variant.qkv_bias,
        value_bias=variant.qkv_bias,
        attn_implementation="sdpa",
    )


def transformers_model(variant: VitVariant, dtype: torch.dtype) -> DINOv3ViTModel:
    """In evaluation mode, on the CPU, of seed 0."""
    torch.manual_seed(0)
    model: DINOv3ViTModel = DINOv3ViTModel(transformers_config(variant)).eval().to(dtype)
    return model
