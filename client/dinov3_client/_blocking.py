"""Flows, performed by blocking."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any, Self

import grpc

from dinov3_client._flow import Close, Flow, Pause, Rpc, Step, T, Together, Work

# Waits on the event for so many seconds; a test's clock does not wait.
Sleep = Callable[[threading.Event, float], object]


class Cancelled(Exception):
    """The flow's scope was cancelled."""


class Scope:
    """Flows that are cancelled together: their calls end, their pauses too, and they raise Cancelled."""

    def __init__(self, parent: Scope | None = None) -> None:
        self.cancelled = threading.Event()
        self._parent = parent
        self._lock = threading.Lock()
        self._within: set[Any] = set()
        """Calls and scopes: what has a `cancel`."""

    def __enter__(self) -> Self:
        if self._parent is not None:
            self._parent._add(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self._parent is not None:
            self._parent._discard(self)

    def cancel(self) -> None:
        with self._lock:
            self.cancelled.set()
            within = list(self._within)
        for one in within:
            one.cancel()

    def call(self, step: Rpc) -> bytes:
        if self.cancelled.is_set():
            raise Cancelled
        # Not the call that blocks, which nobody can cancel.
        future = step.channel.unary_unary(step.method).future(
            step.message, timeout=step.timeout, metadata=step.metadata
        )
        self._add(future)
        try:
            answer: bytes = future.result()
        except (grpc.RpcError, grpc.FutureCancelledError):
            if self.cancelled.is_set():
                raise Cancelled from None
            raise
        finally:
            self._discard(future)
            future.cancel()  # a call that was interrupted; one that has ended does not mind
        return answer

    def _add(self, one: Any) -> None:
        with self._lock:
            self._within.add(one)
            late = self.cancelled.is_set()
        if late:
            one.cancel()

    def _discard(self, one: Any) -> None:
        with self._lock:
            self._within.discard(one)


def run(flow: Flow[T], scope: Scope, sleep: Sleep = threading.Event.wait) -> T:
    """The result of `flow`."""
    outcome: Any = None
    error: BaseException | None = None
    while True:
        try:
            step = flow.send(outcome) if error is None else flow.throw(error)
        except StopIteration as done:
            result: T = done.value
            return result
        outcome = error = None
        try:
            outcome = _perform(step, scope, sleep)
        except BaseException as raised:  # the flow is where it belongs, an interrupt too: it gives its connection back
            error = raised


def _perform(step: Step, scope: Scope, sleep: Sleep) -> Any:
    match step:
        case Rpc():
            return scope.call(step)
        case Pause(seconds):
            sleep(scope.cancelled, seconds)
            if scope.cancelled.is_set():
                raise Cancelled
            return None
        case Work(function):
            return function()
        case Together(flows, at_once):
            return _together(flows, at_once, scope, sleep)
        case Close(channel):
            return channel.close()


def _together(flows: Sequence[Flow[T]], at_once: int, parent: Scope, sleep: Sleep) -> list[T]:
    with Scope(parent) as scope, ThreadPoolExecutor(at_once, "dinov3-client-part") as threads:
        futures: list[Future[T]] = []
        try:
            futures += [threads.submit(run, flow, scope, sleep) for flow in flows]
            wait(futures, return_when=FIRST_EXCEPTION)
            for future in _failed(futures):
                future.result()
            return [future.result() for future in futures]
        finally:
            scope.cancel()


def _failed(futures: Sequence[Future[Any]]) -> Iterator[Future[Any]]:
    return (future for future in futures if future.done() and future.exception() is not None)
