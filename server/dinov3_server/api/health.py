"""grpc.health.v1, for the whole server ("") and for FeatureService: both are serving, or neither is.

grpcio-health-checking brings a servicer too; its Watch never ends, so one watching client would hold every drain up
until the grace is over.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dinov3_server.api.interceptors import SERVICE

_Response = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # the package has no types
    """Not serving until `set_serving(True)`; after `close` never again."""

    def __init__(self) -> None:
        self._serving = False
        self._closed = False
        self._changed = asyncio.Event()  # replaced by a new one at each change

    def set_serving(self, serving: bool) -> None:
        if serving != self._serving and not self._closed:
            self._serving = serving
            self._tell()

    def close(self) -> None:
        """Not serving; watchers are told so and their calls end."""
        self._serving = False
        self._closed = True
        self._tell()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> health_pb2.HealthCheckResponse:
        status = self._status(request.service)
        if status == _Response.SERVICE_UNKNOWN:
            await context.abort(
                grpc.StatusCode.NOT_FOUND,
                f"there is no service {request.service[:100]!r}; known are '' and {SERVICE!r}",
            )
        return _Response(status=status)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        told = None
        while True:
            changed, status, closed = self._changed, self._status(request.service), self._closed
            if status != told:
                await context.write(_Response(status=status))
                told = status
            if closed:
                return
            await changed.wait()

    def _status(self, service: str) -> int:
        if service not in ("", SERVICE):
            return int(_Response.SERVICE_UNKNOWN)
        return int(_Response.SERVING if self._serving else _Response.NOT_SERVING)

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
