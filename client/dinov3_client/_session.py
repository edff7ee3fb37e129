"""The logic of both clients: which calls are made and retried, over which connection, and what their answers mean.

Procedures (`_transport.effects`) describe the I/O; `Client` and `AsyncClient` execute it.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import grpc

from dinov3_client import _features, _images, _response, _split
from dinov3_client._answer import Answer
from dinov3_client._checks import check_bool, check_count, check_deadline
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
from dinov3_client._images import ImageLike
from dinov3_client._model import Model, read_model
from dinov3_client._reading import Reading, check_range
from dinov3_client._request import RequestOptions
from dinov3_client._split import PreparedRequest
from dinov3_client._tracing import traced
from dinov3_client._transport import channels, failures, proxy
from dinov3_client._transport.channels import PathLike
from dinov3_client._transport.effects import CloseChannel, Gather, Offload, Procedure, Rpc, Sleep
from dinov3_client._transport.pool import Connection, Pool, Target
from dinov3_client._transport.retry import Attempts
from dinov3_client._transport.targets import check_targets

EXTRACT = "/dinov3_serving.v1.FeatureService/Extract"
GET_MODEL = "/dinov3_serving.v1.FeatureService/GetModel"
# Of one call that was split.
MAX_PARALLEL_REQUESTS = 4

_log = logging.getLogger("dinov3_client")

R = TypeVar("R", Answer, Model)


@dataclass(frozen=True)
class Settings:
    """The arguments of a client, as given; see `BaseClient`."""

    target: str | Sequence[str]
    connections: int | None
    deadline: float
    token: str | None
    tls_ca: PathLike | None
    tls_cert: PathLike | None
    tls_key: PathLike | None
    fingerprint: str | None
    keepalive: float | None
    mixed_models: bool


class Session:
    """One client's connections and what it knows of its server. `dial(target, options, credentials)` makes a channel.

    Its procedures may run concurrently, in several threads too. `find_loop` returns the running event loop, to which
    channels belong, so that each loop has a pool of its own; None of a client that blocks.
    """

    def __init__(self, settings: Settings, dial: Callable[..., Any], find_loop: Callable[[], Any]) -> None:
        self._targets = check_targets(settings.target)
        self._deadline = check_deadline(settings.deadline)
        self._connections = settings.connections
        if self._connections is not None:
            self._connections = check_count("connections", self._connections, 1, "connections to each target")
        self._keepalive = channels.check_keepalive(settings.keepalive)
        self._metadata = channels.metadata(settings.token)
        self._tls = channels.read_tls(settings.tls_ca, settings.tls_cert, settings.tls_key)
        self._pin = _check_fingerprint(settings.fingerprint)
        self._mixed_models = check_bool("mixed_models", settings.mixed_models)
        self._dial = dial
        self._model: Model | None = None
        # Tests replace these.
        self.now: Callable[[], float] = time.monotonic
        self.rand: Callable[[], float] = random.random
        self._first = random.randrange(len(self._targets))
        self._find_loop = find_loop
        self._closed = False
        self._pools: dict[Any, Pool] = {}
        self._pools_lock = threading.Lock()
        _SESSIONS.add(self)

    @property
    def _pool(self) -> Pool:
        """The pool of the running event loop, else the one that was made last."""
        loop = self._find_loop()
        with self._pools_lock:
            if loop is None and self._pools:
                return list(self._pools.values())[-1]
            if loop not in self._pools:
                for other in [each for each in self._pools if each is not None and each.is_closed()]:
                    del self._pools[other]  # its channels cannot be closed any more
                self._pools[loop] = self._new_pool()
            return self._pools[loop]

    def close(self) -> list[tuple[Any, list[Any]]]:
        """Refuse further calls and return the channels of each event loop, for the caller to close."""
        self._closed = True
        with self._pools_lock:
            return [(loop, pool.close()) for loop, pool in self._pools.items()]

    def after_fork(self) -> None:
        """Start with new pools in a forked child; the parent's connections and locks are left, not closed."""
        _PARENT_POOLS.extend(self._pools.values())
        self._pools = {}
        self._pools_lock = threading.Lock()

    @traced
    def model(self, deadline: float | None) -> Procedure[Model]:
        return (yield from self._get_model(Attempts(self._end(deadline), self.now, self.rand)))

    @traced
    def wait_ready(self, timeout: float) -> Procedure[Model]:
        end = self.now() + check_deadline(timeout, "timeout")
        return (yield from self._get_model(Attempts(end, self.now, self.rand, patient=True)))

    @traced
    def extract(self, images: ImageLike | Iterable[ImageLike], options: RequestOptions) -> Procedure[Features]:
        """Extract features; repeat the call once if the server has another model or other limits than we knew."""
        end = self._end(options.deadline)
        reading = Reading(_images.load(images, options.decoding, options.on_error))
        yield Offload(reading.read)
        known = self._model
        model = known or (yield from self._get_model(Attempts(end, self.now, self.rand)))
        try:
            return (yield from self._extract(reading, options, model, end))
        except (ModelMismatch, MessageTooLarge, InvalidRequest, ValueError) as error:
            failure = error
        if reading.first:  # the images before these are no longer there to be sent again
            raise failure
        if isinstance(failure, ModelMismatch):
            self._model = None  # the server serves another model now
            again = self._pin is None
        else:
            again = known is not None
        if not again:
            raise failure
        try:
            renewed = yield from self._get_model(Attempts(end, self.now, self.rand))
        except StatusError:
            renewed = model  # raise the first error
        if not isinstance(failure, ModelMismatch) and _same_for_requests(model, renewed):
            raise failure
        return (yield from self._extract(reading, options, renewed, end))

    def _extract(self, reading: Reading, options: RequestOptions, model: Model, end: float) -> Procedure[Features]:
        requests: list[PreparedRequest] = []
        answers: list[Answer] = []
        while True:
            prepared: list[PreparedRequest] = yield Offload(partial(self._prepare, reading, options, model))
            if len(prepared) == 1:
                answers.append((yield from self._extract_one(prepared[0], end)))
            else:
                answers += yield Gather([self._extract_one(one, end) for one in prepared], MAX_PARALLEL_REQUESTS)
            for answer in answers[1:]:
                if answer.fingerprint != answers[0].fingerprint:
                    raise model_mismatch(answers[0].fingerprint, answer.fingerprint)
            requests += [replace(one, data=b"") for one in prepared]
            del prepared  # before more images are read
            if not reading.is_complete:
                yield Offload(reading.read)
                if reading.images:
                    continue
            return _features.join(requests, answers, options.on_error)

    def _prepare(self, reading: Reading, options: RequestOptions, model: Model) -> list[PreparedRequest]:
        images = check_range(reading.images, reading.first, model, options.on_error)
        is_whole = reading.is_complete and not reading.first
        return _split.split(images, options, model, self._pin or "", first=reading.first, is_whole=is_whole)

    def _extract_one(self, prepared: PreparedRequest, end: float) -> Procedure[Answer]:
        if not prepared.sent:
            return _response.without_features(prepared)
        attempts = Attempts(end, self.now, self.rand)
        try:
            answer = yield from self._call(EXTRACT, prepared.data, attempts, partial(_response.read, prepared=prepared))
        except StatusError as error:
            prepared.of_the_call(error)
            if isinstance(error, MessageTooLarge) and len(prepared.sent) == 1 and prepared.options.on_error == "return":
                return _response.without_features(prepared, error)
            raise
        # Checked here too: a server or proxy may ignore the request's field.
        if prepared.fingerprint and not _matches_pin(answer.fingerprint, prepared.fingerprint):
            raise model_mismatch(prepared.fingerprint, answer.fingerprint)
        return answer

    def _get_model(self, attempts: Attempts) -> Procedure[Model]:
        model = yield from self._call(GET_MODEL, b"", attempts, read_model)
        if self._pin is not None and not _can_match_pin(model, self._pin):
            self._model = None
            raise model_mismatch(self._pin, model.fingerprint)
        self._model = model
        return model

    def _call(self, method: str, message: bytes, attempts: Attempts, read: Callable[[bytes], R]) -> Procedure[R]:
        """Call `method` as often as `attempts` allows, and return its response, read by `read`."""
        pool = self._pool
        tried: list[Target] = []  # since the last pause
        while True:
            connection = pool.acquire(tried)
            error: StatusError | None = None
            try:
                data = yield Rpc(connection.channel, method, message, attempts.remaining(), self._metadata)
            except grpc.RpcError as rpc_error:
                error = self._error_of(rpc_error, connection, attempts)
            finally:
                pool.release(connection)
            if error is None:
                answer = read(data)
                frontends = answer.frontends if isinstance(answer, Model) else None
                model = answer.fingerprint.partition("+")[0]
                pool.answered(connection, answer.frontend, frontends, model)
                if connection.target.is_reported:
                    connection.target.is_reported = False
                    _log.info("%s answers again", connection.target.name)
                if not self._mixed_models and self._pin is None:
                    yield from self._check_models(pool, connection.target, attempts)
                for channel in pool.take_idle():
                    yield CloseChannel(channel)
                return answer
            tried.append(connection.target)
            has_alternative = pool.has_alternative(tried)
            pause = attempts.pause_or_raise(error, has_alternative)
            if isinstance(error, Unavailable) and not connection.target.is_reported:
                connection.target.is_reported = True  # once, and not for each call until it answers again
                then = "using the other targets" if has_alternative else "trying again"
                _log.warning("%s; %s for up to %.0f s", error.message, then, attempts.remaining())
            if not has_alternative:
                tried.clear()
                yield Sleep(pause)

    def _check_models(self, pool: Pool, target: Target, attempts: Attempts) -> Procedure[None]:
        """Raise ModelMismatch if another target serves another model than `target`, which has just answered.

        Compares what the last answers of the targets said. If that differs, the other one is asked, which may have
        another model by now.
        """
        for other in pool.others(target):
            if other.model in ("", target.model):
                continue
            connection = pool.acquire(pool.others(other))
            try:
                data = yield Rpc(connection.channel, GET_MODEL, b"", attempts.remaining(), self._metadata)
                other.model = read_model(data).fingerprint
            except grpc.RpcError:
                other.model = ""
            finally:
                pool.release(connection)
            if other.model not in ("", target.model):
                raise ModelMismatch(
                    f"the targets serve different models: {target.name} has the fingerprint {target.model}, "
                    f"{other.name} has {other.model}; give `fingerprint` for the one to accept, or mixed_models=True",
                    code=grpc.StatusCode.FAILED_PRECONDITION,
                )

    def _error_of(self, rpc_error: grpc.RpcError, connection: Connection, attempts: Attempts) -> StatusError:
        """Return the error of an attempt, and note in the pool if its target is unavailable."""
        error = from_rpc_error(rpc_error)
        if isinstance(error, DeadlineExceeded):
            through = proxy.find(connection.target.name)
            error.message += (
                f" (no answer from {connection.target.name}{f' through the proxy {through}' if through else ''} within "
                f"{round(attempts.allowed, 2):g} s)"
            )
        if error.code is grpc.StatusCode.CANCELLED and not self._closed:
            # Not cancelled by this client: a server that shuts down ends its calls so.
            error = Unavailable(f"the server ended the call: {error.message}", code=error.code)
        if isinstance(error, Unavailable):
            self._pool.failed(connection, error.retry_after)
            if error.retry_after is None:
                error.message = failures.unreachable(connection.target.name, self._tls is not None, error.message)
        return error

    def _end(self, deadline: float | None) -> float:
        return self.now() + (self._deadline if deadline is None else check_deadline(deadline))

    def _new_pool(self) -> Pool:
        pool = Pool(self._targets, self._connections, self._open, now=lambda: self.now(), first=self._first)
        if self._closed:
            pool.close()
        return pool

    def _open(self, target: str) -> Any:
        # Made for each channel: gRPC's credential objects do not survive a fork, PEM bytes do.
        credentials = None if self._tls is None else self._tls.credentials()
        return self._dial(target, channels.options(target, self._keepalive), credentials)


