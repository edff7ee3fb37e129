"""The arithmetic of the overload benchmark."""

from __future__ import annotations

from collections import Counter

import grpc
import pytest

from bench import overload
from bench.open_loop import Sent, Usage
from bench.server import quantile_ms
from dinov3_serving.v1 import feature_service_pb2 as pb


def test_goodput_is_relative_to_the_capacity_that_refusals_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overload, "CORES", 2)
    codes = Counter({grpc.StatusCode.OK: 450, grpc.StatusCode.RESOURCE_EXHAUSTED: 540})
    codes[grpc.StatusCode.DEADLINE_EXCEEDED] = 10
    # 500 answers took 1 s of CPU in the closed loop. Of the 3 s here, 2.1 s are for requests that were refused.
    closed = Usage(10.0, generator=0.4, frontends=0.6, answered=500)
    sent = Sent(10.0, codes, Usage(10.0, generator=1.0, frontends=2.0, answered=450))
    loop = {"model": "vits16", "deadline": 2.0, "sent": sent, "counted": {"late": 0.01}}
    row = overload._row(loop, closed, 50.0, "224", 1)
    assert (row["load"], row["of_capacity"], row["of_offered"], row["expired"]) == (2.0, 0.9, 0.45, 10)
    assert row["of_left"] == pytest.approx(45 / (50 * (1 - 2.1 / 20)), abs=1e-3)
    assert (row["generator"], row["late"]) == (0.05, 0.01)


def test_device_figures_are_differences_of_the_metrics() -> None:
    names = ("late_device_seconds_total", "device_busy_seconds_total", "batch_images_sum", "batch_images_count")
    before = {(f"dinov3_{name}", "cpu"): 1.0 for name in names}
    after = {key: 1.0 + value for key, value in zip(before, (0.09, 9.0, 450.0, 20.0), strict=True)}
    assert overload._counted(before, after, seconds=10.0) == {
        "refused_ms": [None, None],
        "lag_ms": None,
        "late": 0.01,
        "busy": 0.9,
        "mean_batch": 22.5,
    }


def test_a_quantile_is_the_upper_bound_of_its_bucket() -> None:
    name = "dinov3_refusal_seconds_bucket"
    grown = {(name, "0.001"): 90.0, (name, "0.005"): 98.0, (name, "0.01"): 100.0, (name, "+Inf"): 100.0}
    assert [quantile_ms(grown, "dinov3_refusal_seconds", part) for part in (0.5, 0.98, 0.99)] == [1.0, 5.0, 10.0]
    assert quantile_ms(dict.fromkeys(grown, 0.0), "dinov3_refusal_seconds", 0.99) is None
    assert quantile_ms(grown, "dinov3_event_loop_lag_seconds", 0.99) is None


def test_requests_can_be_read_by_the_server() -> None:
    messages = [pb.ExtractRequest.FromString(data) for data in overload._requests((224, 256))]
    assert [len(message.images) for message in messages] == [1, 1]
    assert all(message.images[0].encoded[:2] == b"\xff\xd8" for message in messages)
