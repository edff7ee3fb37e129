"""A fake worker for an engine: tests send its messages one by one."""

from __future__ import annotations

import asyncio
import os
from typing import Any, ClassVar

from dinov3_server.engine.admission import Reservation
from dinov3_server.engine.block import Block
from dinov3_server.engine.channel import Channel, pair
from dinov3_server.engine.engine import Engine
from dinov3_server.engine.forecast import Demand
from dinov3_server.engine.messages import (
    NO_LOAD,
    Attach,
    Hello,
    JobResult,
    JobRows,
    Results,
    Started,
    Submit,
)
from dinov3_server.engine.shares import ANONYMOUS, Caller
from dinov3_server.engine.worker_connection import BlockResult
from dinov3_server.models.interface import FeatureSpec, Output, PixelShape
from tests.support.numpy_runner import NumpyRunner
from tests.support.waiting import until_async

SHAPE = PixelShape(32, 32, "uint8")
SPEC = FeatureSpec((Output("cls"), Output("patches")), "float32")
INFO = NumpyRunner("cpu").info


class FakeWorker:
    """The worker's end of a channel, whose messages the test sends and receives."""

    instances: ClassVar[list[FakeWorker]] = []  # closed by the engine fixture

    def __init__(self, engine: Engine, index: int = 0) -> None:
        ours, theirs = pair()
        self.engine, self.index = engine, index
        self.channel = Channel(theirs)
        self.received: list[Any] = []
        self.instances.append(self)
        engine.connect(index, ours.detach())

    async def hello(self) -> FakeWorker:
        before = len(self.engine.devices)
        self.send(Hello(INFO))
        await until_async(lambda: len(self.engine.devices) > before)
        return self

    def send(self, message: object) -> None:
        self.channel.send(message)
        self.channel.flush()

    async def receive(self, kind: type) -> Any:
        """Return the next message, which must be of type `kind`."""

        def arrived() -> bool:
            for message, fds in self.channel.receive():
                assert len(fds) == isinstance(message, Attach)
                if fds:
                    os.close(fds[0])
                else:
                    self.received.append(message)
            return bool(self.received)

        await until_async(arrived, f"a {kind.__name__}")
        message = self.received.pop(0)
        assert isinstance(message, kind)
        return message

    def start(self, submit: Submit, *rows: int) -> None:
        self.send(Started((JobRows(submit.job, rows or submit.rows),)))

    def finish(self, submit: Submit, *rows: int, failed: dict[int, str] | None = None, images: int = 1) -> None:
        self.send(
            Results((JobResult(submit.job, rows or submit.rows, failed or {}, 0.5, 0.25, images),), NO_LOAD, None)
        )

    def die(self) -> None:
        self.channel.close()

    def reaped(self, restart_seconds: float = 0.0, killed: bool = False) -> None:
        self.engine.worker_gone(self.index, restart_seconds, killed)


def demand(images: int, nbytes: int = 1, caller: Caller = ANONYMOUS, bulk: bool = False) -> Demand:
    return Demand(images, nbytes, images * INFO.tokens(SHAPE), caller, bulk)


def reserve(engine: Engine, images: int) -> tuple[Reservation, Block]:
    reservation = engine.reserve(demand(images, Block.plan(INFO, SHAPE, images, SPEC).end), None)
    return reservation, Block.plan(INFO, SHAPE, images, SPEC, reservation.offset)


def run(
    engine: Engine, images: int, deadline: float | None = None, bulk: bool = False
) -> tuple[Reservation, asyncio.Task[BlockResult]]:
    reservation, block = reserve(engine, images)
    return reservation, asyncio.create_task(engine.run(reservation, block, range(images), deadline, bulk))
