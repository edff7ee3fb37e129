"""One table of cases, driven through both clients: what is asked, of whom, how often, and what comes of it."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import grpc
import numpy as np
import pytest

from dinov3_client import (
    AsyncClient,
    Client,
    DeadlineExceeded,
    ImageErrors,
    InvalidRequest,
    MessageTooLarge,
    ModelMismatch,
    Overloaded,
    ServerError,
    StatusError,
    Unauthenticated,
    Unavailable,
)
from dinov3_client._session import PARTS_AT_ONCE
from dinov3_client.testing import MODEL, Failure, FakeServer, expected
from tests.client.conftest import FakeClock
from tests.client.faces import FACES, Face

Code = grpc.StatusCode
EXACT: Any = {"preset": "none", "dtype": "float32"}
FAILURES = (
    (Failure(Code.INVALID_ARGUMENT, "no", field="preprocessing.size"), InvalidRequest),
    (Failure(Code.RESOURCE_EXHAUSTED, "no"), MessageTooLarge),
    (Failure(Code.DEADLINE_EXCEEDED, "no"), DeadlineExceeded),
    (Failure(Code.UNAUTHENTICATED, "no"), Unauthenticated),
    (Failure(Code.FAILED_PRECONDITION, "no"), ModelMismatch),
    (Failure(Code.INTERNAL, "no"), ServerError),
    (Failure(Code.PERMISSION_DENIED, "no"), ServerError),
)
STARTING = Failure(Code.UNAVAILABLE, "starting", retry_after=3.0)
FULL = Failure(Code.RESOURCE_EXHAUSTED, "full", retry_after=0.4)


def photos(count: int, first: int = 0) -> np.ndarray[Any, Any]:
    return np.stack([np.full((32, 48, 3), 7 * (first + index) + 1, np.uint8) for index in range(count)])


def check(features: Any, images: np.ndarray[Any, Any]) -> None:
    assert len(features) == len(images)
    for index, image in enumerate(images):
        np.testing.assert_array_equal(features.patches[index], expected(image, "patches"))


@pytest.fixture(params=FACES, ids=lambda face: face.__name__)
def face(request: pytest.FixtureRequest) -> type[Face]:
    kind: type[Face] = request.param
    return kind


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


def limited(images: int) -> Any:
    return replace(MODEL, limits=replace(MODEL.limits, max_images_per_request=images))


def model(one: Face) -> Any:
    return one.model()


def extract(one: Face) -> Any:
    return check(one.extract(photos(3), **EXACT), photos(3))


def many(one: Face) -> Any:
    for index, features in enumerate(one.many((photos(2, i) for i in range(6)), in_flight=3, **EXACT)):
        check(features, photos(2, index))


def known(call: Callable[[Face], Any]) -> Callable[[Face], Any]:
    """`call` of a client that has asked for the model before."""

    def and_then(one: Face) -> Any:
        one.model()
        return call(one)

    return and_then


@dataclass
class Case:
    name: str
    call: Callable[[Face], Any]
    script: tuple[Any, ...] = ()
    model_script: tuple[Any, ...] = ()
    raises: type[Exception] | None = None
    match: str = ""
    asked: tuple[str, ...] = ()
    pauses: tuple[tuple[float, float], ...] = ()
    """The least and the most of each."""
    arguments: tuple[tuple[str, Any], ...] = ()


M, E = "GetModel", "Extract"
CASES = [
    Case("the model is asked for at each call", known(model), asked=(M, M)),
    Case("extraction asks for the model once", lambda one: (extract(one), extract(one)), asked=(M, E, E)),
    Case("many ask for the model once for each that begins without", known(many), asked=(M, *[E] * 6)),
    Case(
        "a full queue is tried again",
        known(extract),
        script=(FULL, FULL),
        asked=(M, E, E, E),
        pauses=((0.4, 0.48),) * 2,
    ),
    Case("a server that starts is waited for", model, model_script=(STARTING,), asked=(M, M), pauses=((3.0, 3.6),)),
    Case(
        "without a hint the pause doubles",
        model,
        model_script=(Failure(Code.UNAVAILABLE, "gone"),) * 3,
        asked=(M,) * 4,
        pauses=((0.05, 0.1), (0.1, 0.2), (0.2, 0.4)),
    ),
    Case(
        "a hint beyond the deadline is not waited for",
        model,
        model_script=(Failure(Code.UNAVAILABLE, "loading", retry_after=90.0),),
        raises=Unavailable,
        match="^loading$",
        asked=(M,),
    ),
    Case(
        "but wait_ready waits, and asks on its own",
        lambda one: one.wait_ready(60),
        model_script=(Failure(Code.UNAVAILABLE, "loading", retry_after=90.0),) * 4,
        asked=(M,) * 5,
        pauses=((0.05, 0.1), (0.1, 0.2), (0.2, 0.4), (0.4, 0.8)),
    ),
    Case(
        "wait_ready tells the last reason when the time is over",
        lambda one: one.wait_ready(3),
        model_script=tuple(Failure(Code.UNAVAILABLE, f"{n} of 99 shards", retry_after=1.0) for n in range(99)),
        raises=Unavailable,
        match=r"^([6-9]|1[0-9]) of 99 shards \(attempt",
    ),
    Case(
        "wait_ready does not wait for what does not mend",
        lambda one: one.wait_ready(60),
        model_script=(STARTING, Failure(Code.UNAUTHENTICATED, "no token")),
        raises=Unauthenticated,
        match=r"^no token \(attempt 2; the one before: UNAVAILABLE: starting\)$",
        asked=(M, M),
        pauses=((0.05, 0.1),),
    ),
    Case(
        "a deadline spans all attempts",
        lambda one: one.extract(photos(1), deadline=1.0),
        model_script=(Failure(Code.UNAVAILABLE, "a", retry_after=0.5),),
        script=(Failure(Code.UNAVAILABLE, "b", retry_after=0.5),),
        raises=Unavailable,
        match="^b$",
        asked=(M, M, E),
        pauses=((0.5, 0.6),),
    ),
    Case(
        "a call that a server ends as it goes is tried again",
        known(extract),
        script=(Failure(Code.CANCELLED, "bye"),),
        asked=(M, E, E),
        pauses=((0.05, 0.1),),
    ),
    Case(
        "a changed model is asked for anew, once",
        known(extract),
        script=(Failure(Code.FAILED_PRECONDITION, "another"),),
        asked=(M, E, M, E),
    ),
    Case(
        "and no more than once",
        known(extract),
        script=(Failure(Code.FAILED_PRECONDITION, "another"),) * 2,
        raises=ModelMismatch,
        match="^another$",
        asked=(M, E, M, E),
    ),
    Case(
        "a pinned client does not try again",
        known(extract),
        script=(Failure(Code.FAILED_PRECONDITION, "another"),),
        raises=ModelMismatch,
        match="^another$",
        asked=(M, E),
        arguments=(("fingerprint", MODEL.fingerprint),),
    ),
    Case("a pin that fits", extract, asked=(M, E), arguments=(("fingerprint", MODEL.fingerprint),)),
    Case(
        "a pin that does not fit: nothing is sent",
        extract,
        raises=ModelMismatch,
        match=r"f00d.*beef",
        asked=(M,),
        arguments=(("fingerprint", "beef"),),
    ),
    Case(
        "nor is a model given", model, raises=ModelMismatch, match=r"f00d.*beef", arguments=(("fingerprint", "beef"),)
    ),
    Case(
        "nor waited for",
        lambda one: one.wait_ready(60),
        raises=ModelMismatch,
        match=r"f00d.*beef",
        asked=(M,),
        arguments=(("fingerprint", "beef"),),
    ),
    Case(
        "a request that a server refuses although nothing has changed",
        known(extract),
        script=(Failure(Code.INVALID_ARGUMENT, "too wide", field="images"),),
        raises=InvalidRequest,
        match="^too wide$",
        asked=(M, E, M),
    ),
    Case(
        "what went wrong first is told",
        known(extract),
        script=(Failure(Code.RESOURCE_EXHAUSTED, "too long"),),
        model_script=(None, Failure(Code.INTERNAL, "worse")),
        raises=MessageTooLarge,
        match="too long",
        asked=(M, E, M),
    ),
    Case(
        "an image that fails",
        extract,
        script=({1: Failure(Code.INVALID_ARGUMENT, "torn", field="images[1]")},),
        raises=ImageErrors,
        match=r"1 of 3 images failed: image 1: torn",
        asked=(M, E),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_calls(face: type[Face], server: FakeServer, case: Case) -> None:
    server.script, server.model_script = list(case.script), list(case.model_script)
    clock = FakeClock()
    with face(server.target, **dict(case.arguments)) as one:
        one.ruled_by(clock)
        if case.raises is None:
            case.call(one)
        else:
            with pytest.raises(case.raises, match=case.match) as caught:
                case.call(one)
            assert type(caught.value) is case.raises
            assert (caught.value.__cause__, caught.value.__context__) == (None, None)
    if case.asked:
        assert tuple(call.method for call in server.calls) == case.asked
        assert len(clock.pauses) == len(case.pauses)
        for pause, (least, most) in zip(clock.pauses, case.pauses, strict=True):
            assert least <= pause <= most


@pytest.mark.parametrize(("failure", "kind"), FAILURES, ids=[kind.__name__ for _, kind in FAILURES])
@pytest.mark.parametrize("call", [extract, model])
def test_failures_that_are_not_retried(
    face: type[Face], server: FakeServer, call: Callable[[Face], Any], failure: Failure, kind: type
) -> None:
    with face(server.target, fingerprint=MODEL.fingerprint) as one:
        (server.script if call is extract else server.model_script).append(failure)
        with pytest.raises(StatusError, match=r"\bno\b") as caught:
            call(one)
    assert type(caught.value) is kind
    assert (caught.value.code, caught.value.attempts) == (failure.code, 1)
    assert len(server.calls) == (2 if call is extract else 1)


def test_a_queue_that_stays_full(face: type[Face], server: FakeServer) -> None:
    server.script = [Failure(Code.RESOURCE_EXHAUSTED, "full", retry_after=1.0)] * 20
    clock = FakeClock()
    with face(server.target) as one:
        one.ruled_by(clock)
        with pytest.raises(Overloaded, match=r"^full \(attempt [78]\)$"):
            one.extract(photos(1), deadline=8)
    assert clock.seconds < 1008


# Pins and answers.

PROJECTIONS = {"half": np.eye(24, dtype=np.float32)[:12]}


@pytest.mark.parametrize("pin", ["model", "both"])
def test_a_pin_is_of_the_model_or_of_the_projection_too(face: type[Face], pin: str) -> None:
    with FakeServer(projections=PROJECTIONS) as server:
        projection = server.model.projections[0].fingerprint
        fingerprint = "f00d" if pin == "model" else f"f00d+{projection}"
        with face(server.target, fingerprint=fingerprint) as one:
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
        with face(other.target, fingerprint=f"f00d+{projection}") as one, pytest.raises(ModelMismatch):
            one.model()
        assert [call.method for call in other.calls] == ["GetModel"]


@pytest.mark.parametrize("answered", ["beef", "", "f00", "f00dd", "beef+f00d"])
def test_a_server_that_ignores_the_pin_is_found_out(face: type[Face], server: FakeServer, answered: str) -> None:
    def another(response: Any) -> None:
        response.fingerprint = answered

    server.edit = another
    with face(server.target, fingerprint="f00d") as one:
        with pytest.raises(ModelMismatch, match=r"has the fingerprint .*, the request is pinned to f00d"):
            one.extract(photos(1))
        with pytest.raises(ModelMismatch):
            list(one.many([photos(1)]))
    with face(server.target) as one:
        one.extract(photos(1))
        with pytest.raises(ModelMismatch):  # a layer counted from the end of one model is never of another
            one.extract(photos(1), layers=-1)


# A server that came back as another.


def test_smaller_limits_are_learnt(face: type[Face], server: FakeServer) -> None:
    with face(server.target) as one:
        one.extract(photos(1))
        server.model = limited(2)
        check(one.extract(photos(5), **EXACT), photos(5))
        assert [call.method for call in server.calls[2:]] == ["Extract", "GetModel", "Extract", "Extract", "Extract"]
        one.extract(photos(4))
        assert len(server.calls) == 9  # remembered


def test_a_deeper_model_is_learnt(face: type[Face], server: FakeServer) -> None:
    with face(server.target) as one:
        one.extract(photos(1))
        server.model = replace(MODEL, depth=24, layer_dims=(24,) * 24, layer_strides=(16,) * 24, fingerprint="beef")
        assert one.extract(photos(1), layers=20).fingerprint == "beef"
        with pytest.raises(ValueError, match=r"layers has 24; the model has 24 layers"):
            one.extract(photos(1), layers=24)


def test_a_model_that_changes_between_the_parts(face: type[Face]) -> None:
    with FakeServer(limited(1)) as server, face(server.target) as one:
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


def test_parts_are_sent_together_within_bounds(face: type[Face]) -> None:
    with FakeServer(limited(2)) as server, face(server.target) as one, ThreadPoolExecutor(1) as thread:
        server.gate.clear()
        answer = thread.submit(one.extract, photos(20), **EXACT)
        server.wait_for_calls(1, "GetModel")
        server.gate.set()
        check(answer.result(), photos(20))
        server.gate.clear()
        answer = thread.submit(one.extract, photos(20), **EXACT)
        server.wait_for_calls(10 + PARTS_AT_ONCE)
        assert len(server.requests) == 10 + PARTS_AT_ONCE
        server.gate.set()
        check(answer.result(), photos(20))


def test_a_part_that_fails_ends_the_others(face: type[Face]) -> None:
    with FakeServer(limited(1)) as server, face(server.target) as one, ThreadPoolExecutor(1) as thread:
        one.model()
        server.gate.clear()
        server.script = [Failure(Code.INTERNAL, "broken")]
        answer = thread.submit(one.extract, photos(12))
        server.wait_for_calls(PARTS_AT_ONCE)
        server.gate.set()
        with pytest.raises(ServerError, match=r"^broken$"):
            answer.result()
        assert len(server.requests) < 12
        assert one.client._session._pool.take().in_flight == 1  # nothing is left in flight


def test_images_that_fail_are_counted_over_the_call(face: type[Face]) -> None:
    with FakeServer(limited(2)) as server, face(server.target) as one:
        torn = [bytes([255, 216, index]) for index in range(3)]
        with pytest.raises(ImageErrors) as caught:
            one.extract([*photos(2), *torn])
        assert sorted(caught.value.errors) == [2, 3, 4]
        features = one.extract([*photos(2), *torn], on_error="return", **EXACT)
        assert sorted(features.errors) == [2, 3, 4]


# Deadlines, closing.


def test_no_answer_before_the_deadline(face: type[Face], server: FakeServer) -> None:
    with face(server.target) as one:
        one.model()
        server.gate.clear()
        with pytest.raises(DeadlineExceeded, match=rf"\(no answer from {server.target} within 0\.05 s\)$"):
            one.extract(photos(1), deadline=0.05)


WRONG = r"deadline|size|dtype|there is no option 'layer'"


@pytest.mark.parametrize("options", [{"deadline": 0}, {"size": -1}, {"dtype": "float64"}, {"layer": 3}])
def test_options_are_checked_at_the_call(face: type[Face], options: Any) -> None:
    with face("localhost:1") as one:
        with pytest.raises((ValueError, TypeError), match=WRONG):
            one.extract(photos(1), **options)
        with pytest.raises((ValueError, TypeError), match=WRONG):
            one.client.extract_many([], **options)


def test_nothing_is_sent_before_the_first_call(face: type[Face], server: FakeServer) -> None:
    with face(server.target) as one:
        assert repr(one.client) == f"<{type(one.client).__name__} of {server.target}>"
        one.client.extract_many([photos(1)])
        one.close()
        one.close()
        with pytest.raises(ValueError, match="this client is closed"):
            one.extract(photos(1))
    assert server.calls == []


def test_one_surface() -> None:
    """Names, arguments and their defaults are the same."""
    names = {name for name in dir(Client) if not name.startswith("_")}
    assert names == {name for name in dir(AsyncClient) if not name.startswith("_")}
    for name in (*names, "__init__"):
        one, other = (
            [(p.name, p.kind, p.default) for p in inspect.signature(getattr(kind, name)).parameters.values()]
            for kind in (Client, AsyncClient)
        )
        assert one == other


@pytest.mark.parametrize("size", [0, -1, 2.5, "4"])
def test_in_flight_that_is_none(face: type[Face], size: Any) -> None:
    with face("localhost:1") as one, pytest.raises((ValueError, TypeError), match=r"in_flight is .* must be"):
        one.client.extract_many([], in_flight=size)
