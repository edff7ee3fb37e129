"""Which connection a call takes. Pure but for a lock: channels are made by the function that is given, and closed by
whoever is given them back.

A connection lives on one of the frontends behind its target, and the kernel deals connections out by chance. Every
answer names the frontend that it came from: so connections are opened when calls need them, without a question before,
and one that turns out to share its frontend while another has none is retired once its calls are done. The next call
that needs one dials again.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

# Connections of a target, unless the user says how many. One Python process takes what a few frontends can send.
MOST_CONNECTIONS = 8
# How often connections of a target are dialled anew, for each of them. To meet each of 8 frontends takes 22 dials on
# average (14 beyond the first of each) and more than 40 once in 30 times.
REDIALS = 4
# Seconds that a target that cannot be reached is left alone while others live, doubled from the first to the longest.
FIRST_REST = 1.0
LONGEST_REST = 15.0


class Connection:
    def __init__(self, target: Target, channel: Any) -> None:
        self.target = target
        self.channel = channel
        self.in_flight = 0
        self.frontend: int | None = None
        """That its last answer came from."""


class Target:
    def __init__(self, name: str) -> None:
        self.name = name
        # A name that stands for many servers: gRPC deals the calls of one channel out to them, so that the frontends
        # that answer tell nothing of the connection.
        self.is_many = name.startswith("dns:")
        self.connections: list[Connection] = []
        self.frontends = 1
        self.redials = 0
        self.failures = 0
        self.rests_until = 0.0
        self.turn = 0

    @property
    def in_flight(self) -> int:
        return sum(connection.in_flight for connection in self.connections)


class Pool:
    """`connections` a target; None: as many as it has frontends, up to MOST_CONNECTIONS. `first`: where the turns of
    the targets begin, so that clients that start together do not all begin with the same."""

    def __init__(
        self,
        targets: Sequence[str],
        connections: int | None,
        dial: Callable[[str], Any],
        *,
        now: Callable[[], float] = time.monotonic,
        first: int = 0,
    ) -> None:
        first %= len(targets)
        self._targets = [Target(name) for name in (*targets[first:], *targets[:first])]
        self._connections = connections
        self._dial = dial
        self._now = now
        self._turns = 0
        self._closed = False
        self._lock = threading.Lock()
        self._retired: list[Connection] = []

    @property
    def closed(self) -> bool:
        return self._closed

    def take(self, avoid: Collection[Target] = ()) -> Connection:
        """The connection with the fewest calls in flight, opened where all that there are have some, of the target
        with the fewest; one that rests, or is to be avoided, only where there is no other. To be given back.

        Raises ValueError when the pool was closed.
        """
        with self._lock:
            if self._closed:
                raise ValueError("this client is closed")
            now = self._now()
            target = min(
                self._targets,
                key=lambda one: (one in avoid, max(0.0, one.rests_until - now), one.in_flight, one.turn),
            )
            self._turns += 1
            target.turn = self._turns
            found = min(target.connections, key=lambda one: one.in_flight, default=None)
            if found is None or (found.in_flight and len(target.connections) < self._wanted(target)):
                found = Connection(target, self._dial(target.name))
                target.connections.append(found)
            found.in_flight += 1
            return found

    def give_back(self, connection: Connection) -> None:
        with self._lock:
            connection.in_flight -= 1

    def has_other(self, avoid: Collection[Target]) -> bool:
        """Whether a target is neither to be avoided nor resting."""
        with self._lock:
            now = self._now()
            return any(target not in avoid and target.rests_until <= now for target in self._targets)

    def failed(self, connection: Connection, hint: float | None) -> None:
        """Nobody was there, or not ready; `hint` are the seconds after which the server expects to be."""
        with self._lock:
            target, now = connection.target, self._now()
            # It may come back as another process, with other frontends.
            connection.frontend = None
            target.redials = 0
            if target.rests_until <= now:  # else it is a call that failed together with one before
                rest = min(FIRST_REST * 2 ** min(target.failures, 10), LONGEST_REST)
                target.rests_until = now + max(rest, min(hint or 0.0, LONGEST_REST))
                target.failures += 1

    def answered(self, connection: Connection, frontend: int, frontends: int | None = None) -> None:
        """By the process `frontend`, one of `frontends` where the answer tells that."""
        with self._lock:
            target = connection.target
            target.failures, target.rests_until = 0, 0.0
            target.frontends = max(target.frontends if frontends is None else frontends, frontend + 1)
            connection.frontend = frontend
            if not target.is_many and connection in target.connections and self._is_crowded(connection):
                target.redials += 1
                target.connections.remove(connection)
                self._retired.append(connection)

    def unused(self) -> list[Any]:
        """Channels that were retired and have no call in flight any more, each told once; to be closed."""
        with self._lock:
            idle = [connection for connection in self._retired if not connection.in_flight]
            self._retired = [connection for connection in self._retired if connection.in_flight]
            return [connection.channel for connection in idle]

    def close(self) -> list[Any]:
        """All channels, to be closed; there will be no others."""
        with self._lock:
            self._closed = True
            found = [*self._retired, *(one for target in self._targets for one in target.connections)]
            self._retired = []
            for target in self._targets:
                target.connections = []
            return [connection.channel for connection in found]

    def _wanted(self, target: Target) -> int:
        return self._connections or min(target.frontends, MOST_CONNECTIONS)

    def _is_crowded(self, connection: Connection) -> bool:
        """Whether another frontend has two fewer, so that to dial anew can even them out."""
        target = connection.target
        if target.redials >= REDIALS * self._wanted(target):
            return False
        counts = Counter(one.frontend for one in target.connections)
        # Of n + 1 frontends, n connections leave one out: no more need to be looked at, however many there are.
        some = range(min(target.frontends, len(target.connections) + 1))
        least = min(counts[frontend] for frontend in some)
        return counts[connection.frontend] - least >= 2
