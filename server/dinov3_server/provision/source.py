"""The interface of a byte source for downloads, and the source for file:// URLs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit
from urllib.request import url2pathname

from dinov3_server.errors import ConfigError, StorageError, Unreachable

# Bytes per read. Larger reads gain nothing: sha256 is slower than the calls.
BLOCK = 2**20


@dataclass(frozen=True)
class Version:
    """The validators of a file's version; each is empty if the source does not give it."""

    etag: str = ""
    last_modified: str = ""
    size: int | None = None

    @property
    def if_range(self) -> str:
        """Return the validator for `If-Range` (RFC 9110, 13.1.5): not a weak ETag."""
        return self.etag if self.etag.startswith('"') else self.last_modified

    @property
    def known(self) -> bool:
        """Tell whether the source gave a validator."""
        return bool(self.etag or self.last_modified)

    def contradicts(self, other: Version) -> bool:
        """Tell whether the two differ. Dates are compared only if one has no ETag."""
        if self.etag and other.etag:
            differ = self.etag != other.etag
        else:
            differ = bool(self.last_modified and other.last_modified) and self.last_modified != other.last_modified
        return differ or (self.size is not None and other.size is not None and self.size != other.size)


class Body(Protocol):
    """A file's bytes from `start` on. `version.size` is the whole file's."""

    start: int
    version: Version
    content_type: str

    def read(self) -> bytes:
        """Return the next bytes, b"" at the end. Raises Transient if the source breaks off."""

    def close(self) -> None: ...


class Transient(Unreachable):
    """A failure that may be temporary. `wait` is the delay in seconds that the server asks for."""

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


class NoSuchRange(Exception):
    """The source cannot continue from the requested offset. `size` is the whole file's, if the source says it."""

    def __init__(self, size: int | None) -> None:
        super().__init__(size)
        self.size = size


class FileBody:
    """The body of a `file://` URL from `start` on; from 0 if its file is no longer `version`.

    Raises ConfigError for a URL that does not name a file, StorageError for a file that cannot be read.
    """

    content_type = ""

    def __init__(self, url: str, start: int, version: Version) -> None:
        self._url = url
        try:
            parts = urlsplit(url)
        except ValueError:
            parts = urlsplit("")
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise ConfigError(f"{url}: file:// URLs have a full path: file:///folder/name, with three slashes")
        path = Path(url2pathname(parts.path))
        try:
            if not path.is_file():
                problem = "is not a regular file" if path.exists() else "there is no such file on this machine"
                raise ConfigError(f"{url}: {problem}; name the checkpoint file itself")
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise StorageError(f"{url}: cannot be read: {error.strerror} (this process is uid {os.getuid()})") from None
        status = os.fstat(self._file.fileno())
        self.version = Version(last_modified=str(status.st_mtime_ns), size=status.st_size)
        self.start = 0 if version.contradicts(self.version) or start > status.st_size else start
        self._file.seek(self.start)

    def read(self) -> bytes:
        try:
            return self._file.read(BLOCK)
        except OSError as error:
            raise Transient(f"{self._url}: reading failed: {error.strerror}") from None

    def close(self) -> None:
        self._file.close()
