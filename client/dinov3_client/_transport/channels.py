"""The arguments of a gRPC channel: options, credentials, metadata."""

from __future__ import annotations

import json
import numbers
import os
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from dinov3_client._transport import proxy

PathLike = str | os.PathLike[str]

# Seconds. A connection without traffic during a call is pinged after `keepalive`, and closed if no reply comes within
# the timeout, so that a lost peer is noticed well within the default deadline.
KEEPALIVE = 30.0
KEEPALIVE_TIMEOUT = 10.0
# Servers close connections that are pinged more often.
MIN_KEEPALIVE = 5.0
# gRPC's own pause between connection attempts grows to 2 minutes; a server that restarts is back sooner.
FIRST_RECONNECT_MS = 100
LONGEST_RECONNECT_MS = 2_000
# Of one attempt to connect; gRPC's default is 20 s; a reachable host needs far less.
CONNECT_TIMEOUT_MS = 5_000

_OPTIONS: tuple[tuple[str, Any], ...] = (
    # No limit of our own: the server's apply (model().limits). gRPC's default is 4 MB.
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # Features do not compress, and a small response could unpack to any size: refuse compressed ones. The
    # bits are gRPC's numbers of algorithms; 0 is none.
    ("grpc.compression_enabled_algorithms_bitset", 1),
    # Without this, channels with equal arguments share one connection.
    ("grpc.use_local_subchannel_pool", 1),
    # gRPC's retries ignore RetryInfo and give up on large requests; `retry.Attempts` does neither.
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", FIRST_RECONNECT_MS),
    ("grpc.max_reconnect_backoff_ms", LONGEST_RECONNECT_MS),
    ("grpc.min_reconnect_backoff_ms", CONNECT_TIMEOUT_MS),
)
_ROUND_ROBIN = ("grpc.service_config", json.dumps({"loadBalancingConfig": [{"round_robin": {}}]}))


def options(target: str, keepalive: float | None) -> tuple[tuple[str, Any], ...]:
    """Return the channel arguments for `target`; `keepalive` in seconds, None for no pings."""
    found = _OPTIONS + proxy.options(target)
    if target.startswith("dns:"):
        found += (_ROUND_ROBIN,)
    if keepalive is not None:
        found += (
            ("grpc.keepalive_time_ms", round(keepalive * 1000)),
            ("grpc.keepalive_timeout_ms", round(KEEPALIVE_TIMEOUT * 1000)),
            # Otherwise gRPC stops after two pings while the server sends nothing.
            ("grpc.http2.max_pings_without_data", 0),
        )
    return found


def check_keepalive(keepalive: float | None) -> float | None:
    if keepalive is None:
        return None
    if not isinstance(keepalive, numbers.Real) or isinstance(keepalive, bool):
        raise TypeError(f"keepalive is {keepalive!r}; it must be seconds, or None for no pings")
    if not MIN_KEEPALIVE <= keepalive < float("inf"):
        raise ValueError(
            f"keepalive is {keepalive!r}; it must be at least {MIN_KEEPALIVE:g} seconds (servers close "
            "connections that are pinged more often), or None for no pings"
        )
    return keepalive


@dataclass(frozen=True)
class Tls:
    """PEM bytes, checked here: gRPC accepts anything, and then reports at each call that it cannot connect."""

    ca: bytes | None
    cert: bytes | None
    key: bytes | None

    def credentials(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(self.ca, self.key, self.cert)


def read_tls(ca: PathLike | None, cert: PathLike | None, key: PathLike | None) -> Tls | None:
    """Read and check PEM files; return None (plain text) if none is given. Raises OSError or ValueError."""
    if (cert is None) != (key is None):
        given, missing = ("tls_key", "tls_cert") if cert is None else ("tls_cert", "tls_key")
        raise ValueError(f"{given} is given without {missing}; a client certificate needs both")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    ca_pem = cert_pem = key_pem = None
    if ca is not None:
        ca_pem = Path(ca).read_bytes()
        try:
            context.load_verify_locations(cadata=ca_pem.decode("ascii"))
        except (ssl.SSLError, ValueError):
            raise ValueError(f"tls_ca is {os.fspath(ca)!r}, which contains no PEM certificate") from None
    if cert is not None and key is not None:
        cert_pem, key_pem = Path(cert).read_bytes(), Path(key).read_bytes()
        try:
            context.load_cert_chain(cert, key, password="")  # else OpenSSL asks for a passphrase
        except (ssl.SSLError, ValueError) as error:
            reason = error.reason if isinstance(error, ssl.SSLError) and error.reason else error
            raise ValueError(
                f"tls_cert {os.fspath(cert)!r} and tls_key {os.fspath(key)!r} are no PEM certificate with its private "
                f"key (without passphrase): {reason}"
            ) from None
    return None if ca_pem is None and cert_pem is None else Tls(ca_pem, cert_pem, key_pem)


def metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    """Return the metadata of every call."""
    if token is None:
        return ()
    if not isinstance(token, str):
        raise TypeError(f"token is a {type(token).__name__}; it must be text")
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError("token must consist of visible ASCII characters without spaces (does it end in a newline?)")
    return (("authorization", f"Bearer {token}"),)
