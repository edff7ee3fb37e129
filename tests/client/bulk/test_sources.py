"""Which images, in which order, under which ids."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinov3_client.bulk.errors import SourceError, TooLarge
from dinov3_client.bulk.images import Images
from dinov3_client.bulk.sources import find_images


def write(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def write_tar(path: Path, members: list[str], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name in members:
            member = tarfile.TarInfo(name)
            data = f"data of {name}".encode()
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def ids(*sources: object, lists: tuple[Path, ...] = ()) -> list[str]:
    return list(find_images(map(str, sources), lists).ids())


def test_a_folder_with_all_below_it_in_the_order_of_the_names(tmp_path: Path) -> None:
    write(tmp_path, "b/2.JPG", "b/10.png", "a.tiff", "c.webp", "b.bmp", "notes.txt", ".hidden.jpg", ".git/x.jpg", "b/y")
    images = find_images([str(tmp_path)])
    assert list(images.ids()) == ["a.tiff", "b.bmp", "b/10.png", "b/2.JPG", "c.webp"]
    assert str(images.left_out).startswith("2 hidden (e.g. .")
    assert str(images.left_out).endswith("), 1 .txt (e.g. notes.txt), 1 without ending (e.g. b/y)")
    assert [item.read() for item in images] == [name.encode() for name in images.ids()]
    assert [item.stem for item in images] == ["a", "b", "b/10", "b/2", "c"]
    assert images[2].source == f"{tmp_path}/b/10.png"


def test_links_to_folders_are_followed_and_never_in_a_circle(tmp_path: Path) -> None:
    write(tmp_path, "data/x.jpg", "other/y.jpg")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "back").symlink_to(tmp_path / "data")
    assert ids(tmp_path / "data") == ["linked/y.jpg", "x.jpg"]


def test_files_globs_and_lists_keep_the_names_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "b.jpg", "a.jpg", "sub/c.jpg", "sub/d.dat", "odd[1].jpg")
    monkeypatch.chdir(tmp_path)
    assert ids("b.jpg", "a.jpg") == ["b.jpg", "a.jpg"]
    assert ids("sub/*") == ["sub/c.jpg", "sub/d.dat"]
    assert ids("**/?.jpg") == ["a.jpg", "b.jpg", "sub/c.jpg"]
    assert ids("odd[1].jpg") == ["odd[1].jpg"]
    assert ids(tmp_path / "a.jpg") == [f"{tmp_path}/a.jpg"]
    (tmp_path / "list.txt").write_text("sub/c.jpg\n\nmissing.jpg\r\na.jpg")
    images = find_images(["b.jpg"], [Path("list.txt")])
    assert list(images.ids()) == ["b.jpg", "sub/c.jpg", "missing.jpg", "a.jpg"]
    assert [item.stem for item in images] == ["b", "c", "missing", "a"]


def test_a_line_of_a_list_ends_at_a_line_feed_alone(tmp_path: Path) -> None:
    names = ["a\u2028b.jpg", "c\x85.jpg", "d\x0c.jpg"]
    (tmp_path / "list.txt").write_bytes("\r\n".join(names).encode())
    assert ids(lists=(tmp_path / "list.txt",)) == names


def test_names_that_are_no_text(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jpg")
    write(tmp_path, "ok.jpg")
    (tmp_path / name).write_bytes(b"x")
    images = find_images([str(tmp_path)])
    assert list(images.ids()) == [name, "ok.jpg"]
    assert images[0].read() == b"x"
    assert len(images.digest()) == 64


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_shard_has_the_samples_with_an_image(tmp_path: Path, form: int) -> None:
    long = "x" * 90 if form == tarfile.USTAR_FORMAT else "x" * 300
    members = [
        "a/0001.cls", "a/0001.jpg", "a/0001.json",
        "0002.tags", "0002.jpeg", "0002.seg.npy",
        "0003.txt",
        "./b/0004.TIFF",
        "._0004.jpg",
        f"{long}.webp",
        "0.5.jpg",
        "22.05.png",
        "c/x.input.JFIF",
    ]  # fmt: skip
    path = write_tar(tmp_path / "s-0.tar", members, form)
    images = find_images([str(path)])
    assert list(images.ids()) == [f"{path}:{key}" for key in ("a/0001", "0002", "b/0004", long, "0", "22", "c/x")]
    data = ["a/0001.jpg", "0002.jpeg", "./b/0004.TIFF", f"{long}.webp", "0.5.jpg", "22.05.png", "c/x.input.JFIF"]
    assert [item.read() for item in images] == [f"data of {name}".encode() for name in data]
    assert [item.stem for item in images][:3] == ["s-0/a/0001", "s-0/0002", "s-0/b/0004"]
    assert str(images.left_out) == (
        f"1 .cls (e.g. {path}:a/0001.cls), 1 .json (e.g. {path}:a/0001.json), 1 .npy (e.g. {path}:0002.seg.npy), "
        f"1 .tags (e.g. {path}:0002.tags), 1 .txt (e.g. {path}:0003.txt), 1 hidden (e.g. {path}:._0004.jpg)"
    )


def test_ranges_of_shards_and_shards_in_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("s-08", "s-09", "s-10"):
        write_tar(tmp_path / f"{name}.tar", [f"{name}.jpg"])
    assert ids("s-{08..10}.tar") == ["s-08.tar:s-08", "s-09.tar:s-09", "s-10.tar:s-10"]
    assert ids("s-{10..08}.tar", "./s-0?.tar")[:2] == ["s-10.tar:s-10", "s-09.tar:s-09"]
    write(tmp_path, "s-09.jpg")
    assert ids(tmp_path) == ["s-08.tar:s-08", "s-09.jpg", "s-09.tar:s-09", "s-10.tar:s-10"]
    with pytest.raises(SourceError, match=r"no file or folder s-11\.tar"):
        find_images(["s-{08..11}.tar"])
    (tmp_path / "list").write_text("s-10.tar\n")
    assert ids(lists=(Path("list"),)) == ["s-10.tar:s-10"]


@pytest.mark.parametrize(("first", "last", "names"), [("1", "3", "1 2 3"), ("098", "101", "098 099 100 101")])
def test_ranges_count_as_in_bash(tmp_path: Path, first: str, last: str, names: str) -> None:
    for name in names.split():
        write(tmp_path, f"{name}-1.jpg", f"{name}-2.jpg")
    expected = [f"{tmp_path}/{name}-{n}.jpg" for name in names.split() for n in (1, 2)]
    assert ids(f"{tmp_path}/{{{first}..{last}}}-{{1..2}}.jpg") == expected


def test_two_images_of_one_id_are_both_named(tmp_path: Path) -> None:
    write(tmp_path, "a/1.jpg", "a/2.jpg", "b/0.jpg", "b/2.jpg")
    with pytest.raises(SourceError) as raised:
        find_images([f"{tmp_path}/a", f"{tmp_path}/b"])
    assert f"two images have the id 2.jpg: {tmp_path}/a/2.jpg" in str(raised.value)
    assert f"and {tmp_path}/b/2.jpg" in str(raised.value)
    with pytest.raises(SourceError, match=r"a/1\.jpg \(image 0\) and .*a/1\.jpg \(image 1\)"):
        find_images([f"{tmp_path}/a/1.jpg"] * 2)
    path = write_tar(tmp_path / "s.tar", ["k.jpg", "l.jpg", "k.png"])
    with pytest.raises(SourceError, match=r"the name k: k\.jpg \(byte 512\) and k\.png \(byte \d{4}\)"):
        find_images([str(path)])


def test_sources_without_images(tmp_path: Path) -> None:
    write(tmp_path, "sub/notes.txt", "a.tar.gz", "list")
    (tmp_path / "list").write_text("\n")
    empty = write_tar(tmp_path / "e.tar", ["x.json"])
    for source, message in (
        (tmp_path / "sub", "holds no image"),
        (tmp_path / "none", "there is no file or folder"),
        (tmp_path / "*.png", "no file matches"),
        (tmp_path / "a.tar.gz", "decompress it first"),
        (empty, "holds no sample with an image"),
        (write_tar(tmp_path / "0.tar", []), "holds no sample"),
    ):
        with pytest.raises(SourceError, match=message):
            find_images([str(source)])
    with pytest.raises(SourceError, match="the list holds no image"):
        find_images([], [tmp_path / "list"])


def test_a_damaged_shard_is_no_shorter_one(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", ["a.jpg", "b.jpg", "c.jpg"])
    data = path.read_bytes()
    second = 1024
    for damaged in (
        data[:second] + b"\xff" * 512 + data[second + 512 :],  # a header that is none
        data[: second + 100],
        data[: second + 516],  # within a member's data
        b"no tar",
    ):
        path.write_bytes(damaged)
        with pytest.raises(SourceError, match="damaged"):
            find_images([str(path)])
    path.write_bytes(data[: second * 3])  # webdataset's own writers may leave the end mark out
    assert len(find_images([str(path)])) == 3


def header(size: bytes, kind: bytes = b"0", name: bytes = b"a.jpg") -> bytes:
    """Of a member in a tar file; `size` as its 12 bytes are."""
    block = bytearray(name.ljust(100, b"\0") + b"0000644\0" * 3 + size + b"0" * 11 + b"\0" + b" " * 8 + kind)
    block += bytes(100) + b"ustar\x0000" + bytes(247)
    block[148:156] = b"%06o\0 " % sum(block)
    assert len(block) == 512
    return bytes(block)


ABSURD_SIZES = [
    b"77777777777\0",  # 8 GiB
    *(b"\x80" + (2**bits - 1).to_bytes(11, "big") for bits in (40, 62, 63, 64, 80)),
    *(b"\xff" + (-number).to_bytes(11, "big", signed=True) for number in (1, 512, 1024, 2**62, 2**64)),
    b"99999999999\0",
    b"-0000001000\0",
    b" " * 12,
]


def found_or_damaged(path: Path) -> str:
    """Why the shard cannot be used; else its images are read."""
    try:
        images = find_images([str(path)])
    except SourceError as error:
        return str(error)
    assert [len(item.read()) for item in images] in ([0], [4])
    return f"{path} is one"


@pytest.mark.parametrize("kind", [b"0", b"5", b"L", b"K", b"x", b"g", b"S", b"?"])
@pytest.mark.parametrize("size", ABSURD_SIZES)
def test_a_tar_of_absurd_sizes_is_a_damaged_one(tmp_path: Path, size: bytes, kind: bytes) -> None:
    path = tmp_path / "s.tar"
    path.write_bytes(
        header(size, kind) + b"x" * 512 + header(b"00000000004\0") + b"data".ljust(512, b"\0") + bytes(1024)
    )
    assert str(path) in found_or_damaged(path)


def test_tars_of_absurd_headers(tmp_path: Path) -> None:
    def pax(record: bytes) -> bytes:
        return (
            header(b"%011o\0" % len(record), b"x") + record.ljust(512, b"\0") + header(b"00000000004\0") + bytes(2048)
        )

    path = tmp_path / "s.tar"
    for content in (
        header(b"00000000004\0", b"L") + b"a".ljust(512, b"\0"),
        (header(b"00000000004\0", b"L") + b"a".ljust(512, b"\0")) * 3000,  # a name of a name of a name
        pax(b"20 size=99999999999\n"),
        pax(b"20 size=99999999999999999999999\n"),
        pax(b"12 size=ab\n"),
        pax(b"13 size=-512\n"),
        pax(b"99999999999 path=x\n"),
        pax(b"\xff\xff"),
        pax(b"30 GNU.sparse.map=1,2,3,x,y,z\n"),
    ):
        path.write_bytes(content)
        assert str(path) in found_or_damaged(path)


def test_a_sparse_image_is_no_image(tmp_path: Path) -> None:
    """What lies in the file is not what the member holds."""
    entry = b"00000000000\0" + b"00000001000\0"
    block = bytearray(header(b"00000001000\0", b"S"))
    block[386 : 386 + 24] = entry
    block[483:495] = b"00000010000\0"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    path = tmp_path / "s.tar"
    path.write_bytes(bytes(block) + bytes(512) + bytes(1024))
    with pytest.raises(SourceError, match=r"a\.jpg as a sparse file"):
        find_images([str(path)])


def test_links_that_lead_nowhere_or_to_themselves_fail_alone(tmp_path: Path) -> None:
    write(tmp_path, "a.jpg")
    (tmp_path / "b.jpg").symlink_to("b.jpg")
    (tmp_path / "c.jpg").symlink_to("gone")
    (tmp_path / "loop").symlink_to("loop")
    images = find_images([str(tmp_path)])
    assert list(images.ids()) == ["a.jpg", "b.jpg", "c.jpg"]
    for item in images[1:]:
        with pytest.raises(OSError, match=item.id):
            item.read()


def test_folders_in_folders_without_end(tmp_path: Path) -> None:
    """More than Python's own stack would take."""
    depth = 1500
    below = os.open(tmp_path, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=below)
        inner = os.open("d", os.O_RDONLY, dir_fd=below)
        os.close(below)
        below = inner
    os.close(os.open("x.jpg", os.O_CREAT | os.O_WRONLY, dir_fd=below))
    os.close(below)
    try:
        assert ids(tmp_path) == ["d/" * depth + "x.jpg"]
    finally:  # pytest deletes old folders by recursion, and would fail at the end of some later run
        subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)


