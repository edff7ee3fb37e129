"""Keep a partial download beside its target over interruptions, and rename it when it is complete."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from dinov3_server.provision.source import BLOCK, Version
from dinov3_server.storage import storage_errors, write_atomic


class PartialFile:
    """TARGET.part, with the `origin` (a URL without secrets) and version of its bytes in TARGET.part.json.

    A part of another origin counts as empty. Use it in a `with` block; an empty file is removed at its end. Every
    method raises StorageError. The caller holds the lock of the target, so there is one instance at a time.
    """

    def __init__(self, target: Path, origin: str) -> None:
        self.path = target.with_name(target.name + ".part")
        self._target = target
        self._metadata = target.with_name(target.name + ".part.json")
        self._origin = origin
        with storage_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._hash = hashlib.sha256()
        self._hashed = 0  # bytes
        known = self._known()
        self.version = known or Version()
        self.size = os.fstat(self._descriptor).st_size if known else 0

    def __enter__(self) -> PartialFile:
        return self

    def __exit__(self, *_: object) -> None:
        empty = os.fstat(self._descriptor).st_size == 0  # a part of another origin stays until `begin`
        os.close(self._descriptor)
        if empty:
            with suppress(OSError):
                self.path.unlink(missing_ok=True)
                self._metadata.unlink(missing_ok=True)

    def hash_existing(self) -> None:
        """Hash the bytes that an earlier process left."""
        with storage_errors(self.path):
            while self._hashed < self.size:
                block = os.pread(self._descriptor, min(BLOCK, self.size - self._hashed), self._hashed)
                if not block:
                    self.size = self._hashed
                self._hash.update(block)
                self._hashed += len(block)

    def begin(self, version: Version) -> None:
        """Start over, with bytes of this version."""
        self.clear()
        self.version = version
        write_atomic(self._metadata, json.dumps({"url": self._origin, **asdict(version)}).encode())

    def append(self, block: bytes) -> None:
        self._hash.update(block)
        self._hashed += len(block)
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
        self.size = self._hashed = 0
        self._hash = hashlib.sha256()

    def finish(self) -> None:
        """Rename the file to its target, durably: it survives a power failure."""
        with storage_errors(self._target):
            os.fsync(self._descriptor)
            self.path.replace(self._target)
            folder = os.open(self._target.parent, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
            self._metadata.unlink(missing_ok=True)

    def _known(self) -> Version | None:
        try:
            metadata = json.loads(self._metadata.read_bytes())
            version = Version(str(metadata["etag"]), str(metadata["last_modified"]), metadata["size"])
            usable = metadata["url"] == self._origin and isinstance(version.size, int | None)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return version if usable else None
