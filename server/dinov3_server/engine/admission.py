"""Admit or refuse requests, by the free room in the queue and the arena and by whether they can end in time.

A request is admitted before anything of it is decoded. Room is limited so that no caller locks others out:

- Bulk requests hold at most three quarters of the images and of the arena; the rest is for interactive ones.
- A connection holds at most seven eighths of what the other connections of its group leave, and a group (a token or a
  peer address, see `shares.py`) seven eighths of what the other groups leave. So there is always room for another
  caller.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from dinov3_server.config.settings import BULK_FRACTION
from dinov3_server.engine.arena import Arena
from dinov3_server.engine.forecast import Demand, Forecast, QueuedTokens
from dinov3_server.errors import InvalidInput, Overloaded
from dinov3_server.metrics import Metrics

# The fraction that a caller may hold of what the others leave.
CALLER_FRACTION = 0.875
# While at most this fraction is taken, no limit can be exceeded. Proof: with P for CALLER_FRACTION and T for the total,
# a connection may hold P (P (T - other groups) - rest of its group), which is not less than P^2 T - all others.
_FREE_FRACTION = min(BULK_FRACTION, CALLER_FRACTION**2)
# Bounds of the pause before a retry that is suggested to a refused caller, in seconds.
SHORTEST_RETRY, LONGEST_RETRY = 0.05, 30.0


class Reservation:
    """Places in the queue for the images of a request, and its range of the arena.

    `memory` is the whole arena; the range has `nbytes` bytes from `offset` on. It is freed with the last reference: one
    is the request's, the others are those of its rows that a worker may still access.
    """

    def __init__(self, admission: Admission, demand: Demand, offset: int) -> None:
        self._admission = admission
        self._references = 1
        self._released = False
        self._queued_tokens = demand.tokens
        self.demand = demand
        self.memory = admission.arena.memory
        self.offset = offset
        self.nbytes = demand.nbytes

    def release(self) -> None:
        """Drop the request's own reference. Further calls do nothing."""
        if not self._released:
            self._released = True
            self.dequeue(self._queued_tokens)
            self.drop_references(1)

    def dequeue(self, tokens: int) -> None:
        """Count `tokens` as not queued any more: a device has started them, or they are no longer wanted."""
        tokens = min(tokens, self._queued_tokens)
        if tokens:
            self._queued_tokens -= tokens
            self._admission.queued.add(self.demand, -tokens)

    def add_references(self, rows: int) -> None:
        """Add references, one for each row that a worker is given."""
        self._references += rows

    def drop_references(self, rows: int) -> None:
        """Drop references, and free the room with the last one."""
        self._references -= rows
        if not self._references:
            self._admission.free(self)


@dataclass(slots=True)
class _Usage:
    """Room that is held by one caller, one group, or all bulk requests."""

    images: int = 0
    nbytes: int = 0
    connections: dict[str, _Usage] = field(default_factory=dict)  # of a group

    def add(self, images: int, nbytes: int) -> None:
        self.images += images
        self.nbytes += nbytes


