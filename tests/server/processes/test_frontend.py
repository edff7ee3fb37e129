"""The event loop of a frontend, run in this process; the test takes the supervisor's part."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio

from dinov3_server.api import frontend
from dinov3_server.config.settings import Settings
from dinov3_server.engine.channel import Channel, pair
from dinov3_server.engine.messages import Connected, Drain, MetricsSnapshot, StartFrontend
from tests.support.waiting import until_async


@pytest_asyncio.fixture
async def control(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Channel]:
    monkeypatch.setattr(frontend, "SNAPSHOT_SECONDS", 0.01)
    ours, theirs = (Channel(end) for end in pair())
    settings = Settings(arena_bytes=2**20)
    serving = asyncio.create_task(frontend._serve(StartFrontend(settings, 0, 1, "127.0.0.1", 0), theirs))
    yield ours
    ours.send(Drain(0.0))
    ours.flush()
    await serving
    ours.close()
    theirs.close()


async def test_a_frontend_sends_snapshots_even_when_idle(control: Channel) -> None:
    received: list[Any] = []

    def listen() -> int:
        received.extend(message for message, _ in control.receive())
        return len(received)

    await until_async(lambda: listen() >= 5)
    assert all(isinstance(message, MetricsSnapshot) for message in received)


async def test_an_error_in_a_callback_ends_the_frontend(control: Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    """asyncio would only log it; the message would be lost, and requests would wait for ever."""
    exits: list[int] = []
    monkeypatch.setattr(frontend.os, "_exit", exits.append)
    control.send(Connected(0))  # without its descriptor
    control.flush()
    await until_async(lambda: exits == [1])


async def test_an_error_in_the_callback_of_a_library_does_not_end_it(
    control: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frontend.os, "_exit", pytest.fail)
    asyncio.get_running_loop().call_soon(int, "no number")
    await asyncio.sleep(0)


async def test_disconnected_clients_are_not_logged_as_errors(
    control: Channel, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("grpc._cython.cygrpc")
    await until_async(lambda: control.receive())  # it is running
    for error in (grpc._cython.cygrpc.ExecuteBatchError("the peer is gone", "", ""), ValueError("ours")):
        logger.error("%s raised", type(error).__name__, exc_info=error)
    assert [record.getMessage() for record in caplog.records] == ["ValueError raised"]
