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
SLOW_SECONDS = 5.0
# The longest wait for room, in seconds, of a call without a deadline. Others wait for at most half of the time that
# they have left: the rest is for the work.
LONGEST_WAIT_SECONDS = 10.0


class ByteBudget:
    """`nbytes` in all. `messages`, `pictures` and `answers` are where permits are taken.

    To be made in the event loop. `most_message` bytes are kept for messages, as many for answers, and half of the rest
    for pictures.
    """

    def __init__(self, nbytes: int, most_message: int) -> None:
        floors = {"messages": most_message, "pictures": (nbytes - 2 * most_message) // 2, "answers": most_message}
        assert all(floor > 0 for floor in floors.values()), floors
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self.sending: dict[Holding, None] = {}  # the longest first
        self._free = nbytes - sum(floors.values())  # of what has no floor
        self.messages, self.pictures, self.answers = (
            Share(self, use, floor, floor + self._free) for use, floor in floors.items()
        )

    async def hold(self, nbytes: int, deadline: float | None) -> Holding:
        """Wait for room for a message of `nbytes` that was received. Raises Overloaded."""
        return Holding(self, self.messages.try_take(nbytes) or await self.messages.take(nbytes, deadline))

    def slow_reader(self) -> str | None:
        """Return the peer whose answer is unread for longest, over SLOW_SECONDS, where others wait for its room."""
        if self.answers.waits:
            for holding in self.sending:
                return holding.peer if time.monotonic() - holding.since > SLOW_SECONDS else None
        return None

    def show(self, metrics: Metrics) -> None:
        """Set the gauges."""
        for share in (self.messages, self.pictures, self.answers):
            metrics.frontend_bytes.set(share.used, share.use)

    def _fits(self, share: Share, nbytes: int) -> bool:
        after = share.used + nbytes
        return after <= share.floor or after - max(share.used, share.floor) <= self._free

    def _add(self, share: Share, nbytes: int) -> None:
        """Count `nbytes` more, or fewer, whether they fit or not."""
        before, floor = share.used, share.floor
        share.used = after = before + nbytes
        if before > floor or after > floor:
            self._free -= max(after, floor) - max(before, floor)

    def _give_back(self) -> None:
        """From any thread: let those go on that wait for room that there now is."""
        if self.messages.waits or self.pictures.waits or self.answers.waits:
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        for share in (self.messages, self.pictures, self.answers):
            share.wake()


class _Waiter(NamedTuple):
    nbytes: int
    permit: asyncio.Future[Permit]


class Share:
    """One use of the budget: `used` bytes now, `most` at any time."""

    def __init__(self, budget: ByteBudget, use: str, floor: int, most: int) -> None:
        self.use = use
        self.used = 0
        self.floor = floor
        self.most = most
        self._budget = budget
        self._waiters: deque[_Waiter] = deque()

    @property
    def waits(self) -> bool:
        return bool(self._waiters)

    def try_take(self, nbytes: int, overtake: bool = False) -> Permit | None:
        """A permit, or None where it does not fit now or others wait, unless it may overtake them. From any thread."""
        with self._budget._lock:
            if (self._waiters and not overtake) or not self._budget._fits(self, nbytes):
                return None
            self._budget._add(self, nbytes)
        return Permit(self, nbytes)

    async def take(self, nbytes: int, deadline: float | None) -> Permit:
        """A permit as soon as `nbytes` fit, after those who came before. In the event loop only.

        `deadline` is of time.monotonic().

        Raises:
            InvalidInput: it would not fit an idle server either.
            Overloaded: it did not fit in LONGEST_WAIT_SECONDS, or in half of the time until the deadline.
        """
        if nbytes > self.most:
            raise InvalidInput(
                f"this request needs {nbytes} bytes for its {self.use}; a server that is idle has {self.most} "
                "(--frontend-bytes): send fewer or smaller images, or ask for fewer outputs"
            )
        permit = self.try_take(nbytes)
        if permit is not None:
            return permit
        wait = LONGEST_WAIT_SECONDS
        if deadline is not None:
            wait = min(wait, (deadline - time.monotonic()) / 2)
        if wait <= 0:
            self._refuse(nbytes, 0.0)
        waiter = _Waiter(nbytes, asyncio.get_running_loop().create_future())
        self._waiters.append(waiter)
        self.wake()  # a permit may have come back between try_take and the line before
        try:
            async with asyncio.timeout(wait):
                return await waiter.permit
        except TimeoutError:
            self._withdraw(waiter)
            self._refuse(nbytes, wait)
        except asyncio.CancelledError:
            self._withdraw(waiter)
            raise

    def _withdraw(self, waiter: _Waiter) -> None:
        if waiter in self._waiters:
            self._waiters.remove(waiter)
            self.wake()  # what stands behind may fit
        else:  # it got its permit at the moment that it gave up
            waiter.permit.result().release()

    def wake(self) -> None:
        """Give permits to those at the head of the line, in the event loop."""
        while self._waiters:
            waiter = self._waiters[0]
            if waiter.permit.done():  # it gave up, and is about to leave the line
                return
            with self._budget._lock:
                if not self._budget._fits(self, waiter.nbytes):
                    return
                self._budget._add(self, waiter.nbytes)
            self._waiters.popleft()
            waiter.permit.set_result(Permit(self, waiter.nbytes))

    def _refuse(self, nbytes: int, waited: float) -> NoReturn:
        raise Overloaded(
            f"no memory for {nbytes} bytes of {self.use} came free in {waited:.1f} s: {self.used} of at most "
            f"{self.most} are in use (--frontend-bytes); try again",
            reason=f"{self.use}_bytes",
            retry_after=1.0,
        )

    def _resize(self, permit: Permit, nbytes: int) -> None:
        with self._budget._lock:
            more = nbytes - permit.nbytes
            permit.nbytes = nbytes
            self._budget._add(self, more)
        if more < 0:
            self._budget._give_back()


class Holding:
    """What one request holds of a budget: its message, and later its answer until the caller has read it."""

    __slots__ = ("_answer", "_budget", "_context", "_message", "since")

    def __init__(self, budget: ByteBudget, message: Permit) -> None:
        self._budget = budget
        self._message = message
        self._answer: Permit | None = None
        self.since = 0.0
        self._context: Any = None

    def message_read(self) -> None:
        """Give back the room of the message, which is needed no more."""
        self._message.release()

    async def take_answer(self, nbytes: int, deadline: float | None) -> None:
        """Wait for room for an answer of `nbytes`, which gRPC copies. Raises Overloaded, InvalidInput."""
        answers = self._budget.answers
        self._answer = answers.try_take(2 * nbytes) or await answers.take(2 * nbytes, deadline)

    @property
    def peer(self) -> str:
        """The caller that the answer is sent to, by gRPC's name."""
        peer: str = self._context.peer()
        return peer

    def sends(self, context: Any) -> None:
        """The answer is on its way to the caller of `context` from now on."""
        self.since = time.monotonic()
        self._context = context
        self._budget.sending[self] = None

    def release(self) -> None:
        """Hold nothing more: the answer is read, or will not be. May be called again."""
        self._budget.sending.pop(self, None)
        self._context = None
        self._message.release()
        if self._answer is not None:
            self._answer.release()

    def done(self, _: object) -> None:
        """`release`, as a callback of a call or a task."""
        self.release()


class Permit:
    """`nbytes` of a share until `release`, or the end of a `with` block. Methods may be called from any thread."""

    __slots__ = ("_share", "nbytes")

    def __init__(self, share: Share, nbytes: int) -> None:
        self._share = share
        self.nbytes = nbytes

    def resize(self, nbytes: int) -> None:
        """Hold `nbytes` from now on: what is there is counted, even where it passes the budget.

        A holder that can do with less, or can wait, takes another permit for what is to come instead.
        """
        self._share._resize(self, nbytes)

    def release(self) -> None:
        """Hold nothing more. May be called again."""
        if self.nbytes:
            self._share._resize(self, 0)

    def __enter__(self) -> Permit:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
