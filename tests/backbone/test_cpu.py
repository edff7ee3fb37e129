"""What a CPU and its container allow, from the files in which the kernel says so."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from dinov3_server.backbone import cpu


@pytest.mark.parametrize(
    ("quota", "threads"),
    [("max 100000", 8), ("200000 100000", 2), ("150000 100000", 2), ("1000 100000", 1), ("1600000 100000", 8), ("", 8)],
)
def test_threads_are_the_affinity_less_a_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, threads: int
) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(cpu, "_CGROUP_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert cpu.available_threads() == threads


def test_threads_without_cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_CGROUP_QUOTA", tmp_path / "none")
    assert cpu.available_threads() == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("text", "native"),
    [
        ("processor : 0\nflags\t\t: fpu avx512f avx512_bf16 sse\n", True),
        ("processor : 0\nflags\t\t: fpu amx_bf16 amx_tile\n", True),
        ("processor\t: 0\nFeatures\t: fp asimd i8mm bf16\n", True),
        ("processor : 0\nflags\t\t: fpu avx512f avx512vl\nmodel name : avx512_bf16\n", False),
        ("processor : 0\n", False),
    ],
)
def test_native_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, native: bool) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(cpu, "_CPUINFO", tmp_path / "cpuinfo")
    assert cpu.has_native_bf16() is native


def test_native_bfloat16_where_the_kernel_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_CPUINFO", tmp_path / "none")
    assert cpu.has_native_bf16() is False


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_kept_and_not_faulted_in_again() -> None:
    """In a process of its own, since it is a setting of the whole process."""
    code = """
import resource, torch
from dinov3_server.backbone import cpu
cpu.keep_freed_memory()
def faults(rounds):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        torch.ones(16 << 20)  # 64 MiB, taken and freed
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(40)  # until the heap has found its size
print(faults(10))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000  # pages; 163,840 without


def test_a_workers_threads_wait_briefly() -> None:
    assert cpu.worker_environment({"HOME": "/"}) == {"HOME": "/", "GOMP_SPINCOUNT": "1000"}


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_how_threads_wait_is_left_to_a_user_who_says_so(name: str) -> None:
    """Even where it is the policy alone: GOMP_SPINCOUNT would override it."""
    assert cpu.worker_environment({name: "ACTIVE"}) == {name: "ACTIVE"}
