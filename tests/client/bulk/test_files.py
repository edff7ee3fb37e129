"""The files of an extraction: npz files, links, drafts, mapped shards."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dinov3_client.bulk import ExtractionError, durable, shards
from dinov3_client.bulk.errors import SourceError
from dinov3_client.bulk.rows import ExtractionOptions
from tests.client.bulk.stub import StubClient, contents, manifest, run, stopped, tree, values


def test_npz_files(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (source / "sub").mkdir()
    (source / "sub" / "x.png").write_bytes(contents(50))
    run(source, out, ExtractionOptions(format="npz", layers=(4,)))
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [".lock", "manifest.jsonl", "failed.jsonl", "sub", *(f"{n:02}.npz" for n in range(12) if n not in (0, 6, 11))]
    )
    with np.load(out / "sub" / "x.npz") as file:
        assert np.array_equal(file["layer4_patches"], values(contents(50), "patches", 4))
        assert str(file["source"]) == f"{source}/sub/x.png"
        assert file["grid"].tolist() == [2, 2]
    last = [line for line in manifest(out) if "id" in line][-1]
    assert (last["id"], last["shard"], last["row"]) == ("sub/x.png", "sub/x.npz", 0)


def test_npz_files_stay_in_their_folder_and_have_one_image_each(source: Path, tmp_path: Path) -> None:
    (source / "01.png").write_bytes(contents(1))
    with pytest.raises(SourceError, match=r"01\.jpg and .*01\.png would both become 01\.npz"):
        run(source, tmp_path / "out", ExtractionOptions(format="npz"))
    from tests.client.bulk.test_sources import write_tar

    for member in ("../../x.jpg", "/a/x.jpg", "a//x.jpg", "x" * 252 + ".jpg", "d/" * 2000 + "x.jpg", "é\0.jpg"):
        path = write_tar(tmp_path / "s.tar", [member])
        with pytest.raises(SourceError, match="cannot have an npz file"):
            run(path, tmp_path / "out", ExtractionOptions(format="npz"))
    assert not (tmp_path / "out").exists()


def test_npz_files_of_the_longest_names(source: Path, tmp_path: Path) -> None:
    """A name of 255 bytes, as long as there may be."""
    name = "é" * 125 + "x"
    (source / f"{name}.jpg").write_bytes(contents(7))
    run(source, tmp_path / "out", ExtractionOptions(format="npz"))
    assert (tmp_path / "out" / f"{name}.npz").exists()
    (source / ("x" * 255)).write_bytes(contents(8))
    with pytest.raises(SourceError, match="a name of 259 bytes"):
        run(source / ("x" * 255), tmp_path / "other", ExtractionOptions(format="npz"))


@pytest.mark.parametrize("folder", ["01.npz", "manifest.jsonl"])
def test_an_npz_that_would_be_a_folder_too(source: Path, tmp_path: Path, folder: str) -> None:
    (source / folder).mkdir()
    (source / folder / "x.jpg").write_bytes(contents(1))
    with pytest.raises(SourceError, match=f"{folder} would be both a folder and a file"):
        run(source, tmp_path / "out", ExtractionOptions(format="npz"))


@pytest.mark.parametrize("dangling", [False, True])
@pytest.mark.parametrize("name", ["failed.jsonl", ".lock", "manifest.jsonl", durable.DRAFT])
def test_nothing_is_written_through_a_link(source: Path, tmp_path: Path, name: str, dangling: bool) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    stopped(source, out)
    content = (out / name).read_bytes() if (out / name).exists() else b"other"
    if not dangling:
        other.write_bytes(content)
    (out / name).unlink(missing_ok=True)
    (out / name).symlink_to(other)
    for folder in (out, tmp_path / "new"):
        if folder != out:
            folder.mkdir()
            (folder / name).symlink_to(other)
        with contextlib.suppress(ExtractionError, OSError):
            run(source, folder)
        assert (other.read_bytes() if other.exists() else None) == (None if dangling else content)


def test_a_link_as_failed_jsonl_is_refused_before_any_request(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "failed.jsonl").symlink_to(tmp_path / "other")
    client = StubClient()
    with pytest.raises(OSError, match=r"a symbolic link, which is not written through; remove it: .*failed\.jsonl"):
        run(source, tmp_path / "out", client=client)
    assert not client.options


def test_npz_files_do_not_leave_the_folder_by_a_link(source: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    (source / "sub").mkdir()
    (source / "sub" / "x.png").write_bytes(contents(50))
    out.mkdir()
    other.mkdir()
    (out / "sub").symlink_to(other)
    with pytest.raises(ExtractionError, match="a link that leads out of"):
        run(source, out, ExtractionOptions(format="npz"))
    assert not list(other.iterdir())


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"older")

    def parts() -> Any:
        yield b"half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        durable.create(path, parts())
    assert tree(tmp_path) == {"file": b"older"}
    assert durable.create(path, [b"new", np.arange(3, dtype=np.uint8)]) == 6
    assert tree(tmp_path) == {"file": b"new\0\1\2"}


def test_mapped_shards_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for data in (b"short", (10).to_bytes(8, "little") + b'{"a": {"dt', bytes(range(200, 250))):
        path.write_bytes(data)
        with pytest.raises(ExtractionError, match=r"x\.safetensors is damaged"):
            shards.map_shard(path)
    good = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    for tail in (4, 7):
        path.write_bytes(len(good).to_bytes(8, "little") + good + bytes(tail))
        with pytest.raises(ExtractionError, match=r"F32 \[2\] at bytes 0 to 8"):
            shards.map_shard(path)


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16", "int8"])
def test_tensors_begin_at_multiples_of_64_bytes(source: Path, tmp_path: Path, dtype: Any) -> None:
    """All of such a size do; the others are aligned to their items, at least."""
    kinds: Any = ("cls", "patches", "registers")
    run(source, tmp_path / "out", ExtractionOptions(shard_rows=8, dtype=dtype, outputs=kinds, layers=(3,)))
    for path in (tmp_path / "out").glob("*.safetensors"):
        tensors = shards.map_shard(path)
        assert len(tensors) == (12 if dtype == "int8" else 6)
        for name, tensor in tensors.items():
            address = tensor.__array_interface__["data"][0]  # files are mapped at the beginning of a page
            assert address % (64 if tensor.nbytes % 64 == 0 else tensor.itemsize) == 0, name
            assert tensor.flags.aligned


def test_tensors_of_other_writers_are_aligned_by_a_copy(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]}}).encode()
    data = np.array([1.5, 2.5], np.float32).tobytes()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" + data)
    [tensor] = shards.map_shard(tmp_path / "x.safetensors").values()
    assert tensor.flags.aligned
    assert tensor.tolist() == [1.5, 2.5]
