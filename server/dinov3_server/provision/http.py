"""Request a file from an HTTP server, and explain its refusals.

This uses the standard library's client, but follows redirects itself (the library would send tokens to other hosts) and
handles every status itself. Proxies (HTTPS_PROXY, NO_PROXY) and certificates (SSL_CERT_FILE) come from the environment.
No message contains a URL's query, a token or a password.
"""

from __future__ import annotations

import base64
import email.utils
import http.client
import os
import re
import socket
import ssl
import string
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import NoReturn
from urllib.parse import SplitResult, quote, unquote, unquote_plus, urljoin, urlsplit

from dinov3_server import __version__
from dinov3_server.config.types import without_secrets
from dinov3_server.errors import AccessRefused, CheckpointError, ConfigError, StartupError, Unreachable
from dinov3_server.provision.source import BLOCK, NoSuchRange, Transient, Version

META_REQUESTS = "https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/"
USER_AGENT = f"dinov3-serving/{__version__}"
DOWNLOAD_TIMEOUT, ETAG_TIMEOUT = "HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"
_TIMEOUT_SECONDS = 30.0
REDIRECTS = 10
LONGEST_WAIT = 300.0  # seconds, also if a server asks for more
_ERROR_BYTES = 8192  # read of an error's body
_LONGEST_QUOTE = 160  # characters of the server's own message


def timeout(variable: str) -> float:
    """Return for how many seconds a server may be silent, by an environment variable of huggingface_hub's name.

    Raises ConfigError.
    """
    text = os.environ.get(variable, "").strip()
    try:
        seconds = float(text or _TIMEOUT_SECONDS)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 1e6:  # NaN is neither
        raise ConfigError(f"environment {variable} is {text!r}; allowed: seconds above 0, at most 1000000")
    return seconds


