"""Provide shared memory with one owner: a frontend allocates and frees ranges, workers only map it.

An arena is a memfd: it has no name, so nothing can be left behind, and it is passed to workers as a descriptor. Its
memory is allocated when it is created (posix_fallocate), so that a lack of memory shows at start and not at first use.
A memfd has no size limit: if more is requested than the machine has, the kernel does not refuse but allocates pages
until its OOM killer kills a process. So the available memory is checked first.

No lock is shared between processes: only the owner allocates, and control messages say what is in which range.
"""

from __future__ import annotations

import bisect
import mmap
import os

from dinov3_server.errors import StartupError
from dinov3_server.host import available_memory

PAGE = mmap.PAGESIZE


class ArenaMapping:
    """An arena that is mapped into this process; `memory` is all of it."""

    def __init__(self, fd: int, nbytes: int) -> None:
        self._map = mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        self.memory = memoryview(self._map)

    def close(self) -> None:
        """Unmap the arena. All views of `memory` must have been released."""
        self.memory.release()
        self._map.close()


class Arena(ArenaMapping):
    """The owner's side of an arena: its mapping, its descriptor `fd`, and an allocator of page-aligned ranges.

    The allocator is first fit, and merges neighbors at once. Few ranges are allocated at a time (one per request), so
    the free list is short and a linear scan is fast.
    """

    def __init__(self, nbytes: int) -> None:
        """Allocate the memory. Raises StartupError if there is not enough."""
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
        self._free: list[tuple[int, int]] = [(0, nbytes)]  # (offset, length), by offset, never adjacent
        self._used: dict[int, int] = {}  # length by offset

    @property
    def used_bytes(self) -> int:
        return sum(self._used.values())

    def allocate(self, nbytes: int) -> int | None:
        """Return the offset of a range of at least `nbytes` bytes, or None if none is free."""
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
        """Free the range that begins at `offset`."""
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
    """Round up to whole pages."""
    return -(-nbytes // PAGE) * PAGE
