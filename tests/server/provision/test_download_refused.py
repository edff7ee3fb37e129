"""Failing downloads: each cause has its own error, and no bad file is left."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from dinov3_server import storage
from dinov3_server.errors import AccessRefused, CheckpointError, ConfigError, StorageError, Unreachable
from dinov3_server.provision.download import Expected
from dinov3_server.provision.http import timeout
from tests.server.provision.download_rig import DATA, SECRET, Rig, rig
from tests.support.file_server import Answer, FileServer
from tests.support.waiting import until

PATH = "/dinov3/model.pth"
XML = b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>'


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Rig:
    here = rig(monkeypatch, tmp_path)
    here.target.parent.mkdir(parents=True)
    here.target.write_bytes(b"a good file")
    return here


@pytest.mark.parametrize("status", [400, 401, 403])
def test_a_refused_signed_url(here: Rig, files: FileServer, status: int) -> None:
    files.always(PATH, Answer(status=status, body=XML, headers={"Content-Type": "application/xml"}))
    said = here.fails(AccessRefused, files.url(f"{PATH}?{SECRET}"))
    assert f"{files.url(PATH)}?...: the server answers {status}" in said
    assert "(Request has expired)" in said
    assert "https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/" in said
    assert "quoted" in said
    assert here.waits == []
    assert here.left() == ["model.pth"]


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_repository(here: Rig, files: FileServer, status: int) -> None:
    files.always(PATH, Answer(status=status, body=b"Access to this model is restricted\nmore\n"))
    said = here.fails(AccessRefused, files.url(PATH))
    assert "(Access to this model is restricted)" in said
    assert "HF_TOKEN" in said
    assert here.waits == []


@pytest.mark.parametrize("text", [b"", b"x" * 500, b"\0\1\2", b"<p>", b"\n \n"])
def test_long_or_multiline_messages_are_not_quoted(here: Rig, files: FileServer, text: bytes) -> None:
    files.always(PATH, Answer(status=403, body=text))
    assert "403 Forbidden. A gated" in here.fails(AccessRefused, files.url(PATH))


@pytest.mark.parametrize("status", [404, 410])
def test_a_url_that_does_not_exist(here: Rig, files: FileServer, status: int) -> None:
    files.always(PATH, Answer(status=status))
    assert "nothing exists at this URL" in here.fails(ConfigError, files.url(PATH))
    assert here.waits == []


@pytest.mark.parametrize(("status", "says"), [(405, "405 Method Not Allowed"), (416, "416"), (407, "HTTPS_PROXY")])
def test_other_refusals_are_not_retried(here: Rig, files: FileServer, status: int, says: str) -> None:
    files.always(PATH, Answer(status=status))
    assert says in here.fails(Unreachable, files.url(PATH))
    assert len(files.requests) == 1


def test_a_server_that_keeps_failing(here: Rig, files: FileServer) -> None:
    files.always(PATH, Answer(status=503, body=b"maintenance until noon"))
    said = here.fails(Unreachable, files.url(PATH))
    assert "503 Service Unavailable (maintenance until noon); given up after 5 attempts" in said
    assert here.waits == [1, 2, 4, 8]
    assert here.left() == ["model.pth"]


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"\xef\xbb\xbf \n<!DOCTYPE html><title>Log in</title>", "application/octet-stream"),
        (b"<HTML>", "text/plain"),
        (XML, "binary/octet-stream"),
        (b"Please log in", "text/html; charset=utf-8"),
        (b"<response/>", "application/xml"),
    ],
)
def test_a_web_page_instead_of_a_file_is_refused(here: Rig, files: FileServer, body: bytes, content_type: str) -> None:
    files.put(PATH, body + b" " * 5_000_000)
    files.script(PATH, Answer(headers={"Content-Type": content_type}))
    # Also where a size is known: that it is a page says more.
    assert "is a web page" in here.fails(CheckpointError, files.url(PATH), Expected(size=7))
    assert here.left() == ["model.pth"]


def test_binary_content_labelled_as_html_is_accepted(here: Rig, files: FileServer) -> None:
    files.put(PATH, DATA)
    files.script(PATH, Answer(headers={"Content-Type": "text/html"}))
    here.download(files.url(PATH))
    assert here.target.read_bytes() == DATA


def test_a_body_that_always_ends_early(here: Rig, files: FileServer) -> None:
    files.put(PATH, DATA, {"ETag": '"1"'})
    files.script(PATH, Answer(cut_after=1000))
    files.always(PATH, Answer(cut_after=0))
    said = here.fails(Unreachable, files.url(PATH))
    assert "the connection ended at 1,000 of 200,000 bytes" in said
    assert "1 kB are kept: the next start resumes there" in said
    assert files.ranges(PATH) == [None, *["bytes=1000-"] * 5]
    assert here.part.read_bytes() == DATA[:1000]


def test_a_silent_server(here: Rig, files: FileServer) -> None:
    files.always(PATH, Answer(hold_after=0))
    files.put(PATH, DATA)
    said = here.fails(Unreachable, files.url(PATH), stall_seconds=0.05)
    assert "not a byte for 0.05 s" in said
    until(lambda: len(files.requests) == 5, "the server's threads record every request")


def test_the_time_for_a_silent_server_is_huggingface_hubs_setting(
    here: Rig, files: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.always(PATH, Answer(hold_after=0))
    files.put(PATH, DATA)
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "0.05")
    said = here.fails(Unreachable, files.url(PATH), stall_seconds=None)
    assert "not a byte for 0.05 s; if a mirror fetches the file itself before it answers" in said
    assert "HF_HUB_DOWNLOAD_TIMEOUT" in said
    for wrong in ("soon", "-1", "0", "nan"):
        monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", wrong)
        said = here.fails(ConfigError, files.url(PATH), stall_seconds=None)
        assert said == f"environment HF_HUB_DOWNLOAD_TIMEOUT is {wrong!r}; allowed: seconds above 0, at most 1000000"


@pytest.mark.parametrize("value", ["", " "])
def test_an_empty_time_is_the_default(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", value)
    assert timeout("HF_HUB_DOWNLOAD_TIMEOUT") == 30


def test_a_server_that_changes_its_content_length(here: Rig, files: FileServer) -> None:
    files.put(PATH, DATA, {"ETag": '"1"'})
    files.always(PATH, Answer(headers={"Content-Length": "300000"}))
    said = here.fails(Unreachable, files.url(PATH))
    assert "the server said 300,000 bytes at first and says 200,000 now" in said


@pytest.mark.parametrize("says", ["150000", "250000"])
def test_a_content_length_other_than_the_expected_size(here: Rig, files: FileServer, says: str) -> None:
    files.put(PATH, DATA)
    files.always(PATH, Answer(headers={"Content-Length": says}))
    said = here.fails(CheckpointError, files.url(PATH), Expected(size=len(DATA)))
    assert f"{int(says):,} bytes where 200,000 were expected" in said
    assert len(files.requests) == 1
    assert here.left() == ["model.pth"]


def test_an_endless_body(here: Rig, files: FileServer) -> None:
    files.put(PATH, DATA)
    files.always(PATH, Answer(chunked=True, hold_after=100))
    said = here.fails(CheckpointError, files.url(PATH), Expected(size=10))
    assert "expected 10" in said
    assert here.left() == ["model.pth"]


def test_an_empty_file(here: Rig, files: FileServer) -> None:
    files.put(PATH, b"")
    assert "the received file is empty" in here.fails(CheckpointError, files.url(PATH))
    assert here.left() == ["model.pth"]


def test_a_content_encoding_is_refused(here: Rig, files: FileServer) -> None:
    files.put(PATH, DATA, {"Content-Encoding": "gzip"})
    assert "'gzip'" in here.fails(CheckpointError, files.url(PATH))


@pytest.mark.parametrize("digest", ["0" * 64, "deadbeef"])
def test_a_wrong_hash(here: Rig, files: FileServer, digest: str) -> None:
    files.put(PATH, b"abc")
    said = here.fails(CheckpointError, files.url(PATH), Expected(sha256=digest))
    # FIPS 180-2, appendix B.1
    assert "sha256 ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad" in said
    assert f"expected was one that begins with {digest}" in said
    assert here.left() == ["model.pth"]


@pytest.mark.parametrize(
    "location", ["ftp://other/file", "file:///etc/passwd", "http://[::1/", "http://h:99999/", "//:80/"]
)
def test_redirects_to_unusable_urls(here: Rig, files: FileServer, location: str) -> None:
    files.always(PATH, Answer(status=302, headers={"Location": location}))
    assert "redirects to an unusable URL" in here.fails(Unreachable, files.url(PATH))


def test_redirects_in_a_loop(here: Rig, files: FileServer) -> None:
    files.always(PATH, Answer(status=302, headers={"Location": f"{PATH}?again"}))
    assert "redirects more than 10 times" in here.fails(Unreachable, files.url(PATH))
    assert len(files.requests) == 11


def test_a_refused_connection(here: Rig) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        url = f"https://127.0.0.1:{held.getsockname()[1]}/model.pth?{SECRET}"
        said = here.fails(Unreachable, url)
    assert "127.0.0.1 cannot be reached (Connection refused)" in said
    assert here.waits == [1, 2, 4, 8]


@pytest.mark.parametrize(
    ("number", "requests", "says"), [(socket.EAI_NONAME, 1, "is unknown"), (socket.EAI_AGAIN, 5, "again")]
)
def test_unknown_hosts(here: Rig, monkeypatch: pytest.MonkeyPatch, number: int, requests: int, says: str) -> None:
    asked = []

    def getaddrinfo(host: str, *_: object) -> None:
        asked.append(host)
        raise socket.gaierror(number, "Try again" if number == socket.EAI_AGAIN else "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert says in here.fails(Unreachable, "https://mirror.example/model.pth")
    assert asked == ["mirror.example"] * requests


def test_a_server_without_tls(here: Rig, files: FileServer) -> None:
    assert "no TLS connection" in here.fails(Unreachable, files.url(PATH).replace("http:", "https:"))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("openssl"):
        pytest.skip("needs the openssl command, to make a certificate")
    path = tmp_path_factory.mktemp("tls") / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(path) + ".key", "-out", str(path) + ".crt", "-days", "2", "-subj", "/CN=127.0.0.1"]
    subprocess.run([*command, "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    path.write_text(Path(str(path) + ".key").read_text() + Path(str(path) + ".crt").read_text())
    return path


def test_certificates_and_redirects_of_tls(here: Rig, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FileServer(certificate) as tls, FileServer() as plain:
        tls.put(PATH, DATA)
        plain.put(PATH, DATA)
        tls.always("/away", Answer(status=302, headers={"Location": plain.url(f"{PATH}?{SECRET}")}))
        plain.always("/up", Answer(status=302, headers={"Location": tls.url(PATH)}))
        said = here.fails(Unreachable, tls.url(PATH))
        assert "is not trusted (self-signed certificate)" in said.replace("self signed", "self-signed")
        assert "SSL_CERT_FILE" in said
        assert here.waits == []
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        said = here.fails(Unreachable, tls.url("/away"))
        assert "which is not encrypted" in said
        assert SECRET not in said
        assert plain.requests == []
        here.download(plain.url("/up"))
    assert here.target.read_bytes() == DATA


def test_too_little_disk_space(here: Rig, files: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    files.put(PATH, DATA, {"ETag": '"1"'})
    free = 199_999
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    said = here.fails(StorageError, files.url(PATH))
    assert "200,000 bytes and 199,999 are free" in said
    assert here.left() == ["model.pth"]
    # What is already there needs no room.
    files.script(PATH, Answer(cut_after=1))
    free = 200_000
    here.sleep = lambda _: (_ for _ in ()).throw(KeyboardInterrupt)  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        here.download(files.url(PATH))
    free = 199_999
    here.download(files.url(PATH))
    assert here.target.read_bytes() == DATA


def test_a_disk_that_fills_up(here: Rig, files: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    files.put(PATH, DATA, {"ETag": '"1"'})
    pwrite = os.pwrite

    def full(descriptor: int, data: bytes, offset: int) -> int:
        if offset >= 50_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(descriptor, data[: 50_000 - offset], offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        said = here.fails(StorageError, files.url(PATH))
    assert "model.pth.part: the disk is full" in said
    assert here.part.read_bytes() == DATA[:50_000]
    here.download(files.url(PATH))
    assert files.ranges(PATH) == [None, "bytes=50000-"]
    assert here.target.read_bytes() == DATA


@pytest.mark.parametrize(("number", "says"), [(errno.EROFS, "read-only"), (errno.EACCES, "no permission")])
def test_a_folder_that_cannot_be_written(
    here: Rig, files: FileServer, monkeypatch: pytest.MonkeyPatch, number: int, says: str
) -> None:
    opens = os.open

    def refuse(path: str | Path, flags: int, mode: int = 0o777) -> int:
        if str(path) == str(here.part):
            raise OSError(number, os.strerror(number), str(path))
        return opens(path, flags, mode)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        said = here.fails(StorageError, files.url(PATH))
    assert says in said
    assert str(here.part) in said
    assert files.requests == []


def test_a_file_in_place_of_the_folder(here: Rig, files: FileServer) -> None:
    here.target = here.target / "model.pth"
    with pytest.raises(StorageError, match="a file exists where a folder is needed"):
        here.download(files.url(PATH))


@pytest.mark.parametrize(
    "url",
    ["weights.pth", "ftp://host/file", "hf://a/b", "https://", "https:///file", "http://host:99999/", "http://[::1/x"],
)
def test_malformed_urls(here: Rig, url: str) -> None:
    said = here.fails(ConfigError, url)
    assert "https://" in said or "is not a URL" in said


def test_a_token_with_a_line_break_is_not_shown(here: Rig, files: FileServer) -> None:
    with pytest.raises(ConfigError, match="the value of the header Authorization") as raised:
        here.download(files.url(PATH), headers={"Authorization": "Bearer hf_token\n"})
    assert "hf_token" not in str(raised.value)
    assert files.requests == []


def test_file_urls_that_cannot_be_read(here: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no such file on this machine" in here.fails(ConfigError, (tmp_path / "mount" / "file.pth").as_uri())
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        assert "is not a regular file; name the checkpoint file itself" in here.fails(ConfigError, path.as_uri())
    for url in ("file://weights/file.pth", "file://file.pth", "file://[x"):
        assert "three slashes" in here.fails(ConfigError, url)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    (tmp_path / "secret.pth").touch()
    monkeypatch.setattr(Path, "is_file", refuse)
    assert "cannot be read: Permission denied" in here.fails(StorageError, (tmp_path / "secret.pth").as_uri())
