"""The control group of `bench bombs`, in folders with the files that the kernel would write."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from bench import memory_limit
from bench.memory_limit import MemoryLimit

KERNEL = {
    1: {
        "memory.stat": "cache 9000\ntotal_cache 9000\ntotal_rss 1000\ntotal_shmem 200\n",
        "memory.kmem.usage_in_bytes": "30\n",
        "memory.kmem.tcp.usage_in_bytes": "4\n",
        "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
    },
    2: {
        "memory.stat": "anon 1000\nfile 9000\nkernel 30\nsock 4\nshmem 200\n",
        "memory.events": "low 0\noom 3\noom_kill 2\n",
    },
}


@pytest.mark.parametrize("version", [1, 2])
def test_cached_files_do_not_count_as_used(version: int, tmp_path: Path) -> None:
    for name, text in KERNEL[version].items():
        (tmp_path / name).write_text(text)
    limit = MemoryLimit(tmp_path, version)
    assert limit.used() == 1234
    assert limit.kills() == 2


def test_the_command_enters_the_group_and_keeps_its_process(tmp_path: Path) -> None:
    command = MemoryLimit(tmp_path, 2).command(["sh", "-c", "echo $$ $0", "argument with spaces"])
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    entered = (tmp_path / "cgroup.procs").read_text().strip()
    assert printed == f"{entered} argument with spaces\n"


def test_without_control_groups_there_is_no_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_limit, "_ROOT", tmp_path)
    with memory_limit.memory_limit(1 << 30) as limit:
        assert limit is None
