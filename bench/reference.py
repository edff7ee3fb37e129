"""Reference models with the dimensions of our registry: transformers' DINOv3ViTModel, and Meta's own code if the
environment variable DINOV3_UPSTREAM names a local copy of its repository."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from dinov3_server.families.dinov3_vit.variants import VitVariant


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
    """Return a model with random weights of seed 0, in evaluation mode, on the CPU."""
    torch.manual_seed(0)
    model: DINOv3ViTModel = DINOv3ViTModel(transformers_config(variant)).eval().to(dtype)
    return model


def upstream_model(checkout: Path, variant: VitVariant, dtype: torch.dtype) -> Any:
    """Return Meta's model with random weights of seed 0, in evaluation mode, on the CPU.

    The import sets two limits of torch.compile for the whole process, and puts `checkout` on its path.
    """
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    torch.manual_seed(0)
    backbones = importlib.import_module("dinov3.hub.backbones")
    return getattr(backbones, variant.name)(pretrained=False).eval().to(dtype)


def upstream_checkout(scratch: Path) -> Path:
    """Return a work tree of DINOV3_UPSTREAM: the folder itself, or the HEAD of a git directory, extracted into
    `scratch`."""
    source = Path(os.environ["DINOV3_UPSTREAM"])
    if (source / "dinov3" / "hub" / "backbones.py").is_file():
        return source
    archive = subprocess.run(["git", "-C", source, "archive", "HEAD", "dinov3"], check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", scratch], check=True, input=archive)
    return scratch


def upstream_commit() -> str | None:
    """Return the commit of DINOV3_UPSTREAM; None if it is not set or not a git repository."""
    if "DINOV3_UPSTREAM" not in os.environ:
        return None
    command = ["git", "-C", os.environ["DINOV3_UPSTREAM"], "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
