"""Meta's code is fetched, verified, replaced and repaired, and other content is never harmed."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dinov3_server.errors import StorageError, Unreachable, UpstreamCodeError
from dinov3_server.provision import vendor as vendor_module
from dinov3_server.provision.vendor import vendor
from tests.server.provision.repositories import (
    BACKBONES,
    LAYOUT,
    LICENSE,
    add_commit,
    beside,
    git,
    make_repository,
    program,
)
from tests.server.provision.vendor_rig import Rig


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


@pytest.mark.parametrize("as_url", [str, Path.as_uri])
def test_code_is_fetched_once_with_its_license(rig: Rig, as_url: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(2):
        vendor(as_url(rig.repository), rig.first, rig.target)
    assert rig.holds(rig.first)
    assert {name: (rig.target / name).read_text() for name in LAYOUT} == LAYOUT
    notices = [line for line in caplog.messages if "DINOv3 License" in line]
    assert len(notices) == 1
    assert str(rig.target / LICENSE) in notices[0]
    others_may_read = rig.target.parent.stat().st_mode
    assert rig.target.stat().st_mode == others_may_read


def test_neither_history_nor_tags_are_fetched(rig: Rig) -> None:
    git(rig.repository, "tag", "released", rig.second)
    rig.vendor(rig.second)
    assert git(rig.target, "rev-list", "--count", "HEAD") == "1"
    assert git(rig.target, "tag", "--list") == ""


def test_a_good_checkout_needs_no_lock_and_no_repository(rig: Rig, monkeypatch: Any) -> None:
    rig.vendor()
    rig.target.with_name("code.lock").unlink()
    shutil.rmtree(rig.repository)
    monkeypatch.setattr(vendor_module, "locked", None)
    rig.vendor()
    rig.vendor(offline=True)
    assert beside(rig.target) == ["code"]


def test_a_checkout_is_replaced_by_another_commit_and_back(rig: Rig) -> None:
    for revision in (rig.first, rig.second, rig.first):
        rig.vendor(revision)
        assert rig.holds(revision)
        assert (rig.target / "dinov3" / "new.py").exists() == (revision == rig.second)


def test_an_empty_folder_counts_as_missing(rig: Rig) -> None:
    rig.target.mkdir(parents=True)
    rig.vendor()
    assert rig.holds(rig.first)


def test_a_link_to_a_folder_stays_a_link(rig: Rig, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(rig.target)
    vendor(str(rig.repository), rig.first, link)
    assert link.is_symlink()
    assert rig.holds(rig.first)


def test_a_copy_of_a_clone_is_good(rig: Rig, tmp_path: Path) -> None:
    git(tmp_path, "clone", "--quiet", str(rig.repository), "clone")
    shutil.copytree(tmp_path / "clone", rig.target)
    rig.vendor(rig.second, offline=True)


def test_a_checkout_on_a_branch_is_not_replaced(rig: Rig, tmp_path: Path) -> None:
    git(tmp_path, "clone", "--quiet", str(rig.repository), str(rig.target))
    before = rig.content()
    with pytest.raises(UpstreamCodeError, match=f"{rig.second} on the branch main") as raised:
        rig.vendor()
    assert f"git -C {rig.target} checkout --detach {rig.first}" in str(raised.value)
    assert rig.content() == before
    rig.vendor(force=True)
    assert rig.holds(rig.first)


def _hidden_change(target: Path) -> None:
    git(target, "update-index", "--assume-unchanged", BACKBONES)
    (target / BACKBONES).write_text("import os\n")


def _same_size_and_time(target: Path) -> None:
    path = target / BACKBONES
    before = path.stat()
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _staged(target: Path) -> None:
    (target / BACKBONES).write_text("staged = True\n")
    git(target, "add", BACKBONES)


def _linked(target: Path) -> None:
    copy = target / "copy.txt"
    (target / BACKBONES).rename(copy)
    (target / BACKBONES).symlink_to(copy)


def _folder_for_file(target: Path) -> None:
    (target / BACKBONES).unlink()
    (target / BACKBONES).mkdir()


def _ignored(target: Path) -> None:
    (target / ".git" / "info" / "exclude").write_text("*\n")
    (target / "torch.py").write_text("")


MODIFIED = {
    "changed": (lambda target: (target / BACKBONES).write_text("changed = True\n"), BACKBONES),
    "changed and hidden from git": (_hidden_change, BACKBONES),
    "changed in content alone": (_same_size_and_time, BACKBONES),
    "staged": (_staged, BACKBONES),
    "deleted": (lambda target: (target / BACKBONES).unlink(), BACKBONES),
    "a folder of it deleted": (lambda target: shutil.rmtree(target / "dinov3"), "dinov3/__init__.py"),
    "a file for a folder": (_folder_for_file, BACKBONES),
    "a link for a file": (_linked, BACKBONES),
    "the license deleted": (lambda target: (target / LICENSE).unlink(), LICENSE),
    "a module added": (lambda target: (target / "dinov3" / "extra.py").write_text(""), "dinov3/extra.py"),
    "a module added and ignored": (_ignored, "torch.py"),
    "a library added": (lambda target: (target / "torch.abi3.so").write_text(""), "torch.abi3.so"),
    "a compiled module added": (lambda target: (target / "torch.pyc").write_text(""), "torch.pyc"),
    "a link added": (lambda target: (target / "torch").symlink_to("/usr"), "torch"),
    "no commit": (
        lambda target: (target / ".git" / "HEAD").write_text("ref: refs/heads/none"),
        "damaged git repository",
    ),
    "no objects": (lambda target: shutil.rmtree(target / ".git" / "objects"), "damaged git rep"),
}


@pytest.mark.parametrize("case", MODIFIED)
def test_a_modified_checkout_is_an_error_without_force(rig: Rig, case: str) -> None:
    modify, shown = MODIFIED[case]
    rig.vendor()
    modify(rig.target)
    before = rig.content()
    for revision in (rig.first, rig.second):  # nor is it replaced by another commit
        with pytest.raises(UpstreamCodeError) as raised:
            rig.vendor(revision)
        assert shown in str(raised.value)
        source = f"--upstream-repo {rig.repository} --upstream-revision {revision}"
        assert f"`dinov3-server vendor --force {source} --upstream-dir {rig.target}`" in str(raised.value)
        assert str(rig.target) in str(raised.value)
    with pytest.raises(Unreachable):
        rig.vendor(force=True, offline=True)
    assert rig.content() == before
    rig.vendor(force=True)
    assert rig.holds(rig.first)
    assert not (rig.target / "torch").exists()


def test_the_first_few_changes_are_shown(rig: Rig) -> None:
    rig.vendor()
    for number in range(9):
        (rig.target / f"extra{number}.py").write_text("")
    with pytest.raises(UpstreamCodeError, match=r"extra0.py \(added\), .*extra4.py \(added\) and 4 more"):
        rig.vendor()


def _touched(target: Path) -> None:
    for path in target.rglob("*"):
        os.utime(path, (1, 1))


def _cached(target: Path) -> None:
    subprocess.run(["python3", "-c", "import dinov3.hub.backbones"], cwd=target, check=True)
    (target / "dinov3" / "__pycache__").mkdir(exist_ok=True)
    (target / "dinov3" / "__pycache__" / "env.cpython-311.pyc").write_text("")


@pytest.mark.parametrize(
    "change",
    [
        _touched,
        _cached,
        lambda target: (target / "notes.txt").write_text("not importable"),
        lambda target: (target / BACKBONES).chmod(0o755),
        lambda target: (target / ".git" / "index").unlink(),
        lambda target: (target / ".git" / "index.lock").write_text(""),
        lambda target: (target / ".git" / "config").write_text("[core]\nfsmonitor = /bin/false\nautocrlf = true\n"),
        lambda target: (target / ".git" / "info" / "attributes").write_text("*.py filter=evil eol=crlf\n"),
    ],
)
def test_changes_that_do_not_count_as_modification(rig: Rig, change: Any) -> None:
    rig.vendor()
    change(rig.target)
    rig.vendor(offline=True)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", ["files", "other repository", "git without commits", "code without git"])
def test_other_content_is_never_deleted(rig: Rig, kind: str, force: bool) -> None:
    if kind == "other repository":
        make_repository(rig.target, {"thesis.tex": "years of work"})
    else:
        rig.target.mkdir(parents=True)
        (rig.target / "thesis.tex").write_text("years of work")
    if kind == "git without commits":
        git(rig.target, "init", "--quiet")
    if kind == "code without git":
        (rig.target / "dinov3" / "hub").mkdir(parents=True)
        (rig.target / BACKBONES).write_text("")
    before = rig.content()
    with pytest.raises(UpstreamCodeError, match="--upstream-dir") as raised:
        rig.vendor(force=force)
    assert str(rig.target) in str(raised.value)
    assert rig.content() == before


def test_a_file_in_the_place_of_the_folder_is_left_alone(rig: Rig) -> None:
    rig.target.parent.mkdir(parents=True)
    rig.target.write_text("a file")
    with pytest.raises(StorageError, match="a file exists where a folder is needed"):
        rig.vendor(force=True)
    assert rig.target.read_text() == "a file"


@pytest.mark.parametrize("lacking", [LICENSE, BACKBONES])
def test_a_repository_that_is_not_metas_is_not_used(rig: Rig, tmp_path: Path, lacking: str) -> None:
    other = tmp_path / "other"
    commit = make_repository(other, {name: text for name, text in LAYOUT.items() if name != lacking})
    rig.vendor()
    with pytest.raises(UpstreamCodeError, match=f"not Meta's: its commit has no {lacking}"):
        vendor(str(other), commit, rig.target)
    assert rig.holds(rig.first), "the good one was lost"
    shutil.rmtree(rig.target)
    with pytest.raises(UpstreamCodeError, match=lacking):
        vendor(str(other), commit, rig.target)
    assert not rig.target.exists()


def test_files_have_the_bytes_of_the_commit_despite_gitattributes(rig: Rig) -> None:
    asked = {".gitattributes": "*.md text eol=crlf\n*.py ident\n", "dinov3/id.py": "# $Id$\n"}
    commit = add_commit(rig.repository, asked)
    rig.vendor(commit)
    assert (rig.target / LICENSE).read_bytes() == LAYOUT[LICENSE].encode()
    assert (rig.target / "dinov3" / "id.py").read_text() == "# $Id$\n"


def test_configuration_and_environment_have_no_influence(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks, ran = tmp_path / "hooks", tmp_path / "ran"
    for hook in ("post-checkout", "reference-transaction", "post-index-change"):
        program(hooks, hook, f"echo {hook} >> {ran}")
    monitor = program(hooks, "monitor", f"echo monitor >> {ran}")
    templates = tmp_path / "templates"
    shutil.copytree(hooks, templates / "hooks")
    user = tmp_path / "gitconfig"
    user.write_text(
        f"[core]\nhooksPath = {hooks}\nfsmonitor = {monitor}\nautocrlf = true\nworktree = {tmp_path}\nbare = true\n"
        "fileMode = false\nsymlinks = false\nsparseCheckout = true\n"
        f"attributesFile = {tmp_path / 'attributes'}\n"
        f"[init]\ntemplateDir = {templates}\ndefaultObjectFormat = sha256\n"
        f'[filter "x"]\nsmudge = touch {ran}\n'
        "[gc]\nauto = 1\n[fetch]\nrecurseSubmodules = true\n[protocol]\nversion = 0\n"
    )
    (tmp_path / ".gitconfig").write_bytes(user.read_bytes())
    (tmp_path / "attributes").write_text("* filter=x eol=crlf\n")
    decoy = tmp_path / "decoy"
    make_repository(decoy, {"a": "b"})
    before = git(decoy, "status", "--porcelain", "--branch")
    for name, value in {
        "HOME": tmp_path,
        "GIT_CONFIG_GLOBAL": user,
        "GIT_CONFIG_SYSTEM": user,
        "GIT_DIR": decoy / ".git",
        "GIT_WORK_TREE": decoy,
        "GIT_INDEX_FILE": decoy / ".git" / "index",
        "GIT_OBJECT_DIRECTORY": decoy / ".git" / "objects",
        "GIT_DEFAULT_HASH": "sha256",
        "GIT_TEMPLATE_DIR": templates,
        "GIT_TRACE": "1",
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": "core.hooksPath",
        "GIT_CONFIG_VALUE_0": hooks,
        "LANG": "de_DE.UTF-8",
    }.items():
        monkeypatch.setenv(name, str(value))
    (rig.repository / "link").symlink_to(LICENSE)
    third = add_commit(rig.repository, {})
    rig.vendor()
    rig.vendor(third)
    assert rig.holds(third)
    assert (rig.target / "link").is_symlink()
    assert not ran.exists(), ran.read_text()
    assert git(decoy, "status", "--porcelain", "--branch") == before


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files to others")
def test_folders_may_have_any_owner(rig: Rig) -> None:
    def give_away(folder: Path) -> None:
        for path in (folder, *folder.rglob("*")):
            os.lchown(path, 12345, 12345)

    give_away(rig.repository)
    rig.vendor()
    give_away(rig.target)
    rig.vendor()
    rig.vendor(rig.second)
    rig.vendor(rig.first, force=True)
    assert (rig.target / LICENSE).exists()


@pytest.mark.parametrize("found", ["nothing", "another commit"])
def test_offline_errors_say_what_is_missing_and_how_to_get_it(rig: Rig, found: str, monkeypatch: Any) -> None:
    if found == "another commit":
        rig.vendor(rig.second)
    monkeypatch.setattr(vendor_module, "fetch", None)
    with pytest.raises(Unreachable) as raised:
        rig.vendor(offline=True)
    said = str(raised.value)
    assert "DINOV3_OFFLINE" in said
    assert f"git clone {rig.repository} dinov3" in said
    assert f"git -C dinov3 checkout --detach {rig.first}" in said
    assert f"HOST:{rig.target}/" in said
    assert (rig.second in said) == (found == "another commit")


def test_the_commands_in_the_message_work(rig: Rig, tmp_path: Path) -> None:
    with pytest.raises(Unreachable) as raised:
        rig.vendor(offline=True)
    commands = [line.strip() for line in str(raised.value).splitlines() if line.startswith("  ")]
    assert len(commands) == 3
    for command in commands[:2]:
        subprocess.run(command, shell=True, cwd=tmp_path, check=True, capture_output=True)
    shutil.copytree(tmp_path / "dinov3", rig.target)  # rsync, to this host
    rig.vendor(offline=True)
