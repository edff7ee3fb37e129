"""The load generator of the data path, for a separate process: it sends the same bytes again and again.

A closed loop over one grpc.aio connection per channel, bytes in and out: it neither parses nor builds messages.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import grpc

from bench.echo import METHOD, OPTIONS
from dinov3_server.malloc import keep_freed_memory


@dataclass(frozen=True)
class Flood:
    """The result of a load: `requests` were answered in the measured `seconds`, in which the generator used
    `cpu_seconds`; `answered` also counts those before and after. `answer_nbytes` is the size of the last answer."""

    requests: int
    seconds: float
    answered: int
    answer_nbytes: int
    cpu_seconds: float


def flood(address: str, request: bytes, in_flight: int, seconds: float, warm_up: float, channels: int) -> Flood:
    """Keep `in_flight` requests to `address` in flight for `warm_up` seconds and then the measured `seconds`.

    They are spread evenly over `channels` connections. An error of a call is raised.
    """
    keep_freed_memory()  # otherwise its page faults would delay it more than either server does
    return asyncio.run(_flood(address, request, in_flight, seconds, warm_up, channels))


async def _flood(address: str, request: bytes, in_flight: int, seconds: float, warm_up: float, channels: int) -> Flood:
    requests = nbytes = 0
    over = False
    options = [*OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
    opened = [grpc.aio.insecure_channel(address, options=options) for _ in range(channels)]

    async def caller(channel: grpc.aio.Channel) -> None:
        nonlocal requests, nbytes
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(METHOD)
        while not over:
            nbytes = len(await call(request))
            requests += 1

    callers = [asyncio.create_task(caller(opened[i % channels])) for i in range(in_flight)]
    await asyncio.wait(callers, timeout=warm_up, return_when=asyncio.FIRST_EXCEPTION)
    before, began, cpu = requests, time.perf_counter(), time.process_time()
    await asyncio.wait(callers, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    measured, elapsed, cpu = requests - before, time.perf_counter() - began, time.process_time() - cpu
    over = True
    await asyncio.gather(*callers)
    for channel in opened:
        await channel.close()
    return Flood(measured, elapsed, requests, nbytes, cpu)
