"""Traces of requests: the spans of the server, their parent in the caller, and what costs nothing without them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from dinov3_server.api.tracing import configure
from dinov3_server.errors import DeadlineExceeded, StartupError
from dinov3_serving.v1 import feature_service_pb2 as pb
from tests.server.api.rig import MODEL, encoded, picture, serving
from tests.support.tracing import recorded_spans

REQUEST = pb.ExtractRequest(images=[encoded(picture(16, 16)), encoded(picture(16, 16))])
BROKEN = pb.ExtractRequest(images=[encoded(picture(16, 16))], preprocessing=pb.Preprocessing(preset=77))
TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
EXTRACT = "dinov3_serving.v1.FeatureService/Extract"


def from_caller(flags: str = "01") -> tuple[tuple[str, str], ...]:
    return (("traceparent", f"00-{TRACE}-{CALLER}-{flags}"), ("x-request-id", "mine"))


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with recorded_spans(monkeypatch) as exporter:
        yield exporter


def finished(spans: Any) -> tuple[Any, list[Any]]:
    """Return the span of the only request, and those of its stages in the order of their starts."""
    [request] = [span for span in spans.get_finished_spans() if span.kind.name == "SERVER"]
    stages = [span for span in spans.get_finished_spans() if span is not request]
    assert all(span.parent == request.context for span in stages)
    return request, sorted(stages, key=lambda span: span.start_time)


async def test_a_request_continues_the_trace_of_its_caller_and_has_a_span_for_each_stage(spans: Any) -> None:
    async with serving() as rig:
        await rig.stub.Extract(REQUEST, metadata=from_caller())
    request, stages = finished(spans)
    assert (f"{request.context.trace_id:032x}", f"{request.parent.span_id:016x}") == (TRACE, CALLER)
    assert request.name == EXTRACT
    assert request.attributes == {
        "rpc.system.name": "grpc",
        "rpc.method": EXTRACT,
        "rpc.response.status_code": "OK",
        "dinov3.request_id": "mine",
        "dinov3.images": 2,
        "dinov3.model": MODEL.name,
        "dinov3.fingerprint": MODEL.fingerprint,
    }
    assert request.status.is_unset
    assert [event.name for event in request.events] == ["message received", "rows submitted"]
    # The fake engine says that the rows waited for 0.25 s, then ran for 0.25 s in two batches, before it answered.
    names = [span.name for span in stages]
    assert sorted(names) == ["decode", "device", "device", "queue", "respond"]
    [queue], devices = ([span for span in stages if span.name == name] for name in ("queue", "device"))
    assert queue.end_time - queue.start_time == pytest.approx(0.25e9, abs=1e4)
    for device in devices:
        assert device.start_time == pytest.approx(queue.end_time, abs=1e4)
        assert device.end_time - device.start_time == pytest.approx(0.25e9, abs=1e4)
        assert device.attributes == {"dinov3.rows": 1, "dinov3.batch_images": 5}
    decode, respond = (next(span for span in stages if span.name == name) for name in ("decode", "respond"))
    assert request.start_time <= decode.start_time <= decode.end_time <= respond.start_time <= respond.end_time
    assert respond.end_time <= request.end_time + 10_000  # the clock of spans and of stages are read one by one


@pytest.mark.parametrize("traceparent", [None, "", "00-0-0-01", f"00-{'0' * 32}-{CALLER}-01", "x" * 8000])
async def test_without_a_valid_parent_the_trace_begins_here(spans: Any, traceparent: str | None) -> None:
    async with serving() as rig:
        await rig.stub.Extract(REQUEST, metadata=() if traceparent is None else (("traceparent", traceparent),))
    request, _ = finished(spans)
    assert request.parent is None


async def test_an_error_is_recorded_and_only_a_fault_of_the_server_marks_the_span(spans: Any) -> None:
    async with serving() as rig:
        await rig.error(BROKEN)
        bad, stages = finished(spans)
        spans.clear()
        rig.engine.fail = DeadlineExceeded("the deadline passed on the device")
        await rig.error(REQUEST)
    late, _ = finished(spans)
    assert not stages
    assert bad.attributes["rpc.response.status_code"] == bad.attributes["error.type"] == "INVALID_ARGUMENT"
    assert "77" in bad.events[-1].attributes["exception.message"]
    assert bad.status.is_unset
    assert late.attributes["rpc.response.status_code"] == "DEADLINE_EXCEEDED"
    assert (late.status.status_code.name, late.status.description) == ("ERROR", "the deadline passed on the device")


async def test_images_that_failed_are_counted(spans: Any) -> None:
    async with serving() as rig:
        await rig.stub.Extract(pb.ExtractRequest(images=[REQUEST.images[0], pb.Image(encoded=b"?")]))
    request, _ = finished(spans)
    assert (request.attributes["dinov3.images"], request.attributes["dinov3.failed_images"]) == (2, 1)


async def test_each_message_of_a_stream_has_a_span(spans: Any, tmp_path: Path) -> None:
    log = tmp_path / "access.jsonl"
    async with serving(access_log=str(log)) as rig:
        messages = [pb.ExtractStreamRequest(id=number, request=REQUEST) for number in (3, 4)]
        stream = rig.stub.ExtractStream(iter(messages), metadata=from_caller())
        while await stream.read() is not grpc.aio.EOF:
            pass
    requests = [span for span in spans.get_finished_spans() if span.kind.name == "SERVER"]
    assert {span.attributes["dinov3.request_id"] for span in requests} == {"mine/3", "mine/4"}
    assert {f"{span.parent.span_id:016x}" for span in requests} == {CALLER}
    assert [span.name for span in spans.get_finished_spans()].count("device") == 4
    assert {json.loads(line)["trace_id"] for line in log.read_text().splitlines()} == {TRACE}


async def test_of_a_trace_that_is_sampled_out_only_the_id_is_kept(spans: Any, tmp_path: Path) -> None:
    log = tmp_path / "access.jsonl"
    async with serving(access_log=str(log)) as rig:
        await rig.stub.Extract(REQUEST, metadata=from_caller("00"))
        await rig.error(BROKEN, metadata=from_caller("00"))
    assert spans.get_finished_spans() == ()
    assert {json.loads(line)["trace_id"] for line in log.read_text().splitlines()} == {TRACE}


async def test_a_call_without_a_valid_token_is_not_traced(spans: Any, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("right")
    async with serving(token_file=str(token)) as rig:
        failure = await rig.error(REQUEST, metadata=from_caller())
    assert failure.code is grpc.StatusCode.UNAUTHENTICATED
    assert spans.get_finished_spans() == ()


# --- what turns traces on ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_SERVICE_NAME": "features"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": " "},
        {"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"},
        {"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"},
    ],
)
def test_without_an_exporter_there_are_no_traces(environment: dict[str, str]) -> None:
    assert configure(environment) is None


def test_unless_traces_are_wanted_nothing_of_opentelemetry_is_imported() -> None:
    code = (
        "import os, sys; import dinov3_server.api.frontend, dinov3_client\n"
        "from dinov3_server.api.tracing import configure\n"
        "assert configure({}) is None\n"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_where_the_packages_are_missing_a_warning_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in [*sys.modules]:
        if name.partition(".")[0] == "opentelemetry":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    assert configure({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}) is None
    assert "OTEL_EXPORTER_OTLP_ENDPOINT is set, but there are no traces: " in caplog.text
    assert "pip install 'dinov3-serving[otel]'" in caplog.text


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkinn"}, "OTEL_TRACES_EXPORTER names 'zipkinn', which is not installed"),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "udp"}, "'udp' is unknown; .*http/protobuf"),
    ],
)
def test_an_exporter_that_does_not_exist_ends_the_start(environment: dict[str, str], message: str) -> None:
    pytest.importorskip("opentelemetry.sdk")
    with pytest.raises(StartupError, match=message):
        configure(environment)


def test_the_exporters_are_those_that_the_variable_names(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.sdk")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    tracing = configure({"OTEL_TRACES_EXPORTER": "console"})
    assert tracing is not None
    assert tracing.own is not None
    resource = tracing.own.resource.attributes
    assert (resource["service.name"], resource["deployment.environment.name"]) == ("dinov3-server", "test")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "features")
    named = configure({"OTEL_TRACES_EXPORTER": "console"})
    assert named is not None
    assert named.own is not None
    assert named.own.resource.attributes["service.name"] == "features"
    for one in (tracing, named):
        one.close()
