"""Reads images ahead in threads, and groups them into requests."""

from __future__ import annotations

import errno
import hashlib
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Self

from dinov3_client.bulk.errors import TooLarge
from dinov3_client.bulk.images import ImageRef, Images

THREADS, REMOTE_THREADS = 4, 32
"""Files read at a time: of URLs more, since each waits for its server."""
AHEAD_BYTES = 64 << 20
BATCH_BYTES = 32 << 20
"""The most bytes of a request's files, and of its features."""

# Errors of a single file. Others (a failing disk or network, no descriptor left) would affect the next files too: they
# end the run, and a later one resumes.
_OF_ONE_FILE = {
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ImageEntry:
    """An image that was read, or could not be."""

    index: int
    item: ImageRef
    sha256: str
    """Of its bytes; empty if they could not be read."""
    reason: str
    """Why they could not be read; empty if they were."""


class _Loaded(NamedTuple):
    entry: ImageEntry
    data: bytes


class ImageReader:
    """Reads the images of the indices `span`, in order; at most AHEAD_BYTES and one file per thread wait in memory.

    A file of more than `most_bytes` fails without being read. Batches have one image until `fit` was called, then up
    to `batch_images`. `sent` has the entries of each batch taken, for the caller to match with its answer; `rest` has
    those after the last batch, all of them failed.
    """

    def __init__(self, images: Images, span: range, *, most_bytes: int, batch_images: int) -> None:
        self.sent: deque[list[ImageEntry]] = deque()
        self.rest: list[ImageEntry] = []
        self._images = images
        self._most_bytes = most_bytes
        self._batch_images = batch_images
        self._row_nbytes = 0
        self._changed = threading.Condition()
        self._span = span
        self._next = span.start
        self._ready: dict[int, _Loaded | BaseException] = {}
        self._held = 0
        self._closed = False
        count = REMOTE_THREADS if images.remote else THREADS
        self._threads = [threading.Thread(target=self._work, name=f"read-{n}", daemon=True) for n in range(count)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def fit(self, row_nbytes: int) -> None:
        """Limit batches to BATCH_BYTES of features, with `row_nbytes` per image."""
        self._row_nbytes = max(self._row_nbytes, row_nbytes)

    def batches(self) -> Iterator[list[bytes]]:
        """Yield the files of each request: at most BATCH_BYTES together, or a single larger one."""
        entries: list[ImageEntry] = []
        batch: list[bytes] = []
        size = 0
        for entry, data in self._loaded():
            if not entry.reason:
                if batch and (len(batch) >= self._most_images() or size + len(data) > BATCH_BYTES):
                    self.sent.append(entries)
                    yield batch
                    entries, batch, size = [], [], 0
                batch.append(data)
                size += len(data)
            entries.append(entry)
        if batch:
            self.sent.append(entries)
            yield batch
        else:
            self.rest = entries

    def _most_images(self) -> int:
        return max(1, min(self._batch_images, BATCH_BYTES // self._row_nbytes)) if self._row_nbytes else 1

    def _loaded(self) -> Iterator[_Loaded]:
        for index in self._span:
            with self._changed:
                self._changed.wait_for(lambda: index in self._ready or self._closed)  # noqa: B023 - called here and now
                if self._closed:
                    return
                loaded = self._ready.pop(index)
                if isinstance(loaded, BaseException):
                    raise loaded
                self._held -= len(loaded.data)
                self._changed.notify_all()
            yield loaded

    def _work(self) -> None:
        while True:
            with self._changed:
                # Images are read in order, so the one that is needed next is never blocked by later ones.
                self._changed.wait_for(lambda: self._held < AHEAD_BYTES or self._closed)
                if self._closed or self._next >= self._span.stop:
                    return
                index = self._next
                self._next += 1
            loaded: _Loaded | BaseException
            try:
                loaded = self._load(index)
            except BaseException as error:
                loaded = error
            with self._changed:
                self._ready[index] = loaded
                self._held += len(loaded.data) if isinstance(loaded, _Loaded) else 0
                self._changed.notify_all()

    def _load(self, index: int) -> _Loaded:
        item = self._images[index]
        try:
            data = item.read(self._most_bytes)
        except TooLarge as error:
            reason = f"{error.size} bytes are over the server's limit of {self._most_bytes} for the files of a request"
        except OSError as error:
            if error.errno not in _OF_ONE_FILE:
                raise
            reason = error.strerror or str(error)
        else:
            return _Loaded(ImageEntry(index, item, hashlib.sha256(data).hexdigest(), ""), data)
        return _Loaded(ImageEntry(index, item, "", reason), b"")
