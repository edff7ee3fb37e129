"""A projection fitted through the service, and served: `dinov3-client fit-projection` to `--projections`."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
import skimage
from safetensors.numpy import load_file

from dinov3_client.cli import main
from tests.support.server import Server

PHOTOS = [Path(skimage.__file__).parent / "data" / name for name in ("chelsea.png", "coffee.png", "rocket.jpg")]
SERVING = ("--weights", "random:7", "--dtype", "float32", "--threads", "1")


def test_what_was_fitted_is_what_a_server_projects_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "pca16.safetensors"
    with Server(*SERVING, module="dinov3_server.cli") as server:
        options = ("--channels", "16", "--size", "128", "--target", server.grpc)
        assert main(["fit-projection", *map(str, PHOTOS), "-o", str(path), *options]) == 0
        with server.client() as client:
            whole = client.extract(PHOTOS, "patches", size=128, dtype="float32").patches
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("for the server:")]
    with Server(*SERVING, *shlex.split(line)[3:], module="dinov3_server.cli") as server, server.client() as client:
        [projection] = client.model().projections
        assert (projection.name, projection.input_channels, projection.output_channels) == ("pca16", 384, 16)
        features = client.extract(PHOTOS, "patches", size=128, dtype="float32", projection="pca16")
    file = load_file(path)
    assert whole is not None
    assert features.patches is not None
    wanted = whole.astype(np.float64) @ file["weight"].T.astype(np.float64) + file["bias"]
    assert np.abs(features.patches - wanted).max() < 1e-4 * np.abs(wanted).max()
    assert np.abs(features.patches.mean((0, 1))).max() < 1e-3 * np.abs(wanted).max()
    # As much of the variance as the same components of all patches at once, by numpy, have.
    tokens = whole.reshape(-1, 384).astype(np.float64)
    singular = np.linalg.svd(tokens - tokens.mean(0), compute_uv=False)
    assert np.isclose(
        features.patches.astype(np.float64).var((0, 1)).sum(), np.sum(singular[:16] ** 2) / len(tokens), rtol=1e-3
    )
