"""The server around the service: credentials, TLS, health, reflection, transport limits, drain."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from dinov3_server.api import server as server_module
from dinov3_server.api.server import FrontendServer
from dinov3_server.config.settings import Settings
from dinov3_server.errors import ConfigError, StartupError
from dinov3_server.metrics import Metrics
from dinov3_server.models.interface import OutputParity, ParityCheck
from dinov3_serving.v1 import feature_service_pb2 as pb
from dinov3_serving.v1 import feature_service_pb2_grpc as pb_grpc
from tests.server.api.rig import AS_IS, MODEL, FakeEngine, failure_of, open_channel, picture, serving, tensor
from tests.support.paths import ROOT
from tests.support.waiting import until_async

SERVICE = "dinov3_serving.v1.FeatureService"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
REQUEST = pb.ExtractRequest(pixels=tensor(picture(16, 16)[np.newaxis]), preprocessing=AS_IS)
CERTIFICATES = ROOT / "tests" / "client"
# Of no certificate.
OTHER_KEY = """-----BEGIN EC PRIVATE KEY-----
MHcCAQEEIGlEBBfKT5UYhnWHPuxFTYGhyKh35v3NaNnMz+zPKeIeoAoGCCqGSM49
AwEHoUQDQgAEStqJ3LHpXqXQLjN3J/gr7dODTEG43gfQFOtDFd6YYREMkUNcZFha
8voBY1C1nUvfAd06RYHCrnyQdcbFfi+kUg==
-----END EC PRIVATE KEY-----
"""


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


async def reflect(channel: grpc.aio.Channel, **call: Any) -> list[str]:
    async def ask() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")

    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    [answer] = [answer async for answer in stub.ServerReflectionInfo(ask(), **call)]
    return [service.name for service in answer.list_services_response.service]


@pytest.fixture
def tokens(tmp_path: Path) -> str:
    path = tmp_path / "tokens"
    path.write_text("secret-one\nsecret-two\n")
    return str(path)


@pytest.mark.parametrize("token", ["secret-one", "secret-two"])
async def test_a_token_of_the_file_opens_everything(tokens: str, token: str) -> None:
    async with serving(token_file=tokens) as rig:
        await rig.stub.Extract(REQUEST, metadata=bearer(token))
        call = rig.stub.ExtractStream(iter([pb.ExtractStreamRequest(request=REQUEST)]), metadata=bearer(token))
        assert (await call.read()).HasField("response")
        assert SERVICE in await reflect(rig.channel, metadata=bearer(token))
        # RFC 9110, section 11.1: the scheme is case-insensitive.
        await rig.stub.Extract(REQUEST, metadata=(("authorization", f"bearer {token}"),))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ((), "this server requires a token"),
        (bearer("secret-three"), "the token is not valid"),
        (bearer("secret-one "), "the token is not valid"),
        (bearer(""), "the token is not valid"),
        ((("authorization", "secret-one"),), "the token is not valid"),
        ((("authorization", "Basic secret-one"),), "the token is not valid"),
        (bearer("secret-three") + bearer("secret-one"), "the token is not valid"),
        (bearer("secret-one") + bearer("secret-three"), "the token is not valid"),
    ],
)
async def test_who_has_no_token_is_refused(tokens: str, metadata: Any, message: str) -> None:
    async with serving(token_file=tokens) as rig:
        for call in (
            rig.stub.Extract(REQUEST, metadata=metadata),
            rig.stub.GetModel(pb.GetModelRequest(), metadata=metadata),
        ):
            error = await failure_of(call)
            assert error.code == grpc.StatusCode.UNAUTHENTICATED
            assert message in error.message
            assert "authorization: Bearer TOKEN" in error.message
            assert "secret" not in error.message
        # Without messages: gRPC's client reports INTERNAL where a stream is refused while it sends one.
        for stream in (
            rig.stub.ExtractStream,
            reflection_pb2_grpc.ServerReflectionStub(rig.channel).ServerReflectionInfo,
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stream(iter(()), metadata=metadata).read()
            assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
        for method in ("Extract", "GetModel", "ExtractStream"):
            assert rig.count("dinov3_requests_total", method, "UNAUTHENTICATED") == 1
        assert not rig.engine.done_runs
        # A probe has no token.
        health = await health_pb2_grpc.HealthStub(rig.channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == SERVING


async def test_who_has_no_token_is_refused_before_a_message_is_read(tokens: str) -> None:
    """Callers that keep their message to themselves have their answer all the same."""
    async with serving(token_file=tokens) as rig:
        for method in ("Extract", "GetModel"):
            call = rig.channel.stream_unary(f"/{SERVICE}/{method}")()
            assert await call.code() == grpc.StatusCode.UNAUTHENTICATED
            assert rig.count("dinov3_requests_total", method, "UNAUTHENTICATED") == 1
        for name in (f"/{SERVICE}/ExtractStream", "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"):
            stream = rig.channel.stream_stream(name)()
            assert await stream.code() == grpc.StatusCode.UNAUTHENTICATED


async def test_a_call_that_ends_before_its_message_came() -> None:
    async with serving() as rig:
        for name in (f"/{SERVICE}/Extract", f"/{SERVICE}/GetModel", "/grpc.health.v1.Health/Check"):
            error = await failure_of(rig.channel.stream_unary(name)(iter(())))
            assert error.code == grpc.StatusCode.INVALID_ARGUMENT
            assert error.message == "the call ended without a message: a unary call needs exactly one"
        assert rig.count("dinov3_requests_total", "Extract", "INVALID_ARGUMENT") == 1


@pytest.mark.parametrize(("content", "message"), [(b" \n\n", "is empty"), ("pässword".encode(), "ASCII")])
async def test_a_token_file_of_no_use(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"token_file .*{message}"):
        FrontendServer(FakeEngine(), Settings(token_file=str(path)), Metrics(), 0, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("missing", ["token_file", "tls_cert_file", "tls_key_file", "tls_client_ca_file"])
async def test_a_file_that_cannot_be_read(tmp_path: Path, missing: str) -> None:
    files = {
        "tls_cert_file": str(CERTIFICATES / "localhost.pem"),
        "tls_key_file": str(CERTIFICATES / "localhost.key"),
        "tls_client_ca_file": str(CERTIFICATES / "localhost.pem"),
    }
    files[missing] = str(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=f"cannot read {missing} .*nowhere: No such file"):
        FrontendServer(FakeEngine(), Settings(**files), Metrics(), 0, 1)  # type: ignore[arg-type]


async def test_tls() -> None:
    certificate = CERTIFICATES / "localhost.pem"
    async with serving(tls_cert_file=str(certificate), tls_key_file=str(CERTIFICATES / "localhost.key")) as rig:
        credentials = grpc.ssl_channel_credentials(certificate.read_bytes())
        async with grpc.aio.secure_channel(f"localhost:{rig.port}", credentials) as channel:
            await pb_grpc.FeatureServiceStub(channel).Extract(REQUEST)
        assert (await rig.error(REQUEST)).code == grpc.StatusCode.UNAVAILABLE  # in the clear


async def test_mutual_tls() -> None:
    certificate, key = CERTIFICATES / "localhost.pem", CERTIFICATES / "localhost.key"
    files = {"tls_cert_file": str(certificate), "tls_key_file": str(key), "tls_client_ca_file": str(certificate)}
    async with serving(**files) as rig:
        pem = certificate.read_bytes()
        known = grpc.ssl_channel_credentials(pem, key.read_bytes(), pem)
        async with grpc.aio.secure_channel(f"localhost:{rig.port}", known) as channel:
            await pb_grpc.FeatureServiceStub(channel).Extract(REQUEST)
        stranger = grpc.ssl_channel_credentials(pem)
        async with grpc.aio.secure_channel(f"localhost:{rig.port}", stranger) as channel:
            error = await failure_of(pb_grpc.FeatureServiceStub(channel).Extract(REQUEST))
            assert error.code == grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"tls_cert_file": "garbage"},
            "tls_cert_file .*garbage and tls_key_file .*localhost.key are not a PEM certificate",
        ),
        ({"tls_key_file": "garbage"}, "tls_key_file .*garbage are not a PEM certificate and its private key"),
        ({"tls_key_file": "other.key"}, "tls_key_file .*other.key are not a PEM .*KEY_VALUES_MISMATCH"),
        ({"tls_client_ca_file": "garbage"}, "tls_client_ca_file .*garbage contains no PEM certificate"),
    ],
    ids=["certificate", "key", "key of another", "authorities"],
)
async def test_tls_files_of_no_use(tmp_path: Path, files: dict[str, str], message: str) -> None:
    (tmp_path / "garbage").write_text("garbage")
    (tmp_path / "other.key").write_text(OTHER_KEY)
    good = {
        "tls_cert_file": str(CERTIFICATES / "localhost.pem"),
        "tls_key_file": str(CERTIFICATES / "localhost.key"),
    }
    given = good | {setting: str(tmp_path / name) for setting, name in files.items()}
    with pytest.raises(ConfigError, match=message):
        FrontendServer(FakeEngine(), Settings(**given), Metrics(), 0, 1)  # type: ignore[arg-type]


async def test_health() -> None:
    async with serving() as rig:
        stub = health_pb2_grpc.HealthStub(rig.channel)
        for service in ("", SERVICE):
            request = health_pb2.HealthCheckRequest(service=service)
            assert (await stub.Check(request)).status == SERVING
            watch = stub.Watch(request)
            assert (await watch.read()).status == SERVING
            rig.server.set_serving(False)
            assert (await watch.read()).status == NOT_SERVING
            assert (await stub.Check(request)).status == NOT_SERVING
            rig.server.set_serving(True)
            rig.server.set_serving(True)
            assert (await watch.read()).status == SERVING
            watch.cancel()
        unknown = health_pb2.HealthCheckRequest(service="other.Service")
        error = await failure_of(stub.Check(unknown))
        assert error.code == grpc.StatusCode.NOT_FOUND
        assert SERVICE in error.message
        watch = stub.Watch(unknown)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        watch.cancel()


async def test_health_lists_every_service() -> None:
    async with serving() as rig:
        stub = health_pb2_grpc.HealthStub(rig.channel)
        for status in (SERVING, NOT_SERVING):
            rig.server.set_serving(status == SERVING)
            statuses = (await stub.List(health_pb2.HealthListRequest())).statuses
            assert {name: each.status for name, each in statuses.items()} == {"": status, SERVICE: status}


async def test_not_serving_until_told() -> None:
    server = FrontendServer(FakeEngine(), Settings(), Metrics(), 0, 1)  # type: ignore[arg-type]
    port = await server.start("127.0.0.1", 0)
    async with open_channel(port) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert answer.status == NOT_SERVING
    await server.drain(0)


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_knows_the_services_and_their_messages(version: str) -> None:
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


async def test_the_log_has_no_traceback_of_what_a_caller_got_wrong(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as rig:
        for service in (SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection", "a.Service"):
            error = await failure_of(rig.channel.unary_unary(f"/{service}/Embed")(b""))
            assert error.code == grpc.StatusCode.UNIMPLEMENTED
        for method in ("grpc.health.v1.Health/Check", "grpc.health.v1.Health/List", f"{SERVICE}/Extract"):
            error = await failure_of(rig.channel.unary_unary(f"/{method}")(b"\xff"))
            assert error.code == grpc.StatusCode.INVALID_ARGUMENT
        for method in ("v1", "v1alpha"):
            name = f"/grpc.reflection.{method}.ServerReflection/ServerReflectionInfo"
            call = rig.channel.stream_stream(name)(iter([b"\xff"]))
            assert await call.code() == grpc.StatusCode.INVALID_ARGUMENT
        watch = rig.channel.unary_stream("/grpc.health.v1.Health/Watch")(b"\xff")
        assert await watch.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


async def test_methods_that_do_not_exist_are_one_label() -> None:
    async with serving() as rig:
        for method in (f"/{SERVICE}/Embed", "/some.Service/Made/Up"):
            error = await failure_of(rig.channel.unary_unary(method)(b""))
            assert error.code == grpc.StatusCode.UNIMPLEMENTED
        assert rig.count("dinov3_requests_total", "other", "UNIMPLEMENTED") == 2


async def test_messages_pass_in_both_directions_up_to_the_limit() -> None:
    """gRPC's own limit for what a server receives is 4 MiB."""
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


async def test_an_address_that_cannot_be_had() -> None:
    server = FrontendServer(FakeEngine(), Settings(), Metrics(), 0, 1)  # type: ignore[arg-type]
    with pytest.raises(StartupError, match=r"cannot listen on 192\.0\.2\.1:0"):
        await server.start("192.0.2.1", 0)
    await server.drain(0)


async def test_drain_finishes_what_is_in_flight_and_refuses_the_rest() -> None:
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
        rig.server.set_serving(True)  # of no effect any more


async def test_a_call_that_arrives_while_draining_is_told_to_go_elsewhere() -> None:
    """What gRPC let through before it closed."""
    async with serving() as rig:
        rig.server._service.drain()
        error = await rig.error(REQUEST)
        assert error.code == grpc.StatusCode.UNAVAILABLE
        assert error.retry_seconds == 1.0
        assert "shutting down" in error.message
        assert rig.count("dinov3_refused_requests_total", "draining") == 1


async def test_when_the_grace_is_over_the_rest_is_cancelled() -> None:
    async with serving() as rig:
        rig.engine.hold = True
        call = rig.stub.Extract(REQUEST)
        await rig.engine.runs.get()
        await rig.server.drain(0.05)
        assert rig.engine.untouched()
        assert rig.engine.cancelled_runs == 1
        assert (await failure_of(call)).code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        await until_async(lambda: rig.count("dinov3_requests_total", "Extract", "CANCELLED") == 1)


async def test_a_server_tells_whether_its_features_are_proven() -> None:
    proofs = (OutputParity("cls", "float32", 0.999999, 2e-6), OutputParity("cls", "bfloat16", 0.9995, 0.0125))
    parity_check = ParityCheck(
        verified=True,
        reason="",
        revision="6876159a",
        outputs=proofs,
        time="2026-01-02T03:04:05Z",
        not_covered="The size of the moon.",
    )
    async with serving() as rig:
        unproven = (await rig.stub.GetModel(pb.GetModelRequest())).parity_check
        assert (unproven.verified, unproven.reason) == (False, "no comparison was run")
        rig.engine.model = replace(MODEL, parity_check=parity_check)
        told = (await rig.stub.GetModel(pb.GetModelRequest())).parity_check
    assert told.verified
    assert (told.upstream_revision, told.time) == ("6876159a", "2026-01-02T03:04:05Z")
    assert told.not_covered == "The size of the moon."
    assert [
        (proof.output, proof.dtype, pytest.approx(proof.least_cosine), pytest.approx(proof.relative_error))
        for proof in told.outputs
    ] == [("cls", pb.DATA_TYPE_FLOAT32, 0.999999, 2e-6), ("cls", pb.DATA_TYPE_BFLOAT16, 0.9995, 0.0125)]


async def test_connections_over_the_limit_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_MOST_CONNECTIONS", 3)
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
        assert server_module._most_connections() == most
