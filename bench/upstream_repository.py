"""Make a copy of Meta's repository (DINOV3_UPSTREAM) that git can fetch from."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

_AUTHOR = {f"GIT_{role}_{field}": "tests" for role in ("AUTHOR", "COMMITTER") for field in ("NAME", "EMAIL")}


def served_repository(tmp_path: Path) -> tuple[str, str]:
    """Make a git repository in `tmp_path`. Return its URL, and its commit with Meta's code.

    The commit is the HEAD of the git repository DINOV3_UPSTREAM if that has all of its files. If some are missing, such
    as large notebooks, it is a new commit with all others.
    """
    source, served = Path(os.environ["DINOV3_UPSTREAM"]), tmp_path / "upstream"
    objects = Path(_git(source, "rev-parse", "--git-path", "objects"))
    commit = _git(source, "rev-parse", "HEAD")
    _git(tmp_path, "init", "--quiet", str(served))
    (served / ".git" / "objects" / "info" / "alternates").write_text(f"{(source / objects).resolve()}\n")
    listed = _git(source, "rev-list", "--objects", "--missing=print", "--no-walk", commit).splitlines()
    missing = {line[1:] for line in listed if line.startswith("?")}
    if missing:
        _git(served, "read-tree", commit)
        for line in _git(served, "ls-tree", "-r", commit).splitlines():
            about, path = line.split("\t")
            if about.split()[2] in missing:
                _git(served, "update-index", "--force-remove", path)
        commit = _git(served, "commit-tree", "-m", "Without the files that this copy lacks", _git(served, "write-tree"))
    _git(served, "update-ref", "refs/heads/main", commit)
    return served.as_uri(), commit


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "safe.directory=*", "-C", str(folder), *arguments]
    done = subprocess.run(command, env=os.environ | _AUTHOR, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()
