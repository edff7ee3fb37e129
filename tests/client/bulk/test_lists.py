"""Lists of images: text and CSV files, standard input."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from dinov3_client.bulk.errors import SourceError
from dinov3_client.bulk.left_out import LeftOut
from dinov3_client.bulk.lists import Names, parse
from dinov3_client.bulk.sources import find_images


def test_what_is_no_name() -> None:
    data = b"\xef\xbb\xbf# photos\r\n a.jpg \r\n\n\t\nb c.jpg\t\n  # more\nd#1.jpg\ne.jpg"
    assert parse(data, "list.txt", None) == Names(["a.jpg", "b c.jpg", "d#1.jpg", "e.jpg"], [2, 5, 7, 8])


@pytest.mark.parametrize(
    "text",
    [
        "id,file name,label\n1,a.jpg,cat\n\n2,b c.jpg ,dog\n",
        "\ufeff# made by hand\n\nid, file name ,label\r\n1,a.jpg,cat\r\n2,\"b c.jpg\",\"two\r\nlines\"\r\n",
        "id\tfile name\n1\ta.jpg\n2\tb c.jpg\n",
        "id;file name\n1;a.jpg\n2;b c.jpg\n",
        "file name\na.jpg\nb c.jpg",
    ],
)  # fmt: skip
def test_a_column_of_a_csv_file(text: str) -> None:
    assert list(parse(text.encode(), "list.csv", "file name").names) == ["a.jpg", "b c.jpg"]


@pytest.mark.parametrize(
    ("data", "column", "message"),
    [
        (b"path,label\na.jpg,1\n", "file", "no column 'file' .*; its header has 'path', 'label'"),
        (b"path,path\na.jpg,1\n", "path", "several columns 'path'"),
        (b"", "path", "its header has none at all"),
        (b"# a\nlabel,path\n1,a.jpg\n2,\n", "path", "list.csv, line 4: the column 'path' is empty"),
        (b"label,path\n1\n", "path", "line 2: the column 'path' is empty"),
        (b'path\n"a.jpg\n', "path", "line 2: unexpected end of data"),
        (b"path,label\na.jpg,1\n", None, "is a CSV file: .* with --list-column; its header is 'path,label'"),
        ("a.jpg\n".encode("utf-16"), None, "is text in UTF-16; save the list as UTF-8"),
        (b"a\0.jpg\n", None, "contains null bytes"),
    ],
)
def test_lists_that_cannot_be_used(data: bytes, column: str | None, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        parse(data, "list.csv", column)


def test_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"path\nb.jpg\na.jpg\n")))
    assert list(find_images([], ["-"], list_column="path").ids()) == ["b.jpg", "a.jpg"]


def test_names_beside_the_list_and_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    for name in ("list.txt", "a.jpg"):
        (tmp_path / "data" / name).write_text("a.jpg\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=r"relative to the current folder, where there is no a\.jpg; .* in data$"):
        find_images([], ["data/list.txt"])
    monkeypatch.chdir("data")
    assert list(find_images([], [Path("list.txt")]).ids()) == ["a.jpg"]


def test_two_lines_of_one_name_are_both_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "1.txt").write_text("a.jpg\n\nb.jpg\n")
    (tmp_path / "2.txt").write_text("# more\nb.jpg\n")
    with pytest.raises(SourceError, match=r"id b\.jpg: b\.jpg \(line 3 of 1\.txt\) and b\.jpg \(line 2 of 2\.txt\)"):
        find_images([], ["1.txt", "2.txt"])
    (tmp_path / "a.jpg").touch()
    with pytest.raises(SourceError, match=r"id a\.jpg: a\.jpg \(image 0\) and a\.jpg \(line 1 of 1\.txt\)"):
        find_images(["a.jpg"], ["1.txt"])


def test_what_was_left_out_is_short() -> None:
    left_out = LeftOut()
    assert str(left_out) == ""
    for name in ("b.TXT", "a.txt", "a.tar.gz", "Mr. Smith", ".x", "dir.d/y", "z."):
        left_out.add(name)
    assert str(left_out) == (
        "3 without ending (e.g. Mr. Smith), 2 .txt (e.g. b.TXT), 1 .tar.gz (e.g. a.tar.gz), 1 hidden (e.g. .x)"
    )
    for number in range(3000):
        left_out.add(f"x.{number}")
    assert len(str(left_out)) < 500
    assert sum(int(part.strip().split()[0].replace(",", "")) for part in str(left_out).split("),")) == 3007
