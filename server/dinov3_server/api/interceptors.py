"""The gRPC interceptor: authenticates calls, gives each an id, and turns errors into statuses."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import grpc

from dinov3_server.api.access_log import AccessLog
from dinov3_server.api.credentials import BearerTokens
from dinov3_server.api.peers import OpenCalls
from dinov3_server.api.receiving import Receiver, deadline_of
from dinov3_server.api.requests import REQUEST_ID, RequestRecord, request_id
from dinov3_server.api.status import abort, serving_error, status_of
from dinov3_server.api.tracing import Tracing
from dinov3_server.errors import InternalError, ServingError
from dinov3_server.metrics import METHODS, Metrics

SERVICE = "dinov3_serving.v1.FeatureService"
STREAM = f"/{SERVICE}/ExtractStream"
# Label `method` of dinov3_requests_total. Health and reflection are not counted; unknown methods are "other".
_LABELS = {f"/{SERVICE}/{name}": name for name in METHODS}
_OTHER = "other"
# Health checks need no authentication.
_WITHOUT_TOKEN = "/grpc.health.v1.Health/"

# Generic in the stubs only.
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Context: TypeAlias = "grpc.aio.ServicerContext[bytes, bytes]"
Serve: TypeAlias = "Callable[[Context, str], Awaitable[Any]]"  # the context of a call, and its id
Continuation: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]"


@dataclass(eq=False)
class CallInterceptor(grpc.aio.ServerInterceptor):
    """Authenticates calls, turns errors into statuses, counts calls of FeatureService, and keeps track of active calls.

    Every method is served by a stream handler, which looks the same on the wire: for a unary handler gRPC receives the
    message before it calls the handler, so before the call is authenticated.
    """

    metrics: Metrics
    receiver: Receiver
    tokens: BearerTokens | None
    open_calls: OpenCalls
    access_log: AccessLog | None
    tracing: Tracing | None
    handlers: dict[str, Handler] = field(default_factory=dict)  # by method
    active: set[asyncio.Task[Any]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.metrics.requests.inc(_OTHER, "UNIMPLEMENTED", value=0)
        for label in _LABELS.values():
            self.metrics.requests_in_flight.set(0, label)

    async def wait_idle(self) -> None:
        """Wait until no call is active; cancelled calls are active until they have cleaned up."""
        while self.active:
            await asyncio.wait(self.active)

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        method = handler_call_details.method
        wrapped = self.handlers.get(method)
        if wrapped is None:
            handler = await continuation(handler_call_details)
            if handler is None:
                self.metrics.requests.inc(_OTHER, "UNIMPLEMENTED")
                return None
            wrapped = self.handlers[method] = self._wrap(handler, method)
        return wrapped

    def _wrap(self, handler: Handler, method: str) -> Handler:
        methods: Any = handler  # the type stubs describe the synchronous server only
        if method == STREAM:
            serve = self._stream(methods.stream_stream)
        elif method in _LABELS:
            serve = self._unary(methods.unary_unary, _LABELS[method])
        else:
            serve = self._uncounted(methods, needs_token=not method.startswith(_WITHOUT_TOKEN))

        async def guarded(_: object, context: Context) -> Any:
            task = asyncio.current_task()
            assert task is not None
            self.active.add(task)
            self.open_calls.add(context)
            call_id = request_id(context.invocation_metadata() or ())
            context.set_trailing_metadata(((REQUEST_ID, call_id),))
            try:
                try:
                    return await serve(context, call_id)
                except grpc.aio.AbortError:
                    raise
                except Exception as error:
                    status = status_of(serving_error(error))
                # Outside `except`: gRPC keeps the exception that abort raises, in a reference cycle.
                await abort(context, status, call_id)
            finally:
                self.active.discard(task)

        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        return make(guarded, response_serializer=handler.response_serializer)

    def _unary(self, call: Any, label: str) -> Serve:
        async def serve(context: Context, call_id: str) -> bytes:
            record = RequestRecord(
                self.metrics, self.access_log, label, context.peer(), call_id, lambda: context.time_remaining() == 0
            )
            with record:
                self._authenticate(context)
                if self.tracing is not None:
                    metadata = context.invocation_metadata() or ()
                    record.trace = self.tracing.start(f"{SERVICE}/{label}", metadata, call_id)
                data, request_memory = await self.receiver.message(context)
                record.received(len(data))
                context.add_done_callback(request_memory.release)  # type: ignore[arg-type]  # untyped
                answering = call(data, context, deadline_of(context), request_memory)
                del data  # so that the message is freed while the request waits for the device
                answer: bytes = await answering
                request_memory.start_sending(context)
                record.answered(len(answer))
                return answer

        return serve

    def _stream(self, call: Any) -> Serve:
        """Count the call only if it fails as a whole; stream.py counts its messages."""

        async def serve(context: Context, call_id: str) -> None:
            started = time.perf_counter()
            try:
                self._authenticate(context)
                await call(context, call_id)
            except Exception as error:
                code = error.status if isinstance(error, ServingError) else InternalError.status
                self.metrics.requests.inc(_LABELS[STREAM], code)
                record = RequestRecord(
                    self.metrics, self.access_log, _LABELS[STREAM], context.peer(), call_id, lambda: False
                )
                record.log(code, error, time.perf_counter() - started)
                raise

        return serve

    def _uncounted(self, methods: Any, needs_token: bool) -> Serve:
        """Serve a method of health or reflection, which reads through the Receiver too."""

        async def requests(context: Context) -> AsyncIterator[bytes]:
            while (received := await self.receiver.read(context, None, rank=2)) is not None:
                data, request_memory = received
                request_memory.release()
                yield data

        async def serve(context: Context, call_id: str) -> Any:
            if needs_token:
                self._authenticate(context)
            if methods.request_streaming:
                async for answer in methods.stream_stream(requests(context), context):
                    await context.write(answer)
                return None
            data, request_memory = await self.receiver.message(context, rank=2)
            request_memory.release()
            return await (methods.unary_stream or methods.unary_unary)(data, context)

        return serve

    def _authenticate(self, context: Context) -> None:
        """Raise Unauthenticated if the server requires a token and the call has no valid one."""
        if self.tokens is not None:
            self.tokens.check(context.invocation_metadata() or ())
