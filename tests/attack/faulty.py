"""A server with faults: its features are not finite, and its worker dies once, at its tenth batch, and then makes the
file TEST_DIED_FILE."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from bench.instant import InstantRunner, _Launched
from dinov3_server.cli import main
from dinov3_server.models.interface import BatchResult


class FaultyRunner(InstantRunner):
    batches = 0

    def finish(self, launched: _Launched) -> BatchResult:
        self.batches += 1
        died = Path(os.environ["TEST_DIED_FILE"])
        if self.batches == 10 and not died.exists():
            died.touch()
            os._exit(1)
        return BatchResult((False,) * launched.rows, 0.0, 0.0, 0.0)


def build(model: str, weights: str, *, device: str, **_: object) -> FaultyRunner:
    return FaultyRunner(model, weights, device)


if __name__ == "__main__":
    sys.exit(main(runner="tests.attack.faulty:build"))
