"""The gRPC server of a frontend process: its services, interceptors, transport settings and shutdown."""

from __future__ import annotations

import asyncio
import logging
import resource
from collections.abc import Callable
from contextlib import suppress

import grpc

from dinov3_server.api.access_log import AccessLog
from dinov3_server.api.budget import ByteBudget
from dinov3_server.api.credentials import Credentials
from dinov3_server.api.decode_pool import DecodePool
from dinov3_server.api.extraction import Extraction
from dinov3_server.api.health import HEALTH, Health
from dinov3_server.api.interceptors import SERVICE, CallInterceptor
from dinov3_server.api.monitor import FrontendMonitor
from dinov3_server.api.peers import OpenCalls
from dinov3_server.api.receiving import Receiver
from dinov3_server.api.reflection import reflection_handlers
from dinov3_server.api.servicer import FeatureService
from dinov3_server.api.tracing import configure
from dinov3_server.config.settings import Settings
from dinov3_server.engine.engine import Engine
from dinov3_server.errors import StartupError
from dinov3_server.host import available_threads
from dinov3_server.metrics import Metrics

# Pings detect a client that vanished (a pulled cable, a dropped NAT entry); its calls are cancelled.
_KEEPALIVE_SECONDS = 60
_KEEPALIVE_TIMEOUT_SECONDS = 20
# Clients may ping this often, even without a call; gRPC's default of 5 minutes disconnects most clients that ping.
_CLIENT_PING_SECONDS = 5
# Connections of a frontend, and the descriptors that they leave to it: channels to workers, decode processes, files.
MOST_CONNECTIONS = 4096
_OWN_DESCRIPTORS = 256
# Calls that gRPC queues for the handlers. By default it ends some above 1,000 and all above 3,000, as CANCELLED: they
# are not counted, and the caller does not learn why. Below this limit admission answers. Calls that are reset at once
# are queued too, with up to 60 KB each.
_MOST_PENDING_CALLS = 4096
# How long a call may be queued there. After gRPC's default of 30 s it is CANCELLED too; the caller's deadline suffices.
_PENDING_SECONDS = 3600
# Open calls of a frontend, which take some 20 KB each. Twice max_queue_images if that is more: requests that wait for
# the device are only a part of all calls.
_MOST_CALLS = 8192
# The bit of "identity". gRPC unpacks a message before it calls an interceptor: 130 KB become 128 MiB.
_NO_COMPRESSION = 1
# Interval of checks whether the token and TLS files have changed.
RELOAD_SECONDS = 5.0

log = logging.getLogger(__name__)


class FrontendServer:
    """A gRPC server over an engine. Create it in the event loop; call `start`, `health.set_serving`, then `drain`."""

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        metrics: Metrics,
        index: int,
        frontends: int,
        allocated: Callable[[], int] | None = None,
    ) -> None:
        """`allocated` is passed to FrontendMonitor.

        Raises ConfigError for a token or TLS file that cannot be read or is invalid, and StartupError for an access log
        or a trace exporter that cannot be made.
        """
        threads = settings.decode_threads or max(1, available_threads() // frontends)
        self.credentials = Credentials(settings, metrics)
        self._reload = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._metrics = metrics
        self.budget = ByteBudget(settings.frontend_bytes, settings.max_message_bytes)
        receiver = self.receiver = Receiver(self.budget, 2 * settings.max_message_bytes)
        self._decode_pool = DecodePool(threads, self.budget.pictures, metrics)
        extraction = Extraction(engine, settings, metrics, self._decode_pool, index)
        tokens = self.credentials.tokens
        access_log = self._access_log = AccessLog(settings.access_log) if settings.access_log else None
        tracing = self._tracing = configure()
        self.service = FeatureService(
            engine, extraction, receiver, settings, metrics, tokens, access_log, tracing, index, frontends
        )
        open_calls = OpenCalls(max(_MOST_CALLS, 2 * settings.max_queue_images))
        self._monitor = FrontendMonitor(receiver, open_calls, self.budget, metrics, allocated)
        self.health = Health()
        self.calls = CallInterceptor(metrics, receiver, tokens, open_calls, access_log, tracing)
        self._server = grpc.aio.server(interceptors=[self.calls], options=_options(settings))
        self._server.add_generic_rpc_handlers(
            (self.service.handlers(), self.health.handlers(), *reflection_handlers((SERVICE, HEALTH)))
        )

    async def start(self, host: str, port: int) -> int:
        """Listen, and return the port; other frontends may listen on the same one. `port` 0 takes a free one.

        Raises StartupError if the address cannot be used.
        """
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            credentials = self.credentials.server_credentials()
            if credentials is None:
                bound = self._server.add_insecure_port(address)
            else:
                bound = self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise StartupError(f"cannot listen on {address} (host, port): {error}") from None
        await self._server.start()
        self._tasks = [asyncio.create_task(self._keep_reloading()), asyncio.create_task(self._monitor.run())]
        return bound

    def update_gauges(self) -> None:
        """Set the gauges of memory and of the certificate."""
        self.budget.update_gauges(self._metrics)
        self.credentials.update_gauges()

    def reload(self) -> None:
        """Read the token and TLS files again soon, even if they have not changed."""
        self._reload.set()

    async def drain(self, grace: float) -> None:
        """Refuse new calls, give active ones `grace` seconds to finish, and cancel the rest.

        Returns when no call and no decode thread is left.
        """
        self.health.close()
        self.service.refuse_calls()
        await self._server.stop(grace)
        await self.calls.wait_idle()
        for task in self._tasks:
            task.cancel()
        self._decode_pool.close()
        if self._access_log is not None:
            self._access_log.close()
        if self._tracing is not None:
            self._tracing.close()

    async def _keep_reloading(self) -> None:
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._reload.wait(), RELOAD_SECONDS)
            forced = self._reload.is_set()
            self._reload.clear()
            try:
                # In a thread: the files may be on a network disk.
                await asyncio.to_thread(self.credentials.reload, forced)
            except Exception:
                log.exception("cannot reload the token and TLS files")


def most_connections() -> int:
    """Return how many connections are accepted at a time; more are closed at once."""
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if descriptors == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    return max(1, min(MOST_CONNECTIONS, descriptors - _OWN_DESCRIPTORS))


def _options(settings: Settings) -> list[tuple[str, int]]:
    options = [
        ("grpc.so_reuseport", 1),
        ("grpc.max_allowed_incoming_connections", most_connections()),
        ("grpc.server.max_pending_requests", _MOST_PENDING_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", _MOST_PENDING_CALLS),
        ("grpc.server_max_unrequested_time_in_server", _PENDING_SECONDS),
        ("grpc.compression_enabled_algorithms_bitset", _NO_COMPRESSION),
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", settings.max_message_bytes),
        ("grpc.keepalive_time_ms", _KEEPALIVE_SECONDS * 1000),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_SECONDS * 1000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", _CLIENT_PING_SECONDS * 1000),
    ]
    if settings.max_connection_age_seconds:
        # Without a grace period, active calls finish however long they take.
        options.append(("grpc.max_connection_age_ms", round(settings.max_connection_age_seconds * 1000)))
    return options
