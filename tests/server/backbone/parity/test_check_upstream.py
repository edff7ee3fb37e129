"""The parity check against Meta's own code, and that code served, with seeded weights in Meta's layout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from bench.reference import upstream_checkout
from dinov3_server.backbone.runner import build
from dinov3_server.backbone.weights.checkpoint import load_checkpoint
from dinov3_server.families.registry import lookup
from dinov3_server.models.interface import Output, Provisioned
from tests.server.backbone import upstream_export
from tests.server.backbone.features import CPU, worst_error

pytestmark = [
    pytest.mark.upstream,
    pytest.mark.skipif(
        "DINOV3_UPSTREAM" not in os.environ, reason="DINOV3_UPSTREAM names no copy of Meta's repository"
    ),
]
REVISION = "6876159a11b4df116f30f667f8c9888617df0751"


class Export(NamedTuple):
    """Return a checkpoint and features of random pixels by Meta's code, written by a separate process."""

    name: str
    weights: Path
    features: Path
    provisioned: Provisioned


@pytest.fixture(scope="module", params=["dinov3_vits16", "dinov3_convnext_tiny"])
def export(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Export:
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    checkout = upstream_checkout(tmp_path_factory.mktemp("upstream"))
    depth = str(lookup(name).depth)
    command = [sys.executable, upstream_export.__file__, str(checkout), name, "lvd1689m", depth, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    weights = folder / "weights.pth"
    provisioned = Provisioned(str(weights), weights.name, REVISION, str(checkout))
    return Export(name, weights, folder / "features.pth", provisioned)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_our_features_are_verified(export: Export, tmp_path: Path, dtype: str) -> None:
    def start() -> dict[str, float]:
        served = build(
            export.name,
            str(export.weights),
            dtype=dtype,
            threads=1,
            warm_up=(),
            provisioned=export.provisioned,
            parity_folder=str(tmp_path),
        )
        shown = served.info.parity_check
        assert shown.verified
        assert shown.upstream_revision == REVISION
        assert all(output.relative_error < 1e-5 for output in shown.outputs if output.dtype == "float32")
        return served.load_seconds

    assert {"upstream", "parity_check"} <= start().keys()
    assert not {"upstream", "parity_check"} & start().keys()


def test_the_reference_backbone_serves_metas_features(export: Export) -> None:
    """Features are computed in a separate process, like a worker, and compared here."""
    script = """
import sys, torch
from pathlib import Path
from dinov3_server.backbone.weights.checkpoint import load_checkpoint
from dinov3_server.models.interface import Output
from dinov3_server.families.registry import lookup
from dinov3_server.backbone.parity.upstream import UpstreamModel
checkout, weights, name, stored, out = sys.argv[1:]
torch.set_num_threads(1)
variant = lookup(name)
model = UpstreamModel(
    Path(checkout), load_checkpoint(Path(weights), variant), dtype=torch.float32, device=torch.device("cpu")
)
kinds = ("cls", "registers", "patches") if variant.registers else ("cls", "patches")
wanted = [Output(kind) for kind in kinds]
layers = (0, variant.depth // 2, variant.depth - 1)
wanted += [Output(kind, layer, norm) for layer in layers for norm in (False, True) for kind in kinds]
features = {}
with torch.inference_mode():
    for size, each in torch.load(stored, weights_only=True).items():
        found = model(each["pixels"], wanted)
        features[size] = [(output.kind, output.layer, output.norm, tokens.clone()) for output, tokens in found.items()]
torch.save(features, out)
"""
    out = export.weights.parent / "served.pth"
    assert export.provisioned.checkout is not None
    arguments = [export.provisioned.checkout, export.weights, export.name, export.features, out]
    done = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    served = torch.load(out, weights_only=True)
    variant = lookup(export.name)
    model = load_checkpoint(export.weights, variant).build(dtype=torch.float32, device=CPU)
    for size, each in torch.load(export.features, weights_only=True).items():
        features = {Output(kind, layer, norm): tokens for kind, layer, norm, tokens in served[size]}
        theirs = {Output(kind): tokens for kind, tokens in each["final"].items()}
        theirs |= {
            Output(kind, layer, norm=False): tokens
            for layer, parts in enumerate(each["layers"])
            for kind, tokens in parts.items()
        }
        compared = features.keys() & theirs.keys()
        assert len(compared) == len(each["final"]) * 4  # the final outputs, and three layers' before the norm
        for output in compared:
            error = (features[output] - theirs[output]).norm() / theirs[output].norm()
            assert float(error) <= 1e-6, output
        assert worst_error(model, each["pixels"], features) <= 1e-5
