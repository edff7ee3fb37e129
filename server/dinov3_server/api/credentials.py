"""Read tokens and the TLS certificate, key and authorities at start, and again when their files change.

Contents are compared, not times or inodes: a file may be overwritten, replaced by a rename, or reached through the
symbolic links that Kubernetes swaps. If the new content is invalid, the previous one stays in use.
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
from dinov3_server.errors import ConfigError, Unauthenticated
from dinov3_server.metrics import Metrics

log = logging.getLogger(__name__)

T = TypeVar("T")
Contents = dict[str, bytes]


class ReloadableFiles(Generic[T]):
    """Files and the `value` that `parse` makes of their contents. Paths and contents are by setting.

    The constructor raises ConfigError if a file cannot be read, or as `parse` does.
    """

    def __init__(self, kind: str, paths: Mapping[str, str], parse: Callable[[Contents], T], metrics: Metrics) -> None:
        self._kind = kind
        self._paths = paths
        self._parse = parse
        self._failed = metrics.reload_failed
        self._contents: Contents | str = self._read()
        self.value = parse(self._contents)
        self._failed.set(0, kind)

    def reload(self, forced: bool = False) -> bool:
        """Read the files again and return whether `value` is new. Unchanged contents are ignored unless `forced`."""
        found: Contents | str  # contents, or why they cannot be read
        try:
            found = self._read()
        except ConfigError as error:
            found = str(error)
        if found == self._contents and not forced:
            return False
        self._contents = found
        try:
            if isinstance(found, str):
                raise ConfigError(found)
            self.value = self._parse(found)
        except ConfigError as error:
            self._failed.set(1, self._kind)
            log.error("%s; the previous content stays in use until the file changes again or SIGHUP is received", error)
            return False
        self._failed.set(0, self._kind)
        log.info("reloaded %s", ", ".join(self._paths.values()))
        return True

    def _read(self) -> Contents:
        return {setting: _read_file(path, setting) for setting, path in self._paths.items()}


class Tls(NamedTuple):
    configuration: Any  # of gRPC
    lifetime: Lifetime


class Credentials:
    """The tokens and TLS files of a frontend. `reload` may be called from any thread."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        """Raises ConfigError for a file that cannot be read or is invalid."""
        self._metrics = metrics
        self._lock = threading.Lock()
        self._last_warning = ""
        self._pending: deque[Any] = deque(maxlen=1)  # a new configuration that gRPC has not fetched yet
        self.tokens: BearerTokens | None = None
        self._tls: ReloadableFiles[Tls] | None = None
        self._certificate = settings.tls_cert_file
        self._mutual = settings.tls_client_ca_file is not None
        if settings.token_file is not None:
            self.tokens = BearerTokens(settings.token_file, metrics)
        if settings.tls_cert_file is not None:
            names = ("tls_cert_file", "tls_key_file", "tls_client_ca_file")
            self._paths = {name: path for name in names if (path := getattr(settings, name)) is not None}
            self._tls = ReloadableFiles("tls", self._paths, self._read_tls, metrics)
        self.update_gauges()

    def server_credentials(self) -> grpc.ServerCredentials | None:
        """Return the credentials to open the port with; None for plain text."""
        if self._tls is None:
            return None
        return grpc.dynamic_ssl_server_credentials(
            self._tls.value.configuration, self._next_configuration, self._mutual
        )

    def reload(self, forced: bool = False) -> None:
        """Read files again if they have changed, or all of them if `forced`."""
        with self._lock:
            if self.tokens is not None:
                self.tokens.reload(forced)
            if self._tls is not None and self._tls.reload(forced):
                self._pending.append(self._tls.value.configuration)

    def update_gauges(self) -> None:
        """Set the gauge of the seconds until the certificate expires, and warn once when it is about to."""
        if self._tls is None:
            return
        now, certificate = time.time(), self._tls.value.lifetime
        self._metrics.tls_expiry_seconds.set(certificate.end - now)
        warning = certificate.warning(now)
        # Compare the first word only: the number of days until it expires changes all the time.
        if warning and warning.split()[0] != self._last_warning:
            log.warning("the TLS certificate %s %s", self._certificate, warning)
        self._last_warning = warning and warning.split()[0]

    def _next_configuration(self) -> Any:
        """Return a new configuration, or None if it has not changed. gRPC calls this before each handshake."""
        try:
            return self._pending.pop()
        except IndexError:
            return None

    def _read_tls(self, contents: Contents) -> Tls:
        certificate, key = contents["tls_cert_file"], contents["tls_key_file"]
        authorities = contents.get("tls_client_ca_file")
        paths = self._paths
        check_files(
            (paths["tls_cert_file"], paths["tls_key_file"], paths.get("tls_client_ca_file", "")),
            certificate, key, authorities,
        )  # fmt: skip
        try:
            dates = lifetime(certificate)
        except ValueError as error:
            raise ConfigError(f"tls_cert_file {paths['tls_cert_file']} has an invalid date: {error}") from None
        return Tls(grpc.ssl_server_certificate_configuration([(key, certificate)], authorities), dates)


class BearerTokens(ReloadableFiles[list[bytes]]):
    """Checks the tokens of calls. The file may change between two checks."""

    def __init__(self, path: str, metrics: Metrics) -> None:
        super().__init__("tokens", {"token_file": path}, partial(_parse_tokens, path), metrics)

    def check(self, metadata: Iterable[tuple[str, str | bytes]]) -> None:
        """Raise Unauthenticated unless a call with this metadata has a valid token."""
        values = [value for key, value in metadata if key == "authorization"]
        if len(values) != 1 or not self._is_valid(values[0]):
            reason = "the token is not valid" if values else "this server requires a token"
            raise Unauthenticated(f"{reason}: send the metadata `authorization: Bearer TOKEN`")

    def _is_valid(self, value: str | bytes) -> bool:
        scheme, _, token = (value.encode() if isinstance(value, str) else value).partition(b" ")
        # Compare with every token, in constant time, so that the duration reveals nothing about any of them.
        tokens = self.value
        return scheme.lower() == b"bearer" and sum(hmac.compare_digest(token, known) for known in tokens) > 0


def _parse_tokens(path: str, contents: Contents) -> list[bytes]:
    content = contents["token_file"]
    if not content.isascii():
        raise ConfigError(f"token_file {path} contains characters other than ASCII, which no client can send")
    if not content.split():
        raise ConfigError(f"token_file {path} is empty: it must contain one token per line")
    return content.split()


def _read_file(path: str, setting: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {setting} {path}: {error.strerror}") from None
