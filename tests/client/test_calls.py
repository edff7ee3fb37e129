"""Errors, retries, deadlines, credentials: what a call does besides its answer."""

from __future__ import annotations

import contextlib
import logging
import pickle
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from dinov3_client import (
    Client,
    DeadlineExceeded,
    FieldViolation,
    ImageErrors,
    InvalidRequest,
    Limits,
    MessageTooLarge,
    OutputParity,
    Overloaded,
    ParityCheck,
    ServerError,
    StatusError,
    Unavailable,
)
from dinov3_client._model import read_model
from dinov3_client._transport.retry import FIRST_PAUSE, HINT_JITTER, LONGEST_PAUSE, SHORTEST_ATTEMPT, Attempts
from dinov3_client.testing import MODEL, Failure, FakeServer, expected
from dinov3_client.testing._model import message_of
from dinov3_serving.v1 import feature_service_pb2 as pb
from tests.client.conftest import FakeClock
from tests.support.waiting import LIMIT

Code = grpc.StatusCode
PIXELS = np.zeros((32, 32, 3), np.uint8)


def test_model(client: Client, server: FakeServer) -> None:
    model = client.model()
    assert (model.name, model.weights, model.random_weights) == ("dinov3_vits16", "dinov3_vits16.pth", False)
    assert (model.fingerprint, model.dtype, model.devices) == ("f00d", "bfloat16", ("cpu",))
    assert (model.embed_dim, model.depth, model.patch_size, model.register_tokens) == (24, 12, 16, 4)
    assert model.mean == pytest.approx((0.485, 0.456, 0.406))
    assert model.std == pytest.approx((0.229, 0.224, 0.225))
    assert model.parameters == 21_601_152
    assert model.limits == Limits(64 << 20, 64, 1 << 26, 8192, 8)
    assert (model.frontends, model.frontend, model.server_version) == (2, 0, "0.1.0")
    client.model()
    assert len(server.calls) == 2  # one call, one answer: nothing is remembered


def test_the_parity_check_of_a_server() -> None:
    told = pb.ParityCheck(
        verified=True,
        upstream_revision="6876159a",
        outputs=[
            pb.OutputParity(output="cls", dtype=pb.DATA_TYPE_BFLOAT16, least_cosine=0.5, relative_error=0.25),
            pb.OutputParity(output="patches", dtype=77, least_cosine=0.75, relative_error=0.125),
        ],
        time="2026-01-02T03:04:05Z",
        not_covered="The size of the moon.",
    )
    message = message_of(MODEL, 0)
    message.parity_check.CopyFrom(told)
    assert read_model(message.SerializeToString()).parity_check == ParityCheck(
        verified=True,
        reason="",
        upstream_revision="6876159a",
        outputs=(OutputParity("cls", "bfloat16", 0.5, 0.25), OutputParity("patches", "unknown (77)", 0.75, 0.125)),
        time="2026-01-02T03:04:05Z",
        not_covered="The size of the moon.",
    )


def test_a_server_without_a_parity_check() -> None:
    message = message_of(MODEL, 0)
    message.ClearField("parity_check")
    parity_check = read_model(message.SerializeToString()).parity_check
    assert (parity_check.verified, parity_check.reason) == (False, "the server reports no parity check")


def test_violations_of_an_invalid_request(client: Client, server: FakeServer) -> None:
    server.script = [Failure(Code.INVALID_ARGUMENT, "no", field="preprocessing.size")]
    with pytest.raises(InvalidRequest) as caught:
        client.extract(PIXELS)
    assert caught.value.violations == (FieldViolation("preprocessing.size", "no"),)


@pytest.mark.parametrize("code", [Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED])
def test_retries_after_the_time_the_server_names(
    client: Client, server: FakeServer, clock: FakeClock, code: grpc.StatusCode
) -> None:
    server.script = [Failure(code, "full", retry_after=0.4), Failure(code, "full", retry_after=1.5)]
    features = client.extract(PIXELS)
    assert len(features) == 1
    for pause, hint in zip(clock.pauses, (0.4, 1.5), strict=True):
        assert hint < pause <= hint * (1 + HINT_JITTER)
    assert len(server.requests) == 3
    assert server.requests[0] == server.requests[2]