class Admission:
    """The room of a frontend, `max_images` in the queue and the bytes of its arena, and the requests that hold it.

    `max_wait` limits the expected wait of requests without a deadline, in seconds.
    """

    def __init__(self, arena: Arena, max_images: int, max_wait: float, metrics: Metrics) -> None:
        self.arena = arena
        self.queued = QueuedTokens()
        self.overloaded = False  # the last request could not end in time
        self._max_images = max_images
        self._max_wait = max_wait
        self._all = _Usage()
        self._bulk = _Usage()
        self._groups: dict[str, _Usage] = {}
        self._metrics = metrics
        self.update_gauges()

    def reserve(
        self, demand: Demand, deadline: float | None, forecast: Callable[[Demand, bool], Forecast]
    ) -> Reservation:
        """Reserve places in the queue for the images of `demand`, and a range of the arena.

        `deadline` is in seconds of time.monotonic(). `forecast(demand, quick)` predicts the time of the request; with
        `quick` it may overestimate the wait.

        Raises:
            InvalidInput: it would not fit even if the server were idle.
            Overloaded: it does not fit now, or could not end in time.
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
        self._count(demand, 1)
        self.queued.add(demand, demand.tokens)
        return Reservation(self, demand, offset)

    def free(self, reservation: Reservation) -> None:
        """Free the room of a reservation; called by the reservation, with its last reference."""
        self.arena.free(reservation.offset)
        self._count(reservation.demand, -1)

    def _count(self, demand: Demand, sign: int) -> None:
        """Count the room of a request as taken (`sign` 1) or free (-1)."""
        name, connection_name = demand.caller
        group = self._groups.get(name)
        if group is None:
            group = self._groups[name] = _Usage()
        connection = group.connections.get(connection_name)
        if connection is None:
            connection = group.connections[connection_name] = _Usage()
        images, nbytes = sign * demand.images, sign * demand.nbytes
        self._all.add(images, nbytes)
        group.add(images, nbytes)
        connection.add(images, nbytes)
        if demand.bulk:
            self._bulk.add(images, nbytes)
        if not connection.images:
            del group.connections[connection_name]
            if not group.images:
                del self._groups[name]

    def _check_size(self, demand: Demand) -> None:
        """Raise InvalidInput if `demand` exceeds what a single caller may hold of an idle server."""
        fraction = BULK_FRACTION if demand.bulk else CALLER_FRACTION**2
        most = int(self._max_images * fraction)
        if demand.images > most:
            raise InvalidInput(
                f"{demand.images} images in one request; a caller may hold {most} of the queue's {self._max_images} "
                "(--max-queue-images): send them in several requests"
            )
        most = int(self.arena.nbytes * fraction)
        if demand.nbytes > most:
            raise InvalidInput(
                f"pixels and features of this request take {demand.nbytes} bytes; a caller may hold {most} of the "
                f"arena's {self.arena.nbytes} (--arena-bytes): send fewer images a request or ask for fewer outputs"
            )

    def check_time(
        self, demand: Demand, deadline: float | None, forecast: Callable[[Demand, bool], Forecast]
    ) -> Forecast:
        """Return the forecast for `demand`. Raise Overloaded if it could not end in time; see `reserve`."""
        # Under overload the quick estimate is skipped: it is too high, and would nearly always refuse.
        estimates = (False,) if self.overloaded else (True, False)
        self.overloaded = False
        remaining = None if deadline is None else deadline - time.monotonic()
        for quick in estimates:
            expected = forecast(demand, quick)
            if expected.wait <= self._max_wait if remaining is None else expected.ends_within(remaining):
                return expected
        self.overloaded = True
        if remaining is None:
            raise Overloaded(
                f"the expected wait is {expected.wait:.1f} s; requests without a deadline may wait for "
                f"{self._max_wait:g} s (--max-wait-seconds): try again later, or set a longer deadline",
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
        """Raise Overloaded if the queue or the arena is full, or the caller, its group or bulk would hold too much."""
        if (
            self._all.images + demand.images <= _FREE_FRACTION * self._max_images
            and self._all.nbytes + demand.nbytes <= _FREE_FRACTION * self.arena.nbytes
        ):
            return
        group = self._groups.get(demand.caller.group) or _Usage()
        connection = group.connections.get(demand.caller.connection) or _Usage()
        total = self._max_images, self.arena.nbytes
        for resource, name in enumerate(("images", "bytes of the arena")):
            wanted = demand.images if resource == 0 else demand.nbytes

            def held(usage: _Usage, resource: int = resource) -> int:
                return usage.images if resource == 0 else usage.nbytes

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
            for reason, holder, used, most in limits:
                if used + wanted > most:
                    if reason == "queue" and resource == 1:
                        reason = "arena"
                    raise Overloaded(
                        f"{holder} {used} {name}, and {wanted} more would exceed the {int(most)} that are allowed now "
                        f"(of {total[resource]}); try again in {retry_after:.2f} s",
                        reason=reason,
                        retry_after=retry_after,
                    )

    def update_gauges(self) -> None:
        """Set the gauges of the queue and of the arena."""
        self._metrics.images_in_flight.set(self._all.images)
        self._metrics.queue_capacity_images.set(self._max_images)
        used = self.arena.used_bytes
        self._metrics.arena_bytes.set(used, "used")
        self._metrics.arena_bytes.set(self.arena.nbytes - used, "free")


def retry_in(wait: float) -> float:
    """Return the pause to suggest to a refused caller, in seconds."""
    return min(max(wait, SHORTEST_RETRY), LONGEST_RETRY)
