"""Rows, shards and manifests of whole runs, with a stub for the client."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from dinov3_client import Unavailable
from dinov3_client.bulk import durable, images, reading, sources
from dinov3_client.bulk.rows import ExtractionOptions
from tests.client.bulk.stub import (
    ProgressListener,
    StubClient,
    broken,
    contents,
    failed,
    manifest,
    run,
    stopped,
    tree,
    values,
)


def test_rows_lie_where_the_manifest_says(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    progress = ProgressListener()
    totals = run(source, out, ExtractionOptions(shard_rows=4, layers=(3, 0)), progress=progress)
    assert (totals.images, totals.rows, totals.failed, totals.shards) == (12, 9, 3, 3)
    header, *lines = manifest(out)
    assert (header["manifest"], header["model"], header["fingerprint"]) == (1, "dinov3_vits16", "f00d")
    assert header["options"]["layers"] == [3, 0]
    assert header["source"]["images"] == 12
    rows = [line for line in lines if "id" in line]
    assert [row["id"] for row in rows] == [f"{n:02}.jpg" for n in range(12) if n not in (0, 6, 11)]
    assert [(row["shard"][9:14], row["row"]) for row in rows] == [(f"{n // 4:05}", n % 4) for n in range(9)]
    for row in rows:
        tensors = load_file(out / row["shard"])
        data = (source / row["id"]).read_bytes()
        assert sorted(tensors) == ["cls", "layer0_cls", "layer0_patches", "layer3_cls", "layer3_patches", "patches"]
        for name, tensor in tensors.items():
            kind = name.rpartition("_")[2]
            layer = int(name[5]) if name.startswith("layer") else None
            assert np.array_equal(tensor[row["row"]], values(data, kind, layer))
    commits = [line for line in lines if "id" not in line]
    assert [commit.get("committed") or commit.get("complete") for commit in commits] == [
        {"images": 5, "rows": 4, "failed": 1, "shards": 1},
        {"images": 10, "rows": 8, "failed": 2, "shards": 2},
        {"images": 12, "rows": 9, "failed": 3, "shards": 3},
    ]
    assert "complete" in commits[-1]
    assert commits[0]["sizes"] == {"32x32": {"rows": 4, "grid": [2, 2], "layer3_grid": [2, 2], "layer0_grid": [2, 2]}}
    assert [line["index"] for line in failed(out)] == [0, 6, 11]
    assert failed(out)[1] == {
        "id": "06.jpg", "index": 6, "source": f"{source}/06.jpg", "reason": "not an image: broken 6",
    }  # fmt: skip
    assert progress.begun == (0, 12)
    assert progress.advanced == 12
    assert [name for name, _ in progress.failures] == ["00.jpg", "06.jpg", "11.jpg"]


def test_images_of_several_sizes_share_a_shard(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for index in range(5):
        (source / f"{index}.jpg").write_bytes(contents(index, size=(32, 16 * (1 + index % 2))))
    run(source, out, ExtractionOptions(preset="none", dtype="float32"))
    rows = [line for line in manifest(out) if "id" in line]
    assert [(row["size"], row["row"]) for row in rows] == [
        ("32x16", 0), ("32x32", 0), ("32x16", 1), ("32x32", 1), ("32x16", 2),
    ]  # fmt: skip
    tensors = load_file(out / "features-00000.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        "32x16/cls": (3, 6), "32x16/patches": (3, 2, 6), "32x32/cls": (2, 6), "32x32/patches": (2, 4, 6),
    }  # fmt: skip
    for row in rows:
        expected = values((source / row["id"]).read_bytes(), "patches", dtype="float32")
        assert np.array_equal(tensors[f"{row['size']}/patches"][row["row"]], expected)


def test_a_shard_ends_before_it_is_too_large(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinov3_client.bulk.extraction.SHARD_BYTES", 3 * 12)
    run(source, tmp_path / "out", ExtractionOptions(outputs=("cls",)))
    assert [len(load_file(path)["cls"]) for path in sorted((tmp_path / "out").glob("*.safetensors"))] == [3, 3, 3]
    monkeypatch.setattr("dinov3_client.bulk.extraction.SHARD_BYTES", 1)
    assert run(source, tmp_path / "each", ExtractionOptions(outputs=("cls",))).shards == 9


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.booleans(), max_size=14),
    st.integers(1, 6),
    st.integers(1, 5),
    st.lists(st.integers(0, 6), max_size=3),
)
def test_rows_follow_from_the_images_alone(
    tmp_path_factory: pytest.TempPathFactory, good: list[bool], shard_rows: int, batch: int, stops: list[int]
) -> None:
    """Whatever the sizes of batches, and wherever runs were stopped."""
    folder = tmp_path_factory.mktemp("runs")
    for index, each in enumerate([*good, True]):
        (folder / f"{index:02}.jpg").write_bytes(contents(index) if each else broken(index))
    options = ExtractionOptions(shard_rows=shard_rows, outputs=("cls",))
    run(folder, folder / "whole", options)
    for stop in stops:
        client = StubClient(stop=(stop, Unavailable("gone")))
        try:
            run(folder, folder / "parts", options, client=client, batch_images=batch)
        except Unavailable:
            continue
    run(folder, folder / "parts", options, batch_images=batch)
    assert tree(folder / "whole") == tree(folder / "parts")
    rows = [line for line in manifest(folder / "whole") if "id" in line]
    assert [row["index"] for row in rows] == [index for index, each in enumerate([*good, True]) if each]
    assert [(int(row["shard"][9:14]), row["row"]) for row in rows] == [divmod(n, shard_rows) for n in range(len(rows))]
    shutil.rmtree(folder)


def test_unreadable_files_fail_alone(source: Path, tmp_path: Path) -> None:
    (source / "large.jpg").write_bytes(b"")
    with (source / "large.jpg").open("r+b") as file:
        file.truncate(100 << 20)  # a hole, that is not read
    (source / "gone.jpg").symlink_to(tmp_path / "nowhere")
    os.mkfifo(source / "pipe.jpg")
    totals = run(source, tmp_path / "out")
    assert (totals.rows, totals.failed) == (9, 6)
    reasons = {line["id"]: line["reason"] for line in failed(tmp_path / "out")}
    assert reasons["gone.jpg"] == "No such file or directory"
    assert reasons["pipe.jpg"] == "not a regular file"
    assert reasons["large.jpg"] == "104857600 bytes are over the server's limit of 67043328 for the files of a request"


def test_a_disk_that_fails_is_no_broken_image(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = images.ImageRef.read

    def failing(item: images.ImageRef, most: int | None = None) -> bytes:
        if item.id == "07.jpg":
            raise OSError(errno.EIO, "Input/output error", item.path)
        return read(item, most)

    with monkeypatch.context() as patched:
        patched.setattr(images.ImageRef, "read", failing)
        with pytest.raises(OSError, match="Input/output error"):
            run(source, tmp_path / "out", batch_images=1)
    run(source, tmp_path / "out")
    run(source, tmp_path / "whole")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-")]


@pytest.mark.parametrize(("name", "shown"), [(durable.DRAFT, "features-00001"), ("partial.bin", "partial.bin")])
def test_a_full_disk_names_the_file_and_leaves_no_draft(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, shown: str
) -> None:
    write = os.write

    def full(descriptor: int, data: bytes) -> int:
        if Path(f"/proc/self/fd/{descriptor}").readlink().name == name:
            write(descriptor, bytes(data)[:5])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    out = tmp_path / "out"
    stopped(source, out)
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(OSError, match=rf"No space left on device: '.*{shown}"):
            run(source, out)
    assert not list(out.glob(".*.tmp"))
    run(source, out)
    run(source, tmp_path / "whole")
    assert tree(out) == tree(tmp_path / "whole")


def test_reading_ahead_is_bounded(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "AHEAD_BYTES", 20)
    begun: set[str] = set()
    read = images.ImageRef.read

    def counted(item: images.ImageRef, most: int | None = None) -> bytes:
        begun.add(item.id)
        return read(item, most)

    monkeypatch.setattr(images.ImageRef, "read", counted)
    with reading.ImageReader(sources.find_images([str(source)]), range(12), most_bytes=1000, batch_images=1) as reader:
        batches = reader.batches()
        next(batches)
        # What was taken, 20 bytes (two files) that wait, and at most a file a thread besides.
        assert len(begun) <= 3 + 2 + reading.THREADS
        assert len(list(batches)) == 11
    assert len(begun) == 12


def test_batches_end_at_images_and_bytes_of_files_and_of_features(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = sources.find_images([str(source)])

    def lengths(batch_images: int, row_nbytes: int) -> list[int]:
        with reading.ImageReader(images, range(2, 12), most_bytes=1000, batch_images=batch_images) as reader:
            lengths = []
            for batch in reader.batches():
                lengths.append(len(batch))
                reader.fit(row_nbytes)
                reader.fit(1)  # the largest counts
            entries = [[entry.index for entry in entries] for entries in reader.sent]
        assert [len(each) for each in entries] == lengths
        assert [index for each in entries for index in each] == list(range(2, 12))
        return lengths

    assert lengths(4, 100) == [1, 4, 4, 1]
    assert lengths(4, 0) == [1, 4, 4, 1]
    monkeypatch.setattr(reading, "BATCH_BYTES", 1000)
    assert lengths(4, 334) == [1, 2, 2, 2, 2, 1]
    assert lengths(4, 1001) == [1] * 10
    monkeypatch.setattr(reading, "BATCH_BYTES", 40)
    with reading.ImageReader(images, range(12), most_bytes=1000, batch_images=100) as reader:
        reader.fit(1)
        batches = list(reader.batches())
    assert max(map(len, batches)) > 1
    assert all(len(batch) == 1 or sum(map(len, batch)) <= 40 for batch in batches)
    assert b"".join(b"".join(batch) for batch in batches) == b"".join(item.read() for item in images)


def test_options_reach_the_calls(source: Path, tmp_path: Path) -> None:
    client = StubClient()
    options = ExtractionOptions(
        outputs=("registers",), preset="hf", size=(32, 64), interpolation="lanczos", exif=True, pool=(2, 3)
    )
    run(source, tmp_path / "out", options, client=client)
    assert client.options == {
        "outputs": ("registers",), "in_flight": 2, "priority": "bulk", "on_error": "return", "layers": (),
        "preset": "hf", "size": (32, 64), "interpolation": "lanczos", "exif": True, "dtype": "float16",
        "pooling": (2, 3), "projection": None, "fit": ExtractionOptions().fit, "background": None,
        "allow_truncated": False,
    }  # fmt: skip
