"""What both clients do: which calls are made, when again, over which connection, and what their answers mean.

Everything here is a flow (`_flow`) or plain; `_client` and `_async_client` perform the flows.
"""

from __future__ import annotations

import logging
import os
import random
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import grpc

from dinov3_client import _features, _images, _response, _split
from dinov3_client._answer import Answer
from dinov3_client._checks import check_deadline
from dinov3_client._errors import (
    DeadlineExceeded,
    InvalidRequest,
    MessageTooLarge,
    ModelMismatch,
    StatusError,
    Unavailable,
    from_rpc_error,
    model_mismatch,
)
from dinov3_client._features import Features
from dinov3_client._images import ImageLike, Source
from dinov3_client._model import Model, read_model
from dinov3_client._request import Options
from dinov3_client._split import Query
from dinov3_client._transport import channel as _channel
from dinov3_client._transport.channel import PathLike
from dinov3_client._transport.flow import Close, Flow, Pause, Rpc, Together, Work
from dinov3_client._transport.pool import Connection, Pool, Target
from dinov3_client._transport.retry import Attempts

EXTRACT = "/dinov3_serving.v1.FeatureService/Extract"
GET_MODEL = "/dinov3_serving.v1.FeatureService/GetModel"
# Parts of one split call that are on their way at a time.
PARTS_AT_ONCE = 4

_log = logging.getLogger("dinov3_client")

R = TypeVar("R", Answer, Model)


@dataclass(frozen=True)
class Settings:
    """The arguments of a client, as given; see `Connected`."""

    target: str | Sequence[str]
    connections: int | None
    deadline: float
    token: str | None
    tls_ca: PathLike | None
    tls_cert: PathLike | None
    tls_key: PathLike | None
    fingerprint: str | None
    keepalive: float | None


class Session:
    """One client's connections and what it knows of its server. `dial(target, options, credentials)` makes a channel.

    Flows may run at the same time, in several threads too.
    """

    def __init__(self, settings: Settings, dial: Callable[..., Any]) -> None:
        self._targets = _channel.check_targets(settings.target)
        self._deadline = check_deadline(settings.deadline)
        self._connections = _check_connections(settings.connections)
        self._keepalive = _channel.check_keepalive(settings.keepalive)
        self._metadata = _channel.metadata(settings.token)
        self._tls = _channel.read_tls(settings.tls_ca, settings.tls_cert, settings.tls_key)
        self._pin = _check_fingerprint(settings.fingerprint)
        self._dial = dial
        self._model: Model | None = None
        # For tests, which have no time to wait.
        self.now: Callable[[], float] = time.monotonic
        self.rand: Callable[[], float] = random.random
        self._first = random.randrange(len(self._targets))
        self._pool = self._new_pool()
        _SESSIONS.add(self)

    def close(self) -> list[Any]:
        """No call is possible any more. Returns the channels, to be closed."""
        return self._pool.close()

    def after_fork(self) -> None:
        """In the child: the parent's connections and locks are not ours. They are left, not closed."""
        _LEFT.append(self._pool)
        self._pool = self._new_pool(closed=self._pool.closed)

    def model(self, deadline: float | None) -> Flow[Model]:
        return (yield from self._ask(Attempts(self._end(deadline), self.now, self.rand)))

    def wait_ready(self, timeout: float) -> Flow[Model]:
        end = self.now() + check_deadline(timeout, "timeout")
        return (yield from self._ask(Attempts(end, self.now, self.rand, patient=True)))

    def extract(self, images: ImageLike | Iterable[ImageLike], wanted: Options) -> Flow[Features]:
        """Tried once more, from the start, where the server turns out to be another than the one that was known."""
        end = self._end(wanted.deadline)
        sources = yield Work(partial(_images.load, images, wanted.exif))
        known = self._model
        model = known or (yield from self._ask(Attempts(end, self.now, self.rand)))
        try:
            return (yield from self._extract(sources, wanted, model, end))
        except (ModelMismatch, MessageTooLarge, InvalidRequest, ValueError) as error:
            failure = error
        if isinstance(failure, ModelMismatch):
            self._model = None  # another one is served by now
            again = self._pin is None
        else:
            again = known is not None
        if not again:
            raise failure
        try:
            renewed = yield from self._ask(Attempts(end, self.now, self.rand))
        except StatusError:
            renewed = model  # what went wrong first is what is to be told
        if not isinstance(failure, ModelMismatch) and _same(model, renewed):
            raise failure
        return (yield from self._extract(sources, wanted, renewed, end))

    def _extract(self, sources: Sequence[Source], wanted: Options, model: Model, end: float) -> Flow[Features]:
        queries: list[Query] = yield Work(partial(_split.queries, sources, wanted, model, self._pin or ""))
        if len(queries) == 1:
            answers = [(yield from self._part(queries[0], end))]
        else:
            answers = yield Together([self._part(query, end) for query in queries], PARTS_AT_ONCE)
        for answer in answers[1:]:
            if answer.fingerprint != answers[0].fingerprint:
                raise model_mismatch(answers[0].fingerprint, answer.fingerprint)
        return _features.join(queries, answers, wanted.on_error)

    def _part(self, query: Query, end: float) -> Flow[Answer]:
        attempts = Attempts(end, self.now, self.rand)
        try:
            answer = yield from self._call(EXTRACT, query.data, attempts, partial(_response.read, query=query))
        except StatusError as error:
            query.of_the_call(error)
            raise
        # Also of a server, or something between, that does not know the request's field.
        if query.fingerprint and not _is_of(answer.fingerprint, query.fingerprint):
            raise model_mismatch(query.fingerprint, answer.fingerprint)
        return answer

    def _ask(self, attempts: Attempts) -> Flow[Model]:
        model = yield from self._call(GET_MODEL, b"", attempts, read_model)
        if self._pin is not None and not _serves(model, self._pin):
            self._model = None
            raise model_mismatch(self._pin, model.fingerprint)
        self._model = model
        return model

    def _call(self, method: str, message: bytes, attempts: Attempts, read: Callable[[bytes], R]) -> Flow[R]:
        """One answer, after as many attempts as `attempts` allows."""
        pool = self._pool
        asked: list[Target] = []  # since the last pause
        while True:
            connection = pool.take(asked)
            error: StatusError | None = None
            try:
                data = yield Rpc(connection.channel, method, message, attempts.remaining(), self._metadata)
            except grpc.RpcError as caught:
                error = self._told(caught, connection, attempts)
            finally:
                pool.give_back(connection)
            if error is None:
                answer = read(data)
                pool.answered(connection, answer.frontend, answer.frontends if isinstance(answer, Model) else None)
                for channel in pool.unused():
                    yield Close(channel)
                return answer
            asked.append(connection.target)
            elsewhere = pool.has_other(asked)
            pause = attempts.pause(error, elsewhere)
            if isinstance(error, Unavailable) and error.attempts == 1:
                _log.warning("%s; trying again for up to %.0f s", error.message, attempts.remaining())
            if not elsewhere:
                asked.clear()
                yield Pause(pause)

    def _told(self, caught: grpc.RpcError, connection: Connection, attempts: Attempts) -> StatusError:
        """The error of an attempt; what it says of the target is remembered."""
        error = from_rpc_error(caught)
        if isinstance(error, DeadlineExceeded):
            error.message += f" (no answer from {connection.target.name} within {round(attempts.allowed, 2):g} s)"
        if error.code is grpc.StatusCode.CANCELLED and not self._pool.closed:
            # Nobody here did: a server that ends drops its calls so.
            error = Unavailable(f"the server ended the call: {error.message}", code=error.code)
        if isinstance(error, Unavailable):
            self._pool.failed(connection, error.retry_after)
            if error.retry_after is None:
                # It is gRPC that says so, of the connection: it names addresses, not what the user gave.
                how, other = ("with TLS", "with") if self._tls else ("in plain text", "without")
                error.message = (
                    f"cannot reach {connection.target.name} {how} (is it up, and {other} TLS?): {error.message}"
                )
        return error

    def _end(self, deadline: float | None) -> float:
        return self.now() + (self._deadline if deadline is None else check_deadline(deadline))

    def _new_pool(self, closed: bool = False) -> Pool:
        pool = Pool(self._targets, self._connections, self._open, now=lambda: self.now(), first=self._first)
        if closed:
            pool.close()
        return pool

    def _open(self, target: str) -> Any:
        # Credentials are gRPC's, and do not outlive a fork as bytes do.
        credentials = None if self._tls is None else self._tls.credentials()
        return self._dial(target, _channel.options(target, self._keepalive), credentials)


class Connected:
    """What `Client` and `AsyncClient` have in common; see `Client`."""

    _dial: Callable[..., Any]

    def __init__(
        self,
        target: str | Sequence[str],
        *,
        connections: int | None = None,
        deadline: float = 60.0,
        token: str | None = None,
        tls_ca: PathLike | None = None,
        tls_cert: PathLike | None = None,
        tls_key: PathLike | None = None,
        fingerprint: str | None = None,
        keepalive: float | None = _channel.KEEPALIVE,
    ) -> None:
        self._settings = Settings(
            target, connections, deadline, token, tls_ca, tls_cert, tls_key, fingerprint, keepalive
        )
        self._session = Session(self._settings, self._dial)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as its arguments: a copy, in a worker process for one, has connections of its own."""
        arguments = dict(vars(self._settings))
        return partial(type(self), **arguments), ()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._settings.target}>"


def _check_connections(connections: int | None) -> int | None:
    if connections is None:
        return None
    if isinstance(connections, bool) or not isinstance(connections, int):
        raise TypeError(f"connections is {connections!r}; it must be a number of connections to each target, or None")
    if connections < 1:
        raise ValueError(f"connections is {connections}; it must be at least 1, or None")
    return connections


def _check_fingerprint(fingerprint: str | None) -> str | None:
    if fingerprint is None:
        return None
    if not isinstance(fingerprint, str):
        raise TypeError(f"fingerprint is {fingerprint!r}; it must be that of a model, as model().fingerprint has it")
    if not fingerprint or not fingerprint.isprintable() or " " in fingerprint:
        # An empty one would pin nothing.
        raise ValueError(f"fingerprint is {fingerprint!r}; it must be that of a model, as model().fingerprint has it")
    return fingerprint


def _is_of(fingerprint: str, pin: str) -> bool:
    """Whether an answer of `fingerprint`, MODEL or MODEL+PROJECTION, is of `pin`: either, or MODEL alone."""
    return fingerprint == pin or fingerprint.startswith(f"{pin}+")


def _serves(model: Model, pin: str) -> bool:
    """Whether `model` can give answers that are of `pin`."""
    fingerprints = {model.fingerprint, *(f"{model.fingerprint}+{one.fingerprint}" for one in model.projections)}
    return pin in fingerprints


def _same(one: Model, other: Model) -> bool:
    """In all that a request is made with."""
    return (one.fingerprint, one.limits, one.projections) == (other.fingerprint, other.limits, other.projections)


_SESSIONS: weakref.WeakSet[Session] = weakref.WeakSet()
# Of parents. They are kept, since gRPC's destructors would wait for threads that the child does not have.
_LEFT: list[Pool] = []


def _after_fork() -> None:
    for session in list(_SESSIONS):
        session.after_fork()


os.register_at_fork(after_in_child=_after_fork)
