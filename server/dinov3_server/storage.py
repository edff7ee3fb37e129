"""Share files between processes and machines: locks, atomic writes, and error messages for disk failures.

A lock is `flock` on a file that stays: the kernel releases it when its process dies.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dinov3_server.errors import StorageError

log = logging.getLogger(__name__)


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file at `path`, created if missing. Waits while another process holds it, and logs that once.

    `what` names the locked work in the log. Raises StorageError if the file cannot be created.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        with storage_errors(path):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("%s: another process is doing it; waiting", what)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file atomically and durably: readers never see a part of it. Raises StorageError."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=f".{path.name}.", dir=path.parent, delete=False) as file:
            written = Path(file.name)
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                written.chmod(0o644)
                written.replace(path)
            except BaseException:
                with suppress(OSError):
                    written.unlink()
                raise


def check_space(folder: Path, nbytes: int, what: str) -> None:
    """Raise StorageError unless `nbytes` more fit on the disk of `folder`, which exists."""
    with storage_errors(folder):
        free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise StorageError(
            f"{folder}: {what} takes {nbytes:,} bytes and {free:,} are free on that disk; make room, or choose "
            "another disk with --cache-dir (DINOV3_CACHE_DIR)"
        )


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an OSError about `path` into a StorageError that says what to do."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{error.filename or path}: {_advice(error)}") from None


def _advice(error: OSError) -> str:
    elsewhere = "choose another folder with --cache-dir (DINOV3_CACHE_DIR)"
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return f"the disk is full; make room, or {elsewhere}"
        case errno.EROFS:
            return f"the file system is read-only; mount it writable for the first start, or {elsewhere}"
        case errno.EACCES | errno.EPERM:
            return f"no permission (this process is uid {os.getuid()}); give it the folder, or {elsewhere}"
        case errno.ENOTDIR | errno.EEXIST:
            return f"a file exists where a folder is needed; remove it, or {elsewhere}"
    return f"{error.strerror or error}; {elsewhere} if it cannot be fixed"
