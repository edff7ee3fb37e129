"""The server around the service: health, reflection, transport limits, shutdown."""

from __future__ import annotations

import asyncio
import resource

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from dinov3_server.api import server as server_module
from dinov3_server.api.server import FrontendServer
from dinov3_server.config.settings import Settings
from dinov3_server.errors import StartupError
from dinov3_server.metrics import Metrics
from dinov3_serving.v1 import feature_service_pb2 as pb
from tests.server.api.rig import (
    AS_IS,
    REQUEST,
    FakeEngine,
    failure_of,
    open_channel,
    serving,
    tensor,
)
from tests.support.waiting import until_async

SERVICE = "dinov3_serving.v1.FeatureService"
HAS_LIST = hasattr(health_pb2, "HealthListRequest")
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def test_a_unary_call_without_a_message_is_invalid() -> None:
    async with serving() as rig:
        for name in (f"/{SERVICE}/Extract", f"/{SERVICE}/GetModel", "/grpc.health.v1.Health/Check"):
            error = await failure_of(rig.channel.stream_unary(name)(iter(())))
            assert error.code == grpc.StatusCode.INVALID_ARGUMENT
            assert error.message == "the call ended without a message: a unary call needs exactly one"
        assert rig.count("dinov3_requests_total", "Extract", "INVALID_ARGUMENT") == 1


async def test_health() -> None:
    async with serving() as rig:
        stub = health_pb2_grpc.HealthStub(rig.channel)
        for service in ("", SERVICE):
            request = health_pb2.HealthCheckRequest(service=service)
            assert (await stub.Check(request)).status == SERVING
            watch = stub.Watch(request)
            assert (await watch.read()).status == SERVING
            rig.server.health.set_serving(False)
            assert (await watch.read()).status == NOT_SERVING
            assert (await stub.Check(request)).status == NOT_SERVING
            rig.server.health.set_serving(True)
            rig.server.health.set_serving(True)
            assert (await watch.read()).status == SERVING
            watch.cancel()
        unknown = health_pb2.HealthCheckRequest(service="other.Service")
        error = await failure_of(stub.Check(unknown))
        assert error.code == grpc.StatusCode.NOT_FOUND
        assert SERVICE in error.message
        watch = stub.Watch(unknown)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        watch.cancel()


@pytest.mark.skipif(not HAS_LIST, reason="grpcio-health-checking before 1.85 has no List")
async def test_health_lists_every_service() -> None:
    async with serving() as rig:
        stub = health_pb2_grpc.HealthStub(rig.channel)
        for status in (SERVING, NOT_SERVING):
            rig.server.health.set_serving(status == SERVING)
            statuses = (await stub.List(health_pb2.HealthListRequest())).statuses
            assert {name: each.status for name, each in statuses.items()} == {"": status, SERVICE: status}


async def test_health_is_not_serving_until_set() -> None:
    server = FrontendServer(FakeEngine(), Settings(), Metrics(), 0, 1)  # type: ignore[arg-type]
    port = await server.start("127.0.0.1", 0)
    async with open_channel(port) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert answer.status == NOT_SERVING
    await server.drain(0)


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_describes_the_services_and_their_messages(version: str) -> None:
    """The messages of both versions are the same bytes."""
    reflected = f"grpc.reflection.{version}.ServerReflection"

    async def ask(**question: str) -> reflection_pb2.ServerReflectionResponse:
        request = reflection_pb2.ServerReflectionRequest(**question).SerializeToString()
        call = rig.channel.stream_stream(f"/{reflected}/ServerReflectionInfo")(iter([request]))
        return reflection_pb2.ServerReflectionResponse.FromString(await call.read())

    async with serving() as rig:
        listed = (await ask(list_services="")).list_services_response.service
        assert {each.name for each in listed} == {
            SERVICE,
            "grpc.health.v1.Health",
            "grpc.reflection.v1.ServerReflection",
            "grpc.reflection.v1alpha.ServerReflection",
        }
        for name, message in ((SERVICE, b"ExtractStreamRequest"), (reflected, b"ListServiceResponse")):
            file = (await ask(file_containing_symbol=name)).file_descriptor_response.file_descriptor_proto[0]
            assert message in file
            assert FileDescriptorProto.FromString(file).package == name.rpartition(".")[0]


