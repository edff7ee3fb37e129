"""Serve grpc.health.v1, for the whole server ("") and for FeatureService, which always have the same status.

The servicer of grpcio-health-checking is not used: its Watch never ends, so one watching client would delay every
shutdown until the grace period is over.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from dinov3_server.api.interceptors import SERVICE
from dinov3_server.api.wire import parse

HEALTH = "grpc.health.v1.Health"
_SERVICES = ("", SERVICE)
_Response = health_pb2.HealthCheckResponse


class Health:
    """The health service. Its status is NOT_SERVING until `set_serving(True)`, and for ever after `close`."""

    def __init__(self) -> None:
        self._serving = False
        self._closed = False
        self._changed = asyncio.Event()  # a new one after each change

    def handlers(self) -> grpc.GenericRpcHandler:
        methods: dict[str, Any] = {
            "Check": grpc.unary_unary_rpc_method_handler(self._check, response_serializer=_serialize),
            "Watch": grpc.unary_stream_rpc_method_handler(self._watch, response_serializer=_serialize),
        }
        if hasattr(health_pb2, "HealthListRequest"):  # older packages do not have List
            methods["List"] = grpc.unary_unary_rpc_method_handler(self._list, response_serializer=_serialize)
        return grpc.method_handlers_generic_handler(HEALTH, methods)

    def set_serving(self, serving: bool) -> None:
        if serving != self._serving and not self._closed:
            self._serving = serving
            self._notify()

    def close(self) -> None:
        """Set NOT_SERVING for ever, send it to watchers, and end their calls."""
        self._serving = False
        self._closed = True
        self._notify()

    async def _check(self, data: bytes, context: Any) -> Any:
        request: Any = parse(health_pb2.HealthCheckRequest, data, 0).message
        status = self._status(request.service)
        if status == _Response.SERVICE_UNKNOWN:
            await context.abort(
                grpc.StatusCode.NOT_FOUND,
                f"there is no service {request.service[:100]!r}; allowed are '' and {SERVICE!r}",
            )
        return _Response(status=status)

    async def _list(self, data: bytes, context: Any) -> Any:
        parse(health_pb2.HealthListRequest, data, 0)
        return health_pb2.HealthListResponse(
            statuses={service: _Response(status=self._status(service)) for service in _SERVICES}
        )

    async def _watch(self, data: bytes, context: Any) -> None:
        request: Any = parse(health_pb2.HealthCheckRequest, data, 0).message
        sent = None
        while True:
            changed, status, closed = self._changed, self._status(request.service), self._closed
            if status != sent:
                await context.write(_Response(status=status))
                sent = status
            if closed:
                return
            await changed.wait()

    def _status(self, service: str) -> int:
        if service not in _SERVICES:
            return int(_Response.SERVICE_UNKNOWN)
        return int(_Response.SERVING if self._serving else _Response.NOT_SERVING)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _serialize(message: Any) -> bytes:
    return message.SerializeToString()  # type: ignore[no-any-return]
