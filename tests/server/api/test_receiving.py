"""Receiver ends pending reads when gRPC holds too much of incomplete messages, slow senders first."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from dinov3_server.api import monitor as monitor_module
from dinov3_server.api import receiving
from dinov3_server.api.budget import ByteBudget
from dinov3_server.api.monitor import OWN_BYTES, FrontendMonitor
from dinov3_server.api.peers import OpenCalls
from dinov3_server.api.receiving import Receiver
from dinov3_server.errors import Overloaded
from dinov3_server.metrics import Metrics
from tests.server.api.rig import REQUEST, serving
from tests.support.waiting import until_async

SERVICE = "dinov3_serving.v1.FeatureService"


class Context:
    """The context of a call whose message never arrives."""

    def __init__(self, peer: str) -> None:
        self._peer = peer

    def peer(self) -> str:
        return self._peer

    async def read(self) -> bytes:
        await asyncio.get_running_loop().create_future()
        raise AssertionError


async def reading(receiver: Receiver, peer: str, rank: int) -> asyncio.Task[Any]:
    task = asyncio.create_task(receiver.read(Context(peer), None, rank))
    await asyncio.sleep(0)
    return task


def make() -> Receiver:
    return Receiver(ByteBudget(64 << 20, 16 << 20), limit=1000)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        ("stream_unary", f"/{SERVICE}/Extract"),
        ("stream_unary", f"/{SERVICE}/GetModel"),
        ("stream_stream", f"/{SERVICE}/ExtractStream"),
        ("stream_unary", "/grpc.health.v1.Health/Check"),
        ("stream_stream", "/grpc.health.v1.Health/Watch"),
        ("stream_stream", "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"),
    ],
)
async def test_a_pending_read_is_ended_over_the_limit(call: str, name: str) -> None:
    async with serving() as rig:
        receiver = rig.server.receiver
        held_open = getattr(rig.channel, call)(name)()
        await until_async(lambda: receiver.pending)
        receiver.end_slow_reads(receiver.limit)
        await rig.stub.Extract(REQUEST)
        assert receiver.pending  # at the limit nothing is ended
        receiver.end_slow_reads(receiver.limit + 1)
        assert await held_open.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "came slowly" in await held_open.details()
        assert not receiver.pending
        await rig.stub.Extract(REQUEST)


async def test_reads_are_ended_by_slowness_then_rank_then_reads_of_the_caller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    receiver = make()
    slow = await reading(receiver, "ipv4:10.0.0.1:1", 0)
    [first] = receiver.pending
    first.since -= 100
    monkeypatch.setattr(receiving, "SLOW_SENDER_SECONDS", 50.0)
    one = await reading(receiver, "ipv4:10.0.0.2:1", 0)
    several = [await reading(receiver, f"ipv4:10.0.0.3:{port}", 0) for port in (1, 2, 3)]
    stream = await reading(receiver, "ipv4:10.0.0.2:1", 1)
    health = await reading(receiver, "ipv4:10.0.0.4:1", 2)
    order = [read.task for read in receiver.by_priority()]
    assert order == [slow, health, stream, *several, one]

    for expected in (1, 3, 7):  # twice as many each time
        receiver.end_slow_reads(1001)
        await asyncio.wait(order[:expected])
        assert [task.done() for task in order] == [True] * expected + [False] * (len(order) - expected)
    for task in order:
        with pytest.raises(Overloaded, match="came slowly"):
            await task


async def test_a_cancelled_read_is_not_reported_as_slow() -> None:
    receiver = make()
    task = await reading(receiver, "ipv4:10.0.0.1:1", 0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not receiver.pending


async def test_grpc_holds_what_is_allocated_and_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    allocated = 1 << 40  # at the start
    budget = ByteBudget(64 << 20, 16 << 20)
    receiver, held = Receiver(budget, limit=1000), list[int]()
    monkeypatch.setattr(receiver, "end_slow_reads", held.append)
    monitor = FrontendMonitor(receiver, OpenCalls(1), budget, Metrics(), lambda: allocated)
    message, answer = budget.messages.try_acquire(100), budget.answers.try_acquire(10)
    assert message is not None
    assert answer is not None
    allocated += OWN_BYTES + 5110
    running = asyncio.create_task(monitor.run())
    await until_async(lambda: held)
    running.cancel()
    assert held[0] == 5000


@pytest.mark.parametrize(("decoding", "trims"), [(0, False), (20 << 20, True)])
async def test_freed_memory_is_returned_before_the_frontend_exceeds_its_limit(
    monkeypatch: pytest.MonkeyPatch, decoding: int, trims: bool
) -> None:
    """What malloc keeps, and pictures in decode processes, count against the limit of a container too."""
    budget = ByteBudget(64 << 20, 16 << 20)
    receiver, trimmed = Receiver(budget, limit=1000), list[bool]()
    held = OWN_BYTES + receiver.limit + budget.nbytes - (10 << 20)
    monkeypatch.setattr(monitor_module, "anonymous_bytes", lambda: held)
    monkeypatch.setattr(monitor_module.Trimmer, "trim", lambda trimmer: trimmed.append(True))
    monkeypatch.setattr(monitor_module.Trimmer, "look", lambda trimmer, allocated: None)
    ended = list[int]()
    monkeypatch.setattr(receiver, "end_slow_reads", ended.append)
    monitor = FrontendMonitor(receiver, OpenCalls(1), budget, Metrics(), lambda: 0)
    assert not decoding or budget.pictures.try_acquire(decoding) is not None
    running = asyncio.create_task(monitor.run())
    await until_async(lambda: ended)
    running.cancel()
    assert bool(trimmed) is trims
