"""Read the CPU and memory limits of this process's control groups, in versions 1 and 2, as the kernel applies them.

A limit holds for a group and everything below it, so every group from the process's own to the root counts, whether
Docker, Kubernetes, systemd (CPUQuota=, MemoryMax=) or Slurm made it. Sources: cgroups(7), and the kernel's
Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

_PROC = Path("/proc/self")
# Where a mount point of _PROC/mountinfo is found; another folder in tests.
_ROOT = Path("/")


def cpu_limit() -> float | None:
    """Return the CPUs that the quotas allow, as 1.5; None without a quota."""
    return min(_values("cpu", _cpu_v2, _cpu_v1), default=None)


def memory_left() -> int | None:
    """Return the bytes that may still be allocated before a group reaches its limit; None without a limit.

    Cached pages of files count as used by a group, but the kernel reclaims them, so they count as free here.
    Otherwise a worker that has read its weights would seem to leave no memory.
    """
    left = min(_values("memory", _memory_v2, _memory_v1), default=None)
    return None if left is None else int(left)


def _values(
    controller: str, version_2: Callable[[Path], float | None], version_1: Callable[[Path], float | None]
) -> Iterator[float]:
    """Yield the value of each group of this process that has one."""
    for folder, is_version_2 in _groups(controller):
        try:
            value = (version_2 if is_version_2 else version_1)(folder)
        except (OSError, ValueError, KeyError):  # the root group and groups without the controller have no such files
            continue
        if value is not None:
            yield value


def _groups(controller: str) -> Iterator[tuple[Path, bool]]:
    """Yield the folders of this process's groups, from its own to the root of each hierarchy, with "is version 2"."""
    try:
        memberships = (_PROC / "cgroup").read_text().splitlines()
        mounts = [line.split() for line in (_PROC / "mountinfo").read_text().splitlines()]
    except OSError:  # no /proc
        return
    for membership in memberships:
        _, controllers, path = membership.split(":", 2)
        is_version_2 = not controllers
        if not is_version_2 and controller not in controllers.split(","):
            continue
        for root, mount_point in _mounts(mounts, None if is_version_2 else controller):
            # A container may see the whole path of its group while only the group itself is mounted, and a path
            # outside of its namespace begins with "/..": then what is mounted is all that can be seen.
            inside = PurePosixPath(path).is_relative_to(root) and ".." not in path
            folder = top = _ROOT / mount_point.lstrip("/")
            if inside:
                folder = top / PurePosixPath(path).relative_to(root)
            yield folder, is_version_2
            while folder != top:
                folder = folder.parent
                yield folder, is_version_2


def _mounts(mounts: list[list[str]], controller: str | None) -> Iterator[tuple[str, str]]:
    """Yield the root and the mount point of each hierarchy of version 1 with `controller`, or of version 2 if None."""
    for fields in mounts:  # see proc_pid_mountinfo(5): optional fields end with "-"
        root, mount_point = fields[3], fields[4]
        kind, _, options = fields[fields.index("-") + 1 :][:3]
        if kind == "cgroup2" if controller is None else kind == "cgroup" and controller in options.split(","):
            yield _unescaped(root), _unescaped(mount_point)


def _unescaped(text: str) -> str:
    """Return a path of mountinfo, where blanks and backslashes are octal."""
    return text.encode("latin-1", "backslashreplace").decode("unicode_escape") if "\\" in text else text


def _cpu_v2(folder: Path) -> float | None:
    quota, period = (folder / "cpu.max").read_text().split()
    return None if quota == "max" else int(quota) / int(period)


def _cpu_v1(folder: Path) -> float | None:
    quota = int((folder / "cpu.cfs_quota_us").read_text())
    return None if quota <= 0 else quota / int((folder / "cpu.cfs_period_us").read_text())


def _memory_v2(folder: Path) -> float | None:
    # Above memory.high a group is not killed, but slowed down until it has given memory back.
    limits = [(folder / name).read_text().strip() for name in ("memory.max", "memory.high")]
    numbers = [int(limit) for limit in limits if limit != "max"]
    if not numbers:
        return None
    cached = table(folder / "memory.stat")
    used = int((folder / "memory.current").read_text())
    return min(numbers) - used + cached["active_file"] + cached["inactive_file"]


def _memory_v1(folder: Path) -> float | None:
    limit = int((folder / "memory.limit_in_bytes").read_text())
    if limit >= 1 << 62:  # "no limit" is the largest number of whole pages in 63 bits
        return None
    cached = table(folder / "memory.stat")
    used = int((folder / "memory.usage_in_bytes").read_text())
    return limit - used + cached["total_active_file"] + cached["total_inactive_file"]


def table(path: Path) -> dict[str, int]:
    """Read a file of lines `name value [unit]`."""
    return {name: int(value) for name, value, *_ in map(str.split, path.read_text().splitlines())}
