from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from dinov3_client import Client
from tests.client.fake_server import FakeServer


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


@pytest.fixture
def client(server: FakeServer) -> Iterator[Client]:
    with Client(server.target, deadline=20) as client:
        yield client


class FakeClock:
    """Time that passes only in `sleep`; `pauses` are the seconds slept."""

    def __init__(self) -> None:
        self.seconds = 1000.0
        self.pauses: list[float] = []
        self.rand = random.Random(5)

    def now(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.seconds += seconds


@pytest.fixture
def clock(client: Client) -> FakeClock:
    """Rules the client's retries."""
    clock = FakeClock()
    client._now, client._sleep, client._rand = clock.now, clock.sleep, clock.rand.random
    return clock
