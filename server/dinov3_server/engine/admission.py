"""Decide which requests get in: room in the queue and the arena, and whether they can be answered in time.

Everything is decided before anything of a request is decoded. Room is divided so that no caller locks others out:

- Bulk holds at most three quarters of the images and of the arena; the rest is interactive work's.
- A connection holds at most seven eighths of what the other connections of its group leave it, and a group (a token or
  a peer address, see `shares.py`) seven eighths of what the other groups leave: whatever a caller takes, the next one
  finds room.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from dinov3_server.config.settings import BULK_FRACTION
from dinov3_server.engine.arena import Arena
from dinov3_server.engine.forecast import Demand, Forecast, Waiting
from dinov3_server.errors import InvalidInput, Overloaded
from dinov3_server.metrics import Metrics

# The part that a caller may hold of what the others leave.
CALLER_FRACTION = 0.875
# While no more than this is taken, no limit is exceeded: with P for CALLER_FRACTION and T for the total, a connection
# may hold at least P (P (T - others) - rest of its group), which is not less than P^2 T - all others.
_FREE_FRACTION = min(BULK_FRACTION, CALLER_FRACTION**2)
# Bounds of the pause that a refused caller is told, in seconds.
SHORTEST_RETRY, LONGEST_RETRY = 0.05, 30.0


class Reservation:
    """Slots for images, and a range of the arena. `memory` is the whole arena: offsets index it."""

    def __init__(self, admission: Admission, demand: Demand, offset: int) -> None:
        self._admission = admission
        self._holders = 1  # the request, and every row that a worker may still touch
        self._released = False
        self._waiting = demand.tokens
        self.demand = demand
        self.memory = admission.arena.memory
        self.offset = offset
        self.nbytes = demand.nbytes

    def release(self) -> None:
        """The request is through with its range. May be called twice."""
        if not self._released:
            self._released = True
            self.stop_waiting(self._waiting)
            self.let_go(1)

    def stop_waiting(self, tokens: int) -> None:
        """Note that a device has started `tokens` of the request, or that they are no longer wanted."""
        tokens = min(tokens, self._waiting)
        if tokens:
            self._waiting -= tokens
            self._admission.waiting.add(self.demand, -tokens)

    def hold(self, rows: int) -> None:
        self._holders += rows

    def let_go(self, rows: int) -> None:
        self._holders -= rows
        if not self._holders:
            self._admission.end(self)


@dataclass(slots=True)
class _Room:
    """What one caller, one group or one class holds."""

    images: int = 0
    nbytes: int = 0
    parts: dict[str, _Room] = field(default_factory=dict)  # of a group: its connections

    def add(self, images: int, nbytes: int) -> None:
        self.images += images
        self.nbytes += nbytes


class Admission:
    """The room that a frontend has for requests: `max_images`, and the bytes of its arena.

    `max_wait` is in seconds, and bounds the expected wait of requests without a deadline.
    """

    def __init__(self, arena: Arena, max_images: int, max_wait: float, metrics: Metrics) -> None:
        self.arena = arena
        self.waiting = Waiting()
        self.overloaded = False  # the last one to ask could not be answered in time
        self._max_images = max_images
        self._max_wait = max_wait
        self._all = _Room()
        self._bulk = _Room()
        self._groups: dict[str, _Room] = {}
        self._metrics = metrics
        self.update_gauges()

    def reserve(
        self, demand: Demand, deadline: float | None, forecast: Callable[[Demand, bool], Forecast]
    ) -> Reservation:
        """Take slots for the images of `demand` and a range of the arena, or say at once why it cannot be.

        `deadline` is of time.monotonic(). `forecast` is given the demand, and whether a quick answer will do, which may
        tell a longer wait than there is.

        Raises:
            InvalidInput: it would not fit even an idle server.
            Overloaded: it does not fit now, or could not be answered in time.
        """
        self._check_size(demand)
        expected = self.check_time(demand, deadline, forecast)
        retry_after = retry_in(expected.wait)
        self._check_room(demand, retry_after)
        offset = self.arena.allocate(demand.nbytes)
        if offset is None:
            raise Overloaded(
                f"no range of {demand.nbytes} bytes is free in the arena ({self.arena.used_bytes} of "
                f"{self.arena.nbytes} bytes are in use); try again in {retry_after:.2f} s",
                reason="arena",
                retry_after=retry_after,
            )
        self._hold(demand, 1)
        self.waiting.add(demand, demand.tokens)
        return Reservation(self, demand, offset)

    def end(self, reservation: Reservation) -> None:
        """Called by the reservation, once nobody holds it."""
        self.arena.free(reservation.offset)
        self._hold(reservation.demand, -1)

    def _hold(self, demand: Demand, sign: int) -> None:
        """Count the room of a request as taken (1) or as free again (-1)."""
        name, connection_name = demand.caller
        group = self._groups.get(name)
        if group is None:
            group = self._groups[name] = _Room()
        connection = group.parts.get(connection_name)
        if connection is None:
            connection = group.parts[connection_name] = _Room()
        images, nbytes = sign * demand.images, sign * demand.nbytes
        self._all.add(images, nbytes)
        group.add(images, nbytes)
        connection.add(images, nbytes)
        if demand.bulk:
            self._bulk.add(images, nbytes)
        if not connection.images:
            del group.parts[connection_name]
            if not group.images:
                del self._groups[name]

    def _check_size(self, demand: Demand) -> None:
        part = BULK_FRACTION if demand.bulk else CALLER_FRACTION**2
        most = int(self._max_images * part)
        if demand.images > most:
            raise InvalidInput(
                f"{demand.images} images in one request; a caller may hold {most} of the queue's {self._max_images} "
                "(--max-queue-images): send them in several requests"
            )
        most = int(self.arena.nbytes * part)
        if demand.nbytes > most:
            raise InvalidInput(
                f"pixels and features of this request take {demand.nbytes} bytes; a caller may hold {most} of the "
                f"arena's {self.arena.nbytes} (--arena-bytes): send fewer images a request or ask for fewer outputs"
            )

    def check_time(
        self, demand: Demand, deadline: float | None, forecast: Callable[[Demand, bool], Forecast]
    ) -> Forecast:
        """Raise Overloaded where `demand` could not be answered in time; see `reserve`."""
        estimates = (False,) if self.overloaded else (True, False)  # a quick one mostly will not do under overload
        self.overloaded = False
        remaining = None if deadline is None else deadline - time.monotonic()
        for quick in estimates:
            expected = forecast(demand, quick)
            if expected.wait <= self._max_wait if remaining is None else expected.ends_within(remaining):
                return expected
        self.overloaded = True
        if remaining is None:
            raise Overloaded(
                f"the expected wait is {expected.wait:.1f} s, allowed without a deadline are {self._max_wait:g} "
                "(--max-wait-seconds): try again later, or set a longer deadline",
                reason="wait",
                retry_after=retry_in(expected.wait),
            )
        raise Overloaded(
            f"the deadline is in {max(0.0, remaining):.2f} s, and the expected wait of {expected.wait:.2f} s with "
            f"{expected.own:.2f} s of computing would pass it: send fewer requests at once, or allow more time",
            reason="deadline",
            retry_after=retry_in(expected.wait),
        )

    def _check_room(self, demand: Demand, retry_after: float) -> None:
        if (
            self._all.images + demand.images <= _FREE_FRACTION * self._max_images
            and self._all.nbytes + demand.nbytes <= _FREE_FRACTION * self.arena.nbytes
        ):
            return
        group = self._groups.get(demand.caller.group) or _Room()
        connection = group.parts.get(demand.caller.connection) or _Room()
        # Name, and what is allowed of (images, bytes) by what others hold.
        total = self._max_images, self.arena.nbytes
        for resource, name in enumerate(("images", "bytes of the arena")):
            wanted = demand.images if resource == 0 else demand.nbytes

            def held(room: _Room, resource: int = resource) -> int:
                return room.images if resource == 0 else room.nbytes

            others = held(self._all) - held(group)
            of_group = CALLER_FRACTION * (total[resource] - others)
            of_connection = CALLER_FRACTION * (of_group - (held(group) - held(connection)))
            limits = [
                ("queue", "all callers hold", held(self._all), total[resource]),
                ("share", "this caller's address or token holds", held(group), of_group),
                ("share", "this connection holds", held(connection), of_connection),
            ]
            if demand.bulk:
                limits.append(("bulk", "bulk requests hold", held(self._bulk), BULK_FRACTION * total[resource]))
            for reason, who, used, most in limits:
                if used + wanted > most:
                    if reason == "queue" and resource == 1:
                        reason = "arena"
                    raise Overloaded(
                        f"{who} {used} {name}, and {wanted} more would pass the {int(most)} that are allowed now "
                        f"(of {total[resource]}); try again in {retry_after:.2f} s",
                        reason=reason,
                        retry_after=retry_after,
                    )

    def update_gauges(self) -> None:
        """Set the gauges of the arena."""
        used = self.arena.used_bytes
        self._metrics.arena_bytes.set(used, "used")
        self._metrics.arena_bytes.set(self.arena.nbytes - used, "free")


def retry_in(wait: float) -> float:
    """Return the pause that a refused caller is told, in seconds."""
    return min(max(wait, SHORTEST_RETRY), LONGEST_RETRY)
