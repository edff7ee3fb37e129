"""Fetching Meta's code in processes that are killed or run at once: the folder is always complete or repaired."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dinov3_server.provision.checkout import Found, State, look
from dinov3_server.provision.vendor import vendor
from tests.server.provision.repositories import BACKBONES, add_commit, beside, git, make_repository, program
from tests.support.paths import ROOT

NEVER = -1
FOUND = ("nothing", "another commit", "a modified tree")


class Rig:
    """A repository with two commits; `start` prepares the target."""

    def __init__(self, folder: Path) -> None:
        self.repository = folder / "served"
        self.old = make_repository(self.repository)
        self.new = add_commit(self.repository, {"dinov3/new.py": ""})
        self.target = folder / "upstream" / "code"

    def start(self, found: str) -> None:
        shutil.rmtree(self.target.parent, ignore_errors=True)
        if found != "nothing":
            vendor(str(self.repository), self.old, self.target)
        if found == "a modified tree":
            (self.target / BACKBONES).write_text("modified = True\n")

    def process(self, found: str, fatal: int, path: str | None = None) -> subprocess.Popen[str]:
        """Start a process that fetches the new commit, with `force` if necessary."""
        given: list[Any] = [str(self.repository), self.new, str(self.target), {"force": found == "a modified tree"}]
        return subprocess.Popen(
            [sys.executable, "-m", "tests.server.provision.vendor_process", json.dumps([*given, fatal])],
            cwd=ROOT,
            env=os.environ | ({"PATH": path} if path else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def check_and_mend(self, found: str) -> None:
        """Check that a kill left nothing, the old checkout or the new one, and that the next process repairs it."""
        state = look(self.target, self.new)
        if found == "a modified tree" and state.state is State.MODIFIED:
            assert (self.target / BACKBONES).read_text() == "modified = True\n"
            assert state.detail.endswith(f"{BACKBONES} (changed)")
        elif state.state is State.OTHER:
            assert (found, state.detail) == ("another commit", f"holds commit {self.old}")
        else:
            assert state.state in (State.NOTHING, State.GOOD)
        aside = look(self.target.with_name(".code.old"), self.old)
        if aside.state is not State.NOTHING:  # it may yet come back, so it is what it was
            wanted = Found(State.MODIFIED, f"differs from its commit: {BACKBONES} (changed)")
            assert aside == (wanted if found == "a modified tree" else Found(State.GOOD))
        vendor(str(self.repository), self.new, self.target, force=found == "a modified tree")
        assert look(self.target, self.new).state is State.GOOD
        assert (self.target / "dinov3" / "new.py").exists()


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def steps(rig: Rig, found: str) -> int:
    """Count the steps of a process that is not killed."""
    rig.start(found)
    said, errors = rig.process(found, NEVER).communicate()
    assert said, errors
    return int(said)


# Steps are dealt out to tests that run side by side: the first takes each fourth from 0 on, and so on.
@pytest.mark.parametrize("share", range(4))
@pytest.mark.parametrize("found", FOUND)
def test_killed_at_any_step(rig: Rig, found: str, share: int) -> None:
    # Of removing a folder file by file, the steps are many and alike; the first dozens reach well into it.
    reached = set()
    for step in range(share, min(steps(rig, found), 32), 4):
        rig.start(found)
        process = rig.process(found, step)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        reached.add(look(rig.target, rig.new).state)
        rig.check_and_mend(found)
        assert beside(rig.target) == ["code", "code.lock"]
    assert found != "another commit" or len(reached) > 1


@pytest.mark.parametrize("when", ["before", "after", "during"])
@pytest.mark.parametrize("command", ["init", "fetch", "checkout"])
def test_killed_while_git_runs(rig: Rig, tmp_path: Path, command: str, when: str) -> None:
    """`during`: git survives, and ends its command while the next process runs."""
    real = git(tmp_path, "--exec-path") + "/git"
    kill = "kill -9 $PPID"
    runs = {"before": f"{kill}; exit 1", "after": f'{real} "$@"; {kill}; exit 1', "during": f'{kill}; exec {real} "$@"'}
    script = f'case "$*" in *" {command} "*) {runs[when]};; esac; exec {real} "$@"'
    program(tmp_path / "programs", "git", script)
    rig.start("another commit")
    process = rig.process("another commit", NEVER, f"{tmp_path / 'programs'}:{os.environ['PATH']}")
    if when != "during":
        process.communicate()
    assert process.wait() == -signal.SIGKILL
    rig.check_and_mend("another commit")
    if when != "during":
        assert beside(rig.target) == ["code", "code.lock"]
    process.communicate()


def test_a_good_checkout_that_was_renamed_is_restored_offline(rig: Rig) -> None:
    rig.start("another commit")
    rig.target.rename(rig.target.with_name(".code.old"))  # killed between the two renames
    vendor(str(rig.repository), rig.old, rig.target, offline=True)
    assert look(rig.target, rig.old).state is State.GOOD
    assert beside(rig.target) == ["code", "code.lock"]


def test_only_leftovers_of_killed_processes_are_removed(rig: Rig) -> None:
    rig.start("another commit")
    left = [".code.01234567.part", ".code.89abcdef.part", ".code.old"]
    others = [".code.2.01234567.part", ".code.01234567", ".code.backup", "code.01234567.part"]
    for name in left + others:
        (rig.target.with_name(name) / "folder").mkdir(parents=True)
    vendor(str(rig.repository), rig.new, rig.target)
    assert beside(rig.target) == sorted(["code", "code.lock", *others])


@pytest.mark.parametrize("found", ["nothing", "another commit"])
def test_of_several_processes_one_fetches(rig: Rig, tmp_path: Path, found: str) -> None:
    real = git(tmp_path, "--exec-path") + "/git"
    script = f'case "$*" in *" fetch "*) echo fetched >> {tmp_path}/calls;; esac; exec {real} "$@"'
    program(tmp_path / "programs", "git", script)
    rig.start(found)
    path = f"{tmp_path / 'programs'}:{os.environ['PATH']}"
    processes = [rig.process(found, NEVER, path) for _ in range(4)]
    said = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, said
    assert (tmp_path / "calls").read_text() == "fetched\n"
    assert look(rig.target, rig.new).state is State.GOOD
    assert beside(rig.target) == ["code", "code.lock"]
