from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import pytest_asyncio

from dinov3_server.config.settings import Settings
from dinov3_server.engine.arena import PAGE, Arena
from dinov3_server.engine.engine import Engine
from dinov3_server.metrics import Metrics
from tests.server.engine.engine_rig import FakeWorker
from tests.server.engine.worker_rig import RunningWorker, SteppedRunner


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., RunningWorker]]:
    """Return a function that starts a worker. Workers end before the test's patches are undone."""
    running: list[RunningWorker] = []

    def start(depth: int = 1, **settings: Any) -> RunningWorker:
        running.append(RunningWorker(SteppedRunner(depth), Settings(**settings)))
        return running[-1]

    yield start
    for one in running:
        one.close()


@pytest_asyncio.fixture
async def engine() -> AsyncIterator[Engine]:
    engine = Engine(Arena(64 * PAGE), Settings(max_queue_images=64, max_images_per_request=48), Metrics())
    yield engine
    engine.close()
    while FakeWorker.instances:
        FakeWorker.instances.pop().channel.close()
