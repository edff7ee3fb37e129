"""A git repository over HTTP on loopback, served by git's own `http-backend`, or with scripted faults."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

STALL = -1


class GitServer:
    """A server of the repositories under `root`.

    `answers` are the statuses of the next requests, instead of git's answer; STALL means no answer until the server
    ends. If `modern` is false it speaks the first protocol, which serves no id that is not the tip of a branch. `paths`
    are the requested paths.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.answers: list[int] = []
        self.modern = True
        self.dumb = False
        self.paths: list[str] = []
        self.ended = threading.Event()
        self.port = 0

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}/{path}"


@contextmanager
def git_server(root: Path) -> Iterator[GitServer]:
    state = GitServer(root)

    class Handler(_Handler):
        server_state = state

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        state.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield state
        finally:
            state.ended.set()
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server_state: GitServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        state = self.server_state
        state.paths.append(self.path)
        answer = state.answers.pop(0) if state.answers else None
        if answer == STALL:
            state.ended.wait()
        elif answer is not None:
            body = b"<html>\nThis is a page, not a repository.\n</html>\n"
            self.send_response(answer)
            if answer == 401:
                self.send_header("WWW-Authenticate", 'Basic realm="private"')
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        else:
            self._git()

    do_POST = do_GET

    def _git(self) -> None:
        state, url = self.server_state, urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        environment = {
            "PATH": os.environ["PATH"],
            "GIT_PROJECT_ROOT": str(state.root),
            "GIT_HTTP_EXPORT_ALL": "1",
            "GIT_CONFIG_NOSYSTEM": "1",
            "REQUEST_METHOD": self.command,
            "PATH_INFO": url.path,
            "QUERY_STRING": "" if state.dumb else url.query,
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "CONTENT_LENGTH": str(len(body)),
            "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
            "GIT_PROTOCOL": self.headers.get("Git-Protocol", "") if state.modern else "",
        }
        done = subprocess.run(["git", "http-backend"], env=environment, input=body, capture_output=True, check=False)
        head, _, content = done.stdout.partition(b"\r\n\r\n")
        headers = [line.split(": ", 1) for line in head.decode().split("\r\n")]
        self.send_response(int(dict(headers).get("Status", "200").split()[0]))
        for name, value in headers:
            if name not in ("Status", "Content-Length"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
