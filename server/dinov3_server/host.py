"""Facts about this machine: available CPU threads and memory, native bfloat16; and the environment of CPU workers."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
_CPUINFO = Path("/proc/cpuinfo")
# CPU flags of AVX512-BF16 and AMX-BF16 on x86, and of the bfloat16 extension on Arm. Without one of them bfloat16 is
# emulated, and slower than fp32.
_NATIVE_BF16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
# Spins of a waiting libgomp thread before it sleeps: 10 us, about as long as waking it takes.
_SPINS = "1000"
# Cached oneDNN primitives. A batch shape needs six to eight, about 0.5 MB and 0.3 ms each. Two caches hold them,
# oneDNN's own and torch's on top (1024 each by default); limiting only one of them frees nothing.
_PRIMITIVES = "256"


def available_threads() -> int:
    """Return the number of CPUs that this process may use: its affinity, limited by a container's quota."""
    allowed = len(os.sched_getaffinity(0))
    try:
        quota, period = (CGROUP / "cpu.max").read_text().split()
        return max(1, min(allowed, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup v2, or "max": no quota
        return allowed


def available_memory() -> int:
    """Return the bytes that can still be allocated: the machine's, or what the control group's (v2) limit leaves.

    Cached pages of files count as used by the group, but the kernel reclaims them, so they count as free here.
    Otherwise a worker that has read its weights would seem to leave no memory.
    """
    available = _table(Path("/proc/meminfo"))["MemAvailable:"] * 1024
    try:
        limit, used = ((CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        if limit != "max":
            stat = _table(CGROUP / "memory.stat")
            left = int(limit) - int(used) + stat["active_file"] + stat["inactive_file"]
            available = min(available, left)
    except OSError:  # no such control group
        pass
    return available


def worker_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a process that computes on the CPU, with limits on spinning threads and caches.

    torch's libraries read these variables once, when they are loaded. Values in `environ` take precedence.

    A forward pass has thousands of barriers, and by default libgomp's threads spin at each for milliseconds. If another
    process runs on one of the cores, they take the core that the late thread needs. GOMP_SPINCOUNT overrides
    OMP_WAIT_POLICY, so it is not set if `environ` has that.
    """
    ours = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": _PRIMITIVES, "LRU_CACHE_CAPACITY": _PRIMITIVES}
    if "OMP_WAIT_POLICY" not in environ:
        ours["GOMP_SPINCOUNT"] = _SPINS
    return ours | dict(environ)


def has_native_bf16() -> bool:
    """Return whether the CPU has bfloat16 products in hardware."""
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return not _NATIVE_BF16.isdisjoint(flags.partition(":")[2].split())


def _table(path: Path) -> dict[str, int]:
    """Read a file of lines `name value [unit]`."""
    return {name: int(value) for name, value, *_ in map(str.split, path.read_text().splitlines())}
