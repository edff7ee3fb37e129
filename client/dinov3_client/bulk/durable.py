"""Durable writing: after a crash a file is complete or absent. All of `bulk` writes through this module.

A file is written under a temporary name, synced to disk and renamed; appended data are synced. After SIGKILL or a power
failure between any two calls here the next run can resume.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dinov3_client._files import removed_at_end

DRAFT = ".draft.tmp"
"""The temporary name of a file in its folder: short, as the file's own name may be as long as names can be."""

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
# O_NOFOLLOW: a link could lead to a file outside the extraction.
_MORE = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW


def create(path: Path, buffers: Iterable[Any]) -> int:
    """Write `buffers` to a file, replacing an older one, and return their size in bytes.

    Its name is durable only after `sync_folder`. One file per folder at a time.
    """
    draft = path.with_name(DRAFT)
    draft.unlink(missing_ok=True)  # left by a killed run
    with removed_at_end(draft):  # which frees the space on a full disk
        with _open(draft, _NEW, path) as descriptor:
            written = sum(_write(descriptor, buffer) for buffer in buffers)
            os.fsync(descriptor)
        os.replace(draft, path)  # noqa: PTH105
    return written


def append(path: Path, data: bytes, *, sync: bool = True) -> None:
    """Append `data` to a file: durably, or without `sync` only so that it survives the process."""
    with _open(path, _MORE) as descriptor:
        _write(descriptor, data)
        if sync:
            os.fsync(descriptor)


def read(path: Path) -> bytes | None:
    """Return the contents of a file, or None if there is none."""
    try:
        with (
            _open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW) as descriptor,
            open(descriptor, "rb", closefd=False) as file,
        ):
            return file.read()
    except FileNotFoundError:
        return None


def truncate(path: Path, length: int) -> None:
    """Cut a file to `length` bytes, durably."""
    with _open(path, _MORE) as descriptor:
        os.ftruncate(descriptor, length)
        os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """Sync the names in a folder to disk."""
    with _open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) as descriptor:
        os.fsync(descriptor)


def open_file(path: Path, flags: int) -> int:
    """Open a descriptor. With O_NOFOLLOW, the error for a symbolic link says so in words."""
    try:
        return os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "a symbolic link, which is not written through; remove it", str(path)) from None
        raise


@contextmanager
def _open(path: Path, flags: int, name: Path | None = None) -> Iterator[int]:
    """Open a descriptor for a block; errors name the file `name`."""
    descriptor = open_file(path, flags)
    try:
        yield descriptor
    except OSError as error:  # errors of calls on descriptors do not name the file
        raise OSError(error.errno, error.strerror, str(name or path)) from None
    finally:
        os.close(descriptor)


def _write(descriptor: int, buffer: Any) -> int:
    view = memoryview(buffer).cast("B")
    size = len(view)
    while view:
        view = view[os.write(descriptor, view) :]
    return size
