"""The training benchmark: both loops receive every batch's features, and the recorded figures."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench import training
from bench.server import serving
from dinov3_client import Client, Features


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    flags = ("--model", "vits16", "--weights", "random:0", "--arena-bytes", "64MiB", "--frontends", "1")
    with serving(*flags, module="bench.instant") as server, Client(server.grpc) as client:
        yield client


@pytest.mark.parametrize("loop", training.LOOPS)
def test_a_loop_yields_features_of_whole_batches(client: Client, loop: str) -> None:
    features = training.LOOPS[loop](client)
    for _ in range(3):
        one = next(features)
        assert isinstance(one, Features)
        assert one.patches.shape == (training.IMAGES, 196, 384)
        assert one.cls.shape == (training.IMAGES, 384)
    features.close()


def test_a_round_and_its_rows(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "STEPS", 3)
    monkeypatch.setattr(training, "SKIPPED", 1)
    monkeypatch.setattr(training, "SERVICE_SECONDS", 0.3)
    monkeypatch.setattr(training, "WARM_UP", 0.0)
    one = training.one_round(client, 0.002)
    assert set(one.steps) == {"with_features", "naive"}
    for steps in one.steps.values():
        assert 0 <= steps.waited <= steps.seconds
        assert steps.seconds >= 0.002
    assert one.service > 0


def test_rows_are_over_the_slower_of_the_two() -> None:
    rounds = [
        training.Round(service, {"with_features": training.Steps(seconds, 0.1 * seconds)})
        for service, seconds in ((0.1, 0.2), (0.4, 0.44), (0.1, 0.3))
    ]
    row = training.row("equal", 0.2, "with_features", rounds)
    assert (row["student_ms"], row["service_ms"], row["step_ms"]) == (200.0, 100.0, 300.0)
    assert (row["over_ideal"], row["worst"], row["wait_share"]) == (1.1, 1.5, 0.1)
    assert "with_features" in training.show({"goal": training.GOAL, "rows": [row]})
