"""Facts about this machine: available CPU threads and memory, native bfloat16; and the environment of CPU workers."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

from dinov3_server import cgroups

_CPUINFO = Path("/proc/cpuinfo")
# CPU flags of AVX512-BF16 and AMX-BF16 on x86, and of the bfloat16 extension on Arm. Without one of them bfloat16 is
# emulated, and slower than fp32.
_NATIVE_BF16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
# Spins of a waiting libgomp thread before it sleeps: 10 us, about as long as waking it takes.
_SPINS = "1000"
# Cached oneDNN primitives. A batch shape needs six to eight, about 0.5 MB and 0.3 ms each. Two caches hold them,
# oneDNN's own and torch's on top (1024 each by default); limiting only one of them frees nothing.
_PRIMITIVES = "256"


def available_threads(environ: Mapping[str, str] = os.environ) -> int:
    """Return the number of CPUs that this process may use: its affinity, limited by the quotas of its control groups.

    Slurm may leave both unset and only tell a task its CPUs in SLURM_CPUS_PER_TASK.
    """
    threads = len(os.sched_getaffinity(0))
    if (quota := cgroups.cpu_limit()) is not None:
        threads = min(threads, max(1, math.ceil(quota)))
    of_task = environ.get("SLURM_CPUS_PER_TASK", "")
    return min(threads, int(of_task)) if of_task.isdecimal() and int(of_task) else threads


def available_memory() -> int:
    """Return the bytes that can still be allocated: the machine's, or what the limits of the control groups leave."""
    available = cgroups.table(Path("/proc/meminfo"))["MemAvailable:"] * 1024
    left = cgroups.memory_left()
    return available if left is None else min(available, left)


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
