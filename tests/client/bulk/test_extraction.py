"""Rows, shards and manifests of whole runs, with a stub for the client."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from dinov3_client import ModelMismatch, Unavailable
from dinov3_client.bulk import ExtractionError, durable, reading, shards, sources
from dinov3_client.bulk.errors import SourceError
from dinov3_client.bulk.rows import ExtractionOptions
from tests.client.bulk.kill_everywhere import SCENARIOS
from tests.client.bulk.stub import ProgressListener, StubClient, broken, contents, run, tree, values
from tests.support.paths import ROOT


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for index in range(12):
        (folder / f"{index:02}.jpg").write_bytes(broken(index) if index in (0, 6, 11) else contents(index))
    return folder


def manifest(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def failed(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "failed.jsonl").read_text().splitlines()]


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


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_killed_anywhere_and_gone_on_is_as_if_never_killed(tmp_path: Path, scenario: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.client.bulk.kill_everywhere", str(tmp_path), scenario],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    places = int(done.stdout.split()[1])
    assert places > 15, done.stdout


def test_resuming_requests_only_uncommitted_images(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Unavailable):
        run(source, out, client=StubClient(stop=(6, Unavailable("gone"))), batch_images=2)
    client, progress = StubClient(), ProgressListener()
    run(source, out, client=client, progress=progress)
    assert progress.begun == (6, 12)  # five rows and a failure
    assert b"".join(client.batches[0][:1]) == broken(6)
    again, progress = StubClient(), ProgressListener()
    assert run(source, out, client=again, progress=progress).rows == 9
    assert (again.batches, progress.begun, progress.advanced) == ([], (12, 12), 0)


@pytest.mark.parametrize("cut", range(1, 400, 23))
def test_a_torn_end_of_the_manifest_is_done_again(source: Path, tmp_path: Path, cut: int) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(source, whole)
    shutil.copytree(whole, out)
    text = (out / "manifest.jsonl").read_bytes()
    (out / "manifest.jsonl").write_bytes(text[:-cut])
    with (out / "failed.jsonl").open("ab") as file:
        file.write(b'{"id": "half of a li')
    run(source, out)
    assert tree(whole) == tree(out)


def test_zeros_after_the_last_commit_do_not_count(source: Path, tmp_path: Path) -> None:
    """As a machine without power may leave them."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(source, whole)
    shutil.copytree(whole, out)
    with (out / "manifest.jsonl").open("ab") as file:
        file.write(bytes(100) + b"\n" + bytes(10))
    run(source, out)
    assert tree(whole) == tree(out)


def test_a_shard_that_was_not_committed_does_not_stay(source: Path, tmp_path: Path) -> None:
    """Even where its images, tried again, have no features."""
    out = tmp_path / "out"
    stopped(source, out)
    for name in ("features-00001.safetensors", durable.DRAFT):
        (out / name).write_bytes(b"of a run that was killed")
    for index in range(6, 12):
        (source / f"{index:02}.jpg").write_bytes(broken(index))
    assert (run(source, out).rows, sorted(path.name for path in out.glob("*features*"))) == (
        5,
        ["features-00000.safetensors"],
    )


