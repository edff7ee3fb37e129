"""Run procedures by blocking."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import Any, Self

import grpc

from dinov3_client._transport.effects import CloseChannel, Effect, Gather, Offload, Procedure, Rpc, Sleep, T

# Wait on the event for so many seconds. Tests replace it by a clock that does not wait.
SleepFunction = Callable[[threading.Event, float], object]


class Cancelled(Exception):
    """The scope of the procedure was cancelled."""


class CancelScope:
    """A group of procedures that are cancelled together: their calls and pauses end, and they raise Cancelled.

    Leaving the context cancels the scope and waits for its threads.
    """

    def __init__(self, parent: CancelScope | None = None) -> None:
        self.cancelled = threading.Event()
        self._parent = parent
        self._lock = threading.Lock()
        self._cancellables: set[Any] = set()
        """Calls and nested scopes; each has a `cancel`."""
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        if self._parent is not None:
            self._parent._add(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()
        if self._parent is not None:
            self._parent._discard(self)
        if not sys.is_finalizing():  # other threads no longer run then, and would never end
            for thread in self._threads:
                thread.join()

    def start(self, function: Callable[[], T]) -> Future[T]:
        """Call `function` in a new daemon thread and return the future of its result.

        At its end a program would wait for the threads of a ThreadPoolExecutor, and for their calls.
        """
        future: Future[T] = Future()
        thread = threading.Thread(target=_run_into, args=(future, function), name="dinov3-client", daemon=True)
        thread.start()
        self._threads = [thread, *(one for one in self._threads if one.is_alive())]
        return future

    def cancel(self) -> None:
        with self._lock:
            self.cancelled.set()
            within = list(self._cancellables)
        for one in within:
            one.cancel()

    def call(self, effect: Rpc) -> bytes:
        if self.cancelled.is_set():
            raise Cancelled
        # Not the blocking form of the call, which cannot be cancelled.
        future = effect.channel.unary_unary(effect.method).future(
            effect.message, timeout=effect.timeout, metadata=effect.metadata
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
            future.cancel()  # of a call that was interrupted; no effect on one that has ended
        return answer

    def _add(self, one: Any) -> None:
        with self._lock:
            self._cancellables.add(one)
            late = self.cancelled.is_set()
        if late:
            one.cancel()

    def _discard(self, one: Any) -> None:
        with self._lock:
            self._cancellables.discard(one)


def run(procedure: Procedure[T], scope: CancelScope, sleep: SleepFunction = threading.Event.wait) -> T:
    """Run `procedure` and return its result."""
    outcome: Any = None
    error: BaseException | None = None
    while True:
        try:
            effect = procedure.send(outcome) if error is None else procedure.throw(error)
        except StopIteration as done:
            result: T = done.value
            return result
        outcome = error = None
        try:
            outcome = _execute(effect, scope, sleep)
        except BaseException as raised:  # interrupts too: the procedure must release its connection
            error = raised


def _execute(effect: Effect, scope: CancelScope, sleep: SleepFunction) -> Any:
    match effect:
        case Rpc():
            return scope.call(effect)
        case Sleep(seconds):
            sleep(scope.cancelled, seconds)
            if scope.cancelled.is_set():
                raise Cancelled
            return None
        case Offload(function):
            return function()
        case Gather(procedures, limit):
            return _gather(procedures, limit, scope, sleep)
        case CloseChannel(channel):
            return channel.close()


def _gather(procedures: Sequence[Procedure[T]], limit: int, parent: CancelScope, sleep: SleepFunction) -> list[T]:
    waiting = deque(enumerate(procedures))
    results: dict[int, T] = {}

    def run_waiting() -> None:
        while True:
            try:
                index, procedure = waiting.popleft()
            except IndexError:
                return
            results[index] = run(procedure, scope, sleep)

    with CancelScope(parent) as scope:
        futures = [scope.start(run_waiting) for _ in range(min(limit, len(procedures)))]
        wait(futures, return_when=FIRST_EXCEPTION)
        for one in futures:
            if one.done():
                one.result()
    return [results[index] for index in range(len(procedures))]


def _run_into(future: Future[T], function: Callable[[], T]) -> None:
    try:
        result = function()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
