"""The I/O of a call, described and not done ("sans-I/O"), so that both clients share one logic (`_session`).

A procedure is a generator that yields effects, is sent the outcome of each, and returns its result. `blocking.run`
executes the effects by blocking, `AsyncClient` by awaiting.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Rpc:
    """Make a unary call; the outcome is the bytes of the response. May raise grpc.RpcError."""

    channel: Any
    method: str
    message: bytes
    timeout: float
    """Seconds."""
    metadata: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Sleep:
    """Wait."""

    seconds: float


@dataclass(frozen=True)
class Offload:
    """Call a function that is slow or reads files and must not block an event loop. The outcome is its return value."""

    function: Callable[[], Any]


@dataclass(frozen=True)
class Gather:
    """Run several procedures, at most `limit` at a time. The outcome is the list of their results.

    The first error cancels the others and is raised after they have ended.
    """

    procedures: Sequence[Generator[Effect, Any, Any]]
    limit: int


@dataclass(frozen=True)
class CloseChannel:
    """Close a channel that no call uses any more."""

    channel: Any


Effect = Rpc | Sleep | Offload | Gather | CloseChannel
Procedure = Generator[Effect, Any, T]
