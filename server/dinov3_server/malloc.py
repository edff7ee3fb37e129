"""Control of glibc's malloc: keep freed memory for speed, and return it to the system after a peak.

`keep_freed_memory` disables glibc's own trimming. On its own, it would make a process keep its peak memory for good.
"""

from __future__ import annotations

import ctypes
import math
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
# How long freed memory is kept for reuse.
_KEPT_SECONDS = 10.0
# The shortest time between two trims.
_TRIM_SECONDS = 0.5
# The least excess worth a trim, which holds malloc's locks for about 0.1 ms per megabyte freed.
_MIN_EXCESS_BYTES = 64 << 20


class _Mallinfo2(ctypes.Structure):
    """The struct mallinfo2 of mallinfo(3)."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


_libc = ctypes.CDLL(None)
_has_trim = hasattr(_libc, "mallopt") and hasattr(_libc, "malloc_trim")
_has_mallinfo = hasattr(_libc, "mallinfo2") and _has_trim
if _has_mallinfo:
    _libc.mallinfo2.restype = _Mallinfo2


def keep_freed_memory() -> None:
    """Make malloc keep memory that is freed from now on; memory freed so far is returned to the kernel.

    A forward pass allocates and frees the same megabytes in every layer, a frontend for every message. By default glibc
    maps each block of over 32 MiB anew and trims the heap as it shrinks, so that the kernel zeroes and faults in the
    same pages over and over. With this setting the heap grows for some time and then keeps its size. Process-wide; does
    nothing without glibc.
    """
    if _has_trim:
        _libc.malloc_trim(0)
        _libc.mallopt(_M_MMAP_MAX, 0)
        _libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def give_back_freed_memory() -> None:
    """Return all free whole pages to the kernel, once; memory freed later is kept again.

    Long-lived blocks fragment the heap, which therefore grows with every new mix of sizes. Pages that are needed again
    are faulted in again. Does nothing without glibc.
    """
    if _has_trim:
        _libc.malloc_trim(0)


def allocated_bytes() -> int:
    """Return the bytes allocated by all threads; 0 without glibc 2.33. Takes about 40 us."""
    if not _has_mallinfo:
        return 0
    info = _libc.mallinfo2()
    return int(info.uordblks + info.hblkhd)


def anonymous_bytes() -> int:
    """Return the process's resident private memory, whether malloc uses it or keeps it free."""
    _, resident, shared, *_ = map(int, _STATM.read_text().split())
    return (resident - shared) * _PAGE_BYTES


class Trimmer:
    """Returns freed memory to the system after a peak. Call `look` about once a second."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, int]] = deque()
        self._trimming: threading.Thread | None = None
        self._trimmed_at = -math.inf

    def look(self, allocated: int) -> threading.Thread | None:
        """Return free memory if the process holds over twice its peak use of the last 10 s plus 64 MiB.

        `allocated` is the peak use since the last call. Returns the thread that does it, if one was started: it takes
        about 0.1 ms per megabyte.
        """
        now = time.monotonic()
        self._recent.append((now, allocated))
        while self._recent[0][0] < now - _KEPT_SECONDS:
            self._recent.popleft()
        used = max(peak for _, peak in self._recent)
        if not _has_mallinfo or anonymous_bytes() <= 2 * used + _MIN_EXCESS_BYTES:
            return None
        return self.trim()

    def trim(self) -> threading.Thread | None:
        """Return free memory in a thread. Returns the thread, or None if it is at work or began within
        _TRIM_SECONDS."""
        now = time.monotonic()
        if now - self._trimmed_at < _TRIM_SECONDS or (self._trimming is not None and self._trimming.is_alive()):
            return None
        self._trimmed_at = now
        self._trimming = threading.Thread(target=give_back_freed_memory, name="trim", daemon=True)
        self._trimming.start()
        return self._trimming
