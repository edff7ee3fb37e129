"""Identify the caller of a call, so that the scheduler can divide the device fairly."""

from __future__ import annotations

import hashlib
import ipaddress
from functools import lru_cache

from dinov3_server.api.interceptors import Context
from dinov3_server.engine.shares import Caller


def caller_of(context: Context, by_token: bool) -> Caller:
    """Return the caller of a call: the group is its token if the server requires one, else the address of its peer.

    Within a group, each connection is a caller.
    """
    peer = context.peer()
    if by_token:
        for key, value in context.invocation_metadata() or ():
            if key == "authorization":
                return Caller(_digest(value), peer)
    return Caller(_address(peer), peer)


@lru_cache(maxsize=1024)
def _digest(token: str | bytes) -> str:
    """Return a name for a token that does not reveal it: names are sent to other processes."""
    return hashlib.blake2b(token.encode() if isinstance(token, str) else token, digest_size=8).hexdigest()


@lru_cache(maxsize=4096)
def _address(peer: str) -> str:
    """Return the address of a peer without its port. `peer` is `ipv4:127.0.0.1:50000` or `ipv6:[::1]:50000`.

    An IPv6 address is cut to its first 64 bits, as one machine can use all addresses of the rest.
    """
    scheme, _, address = peer.partition(":")
    if scheme == "ipv6":
        host = address.rpartition(":")[0].replace("%5B", "[").replace("%5D", "]").strip("[]").partition("%")[0]
        try:
            return str(ipaddress.IPv6Network((host, 64), strict=False))
        except ValueError:
            return host
    return address.rpartition(":")[0] or address
