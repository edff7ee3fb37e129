"""`dinov3-server serve` with an empty cache folder: it fetches code from a git repository and weights from a URL,
verifies the model and serves it; a restart fetches nothing.

Runs with a stand-in for Meta's code, and with Meta's own if DINOV3_UPSTREAM is set to a copy of it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from bench.upstream_repository import served_repository
from dinov3_server.backbone.weights.random_weights import random_tensors
from dinov3_server.errors import ParityError, Unreachable
from dinov3_server.families.dinov3_vit.variants import VITS
from tests.server.backbone.files import official_state
from tests.server.provision.repositories import LICENSE, add_commit, git
from tests.support.server import ROOT, Server
from tests.support.upstream_code import write_checkout
from tests.support.waiting import until

VARIANT = VITS["dinov3_vits16"]
FULL_SIZE = "WIDTH, DEPTH, HEADS, HIDDEN = 384, 12, 6, 1536"
METAS = pytest.param(
    "Meta's",
    marks=[
        pytest.mark.upstream,
        pytest.mark.skipif("DINOV3_UPSTREAM" not in os.environ, reason="DINOV3_UPSTREAM names no copy of Meta's code"),
    ],
)


class Outside(NamedTuple):
    """The servers and files for a first start."""

    folder: Path
    repository: str
    revision: str
    weights: str

    def flags(self, cache_dir: Path) -> tuple[str, ...]:
        return (
            *("--cache-dir", str(cache_dir), "--upstream-repo", self.repository, "--upstream-revision", self.revision),
            *("--weights", self.weights, "--dtype", "float32", "--warm-up-sizes", "none"),
        )


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "vits16.pth"
    torch.save(official_state(VARIANT, random_tensors(VARIANT, 3)), path)
    return path


def stand_in(folder: Path, changes: str = "") -> tuple[str, str]:
    repository = write_checkout(folder / "repository", f"{FULL_SIZE}\n{changes}")
    git(repository, "init", "--quiet", "--initial-branch=main")
    return repository.as_uri(), add_commit(repository, {LICENSE: "a license"})


@pytest.fixture(params=["a stand-in", METAS])
def outside(request: pytest.FixtureRequest, tmp_path: Path, weights: Path) -> Outside:
    folder = tmp_path / "outside"
    folder.mkdir()
    repository, revision = stand_in(folder) if request.param == "a stand-in" else served_repository(folder)
    shutil.copy(weights, folder)
    return Outside(folder, repository, revision, (folder / weights.name).as_uri())


def test_a_first_start_fetches_and_verifies_and_a_restart_fetches_nothing(outside: Outside, tmp_path: Path) -> None:
    cache_dir = tmp_path / "cache_dir"
    with Server(*outside.flags(cache_dir), module="dinov3_server.cli", limit=90) as server:
        with server.client() as client:
            model = client.model()
            assert client.extract(torch.zeros(224, 224, 3, dtype=torch.uint8).numpy()).cls.shape == (1, 384)
        assert model.parity_check.verified
        assert model.parity_check.upstream_revision == outside.revision
        assert {proof.output for proof in model.parity_check.outputs} == {"cls", "patches"}
        for proof in model.parity_check.outputs:
            assert proof.relative_error < 1e-5
        # Gauges of the worker's, up to a second behind.
        for output in ("cls", "patches"):
            until(lambda output=output: server.metric("dinov3_parity_cosine", output=output) > 0.999999)
        log = "".join(server.log)
        assert log.count("DINOv3 License") == 1
        assert f"parity check: verified against Meta's code at {outside.revision}" in log
    before = {path: path.stat().st_mtime_ns for path in cache_dir.rglob("*") if path.suffix != ".lock"}

    shutil.rmtree(outside.folder)
    with Server(*outside.flags(cache_dir), "--offline", module="dinov3_server.cli") as server:
        with server.client() as client:
            again = client.model()
        assert again == model
        log = "".join(server.log)
        assert "load: build took" in log
        assert "load: upstream took" not in log
        assert "DINOv3 License" not in log
    assert {path: path.stat().st_mtime_ns for path in cache_dir.rglob("*") if path.suffix != ".lock"} == before


def start(flags: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Run a start that fails."""
    command = [sys.executable, "-m", "dinov3_server.cli", "serve", "--port", "0", "--http-port", "0", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90, check=False)


def test_features_that_are_not_metas_are_not_served(tmp_path: Path, weights: Path) -> None:
    repository, revision = stand_in(tmp_path, "SCALE = 1.01")
    ended = start(Outside(tmp_path, repository, revision, str(weights)).flags(tmp_path / "cache_dir"))
    assert ended.returncode == ParityError.exit_code
    assert ended.stdout == ""
    assert "are not those of Meta's code" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_without_a_network_one_error_lists_everything_missing(tmp_path: Path) -> None:
    ended = start(
        ("--cache-dir", str(tmp_path / "cache_dir"), "--offline", "--backbone", "reference", "--model", "vitb16")
    )
    assert ended.returncode == Unreachable.exit_code
    assert "dinov3_vitb16_pretrain_lvd1689m-73cec8be.pth" in ended.stderr
    assert "git clone" in ended.stderr
    assert ended.stdout == ""
