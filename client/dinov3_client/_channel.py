"""How a connection is made: options, credentials, metadata."""

from __future__ import annotations

import os
import re
import ssl
from pathlib import Path

import grpc

# A connection on which nothing moves during a call is probed after the first and given up after the second, so that
# a peer that vanished is noticed well within the default deadline.
KEEPALIVE_TIME_MS = 30_000
KEEPALIVE_TIMEOUT_MS = 10_000
# gRPC's own pause between connection attempts grows to 2 minutes; a server that restarts is back sooner.
FIRST_RECONNECT_MS = 100
LONGEST_RECONNECT_MS = 2_000

OPTIONS: tuple[tuple[str, int], ...] = (
    # The server's limits are the limits (model().limits tells them); gRPC's default of 4 MB would only be in the way.
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # A connection of its own: channels with equal arguments share one otherwise.
    ("grpc.use_local_subchannel_pool", 1),
    # gRPC's retries ignore RetryInfo and give up on large requests; `_retry` does not.
    ("grpc.enable_retries", 0),
    ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.initial_reconnect_backoff_ms", FIRST_RECONNECT_MS),
    ("grpc.max_reconnect_backoff_ms", LONGEST_RECONNECT_MS),
)


# gRPC's own ways to name a server (its doc/naming.md), which it checks by itself.
_SCHEMES = ("dns:", "unix:", "unix-abstract:", "ipv4:", "ipv6:", "vsock:", "xds:")


def check_target(target: str) -> str:
    """gRPC alone would wait for the deadline, and take port 443 where none is given and 34463 for 99999."""
    if not isinstance(target, str):
        raise TypeError(f"target is a {type(target).__name__}; it must be the text HOST:PORT, as localhost:50051")
    found = re.fullmatch(r"(?:\[[^\[\]/]+\]|[^\[\]:/\s]+):([0-9]+)", target)
    if not target.startswith(_SCHEMES) and not (found and 0 < int(found[1]) < 65536):
        raise ValueError(
            f"target is {target!r}; it must be HOST:PORT, as localhost:50051 or [::1]:50051, with a port from 1 to "
            "65535 and without http://"
        )
    return target


def credentials(tls_ca: str | os.PathLike[str] | None) -> grpc.ChannelCredentials | None:
    """Of a server whose certificate the PEM file `tls_ca` vouches for; None is plain text."""
    if tls_ca is None:
        return None
    pem = Path(tls_ca).read_bytes()
    try:
        # gRPC would take it, and say at each call that it cannot connect.
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem.decode("ascii"))
    except (ssl.SSLError, ValueError):
        raise ValueError(f"tls_ca is {os.fspath(tls_ca)!r}, a file that holds no certificate in PEM") from None
    return grpc.ssl_channel_credentials(pem)


def metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    """What every call carries."""
    if token is None:
        return ()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError("token must be visible ASCII characters without spaces (is there a newline at its end?)")
    return (("authorization", f"Bearer {token}"),)
