"""The targets of a client: every spelling of one server or several."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

# gRPC's own naming schemes (its doc/naming.md), which gRPC checks itself.
_SCHEMES = ("dns:", "unix:", "unix-abstract:", "vsock:", "xds:")
# Lists of addresses, each of which becomes a target: gRPC would send all calls to the first that answers.
_ADDRESSES = ("ipv4:", "ipv6:")
_NOT_LISTS = ("unix:", "unix-abstract:", "vsock:", "xds:")  # their names may contain commas


def check_targets(target: str | Sequence[str]) -> tuple[str, ...]:
    """Return the targets as a tuple, one for each server that is named. Raises ValueError or TypeError."""
    given = (target,) if isinstance(target, str | bytes) or not isinstance(target, Sequence) else tuple(target)
    targets = [one for text in given for one in _split(text)]
    if not targets:
        raise ValueError("target is empty; name at least one server, as localhost:50051")
    for index, one in enumerate(targets):
        _check(one)
        if one in targets[:index]:
            raise ValueError(f"target names {one!r} twice; `connections` is how many there are to one server")
    return tuple(targets)


def host_of(target: str) -> str | None:
    """Return the name or address of a target's host; None of a socket of this machine and of xds."""
    if target.startswith(_NOT_LISTS):
        return None
    address = target.removeprefix("dns:")
    if address.startswith("//"):  # dns://AUTHORITY/HOST:PORT
        address = address[2:].partition("/")[2]
    for scheme in _ADDRESSES:
        address = address.removeprefix(scheme)
    found = re.fullmatch(r"\[([^\]]+)\](?::\d+)?", address)
    return found[1] if found else address.rpartition(":")[0] if address.count(":") == 1 else address


def _split(text: str) -> list[str]:
    if not isinstance(text, str):
        raise TypeError(
            f"target is a {type(text).__name__}; it must be the text HOST:PORT, as localhost:50051, or a sequence of "
            "such texts"
        )
    if "," not in text or text.startswith(_NOT_LISTS):
        return [text]
    scheme = next((scheme for scheme in _ADDRESSES if text.startswith(scheme)), "")
    parts = [part.strip() for part in text.removeprefix(scheme).split(",")]
    return [scheme + part for part in parts if part]


def _check(target: str) -> None:
    """Raise ValueError for a bad target, for which gRPC would wait until the deadline.

    gRPC also takes port 443 if none is given, and 34463 for 99999.
    """
    scheme = next((scheme for scheme in _ADDRESSES if target.startswith(scheme)), "")
    found = re.fullmatch(r"(?:\[[^\[\]/]+\]|[^\[\]:/\s]+):([0-9]+)", target.removeprefix(scheme))
    valid = bool(found) and 0 < int(found[1]) < 65536 if found else False
    if valid and scheme:
        try:
            valid = ipaddress.ip_address(host_of(target) or "").version == int(scheme[3])
        except ValueError:
            valid = False
    if not valid and not target.startswith(_SCHEMES):
        raise ValueError(
            f"target is {target!r}; it must be HOST:PORT, as localhost:50051 or [::1]:50051, with a port from 1 to "
            "65535 and without http://"
            + (f"; after {scheme} HOST is an address, as {scheme}{_EXAMPLES[scheme]}" if scheme else "")
        )


_EXAMPLES = {"ipv4:": "10.0.0.1:50051,10.0.0.2:50051", "ipv6:": "[fd00::1]:50051,[fd00::2]:50051"}
