"""Small git repositories with the layout of Meta's."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

LICENSE, BACKBONES = "LICENSE.md", "dinov3/hub/backbones.py"
LAYOUT = {
    LICENSE: "DINOv3 License\n",
    "README.md": "# DINOv3\n",
    "hubconf.py": "from dinov3.hub.backbones import dinov3_vits16\n",
    "dinov3/__init__.py": "",
    "dinov3/hub/__init__.py": "",
    BACKBONES: "def dinov3_vits16(**options):\n    return options\n",
}
_PLAIN = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")} | {
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": os.devnull,
    **{f"GIT_{who}_{what}": "tests@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
}


def git(folder: Path, *arguments: str) -> str:
    """Run git without any configuration, and return its output."""
    command = ["git", "-C", str(folder), *arguments]
    done = subprocess.run(command, env=_PLAIN, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout.strip()


def make_repository(folder: Path, files: dict[str, str] = LAYOUT) -> str:
    """Make a repository with one commit, and return the commit's id."""
    folder.mkdir(parents=True)
    git(folder, "init", "--quiet", "--initial-branch=main")
    return add_commit(folder, files)


def add_commit(folder: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    git(folder, "add", "--all", "--force")
    git(folder, "commit", "--quiet", "--message", "a commit")
    return git(folder, "rev-parse", "HEAD")


def program(folder: Path, name: str, script: str) -> Path:
    """Write a shell script called `name`, for a `folder` on PATH."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def beside(folder: Path) -> list[str]:
    """List the folder that contains `folder`."""
    return sorted(path.name for path in folder.parent.iterdir())
