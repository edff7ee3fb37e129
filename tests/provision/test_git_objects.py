"""Commits read without git are what git says they are, and nothing else passes."""

from __future__ import annotations

import shutil
import zlib
from pathlib import Path

import pytest

from dinov3_server.provision.git_objects import Damaged, Entry, Head, files, head
from tests.provision.repositories import add_commit, git, make_repository

LINES = [f"line {number} of a file that is long enough to be stored as a difference\n" for number in range(3000)]


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two dozen commits whose trees and files differ by a little, so that packs hold chains of differences."""
    folder = tmp_path_factory.mktemp("history") / "repository"
    make_repository(folder, {f"{'abc'[n % 3]}/{n:03}.txt": f"{n}\n" for n in range(200)} | {"ü ö.txt": "", "run": ""})
    (folder / "run").chmod(0o755)
    (folder / "link").symlink_to("a")
    for number in range(24):
        add_commit(folder, {"a/long.txt": "".join(LINES[number:]), f"b/{number}.py": str(number)})
    return folder


@pytest.fixture
def repository(history: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(history, tmp_path / "repository", symlinks=True))


def as_git_says(repository: Path, commit: str) -> dict[str, Entry]:
    listed = git(repository, "ls-tree", "-r", "-z", commit).rstrip("\0").split("\0")
    return {path: Entry(int(about[:6], 8), about.split()[2]) for about, path in (each.split("\t") for each in listed)}


@pytest.mark.parametrize("offsets", ["true", "false", "loose"])
def test_every_commit_has_the_files_that_git_says(repository: Path, offsets: str) -> None:
    commits = git(repository, "rev-list", "HEAD").split()
    if offsets != "loose":
        git(repository, "-c", f"repack.useDeltaBaseOffset={offsets}", "repack", "-adfq", "--depth=50", "--window=50")
        git(repository, "pack-refs", "--all")
        (pack,) = (repository / ".git" / "objects" / "pack").glob("*.idx")
        chains = [line for line in git(repository, "verify-pack", "-v", str(pack)).splitlines() if " tree " in line]
        assert any(len(line.split()) == 7 for line in chains), "no tree is stored as a difference"
    assert head(repository / ".git") == Head(commits[0], "main")
    assert len(commits) == 25
    for commit in commits:
        assert files(repository / ".git", commit) == as_git_says(repository, commit)


def test_what_is_loose_and_what_is_in_several_packs_is_found(repository: Path) -> None:
    git(repository, "repack", "-dq")
    add_commit(repository, {"a/second.txt": "in a second pack"})
    git(repository, "repack", "-dq")
    commit = add_commit(repository, {"a/third.txt": "loose"})
    assert len(list((repository / ".git" / "objects" / "pack").glob("*.idx"))) == 2
    assert files(repository / ".git", commit) == as_git_says(repository, commit)


def test_a_detached_head_has_no_branch(repository: Path) -> None:
    commit = git(repository, "rev-parse", "HEAD~3")
    git(repository, "checkout", "--quiet", "--detach", commit)
    assert head(repository / ".git") == Head(commit, None)


@pytest.mark.parametrize("text", ["", "ref: refs/heads/none\n", "ref: refs/heads/.invalid\n", "0123\n", "f" * 64])
def test_a_head_without_a_commit_is_damage(repository: Path, text: str) -> None:
    (repository / ".git" / "HEAD").write_text(text)
    with pytest.raises(Damaged, match="HEAD"):
        head(repository / ".git")


def test_a_tree_that_is_not_what_its_id_says_is_damage(repository: Path) -> None:
    commit, tree = git(repository, "rev-parse", "HEAD", "HEAD:a").split()
    other = git(repository, "rev-parse", "HEAD:b")
    objects = repository / ".git" / "objects"
    forged = objects / tree[:2] / tree[2:]
    forged.chmod(0o644)
    forged.write_bytes((objects / other[:2] / other[2:]).read_bytes())
    with pytest.raises(Damaged, match=f"tree {tree} is damaged"):
        files(repository / ".git", commit)


def test_an_object_of_another_kind_is_damage(repository: Path) -> None:
    blob = git(repository, "rev-parse", "HEAD:run")
    with pytest.raises(Damaged, match=f"commit {blob} is damaged"):
        files(repository / ".git", blob)


def test_what_is_missing_is_named(repository: Path) -> None:
    commit, tree = git(repository, "rev-parse", "HEAD", "HEAD:a").split()
    (repository / ".git" / "objects" / tree[:2] / tree[2:]).unlink()
    with pytest.raises(Damaged, match=f"tree {tree} is missing"):
        files(repository / ".git", commit)


@pytest.mark.parametrize("suffix", [".pack", ".idx"])
@pytest.mark.parametrize("part", [0.0, 0.01, 0.1])
def test_a_pack_that_was_cut_short_is_damage(repository: Path, suffix: str, part: float) -> None:
    commit = git(repository, "rev-parse", "HEAD")
    git(repository, "repack", "-adfq")
    (path,) = (repository / ".git" / "objects" / "pack").glob(f"*{suffix}")
    data = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(data[: int(part * len(data))])
    with pytest.raises(Damaged):
        files(repository / ".git", commit)


def test_every_flipped_byte_of_a_pack_is_damage_or_without_meaning(repository: Path) -> None:
    git(repository, "repack", "-adfq", "--depth=50")
    commit = git(repository, "rev-parse", "HEAD")
    right = as_git_says(repository, commit)
    (path,) = (repository / ".git" / "objects" / "pack").glob("*.pack")
    path.chmod(0o644)
    data = path.read_bytes()
    damaged = 0
    for place in range(12, len(data), len(data) // 150):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :])
        try:
            assert files(repository / ".git", commit) == right
        except Damaged:
            damaged += 1
    assert damaged


def test_a_loose_object_that_was_cut_short_is_damage(repository: Path) -> None:
    commit = git(repository, "rev-parse", "HEAD")
    path = repository / ".git" / "objects" / commit[:2] / commit[2:]
    path.chmod(0o644)
    for data in (b"", path.read_bytes()[:20], zlib.compress(b"commit 3\0abc")):
        path.write_bytes(data)
        with pytest.raises(Damaged):
            files(repository / ".git", commit)
