"""Count the calls of each connection, and close connections. gRPC's Python API cannot end a call whose answer is
unread."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
from collections import Counter
from collections.abc import Collection
from contextlib import closing, suppress
from functools import partial
from typing import Any

log = logging.getLogger(__name__)


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
            of_address[address_of(peer)] += calls
        chosen = []
        for peer in sorted(self._calls, key=lambda peer: (-of_address[address_of(peer)], -self._calls[peer])):
            chosen.append(peer)
            excess -= self._calls[peer]
            if excess <= 0:
                break
        return chosen

    def _remove(self, peer: str, _: object) -> None:
        self._calls[peer] -= 1
        if not self._calls[peer]:
            del self._calls[peer]


def address_of(peer: str) -> str:
    """Return `peer` without its port: a caller may open many connections."""
    return peer.rpartition(":")[0]


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
                if isinstance(address, tuple) and _normalize(address[0], address[1]) in wanted:
                    connection.shutdown(socket.SHUT_RDWR)
    log.warning("closed %d connections, such as that to %s: %s", len(peers), next(iter(peers)), reason)


def _normalize(host: str, port: int) -> tuple[object, int]:
    address = ipaddress.ip_address(host.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address, port


def _parse(peer: str) -> tuple[object, int]:
    """Parse gRPC's name of a peer: `ipv4:127.0.0.1:50000` or `ipv6:%5B::1%5D:50000`."""
    host, _, port = peer.partition(":")[2].rpartition(":")
    return _normalize(host.replace("%5B", "").replace("%5D", "").strip("[]"), int(port))
