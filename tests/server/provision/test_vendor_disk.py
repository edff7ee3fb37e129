"""Meta's code on disks that are full, read-only or fail, and beside other processes."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from dinov3_server import storage
from dinov3_server.errors import StorageError, Unreachable, UpstreamCodeError
from dinov3_server.provision import vendor as vendor_module
from dinov3_server.provision.checkout import Found
from tests.server.provision.repositories import BACKBONES, LICENSE
from tests.server.provision.vendor_rig import Rig


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def refuse_to_write(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Simulate a read-only or full file system: permissions do not stop root."""
    real = os.open

    def open_or_not(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR) and path != os.devnull:
            raise OSError(number, os.strerror(number), str(path))
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(storage.os, "open", open_or_not)


@pytest.mark.parametrize(
    ("number", "said"), [(errno.EROFS, "read-only"), (errno.ENOSPC, "full"), (errno.EACCES, "permission")]
)
def test_a_folder_that_cannot_be_written(rig: Rig, monkeypatch: Any, number: int, said: str) -> None:
    refuse_to_write(monkeypatch, number)
    with pytest.raises(StorageError, match=said):
        rig.vendor()


def test_on_a_read_only_volume_errors_about_the_code_come_first(rig: Rig, monkeypatch: Any) -> None:
    rig.vendor()
    refuse_to_write(monkeypatch, errno.EROFS)
    rig.vendor()
    with pytest.raises(Unreachable, match="forbids"):
        rig.vendor(rig.second, offline=True)
    with pytest.raises(StorageError, match="read-only"):
        rig.vendor(rig.second)
    (rig.target / BACKBONES).write_text("")
    with pytest.raises(UpstreamCodeError, match=BACKBONES):
        rig.vendor()


def test_a_mount_point_is_refused(rig: Rig, monkeypatch: Any) -> None:
    rig.target.mkdir(parents=True)
    monkeypatch.setattr(Path, "is_mount", lambda path: path == rig.target)
    with pytest.raises(StorageError, match=f"--upstream-dir {rig.target}/dinov3"):
        rig.vendor()


def test_an_unreadable_checkout_does_not_count_as_missing(rig: Rig, monkeypatch: Any) -> None:
    rig.vendor()
    real = Path.read_bytes

    def read(path: Path) -> bytes:
        if path.name == "backbones.py":
            raise OSError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    with pytest.raises(StorageError, match=r"backbones.py: no permission"):
        rig.vendor()
    assert rig.target.exists()


def test_leftovers_beside_a_good_checkout_need_no_write(rig: Rig, monkeypatch: Any) -> None:
    rig.vendor()
    rig.target.with_name(".code.01234567.part").mkdir()
    with monkeypatch.context() as patched:
        refuse_to_write(patched, errno.EROFS)
        rig.vendor()
    rig.vendor()
    assert rig.holds(rig.first)


def test_a_checkout_that_changes_during_the_check_is_checked_again(rig: Rig, monkeypatch: Any) -> None:
    rig.vendor()
    real, looks = vendor_module.look, 0

    def look(folder: Path, revision: str) -> Found:
        nonlocal looks
        looks += 1
        if looks == 1:  # as where another process puts a new one in its place just now
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(folder / LICENSE))
        return real(folder, revision)

    monkeypatch.setattr(vendor_module, "look", look)
    monkeypatch.setattr(vendor_module, "fetch", None)
    rig.vendor()
    assert looks == 2
