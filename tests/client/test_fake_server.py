"""The fake server's controls: its script, gate, delay and edits, restarts and streams."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import status_pb2
from google.rpc.error_details_pb2 import BadRequest, RetryInfo

from dinov3_client import (
    Client,
    DeadlineExceeded,
    ImageErrors,
    ModelMismatch,
    ServerError,
    Unavailable,
)
from dinov3_client.testing import MODEL, Failure, FakeServer, expected
from dinov3_serving.v1 import feature_service_pb2 as pb
from dinov3_serving.v1.feature_service_pb2_grpc import FeatureServiceStub
from tests.client.test_testing import AS_IS, FLOAT32, array, picture, png, tensor
from tests.support.waiting import LIMIT

Code = grpc.StatusCode


def test_the_script_is_consumed_by_extractions_alone() -> None:
    pixels = picture()
    with FakeServer() as server, Client(server.target, deadline=LIMIT) as client:
        server.script = [
            Failure(Code.INTERNAL, "scripted", field="images[0]"),
            {1: Failure(Code.INTERNAL, "this one"), 7: Failure(Code.INTERNAL, "is not there")},
            None,
            {0: Failure(Code.INTERNAL, "this one")},
        ]
        client.model()
        with pytest.raises(ServerError, match="scripted") as caught:
            client.extract(pixels)
        assert caught.value.violations[0].field == "images[0]"
        with pytest.raises(ImageErrors, match="1 of 3 images failed: image 1: this one"):
            client.extract([pixels] * 3)
        assert not client.extract([pixels] * 3).errors
        failed = client.extract([pixels] * 2, "cls", on_error="return").cls
        assert failed is not None
        assert (failed[0].any(), failed[1].any()) == (False, True)
        assert server.script == []
        server.model_script = [Failure(Code.UNAVAILABLE, "later", retry_after=0.001)]
        assert client.model().name == "dinov3_vits16"
        assert server.model_script == []
        assert [call.method for call in server.calls].count("GetModel") >= 3


def test_retry_info_and_violations_on_the_wire() -> None:
    with FakeServer() as server, grpc.insecure_channel(server.target) as channel:
        server.script = [Failure(Code.RESOURCE_EXHAUSTED, "full", retry_after=1.25, field="images")]
        with pytest.raises(grpc.RpcError) as caught:
            FeatureServiceStub(channel).Extract(pb.ExtractRequest())  # type: ignore[no-untyped-call]
        assert (caught.value.code(), caught.value.details()) == (Code.RESOURCE_EXHAUSTED, "full")  # type: ignore[attr-defined]
        trailers = dict(caught.value.trailing_metadata())  # type: ignore[attr-defined]
        status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
        violation, retry = BadRequest(), RetryInfo()
        assert status.details[0].Unpack(violation)
        assert status.details[1].Unpack(retry)
        assert violation.field_violations[0].field == "images"
        assert retry.retry_delay.ToNanoseconds() == 1_250_000_000


def test_the_gate_holds_calls_and_opens_for_all() -> None:
    with FakeServer() as server, Client(server.target) as client, ThreadPoolExecutor(3) as threads:
        client.model()
        server.gate.clear()
        answers = [threads.submit(client.extract, picture(), "cls") for _ in range(3)]
        server.wait_for_calls(3)
        assert not any(one.done() for one in answers)
        with pytest.raises(TimeoutError, match=r"3 calls of Extract have arrived within 0\.01 s, not 4"):
            server.wait_for_calls(4, timeout=0.01)
        server.gate.set()
        assert [len(one.result()) for one in answers] == [1, 1, 1]
        assert len(server.requests) == 3


def test_calls_that_are_held_end_with_the_server() -> None:
    server = FakeServer()
    server.gate.clear()
    before = set(threading.enumerate())
    with server, grpc.insecure_channel(server.target) as channel:
        call = FeatureServiceStub(channel).Extract.future(pb.ExtractRequest(), timeout=LIMIT)  # type: ignore[no-untyped-call]
        server.wait_for_calls(1)
        server.stop()
        assert call.code() in (Code.UNAVAILABLE, Code.CANCELLED)
        assert not server.gate.is_set()
        assert not [one for one in set(threading.enumerate()) - before if one.name.startswith("fake-server")]


def test_a_delay_ends_with_the_server() -> None:
    with FakeServer() as server, grpc.insecure_channel(server.target) as channel:
        server.delay = 3600.0
        call = FeatureServiceStub(channel).Extract.future(pb.ExtractRequest(), timeout=LIMIT)  # type: ignore[no-untyped-call]
        server.wait_for_calls(1)
        server.stop()
        assert call.code() in (Code.UNAVAILABLE, Code.CANCELLED)


def test_a_restart_comes_back_at_the_same_address_with_another_model() -> None:
    pixels = picture()
    with FakeServer() as server, Client(server.target, deadline=LIMIT) as client:
        target = server.target
        pinned = pb.ExtractRequest(pixels=tensor(pixels[None]), preprocessing=AS_IS, fingerprint="f00d")
        with grpc.insecure_channel(target) as channel:
            assert FeatureServiceStub(channel).Extract(pinned).fingerprint == "f00d"  # type: ignore[no-untyped-call]
        server.stop()
        with pytest.raises((Unavailable, DeadlineExceeded)):  # the latter on a slow machine
            client.model(deadline=0.2)
        server.model = replace(MODEL, fingerprint="cafe")
        server.start()
        assert server.target == target
        assert client.model().fingerprint == "cafe"
        with grpc.insecure_channel(target) as channel, pytest.raises(grpc.RpcError, match=r"'cafe'.*'f00d'") as caught:
            FeatureServiceStub(channel).Extract(pinned)  # type: ignore[no-untyped-call]
        assert caught.value.code() is Code.FAILED_PRECONDITION  # type: ignore[attr-defined]
    assert ModelMismatch  # what the client makes of it: test_calls.py


def test_connections_are_spread_over_the_frontends() -> None:
    alone = [("grpc.use_local_subchannel_pool", 1)]
    with FakeServer(replace(MODEL, frontends=3)) as server:
        seen = []
        for _ in range(4):
            with grpc.insecure_channel(server.target, alone) as channel:
                stub = FeatureServiceStub(channel)  # type: ignore[no-untyped-call]
                model = stub.GetModel(pb.GetModelRequest())
                answer = stub.Extract(pb.ExtractRequest(images=[pb.Image(encoded=png(picture()))]))
                assert (model.frontends, model.frontend) == (3, answer.frontend)
                seen.append(answer.frontend)
        assert seen == [0, 1, 2, 0]


def test_a_stream_answers_each_message_for_itself() -> None:
    pixels = picture()
    good = pb.ExtractRequest(
        pixels=tensor(pixels[None]), preprocessing=AS_IS, outputs=pb.Outputs(cls=True, dtype=FLOAT32)
    )
    with FakeServer() as server, grpc.insecure_channel(server.target) as channel:
        server.script = [None, Failure(Code.RESOURCE_EXHAUSTED, "full", retry_after=1)]
        stub = FeatureServiceStub(channel)  # type: ignore[no-untyped-call]
        messages = [
            pb.ExtractStreamRequest(id=7, request=good),
            pb.ExtractStreamRequest(id=8, request=good),
            pb.ExtractStreamRequest(id=9),
            pb.ExtractStreamRequest(id=10, request=good, timeout_seconds=-1),
            pb.ExtractStreamRequest(id=11, request=good),
        ]
        answers = {answer.id: answer for answer in stub.ExtractStream(iter(messages), metadata=[("k", "v")])}
        assert list(answers) == [7, 8, 9, 10, 11]
        for id in (7, 11):
            np.testing.assert_array_equal(array(answers[id].response.blocks[0].cls)[0], expected(pixels, "cls"))
        codes = [answers[id].error.code for id in (8, 9, 10)]
        assert codes == [Code.RESOURCE_EXHAUSTED.value[0], *[Code.INVALID_ARGUMENT.value[0]] * 2]
        assert [call.method for call in server.calls] == ["ExtractStream"] * 5
        assert server.calls[0].metadata["k"] == "v"
        assert len(server.requests) == 5


def test_answers_can_be_edited() -> None:
    with FakeServer() as server, Client(server.target) as client:
        server.edit = lambda response: setattr(response, "fingerprint", "other")
        assert client.extract(picture()).fingerprint == "other"


def test_unix_sockets(tmp_path: Any) -> None:
    with FakeServer(address=f"unix:{tmp_path}/socket") as server, Client(server.target) as client:
        assert server.target == f"unix:{tmp_path}/socket"
        assert client.model().name == "dinov3_vits16"


@pytest.mark.parametrize("given", [np.zeros(24), (np.zeros((8, 24)), np.zeros(24))])
def test_invalid_projections(given: Any) -> None:
    with pytest.raises(ValueError, match=r"a projection is a weight \[K, D\].*has the shapes"):
        FakeServer(projections={"p": given})
