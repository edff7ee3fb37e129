"""The fingerprint: one for one model in any file, another for anything that changes a feature."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dinov3_server.backbone.weights.checkpoint import Checkpoint, load_checkpoint
from dinov3_server.backbone.weights.fingerprint import fingerprint
from dinov3_server.backbone.weights.random_weights import random_tensors
from dinov3_server.families.dinov3_vit.variants import PERIODS, VitVariant
from dinov3_server.families.registry import lookup
from dinov3_server.models.variant import DATASETS
from tests.server.backbone.convnext_files import (
    NARROW,
    convnext_official_state,
    convnext_timm_state,
    convnext_transformers_state,
)
from tests.server.backbone.files import SHALLOW, SHALLOW_SWIGLU, official_state, timm_state, transformers_state


def checkpoint(seed: int = 5) -> Checkpoint:
    return Checkpoint(SHALLOW, DATASETS["lvd1689m"], random_tensors(SHALLOW, seed) | SHALLOW.constants())


def identity(of: Checkpoint, dtype: str = "float32", preprocessing: str = "pillow 12") -> str:
    return fingerprint(of, dtype=dtype, preprocessing=preprocessing)


@pytest.mark.parametrize("variant", [SHALLOW, SHALLOW_SWIGLU])
def test_equal_across_layouts_and_files(tmp_path: Path, variant: VitVariant) -> None:
    tensors = random_tensors(variant, 5)
    torch.save(official_state(variant, tensors), tmp_path / "a.pth")
    save_file(transformers_state(variant, tensors, older=True), tmp_path / "older.safetensors")
    save_file(transformers_state(variant, tensors, older=False), tmp_path / "newer.safetensors")
    save_file(timm_state(variant, tensors, biases=True), tmp_path / "timm.safetensors")
    found = {identity(load_checkpoint(path, variant)) for path in tmp_path.iterdir()}
    assert len(found) == 1
    (text,) = found
    assert len(text) == 32
    assert int(text, 16) >= 0


def test_equal_across_the_layouts_of_a_convnext(tmp_path: Path) -> None:
    tensors = random_tensors(NARROW, 5)
    torch.save(convnext_official_state(tensors), tmp_path / "a.pth")
    save_file(convnext_transformers_state(NARROW, tensors, older=True), tmp_path / "older.safetensors")
    save_file(convnext_timm_state(NARROW, tensors), tmp_path / "timm.safetensors")
    found = {identity(load_checkpoint(path, NARROW)) for path in tmp_path.iterdir()}
    assert len(found) == 1
    changed = tensors | {"stages.2.1.gamma": tensors["stages.2.1.gamma"] * 1.01}
    torch.save(convnext_official_state(changed), tmp_path / "b.pth")
    assert identity(load_checkpoint(tmp_path / "b.pth", NARROW)) not in found


def test_equal_for_the_same_values_in_a_smaller_dtype() -> None:
    rounded = {name: tensor.bfloat16() for name, tensor in checkpoint().tensors.items()}
    widened = {name: tensor.float() for name, tensor in rounded.items()}
    assert identity(dataclasses.replace(checkpoint(), tensors=rounded)) == identity(
        dataclasses.replace(checkpoint(), tensors=widened)
    )


def test_the_order_of_keys_does_not_matter() -> None:
    reordered = dict(reversed(checkpoint().tensors.items()))
    assert identity(dataclasses.replace(checkpoint(), tensors=reordered)) == identity(checkpoint())


def with_one_bit_changed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    changed = tensors["blocks.2.mlp.fc2.weight"].clone()
    changed.view(torch.int32).flatten()[-1] ^= 1
    return tensors | {"blocks.2.mlp.fc2.weight": changed}


def with_two_swapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    one, other = "blocks.0.attn.q.weight", "blocks.0.attn.k.weight"
    return tensors | {one: tensors[other], other: tensors[one]}


@pytest.mark.parametrize("change", [with_one_bit_changed, with_two_swapped])
def test_other_weights_change_the_fingerprint(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    tensors = change(dict(checkpoint().tensors))
    assert identity(dataclasses.replace(checkpoint(), tensors=tensors)) != identity(checkpoint())


def test_everything_else_that_changes_a_feature_changes_the_fingerprint() -> None:
    base = checkpoint()
    others = [
        identity(base),
        identity(base, dtype="bfloat16"),
        identity(base, preprocessing="pillow 13"),
        fingerprint(base, dtype="float32", preprocessing="pillow 12", backbone="reference"),
        identity(dataclasses.replace(base, tensors={**base.tensors, PERIODS: base.tensors[PERIODS] * 1.01})),
        identity(dataclasses.replace(base, dataset=dataclasses.replace(base.dataset, mean=(0.5, 0.5, 0.5)))),
        identity(dataclasses.replace(base, dataset=dataclasses.replace(base.dataset, std=(0.5, 0.5, 0.5)))),
        identity(dataclasses.replace(base, tensors={**base.tensors, "cls_token": base.tensors["cls_token"].view(384)})),
        identity(dataclasses.replace(base, variant=lookup("vits16plus"))),
        identity(checkpoint(seed=6)),
    ]
    assert len(set(others)) == len(others)


def test_random_weights_are_the_same_for_a_seed_and_far_from_uniform_attention() -> None:
    one, again, other = random_tensors(SHALLOW, 1), random_tensors(SHALLOW, 1), random_tensors(SHALLOW, 2)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one if not name.endswith("gamma"))
    assert all(tensor.abs().sum() > 0 for tensor in one.values())
    assert float(one["blocks.0.attn.k.weight"].std()) == pytest.approx(0.08, rel=0.02)
    assert float(one["blocks.0.attn.v.weight"].std()) == pytest.approx(0.02, rel=0.02)
    assert one["blocks.0.ls1.gamma"].unique().tolist() == [0.5]


def test_random_weights_of_a_seed_never_change() -> None:
    """Whoever saved features of `random:5` gets the same ones from every version."""
    tensors = random_tensors(SHALLOW, 5)
    assert tensors["cls_token"][0, 0, :3].tolist() == pytest.approx([0.0368466, 0.0103777, -0.0342384], rel=1e-5)
    assert tensors["blocks.2.norm2.weight"][:2].tolist() == pytest.approx([0.9707575, 1.0710267], rel=1e-5)
    assert tensors["norm.weight"][:2].tolist() == pytest.approx([1.1005548, 0.9038041], rel=1e-5)


def test_random_weights_of_a_convnext_scale_norms_about_one() -> None:
    tensors = random_tensors(NARROW, 1)
    for name in ("downsample_layers.0.1", "downsample_layers.2.0", "stages.1.1.norm", "norm"):
        assert float(tensors[f"{name}.weight"].mean()) == pytest.approx(1, abs=0.2)
        assert float(tensors[f"{name}.bias"].mean()) == pytest.approx(0, abs=0.05)
    assert tensors["stages.3.0.gamma"].unique().tolist() == [0.5]
