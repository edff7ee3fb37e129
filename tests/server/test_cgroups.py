"""The limits of control groups, read from files as the kernel lays them out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dinov3_server import cgroups, host

V2 = "30 23 0:26 {root} {mount} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "{number} 23 0:{number} {root} {mount} rw,nosuid - cgroup cgroup rw,{controllers}"


class Machine:
    """A folder that stands for the root of a machine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.proc = root / "proc/self"
        self.proc.mkdir(parents=True)

    def describe(self, memberships: list[str], mounts: list[str]) -> None:
        (self.proc / "cgroup").write_text("".join(line + "\n" for line in memberships))
        (self.proc / "mountinfo").write_text(
            "".join(line + "\n" for line in ["22 1 8:1 / / rw - ext4 /dev/a rw", *mounts])
        )

    def write(self, group: str, **files: str) -> None:
        folder = self.root / group.lstrip("/")
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name.replace("__", ".")).write_text(text + "\n")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(cgroups, "_ROOT", tmp_path)
    monkeypatch.setattr(cgroups, "_PROC", tmp_path / "proc/self")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    return Machine(tmp_path)


MOUNT = V2.format(root="/", mount="/sys/fs/cgroup")


@pytest.mark.parametrize(
    ("quota", "threads"),
    [("max 100000", 8), ("200000 100000", 2), ("150000 100000", 2), ("1000 100000", 1), ("1600000 100000", 8), ("", 8)],
)
def test_a_container_with_a_namespace_of_its_own(machine: Machine, quota: str, threads: int) -> None:
    machine.describe(["0::/"], [MOUNT])
    machine.write("/sys/fs/cgroup", cpu__max=quota)
    assert host.available_threads() == threads


def test_the_smallest_quota_from_the_own_group_to_the_root_holds(machine: Machine) -> None:
    """As with systemd: CPUQuota= of a service may be larger than that of its slice."""
    machine.describe(["0::/batch.slice/dinov3.service/inner"], [MOUNT])
    machine.write("/sys/fs/cgroup/batch.slice", cpu__max="300000 100000")
    machine.write("/sys/fs/cgroup/batch.slice/dinov3.service", cpu__max="500000 100000")
    machine.write("/sys/fs/cgroup/batch.slice/dinov3.service/inner", cpu__max="max 100000")
    assert cgroups.cpu_limit() == 3.0
    machine.write("/sys/fs/cgroup/batch.slice/other.service", cpu__max="100000 100000")
    assert cgroups.cpu_limit() == 3.0, "another service's"


@pytest.mark.parametrize("mounted", ["/docker/abc", "/"])
def test_version_1_with_the_path_of_the_host(machine: Machine, mounted: str) -> None:
    """Docker without a namespace shows the whole path of a group, and mounts the group itself or all of them."""
    machine.describe(
        ["5:cpu,cpuacct:/docker/abc", "4:memory:/docker/abc", "1:name=systemd:/docker/abc"],
        [
            V1.format(number=41, root=mounted, mount="/sys/fs/cgroup/cpu,cpuacct", controllers="cpu,cpuacct"),
            V1.format(number=42, root=mounted, mount="/sys/fs/cgroup/memory", controllers="memory"),
        ],
    )
    inner = "/docker/abc" if mounted == "/" else ""
    machine.write(f"/sys/fs/cgroup/cpu,cpuacct{inner}", cpu__cfs_quota_us="250000", cpu__cfs_period_us="100000")
    machine.write(
        f"/sys/fs/cgroup/memory{inner}",
        memory__limit_in_bytes="1000000",
        memory__usage_in_bytes="900000",
        memory__stat="cache 1\ntotal_active_file 200000\ntotal_inactive_file 100000",
    )
    if mounted == "/":
        machine.write("/sys/fs/cgroup/cpu,cpuacct", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
        machine.write(
            "/sys/fs/cgroup/memory",
            memory__limit_in_bytes="9223372036854771712",
            memory__usage_in_bytes="5",
            memory__stat="total_active_file 1\ntotal_inactive_file 1",
        )
    assert host.available_threads() == 3
    assert cgroups.memory_left() == 1000000 - 900000 + 300000
    assert host.available_memory() == 400000


def test_a_hybrid_machine_counts_the_version_that_has_the_controller(machine: Machine) -> None:
    machine.describe(
        ["3:memory:/job", "0::/job"],
        [
            V1.format(number=41, root="/", mount="/sys/fs/cgroup/memory", controllers="memory"),
            V2.format(root="/", mount="/sys/fs/cgroup/unified"),
        ],
    )
    machine.write("/sys/fs/cgroup/unified/job", cpu__max="400000 100000")
    machine.write(
        "/sys/fs/cgroup/memory/job",
        memory__limit_in_bytes="5000",
        memory__usage_in_bytes="1000",
        memory__stat="total_active_file 0\ntotal_inactive_file 0",
    )
    assert (cgroups.cpu_limit(), cgroups.memory_left()) == (4.0, 4000)


def test_memory_of_version_2_is_the_least_that_any_level_leaves(machine: Machine) -> None:
    machine.describe(["0::/pod/container"], [MOUNT])
    machine.write(
        "/sys/fs/cgroup/pod",
        memory__max="2000000", memory__high="max", memory__current="1900000",
        memory__stat="anon 5\nactive_file 10000\ninactive_file 20000",
    )  # fmt: skip
    machine.write(
        "/sys/fs/cgroup/pod/container",
        memory__max="max", memory__high="1500000", memory__current="600000",
        memory__stat="active_file 0\ninactive_file 0",
    )  # fmt: skip
    assert cgroups.memory_left() == 2000000 - 1900000 + 30000


def test_a_path_outside_of_the_namespace_and_odd_mount_points(machine: Machine) -> None:
    machine.describe(["0::/../other"], [V2.format(root="/", mount="/mnt/my\\040groups")])
    machine.write("/mnt/my groups", cpu__max="100000 100000")
    assert cgroups.cpu_limit() == 1.0


def test_without_control_groups_the_affinity_counts(machine: Machine) -> None:
    assert host.available_threads() == 8
    assert cgroups.memory_left() is None
    machine.describe([], [])
    assert host.available_threads() == 8


@pytest.mark.parametrize(("value", "threads"), [("3", 3), ("64", 8), ("0", 8), ("", 8), ("3(x2)", 8)])
def test_slurm_tells_the_cpus_of_a_task(machine: Machine, value: str, threads: int) -> None:
    assert host.available_threads({"SLURM_CPUS_PER_TASK": value}) == threads


def test_the_real_files_of_this_machine() -> None:
    limit, left = cgroups.cpu_limit(), cgroups.memory_left()
    assert limit is None or limit > 0
    assert left is None or left > 0
