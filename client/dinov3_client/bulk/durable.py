"""Writing so that a crash leaves a file whole or not there. Nothing in `bulk` writes any other way.

A file is written under another name, brought to the disk and then renamed; what is appended to counts only once it is
on the disk. SIGKILL, or a machine without power, between any two calls here leaves what the next run can go on from.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DRAFT = ".draft.tmp"
"""What a file is called, in its folder, until it is whole: short, as a file may have the longest name that there is."""

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
# A link would lead writing to a file that is not the extraction's.
_MORE = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW


def create(path: Path, parts: Iterable[Any]) -> int:
    """Put `parts` (buffers of bytes) into a file, in the place of an older one; how many bytes that were.

    Its name is safe only after `sync_folder`. One file of a folder at a time.
    """
    draft = path.with_name(DRAFT)
    draft.unlink(missing_ok=True)  # of a run that was killed
    try:
        with _open(draft, _NEW, path) as descriptor:
            written = sum(_write(descriptor, part) for part in parts)
            os.fsync(descriptor)
        os.replace(draft, path)  # noqa: PTH105
    except BaseException:  # a full disk has its room back
        draft.unlink(missing_ok=True)
        raise
    return written


def append(path: Path, data: bytes) -> None:
    with _open(path, _MORE) as descriptor:
        _write(descriptor, data)
        os.fsync(descriptor)


def truncate(path: Path, length: int) -> None:
    with _open(path, _MORE) as descriptor:
        os.ftruncate(descriptor, length)
        os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """Bring the names in it to the disk."""
    with _open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) as descriptor:
        os.fsync(descriptor)


def open_file(path: Path, flags: int) -> int:
    """A descriptor; with O_NOFOLLOW the error says in words that the file is a link."""
    try:
        return os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "a symbolic link, which is not written through; remove it", str(path)) from None
        raise


@contextmanager
def _open(path: Path, flags: int, name: Path | None = None) -> Iterator[int]:
    """Errors call the file `name`."""
    descriptor = open_file(path, flags)
    try:
        yield descriptor
    except OSError as error:  # calls on descriptors do not name the file
        raise OSError(error.errno, error.strerror, str(name or path)) from None
    finally:
        os.close(descriptor)


def _write(descriptor: int, part: Any) -> int:
    view = memoryview(part).cast("B")
    size = len(view)
    while view:
        view = view[os.write(descriptor, view) :]
    return size
