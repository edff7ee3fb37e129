"""Both clients and servers with small limits, pins, and servers that come back with another model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest

from dinov3_client import ImageErrors, ModelMismatch, ServerError
from dinov3_client._session import MAX_PARALLEL_REQUESTS
from dinov3_client.testing import MODEL, Failure, FakeServer
from tests.client.adapters import EXACT, Adapter, check, photos

Code = grpc.StatusCode


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


def limited(images: int) -> Any:
    return replace(MODEL, limits=replace(MODEL.limits, max_images_per_request=images))


# Pins and answers.

PROJECTIONS = {"half": np.eye(24, dtype=np.float32)[:12]}


@pytest.mark.parametrize("pin", ["model", "both"])
def test_a_pin_is_of_the_model_or_of_the_projection_too(adapter: type[Adapter], pin: str) -> None:
    with FakeServer(projections=PROJECTIONS) as server:
        projection = server.model.projections[0].fingerprint
        fingerprint = "f00d" if pin == "model" else f"f00d+{projection}"
        with adapter(server.target, fingerprint=fingerprint) as one:
            assert one.model().fingerprint == "f00d"
            features = one.extract(photos(1), projection="half", **EXACT)
            assert features.fingerprint == f"f00d+{projection}"
            assert server.requests[-1].fingerprint == fingerprint
            if pin == "model":
                assert one.extract(photos(1), **EXACT).fingerprint == "f00d"
            else:
                with pytest.raises(ModelMismatch):
                    one.extract(photos(1), **EXACT)
    with FakeServer(projections={"half": 2 * PROJECTIONS["half"]}) as other:
        with adapter(other.target, fingerprint=f"f00d+{projection}") as one, pytest.raises(ModelMismatch):
            one.model()
        assert [call.method for call in other.calls] == ["GetModel"]


@pytest.mark.parametrize("answered", ["beef", "", "f00", "f00dd", "beef+f00d"])
def test_a_server_that_ignores_the_pin_is_found_out(adapter: type[Adapter], server: FakeServer, answered: str) -> None:
    def another(response: Any) -> None:
        response.fingerprint = answered

    server.edit = another
    with adapter(server.target, fingerprint="f00d") as one:
        with pytest.raises(ModelMismatch, match=r"has the fingerprint .*, the request is pinned to f00d"):
            one.extract(photos(1))
        with pytest.raises(ModelMismatch):
            list(one.many([photos(1)]))
    with adapter(server.target) as one:
        one.extract(photos(1))
        with pytest.raises(ModelMismatch):  # a layer counted from the end of one model is never of another
            one.extract(photos(1), layers=-1)


# A server that came back as another.


def test_smaller_limits_are_learnt(adapter: type[Adapter], server: FakeServer) -> None:
    with adapter(server.target) as one:
        one.extract(photos(1))
        server.model = limited(2)
        check(one.extract(photos(5), **EXACT), photos(5))
        assert [call.method for call in server.calls[2:]] == ["Extract", "GetModel", "Extract", "Extract", "Extract"]
        one.extract(photos(4))
        assert len(server.calls) == 9  # remembered


def test_a_deeper_model_is_learnt(adapter: type[Adapter], server: FakeServer) -> None:
    with adapter(server.target) as one:
        one.extract(photos(1))
        server.model = replace(MODEL, layer_dims=(24,) * 24, layer_strides=(16,) * 24, fingerprint="beef")
        assert one.extract(photos(1), layers=20).fingerprint == "beef"
        with pytest.raises(ValueError, match=r"layers has 24; the model has 24 layers"):
            one.extract(photos(1), layers=24)


def test_a_model_that_changes_between_the_parts(adapter: type[Adapter]) -> None:
    with FakeServer(limited(1)) as server, adapter(server.target) as one:
        answers = 0
        lock = threading.Lock()

        def swap(response: Any) -> None:
            nonlocal answers
            with lock:
                answers += 1
                if answers == 2:
                    server.model = replace(limited(1), fingerprint="beef")

        server.edit = swap
        features = one.extract(photos(6), **EXACT)
        assert features.fingerprint == "beef"
        check(features, photos(6))


# Parts.


def test_parts_are_sent_together_within_bounds(adapter: type[Adapter]) -> None:
    with FakeServer(limited(2)) as server, adapter(server.target) as one, ThreadPoolExecutor(1) as thread:
        server.gate.clear()
        answer = thread.submit(one.extract, photos(20), **EXACT)
        server.wait_for_calls(1, "GetModel")
        server.gate.set()
        check(answer.result(), photos(20))
        server.gate.clear()
        answer = thread.submit(one.extract, photos(20), **EXACT)
        server.wait_for_calls(10 + MAX_PARALLEL_REQUESTS)
        assert len(server.requests) == 10 + MAX_PARALLEL_REQUESTS
        server.gate.set()
        check(answer.result(), photos(20))


def test_a_part_that_fails_ends_the_others(adapter: type[Adapter]) -> None:
    with FakeServer(limited(1)) as server, adapter(server.target) as one, ThreadPoolExecutor(1) as thread:
        one.model()
        server.gate.clear()
        server.script = [Failure(Code.INTERNAL, "broken")]
        answer = thread.submit(one.extract, photos(12))
        server.wait_for_calls(MAX_PARALLEL_REQUESTS)
        server.gate.set()
        with pytest.raises(ServerError, match=r"^broken$"):
            answer.result()
        assert len(server.requests) < 12
        assert one.client._session._pool.acquire().in_flight == 1  # nothing is left in flight


def test_images_that_fail_are_counted_over_the_call(adapter: type[Adapter]) -> None:
    with FakeServer(limited(2)) as server, adapter(server.target) as one:
        torn = [bytes([255, 216, index]) for index in range(3)]
        with pytest.raises(ImageErrors) as caught:
            one.extract([*photos(2), *torn])
        assert sorted(caught.value.errors) == [2, 3, 4]
        features = one.extract([*photos(2), *torn], on_error="return", **EXACT)
        assert sorted(features.errors) == [2, 3, 4]
