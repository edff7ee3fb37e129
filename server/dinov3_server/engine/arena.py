"""Shared memory with one owner: a frontend allocates and frees, workers only map it.

An arena is a memfd: it has no name, so nothing can be left behind, and it is passed to workers as a
descriptor. Its memory is taken when it is made (posix_fallocate), so that too little shows at start and
not at first touch. A memfd has no size limit of its own: asked for more than there is, the kernel would
not refuse but take pages until it kills somebody, so what is there is looked up first.
No lock crosses a process: the allocator is private to the owner, and which range holds what travels
in control messages.
"""

from __future__ import annotations

import bisect
import mmap
import os

from dinov3_server.errors import StartupError
from dinov3_server.host import available_memory

PAGE = mmap.PAGESIZE


class ArenaMapping:
    """A process's view of an arena; `memory` covers all of it."""

    def __init__(self, fd: int, nbytes: int) -> None:
        self._map = mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        self.memory = memoryview(self._map)

    def close(self) -> None:
        """Unmap. Every view that was made of `memory` must be gone."""
        self.memory.release()
        self._map.close()


class Arena(ArenaMapping):
    """The owner's side: a mapping, its descriptor, and a first-fit allocator of page-aligned ranges.

    First fit with immediate merging of neighbours: a handful of ranges are live at a time (one a
    request), so the free list stays short and a linear scan costs less than anything cleverer.
    """

    def __init__(self, nbytes: int) -> None:
        nbytes = _pages(nbytes)
        available = available_memory()
        if nbytes > available:
            raise StartupError(
                f"a frontend's arena takes {nbytes} bytes of memory and {available} are available; "
                "set --arena-bytes lower or give the process more memory"
            )
        self.fd = os.memfd_create("dinov3-arena", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(self.fd, 0, nbytes)
            super().__init__(self.fd, nbytes)
        except OSError as error:
            os.close(self.fd)
            raise StartupError(
                f"cannot take {nbytes} bytes of memory for a frontend's arena ({error}); "
                "set --arena-bytes lower or give the process more memory"
            ) from None
        self.nbytes = nbytes
        self._free: list[tuple[int, int]] = [(0, nbytes)]  # (offset, length), by offset, never touching
        self._used: dict[int, int] = {}

    @property
    def used_bytes(self) -> int:
        return sum(self._used.values())

    def allocate(self, nbytes: int) -> int | None:
        """Offset of a free range of at least `nbytes` bytes, or None when there is none."""
        wanted = _pages(max(nbytes, 1))
        for index, (offset, length) in enumerate(self._free):
            if length >= wanted:
                if length == wanted:
                    del self._free[index]
                else:
                    self._free[index] = (offset + wanted, length - wanted)
                self._used[offset] = wanted
                return offset
        return None

    def free(self, offset: int) -> None:
        length = self._used.pop(offset)
        index = bisect.bisect(self._free, (offset, 0))
        if index < len(self._free) and self._free[index][0] == offset + length:
            length += self._free.pop(index)[1]
        if index and sum(self._free[index - 1]) == offset:
            offset, before = self._free.pop(index - 1)
            length += before
            index -= 1
        self._free.insert(index, (offset, length))

    def close(self) -> None:
        super().close()
        os.close(self.fd)


def _pages(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE
