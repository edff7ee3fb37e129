"""Check the TLS files of the gRPC port, and read how long the certificate is valid.

OpenSSL checks the files. Python's ssl module gives the dates of a peer's certificate only, so this module parses them:
two fields at a fixed place in a certificate that OpenSSL has accepted, which is not worth a dependency.
"""

from __future__ import annotations

import base64
import os
import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import NamedTuple

from dinov3_server.errors import ConfigError

SOON_SECONDS = 14 * 86400.0

_FIRST = re.compile(rb"-----BEGIN (?:X509 |TRUSTED )?CERTIFICATE-----\s(.+?)-----END", re.DOTALL)
_VERSION, _UTC_TIME = 0xA0, 0x17  # tags


class Lifetime(NamedTuple):
    """The first and last moment that a certificate is valid, in seconds since 1970."""

    begin: float
    end: float

    def warning(self, now: float) -> str:
        """Return what is wrong with it at the time `now`; empty if it stays valid for SOON_SECONDS."""
        if now < self.begin:
            return f"is not valid before {_date(self.begin)}: clients refuse it until then (or this clock is wrong)"
        if now > self.end:
            return f"expired on {_date(self.end)}: clients refuse it"
        if now > self.end - SOON_SECONDS:
            return f"expires on {_date(self.end)}, in {(self.end - now) / 86400:.1f} days"
        return ""


def lifetime(certificate: bytes) -> Lifetime:
    """Return the lifetime of the server's own certificate, the first in a PEM file that `check_files` has accepted.

    Raises ValueError for dates that do not follow RFC 5280, which OpenSSL does not check when it loads a file.
    """
    found = _FIRST.search(certificate)
    assert found is not None, "OpenSSL has read a certificate"
    # RFC 5280, section 4.1: a Certificate begins with its TBSCertificate, which has a version, a serial number, an
    # algorithm, an issuer and then the validity.
    _, whole = next(_elements(base64.b64decode(found[1])))
    _, signed = next(_elements(whole))
    fields = [content for tag, content in _elements(signed) if tag != _VERSION]
    begin, end = (_seconds(tag, content) for tag, content in _elements(fields[3]))
    return Lifetime(begin, end)


def check_files(names: tuple[str, str, str], certificate: bytes, key: bytes, authorities: bytes | None) -> None:
    """Raise ConfigError if the contents are not valid PEM; of those, gRPC would only say that it cannot listen.

    `names` are the paths of the certificate, the key and the authorities, for the message.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        with _as_file(certificate) as cert_file, _as_file(key) as key_file:
            context.load_cert_chain(
                cert_file, key_file, password=""
            )  # without it OpenSSL would prompt for a passphrase
    except ssl.SSLError as error:
        raise ConfigError(
            f"tls_cert_file {names[0]} and tls_key_file {names[1]} are not a PEM certificate and its private key "
            f"without a passphrase: {error.reason or error}"
        ) from None
    try:
        if authorities is not None:
            context.load_verify_locations(cadata=authorities.decode("ascii"))
    except (ssl.SSLError, ValueError):
        raise ConfigError(f"tls_client_ca_file {names[2]} contains no PEM certificate") from None


@contextmanager
def _as_file(content: bytes) -> Iterator[str]:
    """Yield the path of a memory file with `content`: ssl reads keys from files only, and those on disk may change."""
    descriptor = os.memfd_create("pem")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the tag and content of each DER element (X.690)."""
    position = 0
    while position < len(data):
        tag, length = data[position : position + 2]
        position += 2
        if length >= 0x80:
            size = length & 0x7F
            length = int.from_bytes(data[position : position + size], "big")
            position += size
        yield tag, data[position : position + length]
        position += length


def _seconds(tag: int, content: bytes) -> float:
    text = content.decode("ascii")
    if tag == _UTC_TIME:  # RFC 5280, section 4.1.2.5.1: two digits of the year, from 1950 on
        text = ("19" if text[:2] >= "50" else "20") + text
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp()


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
