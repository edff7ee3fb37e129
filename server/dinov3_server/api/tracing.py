"""Trace requests with OpenTelemetry: a span for each, continued from the caller's, with a span for each stage.

Nothing of OpenTelemetry is imported unless traces are wanted. The worker has no tracer: its clock is the frontend's
(CLOCK_MONOTONIC), so the spans of queue and device are made here, from the times that come with its results.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from dinov3_server import __version__
from dinov3_server.errors import StartupError

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

log = logging.getLogger(__name__)

# Any of these, if not empty, asks for traces.
_EXPORTERS = "OTEL_TRACES_EXPORTER"
_WANTED = (_EXPORTERS, "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_OTLP = {"grpc": "otlp_proto_grpc", "http/protobuf": "otlp_proto_http"}
# How long the end of a frontend waits for the spans that are not exported yet.
_CLOSE_SECONDS = 2.0
# Statuses that are the server's fault. By OpenTelemetry's conventions for gRPC only these mark a span as an error.
_FAULTS = {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}


@dataclass(eq=False)
class RequestTrace:
    """The span of one request. `recording` is False if the trace is sampled out; then nothing is added to it."""

    _tracer: Tracer
    _context: Context  # with the span of the request, the parent of the stages
    _span: Span
    trace_id: str
    recording: bool
    # Of the clock of spans to CLOCK_MONOTONIC, which times the stages. Once a request, so that its spans agree.
    _offset: int = field(default_factory=lambda: time.time_ns() - time.monotonic_ns())

    def event(self, name: str) -> None:
        """Note that something has happened now."""
        if self.recording:
            self._span.add_event(name)

    def note(self, attributes: Mapping[str, str | int]) -> None:
        """Set attributes of the request."""
        if self.recording:
            self._span.set_attributes(attributes)

    def stage(self, name: str, start: float, end: float, attributes: Mapping[str, int] | None = None) -> None:
        """Add the span of a stage that has ended. `start` and `end` are in seconds of time.monotonic()."""
        if self.recording:
            start_time = self._offset + int(start * 1e9)
            span = self._tracer.start_span(name, self._context, attributes=attributes, start_time=start_time)
            span.end(self._offset + int(end * 1e9))

    def end(self, code: str, error: BaseException | None, attributes: Mapping[str, str | int]) -> None:
        """End the span of the request with the gRPC status `code`."""
        if self.recording:
            from opentelemetry.trace import StatusCode

            self._span.set_attributes({"rpc.response.status_code": code, **attributes})
            if error is not None:
                name, text = type(error).__name__, str(error)
                self._span.set_attribute("error.type", code)
                self._span.add_event("exception", {"exception.type": name, "exception.message": text})
                if code in _FAULTS:
                    self._span.set_status(StatusCode.ERROR, text)
        self._span.end()


@dataclass(eq=False)
class Tracing:
    """Starts the spans of requests. `own` is the provider to shut down at the end, unless another made it."""

    tracer: Tracer
    own: TracerProvider | None = None

    def start(self, method: str, metadata: Iterable[tuple[str, str | bytes]], request_id: str) -> RequestTrace:
        """Start the span of a request of `method` (SERVICE/NAME), a child of the caller's if `metadata` names that."""
        from opentelemetry import propagate, trace

        carrier = {key: value for key, value in metadata if isinstance(value, str)}
        attributes = {"rpc.system.name": "grpc", "rpc.method": method, "dinov3.request_id": request_id}
        # Without a caller's span the trace begins here: a current span would be of another request.
        parent = propagate.extract(carrier, trace.set_span_in_context(trace.INVALID_SPAN))
        span = self.tracer.start_span(method, parent, trace.SpanKind.SERVER, attributes)
        context = span.get_span_context()
        return RequestTrace(
            self.tracer,
            trace.set_span_in_context(span, parent),
            span,
            trace.format_trace_id(context.trace_id),
            span.is_recording(),
        )

    def close(self) -> None:
        """Export the spans that wait. Gives up after _CLOSE_SECONDS: the collector may be gone."""
        if self.own is not None:
            thread = threading.Thread(target=self.own.shutdown, name="close-tracing", daemon=True)
            thread.start()
            thread.join(_CLOSE_SECONDS)


def configure(environment: Mapping[str, str] = os.environ) -> Tracing | None:
    """Return the tracing of this process, or None if no traces are wanted.

    They are wanted if the process has a tracer provider already (of `opentelemetry-instrument`, for example), or if
    OpenTelemetry's own environment variables name an exporter or an endpoint.

    Raises StartupError if the exporter does not exist or cannot be made.
    """
    given = sys.modules.get("opentelemetry.trace")
    if given is not None and not isinstance(given.get_tracer_provider(), given.ProxyTracerProvider):
        return Tracing(given.get_tracer("dinov3_server", __version__))
    wanted = next((name for name in _WANTED if environment.get(name, "").strip()), None)
    exporters = environment.get(_EXPORTERS, "").strip() or "otlp"
    if wanted is None or exporters == "none" or environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    try:
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        log.warning("%s is set, but there are no traces: %s; pip install 'dinov3-serving[otel]'", wanted, error)
        return None
    provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
    for name in exporters.split(","):
        provider.add_span_processor(BatchSpanProcessor(_exporter(name.strip(), environment)))
    return Tracing(provider.get_tracer("dinov3_server", __version__), provider)


def _resource() -> Any:
    from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource

    found = Resource.create()  # with OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES
    ours = {SERVICE_VERSION: __version__}
    if str(found.attributes[SERVICE_NAME]).startswith("unknown_service"):
        ours[SERVICE_NAME] = "dinov3-server"
    return Resource({**ours, **{k: v for k, v in found.attributes.items() if k != SERVICE_NAME or k not in ours}})


def _exporter(name: str, environment: Mapping[str, str]) -> Any:
    """Return the exporter of that name. The SDK has a function for it, which is not public."""
    protocol = next((environment[key].strip() for key in _PROTOCOLS if environment.get(key, "").strip()), "grpc")
    if name == "otlp":
        if protocol not in _OTLP:
            raise StartupError(f"the OTLP protocol {protocol!r} is unknown; {' or '.join(_PROTOCOLS)} can be "
                               f"{' or '.join(_OTLP)}")  # fmt: skip
        name = _OTLP[protocol]
    known = {entry.name: entry for entry in entry_points(group="opentelemetry_traces_exporter")}
    if name not in known:
        raise StartupError(
            f"{_EXPORTERS} names {name!r}, which is not installed; installed are {', '.join(sorted(known)) or 'none'} "
            "(pip install 'dinov3-serving[otel]' for OTLP)"
        )
    try:
        return known[name].load()()
    except Exception as error:
        raise StartupError(f"the trace exporter {name} cannot be made from the OTEL_ variables: {error}") from error
