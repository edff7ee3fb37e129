"""Bound the ordinary memory that a frontend holds for its requests, beside the arena.

Three uses share one budget: received messages, pictures that are being decoded, and answers until they are read.

Each use has a *quota*: a floor that the other uses never take, a limit, and a queue. A request for memory that does not
fit waits, first come first served. Uses do not wait for each other: a request that holds a message and waits for a
picture, or waits for its answer, always goes on once the earlier ones of the same use have ended.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

from dinov3_server.errors import InvalidInput, Overloaded
from dinov3_server.metrics import Metrics

# How long an answer may stay unread while others wait for its memory.
SLOW_READER_SECONDS = 5.0
# Longest wait for memory of a call without a deadline. Calls with one wait for at most half of the time that they have
# left: the rest is for the work.
LONGEST_WAIT_SECONDS = 10.0


class ByteBudget:
    """`nbytes` in all, divided between the quotas `messages`, `pictures` and `answers`. Create it in the event loop.

    The floor of messages and of answers is `max_message_bytes` each, that of pictures half of the rest.
    """

    def __init__(self, nbytes: int, max_message_bytes: int) -> None:
        pictures = (nbytes - 2 * max_message_bytes) // 2
        floors = {"messages": max_message_bytes, "pictures": pictures, "answers": max_message_bytes}
        assert all(floor > 0 for floor in floors.values()), floors
        self._loop = asyncio.get_running_loop()
        self.nbytes = nbytes
        self.lock = threading.Lock()
        self.unread: dict[RequestMemory, None] = {}  # answers, the oldest first
        self._free = nbytes - sum(floors.values())  # of what is above the floors
        self._quotas = tuple(Quota(self, use, floor, floor + self._free) for use, floor in floors.items())
        self.messages, self.pictures, self.answers = self._quotas

    async def acquire_message(self, nbytes: int, deadline: float | None) -> RequestMemory:
        """Wait for memory for a received message of `nbytes`. Raises InvalidInput, Overloaded."""
        return RequestMemory(self, await self.messages.acquire(nbytes, deadline))

    def slow_reader(self) -> str | None:
        """Return the peer whose answer has been unread for longest, if over SLOW_READER_SECONDS and others wait."""
        oldest = next(iter(self.unread), None)
        if oldest is None or not self.answers.waiters or time.monotonic() - oldest.since <= SLOW_READER_SECONDS:
            return None
        peer: str = oldest.context.peer()
        return peer

    def update_gauges(self, metrics: Metrics) -> None:
        """Set the gauges of the bytes in use."""
        for quota in self._quotas:
            metrics.frontend_bytes.set(quota.used, quota.use)

    def fits(self, quota: Quota, nbytes: int) -> bool:
        after = quota.used + nbytes
        return after <= quota.floor or after - max(quota.used, quota.floor) <= self._free

    def add(self, quota: Quota, nbytes: int) -> None:
        """Add `nbytes`, which are negative for a release, to what is in use."""
        before, floor = quota.used, quota.floor
        quota.used = after = before + nbytes
        if before > floor or after > floor:
            self._free -= max(after, floor) - max(before, floor)

    def schedule_wake(self) -> None:
        """Have the event loop serve the queues. May be called from any thread."""
        if any(quota.waiters for quota in self._quotas):
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        for quota in self._quotas:
            quota.grant_waiters()


class _Waiter(NamedTuple):
    nbytes: int
    grant: asyncio.Future[MemoryGrant]


@dataclass(eq=False)
class Quota:
    """The part of the budget for one use: `used` bytes now, at most `limit`, with a queue of waiters."""

    budget: ByteBudget
    use: str
    floor: int
    limit: int
    used: int = 0
    waiters: deque[_Waiter] = field(default_factory=deque)

    def try_acquire(self, nbytes: int, overtake: bool = False) -> MemoryGrant | None:
        """Return a grant, or None if it does not fit now or others wait. May be called from any thread.

        With `overtake`, others that wait are ignored.
        """
        with self.budget.lock:
            if (self.waiters and not overtake) or not self.budget.fits(self, nbytes):
                return None
            self.budget.add(self, nbytes)
        return MemoryGrant(self, nbytes)

    async def acquire(self, nbytes: int, deadline: float | None) -> MemoryGrant:
        """Return a grant when `nbytes` fit and all earlier waiters are served. Call it in the event loop.

        `deadline` is of time.monotonic().

        Raises:
            InvalidInput: `nbytes` are over the limit of the quota.
            Overloaded: they did not fit within LONGEST_WAIT_SECONDS, or half of the time until the deadline.
        """
        if nbytes > self.limit:
            raise InvalidInput(
                f"this request needs {nbytes} bytes for its {self.use}; allowed are {self.limit} "
                "(--frontend-bytes): send fewer or smaller images, or request fewer outputs"
            )
        grant = self.try_acquire(nbytes)
        if grant is not None:
            return grant
        wait = LONGEST_WAIT_SECONDS
        if deadline is not None:
            wait = min(wait, (deadline - time.monotonic()) / 2)
        if wait <= 0:
            self._refuse(nbytes, 0.0)
        waiter = _Waiter(nbytes, asyncio.get_running_loop().create_future())
        self.waiters.append(waiter)
        self.grant_waiters()  # memory may have been released since try_acquire
        try:
            async with asyncio.timeout(wait):
                return await waiter.grant
        except TimeoutError:
            self._withdraw(waiter)
            self._refuse(nbytes, wait)
        except asyncio.CancelledError:
            self._withdraw(waiter)
            raise

    def _withdraw(self, waiter: _Waiter) -> None:
        if waiter in self.waiters:
            self.waiters.remove(waiter)
            self.grant_waiters()  # the next in the queue may fit
        else:  # the grant came at the moment of the timeout or cancellation
            waiter.grant.result().release()

    def grant_waiters(self) -> None:
        """Serve the queue from its head while grants fit. Call it in the event loop."""
        while self.waiters:
            waiter = self.waiters[0]
            if waiter.grant.done():  # cancelled, and about to leave the queue
                return
            with self.budget.lock:
                if not self.budget.fits(self, waiter.nbytes):
                    return
                self.budget.add(self, waiter.nbytes)
            self.waiters.popleft()
            waiter.grant.set_result(MemoryGrant(self, waiter.nbytes))

    def _refuse(self, nbytes: int, waited: float) -> NoReturn:
        raise Overloaded(
            f"the frontend had no memory for {nbytes} bytes of {self.use} within {waited:.1f} s: {self.used} of "
            f"{self.limit} bytes are in use (--frontend-bytes); try again",
            reason=f"{self.use}_bytes",
            retry_after=1.0,
        )

    def take_back(self, grant: MemoryGrant) -> None:
        with self.budget.lock:
            self.budget.add(self, -grant.nbytes)
            grant.nbytes = 0
        self.budget.schedule_wake()


@dataclass(slots=True, eq=False)
class RequestMemory:
    """The memory grants of one request: its message, and later its answer until the caller has read it."""

    budget: ByteBudget
    message: MemoryGrant
    answer: MemoryGrant | None = None
    since: float = 0.0  # when the answer was sent
    context: Any = None

    async def acquire_answer(self, nbytes: int, deadline: float | None) -> None:
        """Wait for 2 x `nbytes` of memory for an answer, because gRPC copies it. Raises as `Quota.acquire`."""
        self.answer = await self.budget.answers.acquire(2 * nbytes, deadline)

    def start_sending(self, context: Any) -> None:
        """Record that the answer is sent to the caller of `context` from now on."""
        self.since = time.monotonic()
        self.context = context
        self.budget.unread[self] = None

    def release(self, _: object = None) -> None:
        """Release everything: the answer is read, or will not be. May be called again, and as a done callback."""
        self.budget.unread.pop(self, None)
        self.context = None
        self.message.release()
        if self.answer is not None:
            self.answer.release()


@dataclass(slots=True, eq=False)
class MemoryGrant:
    """`nbytes` of a quota, until `release` or the end of a `with` block. Methods may be called from any thread."""

    quota: Quota
    nbytes: int

    def release(self) -> None:
        """Hold nothing any more. May be called again."""
        if self.nbytes:
            self.quota.take_back(self)

    def __enter__(self) -> MemoryGrant:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
