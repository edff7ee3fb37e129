"""Tokens, TLS and mutual TLS: which calls are accepted, and errors of the files."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from dinov3_server.api.server import FrontendServer
from dinov3_server.config.settings import Settings
from dinov3_server.errors import ConfigError
from dinov3_server.metrics import Metrics
from dinov3_serving.v1 import feature_service_pb2 as pb
from dinov3_serving.v1 import feature_service_pb2_grpc as pb_grpc
from tests.server.api.rig import (
    CERTIFICATES,
    REQUEST,
    FakeEngine,
    bearer,
    failure_of,
    serving,
)

SERVICE = "dinov3_serving.v1.FeatureService"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
# The key of another certificate.
OTHER_KEY = """-----BEGIN EC PRIVATE KEY-----
MHcCAQEEIGlEBBfKT5UYhnWHPuxFTYGhyKh35v3NaNnMz+zPKeIeoAoGCCqGSM49
AwEHoUQDQgAEStqJ3LHpXqXQLjN3J/gr7dODTEG43gfQFOtDFd6YYREMkUNcZFha
8voBY1C1nUvfAd06RYHCrnyQdcbFfi+kUg==
-----END EC PRIVATE KEY-----
"""


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
async def test_calls_with_a_token_of_the_file_are_accepted(tokens: str, token: str) -> None:
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
async def test_calls_without_a_valid_token_are_refused(tokens: str, metadata: Any, message: str) -> None:
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


async def test_calls_without_a_token_are_refused_before_a_message_is_read(tokens: str) -> None:
    """Callers that keep their message to themselves have their answer all the same."""
    async with serving(token_file=tokens) as rig:
        for method in ("Extract", "GetModel"):
            call = rig.channel.stream_unary(f"/{SERVICE}/{method}")()
            assert await call.code() == grpc.StatusCode.UNAUTHENTICATED
            assert rig.count("dinov3_requests_total", method, "UNAUTHENTICATED") == 1
        for name in (f"/{SERVICE}/ExtractStream", "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"):
            stream = rig.channel.stream_stream(name)()
            assert await stream.code() == grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize(("content", "message"), [(b" \n\n", "is empty"), ("pässword".encode(), "ASCII")])
async def test_an_invalid_token_file_is_a_config_error(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"token_file .*{message}"):
        FrontendServer(FakeEngine(), Settings(token_file=str(path)), Metrics(), 0, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("missing", ["token_file", "tls_cert_file", "tls_key_file", "tls_client_ca_file"])
async def test_a_file_that_cannot_be_read_is_a_config_error(tmp_path: Path, missing: str) -> None:
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
async def test_invalid_tls_files_are_config_errors(tmp_path: Path, files: dict[str, str], message: str) -> None:
    (tmp_path / "garbage").write_text("garbage")
    (tmp_path / "other.key").write_text(OTHER_KEY)
    good = {
        "tls_cert_file": str(CERTIFICATES / "localhost.pem"),
        "tls_key_file": str(CERTIFICATES / "localhost.key"),
    }
    given = good | {setting: str(tmp_path / name) for setting, name in files.items()}
    with pytest.raises(ConfigError, match=message):
        FrontendServer(FakeEngine(), Settings(**given), Metrics(), 0, 1)  # type: ignore[arg-type]
