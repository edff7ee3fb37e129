"""Fetching Meta's real repository."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.upstream_repository import served_repository
from dinov3_server.provision.checkout import State, look
from dinov3_server.provision.vendor import vendor

pytestmark = [
    pytest.mark.upstream,
    pytest.mark.skipif(
        "DINOV3_UPSTREAM" not in os.environ, reason="DINOV3_UPSTREAM names no copy of Meta's repository"
    ),
]


def test_metas_repository_is_fetched_and_can_be_imported(tmp_path: Path) -> None:
    url, commit = served_repository(tmp_path)
    target = tmp_path / "cache_dir" / "upstream" / commit
    vendor(url, commit, target)
    assert look(target, commit).state is State.GOOD
    assert "DINOv3 License" in (target / "LICENSE.md").read_text()
    code = "import dinov3.hub.backbones as b; print(b.dinov3_vits16(pretrained=False).embed_dim, b.__file__)"
    imported = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(target)},
                              check=True, capture_output=True, text=True)  # fmt: skip
    assert imported.stdout.split() == ["384", str(target / "dinov3" / "hub" / "backbones.py")]
    vendor("https://nowhere.invalid/", commit, target, offline=True)  # with Python's caches in it, it is still whole
