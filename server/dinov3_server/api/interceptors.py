"""What every call goes through before and after its handler: credentials, errors to statuses, counting."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn, TypeAlias

import grpc

from dinov3_server.api.credentials import Tokens
from dinov3_server.api.receiving import Receiver
from dinov3_server.api.status import abort, serving_error, status_of
from dinov3_server.errors import InternalError, Overloaded, ServingError, Unauthenticated, Unavailable
from dinov3_server.metrics import Metrics

SERVICE = "dinov3_serving.v1.FeatureService"
EXTRACT, STREAM, GET_MODEL = (f"/{SERVICE}/{name}" for name in ("Extract", "ExtractStream", "GetModel"))
# `method` of dinov3_requests_total. Health and reflection are not counted; whatever does not exist is "other".
_LABELS = {EXTRACT: "Extract", STREAM: "ExtractStream", GET_MODEL: "GetModel"}
_OTHER = "other"
# Who asks a probe for its health has no credentials.
_OPEN = "/grpc.health.v1.Health/"
SEND_A_TOKEN = "send the metadata `authorization: Bearer TOKEN`"

# Generic in the stubs only.
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Context: TypeAlias = "grpc.aio.ServicerContext[bytes, bytes]"
Continuation: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]"


class RequestMetrics:
    """`with RequestMetrics(...)` counts and times one request.

    `expired` tells, when the request is cancelled, whether its deadline is why.
    """

    __slots__ = ("_expired", "_method", "_metrics", "_started")

    def __init__(self, metrics: Metrics, method: str, expired: Callable[[], bool]) -> None:
        self._metrics = metrics
        self._method = method
        self._expired = expired
        self._started = time.perf_counter()

    def restart_clock(self) -> None:
        """Time from now on: how long a message takes to come is up to the caller."""
        self._started = time.perf_counter()

    def __enter__(self) -> RequestMetrics:
        return self

    def __exit__(self, kind: object, error: BaseException | None, frames: object) -> None:
        seconds = time.perf_counter() - self._started
        code = "OK"
        if isinstance(error, ServingError):
            code = error.status
            if isinstance(error, Overloaded | Unavailable):
                self._metrics.refused_requests.inc(error.reason)
            if isinstance(error, Overloaded) and error.reason != "late":
                self._metrics.refusal_seconds.observe(seconds)
        elif isinstance(error, asyncio.CancelledError):
            code = "DEADLINE_EXCEEDED" if self._expired() else "CANCELLED"
        elif error is not None:
            code = InternalError.status
        self._metrics.requests.inc(self._method, code)
        self._metrics.request_seconds.observe(seconds, self._method)


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Errors of FeatureService become statuses; its calls are counted, and known while they last.

    Unary methods are served by handlers of streams, which is the same on the wire. For any other handler gRPC receives
    the message before it calls an interceptor's: who may call at all would be known only then.
    """

    def __init__(self, metrics: Metrics, receiver: Receiver) -> None:
        self._metrics = metrics
        self._receiver = receiver
        self._active: set[asyncio.Task[Any]] = set()
        self._handlers: dict[str, Handler] = {}  # by method

    async def idle(self) -> None:
        """Return when no call is left, including what cancelled ones have to clean up."""
        while self._active:
            await asyncio.wait(self._active)

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        method = handler_call_details.method
        ours = self._handlers.get(method)
        if ours is None:
            handler = await continuation(handler_call_details)
            if handler is None:
                self._metrics.requests.inc(_OTHER, "UNIMPLEMENTED")
                return None
            ours = self._handlers[method] = self._wrapped(handler, method)
        return ours

    def _wrapped(self, handler: Handler, method: str) -> Handler:
        if method not in _LABELS:
            return self._reading(handler)
        if method == STREAM:
            return grpc.stream_stream_rpc_method_handler(self._stream(handler))
        return grpc.stream_unary_rpc_method_handler(self._unary(handler, _LABELS[method]))

    def _unary(self, handler: Handler, label: str) -> Any:
        call: Any = handler.unary_unary  # the stubs know handlers of the threaded server only

        async def unary(_: object, context: Context) -> bytes:
            task = self._begin()
            try:
                try:
                    with RequestMetrics(self._metrics, label, expired=lambda: context.time_remaining() == 0) as timed:
                        data, request_memory = await self._receiver.message(context)
                        timed.restart_clock()
                        remaining = context.time_remaining()
                        deadline = None if remaining is None else time.monotonic() + remaining
                        context.add_done_callback(request_memory.release)  # type: ignore[arg-type]  # untyped
                        answering = call(data, context, deadline, request_memory)
                        del data  # what was sent need not wait in memory for the device
                        answer: bytes = await answering
                        request_memory.start_sending(context)
                        return answer
                except Exception as error:
                    status = status_of(serving_error(error))
                # Outside of `except`: grpc keeps what abort raises, in a cycle.
                return await abort(context, status)
            finally:
                self._active.discard(task)

        return unary

    def _reading(self, handler: Handler) -> Handler:
        """Health and reflection: handlers of streams, which read as ours do."""
        given: Any = handler

        async def requests(context: Context) -> AsyncIterator[bytes]:
            while (received := await self._receiver.read(context, None, rank=2)) is not None:
                data, request_memory = received
                request_memory.release()
                yield data

        async def reading(_: object, context: Context) -> Any:
            try:
                if handler.request_streaming:
                    async for answer in given.stream_stream(requests(context), context):
                        await context.write(answer)
                    return None
                data, request_memory = await self._receiver.message(context, rank=2)
                request_memory.release()
            except ServingError as error:
                status = status_of(error)
            else:
                return await (given.unary_stream or given.unary_unary)(data, context)
            return await abort(context, status)

        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(reading, response_serializer=handler.response_serializer)
        return grpc.stream_unary_rpc_method_handler(reading, response_serializer=handler.response_serializer)

    def _stream(self, handler: Handler) -> Any:
        """Of a stream each message is counted, by `RequestMetrics`; the call itself only where it fails as a whole."""
        call: Any = handler.stream_stream

        async def stream(requests: Any, context: Context) -> None:
            task = self._begin()
            try:
                try:
                    await call(requests, context)
                    return
                except Exception as error:
                    failure = serving_error(error)
                    self._metrics.requests.inc(_LABELS[STREAM], failure.status)
                    status = status_of(failure)
                    del failure
                await abort(context, status)
            finally:
                self._active.discard(task)

        return stream

    def _begin(self) -> asyncio.Task[Any]:
        """Add the current call to those that `idle` waits for. The caller discards what is returned."""
        task = asyncio.current_task()
        assert task is not None
        self._active.add(task)
        return task


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """Outermost. Lets calls through that bring `authorization: Bearer TOKEN` with one of `tokens`; health is open."""

    def __init__(self, tokens: Tokens, metrics: Metrics) -> None:
        self._tokens = tokens
        self._metrics = metrics

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith(_OPEN):
            return handler
        reason = self._tokens.refusal(handler_call_details.invocation_metadata)
        if not reason:
            return handler
        refuse = self._refusal(reason, method)
        # Handlers of streams: nothing of a message is received.
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(refuse)
        return grpc.stream_unary_rpc_method_handler(refuse)

    def _refusal(self, reason: str, method: str) -> Any:
        async def refuse(request: Any, context: Context) -> NoReturn:
            if method in _LABELS:
                self._metrics.requests.inc(_LABELS[method], Unauthenticated.status)
            await abort(context, status_of(Unauthenticated(f"{reason}: {SEND_A_TOKEN}")))

        return refuse
