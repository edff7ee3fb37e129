from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dinov3_server.backbone import runner
from dinov3_server.backbone.parity import check
from dinov3_server.backbone.parity.upstream_process import ReferenceFeatures, UpstreamTask, upstream_features
from dinov3_server.families.registry import lookup
from dinov3_server.models.interface import FeatureDtype
from tests.server.backbone.parity.rig import TINY, FakeUpstream, Start


@pytest.fixture
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add the model name `tiny`, and keep `build` from changing the number of threads."""
    monkeypatch.setattr(runner, "lookup", lambda name: TINY if name == "tiny" else lookup(name))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


@pytest.fixture(scope="session")
def computed(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, ReferenceFeatures]:
    """Features by the stand-in, computed in its own process."""
    start = Start(tmp_path_factory.mktemp("computed"))
    dtypes: tuple[FeatureDtype, ...] = ("float32", "bfloat16")
    return upstream_features(UpstreamTask(start.weights, start.checkout, "", TINY, "lvd1689m", dtypes, "cpu", 1))


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch, computed: dict[Any, ReferenceFeatures]) -> FakeUpstream:
    fake = FakeUpstream(computed)
    monkeypatch.setattr(check, "upstream_features", fake)
    return fake


@pytest.fixture
def start(tmp_path: Path, tiny_model: None) -> Start:
    return Start(tmp_path)
