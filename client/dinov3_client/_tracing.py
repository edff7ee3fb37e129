"""Trace calls with OpenTelemetry, if the application does.

An application that traces has imported `opentelemetry.trace` and set a tracer provider. Nothing of OpenTelemetry is
imported here: without that module a call costs one look-up.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, ParamSpec

import grpc

from dinov3_client._errors import StatusError
from dinov3_client._features import Features
from dinov3_client._model import Model
from dinov3_client._transport.effects import Gather, Procedure, Rpc, T

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span

P = ParamSpec("P")


def traced(function: Callable[P, Procedure[T]]) -> Callable[P, Procedure[T]]:
    """Wrap a function that makes the procedure of a call: each call has a span, a child of the span that is current
    where the function is called, and all its requests carry the span's context to the server.
    """

    @wraps(function)
    def make(*args: P.args, **kwargs: P.kwargs) -> Procedure[T]:
        procedure = function(*args, **kwargs)
        trace = sys.modules.get("opentelemetry.trace")
        if trace is None:
            return procedure
        # Now, as the procedure may run in another thread, where the application has no current span.
        from opentelemetry.context import get_current

        return _traced(f"dinov3_client.{function.__name__}", procedure, get_current())

    return make


def _traced(name: str, procedure: Procedure[T], parent: Context) -> Procedure[T]:
    from opentelemetry import propagate, trace

    tracer = trace.get_tracer("dinov3_client")
    span = tracer.start_span(name, parent, trace.SpanKind.CLIENT, {"rpc.system.name": "grpc"})
    carrier: dict[str, str] = {}
    propagate.inject(carrier, trace.set_span_in_context(span, parent))
    metadata = tuple((key.lower(), value) for key, value in carrier.items())  # gRPC wants lower case
    try:
        result = yield from _forward(procedure, metadata, span)
    except BaseException as error:
        if span.is_recording():
            code = error.code.name if isinstance(error, StatusError) else type(error).__name__
            span.set_attribute("error.type", code)
            if isinstance(error, StatusError):
                span.set_attribute("rpc.response.status_code", code)
                if error.request_id is not None:
                    span.set_attribute("dinov3.request_id", error.request_id)
            span.add_event("exception", {"exception.type": type(error).__name__, "exception.message": str(error)})
            span.set_status(trace.StatusCode.ERROR, str(error))
        raise
    else:
        if span.is_recording():
            span.set_attributes({"rpc.response.status_code": "OK", **_attributes(result)})
        return result
    finally:
        span.end()


def _forward(procedure: Procedure[T], metadata: tuple[tuple[str, str], ...], span: Span) -> Procedure[T]:
    """Run `procedure` with `metadata` added to its requests, and note failed attempts in `span`."""
    step: Callable[[], Any] = partial(next, procedure)
    while True:
        try:
            effect = step()
        except StopIteration as done:
            result: T = done.value
            return result
        if isinstance(effect, Rpc):
            effect = replace(effect, metadata=(*effect.metadata, *metadata))
        elif isinstance(effect, Gather):
            effect = replace(effect, procedures=[_forward(one, metadata, span) for one in effect.procedures])
        try:
            outcome = yield effect
        except GeneratorExit:
            procedure.close()
            raise
        except BaseException as error:
            if isinstance(error, grpc.RpcError) and span.is_recording():
                call: Any = error  # both kinds of channel raise the call itself
                span.add_event(
                    "attempt failed",
                    {"rpc.response.status_code": call.code().name, "exception.message": call.details() or ""},
                )
            step = partial(procedure.throw, error)
        else:
            step = partial(procedure.send, outcome)


def _attributes(result: object) -> Mapping[str, str | int]:
    match result:
        case Features():
            return {"dinov3.images": len(result), "dinov3.fingerprint": result.fingerprint}
        case Model():
            return {"dinov3.model": result.name, "dinov3.fingerprint": result.fingerprint}
        case _:
            return {}
