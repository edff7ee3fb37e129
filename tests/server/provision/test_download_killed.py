"""A download resumes after SIGKILL at any moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.provision.download_rig import DATA, Rig, rig
from tests.support.file_server import Answer, FileServer
from tests.support.paths import ROOT
from tests.support.waiting import until

PATH = "/model.pth"
# Dies at its argv[3]-th fsync: of what the part is a part of, of the whole part, of the folder after the rename.
PROCESS = """
import os, signal, sys
from pathlib import Path
from dinov3_server.provision.download import download
left, sync = int(sys.argv[3]), os.fsync
def fsync(descriptor):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    sync(descriptor)
os.fsync = fsync
download(sys.argv[1], Path(sys.argv[2]))
"""


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Rig:
    return rig(monkeypatch, tmp_path)


def start(here: Rig, files: FileServer, die_at: int = 0) -> subprocess.Popen[bytes]:
    paths = os.pathsep.join([str(ROOT / "server"), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", PROCESS, files.url(PATH), str(here.target), str(die_at)]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths})


@pytest.mark.parametrize("held", [1, 512, 65_536, len(DATA) - 1])
def test_killed_while_bytes_arrive(here: Rig, files: FileServer, held: int) -> None:
    files.put(PATH, DATA, {"ETag": '"1"'})
    files.script(PATH, Answer(hold_after=held))
    process = start(here, files)
    try:
        until(lambda: here.part.exists() and here.part.stat().st_size == held, "the part has what was sent")
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    assert here.left() == ["model.pth.part", "model.pth.part.json"]
    here.download(files.url(PATH))
    assert files.ranges(PATH) == [None, f"bytes={held}-"]
    assert here.target.read_bytes() == DATA
    assert here.left() == ["model.pth"]


@pytest.mark.parametrize(
    ("die_at", "asked"), [(1, None), (2, f"bytes={len(DATA)}-"), (3, None)], ids=["begin", "before rename", "after"]
)
def test_killed_at_any_disk_operation(here: Rig, files: FileServer, die_at: int, asked: str | None) -> None:
    files.put(PATH, DATA, {"ETag": '"1"'})
    assert start(here, files, die_at).wait() == -signal.SIGKILL
    assert here.target.exists() == (die_at == 3)
    here.download(files.url(PATH))
    assert files.ranges(PATH) == [None, asked]
    assert here.target.read_bytes() == DATA
    assert not here.part.exists()
    assert not here.about.exists()