def test_the_timeout_of_each_attempt_is_the_time_left(client: Client, server: FakeServer, clock: FakeClock) -> None:
    client.extract(PIXELS)  # it knows the model then
    server.script = [Failure(Code.UNAVAILABLE, "starting", retry_after=seconds) for seconds in (5, 7)]
    client.extract(PIXELS, deadline=30)
    left = [30.0, 30 - clock.pauses[0], 30 - sum(clock.pauses)]
    assert [call.timeout for call in server.calls[2:]] == pytest.approx(left, abs=2)
    assert left[2] < 18.1  # the pauses make a difference that the tolerance does not hide


def test_backs_off_without_a_hint(client: Client, server: FakeServer, clock: FakeClock) -> None:
    server.model_script = [Failure(Code.UNAVAILABLE, "starting") for _ in range(8)]
    client.model()
    for attempt, pause in enumerate(clock.pauses):
        full = min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE)
        assert full / 2 <= pause <= full
    assert len(clock.pauses) == 8
    assert len(set(clock.pauses[-3:])) == 3  # jitter


def test_the_last_error_comes_when_the_deadline_is_over(client: Client, server: FakeServer, clock: FakeClock) -> None:
    server.script = [Failure(Code.RESOURCE_EXHAUSTED, f"{n} images wait", retry_after=1) for n in range(99)]
    started = clock.seconds
    with pytest.raises(Overloaded, match=r"^[0-9] images wait \(attempt [0-9]\)$") as caught:
        client.extract(PIXELS, deadline=8)
    assert clock.seconds - started < 8
    assert caught.value.retry_after == 1
    assert 7 <= caught.value.attempts == len(server.requests) == len(clock.pauses) + 1 <= 8
    assert caught.value.code is Code.RESOURCE_EXHAUSTED


def test_an_error_shows_the_one_before_it(client: Client, server: FakeServer, clock: FakeClock) -> None:
    server.script = [
        Failure(Code.UNAVAILABLE, "starting", retry_after=0.1),
        Failure(Code.DEADLINE_EXCEEDED, "in the queue"),
    ]
    told = rf"^in the queue \(no answer from {server.target} within {LIMIT:g} s\)"
    message = rf"{told} \(attempt 2; the one before: UNAVAILABLE: starting\)$"
    with pytest.raises(DeadlineExceeded, match=message) as caught:
        client.extract(PIXELS)
    assert isinstance(caught.value.previous, Unavailable)


def test_errors_hold_one_error_before_them_and_no_chain(client: Client, server: FakeServer, clock: FakeClock) -> None:
    server.script = [Failure(Code.UNAVAILABLE, "starting") for _ in range(5)] + [Failure(Code.INTERNAL, "no")]
    with pytest.raises(ServerError) as caught:
        client.extract(PIXELS)
    assert caught.value.attempts == 6
    assert caught.value.previous.attempts == 5
    assert caught.value.previous.previous is None


def test_the_deadline_spans_the_model_and_the_features(client: Client, server: FakeServer, clock: FakeClock) -> None:
    server.model_script = [Failure(Code.UNAVAILABLE, "a", retry_after=4)]
    server.script = [Failure(Code.UNAVAILABLE, "b", retry_after=7)]
    with pytest.raises(Unavailable, match=r"^b$"):
        client.extract(PIXELS, layers=-1, deadline=10)
    assert len(clock.pauses) == 1


