"""Our features against Meta's own code, through a file that it wrote."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.reference import upstream_checkout
from dinov3_server.backbone.checkpoint import load_checkpoint
from dinov3_server.backbone.interface import Output
from dinov3_server.backbone.registry import lookup
from tests.backbone import upstream_export
from tests.backbone.features import ours, worst_error

pytestmark = [
    pytest.mark.upstream,
    pytest.mark.skipif(
        "DINOV3_UPSTREAM" not in os.environ, reason="DINOV3_UPSTREAM names no copy of Meta's repository"
    ),
]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return upstream_checkout(tmp_path_factory.mktemp("upstream"))


@pytest.mark.parametrize("name", ["dinov3_vits16", "dinov3_vits16plus"])
def test_features_equal_upstreams(checkout: Path, tmp_path: Path, name: str) -> None:
    command = [sys.executable, upstream_export.__file__, str(checkout), name, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    checkpoint = load_checkpoint(tmp_path / "weights.pth", lookup(name))
    model = ours(checkpoint.variant, dict(checkpoint.tensors), checkpoint.periods)
    for stored in torch.load(tmp_path / "features.pth", weights_only=True).values():
        expected = {Output(kind): tokens for kind, tokens in stored["final"].items()}
        for layer, parts in enumerate(stored["layers"]):
            expected |= {Output(kind, layer, norm=False): tokens for kind, tokens in parts.items()}
        assert len(expected) == 3 * (1 + checkpoint.variant.depth)
        assert worst_error(model, stored["pixels"], expected) <= 1e-5
