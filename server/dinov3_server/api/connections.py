"""Close a caller's connection. gRPC's Python API cannot cancel a call from the server while its answer is unread."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
from contextlib import closing, suppress

log = logging.getLogger(__name__)


def close_connection(peer: str) -> None:
    """Shut down the connection to `peer`, a name by gRPC, and with it all its calls. Do nothing if it is gone."""
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
                if isinstance(address, tuple) and _normalize(address[0], address[1]) == _parse(peer):
                    connection.shutdown(socket.SHUT_RDWR)
                    log.warning(
                        "closed the connection to %s: it did not read its answer while others waited for memory", peer
                    )
                    return


def _normalize(host: str, port: int) -> tuple[object, int]:
    address = ipaddress.ip_address(host.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address, port


def _parse(peer: str) -> tuple[object, int]:
    """Parse gRPC's name of a peer: `ipv4:127.0.0.1:50000` or `ipv6:%5B::1%5D:50000`."""
    host, _, port = peer.partition(":")[2].rpartition(":")
    return _normalize(host.replace("%5B", "").replace("%5D", "").strip("[]"), int(port))
