"""End a connection from our side: gRPC's Python lets a server cancel no call whose answer is not read."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
from contextlib import closing, suppress

log = logging.getLogger(__name__)


def close_connection(peer: str) -> None:
    """End the connection to `peer`, by gRPC's name of it; all its calls end with it. Does nothing where it is gone."""
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        with suppress(OSError, ValueError):  # no socket, one that listens or has no such address, or closed since
            descriptor = os.dup(int(name))
            try:
                connection = socket.socket(fileno=descriptor)
            except OSError:
                os.close(descriptor)
                continue
            with closing(connection):
                address = connection.getpeername()
                if isinstance(address, tuple) and _name(address[0], address[1]) == _read(peer):
                    connection.shutdown(socket.SHUT_RDWR)
                    log.warning("hung up on %s, which did not read its answer while others waited for the room", peer)
                    return


def _name(host: str, port: int) -> tuple[object, int]:
    address = ipaddress.ip_address(host.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address, port


def _read(peer: str) -> tuple[object, int]:
    """`ipv4:127.0.0.1:50000`, `ipv6:%5B::1%5D:50000`."""
    host, _, port = peer.partition(":")[2].rpartition(":")
    return _name(host.replace("%5B", "").replace("%5D", "").strip("[]"), int(port))
