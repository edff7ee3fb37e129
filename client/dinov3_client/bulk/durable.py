"""Writing so that a crash leaves a file whole or not there. Nothing in `bulk` writes any other way.

A file is written under another name, brought to the disk and then renamed; what is appended to counts only once it is
on the disk. SIGKILL, or a machine without power, between any two calls here leaves what the next run can go on from.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_NEW = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
_MORE = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC


def create(path: Path, parts: Iterable[Any]) -> int:
    """Put `parts` (buffers of bytes) into a file, in the place of an older one; how many bytes that were.

    Its name is safe only after `sync_folder`.
    """
    draft = path.with_name(f".{path.name}.tmp")
    try:
        with _open(draft, _NEW) as descriptor:
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


@contextmanager
def _open(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags, 0o666)
    try:
        yield descriptor
    except OSError as error:  # calls on descriptors do not name the file
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(descriptor)


def _write(descriptor: int, part: Any) -> int:
    view = memoryview(part).cast("B")
    size = len(view)
    while view:
        view = view[os.write(descriptor, view) :]
    return size
