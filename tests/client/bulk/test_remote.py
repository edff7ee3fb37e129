"""Images at URLs: fsspec's file system in memory, and one that fails."""

from __future__ import annotations

import io
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dinov3_client.bulk import remote
from dinov3_client.bulk.errors import SourceError, StoreError, TooLarge
from dinov3_client.bulk.sources import find_images
from dinov3_client.bulk.tars import parse_image_keys
from tests.client.bulk.stub import contents, failed, manifest, run, tree

fsspec = pytest.importorskip("fsspec")


class Response(Exception):
    """An answer of a web server, as the packages of stores raise it."""

    def __init__(self, status: int) -> None:
        super().__init__(f"{status} at https://user:secret@host/x.jpg?sig=secret")
        self.status = status


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The file system in memory, empty before and after; attempts without pauses."""
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(remote, "_answers", remote._Answers())
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


def write(files: Any, *names: str) -> None:
    for name in names:
        files.pipe_file(f"/{name}", name.encode())


def write_tar(files: Any, name: str, *members: str) -> None:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for each in members:
            member = tarfile.TarInfo(each)
            member.size = len(each)
            tar.addfile(member, io.BytesIO(each.encode()))
    files.pipe_file(f"/{name}", data.getvalue())


def test_a_folder(memory: Any) -> None:
    write(memory, "b/x/2.JPG", "b/x/10.png", "b/a.tiff", "b/notes.txt", "b/.git/x.jpg", "b/y", "c.jpg")
    write_tar(memory, "b/s.tar", "1.jpg", "1.json")
    for url in ("memory://b", "memory://b/"):
        images = find_images([url])
        assert list(images.ids()) == ["a.tiff", "s.tar:1", "x/10.png", "x/2.JPG"]
        assert [item.read() for item in images] == [b"b/a.tiff", b"1.jpg", b"b/x/10.png", b"b/x/2.JPG"]
        assert [item.source for item in images][::3] == ["memory://b/a.tiff", "memory://b/x/2.JPG"]
        assert [item.stem for item in images] == ["a", "s/1", "x/10", "x/2"]
        assert str(images.left_out) == (
            "1 .json (e.g. memory://b/s.tar:1.json), 1 .txt (e.g. notes.txt), 1 hidden (e.g. .git/x.jpg), "
            "1 without ending (e.g. y)"
        )
        assert images.remote


def test_files_globs_ranges_and_lists(memory: Any, tmp_path: Path) -> None:
    write(memory, "b/1.jpg", "b/2.jpg", "b/sub/3.jpg", "b/4.dat", "b/[5].jpg", "b/a#?.jpg")
    write_tar(memory, "b/s-0.tar", "k.input.jpg", "k.jpg")
    write_tar(memory, "b/s-1.tar", "k.jpg")

    def ids(*given: str, **options: Any) -> list[str]:
        return [name.removeprefix("memory://b/") for name in find_images(given, **options).ids()]

    assert ids("memory://b/4.dat", "memory://b/{2..1}.jpg") == ["4.dat", "2.jpg", "1.jpg"]
    assert ids("memory://b/?.jpg") == ["1.jpg", "2.jpg"]
    assert ids("memory://b/**/*.jpg") == ["1.jpg", "2.jpg", "[5].jpg", "a#?.jpg", "sub/3.jpg"]
    assert ids("memory://b/[5].jpg") == ["[5].jpg"]
    assert ids("memory://b/s-{0..1}.tar", image_keys=parse_image_keys("jpg")) == ["s-0.tar:k", "s-1.tar:k"]
    (tmp_path / "local.jpg").write_bytes(b"local")
    (tmp_path / "list").write_text(f"memory://b/2.jpg\nmemory://b/s-1.tar\n{tmp_path}/local.jpg\nmemory://c/gone.jpg\n")
    images = find_images([], [tmp_path / "list"])
    assert [item.read() for item in images[:3]] == [b"b/2.jpg", b"k.jpg", b"local"]
    with pytest.raises(StoreError, match=r"memory://c/gone\.jpg: No such file or directory"):
        images[3].read()
    memory.pipe_file("/b/list.csv", b"path,n\nsub/3.jpg,1\nmemory://b/2.jpg,2\n")
    assert ids(listed=["memory://b/list.csv"], list_column="path") == ["sub/3.jpg", "2.jpg"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("memory://none", "there is no file or folder memory://none"),
        ("memory://b/*.png", r"no file matches memory://b/\*\.png"),
        ("memory://b", r"memory://b holds no image \(jpg, .*; left out: 1 \.txt \(e\.g\. x\.txt\)"),
        ("memory://b/x.tar.gz", "is a compressed tar file"),
        ("nothing://b/x", "nothing://b/x cannot be used: Protocol not known: nothing"),
        ("zip://x.jpg::memory://b/x.zip", "chained URLs"),
        ("memory://b/{1..2}.jpg", "there is no file or folder memory://b/1.jpg"),
    ],
)
def test_sources_without_images(memory: Any, source: str, message: str) -> None:
    write(memory, "b/x.txt", *(["b/x.tar.gz"] if source.endswith("gz") else []))
    with pytest.raises(SourceError, match=message):
        find_images([source])


@pytest.mark.parametrize(
    ("missing", "url", "message"),
    [
        ("fsspec", "s3://b/x.jpg", r"URLs need fsspec: pip install 'dinov3-serving\[fsspec\]'"),
        ("s3fs", "s3://b/x.jpg", "URLs of s3:// need s3fs: pip install s3fs"),
        ("gcsfs", "gs://b/x.jpg", "URLs of gs:// need gcsfs: pip install gcsfs"),
        ("aiohttp", "https://u:secret@h/x.jpg?k=secret", "https://h/x.jpg: URLs of https:// need aiohttp: pip install"),
    ],
)
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, missing: str, url: str, message: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SourceError, match=message) as raised:
        find_images([url])
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:secret@host:1/a/b.jpg?sig=secret&x=1#secret", "https://host:1/a/b.jpg"),
        ("404, url='https://host/b.jpg?sig=secret', ftp://user@h/x", "404, url='https://host/b.jpg', ftp://h/x"),
        ("s3://bucket/a@b.jpg", "s3://bucket/a@b.jpg"),
        ("s3://bucket/a#1?.jpg, https://[::1]:80/a:b@c.jpg", "s3://bucket/a#1?.jpg, https://[::1]:80/a:b@c.jpg"),
        ("s3://bucket/a.jpg?versionId=secret", "s3://bucket/a.jpg"),
        ("s3://user:sec/ret@bucket/a.jpg", "s3://bucket/a.jpg"),
        ("https://user:sec?ret/", "https://"),
        ("https://user:se/cr@et@host/b.jpg", "https://host/b.jpg"),
        ("https://host?k=secret", "https://host"),
        ("a/b?c.jpg", "a/b?c.jpg"),
    ],
)
def test_credentials_are_not_shown(text: str, shown: str) -> None:
    assert remote.without_secrets(text) == shown


def test_duplicates_of_urls(memory: Any) -> None:
    write(memory, "a/1.jpg", "b/1.jpg")
    with pytest.raises(SourceError, match=r"id 1\.jpg: memory://a/1\.jpg \(image 0\) and memory://b/1\.jpg "):
        find_images(["memory://a", "memory://b"])
    with pytest.raises(SourceError, match=r"id memory://a/1\.jpg: .* use runs with different --out folders$"):
        find_images(["memory://a/1.jpg"] * 2)


def failing(monkeypatch: pytest.MonkeyPatch, memory: Any, errors: Callable[[str], Exception | None]) -> list[str]:
    """Let reads of paths for which `errors` returns an error fail; return the paths asked for."""
    asked: list[str] = []
    cat = type(memory).cat_file

    def read(files: Any, path: str, **span: Any) -> Any:
        asked.append(path)
        if error := errors(path):
            raise error
        return cat(files, path, **span)

    monkeypatch.setattr(type(memory), "cat_file", read)
    return asked


@pytest.mark.parametrize(
    ("error", "attempts", "reason"),
    [
        (PermissionError("denied at s3://u:secret@b/x?sig=secret"), 1, "Permission denied: denied at s3://b/x"),
        (Response(403), 1, "the server answered with status 403"),
        (Response(404), 1, "the server answered with status 404"),
        (IsADirectoryError(), 1, "Is a directory"),
        (ValueError("no URL"), 1, "no URL"),
    ],
)
def test_errors_of_one_file(
    memory: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, attempts: int, reason: str
) -> None:
    for index in (1, 2, 3):
        memory.pipe_file(f"/b/{index}.jpg", contents(index))
    asked = failing(monkeypatch, memory, lambda path: error if path.endswith("2.jpg") else None)
    totals = run("memory://b", tmp_path / "out")
    assert (totals.rows, totals.failed) == (2, 1)
    [line] = failed(tmp_path / "out")
    assert (line["id"], line["source"], line["reason"]) == ("2.jpg", "memory://b/2.jpg", reason)
    assert asked.count("/b/2.jpg") == attempts
    assert b"secret" not in b"".join(tree(tmp_path / "out").values())


@pytest.mark.parametrize("error", [Response(503), Response(429), ConnectionResetError("reset"), TimeoutError()])
def test_errors_that_pass_are_tried_again(
    memory: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    for index in (1, 2, 3):
        memory.pipe_file(f"/b/{index}.jpg", contents(index))
    left = [error] * 2
    failing(monkeypatch, memory, lambda path: left.pop() if left and path.endswith("2.jpg") else None)
    assert run("memory://b", tmp_path / "out").rows == 3
    left = [error] * 3
    with pytest.raises(StoreError, match=r"^memory://b/2\.jpg: no answer after 3 attempts: ") as raised:
        run("memory://b", tmp_path / "again", batch_images=1)
    assert "secret" not in str(raised.value)
    run("memory://b", tmp_path / "again")
    assert tree(tmp_path / "again") == tree(tmp_path / "out")


def test_refused_credentials_stop_the_run(memory: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(memory, "b/1.jpg")
    error = PermissionError("The provided token has expired.")
    error.__cause__ = RuntimeError()
    error.__cause__.response = {"Error": {"Code": "ExpiredToken"}}  # type: ignore[attr-defined]
    failing(monkeypatch, memory, lambda path: error)
    with pytest.raises(StoreError, match=r"memory://b/1\.jpg: the store refuses the credentials: ExpiredToken: "):
        run("memory://b", tmp_path / "out")


def test_a_host_that_fails_while_another_answers_fails_alone() -> None:
    answers = remote._Answers()
    answers.note("here")
    assert not answers.of_others("here", 0.0)
    assert answers.of_others("there", 0.0)
    assert not answers.of_others("there", float("inf"))


def test_a_file_over_the_limit_is_not_read(memory: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(memory, "b/12345")
    (tmp_path / "list").write_text("memory://b/12345\n")
    [item] = find_images([], [tmp_path / "list"])
    asked = failing(monkeypatch, memory, lambda path: None)
    with pytest.raises(TooLarge) as raised:
        item.read(6)
    assert raised.value.size == 7
    assert not asked
    assert item.read(7) == b"b/12345"


def test_a_damaged_tar_and_one_whose_store_fails(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(memory, "s.tar", "a.jpg", "b.jpg")
    memory.pipe_file("/damaged.tar", memory.cat_file("/s.tar")[:1200])
    with pytest.raises(SourceError, match=r"memory://damaged\.tar is (no tar|a damaged)"):
        find_images(["memory://damaged.tar"])
    failing(monkeypatch, memory, lambda path: Response(500))
    with pytest.raises(StoreError, match=r"^memory://s\.tar: no answer after 3 attempts: 500 at https://host/x\.jpg$"):
        find_images(["memory://s.tar"])


def test_the_same_rows_as_from_a_folder(memory: Any, source: Path, tmp_path: Path) -> None:
    for path in source.iterdir():
        memory.pipe_file(f"/b/{path.name}", path.read_bytes())
    run(source, tmp_path / "local")
    run("memory://b", tmp_path / "remote")
    assert manifest(tmp_path / "remote") == manifest(tmp_path / "local")
