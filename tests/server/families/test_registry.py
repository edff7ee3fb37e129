"""The variants as data, and the errors for unknown names."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from dinov3_server.errors import ConfigError
from dinov3_server.families.dinov3_convnext.variants import CONVNEXTS, ConvNextVariant
from dinov3_server.families.dinov3_vit.variants import VITS, VitVariant
from dinov3_server.families.registry import VARIANTS, lookup
from dinov3_server.models.variant import DATASETS


@pytest.mark.parametrize("variant", VITS.values(), ids=lambda variant: variant.name)
def test_exact_parameter_counts_of_vision_transformers(variant: VitVariant) -> None:
    inference = sum(math.prod(shape) for shape in variant.canonical_shapes().values())
    mask_token = variant.embed_dim
    masked_key_biases = variant.depth * variant.embed_dim if variant.qkv_bias else 0
    local_cls_norm = 2 * variant.embed_dim if variant.name == "dinov3_vit7b16" else 0
    assert variant.parameters == inference + mask_token + masked_key_biases + local_cls_norm


@pytest.mark.parametrize("variant", CONVNEXTS.values(), ids=lambda variant: variant.name)
def test_exact_parameter_counts_of_convnexts(variant: ConvNextVariant) -> None:
    assert variant.parameters == sum(math.prod(shape) for shape in variant.canonical_shapes().values())


def test_every_variant_is_found_by_its_names() -> None:
    assert VARIANTS == VITS | CONVNEXTS
    for name, variant in VARIANTS.items():
        assert variant.name == name
        short = name.removeprefix("dinov3_")
        for spelling in (name, short, name.upper(), f" {name} ", short.replace("_", "-"), name.replace("_", "-")):
            assert lookup(spelling) is variant


def test_layers_of_both_families() -> None:
    vit, convnext = lookup("vits16"), lookup("convnext_base")
    assert (vit.layer_dims, vit.layer_strides) == ((384,) * 12, (16,) * 12)
    assert (convnext.layer_dims, convnext.layer_strides) == ((128, 256, 512, 1024), (4, 8, 16, 32))
    for variant in VARIANTS.values():
        assert (variant.layer_dims[-1], variant.layer_strides[-1]) == (variant.embed_dim, variant.patch_size)
        assert len(variant.layer_dims) == len(variant.layer_strides) == variant.depth


@pytest.mark.parametrize(("alias", "name"), [("small", "vits16"), ("vit_base", "vitb16"), ("vit-large", "vitl16")])
def test_aliases(alias: str, name: str) -> None:
    assert lookup(alias) is VARIANTS[f"dinov3_{name}"]


def test_official_file_names() -> None:
    assert lookup("vits16").official_file("lvd1689m") == "dinov3_vits16_pretrain_lvd1689m-08c60483.pth"
    assert lookup("vitl16").official_file("sat493m") == "dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth"
    assert [v.name for v in VARIANTS.values() if "sat493m" in v.hashes] == ["dinov3_vitl16", "dinov3_vit7b16"]
    assert all(set(v.hashes) <= set(DATASETS) and "lvd1689m" in v.hashes for v in VARIANTS.values())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("giant2", "DINOv3 has no giant2.*vith16plus.*1280.*vit7b16.*4096"),
        ("dinov3_vitg14", "DINOv3 has no giant2"),
        ("vits14", "patch of 16, not 14.*518.*512 or 528"),
        ("dinov2_vitb", "patch of 16"),
        ("convnext_huge", "did you mean 'convnext_"),
        ("vitb61", "did you mean 'vitb16'"),
        ("dinov3_vitsl16plus", "did you mean 'vits?l?16plus'"),
        ("resnet50", "is not known"),
        ("", "is not known"),
    ],
)
def test_unknown_names_are_explained(name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        lookup(name)
    assert repr(name) in str(caught.value)
    assert all(known in str(caught.value) for known in VARIANTS)


def test_frontends_can_import_it_without_torch() -> None:
    modules = ("families.registry", "models.interface", "backbone.runners.plan")
    code = ";".join(f"import dinov3_server.{module}" for module in modules)
    code += ";import sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(filter(None, sys.path))})