async def test_errors_of_callers_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as rig:
        for service in (SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection", "a.Service"):
            error = await failure_of(rig.channel.unary_unary(f"/{service}/Embed")(b""))
            assert error.code == grpc.StatusCode.UNIMPLEMENTED
        for method in ("grpc.health.v1.Health/Check", *["grpc.health.v1.Health/List"] * HAS_LIST, f"{SERVICE}/Extract"):
            error = await failure_of(rig.channel.unary_unary(f"/{method}")(b"\xff"))
            assert error.code == grpc.StatusCode.INVALID_ARGUMENT
        for method in ("v1", "v1alpha"):
            name = f"/grpc.reflection.{method}.ServerReflection/ServerReflectionInfo"
            call = rig.channel.stream_stream(name)(iter([b"\xff"]))
            assert await call.code() == grpc.StatusCode.INVALID_ARGUMENT
        watch = rig.channel.unary_stream("/grpc.health.v1.Health/Watch")(b"\xff")
        assert await watch.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


async def test_unknown_methods_share_one_label() -> None:
    async with serving() as rig:
        for method in (f"/{SERVICE}/Embed", "/some.Service/Made/Up"):
            error = await failure_of(rig.channel.unary_unary(method)(b""))
            assert error.code == grpc.StatusCode.UNIMPLEMENTED
        assert rig.count("dinov3_requests_total", "other", "UNIMPLEMENTED") == 2


async def test_messages_may_be_as_large_as_the_limit_in_both_directions() -> None:
    """The default limit of gRPC for received messages is 4 MiB."""
    size = 6 << 20
    async with serving(max_message_bytes=size) as rig:
        pixels = tensor(np.zeros((5, 512, 640, 3), np.uint8))
        wanted = pb.Outputs(cls=True, patches=True, registers=True, dtype=pb.DATA_TYPE_FLOAT32)
        wanted.layers.extend(pb.LayerOutputs(layer=layer, patches=True) for layer in range(6))
        request = pb.ExtractRequest(pixels=pixels, preprocessing=AS_IS, outputs=wanted)
        assert 4 << 20 < request.ByteSize() <= size
        answer = await rig.stub.Extract(request)
        assert 4 << 20 < answer.ByteSize() <= size


async def test_compressed_messages_are_refused_before_they_are_unpacked() -> None:
    bomb = bytes(16 << 20)  # its 16 KiB on the wire are over no limit
    async with serving(max_message_bytes=1 << 20) as rig:
        for method in (f"/{SERVICE}/Extract", f"/{SERVICE}/GetModel", "/grpc.health.v1.Health/Check"):
            for algorithm in (grpc.Compression.Gzip, grpc.Compression.Deflate):
                error = await failure_of(rig.channel.unary_unary(method)(bomb, compression=algorithm))
                assert error.code == grpc.StatusCode.UNIMPLEMENTED
                assert "ompression algorithm" in error.message
        # Without a message: grpc.aio calls it INTERNAL where a message could not be written any more.
        stream = rig.channel.stream_stream(f"/{SERVICE}/ExtractStream")(compression=grpc.Compression.Gzip)
        assert await stream.code() == grpc.StatusCode.UNIMPLEMENTED
        await rig.stub.Extract(REQUEST)


async def test_frontends_share_a_port() -> None:
    first = FrontendServer(FakeEngine(), Settings(), Metrics(), 0, 2)  # type: ignore[arg-type]
    second = FrontendServer(FakeEngine(), Settings(), Metrics(), 1, 2)  # type: ignore[arg-type]
    port = await first.start("127.0.0.1", 0)
    assert await second.start("127.0.0.1", port) == port
    await first.drain(0)
    await second.drain(0)


async def test_an_address_that_cannot_be_used_is_a_startup_error() -> None:
    server = FrontendServer(FakeEngine(), Settings(), Metrics(), 0, 1)  # type: ignore[arg-type]
    with pytest.raises(StartupError, match=r"cannot listen on 192\.0\.2\.1:0"):
        await server.start("192.0.2.1", 0)
    await server.drain(0)


async def test_drain_finishes_active_calls_and_refuses_new_ones() -> None:
    async with serving() as rig:
        health = health_pb2_grpc.HealthStub(rig.channel)
        watch = health.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        rig.engine.hold = True
        call = rig.stub.Extract(REQUEST)
        run = await rig.engine.runs.get()
        drain = asyncio.create_task(rig.server.drain(60))
        # Told first, and then the watcher's call ends: it would keep the drain waiting.
        assert (await watch.read()).status == NOT_SERVING
        assert await watch.read() is grpc.aio.EOF
        error = await rig.error(REQUEST)
        assert error.code == grpc.StatusCode.UNAVAILABLE
        assert not drain.done()
        run.go.set_result(None)
        assert (await call).blocks
        await drain
        rig.server.health.set_serving(True)  # of no effect any more


async def test_a_call_that_arrives_while_draining_is_unavailable() -> None:
    """Such a call was accepted by gRPC before it closed the port."""
    async with serving() as rig:
        rig.server.service.refuse_calls()
        error = await rig.error(REQUEST)
        assert error.code == grpc.StatusCode.UNAVAILABLE
        assert error.retry_seconds == 1.0
        assert "shutting down" in error.message
        assert rig.count("dinov3_refused_requests_total", "draining") == 1


async def test_calls_are_cancelled_after_the_grace_period() -> None:
    async with serving() as rig:
        rig.engine.hold = True
        call = rig.stub.Extract(REQUEST)
        await rig.engine.runs.get()
        await rig.server.drain(0.05)
        assert rig.engine.untouched()
        assert rig.engine.cancelled_runs == 1
        assert (await failure_of(call)).code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        await until_async(lambda: rig.count("dinov3_requests_total", "Extract", "CANCELLED") == 1)


async def test_connections_over_the_limit_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "MOST_CONNECTIONS", 3)
    async with serving() as rig:
        writers, accepted = [], 0
        for number in range(6):
            reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
            writers.append(writer)
            # A connection that is accepted gets the server's HTTP/2 settings at once; the others are closed.
            accepted += bool(await reader.read(1))
            assert accepted == min(3, number + 1)
        for writer in writers:
            writer.close()
            await writer.wait_closed()
        await rig.stub.Extract(REQUEST, wait_for_ready=True)


def test_connections_leave_descriptors_to_the_frontend(monkeypatch: pytest.MonkeyPatch) -> None:
    for soft, most in ((resource.RLIM_INFINITY, 4096), (1 << 20, 4096), (1024, 768), (100, 1)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft: (soft, soft))
        assert server_module.most_connections() == most