def test_an_invalid_list_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list").write_bytes(b"a.jpg\nb\0.jpg\n")
    with pytest.raises(SourceError, match="contains null bytes"):
        ids(lists=(tmp_path / "list",))


def test_a_shard_that_was_cut_since_fails_to_be_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", ["a.jpg", "b.jpg"])
    images = find_images([str(path)])
    path.write_bytes(path.read_bytes()[:1030])
    with pytest.raises(OSError, match="ends within it"):
        images[1].read()


def test_a_file_over_the_limit_is_not_read(tmp_path: Path) -> None:
    write(tmp_path, "12345")
    [item] = find_images([f"{tmp_path}/12345"])
    assert item.read(5) == b"12345"
    with pytest.raises(TooLarge) as raised:
        item.read(4)
    assert raised.value.size == 5


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_any_index_finds_what_iteration_does(groups: list[int]) -> None:
    class Group:
        def __init__(self, number: int, count: int) -> None:
            self.ids = [f"{number}:{each}" for each in range(count)]

        def item(self, index: int) -> str:
            return self.ids[index]

    images = Images([Group(*each) for each in enumerate(groups)])  # type: ignore[misc]
    every = list(images.ids())
    assert list(images) == every  # type: ignore[comparison-overlap]
    assert [images[index - len(every)] for index in range(len(every))] == every  # type: ignore[comparison-overlap]
    assert images[1:] == every[1:]  # type: ignore[comparison-overlap]
