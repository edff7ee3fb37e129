"""A runner that answers instantly, which leaves the data path of a request.

Pixels are not read and features are not written: an answer has the current content of the arena. `python -m
bench.instant` is `dinov3-server` with this runner instead of a model.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from dinov3_server.cli import main
from dinov3_server.families.registry import lookup
from dinov3_server.models.interface import Batch, BatchResult, ModelInfo
from dinov3_server.models.variant import DATASETS


@dataclass(frozen=True, slots=True)
class _Launched:
    rows: int


class InstantRunner:
    """A runner with the dimensions of a ViT in bfloat16, and without its computation."""

    pipeline_depth = 1

    def __init__(self, model: str, weights: str, device: str) -> None:
        variant, pixels = lookup(model), DATASETS["lvd1689m"]
        self.info = ModelInfo(
            name=variant.name,
            weights=weights,
            random_weights=True,
            fingerprint="0" * 64,
            dtype="bfloat16",
            device=device,
            layer_dims=variant.layer_dims,
            layer_strides=variant.layer_strides,
            register_tokens=variant.registers,
            mean=pixels.mean,
            std=pixels.std,
            parameters=0,
        )
        self.load_seconds: dict[str, float] = {}

    def attach(self, arena: int, memory: memoryview) -> None:
        pass

    def detach(self, arena: int) -> None:
        pass

    def launch(self, batch: Batch) -> _Launched:
        return _Launched(len(batch.rows))

    def finish(self, launched: _Launched) -> BatchResult:
        return BatchResult((True,) * launched.rows, 0.0, 0.0, 0.0)

    def memory(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        pass


def build(model: str, weights: str, *, device: str, **_: object) -> InstantRunner:
    return InstantRunner(model, weights, device)


if __name__ == "__main__":
    sys.exit(main(runner="bench.instant:build"))
