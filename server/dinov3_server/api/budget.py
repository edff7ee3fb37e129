"""Bound the bytes of ordinary memory that a frontend holds for its requests, beside its arena.

Three uses share one budget: messages that were received, pictures that are being decoded, and answers until their
caller has read them.

Each use has a part that the others never take, its *floor*, and its own line: what does not fit waits, first come first
served. So a request that holds a message and waits for a picture, or holds neither and waits for its answer, always
gets on once those of the same use before it have ended: uses do not wait for each other.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from typing import Any, NamedTuple, NoReturn

from dinov3_server.errors import InvalidInput, Overloaded
from dinov3_server.metrics import Metrics

# How long a caller may take over its answer while others wait for the room that it takes.
SLOW_READER_SECONDS = 5.0
# The longest wait for room, in seconds, of a call without a deadline. Others wait for at most half of the time that
# they have left: the rest is for the work.
LONGEST_WAIT_SECONDS = 10.0


class ByteBudget:
    """`nbytes` in all. `messages`, `pictures` and `answers` are where grants are taken.

    To be made in the event loop. `most_message` bytes are kept for messages, as many for answers, and half of the rest
    for pictures.
    """

    def __init__(self, nbytes: int, most_message: int) -> None:
        floors = {"messages": most_message, "pictures": (nbytes - 2 * most_message) // 2, "answers": most_message}
        assert all(floor > 0 for floor in floors.values()), floors
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self.unread: dict[RequestMemory, None] = {}  # the longest first
        self._free = nbytes - sum(floors.values())  # of what has no floor
        self.messages, self.pictures, self.answers = (
            Quota(self, use, floor, floor + self._free) for use, floor in floors.items()
        )

    async def acquire_message(self, nbytes: int, deadline: float | None) -> RequestMemory:
        """Wait for room for a message of `nbytes` that was received. Raises Overloaded."""
        return RequestMemory(self, self.messages.try_acquire(nbytes) or await self.messages.acquire(nbytes, deadline))

    def slow_reader(self) -> str | None:
        """Return the peer whose answer has been unread for longest, if over SLOW_READER_SECONDS and others wait."""
        if self.answers.has_waiters:
            for request_memory in self.unread:
                return request_memory.peer if time.monotonic() - request_memory.since > SLOW_READER_SECONDS else None
        return None

    def update_gauges(self, metrics: Metrics) -> None:
        """Set the gauges."""
        for quota in (self.messages, self.pictures, self.answers):
            metrics.frontend_bytes.set(quota.used, quota.use)

    def _fits(self, quota: Quota, nbytes: int) -> bool:
        after = quota.used + nbytes
        return after <= quota.floor or after - max(quota.used, quota.floor) <= self._free

    def _add(self, quota: Quota, nbytes: int) -> None:
        """Count `nbytes` more, or fewer, whether they fit or not."""
        before, floor = quota.used, quota.floor
        quota.used = after = before + nbytes
        if before > floor or after > floor:
            self._free -= max(after, floor) - max(before, floor)

    def _schedule_wake(self) -> None:
        """From any thread: let those go on that wait for room that there now is."""
        if self.messages.has_waiters or self.pictures.has_waiters or self.answers.has_waiters:
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        for quota in (self.messages, self.pictures, self.answers):
            quota.grant_waiters()


class _Waiter(NamedTuple):
    nbytes: int
    grant: asyncio.Future[MemoryGrant]


class Quota:
    """One use of the budget: `used` bytes now, `limit` at any time."""

    def __init__(self, budget: ByteBudget, use: str, floor: int, limit: int) -> None:
        self.use = use
        self.used = 0
        self.floor = floor
        self.limit = limit
        self._budget = budget
        self._waiters: deque[_Waiter] = deque()

    @property
    def has_waiters(self) -> bool:
        return bool(self._waiters)

    def try_acquire(self, nbytes: int, overtake: bool = False) -> MemoryGrant | None:
        """A grant, or None where it does not fit now or others wait, unless it may overtake them. From any thread."""
        with self._budget._lock:
            if (self._waiters and not overtake) or not self._budget._fits(self, nbytes):
                return None
            self._budget._add(self, nbytes)
        return MemoryGrant(self, nbytes)

    async def acquire(self, nbytes: int, deadline: float | None) -> MemoryGrant:
        """A grant as soon as `nbytes` fit, after those who came before. In the event loop only.

        `deadline` is of time.monotonic().

        Raises:
            InvalidInput: it would not fit an idle server either.
            Overloaded: it did not fit in LONGEST_WAIT_SECONDS, or in half of the time until the deadline.
        """
        if nbytes > self.limit:
            raise InvalidInput(
                f"this request needs {nbytes} bytes for its {self.use}; a server that is idle has {self.limit} "
                "(--frontend-bytes): send fewer or smaller images, or ask for fewer outputs"
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
        self._waiters.append(waiter)
        self.grant_waiters()  # a grant may have come back between try_acquire and the line before
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
        if waiter in self._waiters:
            self._waiters.remove(waiter)
            self.grant_waiters()  # what stands behind may fit
        else:  # it got its grant at the moment that it gave up
            waiter.grant.result().release()

    def grant_waiters(self) -> None:
        """Give grants to those at the head of the line, in the event loop."""
        while self._waiters:
            waiter = self._waiters[0]
            if waiter.grant.done():  # it gave up, and is about to leave the line
                return
            with self._budget._lock:
                if not self._budget._fits(self, waiter.nbytes):
                    return
                self._budget._add(self, waiter.nbytes)
            self._waiters.popleft()
            waiter.grant.set_result(MemoryGrant(self, waiter.nbytes))

    def _refuse(self, nbytes: int, waited: float) -> NoReturn:
        raise Overloaded(
            f"no memory for {nbytes} bytes of {self.use} came free in {waited:.1f} s: {self.used} of at most "
            f"{self.limit} are in use (--frontend-bytes); try again",
            reason=f"{self.use}_bytes",
            retry_after=1.0,
        )

    def _resize(self, grant: MemoryGrant, nbytes: int) -> None:
        with self._budget._lock:
            more = nbytes - grant.nbytes
            grant.nbytes = nbytes
            self._budget._add(self, more)
        if more < 0:
            self._budget._schedule_wake()


class RequestMemory:
    """What one request holds of a budget: its message, and later its answer until the caller has read it."""

    __slots__ = ("_answer", "_budget", "_context", "_message", "since")

    def __init__(self, budget: ByteBudget, message: MemoryGrant) -> None:
        self._budget = budget
        self._message = message
        self._answer: MemoryGrant | None = None
        self.since = 0.0
        self._context: Any = None

    def release_message(self) -> None:
        """Give back the room of the message, which is needed no more."""
        self._message.release()

    async def acquire_answer(self, nbytes: int, deadline: float | None) -> None:
        """Wait for room for an answer of `nbytes`, which gRPC copies. Raises Overloaded, InvalidInput."""
        answers = self._budget.answers
        self._answer = answers.try_acquire(2 * nbytes) or await answers.acquire(2 * nbytes, deadline)

    @property
    def peer(self) -> str:
        """The caller that the answer is sent to, by gRPC's name."""
        peer: str = self._context.peer()
        return peer

    def start_sending(self, context: Any) -> None:
        """The answer is on its way to the caller of `context` from now on."""
        self.since = time.monotonic()
        self._context = context
        self._budget.unread[self] = None

    def release(self, _: object = None) -> None:
        """Release everything: the answer is read, or will not be. May be called again, and as a done callback."""
        self._budget.unread.pop(self, None)
        self._context = None
        self._message.release()
        if self._answer is not None:
            self._answer.release()


class MemoryGrant:
    """`nbytes` of a quota until `release`, or the end of a `with` block. Methods may be called from any thread."""

    __slots__ = ("_quota", "nbytes")

    def __init__(self, quota: Quota, nbytes: int) -> None:
        self._quota = quota
        self.nbytes = nbytes

    def resize(self, nbytes: int) -> None:
        """Hold `nbytes` from now on: what is there is counted, even where it passes the budget.

        A holder that can do with less, or can wait, takes another grant for what is to come instead.
        """
        self._quota._resize(self, nbytes)

    def release(self) -> None:
        """Hold nothing more. May be called again."""
        if self.nbytes:
            self._quota._resize(self, 0)

    def __enter__(self) -> MemoryGrant:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