class BaseClient:
    """The base of `Client` and `AsyncClient`; see `Client`."""

    _dial: Callable[..., Any]
    _find_loop: Callable[[], Any]

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
        keepalive: float | None = channels.KEEPALIVE,
        mixed_models: bool = False,
    ) -> None:
        self._settings = Settings(
            target, connections, deadline, token, tls_ca, tls_cert, tls_key, fingerprint, keepalive, mixed_models
        )
        self._session = Session(self._settings, self._dial, self._find_loop)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the arguments alone: a copy, in a worker process for example, has connections of its own."""
        arguments = dict(vars(self._settings))
        return partial(type(self), **arguments), ()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._settings.target}>"


def _check_fingerprint(fingerprint: str | None) -> str | None:
    if fingerprint is None:
        return None
    if not isinstance(fingerprint, str):
        raise TypeError(f"fingerprint is {fingerprint!r}; it must be a fingerprint as in model().fingerprint")
    if not fingerprint or not fingerprint.isprintable() or " " in fingerprint:
        # The empty string would pin nothing.
        raise ValueError(f"fingerprint is {fingerprint!r}; it must be a fingerprint as in model().fingerprint")
    return fingerprint


def _matches_pin(fingerprint: str, pin: str) -> bool:
    """Return whether an answer's `fingerprint` (MODEL or MODEL+PROJECTION) is `pin`, or has it as its MODEL."""
    return fingerprint == pin or fingerprint.startswith(f"{pin}+")


def _can_match_pin(model: Model, pin: str) -> bool:
    """Return whether `model`, with or without one of its projections, has the fingerprint `pin`."""
    fingerprints = {model.fingerprint, *(f"{model.fingerprint}+{one.fingerprint}" for one in model.projections)}
    return pin in fingerprints


def _same_for_requests(one: Model, other: Model) -> bool:
    """Return whether requests are prepared alike for two models."""
    return (one.fingerprint, one.limits, one.projections) == (other.fingerprint, other.limits, other.projections)


_SESSIONS: weakref.WeakSet[Session] = weakref.WeakSet()
# Pools of parent processes. They are kept: gRPC's destructors would wait for threads that the child does not have.
_PARENT_POOLS: list[Pool] = []


def _after_fork() -> None:
    for session in list(_SESSIONS):
        session.after_fork()


os.register_at_fork(after_in_child=_after_fork)
