"""What this machine's CPU gives us: threads, and native bfloat16."""

from __future__ import annotations

import math
import os
from pathlib import Path

_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_CPUINFO = Path("/proc/cpuinfo")
# AVX512-BF16 and AMX-BF16 on x86, the bfloat16 extension on Arm. Elsewhere bfloat16 is emulated, slower than fp32.
_NATIVE_BF16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


def available_threads() -> int:
    """CPUs that this process may use: its affinity, less where a container's quota allows less."""
    allowed = len(os.sched_getaffinity(0))
    try:
        quota, period = _CGROUP_QUOTA.read_text().split()
        return max(1, min(allowed, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup v2, or "max": no quota
        return allowed


def has_native_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 itself."""
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return not _NATIVE_BF16.isdisjoint(flags.partition(":")[2].split())
