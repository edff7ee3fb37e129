"""Reference models: transformers' DINOv3ViTModel and DINOv3ConvNextModel with our weights; and photographs.

The key map is written out here, independently of the one in variants.py, which it checks.
"""

from __future__ import annotations

import numpy as np
import torch
from skimage import data
from torch import Tensor
from transformers import DINOv3ConvNextConfig, DINOv3ConvNextModel, DINOv3ViTModel

from bench.reference import transformers_config
from dinov3_server.families.dinov3_convnext.variants import ConvNextVariant
from dinov3_server.families.dinov3_vit.variants import VitVariant
from dinov3_server.models.interface import Output
from tests.server.backbone.convnext_files import convnext_transformers_state
from tests.server.backbone.features import every_output

_OUTER = {
    "cls_token": "embeddings.cls_token",
    "storage_tokens": "embeddings.register_tokens",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.bias",
    "norm.weight": "norm.weight",
    "norm.bias": "norm.bias",
}
_BLOCK = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "attn.q.weight": "attention.q_proj.weight",
    "attn.q.bias": "attention.q_proj.bias",
    "attn.k.weight": "attention.k_proj.weight",
    "attn.v.weight": "attention.v_proj.weight",
    "attn.v.bias": "attention.v_proj.bias",
    "attn.proj.weight": "attention.o_proj.weight",
    "attn.proj.bias": "attention.o_proj.bias",
    "ls1.gamma": "layer_scale1.lambda1",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "ls2.gamma": "layer_scale2.lambda1",
}
_MLP = {"fc1": "up_proj", "fc2": "down_proj"}
_SWIGLU = {"w1": "gate_proj", "w2": "up_proj", "w3": "down_proj"}


def transformers_names(variant: VitVariant) -> dict[str, str]:
    """Map our name of every tensor to transformers' (newer spelling)."""
    names = dict(_OUTER)
    ffn = _MLP if variant.ffn == "mlp" else _SWIGLU
    inner = dict(_BLOCK)
    for ours, theirs in ffn.items():
        for leaf in ("weight", "bias"):
            inner[f"mlp.{ours}.{leaf}"] = f"mlp.{theirs}.{leaf}"
    if not variant.qkv_bias:
        del inner["attn.q.bias"], inner["attn.v.bias"]
    for i in range(variant.depth):
        names |= {f"blocks.{i}.{ours}": f"model.layer.{i}.{theirs}" for ours, theirs in inner.items()}
    return names


def transformers_model(variant: VitVariant, tensors: dict[str, Tensor], periods: Tensor) -> DINOv3ViTModel:
    """Build the model in transformers, with the same RoPE periods (its own are fp32, not rounded)."""
    model = DINOv3ViTModel(transformers_config(variant)).eval()
    names = transformers_names(variant)
    state = {names[name]: tensor for name, tensor in tensors.items()}
    state["embeddings.mask_token"] = torch.zeros(1, 1, variant.embed_dim)
    model.load_state_dict(state, strict=True)
    model.rope_embeddings.inv_freq = 1 / periods
    return model


def photographs(height: int, width: int) -> Tensor:
    """Return [2, height, width, 3] uint8, height at most 400 and width at most 512."""
    cut = [np.ascontiguousarray(photo()[:height, :width]) for photo in (data.astronaut, data.coffee)]
    return torch.from_numpy(np.stack(cut))


@torch.inference_mode()
def transformers_features(model: DINOv3ViTModel, pixels: Tensor) -> dict[Output, Tensor]:
    """Compute the outputs of `every_output` from normalized floats."""
    answer = model(pixels, output_hidden_states=True)
    # hidden_states[0] is the embedding; [i + 1] is the output of block i, before the final norm.
    hidden = answer.hidden_states
    registers = model.config.num_register_tokens
    features: dict[Output, Tensor] = {}
    for output in every_output(len(hidden) - 1):
        if output.layer is None:
            tokens = answer.last_hidden_state
        else:
            tokens = hidden[output.layer + 1]
            tokens = model.norm(tokens) if output.norm else tokens
        parts = {"cls": tokens[:, 0], "registers": tokens[:, 1 : 1 + registers], "patches": tokens[:, 1 + registers :]}
        features[output] = parts[output.kind]
    return features


def transformers_convnext(variant: ConvNextVariant, tensors: dict[str, Tensor]) -> DINOv3ConvNextModel:
    """Build the model in transformers."""
    config = DINOv3ConvNextConfig(hidden_sizes=list(variant.dims), depths=list(variant.depths))
    model = DINOv3ConvNextModel(config).eval()
    model.load_state_dict(convnext_transformers_state(variant, tensors, older=False), strict=True)
    return model


@torch.inference_mode()
def transformers_convnext_features(model: DINOv3ConvNextModel, pixels: Tensor) -> dict[Output, Tensor]:
    """Compute the final outputs and every stage's from normalized floats; only the last stage has the final norm."""
    answer = model(pixels, output_hidden_states=True)
    features = {Output("cls"): answer.last_hidden_state[:, 0], Output("patches"): answer.last_hidden_state[:, 1:]}
    maps = answer.hidden_states[-4:]  # [B, C, h, w] each
    for layer, stage in enumerate(maps):
        cells = stage.flatten(2).transpose(1, 2)
        for norm in (False, True):
            final = model.layer_norm if norm and layer == 3 else torch.nn.Identity()
            features[Output("cls", layer, norm)] = final(cells.mean(1))
            features[Output("patches", layer, norm)] = final(cells)
    return features
