"""Flows, performed by blocking."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import Any, Self

import grpc

from dinov3_client._transport.flow import Close, Flow, Pause, Rpc, Step, T, Together, Work

# Waits on the event for so many seconds; a test's clock does not wait.
Sleep = Callable[[threading.Event, float], object]


class Cancelled(Exception):
    """The flow's scope was cancelled."""


class Scope:
    """Flows that are cancelled together: their calls end, their pauses too, and they raise Cancelled. Left as a
    context, it is cancelled and its threads have ended."""

    def __init__(self, parent: Scope | None = None) -> None:
        self.cancelled = threading.Event()
        self._parent = parent
        self._lock = threading.Lock()
        self._within: set[Any] = set()
        """Calls and scopes: what has a `cancel`."""
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        if self._parent is not None:
            self._parent._add(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()
        if self._parent is not None:
            self._parent._discard(self)
        if not sys.is_finalizing():  # no other thread runs then, nor ends
            for thread in self._threads:
                thread.join()

    def start(self, function: Callable[[], T]) -> Future[T]:
        """What `function` will return, in a thread of its own.

        A pool's threads would be waited for, with the calls that they wait for, wherever a program ends.
        """
        future: Future[T] = Future()
        thread = threading.Thread(target=_perform_into, args=(future, function), name="dinov3-client", daemon=True)
        thread.start()
        self._threads = [thread, *(one for one in self._threads if one.is_alive())]
        return future

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
    waiting = deque(enumerate(flows))
    results: dict[int, T] = {}

    def perform() -> None:
        while True:
            try:
                index, flow = waiting.popleft()
            except IndexError:
                return
            results[index] = run(flow, scope, sleep)

    with Scope(parent) as scope:
        performed = [scope.start(perform) for _ in range(min(at_once, len(flows)))]
        wait(performed, return_when=FIRST_EXCEPTION)
        for one in performed:
            if one.done():
                one.result()
    return [results[index] for index in range(len(flows))]


def _perform_into(future: Future[T], function: Callable[[], T]) -> None:
    try:
        result = function()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
