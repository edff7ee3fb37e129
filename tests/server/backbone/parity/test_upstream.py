"""Our features against Meta's own code for every variant, with a file that Meta's code wrote."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.reference import upstream_checkout
from dinov3_server.backbone.parity.reference_images import reference_images
from dinov3_server.backbone.parity.upstream_process import UpstreamTask, upstream_features
from dinov3_server.backbone.weights.checkpoint import load_checkpoint
from dinov3_server.families.dinov3_vit.variants import VitVariant
from dinov3_server.families.registry import lookup
from dinov3_server.models.interface import Output
from dinov3_server.models.variant import Variant
from tests.server.backbone import upstream_export
from tests.server.backbone.features import CPU, worst_error

pytestmark = [
    pytest.mark.upstream,
    pytest.mark.skipif(
        "DINOV3_UPSTREAM" not in os.environ, reason="DINOV3_UPSTREAM names no copy of Meta's repository"
    ),
]

# Large variants have only two blocks here: all blocks are alike, and names, widths and heads are what differs.
DEPTHS = {"vits16": 12, "vits16plus": 12, "vitb16": 12, "vitl16": 2, "vitl16plus": 2, "vith16plus": 2, "vit7b16": 2}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return upstream_checkout(tmp_path_factory.mktemp("upstream"))


def export(checkout: Path, variant: Variant, dataset: str, out: Path, *recipe: str) -> None:
    script = [upstream_export.__file__, checkout, variant.name, dataset, str(variant.depth), out, *recipe]
    done = subprocess.run([sys.executable, *script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["vits16", "vits16plus"])
def test_metas_default_training_configuration(checkout: Path, tmp_path: Path, name: str) -> None:
    """Without registers and key masks: our features and, as for the parity check, those of Meta's code."""
    variant = lookup(name)
    export(checkout, variant, "lvd1689m", tmp_path, "RECIPE")
    state = torch.load(tmp_path / "weights.pth", weights_only=True)
    teacher = {f"backbone.{key}": tensor for key, tensor in state.items()} | {"dino_head.a.weight": torch.ones(3)}
    torch.save({"teacher": teacher}, tmp_path / "teacher_checkpoint.pth")
    checkpoint = load_checkpoint(tmp_path / "teacher_checkpoint.pth", variant)
    model = checkpoint.build(dtype=torch.float32, device=CPU)
    for stored in torch.load(tmp_path / "features.pth", weights_only=True).values():
        expected = {Output(kind): tokens for kind, tokens in stored["final"].items()}
        assert worst_error(model, stored["pixels"], expected) <= 1e-5
    task = UpstreamTask(
        tmp_path / "teacher_checkpoint.pth", checkout, "", checkpoint.variant, "lvd1689m", ("float32",), "cpu", 1
    )
    (theirs,) = upstream_features(task).values()
    for image, parts in zip(reference_images(), theirs, strict=True):
        assert worst_error(model, torch.from_numpy(image)[None], {Output(k): t[None] for k, t in parts.items()}) <= 1e-5


@pytest.mark.parametrize(
    ("name", "dataset"),
    [
        *((name, "lvd1689m") for name in DEPTHS),
        ("vitl16", "sat493m"),
        *((f"convnext_{size}", "lvd1689m") for size in ("tiny", "small", "base", "large")),
    ],
)
def test_features_equal_metas(checkout: Path, tmp_path: Path, name: str, dataset: str) -> None:
    variant = lookup(name)
    if isinstance(variant, VitVariant):
        variant = dataclasses.replace(variant, depth=DEPTHS[name])
    export(checkout, variant, dataset, tmp_path)
    path = tmp_path / "weights.pth"
    checkpoint = load_checkpoint(path, variant)
    assert checkpoint.dataset.name == dataset
    model = checkpoint.build(dtype=torch.float32, device=CPU)
    path.unlink()  # pytest would keep up to 2 GB
    kinds = 3 if variant.registers else 2
    for stored in torch.load(tmp_path / "features.pth", weights_only=True).values():
        expected = {Output(kind): tokens for kind, tokens in stored["final"].items()}
        for layer, parts in enumerate(stored["layers"]):
            expected |= {Output(kind, layer, norm=False): tokens for kind, tokens in parts.items()}
        assert len(expected) == kinds * (1 + variant.depth)
        assert worst_error(model, stored["pixels"], expected) <= 1e-5
