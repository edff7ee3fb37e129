"""`dinov3-client extract` against a fake server."""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

from dinov3_client import FeatureDataset
from dinov3_client._client import Client
from dinov3_client.cli import main
from dinov3_client.cli.extract import ProgressLine
from dinov3_client.testing import Failure, FakeServer, expected
from tests.client.bulk.stub import tree
from tests.client.test_interrupts import COMMAND, environment

Array = np.ndarray[Any, Any]


def pattern(seed: int, height: int = 32, width: int = 48) -> Array:
    """Different for each seed, and not the same at any two places."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin((x * (c + 1) + y * (seed + 1)) / 40 + c) for c in range(3)]
    return np.uint8(127 + 120 * np.stack(waves, -1))


def png(pixels: Array) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    (folder / "sub").mkdir(parents=True)
    for index in range(8):
        (folder / "sub" / f"{index}.png").write_bytes(png(pattern(index)))
    (folder / "broken.jpg").write_bytes(b"no picture")
    return folder


def summary(line: str) -> tuple[str, ...]:
    """Return the images, the folder, and the images of this run, from the last line."""
    found = re.fullmatch(
        r"(.*) images written to (.*) \(this run: ([\d,]+) images in [\d,]+\.\d s, [\d,]+\.\d/s\)\n", line
    )
    assert found is not None, line
    return found.groups()


def run(server: FakeServer, *args: object) -> int:
    return main(["extract", *map(str, args), "--target", server.target])


def test_a_folder(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    with FakeServer() as server:
        assert run(server, source, "--out", out, "--preset", "none", "--dtype", "float32", "--layers=-2") == 3
        captured = capsys.readouterr()
        assert summary(captured.out) == ("8 of 9", str(out), "9")
        assert captured.err.splitlines()[0].startswith("dinov3-client: broken.jpg: ")
        assert captured.err.splitlines()[1:] == [
            f"dinov3-client: 1 of 9 images have no features: see {out}/failed.jsonl"
        ]
        assert all(request.priority == 2 for request in server.requests)  # bulk
        count = len(server.requests)
        before = tree(out)
        assert run(server, source, "--out", out, "--preset", "none", "--dtype", "float32", "--layers=10") == 3
        assert len(server.requests) == count  # all was done
        assert tree(out) == before
    dataset = FeatureDataset(out)
    assert list(dataset.ids()) == [f"sub/{index}.png" for index in range(8)]
    for index in range(8):
        item = dataset[index]
        assert np.array_equal(item["patches"], expected(pattern(index), "patches"))
        assert np.array_equal(item["layer10_cls"], expected(pattern(index), "cls", layer=10))
        assert (item["grid"].tolist(), item["input_size"].tolist()) == ([2, 3], [32, 48])


def test_the_options_in_requests(source: Path, tmp_path: Path) -> None:
    options = (
        "--outputs", "registers,patches", "--size", "64x32", "--interpolation", "lanczos", "--exif", "--dtype", "int8",
        "--pool", "1x2", "--projection", "half", "--batch-size", "3", "--priority", "interactive",
    )  # fmt: skip
    weight = np.random.default_rng(0).normal(size=(12, 24)).astype(np.float32)
    with FakeServer(projections={"half": weight}) as server:
        assert run(server, source, "--out", tmp_path / "out", *options) == 3
        request = server.requests[-1]
        assert (request.outputs.cls, request.outputs.patches, request.outputs.registers) == (False, True, True)
        assert (request.outputs.pooling.grid_height, request.outputs.pooling.grid_width) == (1, 2)
        assert (request.outputs.projection, request.priority) == ("half", 1)
        assert (request.preprocessing.size.height, request.preprocessing.size.width) == (64, 32)
        assert request.preprocessing.apply_exif_orientation
        assert max(len(request.images) for request in server.requests) == 3
        assert run(server, source, "--out", tmp_path / "none", "--projection", "whole") == 2
        dataset = FeatureDataset(tmp_path / "out")
        with Client(server.target) as client:
            exact = client.extract(
                source / "sub" / "3.png", ("patches", "registers"), size=(64, 32), interpolation="lanczos",
                dtype="int8", pooling=(1, 2), projection="half",
            )  # fmt: skip
    assert np.array_equal(dataset["sub/3.png"]["patches"], exact[0].patches)
    assert np.array_equal(dataset["sub/3.png"]["registers"], exact[0].registers)
    assert dataset["sub/3.png"]["patches"].shape == (2, 12)
    assert dataset.raw("sub/3.png")["registers_scales"].shape == (4,)
    assert dataset.fingerprint.startswith("f00d+")


def test_a_projection_that_is_not_there(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer() as server:
        assert run(server, source, "--out", tmp_path / "out", "--projection", "half") == 2
    assert "the server has no projection 'half'; it has none at all" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_shards_of_webdataset_and_lists(tmp_path: Path) -> None:
    for number in range(2):
        with tarfile.open(tmp_path / f"s-{number}.tar", "w") as tar:
            for sample in range(2):
                for ending, data in (("png", png(pattern(10 * number + sample))), ("json", b"{}")):
                    member = tarfile.TarInfo(f"{sample:04}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    (tmp_path / "x.png").write_bytes(png(pattern(5)))
    (tmp_path / "list.txt").write_text(f"{tmp_path}/x.png\n{tmp_path}/missing.png\n")
    with FakeServer() as server:
        code = run(
            server, tmp_path / "s-{0..1}.tar", "--list", tmp_path / "list.txt", "--out", tmp_path / "out",
            "--preset", "none", "--dtype", "float32", "--outputs", "cls",
        )  # fmt: skip
    assert code == 3
    dataset = FeatureDataset(tmp_path / "out")
    assert len(dataset) == 5
    for image, seed in ((f"{tmp_path}/s-1.tar:0001", 11), (f"{tmp_path}/x.png", 5)):
        assert np.array_equal(dataset[image]["cls"], expected(pattern(seed), "cls"))
    [failure] = map(json.loads, (tmp_path / "out" / "failed.jsonl").read_text().splitlines())
    assert failure["reason"] == "No such file or directory"


def test_npz(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--format", "npz", "--preset", "none", "--dtype", "float32", "--layers", "0")
    with FakeServer() as server:
        assert run(server, *sorted((source / "sub").iterdir()), "--out", out, *options) == 0
    assert sorted(path.name for path in out.glob("*.npz")) == [f"{index}.npz" for index in range(8)]
    with np.load(out / "3.npz") as file:
        arrays = {"cls", "patches", "layer0_cls", "layer0_patches", "grid", "layer0_grid", "input_size"}
        assert set(file.files) == arrays | {"preset", "exif", "fit", "source", "model", "weights", "fingerprint"}
        assert np.array_equal(file["layer0_patches"], expected(pattern(3), "patches", layer=0))
        assert {key: str(file[key]) for key in ("preset", "exif", "source", "model", "weights", "fingerprint")} == {
            "preset": "none",
            "exif": "False",
            "source": str(source / "sub" / "3.png"),
            "model": "dinov3_vits16",
            "weights": "dinov3_vits16.pth",
            "fingerprint": "f00d",
        }


def test_a_server_that_goes_away_stops_it_and_it_goes_on(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--shard-rows", "2", "--batch-size", "1", "--in-flight", "1", "--outputs", "cls")
    with FakeServer() as server:
        assert run(server, source, "--out", tmp_path / "whole", *options) == 3
        server.script = [None] * 5 + [Failure(grpc.StatusCode.UNAUTHENTICATED, "another token, please")] * 9
        capsys.readouterr()
        out = tmp_path / "out"
        assert run(server, source, "--out", out, *options) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.splitlines()[-2:] == [
            "dinov3-client: another token, please: give the server's token by --token-file FILE or by the environment "
            "variable DINOV3_TOKEN",
            f"dinov3-client: stopped; {out} keeps what was answered, and the same command resumes from there",
        ]
        assert len(FeatureDataset(out, unfinished=True)) == 4
        server.script = []
        assert run(server, source, "--out", out, *options) == 3
        captured = capsys.readouterr()
        assert summary(captured.out) == ("8 of 9", str(out), "4")
        assert "resuming after 5 of 9 images" in captured.err
    assert tree(out) == tree(tmp_path / "whole")


@pytest.mark.parametrize(
    ("calls", "sent", "code"),
    [
        (3, signal.SIGKILL, -signal.SIGKILL),
        (6, signal.SIGKILL, -signal.SIGKILL),
        (6, signal.SIGTERM, 130),
        (6, signal.SIGINT, 130),
    ],
)
def test_killed_or_ended_and_the_same_again(
    source: Path, tmp_path: Path, calls: int, sent: signal.Signals, code: int
) -> None:
    out = tmp_path / "out"
    options = ("--shard-rows", "2", "--batch-size", "1", "--in-flight", "2", "--layers", "3")
    with FakeServer() as server:
        assert run(server, source, "--out", tmp_path / "whole", *options) == 3
        so_far = sum(call.method == "Extract" for call in server.calls)
        # It waits for the answer that never comes: at that call, whatever the machine's speed.
        server.script = [None] * (calls - 1) + [Failure(grpc.StatusCode.UNAVAILABLE, "busy", retry_after=0.01)] * 9999
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, "extract",
             str(source), "--out", str(out), "--target", server.target, *options],
            env=environment(), stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            server.wait_for_calls(so_far + calls + 2)
            process.send_signal(sent)
            _, said = process.communicate()
            assert process.returncode == code
            report = {
                "dinov3-client: interrupted",
                f"dinov3-client: stopped; {out} keeps what was answered, and the same command resumes from there",
            }
            assert report & set(said.splitlines()) == (set() if sent == signal.SIGKILL else report)
        finally:
            process.kill()
            process.wait()
        server.script = []
        assert run(server, source, "--out", out, *options) == 3
    assert tree(out) == tree(tmp_path / "whole")


def test_failed_images_may_be_allowed_at_any_time(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "broken2.jpg").write_bytes(b"no picture")
    with FakeServer() as server:
        assert run(server, source, "--out", tmp_path / "out", "--allow-failed", "1") == 3
        assert run(server, source, "--out", tmp_path / "out") == 3
        capsys.readouterr()
        assert run(server, source, "--out", tmp_path / "out", "--allow-failed", "2") == 0
    captured = capsys.readouterr()
    assert summary(captured.out) == ("8 of 10", str(tmp_path / "out"), "0")
    assert "2 of 10 images have no features" in captured.err


def test_options_that_the_server_refuses_are_no_reason_to_try_again(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeServer() as server:
        assert run(server, source, "--out", tmp_path / "out", "--size", "518") == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "518" in captured.err.splitlines()[-2]
        assert captured.err.endswith("keeps what was answered, and the same command would be refused again\n")
        assert run(server, source / "sub", "--out", tmp_path / "out", "--size", "512") == 0


def test_a_folder_in_use_is_worth_another_try(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with FakeServer() as server, (tmp_path / "out" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run(server, source, "--out", tmp_path / "out") == 1


def test_a_folder_whose_name_is_no_text(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    out = os.fsdecode(b"caf\xe9")
    with FakeServer() as server:
        assert run(server, source / "sub", "--out", out, "--outputs", "cls") == 0
    assert summary(capsys.readouterr().out) == ("8 of 8", "caf\\udce9", "8")


def test_refusals_are_one_line(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    with FakeServer() as server:
        run(server, source, "--out", out)
        capsys.readouterr()
        assert run(server, source, "--out", out, "--dtype", "float32") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert f'{out} holds another extraction (9 images done): dtype is "float16" there and "float32" now. To' in line


USAGE = [
    ([], "--out"),
    (["--out", "x"], "nothing to extract: give a SOURCE, or a --list of images"),
    (["none.jpg", "--out", "x"], "there is no file or folder none.jpg"),
    (["{here}", "{here}", "--out", "x"], "two images have the id broken.jpg: "),
    (["{here}/sub", "{here}/sub/../sub", "--format", "npz", "--out", "x"], "two images have the id 0.png"),
    (["{here}/sub/0.png", "{here}/sub/../sub/0.png", "--format", "npz", "--out", "x"], "would both become 0.npz"),
    (
        ["{here}", "--out", "x", "--format", "npz", "--dtype", "bfloat16"],
        "--dtype bfloat16 is not possible in npz files",
    ),
    (["{here}", "--out", "x", "--shard-rows", "0"], "'0' is not a number of at least 1"),
    (["{here}", "--out", "x", "--in-flight", "-1"], "'-1' is not a number of at least 1"),
    (["{here}", "--out", "x", "--pool", "0"], "'0' is not a size"),
    (["{here}", "--out", "x", "--preset", "imagenet"], "invalid choice: 'imagenet'"),
    (
        ["{here}", "--out", "x", "--outputs", "cls,tokens"],
        "'tokens' is not an output; allowed are cls, patches and registers",
    ),
    (["{here}", "--out", "x", "--layers", "12"], "layer 12: dinov3_vits16 has the layers 0 to 11"),
]


@pytest.mark.parametrize(("args", "message"), USAGE, ids=[message for _, message in USAGE])
def test_wrong_usage_exits_with_2(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with FakeServer() as server, pytest.raises(SystemExit) as exited:
        run(server, *(each.replace("{here}", str(source)) for each in args))
    assert exited.value.code == 2
    assert message in capsys.readouterr().err
    assert not server.requests
    assert not (tmp_path / "x").exists()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_is_one_line() -> None:
    seconds = [0.0]
    stream = Terminal()
    progress = ProgressLine(stream, lambda: seconds[0])
    progress.begin(0, 2000)
    for now in (0.1, 10.0, 10.1, 20.0):
        seconds[0] = now
        progress.advance(100)
    progress.end()
    first, second = "200 of 2,000 (10.0%), 20.0/s, 2 min left", "400 of 2,000 (20.0%), 20.0/s, 1 min left"
    assert stream.getvalue() == f"\r{first}\r{second}\r{' ' * len(second)}\r".replace("2 min", "1 min", 1)


def test_progress_elsewhere_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = [100.0]
    progress = ProgressLine(io.StringIO(), lambda: seconds[0])
    progress.begin(500, 10_000)
    for now, images in ((105.0, 50), (110.0, 50), (111.0, 500), (120.0, 300)):
        seconds[0] = now
        progress.advance(images)
    for index in range(30):
        progress.failed(f"{index}.jpg", "no image")
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == [
        "dinov3-client: resuming after 500 of 10,000 images",
        "dinov3-client: 600 of 10,000 (6.0%), 10.0/s, 15 min left",
        "dinov3-client: 1,400 of 10,000 (14.0%), 45.0/s, 3 min left",
    ]
    assert lines[3:] == [
        *(f"dinov3-client: {index}.jpg: no image" for index in range(20)),
        "dinov3-client: more images have no features; they are not shown here",
    ]
