"""gRPC interceptors: authenticate calls, turn errors into statuses, count and time requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn, TypeAlias

import grpc

from dinov3_server.api.connections import OpenCalls
from dinov3_server.api.credentials import Tokens
from dinov3_server.api.receiving import Receiver
from dinov3_server.api.status import abort, serving_error, status_of
from dinov3_server.errors import InternalError, Overloaded, ServingError, Unauthenticated, Unavailable
from dinov3_server.metrics import Metrics

SERVICE = "dinov3_serving.v1.FeatureService"
EXTRACT, STREAM, GET_MODEL = (f"/{SERVICE}/{name}" for name in ("Extract", "ExtractStream", "GetModel"))
# Label `method` of dinov3_requests_total. Health and reflection are not counted; unknown methods are "other".
_LABELS = {EXTRACT: "Extract", STREAM: "ExtractStream", GET_MODEL: "GetModel"}
_OTHER = "other"
# Health checks need no authentication.
_WITHOUT_TOKEN = "/grpc.health.v1.Health/"
SEND_A_TOKEN = "send the metadata `authorization: Bearer TOKEN`"

# Generic in the stubs only.
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Context: TypeAlias = "grpc.aio.ServicerContext[bytes, bytes]"
Continuation: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]"


class RequestMetrics:
    """A context manager that counts and times one request.

    `expired` returns whether a cancellation was caused by the deadline.
    """

    __slots__ = ("_expired", "_method", "_metrics", "_started")

    def __init__(self, metrics: Metrics, method: str, expired: Callable[[], bool]) -> None:
        self._metrics = metrics
        self._method = method
        self._expired = expired
        self._started = time.perf_counter()

    def restart_clock(self) -> None:
        """Measure from now on: the time that a message takes to arrive is the caller's."""
        self._started = time.perf_counter()

    def __enter__(self) -> RequestMetrics:
        self._metrics.requests_in_flight.add(1, self._method)
        return self

    def __exit__(self, kind: object, error: BaseException | None, frames: object) -> None:
        seconds = time.perf_counter() - self._started
        self._metrics.requests_in_flight.add(-1, self._method)
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
    """Turns errors of FeatureService into statuses, counts its calls, and keeps track of the active ones.

    Unary methods are served by stream handlers, which look the same on the wire: for a unary handler gRPC receives the
    message before it calls the handler, so before the call is authenticated.
    """

    def __init__(self, metrics: Metrics, receiver: Receiver, open_calls: OpenCalls) -> None:
        self._metrics = metrics
        self._receiver = receiver
        self._open_calls = open_calls
        self._active: set[asyncio.Task[Any]] = set()
        self._handlers: dict[str, Handler] = {}  # by method
        metrics.requests.inc(_OTHER, "UNIMPLEMENTED", value=0)
        for label in _LABELS.values():
            metrics.requests_in_flight.set(0, label)

    async def wait_idle(self) -> None:
        """Wait until no call is active; cancelled calls are active until they have cleaned up."""
        while self._active:
            await asyncio.wait(self._active)

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        method = handler_call_details.method
        wrapped = self._handlers.get(method)
        if wrapped is None:
            handler = await continuation(handler_call_details)
            if handler is None:
                self._metrics.requests.inc(_OTHER, "UNIMPLEMENTED")
                return None
            wrapped = self._handlers[method] = self._wrap(handler, method)
        return wrapped

    def _wrap(self, handler: Handler, method: str) -> Handler:
        if method not in _LABELS:
            return self._wrap_uncounted(handler)
        if method == STREAM:
            return grpc.stream_stream_rpc_method_handler(self._wrap_stream(handler))
        return grpc.stream_unary_rpc_method_handler(self._wrap_unary(handler, _LABELS[method]))

    def _wrap_unary(self, handler: Handler, label: str) -> Any:
        call: Any = handler.unary_unary  # the type stubs describe the synchronous server only

        async def unary(_: object, context: Context) -> bytes:
            task = self._begin(context)
            try:
                try:
                    with RequestMetrics(self._metrics, label, expired=lambda: context.time_remaining() == 0) as timed:
                        data, request_memory = await self._receiver.message(context)
                        timed.restart_clock()
                        self._metrics.request_bytes.inc(label, value=len(data))
                        remaining = context.time_remaining()
                        deadline = None if remaining is None else time.monotonic() + remaining
                        context.add_done_callback(request_memory.release)  # type: ignore[arg-type]  # untyped
                        answering = call(data, context, deadline, request_memory)
                        del data  # so that the message is freed while the request waits for the device
                        answer: bytes = await answering
                        request_memory.start_sending(context)
                        self._metrics.response_bytes.inc(label, value=len(answer))
                        return answer
                except Exception as error:
                    status = status_of(serving_error(error))
                # Outside `except`: gRPC keeps the exception that abort raises, in a reference cycle.
                return await abort(context, status)
            finally:
                self._active.discard(task)

        return unary

    def _wrap_uncounted(self, handler: Handler) -> Handler:
        """Serve a method of health or reflection by a stream handler that reads through the Receiver."""
        methods: Any = handler

        async def requests(context: Context) -> AsyncIterator[bytes]:
            while (received := await self._receiver.read(context, None, rank=2)) is not None:
                data, request_memory = received
                request_memory.release()
                yield data

        async def serve(_: object, context: Context) -> Any:
            self._open_calls.add(context)
            try:
                if handler.request_streaming:
                    async for answer in methods.stream_stream(requests(context), context):
                        await context.write(answer)
                    return None
                data, request_memory = await self._receiver.message(context, rank=2)
                request_memory.release()
            except ServingError as error:
                status = status_of(error)
            else:
                return await (methods.unary_stream or methods.unary_unary)(data, context)
            return await abort(context, status)

        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(serve, response_serializer=handler.response_serializer)
        return grpc.stream_unary_rpc_method_handler(serve, response_serializer=handler.response_serializer)

    def _wrap_stream(self, handler: Handler) -> Any:
        """Count the call only if it fails as a whole; stream.py counts its messages."""
        call: Any = handler.stream_stream

        async def stream(requests: Any, context: Context) -> None:
            task = self._begin(context)
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

    def _begin(self, context: Context) -> asyncio.Task[Any]:
        """Add the current call to the active ones and return its task, which the caller removes."""
        self._open_calls.add(context)
        task = asyncio.current_task()
        assert task is not None
        self._active.add(task)
        return task


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls without one of `tokens`, except health checks. The outermost interceptor."""

    def __init__(self, tokens: Tokens, metrics: Metrics, open_calls: OpenCalls) -> None:
        self._tokens = tokens
        self._metrics = metrics
        self._open_calls = open_calls

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith(_WITHOUT_TOKEN):
            return handler
        reason = self._tokens.reject_reason(handler_call_details.invocation_metadata)
        if not reason:
            return handler
        refuse = self._refuse(reason, method)
        # Stream handlers receive no message unless they read it.
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(refuse)
        return grpc.stream_unary_rpc_method_handler(refuse)

    def _refuse(self, reason: str, method: str) -> Any:
        async def refuse(request: Any, context: Context) -> NoReturn:
            self._open_calls.add(context)
            if method in _LABELS:
                self._metrics.requests.inc(_LABELS[method], Unauthenticated.status)
            await abort(context, status_of(Unauthenticated(f"{reason}: {SEND_A_TOKEN}")))

        return refuse
