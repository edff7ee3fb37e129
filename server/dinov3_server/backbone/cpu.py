"""What this machine's CPU gives us: threads and how they wait, native bfloat16, and memory that stays where it is."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Mapping
from pathlib import Path

_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_CPUINFO = Path("/proc/cpuinfo")
# AVX512-BF16 and AMX-BF16 on x86, the bfloat16 extension on Arm. Elsewhere bfloat16 is emulated, slower than fp32.
_NATIVE_BF16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
# How often a thread of libgomp looks whether it may go on before it sleeps: 10 us, about what it takes to wake it.
_SPINS = "1000"
# oneDNN's primitives that are kept. A shape of batch needs six to eight: about half a MB and 0.3 ms each.
# Two caches hold them, oneDNN's own and torch's over it (1024 each by default); bounding one alone frees nothing.
_PRIMITIVES = "256"
# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def available_threads() -> int:
    """CPUs that this process may use: its affinity, less where a container's quota allows less."""
    allowed = len(os.sched_getaffinity(0))
    try:
        quota, period = _CGROUP_QUOTA.read_text().split()
        return max(1, min(allowed, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup v2, or "max": no quota
        return allowed


def worker_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that computes on the CPU: what its threads and caches cost others is bounded.

    torch's libraries read these variables once, when they are loaded. Values in `environ` win.

    A forward pass has thousands of barriers. By default libgomp's threads spin at each for milliseconds; where another
    process runs on one of the cores, they spin on the core that the late thread is waiting for. GOMP_SPINCOUNT
    overrides OMP_WAIT_POLICY, so it is not set where `environ` has that.
    """
    ours = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": _PRIMITIVES, "LRU_CACHE_CAPACITY": _PRIMITIVES}
    if "OMP_WAIT_POLICY" not in environ:
        ours["GOMP_SPINCOUNT"] = _SPINS
    return ours | dict(environ)


def has_native_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 itself."""
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return not _NATIVE_BF16.isdisjoint(flags.partition(":")[2].split())


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
