"""Images at https URLs, against a web server on loopback."""

from __future__ import annotations

import io
import re
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dinov3_client.bulk import remote
from dinov3_client.bulk.errors import SourceError, StoreError, TooLarge
from dinov3_client.bulk.sources import find_images
from tests.client.bulk.stub import contents, failed, run, tree

pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")


class Web:
    """A server of `files`; `failures` are statuses to answer first, and "Range" is honoured if `ranges`."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.failures: list[int] = []
        self.asked: list[str] = []
        self.ranges = True
        web = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                web.asked.append(f"{self.command} {self.path}")
                data = web.files.get(self.path)
                status = web.failures.pop() if web.failures else 404 if data is None else 200
                data = b"" if data is None or status >= 400 else data
                whole = len(data)
                asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                if asked and web.ranges and status == 200:
                    data, status = data[int(asked[1]) : int(asked[2]) + 1], 206
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                if status == 206 and asked:
                    self.send_header("Content-Range", f"bytes {asked[1]}-{asked[2]}/{whole}")
                if web.ranges:
                    self.send_header("Accept-Ranges", "bytes")
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(data)

            def do_HEAD(self) -> None:
                if "sig=" in self.path:  # as S3 answers to a URL that is signed for GET
                    self.send_response(403)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                else:
                    self.do_GET()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(remote, "_answers", remote._Answers())
    web = Web()
    thread = threading.Thread(target=web.server.serve_forever, args=(0.01,))
    thread.start()
    yield web
    web.server.shutdown()
    thread.join()
    web.server.server_close()


def tar(*members: str) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as file:
        for each in members:
            member = tarfile.TarInfo(each)
            member.size = len(each)
            file.addfile(member, io.BytesIO(each.encode()))
    return data.getvalue()


def test_a_list_of_signed_urls_leaves_no_secret(web: Web, tmp_path: Path) -> None:
    for index in range(3):
        web.files[f"/{index}.jpg?sig=secret"] = contents(index)
    signed = web.url.replace("//", "//user:secret@")
    urls = [f"{signed}/{index}.jpg?sig=secret" for index in range(4)]
    (tmp_path / "list").write_text("\n".join(urls))
    images = find_images([], [tmp_path / "list"])
    assert list(images.ids()) == [f"{web.url}/{index}.jpg" for index in range(4)]
    totals = run(images, tmp_path / "out")
    assert (totals.rows, totals.failed) == (3, 1)
    assert failed(tmp_path / "out")[0]["reason"] == "No such file or directory"
    assert b"secret" not in b"".join(tree(tmp_path / "out").values())
    assert sorted(web.asked) == [f"GET /{index}.jpg?sig=secret" for index in range(4)]
    web.failures = [403]
    with pytest.raises(StoreError, match=r"0\.jpg: the server answered with status 403$"):
        images[0].read()


def test_statuses_that_pass_and_large_files(web: Web) -> None:
    web.files["/x.jpg"] = bytes(100)
    [item] = find_images([f"{web.url}/x.jpg"])
    web.failures = [503, 429]
    assert item.read(100) == bytes(100)
    web.failures = [500] * 3
    with pytest.raises(StoreError, match=r"^http://127.0.0.1:\d+/x\.jpg: no answer after 3 attempts: 500") as raised:
        item.read()
    assert raised.value.errno == 5  # EIO: the run stops
    with pytest.raises(TooLarge) as large:
        item.read(99)
    assert large.value.size == 100


def test_folders_globs_and_shards(web: Web) -> None:
    web.files |= {
        "/d/": b'<a href="../">up</a><a href="?C=N;O=D">N</a><a href="a.jpg">a</a><a href="b.png">b</a>'
        b'<a href="n.txt">n</a><a href="s.tar">s</a>',
        "/d/a.jpg": b"a",
        "/d/b.png": b"b",
        "/d/n.txt": b"n",
        "/d/s.tar": tar("k.jpg", "k.json"),
    }
    web.files["/d"] = web.files["/d/"]
    images = find_images([f"{web.url}/d/"])
    assert [(item.id, item.read()) for item in images] == [("a.jpg", b"a"), ("b.png", b"b"), ("s.tar:k", b"k.jpg")]
    assert str(images.left_out) == f"1 .json (e.g. {web.url}/d/s.tar:k.json), 1 .txt (e.g. n.txt)"
    assert list(find_images([f"{web.url}/d/*.jpg"]).ids()) == [f"{web.url}/d/a.jpg"]
    web.ranges = False
    with pytest.raises(StoreError, match=r"/d/s\.tar: the server sends no parts of files, which tars need"):
        images[2].read()
    with pytest.raises(SourceError, match="has no query"):
        find_images([f"{web.url}/d/?key=secret"])


def test_a_host_that_is_gone_fails_alone_while_another_answers(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    web.files["/x.jpg"] = b"x"
    here, gone = find_images([f"{web.url}/x.jpg", "http://127.0.0.1:1/y.jpg"])
    with pytest.raises(StoreError) as raised:
        gone.read()
    assert raised.value.errno == 5
    # The other host answers during the attempts.
    monkeypatch.setattr(remote, "time", SimpleNamespace(monotonic=lambda: 0.0, sleep=lambda _: here.read()))
    with pytest.raises(StoreError, match=r"^http://127\.0\.0\.1:1/y\.jpg: no answer after 3 attempts") as raised:
        gone.read()
    assert raised.value.errno == 6  # ENXIO: this file alone
