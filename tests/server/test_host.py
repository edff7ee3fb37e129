"""Facts about the CPU and its container, read from the kernel's files."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dinov3_server import host
from dinov3_server.nn.linear import packs


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
    monkeypatch.setattr(host, "_CPUINFO", tmp_path / "cpuinfo")
    assert host.has_native_bf16() is native


def test_no_native_bfloat16_without_cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_CPUINFO", tmp_path / "none")
    assert host.has_native_bf16() is False


GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt and malloc_trim are glibc's")


@GLIBC
def test_freed_memory_is_kept_and_not_faulted_in_again() -> None:
    """In a separate process, as the setting is process-wide."""
    code = """
import resource, torch
from dinov3_server import malloc
malloc.keep_freed_memory()
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


def test_the_worker_environment() -> None:
    assert host.worker_environment({"HOME": "/"}) == {
        "HOME": "/",
        "GOMP_SPINCOUNT": "1000",
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256",
        "LRU_CACHE_CAPACITY": "256",
    }


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"])
def test_user_settings_take_precedence(name: str) -> None:
    assert host.worker_environment({name: "7"})[name] == "7"


def test_a_users_wait_policy_disables_the_spin_count() -> None:
    environment = host.worker_environment({"OMP_WAIT_POLICY": "ACTIVE"})
    assert environment["OMP_WAIT_POLICY"] == "ACTIVE"
    assert "GOMP_SPINCOUNT" not in environment


@GLIBC
def test_freed_memory_between_blocks_in_use_is_returned_once() -> None:
    code = """
from pathlib import Path
from dinov3_server import malloc
def megabytes():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 1024
malloc.keep_freed_memory()
freed, in_use = [], []
for _ in range(300):
    freed.append(bytearray(1 << 20))
    in_use.append(bytearray(4096))  # the heap cannot shrink from its end
del freed
print(megabytes())
malloc.give_back_freed_memory()
print(megabytes())
again = [bytearray(1 << 20) for _ in range(300)]
del again
print(megabytes())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kept, given_back, kept_again = map(float, done.stdout.split())
    assert given_back < kept - 250
    assert kept_again > kept - 50


@pytest.mark.skipif(not packs(torch.empty(0)), reason="no oneDNN for float32 here")
def test_the_variables_limit_both_primitive_caches() -> None:
    """With ten cached primitives the first of 40 is created again; an unlimited cache would still have it."""
    code = """
import torch
from dinov3_server.nn.linear import linear
layer = linear(torch.randn(64, 64), torch.randn(64))
with torch.inference_mode():
    for tokens in [*range(1, 41), 40, 1]:
        print("tokens", tokens, flush=True)
        layer(torch.randn(1, tokens, 64))
"""
    names = [name for name in host.worker_environment({}) if name.endswith("CACHE_CAPACITY")]
    environ = {**os.environ, "ONEDNN_VERBOSE": "profile_create"}

    def made(capacity: str) -> list[int]:
        """Return the number of primitives that oneDNN created at each call."""
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True, text=True, check=True, env=environ | dict.fromkeys(names, capacity),
        )  # fmt: skip
        return [part.count("create:cache_miss,cpu,inner_product") for part in done.stdout.split("tokens")[1:]]

    assert len(names) == 2
    assert made("1024") == [1] * 40 + [0, 0]
    assert made("10") == [1] * 40 + [0, 1]