class HttpBody:
    """The response to a GET for a file from `start` on; from 0 if the server cannot continue there.

    `headers` are sent to the URL's own host only. `version` is the version of the bytes before `start`. `stall_seconds`
    is how long the server may be silent.

    Raises Transient for failures that may be temporary; AccessRefused, ConfigError, CheckpointError or Unreachable for
    others; NoSuchRange.
    """

    def __init__(
        self, url: str, start: int, version: Version, headers: Mapping[str, str], stall_seconds: float
    ) -> None:
        self._shown = without_secrets(url)
        parts = _checked(url)
        self._secrets = _secrets(parts, headers)
        self._signed = bool(parts.query)
        self._stall_seconds = stall_seconds
        ranged = {"Range": f"bytes={start}-"} if start else {}
        if start and version.if_range:
            ranged["If-Range"] = version.if_range
        self._response = self._follow(parts, headers, ranged)
        try:
            self._check_status(start, version)
        except BaseException:
            self.close()
            raise

    def read(self) -> bytes:
        try:
            return self._response.read1(BLOCK)
        except (OSError, http.client.HTTPException) as error:
            raise self._broken(error, "the connection broke off") from None

    def close(self) -> None:
        self._response.close()

    def _follow(
        self, parts: SplitResult, headers: Mapping[str, str], ranged: Mapping[str, str]
    ) -> http.client.HTTPResponse:
        """Send the request, follow redirects, and return the final response."""
        opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.ProxyHandler(),
            urllib.request.HTTPHandler(),
            urllib.request.HTTPSHandler(),
            urllib.request.UnknownHandler(),  # of a proxy's scheme
        ):
            opener.add_handler(handler)
        for name, value in headers.items():
            if not (value.isascii() and value.isprintable()):
                raise ConfigError(
                    f"{self._shown}: the value of the header {name} (a token?) cannot be sent: it has a line break or "
                    "another character outside of ASCII in it"
                )
        own = {**_login(parts), **headers}
        for _ in range(REDIRECTS + 1):
            response = self._send(opener, parts, {**own, **ranged})
            if response.status not in (301, 302, 303, 307, 308) or not response.headers["Location"]:
                return response
            response.close()
            location = quote(response.headers["Location"], safe=string.punctuation, encoding="iso-8859-1")
            try:
                target = _checked(urljoin(parts.geturl(), location))
            except (ConfigError, ValueError):
                shown = without_secrets(location.partition("?")[0])
                raise Unreachable(f"{self._shown}: redirects to an unusable URL: {shown}") from None
            if parts.scheme == "https" and target.scheme != "https":
                raise Unreachable(
                    f"{self._shown}: redirects to {without_secrets(target.geturl())}, which is not encrypted; it "
                    "is not followed"
                )
            if _origin(target) != _origin(parts):
                own = _login(target)
            self._secrets |= _secrets(target, {})
            parts = target
        raise Unreachable(f"{self._shown}: redirects more than {REDIRECTS} times, perhaps in a loop")

    def _send(
        self, opener: urllib.request.OpenerDirector, parts: SplitResult, headers: Mapping[str, str]
    ) -> http.client.HTTPResponse:
        address = parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment="").geturl()
        request = urllib.request.Request(address, headers={"User-Agent": USER_AGENT, **headers})
        try:
            response = opener.open(request, timeout=self._stall_seconds)
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error, parts.hostname or "") from None
        except ValueError:
            raise ConfigError(f"{self._shown}: its host, or the proxy of HTTPS_PROXY, is not well formed") from None
        assert isinstance(response, http.client.HTTPResponse)
        return response

    def _check_status(self, start: int, version: Version) -> None:
        response = self._response
        etag, last_modified = _plain(response.headers["ETag"]), _plain(response.headers["Last-Modified"])
        match response.status:
            case 200:
                self.start, size = 0, response.length
            case 206:
                self.start, size = self._range()
            case 416 if start:
                said = re.fullmatch(r"bytes \*/(\d+)", response.headers["Content-Range"] or "")
                raise NoSuchRange(int(said[1]) if said else None)
            case status:
                self._refuse(status)
        self.version = Version(etag, last_modified, size)
        if self.start and (self.start != start or self.version.contradicts(version)):
            raise NoSuchRange(None)
        encoding = response.headers["Content-Encoding"] or "identity"
        if encoding != "identity":
            raise CheckpointError(
                f"{self._shown}: the server sends the file encoded ({encoding!r}), which was not requested; have it "
                "serve the file as it is"
            )
        self.content_type = response.headers.get_content_type() if response.headers["Content-Type"] else ""

    def _range(self) -> tuple[int, int | None]:
        """Return the offset and the whole size in a 206 response."""
        said = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", self._response.headers["Content-Range"] or "")
        if not said:
            raise NoSuchRange(None)
        return int(said[1]), None if said[2] == "*" else int(said[2])

    def _refuse(self, status: int) -> NoReturn:
        says = f"{status} {self._response.reason or ''}".strip() + self._quote()
        where = f"{self._shown}: the server answers {says}"
        if status in (408, 425, 429) or status >= 500:
            raise Transient(where, _retry_after(self._response.headers["Retry-After"]))
        if status in (401, 403) or (status == 400 and self._signed):
            raise AccessRefused(f"{where}. {self._how_to_get_access()}")
        if status in (404, 410):
            raise ConfigError(f"{where}: nothing exists at this URL; compare it letter by letter")
        if status == 407:
            raise Unreachable(f"{where}: the proxy needs HTTPS_PROXY=http://USER:PASSWORD@HOST:PORT")
        raise Unreachable(f"{where}, which is not a response to a request for a file; is it the right URL?")

    def _how_to_get_access(self) -> str:
        if self._signed:
            return (
                "A signed URL is valid for about a week and must be complete (in a shell: quoted). If it has expired, "
                f"request a new e-mail at {META_REQUESTS}"
            )
        return (
            "A gated repository needs the token (HF_TOKEN) of an account that was granted access; Meta's own files "
            f"need the signed URL in an e-mail, which you can request at {META_REQUESTS}"
        )

    def _quote(self) -> str:
        """Quote the server's own message, if it is short and has no secrets in it."""
        try:
            text = self._response.read(_ERROR_BYTES).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            return ""
        found = re.search(r"<(message|title)>(.*?)</\1>", text, re.IGNORECASE | re.DOTALL)
        line = next((line.strip() for line in (found[2] if found else text).splitlines() if line.strip()), "")
        shown = line.isprintable() and 0 < len(line) <= _LONGEST_QUOTE and not line.startswith("<")
        return f" ({line})" if shown and not any(secret in line for secret in self._secrets) else ""

    def _unreachable(self, error: Exception, host: str) -> StartupError:
        if isinstance(error, urllib.error.URLError) and isinstance(error.reason, OSError):
            error = error.reason
        if isinstance(error, ssl.SSLCertVerificationError):
            return Unreachable(
                f"{self._shown}: the certificate of {host} is not trusted ({error.verify_message}); if a proxy or a "
                "mirror has its own authority, set SSL_CERT_FILE to its certificates"
            )
        if isinstance(error, ssl.SSLError):
            return Unreachable(f"{self._shown}: no TLS connection to {host} is possible ({error.reason})")
        if isinstance(error, socket.gaierror) and error.errno != socket.EAI_AGAIN:
            return Unreachable(
                f"{self._shown}: the host {host} is unknown ({error.strerror}); check the name, and the network or its "
                "proxy (HTTPS_PROXY)"
            )
        return self._broken(error, f"{host} cannot be reached")

    def _broken(self, error: Exception, what: str) -> Transient:
        if isinstance(error, TimeoutError):
            return Transient(
                f"{self._shown}: {what}: not a byte for {self._stall_seconds:g} s; if a mirror fetches the file itself "
                f"before it answers, give it more seconds with {DOWNLOAD_TIMEOUT}"
            )
        if isinstance(error, http.client.HTTPException) and not isinstance(error, OSError):
            return Transient(f"{self._shown}: {what}: the response is not complete HTTP ({type(error).__name__})")
        reason = (error.strerror if isinstance(error, OSError) else "") or str(error)
        return Transient(f"{self._shown}: {what} ({reason}); check the network or its proxy (HTTPS_PROXY)")


