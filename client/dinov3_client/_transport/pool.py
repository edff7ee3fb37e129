"""The connection pool: chooses the connection of each call. It does no I/O: the caller dials and closes channels.

A connection reaches one of the frontend processes behind its target, which the kernel chooses at random. Each response
names its frontend. So connections are opened as calls need them, and a connection that shares its frontend while
another frontend has none is retired once its calls are done; the next call that needs a connection dials again.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

# To each target, unless the user says how many. One Python process can receive what a few frontends send.
MAX_CONNECTIONS = 8
# How often each connection of a target may be dialled again. To reach each of 8 frontends takes 22 dials on
# average (14 beyond the first of each) and more than 40 once in 30 times.
MAX_REDIALS = 4
# Seconds for which an unreachable target is avoided while others are available; doubled from the first to the longest.
# Then one call tries it, which costs little: a channel that could not connect fails its calls at once, and goes on
# trying to connect.
FIRST_BACKOFF = 0.25
LONGEST_BACKOFF = 2.0


class Connection:
    """A channel to a target, and its calls in flight."""

    def __init__(self, target: Target, channel: Any) -> None:
        self.target = target
        self.channel = channel
        self.in_flight = 0
        self.frontend: int | None = None
        """The frontend process of its last response."""


class Target:
    """A server address, its connections and its back-off."""

    def __init__(self, name: str) -> None:
        self.name = name
        # gRPC spreads the calls of one channel over the addresses of a DNS name, so that the frontend of a response
        # says nothing about the connection.
        self.is_load_balanced = name.startswith("dns:")
        self.connections: list[Connection] = []
        self.frontends = 1
        self.redials = 0
        self.failures = 0
        self.backoff_until = 0.0
        self.turn = 0
        self.model = ""
        """The fingerprint of its last response's model."""
        self.is_reported = False
        """Whether its present failure was logged."""

    @property
    def in_flight(self) -> int:
        return sum(connection.in_flight for connection in self.connections)


class Pool:
    """The connections of a client.

    connections: the most to each target; None: as many as it has frontends, up to MAX_CONNECTIONS.
    first: index of the target to begin with; a random one keeps clients that start together from choosing the same.
    """

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

    def acquire(self, avoid: Collection[Target] = ()) -> Connection:
        """Return the least busy connection of the least busy target; the caller releases it.

        Opens a connection if all of the target are busy and it may have more. Targets in `avoid`, or backing off, are
        used only if there is no other. Raises ValueError if the pool is closed.
        """
        with self._lock:
            if self._closed:
                raise ValueError("this client is closed")
            now = self._now()
            target = min(
                self._targets,
                key=lambda target: (
                    target in avoid,
                    max(0.0, target.backoff_until - now),
                    target.in_flight,
                    target.turn,
                ),
            )
            self._turns += 1
            target.turn = self._turns
            found = min(target.connections, key=lambda one: one.in_flight, default=None)
            if found is None or (found.in_flight and len(target.connections) < self._max_connections(target)):
                found = Connection(target, self._dial(target.name))
                target.connections.append(found)
            found.in_flight += 1
            return found

    def release(self, connection: Connection) -> None:
        with self._lock:
            connection.in_flight -= 1

    def has_alternative(self, avoid: Collection[Target]) -> bool:
        """Return whether a target is available that is neither in `avoid` nor backing off."""
        with self._lock:
            now = self._now()
            return any(target not in avoid and target.backoff_until <= now for target in self._targets)

    def failed(self, connection: Connection, hint: float | None) -> None:
        """Note that the target was unreachable or not ready; it expects to be ready in `hint` seconds."""
        with self._lock:
            target, now = connection.target, self._now()
            # It may come back as another process with other frontends.
            connection.frontend = None
            target.redials = 0
            if target.backoff_until <= now:  # otherwise an earlier call has noted this failure
                backoff = min(FIRST_BACKOFF * 2 ** min(target.failures, 10), LONGEST_BACKOFF)
                target.backoff_until = now + max(backoff, min(hint or 0.0, LONGEST_BACKOFF))
                target.failures += 1

    def answered(self, connection: Connection, frontend: int, frontends: int | None = None, model: str = "") -> None:
        """Note a response of process `frontend`, one of `frontends` if the response says so, and of `model`."""
        with self._lock:
            target = connection.target
            target.model = model
            target.failures, target.backoff_until = 0, 0.0
            target.frontends = max(target.frontends if frontends is None else frontends, frontend + 1)
            connection.frontend = frontend
            if not target.is_load_balanced and connection in target.connections and self._is_crowded(connection):
                target.redials += 1
                target.connections.remove(connection)
                self._retired.append(connection)

    def others(self, target: Target) -> list[Target]:
        """Return all other targets."""
        return [one for one in self._targets if one is not target]

    def take_idle(self) -> list[Any]:
        """Return, once, the retired channels without calls in flight; the caller closes them."""
        with self._lock:
            idle = [connection for connection in self._retired if not connection.in_flight]
            self._retired = [connection for connection in self._retired if connection.in_flight]
            return [connection.channel for connection in idle]

    def close(self) -> list[Any]:
        """Refuse further calls and return all channels, for the caller to close."""
        with self._lock:
            self._closed = True
            found = [*self._retired, *(one for target in self._targets for one in target.connections)]
            self._retired = []
            for target in self._targets:
                target.connections = []
            return [connection.channel for connection in found]

    def _max_connections(self, target: Target) -> int:
        return self._connections or min(target.frontends, MAX_CONNECTIONS)

    def _is_crowded(self, connection: Connection) -> bool:
        """Return whether another frontend has at least two connections fewer, so that a new dial can balance them."""
        target = connection.target
        if target.redials >= MAX_REDIALS * self._max_connections(target):
            return False
        counts = Counter(one.frontend for one in target.connections)
        # n connections leave at least one of n + 1 frontends without any: no more need to be counted.
        some = range(min(target.frontends, len(target.connections) + 1))
        least = min(counts[frontend] for frontend in some)
        return counts[connection.frontend] - least >= 2
