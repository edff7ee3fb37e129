"""A training loop while its server dies: the epoch completes, with no feature lost, doubled or misplaced."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dinov3_client import Client, Features
from dinov3_client.torch import with_features
from dinov3_server.models.interface import Output
from tests.support.numpy_runner import BLOCK, expected
from tests.support.server import Server
from tests.support.waiting import LIMIT, until

BATCHES, PREFETCH, FATAL = 16, 3, 5
OPTIONS: Any = {"outputs": ("cls", "patches"), "preset": "none", "dtype": "float32"}


def images(index: int) -> NDArray[np.uint8]:
    """Of a batch: one to four, other ones for each index; those after FATAL wait at the device for a file (BLOCK)."""
    pixels = np.random.default_rng(index).integers(0, 250, (1 + index % 4, 32, 48, 3), np.uint8)
    if FATAL < index <= FATAL + PREFETCH:
        pixels[:, 0, 0] = BLOCK
    return pixels


def check(index: int, features: Features) -> None:
    given = images(index)
    assert len(features) == len(given)
    for one, pixels in zip(features, given, strict=True):
        np.testing.assert_array_equal(one.cls, expected(pixels, Output("cls")))
        np.testing.assert_array_equal(one.patches, expected(pixels, Output("patches")))


class Epoch:
    """An epoch up to batch FATAL, when the requests of the next PREFETCH batches are on the server, and its rest."""

    def __init__(self, server: Server, client: Client, gate: Path) -> None:
        def to_request(index: int) -> NDArray[np.uint8]:
            if index == FATAL + 1:  # it would hold up what it shares a batch with
                until(lambda: server.metric("dinov3_requests_total", method="Extract", code="OK") == FATAL + 1)
            return images(index)

        self.stream = with_features(range(BATCHES), client, to_request=to_request, prefetch=PREFETCH, **OPTIONS)
        self.gate = gate
        self.pairs: Iterator[tuple[int, Features]] = iter(self.stream)
        for expected_index, (index, features) in zip(range(FATAL + 1), self.pairs, strict=False):
            assert index == expected_index
            check(index, features)
        until(lambda: server.metric("dinov3_arena_bytes", state="used") > 0, "requests in flight")

    def finish(self) -> None:
        self.gate.touch()
        rest = []
        for index, features in self.pairs:
            check(index, features)
            rest.append(index)
        assert rest == list(range(FATAL + 1, BATCHES))
        assert self.stream.stats.batches == BATCHES
        assert self.stream.stats.images == sum(len(images(index)) for index in range(BATCHES))


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    return tmp_path / "gate"


def test_the_server_is_killed_and_started_again_in_the_middle_of_an_epoch(gate: Path) -> None:
    with Server("--frontends", "2", TEST_GATE_FILE=str(gate)) as first, first.client(deadline=LIMIT) as client:
        epoch = Epoch(first, client, gate)
        first.signal(signal.SIGKILL)
        assert first.wait() == -signal.SIGKILL
        with Server("--port", first.grpc.rpartition(":")[2], TEST_GATE_FILE=str(gate)) as second:
            assert second.grpc == first.grpc
            epoch.finish()


def test_a_worker_is_killed_in_the_middle_of_an_epoch(gate: Path) -> None:
    with Server("--frontends", "2", TEST_GATE_FILE=str(gate)) as server, server.client(deadline=LIMIT) as client:
        epoch = Epoch(server, client, gate)
        (worker,) = server.children("worker")
        worker.kill()
        epoch.finish()
        until(lambda: server.metric("dinov3_worker_restarts_total", device="cpu") == 1)


def test_a_loop_that_is_left_early_cancels_what_is_in_flight(gate: Path) -> None:
    with Server(TEST_GATE_FILE=str(gate)) as server, server.client(deadline=LIMIT) as client:
        epoch = Epoch(server, client, gate)
        del epoch.pairs
        until(lambda: server.metric("dinov3_requests_total", method="Extract", code="CANCELLED") == PREFETCH)
        gate.touch()
        until(lambda: server.metric("dinov3_arena_bytes", state="used") == 0, "memory of the cancelled requests")
