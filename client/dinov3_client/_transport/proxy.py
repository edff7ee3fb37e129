"""The proxy of a target, by the environment variables that gRPC reads, in the spellings that others read too."""

from __future__ import annotations

import ipaddress
import os
from contextlib import suppress
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from dinov3_client._transport.targets import host_of

# The first that is set counts, as in gRPC, which knows the lower-case ones only.
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
_EXCEPTIONS = ("no_grpc_proxy", "no_proxy")


class Proxy(NamedTuple):
    """An HTTP proxy, asked to CONNECT to the target."""

    url: str
    variable: str
    """The environment variable that names it."""

    def __str__(self) -> str:
        """The proxy for messages, without a password."""
        found = urlsplit(self.url)
        address = f"{found.scheme}://{found.netloc.rpartition('@')[2]}"
        return f"{address} (from {self.variable}; no_proxy names hosts to reach directly)"


def find(target: str) -> Proxy | None:
    """Return the proxy for connections to `target`; None if they are direct: always those of this machine."""
    host = host_of(target)
    if host is None or _is_loopback(host):
        return None
    for name in _PROXIES:
        for variable in (name, name.upper()):
            if url := os.environ.get(variable, "").strip():
                url = url if "://" in url else f"http://{url}"
                # gRPC connects directly for proxies of other schemes.
                return Proxy(url, variable) if url.startswith("http://") and not _is_excepted(host) else None
    return None


def options(target: str) -> tuple[tuple[str, Any], ...]:
    """Return the channel arguments for the proxy of `target`, or for none."""
    proxy = find(target)
    return (("grpc.enable_http_proxy", 0),) if proxy is None else (("grpc.http_proxy", proxy.url),)


def _is_loopback(host: str) -> bool:
    host = host.lower().rstrip(".")
    if host == "localhost" or host.endswith(".localhost"):
        return True
    with suppress(ValueError):
        address: Any = ipaddress.ip_address(host)
        address = getattr(address, "ipv4_mapped", None) or address
        return bool(address.is_loopback or address.is_unspecified)
    return False


def _is_excepted(host: str) -> bool:
    """Return whether a no_proxy variable has `host`: its name or a suffix of it, its address, a network, or `*`."""
    host = host.lower()
    text = next((os.environ[name] for each in _EXCEPTIONS for name in (each, each.upper()) if os.environ.get(name)), "")
    for entry in text.lower().split(","):
        entry = entry.strip()
        if not entry:
            continue
        if entry == "*" or host == entry or host.endswith(entry.removeprefix("*")):
            return True
        with suppress(ValueError):
            if ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False):
                return True
    return False
