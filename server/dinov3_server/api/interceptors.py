"""What every call goes through before and after its handler: credentials, errors to statuses, counting."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeAlias

import grpc

from dinov3_server.api.credentials import Tokens
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


@contextmanager
def measured(metrics: Metrics, method: str, expired: Callable[[], bool]) -> Iterator[None]:
    """Count and time one request.

    `expired` tells, when the request is cancelled, whether its deadline is why.
    """
    started = time.perf_counter()
    code = "OK"
    try:
        yield
    except asyncio.CancelledError:
        code = "DEADLINE_EXCEEDED" if expired() else "CANCELLED"
        raise
    except ServingError as error:
        code = error.status
        if isinstance(error, Overloaded | Unavailable):
            metrics.rejected.inc(error.reason)
        if isinstance(error, Overloaded):
            metrics.refusal_seconds.observe(time.perf_counter() - started)
        raise
    except Exception:
        code = InternalError.status
        raise
    finally:
        metrics.requests.inc(method, code)
        metrics.request_seconds.observe(time.perf_counter() - started, method)


class Calls(grpc.aio.ServerInterceptor):
    """Errors of FeatureService become statuses; its calls are counted, and known while they last."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._active: set[asyncio.Task[Any]] = set()

    async def idle(self) -> None:
        """Return when no call is left, including what cancelled ones have to clean up."""
        while self._active:
            await asyncio.wait(self._active)

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None:
            self._metrics.requests.inc(_OTHER, "UNIMPLEMENTED")
            return None
        if method not in _LABELS:
            return handler
        if method == STREAM:
            return grpc.stream_stream_rpc_method_handler(self._stream(handler))
        return grpc.unary_unary_rpc_method_handler(self._unary(handler, _LABELS[method]))

    def _unary(self, handler: Handler, label: str) -> Any:
        call: Any = handler.unary_unary  # the stubs know handlers of the threaded server only

        async def unary(request: bytes, context: Context) -> bytes:
            with self._in_progress():
                try:
                    with measured(self._metrics, label, expired=lambda: context.time_remaining() == 0):
                        answer: bytes = await call(request, context)
                        return answer
                except Exception as error:
                    status = status_of(serving_error(error))
                # Outside of `except`, and without the request: grpc keeps what abort raises, in a cycle.
                del request
                return await abort(context, status)

        return unary

    def _stream(self, handler: Handler) -> Any:
        """Of a stream each message is counted, by `measured`; the call itself only where it fails as a whole."""
        call: Any = handler.stream_stream

        async def stream(requests: Any, context: Context) -> None:
            with self._in_progress():
                try:
                    await call(requests, context)
                    return
                except Exception as error:
                    failure = serving_error(error)
                    self._metrics.requests.inc(_LABELS[STREAM], failure.status)
                    status = status_of(failure)
                    del failure
                await abort(context, status)

        return stream

    @contextmanager
    def _in_progress(self) -> Iterator[None]:
        task = asyncio.current_task()
        assert task is not None
        self._active.add(task)
        try:
            yield
        finally:
            self._active.discard(task)


class Auth(grpc.aio.ServerInterceptor):
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
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(refuse)
        return grpc.unary_unary_rpc_method_handler(refuse)

    def _refusal(self, reason: str, method: str) -> Any:
        async def refuse(request: Any, context: Context) -> NoReturn:
            if method in _LABELS:
                self._metrics.requests.inc(_LABELS[method], Unauthenticated.status)
            await abort(context, status_of(Unauthenticated(f"{reason}: {SEND_A_TOKEN}")))

        return refuse
