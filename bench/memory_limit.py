"""A control group of the kernel that limits the memory of the processes in it, where one can be made."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
# Starts a command within the group: the shell enters it, and the command takes the shell's place.
_ENTER = 'echo $$ > "$0" && exec "$@"'


@dataclass(frozen=True)
class MemoryLimit:
    """A control group in `folder`, of the kernel's interface `version` 1 or 2."""

    folder: Path
    version: int

    def command(self, command: Sequence[str]) -> list[str]:
        """Return `command`, to run within the group."""
        return ["sh", "-c", _ENTER, str(self.folder / "cgroup.procs"), *command]

    def used(self) -> int:
        """Return the bytes in use that the kernel cannot reclaim: all but the cached pages of files.

        These are anonymous memory, arenas, the kernel's own memory for the processes, and the buffers of sockets.
        """
        stat = self._table("memory.stat")
        if self.version == 2:
            return sum(stat.get(name, 0) for name in ("anon", "shmem", "kernel", "sock"))
        kernel = int((self.folder / "memory.kmem.usage_in_bytes").read_text())
        sockets = int((self.folder / "memory.kmem.tcp.usage_in_bytes").read_text())
        return stat["total_rss"] + stat.get("total_shmem", 0) + kernel + sockets

    def kills(self) -> int:
        """Return how often the kernel has ended a process of the group because the limit was reached."""
        return self._table("memory.oom_control" if self.version == 1 else "memory.events")["oom_kill"]

    def _table(self, name: str) -> dict[str, int]:
        lines = (self.folder / name).read_text().splitlines()
        return {key: int(value) for key, value in map(str.split, lines)}


@contextmanager
def memory_limit(nbytes: int) -> Iterator[MemoryLimit | None]:
    """Yield a new group with a limit of `nbytes`; None if this process may not make one."""
    limit = None
    folder = _ROOT
    try:
        if (_ROOT / "memory").is_dir():
            folder = _ROOT / "memory" / f"bench-{os.getpid()}"
            folder.mkdir()
            (folder / "memory.limit_in_bytes").write_text(str(nbytes))
            (folder / "memory.kmem.tcp.limit_in_bytes").write_text(str(nbytes))  # without it they are not counted
            limit = MemoryLimit(folder, 1)
        elif "memory" in (_ROOT / "cgroup.subtree_control").read_text().split():
            folder = _ROOT / f"bench-{os.getpid()}"
            folder.mkdir()
            (folder / "memory.max").write_text(str(nbytes))
            (folder / "memory.swap.max").write_text("0")
            limit = MemoryLimit(folder, 2)
    except OSError as error:
        print(f"no control group with a memory limit can be made ({error}): PSS is sampled instead", flush=True)
    try:
        yield limit
    finally:
        if folder != _ROOT and folder.is_dir():
            folder.rmdir()
