"""Tokens, and the TLS certificate, key and authorities: read at start, and again when their files change.

Contents are compared, not times or inodes: so a file that is overwritten, one that another is renamed over, and the
symbolic links that Kubernetes swaps are all alike. A new content that is of no use leaves the one before in use.
"""

from __future__ import annotations

import hmac
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import grpc

from dinov3_server.api.tls import Lifetime, check_files, lifetime
from dinov3_server.config.settings import Settings
from dinov3_server.errors import ConfigError
from dinov3_server.metrics import Metrics

log = logging.getLogger(__name__)

T = TypeVar("T")
Contents = dict[str, bytes]


class Watched(Generic[T]):
    """What files hold: `value`. `paths` is by setting; `parse` makes the value of their contents.

    Raises ConfigError, as `parse` may, where they are of no use.
    """

    def __init__(self, kind: str, paths: Mapping[str, str], parse: Callable[[Contents], T], metrics: Metrics) -> None:
        self._kind = kind
        self._paths = paths
        self._parse = parse
        self._failed = metrics.reload_failed
        self._seen: Contents | str = self._read()
        self.value = parse(self._seen)
        self._failed.set(0, kind)

    def reload(self, forced: bool = False) -> bool:
        """Whether there is a new value. Contents that were seen before are left alone unless `forced`."""
        found: Contents | str
        try:
            found = self._read()
        except ConfigError as error:
            found = str(error)
        if found == self._seen and not forced:
            return False
        self._seen = found
        try:
            if isinstance(found, str):
                raise ConfigError(found)
            self.value = self._parse(found)
        except ConfigError as error:
            self._failed.set(1, self._kind)
            log.error("%s; what was read before stays in use until the file changes again or SIGHUP comes", error)
            return False
        self._failed.set(0, self._kind)
        log.info("read again: %s", ", ".join(self._paths.values()))
        return True

    def _read(self) -> Contents:
        return {setting: _content(path, setting) for setting, path in self._paths.items()}


class Tls(NamedTuple):
    configuration: Any  # gRPC's
    lifetime: Lifetime


class Credentials:
    """Of a frontend. `tokens` and `port` are for the server; `reload` may be called from any thread."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        """Raises ConfigError for a file that the settings name and that is of no use."""
        self._metrics = metrics
        self._lock = threading.Lock()
        self._told = ""
        self._pending: deque[Any] = deque(maxlen=1)  # what gRPC has not taken yet
        self.tokens: Tokens | None = None
        self._tls: Watched[Tls] | None = None
        self._certificate = settings.tls_cert_file
        self._mutual = settings.tls_client_ca_file is not None
        if settings.token_file is not None:
            self.tokens = Tokens(
                Watched("tokens", {"token_file": settings.token_file}, partial(_tokens, settings.token_file), metrics)
            )
        if settings.tls_cert_file is not None:
            names = ("tls_cert_file", "tls_key_file", "tls_client_ca_file")
            self._paths = {name: path for name in names if (path := getattr(settings, name)) is not None}
            self._tls = Watched("tls", self._paths, self._read_tls, metrics)
        self.update_gauges()

    def port(self) -> grpc.ServerCredentials | None:
        """What the port is opened with; None for plain text."""
        if self._tls is None:
            return None
        return grpc.dynamic_ssl_server_credentials(self._tls.value.configuration, self._changed, self._mutual)

    def reload(self, forced: bool = False) -> None:
        """Read files again that have changed; `forced`, all."""
        with self._lock:
            if self.tokens is not None:
                self.tokens.watched.reload(forced)
            if self._tls is not None and self._tls.reload(forced):
                self._pending.append(self._tls.value.configuration)

    def update_gauges(self) -> None:
        """Set the gauge of the certificate's rest, and log once when it comes to its end."""
        if self._tls is None:
            return
        now, of = time.time(), self._tls.value.lifetime
        self._metrics.tls_expiry_seconds.set(of.end - now)
        complaint = of.complaint(now)
        # By its first word: in how many days it expires changes all the time.
        if complaint and complaint.split()[0] != self._told:
            log.warning("the TLS certificate %s %s", self._certificate, complaint)
        self._told = complaint and complaint.split()[0]

    def _changed(self) -> Any:
        """gRPC asks before each handshake; None: as it was."""
        try:
            return self._pending.pop()
        except IndexError:
            return None

    def _read_tls(self, contents: Contents) -> Tls:
        certificate, key = contents["tls_cert_file"], contents["tls_key_file"]
        authorities = contents.get("tls_client_ca_file")
        named = self._paths
        check_files(
            (named["tls_cert_file"], named["tls_key_file"], named.get("tls_client_ca_file", "")),
            certificate, key, authorities,
        )  # fmt: skip
        try:
            dates = lifetime(certificate)
        except ValueError as error:
            raise ConfigError(f"tls_cert_file {named['tls_cert_file']} has a date of no use: {error}") from None
        return Tls(grpc.ssl_server_certificate_configuration([(key, certificate)], authorities), dates)


class Tokens:
    """Whether a call's metadata has one of them. The file may change between any two questions."""

    def __init__(self, watched: Watched[list[bytes]]) -> None:
        self.watched = watched

    def refusal(self, metadata: Iterable[tuple[str, str | bytes]]) -> str:
        """Why a call with this metadata is refused; empty where it is not."""
        given = [value for key, value in metadata if key == "authorization"]
        if len(given) == 1 and self._known(given[0]):
            return ""
        return "the token is not one of this server's" if given else "this server wants a token"

    def _known(self, given: str | bytes) -> bool:
        scheme, _, token = (given.encode() if isinstance(given, str) else given).partition(b" ")
        # Every one of them is compared, in constant time: how long it takes tells nothing of a token.
        tokens = self.watched.value
        return scheme.lower() == b"bearer" and sum(hmac.compare_digest(token, known) for known in tokens) > 0


def _tokens(path: str, contents: Contents) -> list[bytes]:
    content = contents["token_file"]
    if not content.isascii():
        raise ConfigError(f"token_file {path} holds other characters than ASCII, which no client can send")
    if not content.split():
        raise ConfigError(f"token_file {path} is empty: it must hold a token, or several, one a line")
    return content.split()


def _content(path: str, setting: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {setting} {path}: {error.strerror}") from None
