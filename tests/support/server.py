"""A real server with the numpy runner, started and observed from outside."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import threading
import urllib.request
from types import TracebackType

import psutil

from dinov3_client import Client
from tests.support.paths import ROOT
from tests.support.waiting import LIMIT, until


class Server:
    """A running server: `with Server("--frontends", "2") as server:`.

    At the end of the block it is terminated, must exit with 0, and must leave no process behind.
    """

    def __init__(
        self, *flags: str, module: str = "tests.support.serve", limit: float = LIMIT, **environment: str
    ) -> None:
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", module, "serve", "--port", "0", "--http-port", "0"]
        self.process = subprocess.Popen(
            [*command, "--weights", "random:0", "--arena-bytes", "16MiB", *flags],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": paths, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._family: dict[int, psutil.Process] = {}
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], limit)
        line = self.process.stdout.readline() if readable else ""
        match = re.fullmatch(r"ready grpc=(\S+) http=(\S+)\n", line)
        if match is None:
            self.process.kill()
            self.process.wait()
            self._close()
            raise AssertionError(f"no ready line but {line!r}; log:\n{''.join(self.log)}")
        self.grpc, self.http = match.groups()
        self.family()

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)

    def family(self) -> list[psutil.Process]:
        """Return the living descendants, and remember all that were ever seen."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        self._family |= {child.pid: child for child in children}
        return children

    def children(self, role: str) -> list[psutil.Process]:
        """Return the living children of a role, "worker" or "frontend"."""
        found = []
        for child in self.family():
            try:
                if role in child.cmdline():
                    found.append(child)
            except psutil.NoSuchProcess:
                continue
        return found

    def client(self, deadline: float = LIMIT) -> Client:
        return Client(self.grpc, deadline=deadline)

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://{self.http}{path}", timeout=LIMIT) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of the series with these labels, 0 if there is none (yet)."""
        total = 0.0
        for line in self.get("/metrics")[1].splitlines():
            match = re.fullmatch(r"([a-z0-9_]+)(?:\{(.*)\})? (\S+)", line)
            if match and match[1] == name:
                have = dict(re.findall(r'(\w+)="([^"]*)"', match[2] or ""))
                if all(have.get(key) == value for key, value in labels.items()):
                    total += float(match[3])
        return total

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        code = self.process.wait(LIMIT)
        until(lambda: not any(process.is_running() for process in self._family.values()), "children are left behind")
        self._close()
        return code

    def _close(self) -> None:
        self._reader.join(LIMIT)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.process.returncode is not None:
            return
        self.family()
        self.signal(signal.SIGTERM)
        try:
            code = self.wait()
        except BaseException:
            self.process.kill()
            raise
        if error is None:
            assert code == 0, f"exit status {code}; log:\n{''.join(self.log)}"
