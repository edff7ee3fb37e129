"""What lies in a folder that is to hold Meta's code: nothing, a whole checkout of a commit, or something else."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from enum import Enum
from importlib.machinery import all_suffixes
from pathlib import Path
from typing import NamedTuple

from dinov3_server.provision.git import GitFailed, GitMissing, ask

# What makes a repository Meta's: the terms of its use, and the only module of it that we import.
REQUIRED = ("LICENSE.md", "dinov3/hub/backbones.py")
_LINK, _SUBMODULE = 0o120000, 0o160000  # modes in a tree
_SHOWN = 5


class State(Enum):
    NOTHING = "nothing is there"
    GOOD = "whole, and the commit that is wanted"
    OTHER = "whole, of another commit"
    ON_BRANCH = "whole, of another commit, on a branch: somebody works in it"
    MODIFIED = "Meta's code, but not as its commit has it"
    FOREIGN = "not a checkout of Meta's code"


class _Entry(NamedTuple):
    """A file of a commit: its mode as git has it, and the id of its content."""

    mode: int
    blob: str


class Found(NamedTuple):
    """`detail` says what is wrong, in words that follow the folder's name; empty for NOTHING and GOOD."""

    state: State
    detail: str = ""


def is_nothing(folder: Path) -> bool:
    """Whether there is no such folder, or nothing in it. Raises OSError, also where it is a file."""
    try:
        return not any(folder.iterdir())
    except FileNotFoundError:
        return True


def look(folder: Path, revision: str) -> Found:
    """Compare every file of `folder` with what its commit says, by content. Nothing is written.

    By content, and not as `git status` does: that trusts an index, which is told what to overlook, and times.
    Raises OSError and GitMissing.
    """
    if is_nothing(folder):
        return Found(State.NOTHING)
    if not (folder / ".git").is_dir():
        return Found(State.FOREIGN, "is not empty and is no git checkout")
    try:
        commit = ask("rev-parse", "--verify", "HEAD^{commit}", folder=folder).decode().strip()
        branch = ask("rev-parse", "--abbrev-ref", "HEAD", folder=folder).decode().strip()
        tracked = _files(folder, commit)
    except GitMissing:
        raise
    except GitFailed as damage:
        if (folder / REQUIRED[-1]).is_file():
            return Found(State.MODIFIED, f"holds a damaged git repository: {damage}")
        return Found(State.FOREIGN, f"holds a git repository that is not Meta's, or is damaged: {damage}")
    lacking = [path for path in REQUIRED if path not in tracked]
    if lacking:
        return Found(State.FOREIGN, f"holds a git repository that is not Meta's: its commit has no {lacking[0]}")
    changes = [*_changed(folder, tracked), *_importable(folder, tracked)]
    if changes:
        more = f" and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
        return Found(State.MODIFIED, f"is not as its commit has it: {', '.join(changes[:_SHOWN])}{more}")
    if commit == revision:
        return Found(State.GOOD)
    if branch != "HEAD":  # which is what a detached one calls itself
        return Found(State.ON_BRANCH, f"holds commit {commit} on the branch {branch}")
    return Found(State.OTHER, f"holds commit {commit}")


def _files(folder: Path, commit: str) -> dict[str, _Entry]:
    """Every file of a commit by its path from the root. Raises GitFailed."""
    files = {}
    for line in ask("ls-tree", "-r", "-z", "--full-tree", commit, folder=folder).split(b"\0")[:-1]:
        about, _, path = line.partition(b"\t")
        mode, _, blob = about.decode().split()
        files[os.fsdecode(path)] = _Entry(int(mode, 8), blob)
    return files


def _changed(folder: Path, tracked: Mapping[str, _Entry]) -> Iterator[str]:
    for path, entry in tracked.items():
        if entry.mode == _SUBMODULE:
            continue
        try:
            mode = (folder / path).lstat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            yield f"{path} (deleted)"
            continue
        same_kind = stat.S_ISLNK(mode) if entry.mode == _LINK else stat.S_ISREG(mode)
        if not same_kind or _blob(_content(folder / path, mode)) != entry.blob:
            yield f"{path} (changed)"


def _blob(content: bytes) -> str:
    """The id that git gives to a file of this content."""
    return hashlib.sha1(b"blob %d\0%s" % (len(content), content), usedforsecurity=False).hexdigest()


def _content(path: Path, mode: int) -> bytes:
    return os.fsencode(path.readlink()) if stat.S_ISLNK(mode) else path.read_bytes()


def _importable(folder: Path, tracked: Mapping[str, _Entry]) -> Iterator[str]:
    """What the commit does not have and Python could import: modules, and links that may be packages.

    Python's own caches are none: they hold what it makes of the files beside them.
    """

    def refuse(error: OSError) -> None:
        raise error

    suffixes = (*all_suffixes(), ".so")  # of other versions of Python too
    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if name not in (".git", "__pycache__"))
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        modules = [name for name in names if name.endswith(suffixes)]
        for name in links + sorted(modules):
            path = str((Path(root) / name).relative_to(folder))
            if path not in tracked:
                yield f"{path} (added)"
