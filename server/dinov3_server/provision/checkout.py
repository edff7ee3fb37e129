"""Fetch one commit of a git repository into a folder, and check what a folder holds."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shlex
import stat
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from importlib.machinery import all_suffixes
from pathlib import Path
from typing import NamedTuple

from dinov3_server.provision.git import GitFailed, Reason, run_locally, run_remotely

log = logging.getLogger(__name__)

BACKOFF = (1.0, 2.0, 4.0)  # seconds between attempts
# The files that identify Meta's repository: the terms of its use, and the only module of it that we import.
REQUIRED = ("LICENSE.md", "dinov3/hub/backbones.py")
_LINK, _SUBMODULE = 0o120000, 0o160000  # modes in a tree
_SHOWN = 5
_LOCAL = re.compile(r"file://|(?!\w[^/]*:)")  # a path has no colon before its first slash: that would be ssh's
# A repository on a disk or volume may have any owner: the commit's id proves what is taken from it.
_ANY_OWNER = "--upload-pack=git -c 'safe.directory=*' upload-pack"


def fetch(url: str, revision: str, folder: Path, sleep: Callable[[float], None]) -> None:
    """Check out `revision` of the repository at `url` in `folder`, which exists and is empty.

    Failures that may be temporary are retried after `sleep(seconds)`. Raises GitFailed, GitMissing, and OSError for the
    folder.
    """
    if "://" in url and re.search(r"\s", url):
        # git would quote it, and where in the message it ends, with the secrets in it, could not be found.
        raise GitFailed("a URL has no spaces in it", Reason.NO_REPOSITORY)
    run_locally("init", "--quiet", "--template=", folder=folder)  # a template could bring hooks
    # Bytes as the commit has them, whatever its own .gitattributes ask for: `look` compares these.
    (folder / ".git" / "info").mkdir()
    (folder / ".git" / "info" / "attributes").write_text("* -text -filter -ident -working-tree-encoding\n")
    for seconds in BACKOFF:
        try:
            return _attempt(url, revision, folder)
        except GitFailed as failed:
            if failed.reason is not Reason.UNREACHABLE:
                raise
            log.warning("Meta's code could not be fetched (%s); trying again in %g s", failed, seconds)
            sleep(seconds)
    return _attempt(url, revision, folder)


def _attempt(url: str, revision: str, folder: Path) -> None:
    command = ["fetch", "--no-tags", "--no-write-fetch-head", "--progress"]
    if _LOCAL.match(url):
        command.append(_ANY_OWNER)
    try:
        run_remotely(*command, "--depth=1", "--", url, revision, folder=folder)
    except GitFailed as failed:
        if failed.reason not in (Reason.NO_COMMIT, Reason.OTHER):
            raise
        # Some servers refuse an id that is not the tip of a branch, or a part of the history: fetch everything.
        refs = ("+refs/heads/*:refs/remotes/origin/*", "+refs/tags/*:refs/tags/*")
        run_remotely(*command, "--", url, *refs, folder=folder)
        try:
            run_locally("cat-file", "-e", revision + "^{commit}", folder=folder)
        except GitFailed:
            raise GitFailed(str(failed), Reason.NO_COMMIT) from None
    run_locally("checkout", "--quiet", "--detach", revision, folder=folder)


class State(Enum):
    """The content of a folder that is to hold a commit of Meta's code."""

    NOTHING = "no such folder, or an empty one"
    GOOD = "the requested commit, complete"
    OTHER = "another commit, complete"
    ON_BRANCH = "another commit, complete, on a branch: it may be someone's work"
    LINKED = "another commit, complete, in a submodule or worktree of another repository"
    MODIFIED = "Meta's code, but different from its commit"
    FOREIGN = "not a checkout of Meta's code"


class Found(NamedTuple):
    """`detail` says what is wrong, in words that follow the folder's name; empty for NOTHING and GOOD."""

    state: State
    detail: str = ""


def is_nothing(folder: Path) -> bool:
    """Tell whether the folder is missing or empty. Raises OSError, also for a file."""
    try:
        return not any(folder.iterdir())
    except FileNotFoundError:
        return True


