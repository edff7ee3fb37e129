"""Divide a device fairly between callers that want it at the same time. Pure: no clock, no threads.

Start-time fair queueing (Goyal, Vin, Cheng 1997): every caller has a virtual time, the tokens that it was given; the
one with the least goes first. A caller that comes back starts where the others are: it saves up nothing by being away,
and owes what it took in advance.

There are two levels. A *group* is a token where calls bring one, else a peer address; within it each *connection* has
its part. So a caller gains nothing by opening more connections.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

# Callers without work that are remembered because they took more than their part.
_MOST_AWAY = 1024


class Caller(NamedTuple):
    """Whose request it is. Both names are opaque."""

    group: str
    connection: str


ANONYMOUS = Caller("", "")


@dataclass(slots=True)
class _Member:
    time: float = 0.0
    jobs: int = 0


@dataclass(slots=True)
class _Level:
    """Members that share one parent's part."""

    members: dict[str, _Member] = field(default_factory=dict)
    time: float = 0.0  # of the last that was served
    jobs: int = 0  # of all members

    def enter(self, name: str) -> None:
        member = self.members.setdefault(name, _Member())
        if not member.jobs:
            member.time = max(member.time, self.time)
        member.jobs += 1
        self.jobs += 1

    def leave(self, name: str) -> None:
        member = self.members[name]
        member.jobs -= 1
        self.jobs -= 1
        if not member.jobs and (member.time <= self.time or len(self.members) > _MOST_AWAY):
            del self.members[name]

    def charge(self, name: str, tokens: int) -> None:
        member = self.members[name]
        self.time = max(self.time, member.time)
        member.time += tokens


class Shares:
    """The virtual times of all callers that have jobs in a queue."""

    def __init__(self) -> None:
        self._groups = _Level()
        self._connections: dict[str, _Level] = {}

    def enter(self, caller: Caller) -> None:
        """Count a job of `caller` that came into the queue."""
        self._groups.enter(caller.group)
        self._connections.setdefault(caller.group, _Level()).enter(caller.connection)

    def leave(self, caller: Caller) -> None:
        """Count a job of `caller` that left the queue."""
        self._groups.leave(caller.group)
        level = self._connections[caller.group]
        level.leave(caller.connection)
        if not level.jobs and caller.group not in self._groups.members:
            del self._connections[caller.group]

    def charge(self, caller: Caller, tokens: int) -> None:
        """Note that `caller`, who has a job in the queue, was given `tokens` of the device."""
        self._groups.charge(caller.group, tokens)
        self._connections[caller.group].charge(caller.connection, tokens)

    def rank(self, caller: Caller) -> tuple[float, float]:
        """Return the place of `caller` among those that have jobs; the lowest goes first."""
        level = self._connections[caller.group]
        return self._groups.members[caller.group].time, level.members[caller.connection].time