def _checked(url: str) -> SplitResult:
    """Split an http or https URL into its parts, escaped. Raises ConfigError."""
    try:
        parts = urlsplit(quote(url, safe=string.punctuation))
        port = parts.port
    except ValueError:
        raise ConfigError(f"{without_secrets(url)}: is not a URL: its host or port is malformed") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise ConfigError(f"{without_secrets(url)}: a URL looks like https://HOST[:PORT]/PATH")
    return parts


def _origin(parts: SplitResult) -> tuple[str, str | None, int]:
    return parts.scheme, parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


def _login(parts: SplitResult) -> dict[str, str]:
    """Return Basic authentication (RFC 7617) for the user and password in a URL."""
    if parts.username is None:
        return {}
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {"Authorization": "Basic " + base64.b64encode(pair.encode()).decode()}


def _plain(text: str | None) -> str:
    """Return a validator that can be sent back, or an empty one."""
    return text if text and text.isprintable() else ""


def _secrets(parts: SplitResult, headers: Mapping[str, str]) -> set[str]:
    """List the words that a server gets and that must not be shown if it quotes them."""
    sent = " ".join([parts.query, parts.netloc.rpartition("@")[0], *headers.values()])
    return set(re.findall(r"[^\s=&:]{4,}", f"{sent} {unquote(sent)} {unquote_plus(sent)}"))


def _retry_after(text: str | None) -> float:
    """Parse the seconds to wait (RFC 9110, 10.2.3: a number of them, or a date)."""
    if not text:
        return 0.0
    if text.strip().isdecimal():
        seconds = float(text)
    else:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except ValueError:
            return 0.0
    return min(max(seconds, 0.0), LONGEST_WAIT)
