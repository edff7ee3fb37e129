"""What this process has from malloc, and how what is free of it goes back to the system after a peak.

`keep_freed_memory` turns glibc's own trimming off, for speed. Without more a process would keep the memory of its
largest moment for good.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections import deque
from pathlib import Path

# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_STATM = Path("/proc/self/statm")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
# How long memory is kept for what may come again.
_KEPT_SECONDS = 10.0
# Less is not worth a trim, which holds malloc's locks for about 0.1 ms a megabyte that is freed.
_LEAST_BYTES = 64 << 20


class _Mallinfo2(ctypes.Structure):
    """mallinfo(3)."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


_libc = ctypes.CDLL(None)
_has_mallinfo = hasattr(_libc, "mallinfo2") and hasattr(_libc, "malloc_trim")
if _has_mallinfo:
    _libc.mallinfo2.restype = _Mallinfo2


def keep_freed_memory() -> None:
    """Have malloc keep what this process frees from now on; what it has freed so far goes back to the kernel.

    A forward pass takes and frees the same megabytes layer by layer, a frontend the same messages request by request.
    By default glibc maps blocks of over 32 MiB anew each time and trims the heap as it shrinks, so that the kernel
    zeroes and faults in the same pages over and over. The heap grows for some time and then keeps its size.
    Process-wide; does nothing without glibc.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def give_back_freed_memory() -> None:
    """Give every whole page that malloc keeps free back to the kernel. It is kept again from then on.

    Blocks that live long come to lie between freed ones, so that the heap grows with every new mix of sizes. What is
    needed again is faulted in anew. Does nothing without glibc.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def allocated_bytes() -> int:
    """Return the bytes that are allocated now, by all threads; 0 without glibc 2.33. Takes some 40 us."""
    if not _has_mallinfo:
        return 0
    info = _libc.mallinfo2()
    return int(info.uordblks + info.hblkhd)


def anonymous_bytes() -> int:
    """Return the memory of its own that the process has from the system, used or free."""
    _, resident, shared, *_ = map(int, _STATM.read_text().split())
    return (resident - shared) * _PAGE_BYTES


class Trimmer:
    """Gives memory back that was freed after a peak. `look` is to be called about once a second."""

    def __init__(self) -> None:
        self._lately: deque[tuple[float, int]] = deque()
        self._trimming: threading.Thread | None = None

    def look(self, allocated: int) -> threading.Thread | None:
        """Give back what is free where the process has over twice the most that it used in the last 10 s, and 64 MiB.

        `allocated` is the most that was allocated since the last look. Returns the thread that does it, where one is
        begun: it takes about 0.1 ms a megabyte.
        """
        now = time.monotonic()
        self._lately.append((now, allocated))
        while self._lately[0][0] < now - _KEPT_SECONDS:
            self._lately.popleft()
        used = max(most for _, most in self._lately)
        if not _has_mallinfo or (self._trimming is not None and self._trimming.is_alive()):
            return None
        if anonymous_bytes() <= 2 * used + _LEAST_BYTES:
            return None
        self._trimming = threading.Thread(target=give_back_freed_memory, name="trim", daemon=True)
        self._trimming.start()
        return self._trimming
