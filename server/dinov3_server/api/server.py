"""The gRPC server of one frontend process: services, interceptors, transport settings, and how it ends."""

from __future__ import annotations

import ssl
from pathlib import Path

import grpc

from dinov3_server import __version__
from dinov3_server.api.budget import ByteBudget
from dinov3_server.api.extraction import Extraction
from dinov3_server.api.health import HEALTH, Health
from dinov3_server.api.interceptors import SERVICE, Auth, Calls
from dinov3_server.api.reflection import Reflection
from dinov3_server.api.servicer import FeatureService
from dinov3_server.backbone.cpu import available_threads
from dinov3_server.config import Settings
from dinov3_server.engine.client import Engine
from dinov3_server.errors import ConfigError, StartupError
from dinov3_server.metrics import Metrics

# Pings find a client that vanished without a word (a pulled cable, a dropped NAT entry); its calls are cancelled.
_KEEPALIVE_SECONDS = 60
_KEEPALIVE_TIMEOUT_SECONDS = 20
# Clients may ping as often as this, also without a call; gRPC's own limit of 5 minutes cuts off most who do.
_CLIENT_PING_SECONDS = 5


class FrontendServer:
    """To be made in the running event loop. `start`, `set_serving` as the engine comes and goes, `drain` at the end."""

    def __init__(self, engine: Engine, settings: Settings, metrics: Metrics, index: int, frontends: int) -> None:
        """Raises ConfigError for a file that the settings name and that is of no use."""
        threads = settings.decode_threads or max(1, available_threads() // frontends)
        self._credentials = _credentials(settings)
        self._metrics = metrics
        self.budget = ByteBudget(settings.frontend_bytes, settings.max_message_bytes)
        self._extraction = Extraction(engine, settings, metrics, index, threads, self.budget)
        self._service = FeatureService(engine, self._extraction, settings, metrics, index, frontends, __version__)
        self._health = Health()
        self._calls = Calls(metrics)
        interceptors: list[grpc.aio.ServerInterceptor] = [self._calls]
        if settings.token_file is not None:
            interceptors.insert(0, Auth(_tokens(settings.token_file), metrics))
        self._server = grpc.aio.server(interceptors=interceptors, options=_options(settings))
        self._server.add_generic_rpc_handlers(
            (self._service.handlers(), self._health.handlers(), *Reflection((SERVICE, HEALTH)).handlers())
        )

    async def start(self, host: str, port: int) -> int:
        """Listen, beside other frontends on the same port. Returns the port (`port` 0 takes a free one).

        Raises StartupError where the address cannot be had.
        """
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if self._credentials is None:
                bound = self._server.add_insecure_port(address)
            else:
                bound = self._server.add_secure_port(address, self._credentials)
        except RuntimeError as error:
            raise StartupError(f"cannot listen on {address} (host, port): {error}") from None
        await self._server.start()
        return bound

    def set_serving(self, serving: bool) -> None:
        """What health says."""
        self._health.set_serving(serving)

    def show(self) -> None:
        """Set the gauges that are read once a second."""
        self.budget.show(self._metrics)

    async def drain(self, grace: float) -> None:
        """Refuse what is new, let what is in flight finish for `grace` seconds, cancel the rest.

        When it returns, no call and no thread of ours is left.
        """
        self._health.close()
        self._service.drain()
        await self._server.stop(grace)
        await self._calls.idle()
        self._extraction.close()


def _options(settings: Settings) -> list[tuple[str, int]]:
    options = [
        ("grpc.so_reuseport", 1),
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", settings.max_message_bytes),
        ("grpc.keepalive_time_ms", _KEEPALIVE_SECONDS * 1000),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_SECONDS * 1000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", _CLIENT_PING_SECONDS * 1000),
    ]
    if settings.max_connection_age_seconds:
        # No grace is set: calls in flight finish, however long they are.
        options.append(("grpc.max_connection_age_ms", round(settings.max_connection_age_seconds * 1000)))
    return options


def _credentials(settings: Settings) -> grpc.ServerCredentials | None:
    if settings.tls_cert_file is None or settings.tls_key_file is None:
        return None
    certificate = _read(settings.tls_cert_file, "tls_cert_file")
    key = _read(settings.tls_key_file, "tls_key_file")
    authorities = None
    if settings.tls_client_ca_file is not None:
        authorities = _read(settings.tls_client_ca_file, "tls_client_ca_file")
    _check_pem(settings.tls_cert_file, settings.tls_key_file, authorities, settings.tls_client_ca_file)
    return grpc.ssl_server_credentials([(key, certificate)], authorities, require_client_auth=authorities is not None)


def _check_pem(certificate: str, key: str, authorities: bytes | None, authorities_path: str | None) -> None:
    """gRPC says of files that are of no use only that it cannot listen."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key, password="")  # or a key with a passphrase would ask the terminal
    except ssl.SSLError as error:
        raise ConfigError(
            f"tls_cert_file {certificate} and tls_key_file {key} are no PEM certificate with its private key "
            f"(without passphrase): {error.reason or error}"
        ) from None
    try:
        if authorities is not None:
            context.load_verify_locations(cadata=authorities.decode("ascii"))
    except (ssl.SSLError, ValueError):
        raise ConfigError(f"tls_client_ca_file {authorities_path} holds no certificate in PEM") from None


def _tokens(path: str) -> list[str]:
    try:
        tokens = _read(path, "token_file").decode("ascii").split()
    except UnicodeDecodeError:
        raise ConfigError(f"token_file {path} holds other characters than ASCII, which no client can send") from None
    if not tokens:
        raise ConfigError(f"token_file {path} is empty: it must hold a token, or several, one a line")
    return tokens


def _read(path: str, setting: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {setting} {path}: {error.strerror}") from None
