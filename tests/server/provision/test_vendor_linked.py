"""Checkouts of other kinds: submodules, worktrees, and those with Windows line endings."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dinov3_server.errors import UpstreamCodeError
from tests.server.provision.repositories import BACKBONES, git, make_repository
from tests.server.provision.vendor_rig import Rig


def submodule(rig: Rig, revision: str) -> None:
    """Make the target a submodule of another repository."""
    parent = rig.target.parent
    make_repository(parent, {"README.md": "ours"})
    git(parent, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(rig.repository), rig.target.name)
    git(rig.target, "checkout", "--quiet", "--detach", revision)


def worktree(rig: Rig, revision: str) -> None:
    rig.target.parent.mkdir(parents=True)
    git(rig.repository, "worktree", "add", "--quiet", "--detach", str(rig.target), revision)


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


LINKED = pytest.mark.parametrize("link", [submodule, worktree])


@LINKED
def test_a_linked_checkout_is_used(rig: Rig, link: Callable[[Rig, str], None]) -> None:
    link(rig, rig.first)
    assert (rig.target / ".git").is_file()
    before = rig.content()
    rig.vendor()
    rig.vendor(offline=True)
    assert rig.content() == before


@LINKED
def test_a_linked_checkout_of_another_commit_is_left_alone(rig: Rig, link: Callable[[Rig, str], None]) -> None:
    link(rig, rig.second)
    before = rig.content()
    with pytest.raises(UpstreamCodeError, match=f"submodule or worktree of another .*, at commit {rig.second}") as told:
        rig.vendor()
    assert f"git -C {rig.target} checkout --detach {rig.first}" in str(told.value)
    assert rig.content() == before


@LINKED
def test_a_changed_linked_checkout_is_refused(rig: Rig, link: Callable[[Rig, str], None]) -> None:
    link(rig, rig.first)
    (rig.target / BACKBONES).write_text("changed = True\n")
    with pytest.raises(UpstreamCodeError, match=rf"differs from its commit: {BACKBONES} \(changed\)"):
        rig.vendor()


def test_a_submodule_that_was_copied_without_its_repository(rig: Rig, tmp_path: Path) -> None:
    submodule(rig, rig.first)
    shutil.move(rig.target, tmp_path / "copy")
    rig.target = tmp_path / "copy"
    with pytest.raises(UpstreamCodeError, match=r"a submodule or worktree, whose repository .* cannot be read: "):
        rig.vendor()


def test_windows_line_endings_are_named_with_a_cure_that_works(rig: Rig) -> None:
    rig.target.parent.mkdir(parents=True)
    git(rig.target.parent, "clone", "--quiet", "--config", "core.autocrlf=true", str(rig.repository), rig.target.name)
    git(rig.target, "checkout", "--quiet", "--detach", rig.first)
    assert b"\r\n" in (rig.target / BACKBONES).read_bytes()
    with pytest.raises(
        UpstreamCodeError, match=r"Windows line endings \(CR LF, of core\.autocrlf\): LICENSE\.md, "
    ) as told:
        rig.vendor()
    assert f"git -C {rig.target} checkout-index --all --force`" in str(told.value)
    git(rig.target, "config", "core.autocrlf", "false")
    git(rig.target, "checkout-index", "--all", "--force")
    rig.vendor(offline=True)


def test_a_change_beside_windows_line_endings_is_found(rig: Rig) -> None:
    rig.vendor()
    path = rig.target / BACKBONES
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n") + b"import os\n")
    with pytest.raises(UpstreamCodeError, match=rf"differs from its commit: {BACKBONES} \(changed\)"):
        rig.vendor()
