"""A tiny model with a stand-in for Meta's code, for tests of the parity check."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from dinov3_server.backbone.parity.upstream_process import ReferenceFeatures
from dinov3_server.backbone.runner import build
from dinov3_server.backbone.runners.base import TorchRunner
from dinov3_server.backbone.weights.random_weights import random_tensors
from dinov3_server.families.registry import lookup
from dinov3_server.models.interface import Provisioned
from tests.server.backbone.files import official_state
from tests.support.upstream_code import write_checkout

TINY = dataclasses.replace(lookup("vits16"), embed_dim=64, depth=2, heads=2, ffn_dim=128)
REVISION = "0123456789abcdef0123456789abcdef01234567"


class Start:
    """Starts of a worker with a tiny model in Meta's layout and a stand-in for Meta's code, edited by `changes`."""

    def __init__(self, folder: Path, changes: str = "") -> None:
        folder.mkdir(exist_ok=True)
        self.weights = folder / "tiny_pretrain_lvd1689m.pth"
        torch.save(official_state(TINY, random_tensors(TINY, 5)), self.weights)
        self.checkout = write_checkout(folder / "code", changes)
        self.store = folder / "parity"
        self.provisioned = Provisioned(str(self.weights), "the label", REVISION, str(self.checkout))

    def __call__(self, dtype: str = "float32", **changes: Any) -> TorchRunner:
        arguments = {"provisioned": self.provisioned, "parity_folder": str(self.store), "warm_up": (), "threads": 1}
        return build("tiny", str(self.weights), dtype=dtype, **{**arguments, **changes})

    def stored(self) -> list[Path]:
        return sorted(self.store.glob("*.json"))


class FakeUpstream:
    """Replaces `upstream_features`: counts calls, and returns precomputed features or raises `failure`."""

    def __init__(self, features: dict[Any, ReferenceFeatures]) -> None:
        self.features, self.calls = features, 0
        self.failure: Exception | None = None

    def __call__(self, *_: object, **__: object) -> dict[Any, ReferenceFeatures]:
        self.calls += 1
        if self.failure is not None:
            raise self.failure
        return self.features
