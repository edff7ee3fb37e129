"""One table of cases, driven through both clients: what is asked, of whom, how often, and what comes of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
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
from dinov3_client.testing import MODEL, Failure, FakeServer
from tests.client.adapters import EXACT, Adapter, check, photos
from tests.client.conftest import FakeClock
from tests.support.waiting import LIMIT

Code = grpc.StatusCode
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


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


def model(one: Adapter) -> Any:
    return one.model()


def extract(one: Adapter) -> Any:
    return check(one.extract(photos(3), **EXACT), photos(3))


def many(one: Adapter) -> Any:
    for index, features in enumerate(one.many((photos(2, i) for i in range(6)), in_flight=3, **EXACT)):
        check(features, photos(2, index))


def known(call: Callable[[Adapter], Any]) -> Callable[[Adapter], Any]:
    """`call` of a client that has asked for the model before."""

    def and_then(one: Adapter) -> Any:
        one.model()
        return call(one)

    return and_then


@dataclass
class Case:
    name: str
    call: Callable[[Adapter], Any]
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
        model_script=(Failure(Code.UNAVAILABLE, "loading", retry_after=LIMIT),),
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
def test_calls(adapter: type[Adapter], server: FakeServer, case: Case) -> None:
    server.script, server.model_script = list(case.script), list(case.model_script)
    clock = FakeClock()
    with adapter(server.target, **dict(case.arguments)) as one:
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
    adapter: type[Adapter], server: FakeServer, call: Callable[[Adapter], Any], failure: Failure, kind: type
) -> None:
    with adapter(server.target, fingerprint=MODEL.fingerprint) as one:
        (server.script if call is extract else server.model_script).append(failure)
        with pytest.raises(StatusError, match=r"\bno\b") as caught:
            call(one)
    assert type(caught.value) is kind
    assert (caught.value.code, caught.value.attempts) == (failure.code, 1)
    assert len(server.calls) == (2 if call is extract else 1)


def test_a_queue_that_stays_full(adapter: type[Adapter], server: FakeServer) -> None:
    server.script = [Failure(Code.RESOURCE_EXHAUSTED, "full", retry_after=1.0)] * 20
    clock = FakeClock()
    with adapter(server.target) as one:
        one.ruled_by(clock)
        with pytest.raises(Overloaded, match=r"^full \(attempt [78]\)$"):
            one.extract(photos(1), deadline=8)
    assert clock.seconds < 1008


# Deadlines, closing.


def test_no_answer_before_the_deadline(adapter: type[Adapter], server: FakeServer) -> None:
    with adapter(server.target) as one:
        one.model()
        one.ruled_by(FakeClock())  # it stands still: the attempt is allowed the whole deadline, on a slow machine too
        server.gate.clear()
        with pytest.raises(DeadlineExceeded, match=rf"\(no answer from {server.target} within 0\.05 s\)$"):
            one.extract(photos(1), deadline=0.05)


WRONG = r"deadline|size|dtype|there is no option 'layer'"


@pytest.mark.parametrize("options", [{"deadline": 0}, {"size": -1}, {"dtype": "float64"}, {"layer": 3}])
def test_options_are_checked_at_the_call(adapter: type[Adapter], options: Any) -> None:
    with adapter("localhost:1") as one:
        with pytest.raises((ValueError, TypeError), match=WRONG):
            one.extract(photos(1), **options)
        with pytest.raises((ValueError, TypeError), match=WRONG):
            one.client.extract_many([], **options)


def test_nothing_is_sent_before_the_first_call(adapter: type[Adapter], server: FakeServer) -> None:
    with adapter(server.target) as one:
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
def test_invalid_in_flight(adapter: type[Adapter], size: Any) -> None:
    with adapter("localhost:1") as one, pytest.raises((ValueError, TypeError), match=r"in_flight is .* must be"):
        one.client.extract_many([], in_flight=size)
