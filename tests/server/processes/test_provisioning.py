"""The provisioner process under a supervisor: its progress, death, end and errors."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from dinov3_client import Client
from tests.support.file_server import Answer, FileServer
from tests.support.git_server import STALL, git_server
from tests.support.server import ROOT
from tests.support.waiting import LIMIT, until

FILE, DATA = "/w.pth", bytes(range(256)) * 8192  # the numpy runner does not read it
HELD = 1 << 20


class Starting:
    """A server that can be watched before it is ready."""

    def __init__(self, home: Path, *flags: str) -> None:
        self._log = home.parent / "log"
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.serve", "serve", "--port", "0", "--http-port", "0",
                 "--arena-bytes", "16MiB", "--cache-dir", str(home), "--parity-check", "false", *flags],
                cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip

    @property
    def log(self) -> str:
        return self._log.read_text()

    def readyz(self) -> str:
        found = re.search(r"probes on http://(\S+)", self.log)
        if found is None:
            return ""
        try:
            with urllib.request.urlopen(f"http://{found[1]}/readyz", timeout=LIMIT) as answer:
                return str(answer.read().decode())
        except urllib.error.HTTPError as error:
            with error:
                return error.read().decode()

    def children(self, role: str) -> list[psutil.Process]:
        return [child for child in psutil.Process(self.process.pid).children() if role in child.cmdline()]

    def ready(self) -> str:
        """Wait until the server is ready, and return its address."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("ready grpc="), self.log
        return line.split()[1].removeprefix("grpc=")

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """End the server if the test has failed before its end."""
        if self.process.returncode is None:
            self.process.kill()
            self.wait()

    def wait(self) -> int:
        code = self.process.wait(LIMIT)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


def fetched(home: Path) -> Path:
    (path,) = home.rglob("w.pth")
    return path


@pytest.fixture
def files() -> Iterator[FileServer]:
    with FileServer() as server:
        server.put(FILE, DATA, {"ETag": '"1"'})
        yield server


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


Start = Callable[..., Starting]


@pytest.fixture
def start(home: Path) -> Iterator[Start]:
    started: list[Starting] = []

    def one(*flags: str) -> Starting:
        started.append(Starting(home, *flags))
        return started[-1]

    yield one
    for server in started:
        server.kill()


def test_readiness_shows_the_progress_and_workers_wait(start: Start, files: FileServer, home: Path) -> None:
    files.script(FILE, Answer(hold_after=HELD))
    server = start("--weights", files.url(FILE))
    until(lambda: server.readyz() == "provisioning: fetching 2.1 MB\n")
    assert server.children("worker") == []
    files.release()
    with Client(server.ready(), deadline=LIMIT) as client:
        assert client.model().name == "numpy"
    assert fetched(home).read_bytes() == DATA
    assert server.children("provisioner") == []
    assert server.end() == 0


def test_a_killed_provisioner_resumes_its_download(start: Start, files: FileServer, home: Path) -> None:
    files.script(FILE, Answer(hold_after=HELD))
    server = start("--weights", files.url(FILE))
    until(lambda: [part for part in home.rglob("w.pth.part") if part.stat().st_size == HELD])
    (provisioner,) = server.children("provisioner")
    provisioner.kill()
    server.ready()
    assert files.ranges(FILE) == [None, f"bytes={HELD}-"]
    assert fetched(home).read_bytes() == DATA
    assert "provisioner died (killed by SIGKILL)" in server.log
    assert server.end() == 0


def test_a_signal_ends_the_provisioner_at_once(start: Start, files: FileServer, home: Path) -> None:
    files.script(FILE, Answer(hold_after=HELD))
    server = start("--weights", files.url(FILE))
    until(lambda: [*home.rglob("w.pth.part")])
    family = psutil.Process(server.process.pid).children(recursive=True)
    assert server.end() == 0
    until(lambda: not any(child.is_running() for child in family))


@pytest.mark.parametrize("signals", [1, 2])
def test_a_signal_also_ends_git_and_removes_unfinished_files(
    start: Start, tmp_path: Path, home: Path, signals: int
) -> None:
    """git has its own session: a killed provisioner would leave it running."""
    weights = tmp_path / "w.pth"
    weights.write_bytes(DATA)
    with git_server(tmp_path) as git:
        git.answers = [STALL]
        server = start("--parity-check", "true", "--weights", str(weights), "--upstream-repo", git.url("dinov3.git"))
        until(lambda: git.paths)
        family = psutil.Process(server.process.pid).children(recursive=True)
        assert any(child.name() == "git" for child in family)
        for _ in range(signals):
            server.process.send_signal(signal.SIGTERM)
        assert server.wait() in (0, 128 + signal.SIGTERM)
        until(lambda: not any(child.is_running() for child in family))
    assert [path.suffix for path in (home / "upstream").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("status", "code", "words"), [(403, 4, "the server answers 403 Forbidden"), (404, 2, "the server answers 404")]
)
def test_an_error_that_the_operator_must_fix_ends_the_start(
    start: Start, files: FileServer, home: Path, status: int, code: int, words: str
) -> None:
    files.always(FILE, Answer(status=status))
    server = start("--weights", files.url(FILE))
    assert server.wait() == code
    last = server.log.splitlines()[-1]
    assert last.startswith("dinov3-server: ")
    assert words in last
    assert "Traceback" not in server.log


def test_offline_names_the_missing_file_and_starts_with_existing_ones(
    start: Start, files: FileServer, home: Path
) -> None:
    missing = start("--model", "vitb16", "--offline")
    assert missing.wait() == 3
    assert "dinov3_vitb16_pretrain_lvd1689m-73cec8be.pth" in missing.log

    online = start("--weights", files.url(FILE))
    online.ready()
    assert online.end() == 0
    again = start("--weights", files.url(FILE), "--offline")
    again.ready()
    assert again.end() == 0
    assert len(files.requests) == 1
