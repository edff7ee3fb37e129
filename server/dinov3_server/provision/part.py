"""The part of a file that has come so far: beside its target, kept over interruptions, renamed when it is whole."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from dinov3_server.provision.source import BLOCK, Version
from dinov3_server.storage import storage_errors, write_whole


class Part:
    """TARGET.part, and TARGET.part.json: which version of which `origin` (a URL without secrets) it is a part of.

    A part of something else counts as nothing. Use it in a `with` block; what holds nothing is not left behind.
    Raises StorageError from every method. There must be one at a time: the caller holds the lock of the target.
    """

    def __init__(self, target: Path, origin: str) -> None:
        self.path = target.with_name(target.name + ".part")
        self._target = target
        self._about = target.with_name(target.name + ".part.json")
        self._origin = origin
        with storage_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._hash = hashlib.sha256()
        self._read = 0  # bytes that the hash has seen
        known = self._known()
        self.version = known or Version()
        self.size = os.fstat(self._descriptor).st_size if known else 0

    def __enter__(self) -> Part:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        empty = os.fstat(self._descriptor).st_size == 0  # a part of something else stays until this one has begun
        os.close(self._descriptor)
        if empty:
            self._unlink()

    def read_back(self) -> None:
        """Hash what an earlier process has left."""
        with storage_errors(self.path):
            while self._read < self.size:
                block = os.pread(self._descriptor, min(BLOCK, self.size - self._read), self._read)
                if not block:
                    self.size = self._read
                self._hash.update(block)
                self._read += len(block)

    def begin(self, version: Version) -> None:
        """Start anew, as a part of this version."""
        self.clear()
        self.version = version
        about = {"url": self._origin, "etag": version.etag, "last_modified": version.last_modified}
        write_whole(self._about, json.dumps({**about, "size": version.size}).encode())

    def append(self, block: bytes) -> None:
        self._hash.update(block)
        self._read += len(block)
        with storage_errors(self.path):
            rest = memoryview(block)
            while rest:
                written = os.pwrite(self._descriptor, rest, self.size)
                self.size += written
                rest = rest[written:]

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def clear(self) -> None:
        with storage_errors(self.path):
            os.truncate(self._descriptor, 0)
        self.size = self._read = 0
        self._hash = hashlib.sha256()

    def finish(self) -> None:
        """Make it the target, also for a machine that loses its power now."""
        with storage_errors(self._target):
            os.fsync(self._descriptor)
            self.path.replace(self._target)
            folder = os.open(self._target.parent, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
            self._about.unlink(missing_ok=True)

    def _known(self) -> Version | None:
        try:
            about = json.loads(self._about.read_bytes())
            version = Version(str(about["etag"]), str(about["last_modified"]), about["size"])
            usable = about["url"] == self._origin and isinstance(version.size, int | None)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return version if usable else None

    def _unlink(self) -> None:
        with suppress(OSError):
            self.path.unlink(missing_ok=True)
            self._about.unlink(missing_ok=True)
