"""The oracle: transformers' DINOv3ViTModel with our weights, and the comparison that decides.

The map of names is written out here, apart from the one in layouts.py that it checks.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from skimage import data
from torch import Tensor
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from dinov3_server.backbone.interface import Output
from dinov3_server.backbone.registry import DATASETS, Dataset, VitVariant
from dinov3_server.backbone.vit import VisionTransformer

LVD = DATASETS["lvd1689m"]
CPU = torch.device("cpu")

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
    """Our name to transformers' (newer spelling), of every tensor."""
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
    """The same model by transformers, with the same RoPE periods, which it would otherwise make in fp32."""
    config = DINOv3ViTConfig(
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
    model = DINOv3ViTModel(config).eval()
    names = transformers_names(variant)
    state = {names[name]: tensor for name, tensor in tensors.items()}
    state["embeddings.mask_token"] = torch.zeros(1, 1, variant.embed_dim)
    model.load_state_dict(state, strict=True)
    model.rope_embeddings.inv_freq = 1 / periods
    return model


def ours(
    variant: VitVariant,
    tensors: dict[str, Tensor],
    periods: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    dataset: Dataset = LVD,
    device: torch.device = CPU,
) -> VisionTransformer:
    return VisionTransformer(variant, tensors, periods, dataset, dtype=dtype, device=device)


def picture(height: int, width: int, count: int = 1, seed: int = 0) -> Tensor:
    """[count, height, width, 3] uint8: smooth shades with some noise, as photos have."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.linspace(0, 1, height)[:, None, None]
    x = torch.linspace(0, 1, width)[None, :, None]
    images = []
    for _ in range(count):
        frequency, phase = 1 + 5 * torch.rand(2, 3, generator=generator), torch.rand(2, 3, generator=generator)
        waves = torch.sin(2 * math.pi * (frequency[0] * y + phase[0])) * torch.cos(
            2 * math.pi * (frequency[1] * x + phase[1])
        )
        noise = torch.randn(height, width, 3, generator=generator)
        images.append((128 + 90 * waves + 12 * noise).clamp(0, 255).to(torch.uint8))
    return torch.stack(images)


def photographs(height: int, width: int) -> Tensor:
    """[2, height, width, 3] uint8, height at most 400 and width at most 512."""
    cut = [np.ascontiguousarray(photo()[:height, :width]) for photo in (data.astronaut, data.coffee)]
    return torch.from_numpy(np.stack(cut))


def normalised(images: Tensor, dataset: Dataset = LVD) -> Tensor:
    """[B, H, W, 3] bytes as the [B, 3, H, W] floats that other implementations take."""
    scaled = (images.float() / 255 - torch.tensor(dataset.mean)) / torch.tensor(dataset.std)
    return scaled.permute(0, 3, 1, 2).contiguous()


def every_output(depth: int) -> list[Output]:
    """The final features, and each layer's with and without the final norm."""
    final = [Output("cls"), Output("registers"), Output("patches")]
    return final + [
        Output(kind, layer, norm)
        for layer in range(depth)
        for norm in (False, True)
        for kind in ("cls", "registers", "patches")
    ]


@torch.inference_mode()
def transformers_features(model: DINOv3ViTModel, pixels: Tensor) -> dict[Output, Tensor]:
    """What `every_output` names, from normalised floats."""
    answer = model(pixels, output_hidden_states=True)
    # hidden_states[0] is the embedding; [i + 1] is what block i gives, before the final norm.
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


@torch.inference_mode()
def worst_error(model: VisionTransformer, pixels: Tensor, expected: dict[Output, Tensor]) -> float:
    """The largest relative error, norm(a - b) / norm(b), of any output."""
    actual = model(pixels, list(expected))
    assert {output: tensor.shape for output, tensor in actual.items()} == {
        output: tensor.shape for output, tensor in expected.items()
    }
    return max(
        float((actual[output].double() - tensor.double()).norm() / tensor.double().norm())
        for output, tensor in expected.items()
    )


def worst_cosine(actual: Tensor, expected: Tensor) -> float:
    """The smallest cosine of any token."""
    return float(torch.cosine_similarity(actual.double(), expected.double(), dim=-1).min())
