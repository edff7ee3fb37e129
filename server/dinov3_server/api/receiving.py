"""Receive messages, and bound what gRPC holds of incomplete ones, over all calls and connections.

gRPC does not say how long a message is before all of it has arrived, and an idle stream always has a read pending. With
grants for the longest message only a handful of reads would fit the budget. So allocated memory is measured instead,
many times a second (api/monitor.py): what gRPC holds is the allocated memory less the process's own and less what the
byte budget counts. Over the limit, pending reads are ended, first those that look most like an upload that is held
open.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import grpc

from dinov3_server.api.budget import ByteBudget, RequestMemory
from dinov3_server.api.peers import peer_group
from dinov3_server.errors import InvalidInput, Overloaded

EOF: object = grpc.aio.EOF
# The message of a unary call follows its headers at once. If a read is pending for longer, the sender is slow.
SLOW_SENDER_SECONDS = 1.0
# Reads that are ended in one check, so that a check does not hold the event loop for long.
_MOST_AT_ONCE = 64


@dataclass(slots=True, eq=False)
class _PendingRead:
    context: Any
    rank: int
    since: float = field(default_factory=time.monotonic)
    task: asyncio.Task[Any] | None = field(default_factory=asyncio.current_task)
    ended: bool = False


@dataclass(eq=False)
class Receiver:
    """Reads messages for all calls. gRPC may hold `limit` bytes of messages without a grant."""

    budget: ByteBudget
    limit: int
    pending: set[_PendingRead] = field(default_factory=set)
    _reads_to_end: int = 1  # at the next check that is over the limit

    async def read(self, context: Any, deadline: float | None, rank: int = 0) -> tuple[bytes, RequestMemory] | None:
        """Return the next message and its memory; None if the caller has closed its side.

        Args:
            deadline: in seconds of time.monotonic(). For a unary call, None stands for the deadline of the call.
            rank: reads of a higher rank are ended first: 0 for unary calls, 1 for streams, 2 for calls without a token.

        Raises Overloaded if there was no memory in time, or the message came slowly while memory ran out.
        """
        read = _PendingRead(context, rank)
        self.pending.add(read)
        try:
            data = await context.read()
            if data is EOF:
                return None
            if deadline is None and rank == 0:
                deadline = deadline_of(context)
            return data, await self.budget.acquire_message(len(data), deadline)
        except asyncio.CancelledError:
            if not read.ended or (read.task is not None and read.task.uncancel()):
                raise
            raise Overloaded(
                "the server ran out of memory for messages that are being received, and this one came slowly "
                f"({time.monotonic() - read.since:.1f} s so far): try again, with smaller messages or fewer at once",
                reason="receiving",
                retry_after=1.0,
            ) from None
        finally:
            self.pending.discard(read)

    async def message(self, context: Any, rank: int = 0) -> tuple[bytes, RequestMemory]:
        """Return the message of a unary call and its memory. Raises as `read`, and InvalidInput without a message."""
        received = await self.read(context, None, rank)
        if received is None:
            raise InvalidInput("the call ended without a message: a unary call needs exactly one")
        return received

    def end_slow_reads(self, held: int) -> None:
        """End pending reads if gRPC holds `held` bytes, over the limit: twice as many at each call until it is not."""
        if held <= self.limit:
            self._reads_to_end = 1
            return
        for read in self.by_priority()[: self._reads_to_end]:
            assert read.task is not None
            read.ended = True
            read.task.cancel()
        self._reads_to_end = min(2 * self._reads_to_end, _MOST_AT_ONCE)

    def by_priority(self) -> list[_PendingRead]:
        """Return pending reads: slow senders first, then by rank, then callers with the most reads, then the oldest."""
        reads = [read for read in self.pending if not read.ended]
        callers = {read: peer_group(read.context.peer()) for read in reads}
        counts = Counter(callers.values())
        slow = time.monotonic() - SLOW_SENDER_SECONDS
        return sorted(reads, key=lambda read: (read.since > slow, -read.rank, -counts[callers[read]], read.since))


def deadline_of(context: Any) -> float | None:
    """Return the deadline of a call in seconds of time.monotonic(); None without one."""
    remaining = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining
