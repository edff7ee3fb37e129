"""Which member of a tar sample is its image."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from dinov3_client.bulk.errors import SourceError
from dinov3_client.bulk.sources import find_images
from dinov3_client.bulk.tars import parse_image_keys


def write_tar(path: Path, members: Iterable[str]) -> str:
    """Write a tar file; "a -> b" is a symbolic link, "a => b" a hard link, and "a/" a folder."""
    with tarfile.open(path, "w") as tar:
        for each in members:
            name, _, target = each.replace(" => ", " -> ").partition(" -> ")
            member = tarfile.TarInfo(name)
            data = b"" if target or name.endswith("/") else name.encode()
            member.type = tarfile.DIRTYPE if name.endswith("/") else member.type
            if target:
                member.type, member.linkname = (tarfile.LNKTYPE if "=>" in each else tarfile.SYMTYPE), target
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(path)


def chosen(path: str, keys: str = "") -> dict[str, str]:
    images = find_images([path], image_keys=parse_image_keys(keys) if keys else ())
    return {item.id.removeprefix(f"{path}:"): item.read().decode() for item in images}


SAMPLES = ["a.input.JPG", "a.target.jpg", "a.json", "b.target.jpg", "b.input.png", "c.json", "d/e.v1/f.input.jpg"]


@pytest.mark.parametrize(
    ("keys", "images"),
    [
        ("input.jpg", {"a": "a.input.JPG", "d/e.v1/f": "d/e.v1/f.input.jpg"}),
        ("Input.JPG;input.png", {"a": "a.input.JPG", "b": "b.input.png", "d/e.v1/f": "d/e.v1/f.input.jpg"}),
        ("target.jpg, input.jpg", {"a": "a.target.jpg", "b": "b.target.jpg", "d/e.v1/f": "d/e.v1/f.input.jpg"}),
        (".json", {"a": "a.json", "c": "c.json"}),
        (
            "*",
            {
                name.rpartition(".")[0]: name for name in SAMPLES if not name.endswith(".json")
            },
        ),
    ],
)  # fmt: skip
def test_the_key_is_what_follows_the_first_dot(tmp_path: Path, keys: str, images: dict[str, str]) -> None:
    assert chosen(write_tar(tmp_path / "s.tar", SAMPLES), keys) == images


def test_the_rest_is_counted(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [*SAMPLES, "README", "__meta__/x.jpg", "."])
    images = find_images([path], image_keys=("input.jpg",))
    assert str(images.left_out) == (
        f"3 .jpg (e.g. {path}:a.target.jpg), 2 .json (e.g. {path}:a.json), 1 .png (e.g. {path}:b.input.png), "
        f"1 hidden (e.g. {path}:.), 1 without ending (e.g. {path}:README)"
    )


@pytest.mark.parametrize(
    ("members", "keys", "message"),
    [
        (["k.jpg", "k.json", "k.png"], "", r"k has several images, k\.jpg \(byte 512\) and k\.png \(byte 2560\)"),
        (["k.png", "k.seg.png"], "", r"--image-key, such as 'png' .* or take each image .* --image-key '\*'"),
        (["k.jpg", "k.jpg"], "", r"two members of the key 'jpg': k\.jpg \(byte 512\) and k\.jpg \(byte 1536\)"),
        (["k.jpg", "k.JPG"], "jpg", r"two members of the key 'jpg': k\.jpg \(byte 512\) and k\.JPG"),
        (["k.jpg", "l.jpg", "k.png"], "", r"two images have the name k: k\.jpg .* and k\.png"),
        (["k.jpg", "k.png"], "*", r"two images have the name k: k\.jpg .* and k\.png"),
        (["k.jpg", "l.json"], "jpeg", r"no sample with the key 'jpeg' .*; left out: 1 \.jpg \(e\.g\. .*k\.jpg\), "),
        (["README"], "", r"no sample with an image \(jpg, .*; left out: 1 without ending"),
    ],
)  # fmt: skip
def test_samples_without_a_single_image(tmp_path: Path, members: list[str], keys: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        chosen(write_tar(tmp_path / "s.tar", members), keys)


def test_links_are_followed_within_their_tar(tmp_path: Path) -> None:
    members = [
        "1.jpg -> blobs/x", "blobs/", "blobs/x", "2.jpg => blobs/x", "sub/3.jpg -> ../blobs/x", "4.jpg -> 5.jpg",
        "5.jpg -> 2.jpg", "6.jpg => ./blobs/x",
        "gone.jpg -> nothing", "out.jpg -> ../../etc/passwd", "root.jpg -> /blobs/x", "loop.jpg -> loop2.jpg",
        "loop2.jpg -> loop.jpg", "folder.jpg -> blobs",
    ]  # fmt: skip
    path = write_tar(tmp_path / "s.tar", members)
    assert chosen(path) == dict.fromkeys(["1", "2", "sub/3", "4", "5", "6"], "blobs/x")
    assert str(find_images([path]).left_out) == (
        f"6 links to no file of their tar (e.g. {path}:gone.jpg), 1 without ending (e.g. {path}:blobs/x)"
    )


@pytest.mark.parametrize("keys", ["", ";", "jpg;", "a/b.jpg", "*;jpg"])
def test_keys_that_are_none(keys: str) -> None:
    with pytest.raises(ValueError, match="is no key of a tar sample: give what follows the first dot"):
        parse_image_keys(keys)


def test_another_key_is_another_extraction(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", ["a.jpg", "a.png"])
    digests = {find_images([path], image_keys=(key,)).digest() for key in ("jpg", "png")}
    assert len(digests) == 2
