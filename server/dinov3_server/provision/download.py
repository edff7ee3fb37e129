"""Download one file from a URL, completely and checked, or not at all.

Bytes are kept in TARGET.part and hashed as they arrive. After an interruption (SIGKILL too) the next call resumes, if
the server's file is known to be the same: by ETag, Last-Modified or the expected sha256. TARGET appears by a rename,
once size and hash are right.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from dinov3_server.config.types import without_secrets
from dinov3_server.errors import CheckpointError, ConfigError, Unreachable
from dinov3_server.models.weight_files import is_web_page
from dinov3_server.provision.http import DOWNLOAD_TIMEOUT, HttpBody, timeout
from dinov3_server.provision.part import PartialFile
from dinov3_server.provision.progress import Progress, duration, size
from dinov3_server.provision.source import Body, FileBody, NoSuchRange, Transient, Version
from dinov3_server.storage import check_space

ATTEMPTS = 5  # in a row without progress


@dataclass(frozen=True)
class Expected:
    """The known size and hash of a file to download. `sha256` is a hex prefix: all 64 digits, or the 8 of an official
    file name."""

    size: int | None = None  # bytes
    sha256: str | None = None


@dataclass(frozen=True)
class Timing:
    """The clock and sleep function (seconds), and how long a server may be silent."""

    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    stall_seconds: float | None = None  # by default, HF_HUB_DOWNLOAD_TIMEOUT or 30


def download(
    url: str,
    target: Path,
    expected: Expected = Expected(),
    *,
    headers: Mapping[str, str] = MappingProxyType({}),
    on_progress: Callable[[str], None] | None = None,
    timing: Timing = Timing(),
) -> str:
    """Download `url` (https, http or file) to `target`, and return its sha256 (64 hex digits).

    An existing file is replaced once the new one is complete.

    The caller holds a lock on `target`. `headers` are sent to the URL's own host only. `on_progress` gets a short text
    at most once a second.

    Raises ConfigError (an unusable URL, or one where nothing is), Unreachable, AccessRefused, CheckpointError (another
    file than expected) or StorageError. After Unreachable and StorageError the received bytes are kept.
    """
    shown = without_secrets(url)
    scheme = url.partition("://")[0].lower()
    if scheme not in ("https", "http", "file"):
        raise ConfigError(f"{shown}: allowed are URLs that begin with https://, http:// or file://")

    stall_seconds = timeout(DOWNLOAD_TIMEOUT) if timing.stall_seconds is None else timing.stall_seconds

    def open_body(start: int, version: Version) -> Body:
        if scheme == "file":
            return FileBody(url, start, version)
        return HttpBody(url, start, version, headers, stall_seconds)

    origin = shown.removesuffix("?...")  # Two signed URLs of one file differ in their queries.
    with PartialFile(target, origin) as part, Progress(target.name, on_progress, timing.clock) as progress:
        attempts = _Download(shown, open_body, expected, part, progress)
        attempts.until_complete(timing.sleep)
        attempts.check()
        part.finish()
        seconds = timing.clock() - progress.began
        progress.say(f"{size(part.size)} in {duration(seconds)}, sha256 {part.sha256[:8]}")
        return part.sha256


@dataclass
class _Download:
    """The attempts to complete `_part`."""

    _shown: str
    _open_body: Callable[[int, Version], Body]
    _expected: Expected
    _part: PartialFile
    _progress: Progress

    def until_complete(self, sleep: Callable[[float], None]) -> None:
        furthest = failures = 0
        if self._resumable():
            self._progress.say(f"checking the {size(self._part.size)} of an earlier attempt")
            self._part.hash_existing()
            furthest = self._part.size
        while True:
            try:
                self._attempt()
                return
            except Transient as error:
                failures = 0 if self._part.size > furthest else failures + 1
                furthest = max(furthest, self._part.size)
                if failures == ATTEMPTS:
                    message = f"{error}; given up after {ATTEMPTS} attempts in a row without progress"
                    if self._resumable():
                        message += f". {size(self._part.size)} are kept: the next start resumes there"
                    raise Unreachable(message) from None
                wait = max(0.5 * 2**failures, error.wait)
                self._progress.say(f"{error}; trying again in {wait:g} s", logging.WARNING)
            sleep(wait)

    def check(self) -> None:
        """Compare the complete part with what was expected. If it differs, remove it and raise CheckpointError."""
        part, expected = self._part, self._expected
        if part.size == 0:
            problem = "the received file is empty"
        elif expected.size is not None and part.size != expected.size:
            problem = f"got {part.size:,} bytes and expected {expected.size:,}"
        elif expected.sha256 is not None and not part.sha256.startswith(expected.sha256.lower()):
            problem = f"it has the sha256 {part.sha256}; expected was one that begins with {expected.sha256}"
        else:
            return
        part.clear()
        raise CheckpointError(
            f"{self._shown}: {problem}. It was removed. Start again to fetch it again; if the error stays, the URL is "
            "that of another file, or the server's copy is damaged"
        )

    def _resumable(self) -> bool:
        """Tell whether the rest can be known to belong to the bytes that are there."""
        return self._part.size > 0 and (self._part.version.known or self._expected.sha256 is not None)

    def _attempt(self) -> None:
        """Continue at the end of the part. Returns when it is complete; raises Transient if the source breaks off."""
        part = self._part
        start = part.size if self._resumable() else 0
        try:
            body = self._open_body(start, part.version)
        except NoSuchRange as error:
            if not start:
                raise Unreachable(f"{self._shown}: the server answers with a range that was not requested") from None
            said = part.version.size
            if {error.size, said, self._expected.size} - {None} == {start}:
                return
            part.clear()
            why = f"the server cannot continue at {start:,} bytes"
            if None not in (error.size, said) and error.size != said:
                why = f"the server said {said:,} bytes at first and says {error.size:,} now"
            raise Transient(f"{self._shown}: {why}; it must be fetched from its beginning") from None
        with closing(body):
            self._take(body)

    def _take(self, body: Body) -> None:
        part, said = self._part, body.version.size
        block = body.read()
        if body.start == 0 and is_web_page(block, body.content_type):
            raise CheckpointError(
                f"{self._shown}: is a web page ({body.content_type or 'by its first bytes'}), not a file: a login, a "
                "license to accept, or a proxy's. Nothing was kept. Give the URL of the file itself"
            )
        if None not in (said, self._expected.size) and said != self._expected.size:
            raise CheckpointError(
                f"{self._shown}: the server says {said:,} bytes where {self._expected.size:,} were expected: it is "
                "another file, or another version of it. Nothing was fetched"
            )
        total = self._expected.size if said is None else said
        if total is not None:  # the bytes of the part count as free, also when it starts over
            check_space(part.path.parent, total - part.size, part.path.name)
        if body.start == 0:
            part.begin(body.version)
        self._progress.start(part.size, total)
        while block:
            part.append(block if said is None else block[: said - part.size])
            self._progress.at(part.size, total)
            if total is not None and part.size >= total:
                return
            block = body.read()
        if total is not None and part.size < total:
            raise Transient(f"{self._shown}: the connection ended at {part.size:,} of {total:,} bytes")
