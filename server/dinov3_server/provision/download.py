"""One file from a URL, whole and checked or not at all.

What comes is kept in TARGET.part and hashed on its way. After an interruption, however hard, the next call goes on
where it ended, if something can tell that the server still has the same file: an ETag, a date of last change, or the
sha256 that was promised. TARGET appears by a rename, when size and hash are right.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from dinov3_server.config.kinds import without_secrets
from dinov3_server.errors import CheckpointError, ConfigError, Unreachable
from dinov3_server.provision.http import HttpBody
from dinov3_server.provision.part import Part
from dinov3_server.provision.progress import Progress, duration, size
from dinov3_server.provision.source import Body, FileBody, NoSuchRange, Transient, Version
from dinov3_server.storage import check_space

# In a row, without a byte more than ever before.
ATTEMPTS = 5
_MARKUP = (b"<!doctype", b"<html", b"<head", b"<body", b"<?xml", b"<!--", b"<error")
_MARKUP_TYPES = ("text/html", "application/xhtml+xml", "text/xml", "application/xml")


@dataclass(frozen=True)
class Expected:
    """What is known of a file before it comes.

    `sha256` are the hex digits that its digest must begin with: all 64, or the 8 of an official file name.
    """

    size: int | None = None  # bytes
    sha256: str | None = None


@dataclass(frozen=True)
class Downloaded:
    """What came: bytes, all 64 hex digits, and how long it took."""

    size: int
    sha256: str
    seconds: float


@dataclass(frozen=True)
class Timing:
    """The clock (seconds), how to wait on it, and how long a server may be silent."""

    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    stall_seconds: float = 30.0


def download(
    url: str,
    target: Path,
    expected: Expected = Expected(),
    *,
    headers: Mapping[str, str] = MappingProxyType({}),
    offline: bool = False,
    report: Callable[[str], None] | None = None,
    timing: Timing = Timing(),
) -> Downloaded:
    """Fetch `url` (https, http or file) to `target`, taking the place of what is there when the new file is whole.

    The caller holds a lock on `target`. `headers` go to the URL's own host only. `offline` opens no socket. `report`
    is told, at most once a second, how far it is.

    Raises ConfigError (a URL that cannot be used, or names nothing), Unreachable, AccessRefused, CheckpointError
    (something else came than was expected) or StorageError. After Unreachable and StorageError what has come is kept.
    """
    shown = without_secrets(url)
    scheme = url.partition("://")[0].lower()
    if scheme not in ("https", "http", "file"):
        raise ConfigError(f"{shown}: a URL that can be fetched begins with https://, http:// or file://")
    if offline and scheme != "file":
        raise Unreachable(
            f"{shown}: is needed and must not be fetched, for the setting `offline` (DINOV3_OFFLINE) forbids it; fetch "
            f"it elsewhere and put it at {target}, or unset that"
        )

    def open_body(start: int, version: Version) -> Body:
        if scheme == "file":
            return FileBody(url, start, version)
        return HttpBody(url, start, version, headers, timing.stall_seconds)

    origin = shown.removesuffix("?...")  # Two signed URLs of one file differ in their queries.
    with Part(target, origin) as part, Progress(target.name, report, timing.clock) as progress:
        fetch = _Fetch(shown, open_body, expected, part, progress)
        fetch.until_whole(timing.sleep)
        fetch.check()
        part.finish()
        seconds = timing.clock() - progress.began
        progress.say(f"{size(part.size)} in {duration(seconds)}, sha256 {part.sha256[:8]}")
        return Downloaded(part.size, part.sha256, seconds)


class _Fetch:
    """Bring `part` to its whole length, attempt by attempt."""

    def __init__(
        self,
        shown: str,
        open_body: Callable[[int, Version], Body],
        expected: Expected,
        part: Part,
        progress: Progress,
    ) -> None:
        self._shown = shown
        self._open_body = open_body
        self._expected = expected
        self._part = part
        self._progress = progress

    def until_whole(self, sleep: Callable[[float], None]) -> None:
        furthest = failures = 0
        if self._resumable():
            self._progress.say(f"checking the {size(self._part.size)} that an earlier attempt has left")
            self._part.read_back()
            furthest = self._part.size
        while True:
            try:
                self._attempt()
                return
            except Transient as error:
                failures = 0 if self._part.size > furthest else failures + 1
                furthest = max(furthest, self._part.size)
                if failures == ATTEMPTS:
                    kept = (
                        f". {size(self._part.size)} are kept: the next start goes on there" if self._resumable() else ""
                    )
                    raise Unreachable(
                        f"{error}; given up after {ATTEMPTS} attempts in a row without progress{kept}"
                    ) from None
                wait = max(0.5 * 2**failures, error.wait)
                self._progress.say(f"{error}; trying again in {wait:g} s", logging.WARNING)
            sleep(wait)

    def check(self) -> None:
        """That the whole part is what was expected; else it is removed. Raises CheckpointError."""
        part, expected = self._part, self._expected
        if part.size == 0:
            problem = "an empty file came"
        elif expected.size is not None and part.size != expected.size:
            problem = f"{part.size:,} bytes came where {expected.size:,} were expected"
        elif expected.sha256 is not None and not part.sha256.startswith(expected.sha256.lower()):
            problem = f"what came has the sha256 {part.sha256}; expected was one that begins with {expected.sha256}"
        else:
            return
        part.clear()
        raise CheckpointError(
            f"{self._shown}: {problem}. It is removed. Start again to fetch it anew; if it is the same then, the URL "
            "is that of another file or the server's copy is damaged"
        )

    def _resumable(self) -> bool:
        """Whether something can tell that what comes belongs to what is there."""
        return self._part.size > 0 and (self._part.version.told or self._expected.sha256 is not None)

    def _attempt(self) -> None:
        """Go on from where the part ends. Returns when it is whole; raises Transient where it breaks off."""
        part = self._part
        start = part.size if self._resumable() else 0
        try:
            body = self._open_body(start, part.version)
        except NoSuchRange as error:
            if not start:
                raise Unreachable(f"{self._shown}: the server answers with a range that nobody asked it for") from None
            said = part.version.size
            if {error.size, said, self._expected.size} - {None} == {start}:
                return
            part.clear()
            why = f"the server does not go on from {start:,} bytes"
            if None not in (error.size, said) and error.size != said:
                why = f"the server said {said:,} bytes at first and says {error.size:,} now"
            raise Transient(f"{self._shown}: {why}; it must be fetched from its beginning") from None
        with closing(body):
            self._take(body)

    def _take(self, body: Body) -> None:
        part, said = self._part, body.version.size
        block = body.read()
        if body.start == 0:
            self._refuse_page(body.content_type, block)
        if None not in (said, self._expected.size) and said != self._expected.size:
            raise CheckpointError(
                f"{self._shown}: the server says {said:,} bytes where {self._expected.size:,} were expected: it is "
                "another file, or another version of it. Nothing was fetched"
            )
        total = self._expected.size if said is None else said
        if total is not None:  # What is there already makes room, also where it starts anew.
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

    def _refuse_page(self, content_type: str, block: bytes) -> None:
        """Weights begin with bytes that no page has. Raises CheckpointError for a page."""
        head = block[:512].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
        if head.startswith(_MARKUP) or (content_type in _MARKUP_TYPES and b"\0" not in head):
            raise CheckpointError(
                f"{self._shown}: a web page came ({content_type or 'by its first bytes'}) and not a file: that of a "
                "login, of a licence to accept, or of a proxy. Nothing was kept. Give the URL of the file itself"
            )
