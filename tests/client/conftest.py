from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from dinov3_client import Client
from dinov3_client.testing import MODEL, FakeServer
from tests.client.adapters import ADAPTERS, Adapter
from tests.support.waiting import LIMIT

# Layer 0 has fewer channels and a finer grid than the others.
SERVED = replace(MODEL, layer_dims=(18,) + (24,) * 11, layer_strides=(8,) + (16,) * 11, frontends=2)


@pytest.fixture(params=ADAPTERS, ids=lambda adapter: adapter.__name__)
def adapter(request: pytest.FixtureRequest) -> type[Adapter]:
    """One client, then the other."""
    kind: type[Adapter] = request.param
    return kind


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer(SERVED) as server:
        yield server


@pytest.fixture
def client(server: FakeServer) -> Iterator[Client]:
    with Client(server.target, deadline=LIMIT) as client:
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
    client._session.now, client._session.rand = clock.now, clock.rand.random
    client._sleep = lambda _, seconds: clock.sleep(seconds)
    return clock
