"""What a call does, without doing it.

A flow is a generator that yields steps, is sent the outcome of each, and returns its result. `_client` performs the
steps by blocking and `_async_client` by awaiting; what they decide is written once (`_session`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Rpc:
    """A unary call: bytes out, bytes in. It may raise grpc.RpcError."""

    channel: Any
    method: str
    message: bytes
    timeout: float
    """Seconds."""
    metadata: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Pause:
    seconds: float


@dataclass(frozen=True)
class Work:
    """A function that takes time or reads files, and so must not hold an event loop up. The outcome is its value."""

    function: Callable[[], Any]


@dataclass(frozen=True)
class Together:
    """Several flows, `at_once` of them at a time. The outcome is the list of their results; the first error cancels
    the others, which have ended when it is raised."""

    flows: Sequence[Generator[Step, Any, Any]]
    at_once: int


@dataclass(frozen=True)
class Close:
    """A connection that nobody uses any more."""

    channel: Any


Step = Rpc | Pause | Work | Together | Close
Flow = Generator[Step, Any, T]
