"""Peers of connections, by gRPC's names: identify the caller of a call, count calls, close connections.

gRPC's Python API cannot end a call whose answer is unread.
"""

from __future__ import annotations

import hashlib
import ipaddress
import logging
import os
import socket
from collections import Counter
from collections.abc import Collection
from contextlib import closing, suppress
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import unquote

from dinov3_server.engine.shares import Caller

if TYPE_CHECKING:
    from dinov3_server.api.interceptors import Context

log = logging.getLogger(__name__)

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address


def caller_of(context: Context, by_token: bool) -> Caller:
    """Return the caller of a call: the group is its token if the server requires one, else the address of its peer.

    Within a group, each connection is a caller.
    """
    peer = context.peer()
    if by_token:
        for key, value in context.invocation_metadata() or ():
            if key == "authorization":
                return Caller(_digest(value), peer)
    return Caller(peer_group(peer), peer)


@lru_cache(maxsize=1024)
def _digest(token: str | bytes) -> str:
    """Return a name for a token that does not reveal it: names are sent to other processes."""
    return hashlib.blake2b(token.encode() if isinstance(token, str) else token, digest_size=8).hexdigest()


@lru_cache(maxsize=4096)
def peer_group(peer: str) -> str:
    """Return the address of a peer without its port, as a caller may open many connections.

    An IPv6 address is cut to its first 64 bits, as one machine can use all addresses of the rest.
    """
    try:
        address, _ = _parse(peer)
    except ValueError:
        return peer.rpartition(":")[0] or peer
    return str(ipaddress.ip_network((address, 64), strict=False) if address.version == 6 else address)


class OpenCalls:
    """The open calls of a frontend, of which there should be at most `most`."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._calls = Counter[str]()  # by connection, as gRPC names its peer

    def add(self, context: Any) -> None:
        """Count the call of `context` until it has ended, with its answer read."""
        peer = context.peer()
        self._calls[peer] += 1
        context.add_done_callback(partial(self._remove, peer))

    def connections_to_close(self) -> list[str]:
        """Return the connections without which there are few enough calls: first those of the address with the most
        calls, and of these the ones with the most calls."""
        excess = self._calls.total() - self._most
        if excess <= 0:
            return []
        of_address = Counter[str]()
        for peer, calls in self._calls.items():
            of_address[peer_group(peer)] += calls
        chosen = []
        for peer in sorted(self._calls, key=lambda peer: (-of_address[peer_group(peer)], -self._calls[peer])):
            chosen.append(peer)
            excess -= self._calls[peer]
            if excess <= 0:
                break
        return chosen

    def _remove(self, peer: str, _: object) -> None:
        self._calls[peer] -= 1
        if not self._calls[peer]:
            del self._calls[peer]


def close_connections(peers: Collection[str], reason: str) -> None:
    """Shut down the connections to `peers`, names by gRPC, and with them all their calls. Skip those that are gone."""
    wanted = set(map(_parse, peers))
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        with suppress(OSError, ValueError):  # not a socket, not connected, or closed by now
            descriptor = os.dup(int(name))
            try:
                connection = socket.socket(fileno=descriptor)
            except OSError:
                os.close(descriptor)
                continue
            with closing(connection):
                address = connection.getpeername()
                if isinstance(address, tuple) and (_address(address[0]), address[1]) in wanted:
                    connection.shutdown(socket.SHUT_RDWR)
    log.warning("closed %d connections, such as that to %s: %s", len(peers), next(iter(peers)), reason)


def _parse(peer: str) -> tuple[Address, int]:
    """Parse gRPC's name of a peer: `ipv4:127.0.0.1:50000` or `ipv6:%5B::1%5D:50000`. Raises ValueError for others."""
    host, _, port = unquote(peer.partition(":")[2]).rpartition(":")
    return _address(host.strip("[]")), int(port)


def _address(host: str) -> Address:
    """Parse an address, without its zone. One of IPv4 may be written in IPv6, by sockets that take both."""
    address = ipaddress.ip_address(host.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address
