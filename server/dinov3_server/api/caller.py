"""Tell callers apart, so that each gets its share of the server."""

from __future__ import annotations

import hashlib
import ipaddress
from functools import lru_cache

from dinov3_server.api.interceptors import Context
from dinov3_server.engine.shares import Caller


def caller_of(context: Context, by_token: bool) -> Caller:
    """Return the caller of a call: its token where every call brings one, else the address of its peer.

    Callers of one group are told apart by their connection.
    """
    peer = context.peer()
    if by_token:
        for key, value in context.invocation_metadata() or ():
            if key == "authorization":
                return Caller(_digest(value), peer)
    return Caller(_address(peer), peer)


@lru_cache(maxsize=1024)
def _digest(token: str | bytes) -> str:
    """Name a token without telling it: callers' names reach other processes."""
    return hashlib.blake2b(token.encode() if isinstance(token, str) else token, digest_size=8).hexdigest()


@lru_cache(maxsize=4096)
def _address(peer: str) -> str:
    """Return the address in gRPC's name of a peer, without the port: `ipv4:127.0.0.1:50000`, `ipv6:[::1]:50000`.

    Of IPv6 the first 64 bits: one machine has the rest to itself.
    """
    scheme, _, address = peer.partition(":")
    if scheme == "ipv6":
        host = address.rpartition(":")[0].replace("%5B", "[").replace("%5D", "]").strip("[]").partition("%")[0]
        try:
            return str(ipaddress.IPv6Network((host, 64), strict=False))
        except ValueError:
            return host
    return address.rpartition(":")[0] or address
