"""The children of this process."""

from __future__ import annotations

import os
from pathlib import Path


def children(module: str) -> set[int]:
    """Return the pids of living children that run `python -m MODULE`."""
    found = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                # pid (command) state parent ...; the command may contain anything
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
                command = (folder / "cmdline").read_bytes().split(b"\0")
            except (OSError, ValueError):
                continue  # it has just ended
            if int(parent) == os.getpid() and state != "Z" and module.encode() in command:
                found.add(int(folder.name))
    return found


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process in bytes; 0 if it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def most_resident_bytes(pid: int) -> int:
    """Return the most resident memory that a living process ever had, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
