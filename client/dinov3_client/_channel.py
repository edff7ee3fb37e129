"""How a connection is made: options, credentials, metadata."""

from __future__ import annotations

import os
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


def credentials(tls_ca: str | os.PathLike[str] | None) -> grpc.ChannelCredentials | None:
    """Of a server whose certificate the PEM file `tls_ca` vouches for; None is plain text."""
    return None if tls_ca is None else grpc.ssl_channel_credentials(Path(tls_ca).read_bytes())


def metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    """What every call carries."""
    if token is None:
        return ()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError("token must be visible ASCII characters without spaces (is there a newline at its end?)")
    return (("authorization", f"Bearer {token}"),)
