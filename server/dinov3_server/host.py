"""What this machine's CPU gives us: threads and how they wait, native bfloat16, and memory that stays where it is."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
_CPUINFO = Path("/proc/cpuinfo")
# AVX512-BF16 and AMX-BF16 on x86, the bfloat16 extension on Arm. Elsewhere bfloat16 is emulated, slower than fp32.
_NATIVE_BF16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
# How often a thread of libgomp looks whether it may go on before it sleeps: 10 us, about what it takes to wake it.
_SPINS = "1000"
# oneDNN's primitives that are kept. A shape of batch needs six to eight: about half a MB and 0.3 ms each.
# Two caches hold them, oneDNN's own and torch's over it (1024 each by default); bounding one alone frees nothing.
_PRIMITIVES = "256"


def available_threads() -> int:
    """CPUs that this process may use: its affinity, less where a container's quota allows less."""
    allowed = len(os.sched_getaffinity(0))
    try:
        quota, period = (CGROUP / "cpu.max").read_text().split()
        return max(1, min(allowed, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup v2, or "max": no quota
        return allowed


def available_memory() -> int:
    """Bytes that can still be taken: the machine's, or what the control group (v2) leaves of its limit.

    The group's use counts the files that it has read. The kernel gives those pages up for others, so they count as
    free; a worker that reads its weights would otherwise seem to leave nothing.
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


def _table(path: Path) -> dict[str, int]:
    """The numbers of a file of lines `name value [unit]`."""
    return {name: int(value) for name, value, *_ in map(str.split, path.read_text().splitlines())}