def test_no_server_is_unavailable_and_tried_again(
    server: FakeServer, clock: FakeClock, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    server.stop()
    with caplog.at_level(logging.WARNING, "dinov3_client"), pytest.raises(Unavailable) as caught:
        client.model(deadline=3)
    assert caught.value.attempts > 2
    assert len(caplog.messages) == 1  # said once, not at each attempt
    assert caplog.messages[0].endswith("; trying again for up to 3 s")
    assert str(caught.value).startswith(f"cannot reach {server.target} in plain text (is it up, and without TLS?): ")


def test_a_server_that_comes_is_found(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/socket"
    with Client(address, deadline=LIMIT) as client, contextlib.ExitStack() as stack:
        pauses: list[float] = []

        def sleep(_: object, seconds: float) -> None:
            """The server comes while the client waits for it."""
            pauses.append(seconds)
            if len(pauses) == 1:
                stack.enter_context(FakeServer(address=address))
            else:  # gRPC dials again by its own clock
                threading.Event().wait(seconds)

        client._sleep = sleep
        assert client.wait_ready(20).name == "dinov3_vits16"
    assert pauses


def test_messages_over_grpcs_default_pass(client: Client, server: FakeServer) -> None:
    server.model = replace(MODEL, layer_dims=(256,) * 12)
    features = client.extract(np.zeros((2, 1024, 1024, 3), np.uint8), "patches", preset="none", dtype="float32")
    assert server.requests[0].ByteSize() > 6_000_000
    assert features.nbytes > 8_000_000


@pytest.mark.parametrize("way", ["receive", "send"])
def test_a_message_over_the_servers_limit_is_explained_and_not_retried(way: str) -> None:
    narrow = replace(MODEL, limits=replace(MODEL.limits, max_message_bytes=100_000))
    with FakeServer(narrow) as server, Client(server.target) as client:
        server.model = MODEL  # it tells of more than its transport takes
        size = 320 if way == "receive" else 32
        images = np.zeros((1 if way == "receive" else 64, size, size, 3), np.uint8)
        with pytest.raises(MessageTooLarge, match=r"larger than max.*send fewer images.*max_message_bytes") as caught:
            client.extract(images, layers=range(12), preset="none")
        assert caught.value.attempts == 1


def test_token_is_sent_with_every_call(server: FakeServer) -> None:
    with Client(server.target, token="s3cret") as client:
        client.model()
        client.extract(PIXELS)
    assert {call.metadata["authorization"] for call in server.calls} == {"Bearer s3cret"}


@pytest.mark.parametrize("token", ["", "two words", "newline\n", "snowman☃"])
def test_tokens_that_cannot_be_sent(token: str) -> None:
    with pytest.raises(ValueError, match="token must consist of visible ASCII"):
        Client("localhost:1", token=token)
    with pytest.raises(TypeError, match="token is a bytes; it must be text"):
        Client("localhost:1", token=token.encode())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "target",
    ["", "localhost", "localhost:", "localhost:port", "localhost:0", "localhost:99999", ":50051", "::1:50051",
     "http://localhost:50051", "localhost:50051/"],
)  # fmt: skip
def test_invalid_targets(target: str) -> None:
    with pytest.raises(ValueError, match=r"target is .*; it must be HOST:PORT, as localhost:50051"):
        Client(target)


@pytest.mark.parametrize("target", ["127.0.0.1:1", "[::1]:50051", "dinov3.default.svc:65535", "dns:///dinov3:50051"])
def test_targets(target: str) -> None:
    Client(target).close()


@pytest.mark.parametrize(("target", "kind"), [(50051, "int"), (b"localhost:1", "bytes"), (["a:1", b"b:1"], "bytes")])
def test_targets_are_text(target: Any, kind: str) -> None:
    with pytest.raises(TypeError, match=f"target is a {kind}; it must be the text HOST:PORT"):
        Client(target)


@pytest.mark.parametrize("deadline", [0, -1, float("inf"), float("nan")])
def test_invalid_deadlines(deadline: float) -> None:
    with pytest.raises(ValueError, match=r"deadline is .*; it must be a positive number of seconds"):
        Client("localhost:1", deadline=deadline)


def test_close_ends_the_calls_under_way() -> None:
    with FakeServer() as server, ThreadPoolExecutor(1) as thread:
        server.gate.clear()
        client = Client(server.target)
        answer = thread.submit(client.extract, PIXELS)
        server.wait_for_calls(1)
        client.close()
        with pytest.raises(ServerError) as caught:
            answer.result()
        assert caught.value.code is Code.CANCELLED


def test_threads_share_a_client(client: Client) -> None:
    pictures = [np.full((32, 48, 3), 8 * index, np.uint8) for index in range(24)]
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda pixels: client.extract(pixels, preset="none", dtype="float32"), pictures))
    for features, pixels in zip(answers, pictures, strict=True):
        assert np.array_equal(features.cls[0], expected(pixels, "cls"))


def test_a_server_of_another_kind_is_named(client: Client, server: FakeServer) -> None:
    server.model_script = [Failure(Code.UNIMPLEMENTED, "Method not found!")]
    with pytest.raises(ServerError, match=r"does not offer dinov3_serving\.v1\.FeatureService \(Method not found!\)"):
        client.model()


