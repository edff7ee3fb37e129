"""Messages on their way in: what gRPC holds of them is bounded, over all calls and connections.

The length of a message is not known before it is there, and an idle stream has a read pending for as long as it lives.
Grants for the longest message would allow a handful of reads. So the memory that the process has allocated is measured
instead, many times a second (api/monitor.py): gRPC holds the part that is neither the process's own nor counted in the
byte budget. Over the limit pending reads are ended, first those that look most like an upload that is held open.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any

import grpc

from dinov3_server.api.budget import ByteBudget, RequestMemory
from dinov3_server.errors import InvalidInput, Overloaded

EOF: object = grpc.aio.EOF
# A unary call has its message on the way when it arrives. A read that pends for longer has a slow sender.
_SLOW_SENDER_SECONDS = 1.0


class _PendingRead:
    """A read that is pending."""

    __slots__ = ("context", "ended", "rank", "since", "task")

    def __init__(self, context: Any, rank: int) -> None:
        self.context = context
        self.rank = rank
        self.since = time.monotonic()
        self.task = asyncio.current_task()
        self.ended = False


class Receiver:
    """Where calls read. `limit` is how many bytes gRPC may hold of messages that have no grant yet."""

    def __init__(self, budget: ByteBudget, limit: int) -> None:
        self._budget = budget
        self.limit = limit
        self._reads: set[_PendingRead] = set()
        self._end = 1  # how many reads the next look ends if it must

    async def read(self, context: Any, deadline: float | None, rank: int = 0) -> tuple[bytes, RequestMemory] | None:
        """Return the next message and what it holds; None where the caller sends no more.

        `deadline` is of time.monotonic(), None where there is none or it is the caller's alone. A `rank` is ended after
        those above it: 0 of a unary call, 1 of a stream, 2 where no token is asked for.

        Raises Overloaded where there was no room for it in time, or it came slowly while memory ran out.
        """
        read = _PendingRead(context, rank)
        self._reads.add(read)
        try:
            data = await context.read()
            if data is EOF:
                return None
            if deadline is None and rank == 0:
                remaining = context.time_remaining()
                deadline = None if remaining is None else time.monotonic() + remaining
            return data, await self._budget.acquire_message(len(data), deadline)
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
            self._reads.discard(read)

    async def message(self, context: Any, rank: int = 0) -> tuple[bytes, RequestMemory]:
        """Return the one message of a unary call. Raises InvalidInput where there is none, and as `read`."""
        received = await self.read(context, None, rank)
        if received is None:
            raise InvalidInput("the call ended before its message came")
        return received

    def end_slow_reads(self, held: int) -> None:
        """End reads where the `held` bytes of gRPC are over the limit, more with every look that finds them so."""
        if held <= self.limit:
            self._end = 1
            return
        for read in self._by_priority()[: self._end]:
            assert read.task is not None
            read.ended = True
            read.task.cancel()
        self._end *= 2

    def _by_priority(self) -> list[_PendingRead]:
        """Slow senders first, then by rank, then the callers with most reads pending, then the oldest."""
        reads = [read for read in self._reads if not read.ended]
        callers = {read: _address(read.context.peer()) for read in reads}
        counts = Counter(callers.values())
        slow = time.monotonic() - _SLOW_SENDER_SECONDS
        return sorted(reads, key=lambda read: (read.since > slow, -read.rank, -counts[callers[read]], read.since))


def _address(peer: str) -> str:
    """`peer` without its port: one that opens many connections is one caller still."""
    return peer.rpartition(":")[0]
