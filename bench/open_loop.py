"""A load generator of raw gRPC calls in one asyncio process: closed loops, and open loops at Poisson times.

A closed loop keeps a number of requests in flight. An open loop sends at a rate, whatever becomes of its requests.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import grpc
import psutil

from bench.echo import METHOD
from bench.load import whole_batches

CONNECTIONS = 4
IN_FLIGHT = 64  # of a closed loop


class Usage(NamedTuple):
    """What was used from one moment to another: wall time, CPU times, and how many requests were answered in it."""

    seconds: float
    generator: float  # CPU seconds of this process
    frontends: float  # CPU seconds
    answered: int

    def since(self, before: Usage) -> Usage:
        return Usage(
            self.seconds - before.seconds,
            self.generator - before.generator,
            self.frontends - before.frontends,
            self.answered - before.answered,
        )


@dataclass(frozen=True)
class Sent:
    """The requests that an open loop sent in its measured time, counted by status, and the usage in that time."""

    seconds: float
    codes: Counter[grpc.StatusCode]
    usage: Usage

    @property
    def offered(self) -> int:
        return self.codes.total()


class Generator:
    """Send `requests` in turn over several connections, without retries.

    `frontend_cpu` returns the CPU seconds that the server's frontends have used so far.
    """

    def __init__(self, address: str, requests: Sequence[bytes], frontend_cpu: Callable[[], float]) -> None:
        options = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1))
        self._channels = [grpc.aio.insecure_channel(address, options=options) for _ in range(CONNECTIONS)]
        self._calls: list[Any] = [channel.unary_unary(METHOD) for channel in self._channels]
        self._requests = requests
        self._frontend_cpu = frontend_cpu
        self._sent = 0
        self._answered = 0

    async def closed(self, seconds: float, warm_up: float) -> tuple[float, Usage]:
        """Run a closed loop of IN_FLIGHT requests without deadlines. Return the answers a second, and the usage of the
        measured `seconds`, which follow `warm_up` seconds."""
        ends: list[float] = []
        over = False

        async def caller() -> None:
            while not over:
                code = await self._call(None)
                assert code is grpc.StatusCode.OK, code
                ends.append(time.perf_counter())

        callers = [asyncio.create_task(caller()) for _ in range(IN_FLIGHT)]
        await asyncio.sleep(warm_up)
        ends.clear()
        before = self._usage()
        await asyncio.sleep(seconds)
        usage, measured = self._usage().since(before), list(ends)
        over = True
        await asyncio.gather(*callers)
        first, last = whole_batches(measured)
        return (last - first) / (measured[last] - measured[first]), usage

    async def open(self, rate: float, deadline: float, seconds: float, seed: int) -> Sent:
        """Send `rate` requests a second for `deadline` seconds as a warm-up, then for the measured `seconds`, and wait
        for all of them."""
        chance, running = random.Random(seed), set[asyncio.Task[None]]()
        begun = time.perf_counter()
        at = chance.expovariate(rate)

        async def one(codes: Counter[grpc.StatusCode]) -> None:
            codes[await self._call(deadline)] += 1

        async def send(until: float) -> Counter[grpc.StatusCode]:
            nonlocal at
            codes: Counter[grpc.StatusCode] = Counter()
            while at < until:
                await asyncio.sleep(max(0.0, begun + at - time.perf_counter()))
                task = asyncio.create_task(one(codes))
                running.add(task)
                task.add_done_callback(running.discard)
                at += chance.expovariate(rate)
            return codes

        await send(deadline)
        before = self._usage()
        codes = await send(deadline + seconds)
        usage = self._usage().since(before)  # not that of the last requests' end: nothing is sent then
        await asyncio.gather(*running)
        return Sent(seconds, codes, usage)

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()

    async def _call(self, deadline: float | None) -> grpc.StatusCode:
        self._sent += 1
        call = self._calls[self._sent % CONNECTIONS](self._requests[self._sent % len(self._requests)], timeout=deadline)
        try:
            await call
        except grpc.aio.AioRpcError as error:
            return error.code()
        self._answered += 1
        return grpc.StatusCode.OK

    def _usage(self) -> Usage:
        cpu = sum(psutil.Process().cpu_times()[:2])
        return Usage(time.perf_counter(), cpu, self._frontend_cpu(), self._answered)
