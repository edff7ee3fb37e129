"""Share a device fairly between callers, by start-time fair queueing (Goyal, Vin, Cheng 1997).

Every caller has a virtual time, the tokens that it was given; the caller with the least goes first. A caller that comes
back starts at the time of the others: it saves up nothing while it is away, and still owes what it took in advance.

There are two levels. A *group* is an access token if calls carry one, else a peer address; within a group each
*connection* has an equal share. So a caller gains nothing by opening more connections. Pure: without clock and threads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

# How many callers without jobs are remembered because they took more than their share.
_MAX_IDLE_MEMBERS = 1024


class Caller(NamedTuple):
    """The sender of a request. Both names are opaque."""

    group: str
    connection: str


ANONYMOUS = Caller("", "")


@dataclass(slots=True)
class _Member:
    """The virtual time of one caller, and its queued jobs."""

    time: float = 0.0
    jobs: int = 0


@dataclass(slots=True)
class _Level:
    """Members that share one device, or the share of one group."""

    members: dict[str, _Member] = field(default_factory=dict)
    time: float = 0.0  # of the member that was served last
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
        if not member.jobs and (member.time <= self.time or len(self.members) > _MAX_IDLE_MEMBERS):
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
        """Count a job of `caller` that enters the queue."""
        self._groups.enter(caller.group)
        self._connections.setdefault(caller.group, _Level()).enter(caller.connection)

    def leave(self, caller: Caller) -> None:
        """Count a job of `caller` that leaves the queue."""
        self._groups.leave(caller.group)
        level = self._connections[caller.group]
        level.leave(caller.connection)
        if not level.jobs and caller.group not in self._groups.members:
            del self._connections[caller.group]

    def charge(self, caller: Caller, tokens: int) -> None:
        """Charge `caller`, which has a job in the queue, for `tokens` of the device."""
        self._groups.charge(caller.group, tokens)
        self._connections[caller.group].charge(caller.connection, tokens)

    def rank(self, caller: Caller) -> tuple[float, float]:
        """Return the rank of `caller` among those that have jobs; the lowest goes first."""
        level = self._connections[caller.group]
        return self._groups.members[caller.group].time, level.members[caller.connection].time