def look(folder: Path, revision: str) -> Found:
    """Compare the content of every file in `folder` with its commit. Writes nothing. Raises OSError and GitMissing.

    `git status` would not do: it trusts an index, which can hide changes, and modification times.
    """
    if is_nothing(folder):
        return Found(State.NOTHING)
    if not (folder / ".git").exists():
        return Found(State.FOREIGN, "is not empty and is no git checkout")
    is_linked = (folder / ".git").is_file()  # it names the repository's folder
    try:
        commit = run_locally("rev-parse", "--verify", "HEAD^{commit}", folder=folder).decode().strip()
        branch = run_locally("rev-parse", "--abbrev-ref", "HEAD", folder=folder).decode().strip()
        tree = run_locally("ls-tree", "-r", "-z", "--full-tree", commit, folder=folder)
    except GitFailed as damage:
        if is_linked:
            return Found(
                State.FOREIGN,
                f"is a submodule or worktree, whose repository (named in its file .git) cannot be read: {damage}",
            )
        if (folder / REQUIRED[-1]).is_file():
            return Found(State.MODIFIED, f"holds a damaged git repository: {damage}")
        return Found(State.FOREIGN, f"holds a git repository that is not Meta's, or is damaged: {damage}")
    tracked = {}  # mode and blob id by path
    for line in tree.split(b"\0")[:-1]:
        about, _, path = line.partition(b"\t")
        mode, _, blob = about.decode().split()
        tracked[os.fsdecode(path)] = int(mode, 8), blob
    if lacking := [path for path in REQUIRED if path not in tracked]:
        return Found(State.FOREIGN, f"holds a git repository that is not Meta's: its commit has no {lacking[0]}")
    quoted = shlex.quote(str(folder))
    if endings := _with_windows_line_endings(folder, tracked):
        return Found(
            State.MODIFIED,
            f"has Windows line endings (CR LF, of core.autocrlf): {', '.join(endings[:_SHOWN])}; so its bytes are not "
            f"those of its commit. In a clone of yours: `git -C {quoted} config core.autocrlf false && git -C {quoted} "
            "checkout-index --all --force`",
        )
    if changes := [*_changed(folder, tracked), *_importable(folder, tracked)]:
        more = f" and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
        return Found(State.MODIFIED, f"differs from its commit: {', '.join(changes[:_SHOWN])}{more}")
    if commit == revision:
        return Found(State.GOOD)
    if is_linked:
        return Found(State.LINKED, f"is a submodule or worktree of another repository, at commit {commit}")
    if branch != "HEAD":  # the name that git gives to a detached one
        return Found(State.ON_BRANCH, f"holds commit {commit} on the branch {branch}")
    return Found(State.OTHER, f"holds commit {commit}")


def _changed(folder: Path, tracked: Mapping[str, tuple[int, str]]) -> Iterator[str]:
    for name, (tree_mode, blob) in tracked.items():
        path = folder / name
        if tree_mode == _SUBMODULE:
            continue
        try:
            mode = path.lstat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            yield f"{name} (deleted)"
            continue
        same_type = stat.S_ISLNK(mode) if tree_mode == _LINK else stat.S_ISREG(mode)
        if same_type:
            content = os.fsencode(path.readlink()) if tree_mode == _LINK else path.read_bytes()
        if not same_type or _git_id(content) != blob:
            yield f"{name} (changed)"


def _with_windows_line_endings(folder: Path, tracked: Mapping[str, tuple[int, str]]) -> list[str]:
    """Name the files that equal their commit but for CR LF in the place of LF."""
    return [
        name
        for name, (tree_mode, blob) in tracked.items()
        if tree_mode not in (_LINK, _SUBMODULE)
        and (folder / name).is_file()
        and b"\r\n" in (content := (folder / name).read_bytes())
        and _git_id(content) != blob
        and _git_id(content.replace(b"\r\n", b"\n")) == blob
    ]


def _git_id(content: bytes) -> str:
    """Return the name that git gives to the content of a file."""
    return hashlib.sha1(b"blob %d\0%s" % (len(content), content), usedforsecurity=False).hexdigest()


def _importable(folder: Path, tracked: Mapping[str, object]) -> Iterator[str]:
    """Name what Python could import but the commit does not have: modules, and links, which may be packages.

    Python's own caches are left out: Python makes them from the files beside them.
    """

    def refuse(error: OSError) -> None:
        raise error

    suffixes = (*all_suffixes(), ".so")  # .so: of other versions of Python too
    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if name not in (".git", "__pycache__"))
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        modules = [name for name in names if name.endswith(suffixes)]
        for name in links + sorted(modules):
            path = str((Path(root) / name).relative_to(folder))
            if path not in tracked:
                yield f"{path} (added)"