def stopped(source: Path, out: Path, options: ExtractionOptions | None = None) -> None:
    with pytest.raises(Unavailable):
        run(source, out, options, client=StubClient(stop=(6, Unavailable("gone"))), batch_images=2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": "float32"}, 'dtype is "float16" there and "float32" now'),
        ({"outputs": ("cls",)}, 'outputs is ["cls", "patches"] there and ["cls"] now'),
        ({"layers": (2,)}, "layers is [] there and [2] now"),
        ({"preset": "hf"}, 'preset is "dinov3" there and "hf" now'),
        ({"size": (64, 32)}, "size is null there and [64, 32] now"),
        ({"interpolation": "nearest"}, 'interpolation is null there and "nearest" now'),
        ({"exif": True}, "exif is false there and true now"),
        ({"pool": (7, 7)}, "pool is null there and [7, 7] now"),
        ({"shard_rows": 6}, "shard_rows is 5 there and 6 now"),
        ({"format": "npz"}, 'format is "safetensors" there and "npz" now'),
    ],
)
def test_other_options_are_refused(source: Path, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    out = tmp_path / "out"
    options = ExtractionOptions(shard_rows=5)
    stopped(source, out, options)
    before = tree(out)
    with pytest.raises(ExtractionError) as raised:
        run(source, out, replace(options, **change))
    assert words in str(raised.value)
    assert str(raised.value).count(" there and ") == 1
    assert "6 images done" in str(raised.value)
    assert "another --out" in str(raised.value)
    assert tree(out) == before


def test_other_images_are_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stopped(source, out)
    before = tree(out)
    (source / "99.jpg").write_bytes(contents(99))
    with pytest.raises(ExtractionError, match=r"source\.images is 12 there and 13 now; source\.sha256 is"):
        run(source, out)
    (source / "99.jpg").unlink()
    (source / "11.jpg").rename(source / "12.jpg")
    with pytest.raises(ExtractionError, match=r": source\.sha256 is"):
        run(source, out)
    (source / "12.jpg").rename(source / "11.jpg")
    # The names are the same, and the pictures are not.
    (source / "01.jpg").write_bytes(contents(77))
    progress = ProgressListener()
    with pytest.raises(ExtractionError, match=r"01\.jpg is not the file that it was"):
        run(source, out, progress=progress)
    (source / "01.jpg").unlink()
    (source / "01.jpg").symlink_to("nowhere")
    with pytest.raises(
        ExtractionError, match=r"01\.jpg, whose .* cannot be read any more \(No such file or directory\)"
    ):
        run(source, out, progress=progress)
    assert progress.begun is None  # both runs failed before they began
    (source / "01.jpg").unlink()
    assert tree(out) == before
    (source / "01.jpg").write_bytes(contents(1))
    assert run(source, out).rows == 9


def test_another_model_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    stopped(source, out)
    before = tree(out)
    with pytest.raises(ModelMismatch, match="fingerprint is beef, and the extraction began with f00d"):
        run(source, out, client=StubClient("beef"))
    from tests.client.bulk import stub

    monkeypatch.setattr(stub, "MODEL", replace(stub.MODEL, fingerprint="beef", weights="other.pth"))
    with pytest.raises(ExtractionError) as raised:
        run(source, out, client=StubClient("beef"))
    assert 'fingerprint is "f00d" there and "beef" now' in str(raised.value)
    assert "dinov3_vits16 (dinov3_vits16.pth) and is dinov3_vits16 (other.pth)" in str(raised.value)
    assert tree(out) == before
    # The same weights under another name are the same model.
    monkeypatch.setattr(stub, "MODEL", replace(stub.MODEL, fingerprint="f00d", weights="copy.pth"))
    assert run(source, out).rows == 9


def test_an_extraction_without_commits_may_begin_again_with_other_options(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Unavailable):
        run(source, out, client=StubClient(stop=(0, Unavailable("gone"))))
    run(source, out, ExtractionOptions(dtype="float32"))
    run(source, tmp_path / "whole", ExtractionOptions(dtype="float32"))
    assert tree(out) == tree(tmp_path / "whole")


def test_one_process_at_a_time(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with (out / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ExtractionError, match="is in use: another process is extracting into it"):
            run(source, out)
    assert run(source, out).rows == 9


def test_features_without_a_manifest_are_left_alone(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(source, out)
    (out / "manifest.jsonl").unlink()
    before = tree(out)
    with pytest.raises(ExtractionError, match=r"holds features but no manifest\.jsonl"):
        run(source, out)
    for text in (b"notes of mine\n", b'{"rows": 3}\n', b'"text"'):
        (out / "manifest.jsonl").write_bytes(text)
        with pytest.raises(ExtractionError, match="is no manifest of"):
            run(source, out)
        (out / "manifest.jsonl").unlink()
    (out / "manifest.jsonl").write_text('{"manifest": 2}\n')
    with pytest.raises(ExtractionError, match="has schema 2, but this dinov3-client knows 1"):
        run(source, out)
    (out / "manifest.jsonl").unlink()
    assert tree(out) == before


def test_failures_that_were_removed_are_missed(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(source, out)
    (out / "failed.jsonl").unlink()
    with pytest.raises(ExtractionError, match="counts 3 failed images, and it names 0"):
        run(source, out)


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
    read = sources.ImageRef.read

    def failing(item: sources.ImageRef, most: int | None = None) -> bytes:
        if item.id == "07.jpg":
            raise OSError(errno.EIO, "Input/output error", item.path)
        return read(item, most)

    with monkeypatch.context() as patched:
        patched.setattr(sources.ImageRef, "read", failing)
        with pytest.raises(OSError, match="Input/output error"):
            run(source, tmp_path / "out", batch_images=1)
    run(source, tmp_path / "out")
    run(source, tmp_path / "whole")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-")]


def test_a_full_disk_names_the_file_and_leaves_no_draft(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "out"
    stopped(source, out)
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*features-00001"):
            run(source, out)
    assert not list(out.glob(".*.tmp"))
    run(source, out)
    run(source, tmp_path / "whole")
    assert tree(out) == tree(tmp_path / "whole")


def test_reading_ahead_is_bounded(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "AHEAD_BYTES", 20)
    begun: set[str] = set()
    read = sources.ImageRef.read

    def counted(item: sources.ImageRef, most: int | None = None) -> bytes:
        begun.add(item.id)
        return read(item, most)

    monkeypatch.setattr(sources.ImageRef, "read", counted)
    with reading.ImageReader(sources.find_images([str(source)]), 0, most_bytes=1000, batch_images=1) as reader:
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
        with reading.ImageReader(images, 2, most_bytes=1000, batch_images=batch_images) as reader:
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
    with reading.ImageReader(images, 0, most_bytes=1000, batch_images=100) as reader:
        reader.fit(1)
        batches = list(reader.batches())
    assert max(map(len, batches)) > 1
    assert all(len(batch) == 1 or sum(map(len, batch)) <= 40 for batch in batches)
    assert b"".join(b"".join(batch) for batch in batches) == b"".join(item.read() for item in images)


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


def test_options_reach_the_calls(source: Path, tmp_path: Path) -> None:
    client = StubClient()
    options = ExtractionOptions(
        outputs=("registers",), preset="hf", size=(32, 64), interpolation="lanczos", exif=True, pool=(2, 3)
    )
    run(source, tmp_path / "out", options, client=client)
    assert client.options == {
        "outputs": ("registers",), "in_flight": 2, "priority": "bulk", "on_error": "return", "layers": (),
        "preset": "hf", "size": (32, 64), "interpolation": "lanczos", "exif": True, "dtype": "float16",
        "pooling": (2, 3), "projection": None,
    }  # fmt: skip


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
