"""Run a frontend process: a gRPC server on the shared port, an engine, and a control channel to the supervisor."""

from __future__ import annotations

import asyncio
import logging
import os
import traceback
from typing import Any

from dinov3_server.api.server import FrontendServer
from dinov3_server.engine.arena import Arena
from dinov3_server.engine.channel import Channel, ChannelClosed
from dinov3_server.engine.engine import Engine
from dinov3_server.engine.messages import (
    SNAPSHOT_SECONDS,
    Connected,
    Drain,
    MetricsSnapshot,
    NotConnected,
    Ready,
    Reload,
    StartFrontend,
    WorkerGone,
)
from dinov3_server.malloc import allocated_bytes, keep_freed_memory
from dinov3_server.metrics import Metrics

log = logging.getLogger(__name__)


def serve(start: StartFrontend, control: Channel) -> None:
    """Serve until the supervisor asks to drain, or is gone."""
    keep_freed_memory()
    asyncio.run(_serve(start, control))


async def _serve(start: StartFrontend, control: Channel) -> None:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_exit_on_own_error)
    logging.getLogger("grpc._cython.cygrpc").addFilter(_not_client_disconnect)
    metrics = Metrics()
    arena = Arena(start.settings.arena_bytes)
    engine = Engine(arena, start.settings, metrics, start.frontends)
    server = FrontendServer(engine, start.settings, metrics, start.index, start.frontends, allocated_bytes)
    drain: asyncio.Future[float] = loop.create_future()

    def read_control() -> None:
        try:
            for message, fds in control.receive():
                match message:
                    case Connected(index):
                        try:
                            engine.connect(index, fds[0])
                        except OSError as error:  # callers may hold all descriptors of this process
                            log.error("worker %d cannot be connected yet: %s", index, error.strerror)
                            send(NotConnected(index))
                    case WorkerGone(index, restart_seconds, killed):
                        engine.worker_gone(index, restart_seconds, killed)
                    case Reload():
                        server.reload()
                    case Drain(grace):
                        if not drain.done():
                            drain.set_result(grace)
        except ChannelClosed:
            loop.remove_reader(control.fileno())
            if not drain.done():
                drain.set_result(0.0)

    def send(message: object) -> None:
        control.send(message)
        if not control.flush():
            loop.add_writer(control.fileno(), flush)

    def flush() -> None:
        if control.flush():
            loop.remove_writer(control.fileno())

    def on_model() -> None:
        engine.on_model = lambda: None  # only the first worker: later, calls queue while workers restart
        server.health.set_serving(not drain.done())
        send(Ready())

    async def report() -> None:
        while True:
            if control.flush():  # do not pile messages up if the supervisor does not read
                server.update_gauges()
                engine.update_gauges()
                send(MetricsSnapshot(metrics.snapshot()))
            await asyncio.sleep(SNAPSHOT_SECONDS)

    engine.on_model = on_model
    await server.start(start.host, start.port)
    loop.add_reader(control.fileno(), read_control)
    reporting = loop.create_task(report())
    await server.drain(await drain)
    reporting.cancel()
    control.send(MetricsSnapshot(metrics.snapshot()))
    loop.remove_writer(control.fileno())
    control.flush_within(1.0)
    loop.remove_reader(control.fileno())
    engine.close()


def _exit_on_own_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Exit if a callback of this package failed; the supervisor starts a new frontend.

    asyncio would log the error and go on. A message from a worker or the supervisor would be lost, and requests would
    wait for ever.
    """
    error = context.get("exception")
    if "handle" in context and error is not None and _is_own(error):
        log.critical("this frontend exits after an unexpected error and is replaced", exc_info=error)
        os._exit(1)
    loop.default_exception_handler(context)


def _is_own(error: BaseException) -> bool:
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__", "").startswith("dinov3_server.") for frame, _ in frames)


def _not_client_disconnect(record: logging.LogRecord) -> bool:
    """Return False for the traceback that gRPC logs when a caller is gone before its answer is sent."""
    return not record.exc_info or getattr(record.exc_info[0], "__name__", "") != "ExecuteBatchError"
