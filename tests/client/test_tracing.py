"""Traces of the client's calls: a span for each, whose context the server receives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest

from dinov3_client import AsyncClient, Client, InvalidRequest
from dinov3_client.testing import MODEL, Failure, FakeServer
from tests.support.tracing import recorded_spans

PIXELS = np.zeros((4, 32, 32, 3), np.uint8)


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with recorded_spans(monkeypatch) as exporter:
        yield exporter


def parents_at(server: FakeServer, method: str) -> list[str]:
    """Return the ids of the spans that the server would continue."""
    return [str(call.metadata["traceparent"]).split("-")[2] for call in server.calls if call.method == method]


def span_id(span: Any) -> str:
    return f"{span.context.span_id:016x}"


def test_a_call_has_a_span_under_the_current_one_and_all_its_requests_carry_it(server: FakeServer, spans: Any) -> None:
    from opentelemetry import trace

    server.model = replace(MODEL, limits=replace(MODEL.limits, max_images_per_request=2))  # so that the call is split
    with Client(server.target) as client, trace.get_tracer("app").start_as_current_span("step") as step:
        client.extract(PIXELS, preset="none")
    call, _ = spans.get_finished_spans()
    assert (call.name, call.kind.name, call.parent) == ("dinov3_client.extract", "CLIENT", step.get_span_context())
    assert parents_at(server, "GetModel") == [span_id(call)]
    assert parents_at(server, "Extract") == [span_id(call)] * 2
    assert (call.attributes["dinov3.images"], call.attributes["rpc.response.status_code"]) == (4, "OK")
    assert call.attributes["dinov3.fingerprint"] == MODEL.fingerprint


def test_calls_in_other_threads_have_the_caller_as_parent(server: FakeServer, spans: Any) -> None:
    from opentelemetry import trace

    with Client(server.target) as client, trace.get_tracer("app").start_as_current_span("epoch") as epoch:
        assert len(list(client.extract_many([PIXELS, PIXELS], preset="none"))) == 2
    calls = [span for span in spans.get_finished_spans() if span.name == "dinov3_client.extract"]
    assert [call.parent for call in calls] == [epoch.get_span_context()] * 2
    assert set(parents_at(server, "Extract")) == {span_id(call) for call in calls}


async def test_the_async_client_traces_alike(server: FakeServer, spans: Any) -> None:
    from opentelemetry import trace

    async with AsyncClient(server.target) as client:
        with trace.get_tracer("app").start_as_current_span("step") as step:
            await client.extract(PIXELS, preset="none")
            await client.model()
    extract, model, _ = spans.get_finished_spans()
    assert (extract.parent, model.parent) == (step.get_span_context(),) * 2
    assert parents_at(server, "Extract") == [span_id(extract)]
    assert (model.name, model.attributes["dinov3.model"]) == ("dinov3_client.model", MODEL.name)


def test_failed_attempts_are_events_and_an_error_marks_the_span(server: FakeServer, spans: Any) -> None:
    server.script = [
        Failure(grpc.StatusCode.UNAVAILABLE, "restarting", retry_after=0.01),
        Failure(grpc.StatusCode.INVALID_ARGUMENT, "no such layer"),
    ]
    with Client(server.target) as client:
        client.model()
        with pytest.raises(InvalidRequest):
            client.extract(PIXELS, preset="none")
    [call] = [span for span in spans.get_finished_spans() if span.name == "dinov3_client.extract"]
    assert [(event.name, dict(event.attributes or {})) for event in call.events[:2]] == [
        ("attempt failed", {"rpc.response.status_code": "UNAVAILABLE", "exception.message": "restarting"}),
        ("attempt failed", {"rpc.response.status_code": "INVALID_ARGUMENT", "exception.message": "no such layer"}),
    ]
    assert call.attributes["rpc.response.status_code"] == "INVALID_ARGUMENT"
    assert call.status.status_code.name == "ERROR"
    assert "no such layer" in call.status.description


def test_the_context_is_sent_without_a_sampled_span_too(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with recorded_spans(monkeypatch, sampled=False) as spans, Client(server.target) as client:
        client.extract(PIXELS, preset="none")
    assert spans.get_finished_spans() == ()
    flags = [int(str(call.metadata["traceparent"]).rpartition("-")[2], 16) for call in server.calls]
    assert not any(flag & 1 for flag in flags)  # so that the server has no spans either


def test_without_a_tracer_provider_nothing_is_sent(server: FakeServer) -> None:
    pytest.importorskip("opentelemetry.trace")
    with Client(server.target) as client:
        client.model()
    assert "traceparent" not in server.calls[0].metadata
