"""Results between two commits: kept at once, on the disk soon, used by the next run, gone at the end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from dinov3_client import Unavailable
from dinov3_client.bulk import ExtractionError, partial
from dinov3_client.bulk.partial import PARTIAL
from dinov3_client.bulk.rows import ExtractionOptions
from dinov3_client.cli import main
from dinov3_client.testing import Failure, FakeServer
from tests.client.bulk.stub import ProgressListener, StubClient, contents, run, tree
from tests.client.bulk.test_command import pattern, png
from tests.client.test_interrupts import COMMAND, environment

OPTIONS = ExtractionOptions(outputs=("cls",), layers=(3,))


def half(source: Path, out: Path) -> None:
    with pytest.raises(Unavailable):
        run(source, out, OPTIONS, client=StubClient(stop=(5, Unavailable("gone"))), batch_images=2)
    assert (out / PARTIAL).stat().st_size > 0
    assert not list(out.glob("features-*"))


def test_3000_images_killed_half_way_go_on_from_there(tmp_path: Path) -> None:
    """Far below one shard of 4096 rows."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for index in range(3000):
        broken = index in (0, 1400, 2999)
        (source / f"{index:04}.png").write_bytes(b"no picture" if broken else png(pattern(index, 16, 16)))
    options = ("--preset", "none", "--outputs", "cls", "--layers", "2")
    with FakeServer() as server:
        command = ["extract", str(source), "--target", server.target, *options]
        main([*command, "--out", str(tmp_path / "whole")])
        calls, images = len(server.calls), sum(len(request.images) for request in server.requests)
        assert images == 3000
        server.script = [None] * 50 + [Failure(grpc.StatusCode.UNAVAILABLE, "busy", retry_after=0.01)] * 9999
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, *command, "--out", str(out), "--in-flight", "1"], env=environment()
        )
        try:
            server.wait_for_calls(calls + 53)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert not list(out.glob("features-*"))
        server.script, before = [], len(server.requests)
        main([*command, "--out", str(out)])
        again = sum(len(request.images) for request in server.requests[before:])
    assert 1400 < again < 1500
    assert tree(out) == tree(tmp_path / "whole")


def test_what_was_answered_is_not_requested_again(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    half(source, out)
    client, progress = StubClient(), ProgressListener()
    run(source, out, OPTIONS, client=client, progress=progress)
    assert progress.begun == (5, 12)
    assert progress.advanced == 7
    assert b"".join(client.batches[0]) == contents(5)
    run(source, tmp_path / "whole", OPTIONS)
    assert tree(out) == tree(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["cut", "flip", "zeros", "another"])
def test_damaged_records_are_requested_again(source: Path, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "out"
    half(source, out)
    run(source, tmp_path / "whole", OPTIONS)
    data = (out / PARTIAL).read_bytes()
    places = range(0, len(data), 37)
    for place in places:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(out, tmp_path / "copy")
        damaged = {
            "cut": data[:place],
            "flip": data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :],
            "zeros": data[:place] + bytes(100),
            "another": data[place:],
        }[damage]
        (tmp_path / "copy" / PARTIAL).write_bytes(damaged)
        run(source, tmp_path / "copy", OPTIONS)
        assert tree(tmp_path / "copy") == tree(tmp_path / "whole"), place


def test_results_that_were_committed_meanwhile_are_skipped(source: Path, tmp_path: Path) -> None:
    """As after a crash between the commit and the emptying of the file."""
    out = tmp_path / "out"
    half(source, out)
    stale = (out / PARTIAL).read_bytes()
    run(source, out, OPTIONS)
    (out / PARTIAL).write_bytes(stale)
    run(source, out, OPTIONS)
    run(source, tmp_path / "whole", OPTIONS)
    assert tree(out) == tree(tmp_path / "whole")


def test_other_images_or_options_than_those_kept_are_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    half(source, out)
    before = tree(out)
    with pytest.raises(ExtractionError, match=r'\(5 images done\): dtype is "float16" there and "float32" now'):
        run(source, out, ExtractionOptions(outputs=("cls",), layers=(3,), dtype="float32"))
    for name in ("01.jpg", "04.jpg"):  # the first and the last that have features
        data = (source / name).read_bytes()
        (source / name).write_bytes(contents(77))
        with pytest.raises(ExtractionError, match=rf"{name} is not the file that it was"):
            run(source, out, OPTIONS)
        (source / name).write_bytes(data)
    assert tree(out) == before


def test_they_are_synced_every_few_seconds(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each append is written at once, which survives SIGKILL; the disk has it after SYNC_SECONDS."""
    seconds, synced = [0.0], list[str]()
    monkeypatch.setattr(partial.time, "monotonic", lambda: seconds[0])

    def fsync(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)

    monkeypatch.setattr(os, "fsync", fsync)
    file = partial.Partial(tmp_path)
    for now, expected in ((1.9, []), (2.0, [PARTIAL, tmp_path.name]), (3.9, []), (4.1, [PARTIAL, tmp_path.name])):
        seconds[0] = now
        file.append([partial.Failure("a", 0, "a", "broken")])
        assert synced == expected
        synced.clear()
