"""Our key maps of timm's layout against timm: its classes, and its own conversion of official files.

timm needs torchvision, and neither is a dependency of this project. Where they are not installed, timm's layout is held
to the names that files.py and convnext_files.py write out from its source (timm 1.0.31), and to nothing else.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dinov3_server.backbone.weights.checkpoint import load_checkpoint
from dinov3_server.backbone.weights.random_weights import random_tensors
from dinov3_server.backbone.weights.selection import find_backbones
from dinov3_server.families.dinov3_vit.variants import PERIODS, VITS, VitVariant
from dinov3_server.families.registry import VARIANTS
from dinov3_server.models.interface import Output
from tests.server.backbone.convnext_files import NARROW, convnext_official_state
from tests.server.backbone.features import CPU, normalized, ours, picture, worst_error
from tests.server.backbone.files import SHALLOW, SHALLOW_SWIGLU, official_state

timm = pytest.importorskip("timm", reason="timm (which needs torchvision) is not installed", exc_type=ImportError)

# vit7b16 has no biases of queries and values, and heads twice as wide as the others'.
NARROW_7B = dataclasses.replace(VITS["dinov3_vit7b16"], depth=2, embed_dim=256, heads=2, ffn_dim=512)

PUBLISHED = {
    "vit_small_patch16_dinov3": "dinov3_vits16",
    "vit_small_patch16_dinov3_qkvb": "dinov3_vits16",
    "vit_small_plus_patch16_dinov3": "dinov3_vits16plus",
    "vit_small_plus_patch16_dinov3_qkvb": "dinov3_vits16plus",
    "vit_base_patch16_dinov3": "dinov3_vitb16",
    "vit_base_patch16_dinov3_qkvb": "dinov3_vitb16",
    "vit_large_patch16_dinov3": "dinov3_vitl16",
    "vit_large_patch16_dinov3_qkvb": "dinov3_vitl16",
    "vit_huge_plus_patch16_dinov3": "dinov3_vith16plus",
    "vit_huge_plus_patch16_dinov3_qkvb": "dinov3_vith16plus",
    "vit_7b_patch16_dinov3": "dinov3_vit7b16",
    "convnext_tiny.dinov3_lvd1689m": "dinov3_convnext_tiny",
    "convnext_small.dinov3_lvd1689m": "dinov3_convnext_small",
    "convnext_base.dinov3_lvd1689m": "dinov3_convnext_base",
    "convnext_large.dinov3_lvd1689m": "dinov3_convnext_large",
}


def timm_model(name: str, **dimensions: Any) -> Any:
    return timm.create_model(name, **dimensions).eval()


@pytest.mark.parametrize(("theirs", "name"), PUBLISHED.items())
def test_the_key_maps_match_every_published_model(theirs: str, name: str) -> None:
    with torch.device("meta"):
        state = timm_model(theirs).state_dict()
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    (found,) = find_backbones(VARIANTS[name], shapes)
    assert found.key_map.name.startswith("timm")
    assert shapes == {key: entry.shape for key, entry in found.key_map.entries.items()}


@pytest.mark.parametrize(
    ("theirs", "variant", "biases"),
    [
        ("vit_small_patch16_dinov3", SHALLOW, False),
        ("vit_small_patch16_dinov3_qkvb", SHALLOW, True),
        ("vit_small_plus_patch16_dinov3", SHALLOW_SWIGLU, False),
        ("vit_small_plus_patch16_dinov3_qkvb", SHALLOW_SWIGLU, True),
        ("vit_7b_patch16_dinov3", NARROW_7B, False),
    ],
)
def test_a_vit_converted_by_timm_from_the_official_file(
    tmp_path: Path, theirs: str, variant: VitVariant, biases: bool
) -> None:
    tensors = random_tensors(variant, 5)
    if not biases:
        tensors |= {n: torch.zeros_like(t) for n, t in tensors.items() if n.endswith(("attn.q.bias", "attn.v.bias"))}
    model = timm_model(theirs, embed_dim=variant.embed_dim, num_heads=variant.heads, depth=variant.depth)
    convert = timm.models.eva.checkpoint_filter_fn
    model.load_state_dict(convert(official_state(variant, tensors), model), strict=True)
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, tmp_path / "model.safetensors")

    checkpoint = load_checkpoint(tmp_path, variant)
    tensors |= variant.constants()
    assert checkpoint.tensors.keys() == tensors.keys()
    assert all(torch.equal(checkpoint.tensors[name], tensor) for name, tensor in tensors.items())

    periods = tensors[PERIODS]
    assert torch.allclose(model.rope.periods, periods, rtol=2**-8), "timm's are the same, not rounded to bfloat16"
    model.rope.periods.copy_(periods)
    images = picture(64, 80)
    with torch.inference_mode():
        tokens = model.forward_features(normalized(images))
    expected = {
        Output("cls"): tokens[:, 0],
        Output("registers"): tokens[:, 1:5],
        Output("patches"): tokens[:, 5:],
    }
    assert worst_error(ours(variant, dict(checkpoint.tensors)), images, expected) <= 1e-5


def test_a_convnext_converted_by_timm_from_the_official_file(tmp_path: Path) -> None:
    tensors = random_tensors(NARROW, 5)
    model = timm_model("convnext_tiny.dinov3_lvd1689m", dims=NARROW.dims, depths=NARROW.depths)
    convert = timm.models.convnext.checkpoint_filter_fn
    model.load_state_dict(convert(convnext_official_state(tensors), model), strict=True)
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, tmp_path / "model.safetensors")
    checkpoint = load_checkpoint(tmp_path, NARROW)
    assert checkpoint.tensors.keys() == tensors.keys()
    assert all(torch.equal(checkpoint.tensors[name], tensor) for name, tensor in tensors.items())

    images = picture(64, 96)
    with torch.inference_mode():
        cells = model.forward_features(normalized(images))
        expected = {
            Output("cls"): model.forward_head(cells, pre_logits=True),
            Output("patches"): model.head.norm(cells).flatten(2).transpose(1, 2),
        }
    assert worst_error(checkpoint.build(dtype=torch.float32, device=CPU), images, expected) <= 1e-5