def test_closed_client(server: FakeServer) -> None:
    with Client(server.target) as client:
        client.model()
    with pytest.raises(ValueError, match="closed"):
        client.model()


def test_errors_cross_processes() -> None:
    """As exceptions of a DataLoader's or a pool's worker do."""
    inner = InvalidRequest("bad", code=Code.INVALID_ARGUMENT, violations=(FieldViolation("images[0]", "bad"),))
    inner.attempts = 2
    for error in (inner, ImageErrors("1 of 1 images failed", errors={0: inner})):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error)
        assert str(copy) == str(error)
    copy = pickle.loads(pickle.dumps(ImageErrors("m", errors={3: inner}))).errors[3]
    assert (copy.code, copy.violations, copy.attempts) == (inner.code, inner.violations, 2)


@pytest.mark.parametrize("patient", [False, True])
@pytest.mark.parametrize("hint", [None, 0.0, 1.0])
def test_attempts_end_with_the_deadline_whatever_the_luck(hint: float | None, patient: bool) -> None:
    for seed in range(50):
        clock = FakeClock()
        attempts = Attempts(clock.seconds + 10, clock.now, random.Random(seed).random, patient=patient)
        error = _retry_for_ever(attempts, clock, hint)
        assert clock.seconds < 1010
        assert error.attempts == len(clock.pauses) + 1
        assert attempts.remaining() <= LONGEST_PAUSE + SHORTEST_ATTEMPT
        assert min(clock.pauses) >= (
            FIRST_PAUSE / 2 if patient else hint or FIRST_PAUSE / 2
        )  # a hint of nothing at all makes no busy loop


@pytest.mark.parametrize(("wait", "made"), [(0.5, 4), (0.7, 2), (0.99, 2), (1.2, 1), (5.0, 1), (30.0, 1)])
def test_an_overloaded_server_is_not_tried_with_less_time_than_its_expected_wait(wait: float, made: int) -> None:
    """With the shortest pauses, and a deadline of 2 s."""
    clock = FakeClock()
    attempts = Attempts(clock.seconds + 2, clock.now, lambda: 0.0)
    error = Overloaded("full", code=Code.RESOURCE_EXHAUSTED, retry_after=wait)
    for _ in range(made - 1):
        clock.sleep(attempts.pause_or_raise(error))
        assert attempts.remaining() >= wait
    with pytest.raises(Overloaded):
        attempts.pause_or_raise(error)
    assert error.attempts == made


def test_an_overloaded_server_is_tried_once_more_after_a_long_pause() -> None:
    clock = FakeClock()
    attempts = Attempts(clock.seconds + 60, clock.now, lambda: 0.0)
    error = Overloaded("full", code=Code.RESOURCE_EXHAUSTED, retry_after=41.0)
    clock.sleep(attempts.pause_or_raise(error))
    with pytest.raises(Overloaded):
        attempts.pause_or_raise(error)


def _retry_for_ever(attempts: Attempts, clock: FakeClock, hint: float | None) -> StatusError:
    while True:
        error = Unavailable("gone", code=Code.UNAVAILABLE, retry_after=hint)
        try:
            clock.sleep(attempts.pause_or_raise(error))
            assert attempts.remaining() > SHORTEST_ATTEMPT / 2  # or it would be told of that, not of what is wrong
        except Unavailable as raised:
            return raised


def test_public_names() -> None:
    import dinov3_client

    assert sorted(dinov3_client.__all__) == [
        "AsyncClient",
        "Client",
        "DeadlineExceeded",
        "Dinov3Error",
        "ExtractOptions",
        "FeatureDataset",
        "Features",
        "FieldViolation",
        "Fit",
        "ImageErrors",
        "ImageFeatures",
        "ImageViews",
        "InvalidRequest",
        "InvalidResponse",
        "Layer",
        "LayerFeatures",
        "Limits",
        "MessageTooLarge",
        "MixedSizes",
        "Model",
        "ModelMismatch",
        "OutputParity",
        "Overloaded",
        "ParityCheck",
        "Pooling",
        "Preset",
        "Projection",
        "ServerError",
        "StatusError",
        "Timings",
        "Unauthenticated",
        "Unavailable",
        "View",
    ]
    public = {name for name in vars(dinov3_client) if not name.startswith("_")}
    assert public - {"bulk", "cli", "testing", "torch"} == set(dinov3_client.__all__)
