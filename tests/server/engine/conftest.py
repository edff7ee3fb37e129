from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dinov3_server.config.settings import Settings
from tests.server.engine.worker_rig import Running, SteppedRunner


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Running]]:
    """Ends its workers before what the test has patched is put back."""
    running: list[Running] = []

    def start(depth: int = 1, **settings: Any) -> Running:
        running.append(Running(SteppedRunner(depth), Settings(**settings)))
        return running[-1]

    yield start
    for one in running:
        one.close()
