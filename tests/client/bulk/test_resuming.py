"""Extractions that are resumed: killed anywhere, continued, refused for other images, options or models."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dinov3_client import ModelMismatch, Unavailable
from dinov3_client.bulk import ExtractionError, durable
from dinov3_client.bulk.rows import ExtractionOptions
from tests.client.bulk.kill_everywhere import SCENARIOS
from tests.client.bulk.stub import ProgressListener, StubClient, broken, contents, run, stopped, tree
from tests.support.paths import ROOT


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
    assert progress.begun == (7, 12)  # five rows and a failure in a shard, and one more failure
    assert b"".join(client.batches[0][:1]) == contents(7)
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
    assert "7 images done" in str(raised.value)
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
